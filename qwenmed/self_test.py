"""Does the exported model say elsewhere what the checkpoint says here? The self-test of export.py.

The checkpoint (fp32) answers eight questions greedily. A fresh process (`read_back`) then reads the artefact as an
outside program would, answers the same questions, and tells how likely it finds the checkpoint's replies, token by
token. Held against each other:
- the tokens of the prompts (tokenizer and chat template),
- the greedy texts, where they end, and how they come apart into thinking and answer,
- at each of the replies' tokens the whole distribution: mean Kullback-Leibler divergence KL(checkpoint ‖ artefact) in
  nats, and the share of places at which both would choose the same token,
- the tokens that end a reply.

A file that keeps its numbers (or rounds them to f16) must give the same texts. Two models can part where the
checkpoint itself is undecided, its two best tokens closer than `TIE`: rounding decides there, as another batch size
would. Such a place is counted and shown, and does not fail. Rounder types are held to `BOUNDS`.

Limits: eight questions find a broken export, not a small loss of quality; for that, run eval.py on the artefact.
"""

import gc
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenmed import chat, checkpoints, cli, files, hardware, read_back
from qwenmed.errors import UserError

if TYPE_CHECKING:
    import numpy
    import torch
    from transformers import PreTrainedTokenizerBase

# Nats between the checkpoint's two best tokens, below which rounding may choose the other.
TIE = 0.02

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Bound:
    """What is asked of a number type.

    Attributes:
        kl: largest mean KL divergence, nats.
        same: smallest share of equal greedy tokens.
        same_text: whether the greedy texts must be equal, ties apart.
    """

    kl: float
    same: float
    same_text: bool


# Ours. For the quantised types about ten times the mean KL that llama.cpp publishes for Llama 3 8B (q8_0 0.0014,
# q6_K 0.0055, q5_K_M 0.011, q4_K_M 0.031, q3_K_M 0.10, q2_K 0.45: tools/perplexity/README.md), because smaller models
# lose more; an export with a wrong template, untied embeddings or a wrong rope base is off by whole nats. A bf16 file
# is never held to "exact", not even one made of bf16: llama.cpp rounds what it multiplies with bf16 weights to bf16.
BOUNDS = {
    "exact": Bound(1e-4, 1.0, True),
    "f32": Bound(1e-4, 1.0, True),
    "f16": Bound(1e-3, 1.0, True),
    "bf16": Bound(0.01, 0.95, False),
    "q8_0": Bound(0.015, 0.95, False),
    "q6_k": Bound(0.06, 0.90, False),
    "q5_k_m": Bound(0.12, 0.85, False),
    "q4_k_m": Bound(0.35, 0.75, False),
    "q3_k_m": Bound(1.0, 0.60, False),
    "q2_k": Bound(3.0, 0.30, False),
}


@dataclass
class Reference:
    """The checkpoint's side.

    Attributes:
        conversations: messages of each question.
        prompts: token ids of the rendered prompts.
        replies: token ids of the greedy replies, with the token that ended them.
        texts: the replies as text, thinking tags included.
        parts: thinking and answer of each, as this project takes them apart; None for a reply that is not well
            formed, over which parsers may differ.
        ended: whether the model ended each.
        logprobs: files as in `read_back.Read`.
        beginnings: of each reply the text of its first 0, 1, 2 … tokens.
    """

    conversations: list[Messages]
    prompts: list[list[int]]
    replies: list[list[int]]
    texts: list[str]
    parts: list[tuple[str, str] | None]
    ended: list[bool]
    logprobs: list[str]
    beginnings: list[list[str]]


@dataclass
class Comparison:
    """What the self-test found; counts are of the questions unless they say otherwise.

    Attributes:
        reader: who has read the artefact.
        bound: what was asked.
        questions, tokens: how many.
        same_prompts, same_texts: how many are equal.
        tied_texts: how many part at a tie.
        same_ends: of the equal texts, those that end alike.
        well_formed, same_parts: equal texts that are well formed; of them, those that come apart alike.
        ended_here, ended_there: replies that ended by themselves.
        same_tokens, tied_tokens: places with the same greedy token; with another one at a tie.
        mean_kl, largest_kl: nats.
        largest_difference: of a reply token's log-probability, nats.
        stops: the texts at which the artefact ends a reply.
    """

    reader: str
    bound: Bound
    questions: int
    stops: list[str]
    tokens: int = 0
    same_prompts: int = 0
    same_texts: int = 0
    tied_texts: int = 0
    same_ends: int = 0
    well_formed: int = 0
    same_parts: int = 0
    ended_here: int = 0
    ended_there: int = 0
    same_tokens: int = 0
    tied_tokens: int = 0
    mean_kl: float = 0.0
    largest_kl: float = 0.0
    largest_difference: float = 0.0

    @property
    def rows(self) -> list[tuple[str, str, str, bool]]:
        """The table: what, found, asked, whether it passes."""
        every = f"要求 {self.questions}/{self.questions}"
        texts = f"{self.same_texts}/{self.questions}" + (f"，{self.tied_texts} 在并列处分开" if self.tied_texts else "")
        text_ok = self.same_texts + self.tied_texts == self.questions or not self.bound.same_text
        share = (self.same_tokens + self.tied_tokens) / self.tokens
        tokens = f"{self.same_tokens}/{self.tokens}" + (f"，{self.tied_tokens} 处并列" if self.tied_tokens else "")
        ends, parts = f"{self.same_ends}/{self.same_texts}", f"{self.same_parts}/{self.well_formed}"
        stops = set(chat.STOP_TOKENS) <= set(self.stops)
        return [
            ("提示的 token", f"{self.same_prompts}/{self.questions}", every, self.same_prompts == self.questions),
            ("贪心文字", texts, every if self.bound.same_text else "不作要求", text_ok),
            ("贪心 token", tokens, f"要求 ≥ {self.bound.same:.0%}", share >= self.bound.same),
            ("平均 KL（nat）", f"{self.mean_kl:.2g}", f"要求 ≤ {self.bound.kl:g}", self.mean_kl <= self.bound.kl),
            ("最大 KL", f"{self.largest_kl:.2g}", "", True),
            ("log 概率之差，最大", f"{self.largest_difference:.2g}", "", True),
            ("停止符", "、".join(self.stops) or "没有", "要求两个都有", stops),
            ("相同的文字，结束也相同", ends, "要求全部", self.same_ends == self.same_texts),
            ("格式完整的，思考与回答的拆分也相同", parts, "要求全部", self.same_parts == self.well_formed),
            ("自己结束", f"{self.ended_there}（检查点 {self.ended_here}）", "", True),
        ]

    @property
    def failed(self) -> list[str]:
        """What does not pass, in words."""
        return [f"{name} {found}（{asked}）" for name, found, asked, passes in self.rows if not passes]

    def as_json(self) -> dict[str, Any]:
        """The figures, for export.json."""
        return {**asdict(self), "passed": not self.failed}


def run(
    checkpoint: checkpoints.Checkpoint,
    artefact: Path,
    reader: str,
    bound: Bound,
    conversations: Sequence[Messages],
    max_tokens: int,
    device: "torch.device",
    scratch: Path,
) -> Comparison:
    """Compare an artefact with the checkpoint that it was made of.

    Args:
        artefact: a model folder or a GGUF file.
        reader: one of the readers of `read_back`.
        conversations: the questions, each as messages.
        max_tokens: limit of a reply.
        device: for the checkpoint, and for transformers as the reader.
        scratch: where some hundred MB may lie while the test runs, see `space`.

    Raises:
        UserError: the checkpoint can't be loaded, or the artefact can't be read.
    """
    with tempfile.TemporaryDirectory(prefix=".self-test-", dir=scratch) as name:
        folder = Path(name)
        cli.note(f"自检：检查点回答 {len(conversations)} 个问题（fp32，{device.type}，每条至多 {max_tokens} token）…")
        reference = ask_checkpoint(checkpoint, conversations, max_tokens, device, folder)
        cli.note(f"自检：由 {reader} 在新的进程里读出并回答 …")
        result = read_in_fresh_process(artefact, reader, reference, max_tokens, device, folder)
        return compare(reference, result, reader, bound)


def space(vocabulary: int, questions: int, max_tokens: int) -> int:
    """Bytes that the log-probabilities of both sides take on the disk while the test runs."""
    return 2 * questions * max_tokens * vocabulary * 4


def ask_checkpoint(
    checkpoint: checkpoints.Checkpoint,
    conversations: Sequence[Messages],
    max_tokens: int,
    device: "torch.device",
    folder: Path,
) -> Reference:
    """The checkpoint's greedy replies and their log-probabilities, written below `folder`; the model is let go."""
    import torch

    model, tokenizer = checkpoints.load(checkpoint, torch.float32)
    model = model.to(device)
    prompts = [chat.render_prompt(tokenizer, messages) for messages in conversations]
    stop_ids = chat.stop_ids(tokenizer, [tokenizer.eos_token_id])
    replies = list(read_back.greedy(model, prompts, stop_ids, tokenizer.pad_token_id, max_tokens))
    (folder / "checkpoint").mkdir()
    found = [
        read_back.save_logprobs(folder / "checkpoint", number, read_back.reply_logprobs(model, prompt, reply))
        for number, (prompt, reply) in enumerate(zip(prompts, replies, strict=True))
    ]
    # The fresh process loads its own fp32 copy, and both may not fit beside each other.
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

    def text(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    return Reference(
        conversations=list(conversations),
        prompts=prompts,
        replies=replies,
        texts=[text(reply) for reply in replies],
        parts=[_taken_apart(tokenizer, reply) for reply in replies],
        ended=[reply[-1] in stop_ids for reply in replies],
        logprobs=found,
        beginnings=[[text(reply[:count]) for count in range(len(reply))] for reply in replies],
    )


def _taken_apart(tokenizer: "PreTrainedTokenizerBase", reply: Sequence[int]) -> tuple[str, str] | None:
    text = chat.TokenText(tokenizer)
    parsed = chat.parse_reply("", text.feed(reply) + text.close())
    return (parsed.thinking, parsed.answer) if parsed.well_formed else None


def read_in_fresh_process(
    artefact: Path, reader: str, reference: Reference, max_tokens: int, device: "torch.device", folder: Path
) -> read_back.Result:
    """What the independent reader says.

    Where the device has no room for it, it reads on the CPU.

    Raises:
        UserError: it failed; its last line is told.
    """
    job = read_back.Job(
        artefact=str(artefact.absolute()),
        reader=reader,
        device=str(device),
        max_tokens=max_tokens,
        context=max(map(len, reference.prompts)) + max_tokens + 1,
        conversations=reference.conversations,
        replies=reference.replies,
        folder=str(folder.absolute()),
    )
    done = _read(job)
    if _ran_out_of_memory(done) and reader != read_back.LLAMA and device.type != "cpu":
        cli.note(f"自检：{device.type} 的内存不够，改在 CPU 上读 …")
        done = _read(replace(job, device="cpu"))
    if _ran_out_of_memory(done):
        remedy = "没有留下结果；请关掉占内存的程序再试，或加上 --no-self-test"
        raise UserError(f"自检没有做完：内存不够，{reader} 没有读完导出的模型", None, remedy)
    if done.returncode:
        what, remedy = _why_it_ended(done)
        raise UserError(f"自检没有通过：{reader} 读不出导出的模型：{what}", None, f"没有留下结果{remedy}")
    return read_back.read_result(folder)


def _read(job: read_back.Job) -> subprocess.CompletedProcess[str]:
    """Let the reader do a job; what it has to say lies in the job's folder."""
    file = Path(job.folder) / "job.json"
    files.write_json(file, asdict(job))
    here = str(Path(__file__).parent.parent)
    paths = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "qwenmed.read_back", str(file)],
        env={**os.environ, "PYTHONPATH": paths, "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )


def _ran_out_of_memory(done: subprocess.CompletedProcess[str]) -> bool:
    """Whether the reader failed because a GPU, or torch on a CPU, has no room."""
    told = hardware.says_out_of_memory(done.stderr) or "MemoryError" in done.stderr
    return bool(done.returncode) and told


def _why_it_ended(done: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    """Why the reader failed, in a line, and what can be done where it is known."""
    if done.returncode == -signal.SIGILL:
        rebuild = "；请为这台电脑重新编译：pip install --force-reinstall --no-cache-dir -e '.[gguf]'"
        return "它为另一种 CPU 编译过，这台 CPU 没有其中的指令（SIGILL）", rebuild
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        # So Linux ends a process when memory runs out.
        remedy = "；多半是内存不够：请关掉占内存的程序再试，或加上 --no-self-test" if name == "SIGKILL" else ""
        return f"它的进程被信号 {name} 终止", remedy
    lines = done.stderr.strip().splitlines() or [f"状态 {done.returncode}"]
    return lines[-1][:300], ""


def compare(reference: Reference, result: read_back.Result, reader: str, bound: Bound) -> Comparison:
    """Hold both sides against each other, a question at a time."""
    import numpy

    found = Comparison(reader, bound, len(result.reads), result.stops)
    divergences = []
    for number, read in enumerate(result.reads):
        ours, theirs = numpy.load(reference.logprobs[number]), numpy.load(read.logprobs)
        divergences.append(_compare_distributions(found, ours, theirs, reference.replies[number]))
        _compare_texts(found, reference, number, read, ours)
    every = numpy.concatenate(divergences)
    found.mean_kl, found.largest_kl = float(every.mean()), float(every.max())
    return found


def _compare_distributions(
    found: Comparison, ours: "numpy.ndarray", theirs: "numpy.ndarray", reply: Sequence[int]
) -> "numpy.ndarray":
    """Count what the log-probabilities of one reply tell; returns the KL divergence at each of its tokens."""
    import numpy

    places = numpy.arange(len(reply))
    differences = abs(ours[places, reply] - theirs[places, reply])
    found.largest_difference = max(found.largest_difference, float(differences.max()))
    chosen = theirs.argmax(axis=1)
    same = chosen == ours.argmax(axis=1)
    undecided = ours.max(axis=1) - ours[places, chosen] <= TIE
    found.tokens += len(reply)
    found.same_tokens += int(same.sum())
    found.tied_tokens += int((~same & undecided).sum())
    return (numpy.exp(ours) * (ours - theirs)).sum(axis=1)


def _compare_texts(
    found: Comparison, reference: Reference, number: int, read: read_back.Read, ours: "numpy.ndarray"
) -> None:
    """Count what one question's greedy replies tell."""
    found.same_prompts += read.prompt == reference.prompts[number]
    found.ended_here += reference.ended[number]
    found.ended_there += read.ended
    if read.text == reference.texts[number]:
        found.same_texts += 1
        found.same_ends += read.ended == reference.ended[number]
        found.well_formed += reference.parts[number] is not None
        found.same_parts += (read.thinking, read.answer) == reference.parts[number]
        return
    beginnings = reference.beginnings[number]
    parted = max(place for place, text in enumerate(beginnings) if read.text.startswith(text))
    second, best = sorted(ours[parted])[-2:]
    found.tied_texts += bool(best - second <= TIE)


def as_text(found: Comparison) -> str:
    """The table, for the terminal."""
    lines = [
        f"  {'✓' if passes else '✗'} {name}：{value}{f'（{asked}）' if asked else ''}"
        for name, value, asked, passes in found.rows
    ]
    return "\n".join([f"自检（{found.reader}，{found.questions} 个问题，{found.tokens} 个回复 token）", *lines])
