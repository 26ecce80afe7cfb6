"""The independent reader of the self-test: a fresh process that gets the artefact and questions, and says what it reads.

    python -m qwenmed.read_back job.json

It goes the way of an outside program: the artefact's own tokenizer, chat template, stop tokens and generation – by
transformers for a merged folder; for a GGUF file by llama.cpp, or by transformers' GGUF reader where that is not
installed. Nothing of the checkpoint comes in but the questions and the replies whose likelihood is to be told.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenmed import chat, files

if TYPE_CHECKING:
    import numpy
    import torch
    from llama_cpp import Llama
    from transformers import PretrainedConfig, PreTrainedModel

TRANSFORMERS, LLAMA, GGUF_BY_TRANSFORMERS = "transformers", "llama.cpp", "transformers（GGUF）"
RESULT = "result.json"


@dataclass
class Job:
    """What the reader is asked.

    Attributes:
        artefact: a model folder, or a GGUF file.
        reader: one of the three above.
        device: torch's name of the device; llama.cpp runs as it was built.
        max_tokens: limit of a reply.
        context: tokens that the longest prompt and its reply take.
        conversations: messages, one list for each question.
        replies: token ids of the checkpoint's greedy replies, whose likelihood is wanted.
        folder: where the results go.
    """

    artefact: str
    reader: str
    device: str
    max_tokens: int
    context: int
    conversations: list[list[dict[str, str]]]
    replies: list[list[int]]
    folder: str


@dataclass
class Read:
    """What a reader says of one question.

    Attributes:
        prompt: token ids of the rendered prompt.
        text: the greedy reply, thinking tags included, without the token that ends it.
        thinking, answer: the text taken apart as servers do, see `split`.
        ended: whether the model ended it, rather than the limit.
        logprobs: file of the natural log-probabilities of every token at each place of the given reply,
            (reply tokens, vocabulary) in fp32.
    """

    prompt: list[int]
    text: str
    thinking: str
    answer: str
    ended: bool
    logprobs: str


@dataclass
class Result:
    """Everything that a reader says.

    Attributes:
        stops: the texts of the tokens that end a reply for this reader.
        reads: one for each question.
    """

    stops: list[str]
    reads: list[Read]


def main(job_file: str) -> None:
    """Do a job and write its result."""
    job = Job(**json.loads(files.read_text(Path(job_file))))
    result = _by_llama(job) if job.reader == LLAMA else _by_transformers(job)
    files.write_json(Path(job.folder) / RESULT, asdict(result))


def read_result(folder: Path) -> Result:
    """The result that a reader has written."""
    found: Any = files.read_json(folder / RESULT)
    return Result(found["stops"], [Read(**each) for each in found["reads"]])


def save_logprobs(folder: Path, number: int, logprobs: "torch.Tensor | numpy.ndarray") -> str:
    """Keep one reply's (tokens, vocabulary) log-probabilities; returns the file."""
    import numpy

    path = folder / f"{number}.npy"
    numpy.save(path, numpy.asarray(logprobs, dtype=numpy.float32))
    return str(path)


def split(text: str) -> tuple[str, str]:
    """Thinking and answer as vLLM's `--reasoning-parser qwen3` and Ollama tell them apart: by the first closing tag."""
    before, closed, after = text.partition(chat.THINK_END)
    thinking = before.partition(chat.THINK_START)[2] if chat.THINK_START in before else before
    if not closed:
        return (thinking.strip(), "") if chat.THINK_START in before else ("", text.strip())
    return thinking.strip(), after.strip()


def greedy(
    model: "PreTrainedModel", prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], pad: int, max_tokens: int
) -> Iterator[list[int]]:
    """Greedy replies by transformers' own generate, padded to the left; each with its stop token if it has one."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    found = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=max_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=pad,
    )
    for row in found[:, longest:].tolist():
        end = next((place for place, token in enumerate(row) if token in stop_ids), len(row) - 1)
        yield row[: end + 1]


def reply_logprobs(model: "PreTrainedModel", prompt: Sequence[int], reply: Sequence[int]) -> "torch.Tensor":
    """The (reply tokens, vocabulary) log-probabilities with which a model reads a reply; on the CPU."""
    import torch

    ids = torch.tensor([[*prompt, *reply]], device=model.device)
    with torch.inference_mode():
        # The token at one place is told by the logits of the place before.
        logits = model(ids, logits_to_keep=len(reply) + 1, use_cache=False).logits[0, :-1]
        return torch.log_softmax(logits.float(), dim=-1).cpu()


def _by_transformers(job: Job) -> Result:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, extra = Path(job.artefact), {}
    if job.reader == GGUF_BY_TRANSFORMERS:
        path, extra = path.parent, {"gguf_file": path.name}
        extra["config"] = _gguf_config(path, path / extra["gguf_file"])
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, **extra)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True, **extra)
    model = model.to(job.device).eval()
    stop_ids = _gguf_stop_ids(Path(job.artefact)) if extra else model.generation_config.eos_token_id
    stop_ids = stop_ids if isinstance(stop_ids, list) else [stop_ids]
    prompts = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        for messages in job.conversations
    ]
    own = list(greedy(model, prompts, stop_ids, tokenizer.pad_token_id, job.max_tokens))
    reads = []
    for number, (prompt, reply, ids) in enumerate(zip(prompts, job.replies, own, strict=True)):
        logprobs = save_logprobs(Path(job.folder), number, reply_logprobs(model, prompt, reply))
        text = tokenizer.decode(ids, skip_special_tokens=True)
        reads.append(Read(prompt, text, *split(text), ids[-1] in stop_ids, logprobs))
    return Result([tokenizer.decode([each]) for each in stop_ids], reads)


def _gguf_config(folder: Path, file: Path) -> "PretrainedConfig":
    """The configuration that a GGUF file tells; transformers 5.23 overlooks the size of a head."""
    from gguf import GGUFReader
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, gguf_file=file.name, local_files_only=True)
    config.head_dim = int(GGUFReader(file).get_field("qwen3.attention.key_length").contents())
    return config


def _gguf_stop_ids(file: Path) -> list[int]:
    """Where llama.cpp ends a reply of this file: at the end token that it names, and at control tokens known to end."""
    from gguf import GGUFReader, TokenType

    fields = GGUFReader(file)
    texts, types = (fields.get_field(f"tokenizer.ggml.{name}").contents() for name in ("tokens", "token_type"))
    named = fields.get_field("tokenizer.ggml.eos_token_id").contents()
    control = [id_ for id_, kind in enumerate(types) if kind == TokenType.CONTROL and texts[id_] in chat.STOP_TOKENS]
    return sorted({int(named), *control})


def _by_llama(job: Job) -> Result:
    from qwenmed.llama import load

    llama = load(job.artefact, n_ctx=job.context, logits_all=True)
    reads = [
        _read_by_llama(llama, job, number, messages, reply)
        for number, (messages, reply) in enumerate(zip(job.conversations, job.replies, strict=True))
    ]
    return Result(_llama_stops(llama), reads)


def _read_by_llama(llama: "Llama", job: Job, number: int, messages: list[dict[str, str]], reply: Sequence[int]) -> Read:
    import numpy

    said = llama.create_chat_completion(messages, temperature=0.0, max_tokens=job.max_tokens)
    choice = said["choices"][0]
    prompt = llama.input_ids[: said["usage"]["prompt_tokens"]].tolist()
    llama.n_tokens = len(prompt) - 1  # the prompt is read already, all but its last token
    llama.eval([prompt[-1], *reply])
    logits = llama.scores[len(prompt) - 1 : len(prompt) + len(reply) - 1].astype(numpy.float32)
    highest = logits.max(axis=1, keepdims=True)
    logits -= highest + numpy.log(numpy.exp(logits - highest).sum(axis=1, keepdims=True))
    logprobs = save_logprobs(Path(job.folder), number, logits)
    text = choice["message"]["content"] or ""
    return Read(prompt, text, *split(text), choice["finish_reason"] == "stop", logprobs)


def _llama_stops(llama: "Llama") -> list[str]:
    """Those of Qwen's two end tokens at which llama.cpp ends a reply."""
    import llama_cpp

    vocabulary = llama_cpp.llama_model_get_vocab(llama.model)
    found = []
    for text in chat.STOP_TOKENS:
        ids = llama.tokenize(text.encode(), add_bos=False, special=True)
        if len(ids) == 1 and llama_cpp.llama_vocab_is_eog(vocabulary, ids[0]):
            found.append(text)
    return found


if __name__ == "__main__":
    main(sys.argv[1])
