"""Masks phone numbers, identity-card numbers and e-mail addresses in Chinese text.

The idea: digits are taken in groups, as people write them ("138-1234-5678", "+86 138 1234 5678", full-width
digits); neighbouring groups are joined only in groupings in which such numbers are written, so that
"血压140 90 120" or a date stays what it is. Every group looks at a few groups behind it: the time is linear.

An identity-card number (GB 11643) is 18 characters with a checksum. One whose checksum is wrong but whose birth
date is possible is masked too: a mistyped number still points at a person.

Not covered: names, addresses, numbers in words ("幺三八…"), WeChat and QQ accounts, the 15-digit cards that
expired in 2013, landlines without area code, foreign numbers, unusual groupings ("13 81 23 45 67 8").
"""

import datetime
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

MOBILE, LANDLINE, IDENTITY, EMAIL = "手机号", "固定电话", "身份证号", "邮箱"

# Full-width characters by their usual ones, one for one, so that places in the text stay the same.
_NARROW = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | dict.fromkeys(map(ord, "–—―‐‑−－"), "-")
_NARROW |= {0x3000: " ", 0x00A0: " "}

# Groups of digits and what may stand between two of one number. Neither can match the other's characters.
_GROUP = re.compile(r"[0-9]+(?:[Xx](?![A-Za-z]))?")
_BETWEEN = re.compile(r"[ ()-]{0,3}|\.")
_DIGIT = re.compile(r"[0-9０-９]")
# A landline without its area code's 0 behind a prefix has 9 and 2 more.
_FEWEST_DIGITS = 10
# One written digit by digit, and a prefix.
_MOST_GROUPS = 13

_MOBILE = re.compile(r"1[3-9][0-9]{9}")
_LANDLINE = re.compile(r"0(?:10|2[0-9]|[3-9][0-9]{2})[2-9][0-9]{6,7}")
_IDENTITY = re.compile(r"[1-9][0-9]{16}[0-9Xx]")
_GROUPINGS = {
    MOBILE: {(11,), (3, 4, 4), (3, 8), (7, 4), (3, 3, 5), (1,) * 11},
    LANDLINE: {(10,), (11,), (12,), (3, 7), (3, 8), (4, 7), (4, 8), (3, 4, 4), (3, 3, 4), (4, 4, 4), (4, 3, 4)},
    IDENTITY: {(18,), (6, 8, 4), (6, 4, 4, 4), (3, 3, 4, 4, 4), (3, 3, 8, 4), (4, 4, 4, 4, 2), (6, 6, 6)},
}
_PREFIXES = ("0086", "86", "")
# Each grouping alone, behind a prefix of its own or glued to one, and without the area code's 0 behind either.
_ALL_GROUPINGS = {
    behind
    for groupings in _GROUPINGS.values()
    for grouping in groupings
    for lost in (0, 1)
    for rest in [(grouping[0] - lost, *grouping[1:])]
    for size in map(len, _PREFIXES)
    for behind in ((size, *rest), (size + rest[0], *rest[1:]))
}
_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)

_LOCAL_PART = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._%+-")
_LONGEST_LOCAL_PART = 64
_DOMAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,62}(?:\.[A-Za-z0-9-]{1,63}){1,8}")


@dataclass(frozen=True)
class Redacted:
    """A text without its personal numbers.

    Attributes:
        text: with "[手机号]" and the like in their places.
        counts: how many of each kind were masked.
    """

    text: str
    counts: Counter


def redact(text: str) -> Redacted:
    """Mask what is recognised; redacting twice changes nothing more."""
    narrow = text.translate(_NARROW)
    found = list(_addresses(narrow))
    rest = list(narrow)
    for start, stop, _ in found:  # the digits of an address are no number
        rest[start:stop] = "@" * (stop - start)
    found += _numbers("".join(rest))
    counts: Counter[str] = Counter()
    pieces, end = [], 0
    for start, stop, kind in sorted(found):
        pieces += [text[end:start], f"[{kind}]"]
        counts[kind] += 1
        end = stop
    return Redacted("".join([*pieces, text[end:]]), counts)


def may_hold_any(text: str) -> bool:
    """Whether a text can hold anything of the kind at all; a quick look, so that most texts need no long one."""
    return "@" in text or "＠" in text or len(_DIGIT.findall(text)) >= _FEWEST_DIGITS


def redact_row(value: object, counts: Counter) -> object:
    """A row of a data set with every text in it masked; what was masked is added to `counts`."""
    if isinstance(value, str):
        masked = redact(value)
        counts.update(masked.counts)
        return masked.text
    if isinstance(value, dict):
        return {key: redact_row(inner, counts) for key, inner in value.items()}
    if isinstance(value, list):
        return [redact_row(inner, counts) for inner in value]
    return value


def is_identity_number(number: str) -> bool:
    """Whether 18 characters carry the right checksum (ISO 7064, MOD 11-2)."""
    if not _IDENTITY.fullmatch(number):
        return False
    total = sum(weight * int(digit) for weight, digit in zip(_WEIGHTS, number, strict=False))
    return "10X98765432"[total % 11] == number[-1].upper()


def _addresses(text: str) -> Iterator[tuple[int, int, str]]:
    end = 0
    for sign in re.finditer("@", text):
        start, first = sign.start(), max(end, sign.start() - _LONGEST_LOCAL_PART)
        while start > first and text[start - 1] in _LOCAL_PART:
            start -= 1
        domain = _DOMAIN.match(text, sign.end())
        if start < sign.start() and domain:
            end = domain.end()
            yield start, end, EMAIL


def _numbers(text: str) -> Iterator[tuple[int, int, str]]:
    groups = [group.span() for group in _GROUP.finditer(text)]
    lengths = [stop - start for start, stop in groups]
    # Whether a group may go on in the next one.
    goes_on = [bool(_BETWEEN.fullmatch(text, a[1], b[0])) for a, b in pairwise(groups)] + [False]
    first = 0
    while first < len(groups):
        for last in _candidates(lengths, goes_on, first):
            digits = "".join(text[start:stop] for start, stop in groups[first : last + 1])
            if kind := _kind(digits, tuple(lengths[first : last + 1])):
                start, stop = groups[first][0], groups[last][1]
                yield _with_sign_and_bracket(text, start, stop), stop, kind
                first = last
                break
        first += 1


def _candidates(lengths: list[int], goes_on: list[bool], first: int) -> list[int]:
    """The last groups with which the groups from `first` are grouped as such a number; the longest first."""
    grouping: tuple[int, ...] = ()
    found = []
    for last in range(first, len(lengths)):
        grouping += (lengths[last],)
        if grouping in _ALL_GROUPINGS:
            found.append(last)
        if not goes_on[last] or len(grouping) == _MOST_GROUPS:
            break
    return found[::-1]


def _kind(digits: str, grouping: tuple[int, ...]) -> str | None:
    if _IDENTITY.fullmatch(digits):
        known = grouping in _GROUPINGS[IDENTITY]
        return IDENTITY if known and (is_identity_number(digits) or _is_date(digits[6:14])) else None
    for prefix in _PREFIXES:
        if not digits.startswith(prefix):
            continue
        number, rest = digits[len(prefix) :], _without(grouping, len(prefix))
        if rest in _GROUPINGS[MOBILE] and _MOBILE.fullmatch(number):
            return MOBILE
        if rest in _GROUPINGS[LANDLINE] and _LANDLINE.fullmatch(number):
            return LANDLINE
        # Behind +86 the area code has lost its 0.
        widened = (rest[0] + 1, *rest[1:]) if prefix and rest else ()
        if widened in _GROUPINGS[LANDLINE] and _LANDLINE.fullmatch("0" + number):
            return LANDLINE
    return None


def _without(grouping: tuple[int, ...], prefix: int) -> tuple[int, ...]:
    """The lengths of the groups behind a prefix, which is a group of its own or the head of the first."""
    if grouping[0] == prefix:
        return grouping[1:]
    return (grouping[0] - prefix, *grouping[1:]) if grouping[0] > prefix else ()


def _with_sign_and_bracket(text: str, start: int, stop: int) -> int:
    """Where a number begins, with the plus sign and the opened bracket before it."""
    if start and text[start - 1] == "+":
        start -= 1
    if start and text[start - 1] == "(" and ")" in text[start:stop]:
        start -= 1
    return start


def _is_date(digits: str) -> bool:
    try:
        return 1900 <= datetime.date(int(digits[:4]), int(digits[4:6]), int(digits[6:])).year < 2100
    except ValueError:
        return False
