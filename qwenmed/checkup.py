"""The frame of doctor.py: findings with a remedy, checks that may fail without ending the examination, the table.

A check is a generator of findings. What a check raises – a UserError, or anything at all – is a finding too: whoever
calls the doctor has a machine on which something is wrong.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qwenmed.controls import display_width
from qwenmed.errors import UserError

GOOD, MIND, BAD = "✓", "!", "✗"
NAMES = {GOOD: "ok", MIND: "warning", BAD: "error"}


@dataclass(frozen=True)
class Finding:
    """What a check has found.

    Attributes:
        mark: GOOD, MIND (works, but know it) or BAD (mend it first).
        what: what was looked at.
        found: what it was like.
        fix: what to do, or "".
    """

    mark: str
    what: str
    found: str
    fix: str = ""


Check = Callable[[], Iterator[Finding]]


def examine(checks: Iterable[tuple[str, Check]], begun: Callable[[str], None]) -> Iterator[Finding]:
    """Run the checks one after the other; each ends at what it raises, and the others go on.

    Args:
        checks: the name of each, and the check.
        begun: is told the name before the check begins.
    """
    for name, check in checks:
        begun(name)
        try:
            yield from check()
        except UserError as error:
            where = f"（{error.where}）" if error.where else ""
            yield Finding(BAD, name, f"{error.what}{where}", error.remedy or "")
        except Exception as error:  # an unforeseen fault is what one calls a doctor for
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
            yield Finding(BAD, name, f"{type(error).__name__}：{reason}", "请连同这一行报告问题")


def as_json(findings: Sequence[Finding], **more: Any) -> dict[str, Any]:
    """The findings for a program."""
    listed = [asdict(each) | {"mark": NAMES[each.mark]} for each in findings]
    return {"ok": is_well(findings), "findings": listed, **more}


def is_well(findings: Iterable[Finding]) -> bool:
    """Whether nothing must be mended first."""
    return all(each.mark != BAD for each in findings)


def as_text(findings: Sequence[Finding], columns: int) -> str:
    """The table for a terminal: mark, what, found; the fix below it."""
    width = max(display_width(each.what) for each in findings) + 2
    lines = []
    for each in findings:
        head = f"{each.mark} {each.what}{' ' * (width - display_width(each.what))}"
        lines += _wrapped(head, each.found, columns)
        if each.fix and each.mark != GOOD:
            lines += _wrapped(" " * (width + 2) + "→ ", each.fix, columns)
    counts = {mark: sum(each.mark == mark for each in findings) for mark in (GOOD, MIND, BAD)}
    lines.append("")
    lines.append("，".join(f"{mark} {count}" for mark, count in counts.items()))
    return "\n".join(lines)


def _wrapped(head: str, text: str, columns: int) -> list[str]:
    """The text behind its head, broken where the terminal ends; Chinese may break anywhere."""
    indent, room = " " * display_width(head), max(20, columns - display_width(head) - 1)
    lines, line = [], ""
    for word in _words(text):
        if line and display_width(line + word.rstrip()) > room:
            lines.append(line.rstrip())
            line = ""
        line += word
    lines.append(line.rstrip())
    return [(head if number == 0 else indent) + each for number, each in enumerate(lines)]


def _words(text: str) -> Iterator[str]:
    """Chinese characters one by one, what is written in Latin letters as words with the blank behind them."""
    word = ""
    for character in text.replace("\n", " "):
        if display_width(character) == 2:
            yield from filter(None, (word, character))
            word = ""
        else:
            word += character
            if character == " ":
                yield word
                word = ""
    if word:
        yield word
