"""How likely a model finds given texts: summed negative log-likelihoods, several sequences at a time.

Sequences are padded on the right and go through the model without an attention mask: under causal attention no
token sees what stands behind it, so that padding can't change a loss. Of the hidden states only those that predict
a counted token meet the vocabulary, `LOGIT_ROWS` at a time; memory depends on `TOKENS_TOGETHER` and the longest
sequence, not on how many there are.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwenmed import chat
from qwenmed.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens of one forward pass, padding included; at 1.7B about 1 GB of activations in fp32.
TOKENS_TOGETHER = 4096
# Sequences among which those of like length are put together.
WINDOW = 64
# Rows of logits that exist at one time: on a GPU 600 MB at Qwen3's vocabulary in fp32.
LOGIT_ROWS = 1024
# On a CPU so many words at a time, which fit its cache; their sums are put together as in cut cross-entropy
# (Wijmans et al., 2024, arXiv:2411.09009). Twice as fast as whole rows here, and 4 MB instead of 600.
CPU_WORDS = 1024


@dataclass(frozen=True)
class Marked:
    """Token ids, and the spans of them that count (each not at position 0)."""

    ids: Sequence[int]
    spans: Sequence[range]


@dataclass(frozen=True)
class Reference(Marked):
    """A reference reply behind its prompt: the spans are thinking and answer, of so many characters."""

    characters: tuple[int, int]


@dataclass(frozen=True)
class ReferenceScore:
    """How likely a model finds a reference reply.

    Attributes:
        thinking_nll: in nats, summed over the tokens behind `<think>` up to and including `</think>`.
        answer_nll: the same over the tokens behind `</think>` up to and including `<|im_end|>`.
        thinking_tokens, answer_tokens: how many those are; no thinking counts as none.
        thinking_characters, answer_characters: how long the texts are.
    """

    thinking_nll: float
    thinking_tokens: int
    thinking_characters: int
    answer_nll: float
    answer_tokens: int
    answer_characters: int


def reference(tokenizer: "PreTrainedTokenizerBase", row: dict[str, Any]) -> Reference:
    """A training row through the chat template, with the spans of its thinking and of its answer."""
    ids, labels = chat.render_sample(tokenizer, row)
    thinking_text, answer_text = (row["completion"][0][name].strip() for name in ("reasoning_content", "content"))
    start = next(i for i, label in enumerate(labels) if label != -100)
    closed = ids.index(tokenizer.convert_tokens_to_ids(chat.THINK_END), start)
    end = len(ids) - ids[::-1].index(tokenizer.convert_tokens_to_ids(chat.END_OF_TURN))
    thinking = range(start + 1, closed + 1) if thinking_text else range(0)
    return Reference(ids, [thinking, range(closed + 1, end)], (len(thinking_text), len(answer_text)))


def score_references(model: "PreTrainedModel", references: Iterable[Reference]) -> Iterator[ReferenceScore]:
    """Score each of what `reference` has made, in order.

    Raises:
        UserError: as `summed_losses`.
    """
    ours, theirs = itertools.tee(references)
    for each, (thinking, answer) in zip(ours, summed_losses(model, theirs), strict=True):
        (thinking_span, answer_span), characters = each.spans, each.characters
        yield ReferenceScore(thinking, len(thinking_span), characters[0], answer, len(answer_span), characters[1])


def summed_losses(model: "PreTrainedModel", sequences: Iterable[Marked]) -> Iterator[list[float]]:
    """The negative log-likelihood of each span of each sequence, in nats.

    Raises:
        UserError: a token id is outside of the model's vocabulary.
    """
    waiting = iter(sequences)
    while window := list(itertools.islice(waiting, WINDOW)):
        losses: dict[int, list[float]] = {}
        for group in _groups(window):
            found = _losses(model, [window[i] for i in group])
            losses.update(zip(group, found, strict=True))
        yield from (losses[i] for i in range(len(window)))


def _groups(window: Sequence[Marked]) -> Iterator[list[int]]:
    """Numbers of sequences that go together: of like length, and within `TOKENS_TOGETHER`."""
    group: list[int] = []
    for i in sorted(range(len(window)), key=lambda i: -len(window[i].ids)):
        if group and (len(group) + 1) * len(window[group[0]].ids) > TOKENS_TOGETHER:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _losses(model: "PreTrainedModel", group: Sequence[Marked]) -> list[list[float]]:
    import torch

    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # behind LoRA
    weight = inner.get_output_embeddings().weight
    ids = torch.zeros(len(group), max(len(each.ids) for each in group), dtype=torch.long)
    for row, each in enumerate(group):
        ids[row, : len(each.ids)] = torch.tensor(each.ids)
    if int(ids.max()) >= weight.shape[0]:
        what = f"分词器与模型的词表不一致：token {int(ids.max())} 超出模型的 {weight.shape[0]} 个词"
        raise UserError(what, getattr(inner, "name_or_path", None), "请使用模型自带的分词器")
    spans = [(row, span) for row, each in enumerate(group) for span in each.spans]
    counted = [(row, place, number) for number, (row, span) in enumerate(spans) for place in span]
    sums = torch.zeros(len(spans), dtype=torch.float64)
    with torch.inference_mode():
        hidden = inner.base_model(input_ids=ids.to(weight.device), use_cache=False).last_hidden_state
        for part in _parts(counted, LOGIT_ROWS):
            rows, places, numbers = (torch.tensor(column) for column in zip(*part, strict=True))
            before = hidden[rows.to(hidden.device), (places - 1).to(hidden.device)]
            sums.index_add_(0, numbers, _token_losses(before, weight, ids[rows, places]))
    values = iter(sums.tolist())
    return [[next(values) for _ in each.spans] for each in group]


def _token_losses(hidden: "torch.Tensor", weight: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
    """Negative log-likelihoods of targets, (rows,), of the hidden states before them, (rows, width); on the CPU."""
    import torch
    from torch.nn import functional

    hidden = hidden.to(weight.dtype)
    total = torch.full(hidden.shape[:1], -torch.inf, dtype=torch.float64)  # on the CPU: Apple's MPS has no float64
    for part in weight.split(CPU_WORDS if weight.device.type == "cpu" else len(weight)):
        logits = functional.linear(hidden, part).float()
        total = torch.logaddexp(total, torch.logsumexp(logits, dim=-1).cpu().double())
    own = (hidden.float() * weight[targets.to(weight.device)].float()).sum(dim=-1).cpu()
    return total - own


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
