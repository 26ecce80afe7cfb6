"""From records to token ids and from generated text back to thinking and answer.

One renderer serves training and inference: the model's own chat template. A row is trained as the
template's prompt with generation prompt, followed by `<think>\\n…\\n</think>\\n\\n…<|im_end|>\\n`; at
inference the same prompt is rendered and the model writes the rest.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from qwenmed.errors import UserError
from qwenmed.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Qwen3's reply format for transformers' response parser: optional thinking, then the answer.
# Without tool calls, which a medical assistant has none of and whose broken JSON would raise.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text", "repeats": True},
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}
THINK_START, THINK_END = "<think>", "</think>"
END_OF_TURN = "<|im_end|>"
# Both end a reply.
STOP_TOKENS = (END_OF_TURN, "<|endoftext|>")

# Text of users and data sets never becomes a control token: apply_chat_template(…, **SANITIZE), with a
# tokenizer that `guard_control_tokens` has prepared.
SANITIZE = {"sanitize_control_tokens": True}

# Stands for a "<" that the model wrote as text: no tag can be read where one stands. Nobody types it.
WRITTEN_LESS_THAN = "\U000f003c"

# One think block and then the answer.
_ONE_BLOCK = re.compile(r"\s*<think>(?:(?!</?think>).)*</think>(?:(?!</?think>).)*", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Reply:
    """A generated text, taken apart.

    Attributes:
        thinking: the text between the think tags, or "".
        answer: what follows it, or "".
        thinking_closed: False if the text ended inside of the thinking.
        well_formed: whether it was exactly one think block, closed, and then the answer.
    """

    thinking: str
    answer: str
    thinking_closed: bool = True
    well_formed: bool = dataclasses.field(default=True, compare=False)


def user_messages(question: str, system: str | None, history: Sequence[dict[str, str]] = ()) -> list[dict[str, str]]:
    """The messages of a prompt: system, earlier turns without their thinking, the question."""
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, *history, {"role": "user", "content": question}]


def record_messages(record: Record, system: str) -> list[dict[str, str]]:
    """The messages of a record's prompt: its earlier turns, without their thinking, stand before its question."""
    roles = ("user", "assistant")
    history = [
        {"role": role, "content": text} for turn in record.history for role, text in zip(roles, turn, strict=True)
    ]
    return without_thinking(user_messages(record.question, system, history))


def training_row(record: Record, system: str) -> dict[str, Any]:
    """A record as TRL's conversational prompt/completion row; loss falls on the completion only."""
    completion = {"role": "assistant", "reasoning_content": record.think, "content": record.answer}
    return {
        "prompt": record_messages(record, system),
        "completion": [completion],
        "chat_template_kwargs": SANITIZE,
    }


def guard_control_tokens(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Let SANITIZE cover every added token; by itself it leaves out those that the template doesn't write.

    Qwen3 has six such: `<|fim_prefix|>`, `<|repo_name|>`, `<|file_sep|>` and the like.
    """
    tokenizer.chat_control_tokens = [token.content for token in tokenizer.added_tokens_decoder.values()]


def render_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of the prompt, up to and including `<|im_start|>assistant\\n`."""
    return _render(tokenizer, without_thinking(messages), add_generation_prompt=True)


def without_thinking(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The messages with earlier answers marked as having no thinking.

    Told so, the template keeps an answer whole; else it would drop what stands before a `</think>` in its text.
    """
    return [{"reasoning_content": "", **each} if each["role"] == "assistant" else each for each in messages]


def _render(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]], **options: Any) -> list[int]:
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, **SANITIZE, **options)["input_ids"]
    except (jinja2.TemplateError, ArithmeticError) as error:  # a template is a program, run in jinja's sandbox
        where = getattr(tokenizer, "name_or_path", None)
        raise UserError(f"对话模板出错：{error}", where, "请使用 Qwen3 自带的对话模板") from error


def render_sample(tokenizer: "PreTrainedTokenizerBase", row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Token ids and labels of a training row; labels are -100 over the prompt.

    This is what TRL's trainer makes of the same row (a test holds them equal); it serves to measure
    lengths and to look at the mask.
    """
    prompt = render_prompt(tokenizer, row["prompt"])
    ids = _render(tokenizer, [*row["prompt"], *row["completion"]])
    if ids[: len(prompt)] != prompt:
        raise UserError(
            "对话模板渲染的训练文本与推理提示不一致",
            getattr(tokenizer, "name_or_path", None),
            "请使用 Qwen3 自带的对话模板",
        )
    return ids, [-100] * len(prompt) + ids[len(prompt) :]


def check_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Make sure, before anything is trained, that the template trains what inference will use.

    Raises:
        UserError: no template, a prompt that is no prefix of the sample, or a sample that does not end
            its turn (such a model never stops).
    """
    if not tokenizer.chat_template:
        raise UserError("分词器没有对话模板", getattr(tokenizer, "name_or_path", None), "请使用 Qwen3 的分词器")
    probe = training_row(Record(question="问", think="想", answer="答"), "系统")
    _, labels = render_sample(tokenizer, probe)
    trained = tokenizer.decode([label for label in labels if label != -100])
    if trained != f"<think>\n想\n{THINK_END}\n\n答{END_OF_TURN}\n":
        raise UserError(
            f"对话模板不会训练出正确的思考与结束符，得到的是 {trained!r}",
            getattr(tokenizer, "name_or_path", None),
            "请使用 Qwen3 自带的对话模板",
        )


def parse_reply(prompt: str, text: str) -> Reply:
    """Take a finished reply apart.

    Args:
        prompt: the rendered prompt that the text continues.
        text: what was generated, by `TokenText` or, where only text is to be had, without special tokens.
    """
    parser = ReplyParser(prompt)
    parser.feed(text)
    parser.close()
    return parser.reply


def closing_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids that close a thinking as training data close it: a line break, `</think>`, two line breaks."""
    return [*_plain_ids(tokenizer, "\n"), tokenizer.convert_tokens_to_ids(THINK_END), *_plain_ids(tokenizer, "\n\n")]


def empty_thinking_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What Qwen3's template writes after the prompt with `enable_thinking=False`."""
    opened, closed = tokenizer.convert_tokens_to_ids([THINK_START, THINK_END])
    blank = _plain_ids(tokenizer, "\n\n")
    return [opened, *blank, closed, *blank]


def stop_ids(tokenizer: "PreTrainedTokenizerBase", configured: Iterable[int | None]) -> list[int]:
    """Every id that ends a turn: the configured ones, `<|im_end|>` and `<|endoftext|>`.

    A config that lists only one of them is the well-known reason of replies that never end.
    """
    named = [tokenizer.convert_tokens_to_ids(token) for token in STOP_TOKENS]
    return sorted({token for token in (*configured, *named) if token is not None})


def _plain_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class TokenText:
    """Turns generated ids into text for `ReplyParser`, piece by piece.

    Only the tokens `<think>` and `</think>` are tags. The same letters written as text – a model that
    repeats a question which holds them – stay text and move no border.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._tags = {tokenizer.convert_tokens_to_ids(tag): tag for tag in (THINK_START, THINK_END)}
        self._waiting: list[int] = []

    def feed(self, ids: Iterable[int]) -> str:
        """The text that further ids add; the bytes of half a character wait for the rest."""
        text = ""
        for tag, run in itertools.groupby(ids, self._tags.get):
            if tag:
                text += self.close() + tag * len(list(run))
            else:
                self._waiting += run
                text += self._decode(final=False)
        return text

    def close(self) -> str:
        """What has waited, at the end or before a tag."""
        return self._decode(final=True)

    def _decode(self, final: bool) -> str:
        text = self._tokenizer.decode(self._waiting, skip_special_tokens=True)
        # A character has at most four bytes: what eight tokens don't complete is no character.
        if text.endswith("\ufffd") and not final and len(self._waiting) < 8:
            return ""
        self._waiting = []
        return text.replace("<", WRITTEN_LESS_THAN)


class ReplyParser:
    """Takes a reply apart while it is being generated: `feed` text, `close` at its end, read `reply`.

    transformers' response parser does the work, tags split across chunks included. Two things it leaves:
    of several thinking or answer parts only the last of a kind is kept (here they are joined), and a
    `</think>` that nothing opened stays in the answer (Qwen's model card reads what stands before it as
    thinking, and so does `reply`; a stream has shown it as answer by then).
    """

    def __init__(self, prompt: str = "") -> None:
        from transformers.utils.chat_parsing import ResponseParser

        self._parser = ResponseParser(RESPONSE_TEMPLATE, prefix=prompt)
        opened = False
        for event in self._parser.initial_events:
            opened = event["type"] == "region_open"
        self._text = THINK_START if opened else ""
        self._region: str | None = "reasoning_content" if opened else None
        self._blanks: str | None = None  # blanks that wait for text to follow; None before a region's first text
        self._parts: dict[str, list[str]] = {"reasoning_content": [], "content": []}

    def feed(self, text: str) -> list[tuple[str, str]]:
        """The ("thinking" | "answer", piece) pairs that a further piece of text adds."""
        self._text += text
        return self._pieces(self._parser.feed(text))

    def close(self) -> list[tuple[str, str]]:
        """The pieces that were held back because a tag might have begun in them."""
        return self._pieces(self._parser.finalize()[1])

    @property
    def reply(self) -> Reply:
        """The whole reply, after `close`."""
        thinking, answers = self._parts["reasoning_content"], self._parts["content"]
        *before, answer = (part for text in answers for part in text.split(THINK_END)) if answers else ("",)
        if not any(THINK_END in text for text in answers):  # several answer parts, no stray tag: all are answer
            before, answer = [], "\n".join(answers)
        return Reply(
            thinking=_plain("\n".join(part.strip() for part in (*thinking, *before) if part.strip())),
            answer=_plain(answer.strip()),
            thinking_closed=self._text.rfind(THINK_START) <= self._text.rfind(THINK_END),
            well_formed=bool(_ONE_BLOCK.fullmatch(self._text)),
        )

    def _pieces(self, events: Iterable[dict]) -> list[tuple[str, str]]:
        pieces = []
        for event in events:
            if event["type"] == "region_open":
                self._region, self._blanks = event["field"], None
            elif event["type"] == "region_close":
                self._parts[event["field"]].append(event["value"])
            elif piece := self._between_blanks(event["text"]):
                pieces.append(("thinking" if self._region == "reasoning_content" else "answer", _plain(piece)))
        return pieces

    def _between_blanks(self, text: str) -> str:
        """The text without the blanks at a region's ends: they belong to the format, not to the text."""
        body = text.strip() if self._blanks is None else text.rstrip()
        if not body:
            self._blanks = None if self._blanks is None else self._blanks + text
            return ""
        piece = (self._blanks or "") + body
        self._blanks = text[len(text.rstrip()) :]
        return piece


def _plain(text: str) -> str:
    return text.replace(WRITTEN_LESS_THAN, "<")
