"""Text generation with transformers: one reply as a stream, many as padded batches.

A stream yields typed chunks and then one `Generation`; whoever wants only the result loops over it.
"""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qwenmed import chat
from qwenmed.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Chunk:
    """A piece of a reply as it comes: `kind` is "thinking" or "answer"."""

    kind: str
    text: str


@dataclass(frozen=True)
class Generation:
    """A finished reply.

    Attributes:
        reply: thinking and answer, taken apart.
        finish_reason: "stop" – the model ended its turn; "length" – the token limit was reached.
        prompt_tokens, thinking_tokens, answer_tokens: counts; thinking includes its two tags.
        seconds: wall time; a batch's time is shared among its rows by the tokens they took.
    """

    reply: chat.Reply
    finish_reason: str
    prompt_tokens: int
    thinking_tokens: int
    answer_tokens: int
    seconds: float = field(compare=False)


class TransformersEngine:
    """Generates replies with a loaded model.

    Sampling follows the model's own generation config (for Qwen3: temperature 0.6, top-p 0.95, top-k 20).

    Args:
        model: in eval mode, on its device.
        tokenizer: the model's own.
        seed: fixes sampling, reply by reply; None leaves torch's generator alone.
    """

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", seed: int | None = None) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._seed = seed
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._stop_ids = _stop_ids(model, tokenizer)
        self._think_end = tokenizer.convert_tokens_to_ids(chat.THINK_END)

    @property
    def context_length(self) -> int:
        """How many tokens prompt and reply may take together."""
        return self._model.config.max_position_embeddings

    def count_tokens(self, messages: Messages) -> int:
        """Tokens of the rendered prompt."""
        return len(chat.render_prompt(self._tokenizer, messages))

    def stream(self, messages: Messages, max_tokens: int) -> Iterator[Chunk | Generation]:
        """Yield the reply's chunks as they are generated, and at the end its `Generation`.

        Closing the iterator (or an exception in the consumer, Ctrl-C included) ends the generation after
        the token in hand.

        Raises:
            UserError: the prompt alone fills the context.
        """
        from transformers import StoppingCriteria, StoppingCriteriaList
        from transformers.generation.streamers import BaseStreamer

        prompt = chat.render_prompt(self._tokenizer, messages)
        limit = self._room(len(prompt), max_tokens)
        generated_ids: queue.Queue[list[int] | None] = queue.Queue()
        cancelled = threading.Event()
        outcome: queue.Queue[list[int] | BaseException] = queue.Queue()

        class Streamer(BaseStreamer):
            prompt_seen = False

            def put(self, value: "torch.Tensor") -> None:
                if self.prompt_seen:
                    generated_ids.put(value.flatten().tolist())
                self.prompt_seen = True

            def end(self) -> None:
                generated_ids.put(None)

        class Cancelled(StoppingCriteria):
            def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor", **kwargs) -> "torch.Tensor":
                return input_ids.new_full((input_ids.shape[0],), cancelled.is_set(), dtype=bool)

        def work() -> None:
            try:
                stopping = StoppingCriteriaList([Cancelled()])
                outcome.put(self._generate([prompt], limit, streamer=Streamer(), stopping_criteria=stopping)[0])
            except BaseException as error:  # the consumer raises it; a thread's own traceback helps nobody
                outcome.put(error)
            finally:
                generated_ids.put(None)

        text, parser = (
            chat.TokenText(self._tokenizer),
            chat.ReplyParser(self._tokenizer, self._tokenizer.decode(prompt)),
        )
        started = time.perf_counter()
        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            for ids in iter(generated_ids.get, None):
                yield from (Chunk(*piece) for piece in parser.feed(text.feed(ids)))
            yield from (Chunk(*piece) for piece in parser.feed(text.close()))
        finally:
            cancelled.set()
            worker.join()
        generated = outcome.get()
        if isinstance(generated, BaseException):
            raise generated
        yield from (Chunk(*piece) for piece in parser.close())
        yield self._generation(parser.reply, len(prompt), generated, time.perf_counter() - started)

    def generate(self, requests: Sequence[tuple[Messages, int]], batch_size: int = 16) -> list[Generation]:
        """Answer many prompts in padded batches, sorted by limit and length so that little is padding.

        Args:
            requests: (messages, max_tokens) pairs.
            batch_size: rows generated together.

        Returns:
            One `Generation` a request, in the order given.

        Raises:
            UserError: a prompt alone fills the context.
        """
        prompts = [chat.render_prompt(self._tokenizer, messages) for messages, _ in requests]
        limits = [self._room(len(prompt), limit) for prompt, (_, limit) in zip(prompts, requests, strict=True)]
        order = sorted(range(len(requests)), key=lambda i: (limits[i], len(prompts[i])), reverse=True)
        results: dict[int, Generation] = {}
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            started = time.perf_counter()
            outputs = self._generate([prompts[i] for i in rows], max(limits[i] for i in rows))
            outputs = [output[: limits[i]] for i, output in zip(rows, outputs, strict=True)]
            seconds = (time.perf_counter() - started) / max(1, sum(map(len, outputs)))
            for i, output in zip(rows, outputs, strict=True):
                text = chat.TokenText(self._tokenizer)
                reply = chat.parse_reply(
                    self._tokenizer, self._tokenizer.decode(prompts[i]), text.feed(output) + text.close()
                )
                results[i] = self._generation(reply, len(prompts[i]), output, seconds * len(output))
        return [results[i] for i in range(len(requests))]

    def _generate(self, prompts: list[list[int]], limit: int, **options) -> list[list[int]]:
        """New token ids of each prompt, up to and including its stop token."""
        import torch

        width = max(map(len, prompts))
        device = self._model.device
        ids = torch.tensor([[self._pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        if self._seed is not None:
            torch.manual_seed(self._seed)
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=limit,
                eos_token_id=self._stop_ids,
                pad_token_id=self._pad,
                **options,
            )
        return [self._until_stop(row) for row in output[:, width:].tolist()]

    def _until_stop(self, ids: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(ids) if token in self._stop_ids), len(ids) - 1)
        return ids[: end + 1]

    def _generation(self, reply: chat.Reply, prompt_tokens: int, ids: list[int], seconds: float) -> Generation:
        stopped = bool(ids) and ids[-1] in self._stop_ids
        body = ids[:-1] if stopped else ids
        if self._think_end in body:
            thinking = len(body) - body[::-1].index(self._think_end)
        else:
            thinking = 0 if reply.answer else len(body)
        return Generation(
            reply=reply,
            finish_reason="stop" if stopped else "length",
            prompt_tokens=prompt_tokens,
            thinking_tokens=thinking,
            answer_tokens=len(body) - thinking,
            seconds=seconds,
        )

    def _room(self, prompt_tokens: int, max_tokens: int) -> int:
        room = self.context_length - prompt_tokens
        if room <= 0:
            raise UserError(
                f"问题太长：{prompt_tokens} 个 token，模型的上下文只有 {self.context_length}", None, "请缩短问题"
            )
        return min(max_tokens, room)


def _stop_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Every id that ends a turn: those of the generation config, `<|im_end|>` and `<|endoftext|>`.

    A config that lists only one of them is the well-known reason of replies that never end.
    """
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    named = [tokenizer.convert_tokens_to_ids(token) for token in (chat.END_OF_TURN, "<|endoftext|>")]
    return sorted({token for token in (*configured, tokenizer.eos_token_id, *named) if token is not None})
