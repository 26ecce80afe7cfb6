"""How long samples are in tokens, and how they are made to fit: no sample ever loses its end."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from qwenmed import chat
from qwenmed.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A shortened thinking keeps its beginning and end; in between stands this.
ELLIPSIS = "\n……\n"


class SampleLengths:
    """How many tokens a record's sample takes; the same number as `render_sample` gives, in a third of the time.

    The template is rendered once, around marks, and the record's texts put in their places. What might be a control
    token, or part of a longer conversation, goes the long way.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._around: dict[str, list[str]] = {}
        self._added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        self._quick = all(token.startswith("<") for token in self._added)

    def of_many(self, samples: Sequence[tuple[Record, str]]) -> list[int]:
        """The lengths of several samples, in tokens."""
        lengths: list[int | None] = [None] * len(samples)
        texts = [self._text(record, system) for record, system in samples]
        quick = [place for place, text in enumerate(texts) if text is not None]
        encoded = self._tokenizer.backend_tokenizer.encode_batch_fast(
            [texts[i] for i in quick], add_special_tokens=False
        )
        for place, encoding in zip(quick, encoded, strict=True):
            lengths[place] = len(encoding)
        return [
            length
            if length is not None
            else len(chat.render_sample(self._tokenizer, chat.training_row(record, system))[0])
            for length, (record, system) in zip(lengths, samples, strict=True)
        ]

    def _may_hold_a_token(self, text: str) -> bool:
        # Qwen3's added tokens all begin so; looking for one character is quicker than for twenty-six words.
        return "<" in text and any(token in text for token in self._added)

    def _text(self, record: Record, system: str) -> str | None:
        think, answer = record.think.strip("\n"), record.answer.lstrip("\n")
        if (
            not self._quick
            or record.history
            or not think
            or any(map(self._may_hold_a_token, (record.question, think, answer)))
        ):
            return None
        if system not in self._around:
            marks = Record("\ue000", "\ue001", "\ue002")
            ids = chat.render_sample(self._tokenizer, chat.training_row(marks, system))[0]
            self._around[system] = re.split("[\ue000-\ue002]", self._tokenizer.decode(ids))
        before, middle, between, after = self._around[system]
        return "".join((before, record.question, middle, think, between, answer, after))


@dataclasses.dataclass
class LengthReport:
    """What fitting rows to a length did: counts of rows kept whole and shortened, and the places of those dropped.

    Attributes:
        places, lengths: of the rows that were kept, in their order: where they stand in the file; their tokens.
    """

    whole: int = 0
    shortened: int = 0
    dropped: list[str] = dataclasses.field(default_factory=list)
    places: list[str] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return f"完整 {self.whole} 条，缩短思考 {self.shortened} 条，丢弃 {len(self.dropped)} 条"


def fit_rows(
    tokenizer: "PreTrainedTokenizerBase",
    samples: Iterable[tuple[Record, str]],
    max_length: int,
    overlong: str,
) -> tuple[list[dict[str, Any]], LengthReport]:
    """Turn (record, system prompt) pairs into training rows of at most `max_length` tokens.

    No sample ever loses its end: what is too long is dropped or, with `overlong="shorten"`, has the middle
    of its thinking taken out; it is dropped all the same if prompt and answer alone don't fit.
    """
    rows, report = [], LengthReport()
    for record, system in samples:
        row = chat.training_row(record, system)
        length = len(chat.render_sample(tokenizer, row)[0])
        if length <= max_length:
            report.whole += 1
        else:
            shorter = shorten_thinking(tokenizer, record, system, max_length) if overlong == "shorten" else None
            if shorter is None:
                report.dropped.append(record.place)
                continue
            row, length = shorter
            report.shortened += 1
        rows.append(row)
        report.places.append(record.place)
        report.lengths.append(length)
    return rows, report


def shorten_thinking(
    tokenizer: "PreTrainedTokenizerBase", record: Record, system: str, max_length: int
) -> tuple[dict[str, Any], int] | None:
    """The row and its length with just as much thinking as fits, or None if none does."""
    low, high, best = 0, len(record.think) - 1, None
    while low <= high:
        keep = (low + high) // 2
        head = (keep + 1) // 2
        tail = keep - head
        think = (record.think[:head] + ELLIPSIS + record.think[len(record.think) - tail :]) if keep else ""
        row = chat.training_row(dataclasses.replace(record, think=think), system)
        length = len(chat.render_sample(tokenizer, row)[0])
        if length <= max_length:
            best, low = (row, length), keep + 1
        else:
            high = keep - 1
    return best
