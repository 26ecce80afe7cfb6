"""The engine for a GGUF file, through llama-cpp-python: the fast path on a machine without a GPU.

The prompt is rendered with the chat template that the file carries. llama.cpp keeps the keys and values of the
last prompt, so that a conversation's earlier turns and a shared system prompt are not computed again.

Limits: one reply at a time. What looks like a control token in a message is broken up before it is tokenised,
for llama.cpp can't tell a user's text from the template's.
"""

import contextlib
import io
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qwenmed import chat, files
from qwenmed.controls import as_plain_words
from qwenmed.engine import (
    MODELS_OWN,
    QWEN3_SAMPLING,
    QWEN3_TOP_K,
    Chunk,
    Generation,
    Messages,
    Prompt,
    ReplyGuide,
    Sampling,
    reply_limit,
)
from qwenmed.errors import UserError
from qwenmed.gguf_file import LLAMA_REMEDY, NOTICE_KEY

if TYPE_CHECKING:
    from llama_cpp import Llama

# Of the 40,960 tokens that Qwen3 has, those that are given memory: the cache of all would take 4.5 GB.
CONTEXT = 8192
MAGIC = b"GGUF"

T = TypeVar("T")


class LlamaEngine:
    """Generates replies with a GGUF file.

    Args:
        path: the file.
        sampling: what is None is as the file says, and Qwen3's recommendation where it says nothing.
        threads: of the CPU; by default one for each core.

    Raises:
        UserError: llama-cpp-python is missing, the file is no GGUF or broken, or has no chat template.
    """

    def __init__(self, path: Path, sampling: Sampling = MODELS_OWN, *, threads: int | None = None) -> None:
        self._llama = _open(path, threads)
        # Its own __del__ fails when the interpreter is already half gone.
        weakref.finalize(self, self._llama.close)
        self.name = str(path)
        status = path.stat()
        self.fingerprint = f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {sampling}"
        metadata = self._llama.metadata
        self.notice = metadata.get(NOTICE_KEY, "")
        self._sampling = sampling.over(_recommended(metadata)).over(QWEN3_SAMPLING)
        self._top_k = int(_number(metadata, "top_k", QWEN3_TOP_K))
        self._min_p = _number(metadata, "min_p", 0.0)
        self._render = _renderer(self._llama, path)
        self._text = _Tokenizer(self._llama)
        self._tags = tuple(self._text.convert_tokens_to_ids([chat.THINK_START, chat.THINK_END]))
        self._closing = chat.closing_ids(self._text)
        self._stop_ids = chat.stop_ids(self._text, [self._llama.token_eos()])

    @property
    def context_length(self) -> int:
        """How many tokens prompt and reply may take together: what memory was given for, at most what was trained."""
        metadata = self._llama.metadata
        trained = metadata.get(f"{metadata.get('general.architecture')}.context_length", CONTEXT)
        return min(self._llama.n_ctx(), int(trained))

    def count_tokens(self, messages: Messages) -> int:
        """Tokens of the rendered prompt."""
        return len(self._prompt_ids(messages))

    def stream(self, prompt: Prompt) -> Iterator[Chunk | Generation]:
        """Yield the reply's chunks as they are generated, and at the end its `Generation`.

        Raises:
            UserError: the prompt alone fills the context.
        """
        started = time.perf_counter()
        ids, sampling = self._prompt_ids(prompt.messages), (prompt.sampling or MODELS_OWN).over(self._sampling)
        if prompt.think_budget == 0:
            ids += chat.empty_thinking_ids(self._text)
        guide = ReplyGuide(
            reply_limit(len(ids), prompt.max_tokens, self.context_length),
            prompt.think_budget,
            self._tags,
            self._closing,
            self._stop_ids,
            state="no thinking" if prompt.think_budget == 0 else "open",
        )
        parser, text = chat.ReplyParser(), chat.TokenText(self._text)
        tokens = self._tokens(ids, sampling)
        token = next(tokens)
        while True:
            taken = _take(guide, token)
            yield from (Chunk(*piece) for piece in parser.feed(text.feed(taken)))
            if guide.finish_reason:
                break
            if taken != [token]:  # they must be read before the next is chosen; what stood before is still cached
                tokens = self._tokens([*ids, *guide.ids], sampling)
            token = next(tokens)
        tokens.close()
        yield from (Chunk(*piece) for piece in parser.feed(text.close()) + parser.close())
        yield guide.generation(parser.reply, len(ids), time.perf_counter() - started)

    def generate(self, prompts: Iterable[Prompt | Any]) -> Iterator[Generation | UserError | Any]:
        """Answer many prompts, one after another."""
        for prompt in prompts:
            if not isinstance(prompt, Prompt):
                yield prompt
                continue
            try:
                *_, generation = self.stream(prompt)
                yield generation
            except UserError as error:
                yield error

    def _tokens(self, ids: Sequence[int], sampling: Sampling) -> Any:
        self._llama.set_seed(int(time.time_ns() % 2**31) if sampling.seed is None else sampling.seed)
        return self._llama.generate(
            ids,
            temp=sampling.temperature,
            top_p=sampling.top_p,
            top_k=self._top_k,
            min_p=self._min_p,
        )

    def _prompt_ids(self, messages: Messages) -> list[int]:
        harmless = [{**each, "content": as_plain_words(each["content"])} for each in messages]
        try:
            text = self._render(messages=chat.without_thinking(harmless)).prompt
        except Exception as error:  # a template is a program, run in jinja's sandbox
            raise UserError(f"GGUF 里的对话模板出错：{error}", self.name, "请使用 Qwen3 自带的对话模板") from error
        return self._text.encode(text, special=True)


def _take(guide: ReplyGuide, sampled: int) -> list[int]:
    """The token that was taken for the sampled one, and those that had to follow it."""
    taken = [guide.take(sampled)]
    while guide.forced is not None and not guide.finish_reason:
        taken.append(guide.take(guide.forced))
    return taken


class _Tokenizer:
    """llama.cpp's tokenizer, as `chat` uses one."""

    def __init__(self, llama: "Llama") -> None:
        self._llama = llama

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text)}

    def encode(self, text: str, special: bool = False) -> list[int]:
        return self._llama.tokenize(text.encode("utf-8"), add_bos=False, special=special)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        ids = self.encode(tokens, special=True)
        return ids[0] if len(ids) == 1 else None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._llama.detokenize(list(ids), special=not skip_special_tokens).decode("utf-8", errors="replace")


def _open(path: Path, threads: int | None) -> "Llama":
    with files.require_file(path, "GGUF 文件").open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise UserError("这不是 GGUF 文件", path, "--engine llama.cpp 需要 .gguf 文件；检查点目录用默认的引擎")
    try:
        from qwenmed import llama
    except ImportError as error:
        raise UserError(f"没有安装 llama-cpp-python（{error}）", None, LLAMA_REMEDY) from None
    try:
        # The binding takes llama.cpp's warnings for errors and prints them; what matters is raised.
        with contextlib.redirect_stderr(io.StringIO()):
            return llama.load(path, n_ctx=CONTEXT, n_threads=threads)
    except Exception as error:  # ValueError, AssertionError, MemoryError, whatever the binding meets
        raise UserError(f"GGUF 文件无法载入：{str(error)[:200]}", path, "文件可能不完整，请重新导出或下载") from error


def _recommended(metadata: dict[str, str]) -> Sampling:
    """The sampling that a file recommends; None where it does not."""
    return Sampling(_number(metadata, "temp", None), _number(metadata, "top_p", None))


def _number(metadata: dict[str, str], name: str, default: T) -> float | T:
    try:
        return float(metadata[f"general.sampling.{name}"])
    except (KeyError, ValueError):
        return default


def _renderer(llama: "Llama", path: Path) -> Any:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = llama.metadata.get("tokenizer.chat_template")
    if not template:
        raise UserError("GGUF 文件里没有对话模板", path, "请用带对话模板的 Qwen3 GGUF")
    return Jinja2ChatFormatter(template, eos_token=chat.END_OF_TURN, bos_token="", add_generation_prompt=True)
