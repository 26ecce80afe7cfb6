"""A record of the data set – question, thinking, answer – and the formatted row made of it."""

from dataclasses import dataclass, field

from qwenmed.controls import as_plain_words

# Raise it whenever the text of a formatted row changes.
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Record:
    """One sample.

    Attributes:
        question: what the user asks.
        think: the thinking before the answer; may be empty.
        answer: the answer proper.
        scenario: id of the scenario it belongs to, where the data say so.
        system: a system prompt that the row brings along (rows that are already formatted).
        history: the earlier (question, answer) turns of a conversation, without their thinking.
        row: the row as `data.py` writes it: unchanged where it has the data set's own schema.
        place: "file:line" for messages; the records of one conversation share it.
    """

    question: str
    think: str
    answer: str
    scenario: str | None = None
    system: str | None = None
    history: tuple[tuple[str, str], ...] = ()
    row: dict = field(default_factory=dict, compare=False, repr=False)
    place: str = field(default="", compare=False)

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two records the same."""
        return (self.question, self.think, self.answer, self.history)


@dataclass(frozen=True)
class Problem:
    """A row that could not be used, and why.

    Attributes:
        place: "file:line".
        reason: for the user.
        unreadable: whether these are no text at all; a file that begins with nothing else is none.
    """

    place: str
    reason: str
    unreadable: bool = False

    def __str__(self) -> str:
        return f"{self.place}：{self.reason}"


def format_output(record: Record) -> str:
    """The target text of a formatted row – what Qwen3's own template writes after `assistant\\n`.

    Other trainers read these rows, so what looks like a control token in the texts is broken up.
    """
    think, answer = record.think.strip("\n"), record.answer.lstrip("\n")
    return f"<think>\n{as_plain_words(think)}\n</think>\n\n{as_plain_words(answer)}"


def format_row(record: Record, system: str) -> dict[str, object]:
    """A row of `*_format.jsonl`: the system prompt, the question, thinking and answer.

    Earlier turns stand in `history` as [question, answer] pairs, as LLaMA-Factory reads them.
    """
    row: dict[str, object] = {
        "instruction": as_plain_words(system),
        "input": as_plain_words(record.question),
        "output": format_output(record),
    }
    if record.history:
        row["history"] = [[as_plain_words(text) for text in turn] for turn in record.history]
    return row
