"""Which signs a text speaks of, and whether they are there now: not denied, past, supposed or told of others.

The words lie in urgency/signs.csv and urgency/cues.csv, for a doctor to read and correct. They are found by an
Aho–Corasick automaton, once as written and once by sound (homophones: 呼吸困南), so the time grows with the
text's length only. A word pair `A~B` is found when B follows A closely; `@name` and `@@name` stand for a row's
words (`@@` for parts of the body, of which only the nearest counts); `_` stands for a space.
"""

import bisect
import csv
import functools
import operator
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TABLES = Path(__file__).with_name("urgency")

STRONG_STOPS = frozenset("。！？!?；;\n")
CLAUSE_STOPS = STRONG_STOPS | frozenset("，,：:")
PAIR_GAP = 7  # characters between the two words of a pair
SOUND_LENGTH = 3  # shorter words have too many homophones
NEGATION_REACH = 16
SHORT_NEGATION_REACH = 1
HEALED_REACH = 40
PIECE_LENGTH = 150

# What OpenCC leaves: Cantonese words, and variants of which it takes both as simplified.
_VARIANTS = str.maketrans(
    "痺著睪衞唔冇咗瞓佢喺攞嚟嘅啲哋嗰睇諗谂畀俾咀囗", "痹着睾卫不没了睡他在拿来的些们那看想想给给嘴口"
)


@dataclass(frozen=True, slots=True)
class _Word:
    """A word of the tables, with everything it can mean.

    `left` and `body` are the groups in which it can begin a pair; of a part of the body (`@@`) only the nearest does.
    """

    length: int
    traits: int
    cues: tuple[str, ...] = ()
    signs: tuple[tuple[str, str], ...] = ()  # (sign, kind)
    left: tuple[str, ...] = ()
    right: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)  # first group of a pair → its signs
    body: tuple[str, ...] = ()


# Traits: a neutral phrase; a mark that denies; a sign whose own words deny (没有意识); a Latin word.
_NEUTRAL, _DENIAL, _DENYING_SIGN, _LATIN = 1, 2, 4, 8

# A word of the tables in the text: half-open [start, end).
_Hit = tuple[int, int, _Word]
_BY_PLACE = operator.itemgetter(0, 1)


@dataclass(frozen=True)
class Findings:
    """What a text says.

    Attributes:
        present: sign → the words, for signs that are there now, and for circumstances.
        cues: names of the language marks in the text.
    """

    present: dict[str, str]
    cues: frozenset[str]


def normalise(text: str) -> str:
    """Half-width, lower case, simplified; zero-width characters and blanks between Chinese characters removed."""
    text = unicodedata.normalize("NFKC", text).lower()
    if text.isascii():
        return " ".join(text.split())
    text = _simplified(text)
    if text.isprintable() and " " not in text:
        return text
    return _BLANK.sub("", "".join(c for c in text if c.isprintable() or c in " \n"))


def _simplified(text: str) -> str:
    if not any(map(_TO_SIMPLIFY.__getitem__, text)):
        return text
    return _opencc().convert(text).translate(_VARIANTS)


class _ToSimplify(dict[str, bool]):
    """character → whether it is written otherwise in simplified Chinese; filled as characters turn up."""

    def __missing__(self, character: str) -> bool:
        self[character] = character > "\u2e7f" and _opencc().convert(character).translate(_VARIANTS) != character
        return self[character]


_TO_SIMPLIFY = _ToSimplify()


@functools.cache
def _opencc() -> Any:
    import opencc

    return opencc.OpenCC("t2s")


# A blank, unless it stands between two Latin words or numbers.
_BLANK = re.compile(r"(?<![!-~]) | (?![!-~])")


def find_signs(text: str) -> Findings:
    """The signs of a normalised text, read piece by piece so that the time stays proportional to its length."""
    present: dict[str, str] = {}
    cues: set[str] = set()
    for piece in pieces(text):
        _read_piece(piece, present, cues)
    return Findings(present, frozenset(cues))


def pieces(text: str, length: int = PIECE_LENGTH) -> Iterable[str]:
    """Cut a text behind the ends of sentences, or where there are none, into stretches of at most `length`."""
    start = 0
    while len(text) - start > length:
        end = max(text.rfind(stop, start, start + length) for stop in STRONG_STOPS) + 1
        end = end if end > start else start + length
        yield text[start:end]
        start = end
    yield text[start:]


def _read_piece(text: str, present: dict[str, str], cues: set[str]) -> None:
    hits = _tables().hits(text)
    marks: dict[str, list[tuple[int, int]]] = {}
    for start, end, word in hits:
        for name in word.cues:
            marks.setdefault(name, []).append((start, end))
    cues.update(marks)
    reader = _Reader(text, marks)
    firsts: list[_Hit] = []  # words that can begin a pair
    for hit in hits:
        start, end, word = hit
        for name, kind in word.signs:
            # The longest words are kept: one word must not fire two parts of a rule.
            if len(present.get(name, "")) < end - start and reader.counts(kind, start, end, start):
                present[name] = text[start:end]
        if word.right and firsts:
            for first, signs in _pairs_ending(text, firsts, hit):
                # What stands between the two is none of the sign's words: 右眼突然看不见 is a sudden loss of sight.
                words = text[first[0] : first[1]] + ("…" if first[1] < start else "") + text[start:end]
                for name, kind in signs:
                    if len(present.get(name, "")) < len(words) and reader.counts(kind, first[0], end, start):
                        present[name] = words
        if word.left or word.body:
            firsts.append(hit)


def _pairs_ending(text: str, firsts: list[_Hit], second: _Hit) -> Iterable[tuple[_Hit, tuple[tuple[str, str], ...]]]:
    """(first word, signs) for the pairs whose second word is `second`, the nearest first word first."""
    middle, _, word = second
    wanted = word.right
    body = 0
    for hit in reversed(firsts):
        _, end, first = hit
        gap = middle - end
        if gap > PAIR_GAP + 6:
            return
        if gap < 0 or gap > PAIR_GAP:
            continue
        if gap and not STRONG_STOPS.isdisjoint(text[end:middle]):
            return
        groups = first.left
        if first.body and end >= body:  # words that overlap the nearest (半边身子 and 身子) are the same part
            body = end
            groups = first.body + groups
        for name in groups:
            if name in wanted:
                yield hit, wanted[name]


# The marks that can make a sign not count.
_DOUBTS = frozenset({"否定", "否定短", "后否定", "痊愈", "过去", "假设句", "转述", "可能"})


class _Reader:
    """Decides from the marks around it whether a sign is there now."""

    def __init__(self, text: str, marks: dict[str, list[tuple[int, int]]]) -> None:
        self.length = len(text)
        self.marks = marks
        self.doubts = not _DOUBTS.isdisjoint(marks)
        if not self.doubts:
            return
        self.clauses = [0, *(i for i, c in enumerate(text, 1) if c in CLAUSE_STOPS)]
        self.sentences = [0, *(i for i in self.clauses[1:] if text[i - 1] in STRONG_STOPS)]

    def counts(self, kind: str, start: int, end: int, middle: int) -> bool:
        """Whether a sign with its words at [start, end) is there; `middle` is where a pair's second word starts."""
        if kind == "境":
            return True
        if self.doubts and self._doubted(start, end, middle):
            return False
        return kind != "病" or self._any("急性", max(0, start - 30), min(self.length, end + 30))

    def _doubted(self, start: int, end: int, middle: int) -> bool:
        sentence = self.sentences[bisect.bisect_right(self.sentences, start) - 1]
        clause = self.clauses[bisect.bisect_right(self.clauses, start) - 1]
        if self._denied(clause, start, end, middle) or self._past(sentence, start, end):
            return True
        if self._any("假设句", sentence, start) or self._any("转述", sentence, start):
            return True
        return self._any("可能", max(clause, start - 12), start) and not self._any("急性", sentence, end)

    def _denied(self, clause: int, start: int, end: int, middle: int) -> bool:
        for s, e in self.marks.get("否定", ()):
            if clause <= s and e <= start and start - e <= NEGATION_REACH and not self._any("转折", e, start):
                return True
            if start < s and e <= middle:
                return True
        for s, e in self.marks.get("否定短", ()):
            if (clause <= s and e <= start and start - e <= SHORT_NEGATION_REACH) or (start < s and e == middle):
                return True
        return any(end <= s <= end + 2 for s, _ in self.marks.get("后否定", ()))

    def _past(self, sentence: int, start: int, end: int) -> bool:
        for s, e in self.marks.get("痊愈", ()):
            if end <= s < end + HEALED_REACH and not self._any("现在", e, self.length):
                return True
        past = [e for s, e in self.marks.get("过去", ()) if sentence <= s and e <= start + 1]
        return bool(past) and not self._any("现在", max(past), max(start, end) + 1)

    def _any(self, name: str, start: int, end: int) -> bool:
        for s, e in self.marks.get(name, ()):  # noqa: SIM110 - any() over a generator takes thrice the time
            if start <= s and e <= end:
                return True
        return False


class _Tables:
    """The words of both tables as automata."""

    def __init__(self) -> None:
        import ahocorasick

        self.words: dict[str, set[tuple[str, str]]] = {}
        self.kinds: dict[str, str] = {}
        self.pairs: dict[str, dict[str, set[str]]] = {}  # right group → left group → signs
        self._read()
        self.written, self.spoken = ahocorasick.Automaton(), ahocorasick.Automaton()
        self.sounds = _Sounds()
        self.lefts = {left for wanted in self.pairs.values() for left in wanted}
        by_sound: dict[str, set[tuple[str, str]]] = {}
        for word, roles in self.words.items():
            entry = self._word(word, roles)
            self.written.add_word(word, entry)
            is_chinese = all("一" <= c <= "鿿" for c in word)
            if entry.signs and len(word) >= SOUND_LENGTH and is_chinese and not entry.traits & _DENYING_SIGN:
                by_sound.setdefault(self._sound(word), set()).update(entry.signs)
        for sound, signs in by_sound.items():
            self.spoken.add_word(sound, _Word(len(sound), 0, signs=tuple(sorted(signs))))
        self.written.make_automaton()
        self.spoken.make_automaton()

    def hits(self, text: str) -> list[_Hit]:
        """Every word of the tables in the text, by its start; none that lies inside of a neutral phrase."""
        found = [(last + 1 - word.length, last + 1, word) for last, word in self.written.iter(text)]
        traits = functools.reduce(operator.or_, (word.traits for _, _, word in found), 0)
        if traits & _LATIN:  # his holds no hi
            found = [hit for hit in found if not (hit[2].traits & _LATIN and _inside_latin(text, hit))]
        if traits & _NEUTRAL:
            for start, end in [hit[:2] for hit in found if hit[2].traits & _NEUTRAL]:
                found = [hit for hit in found if hit[0] < start or end < hit[1] or hit[:2] == (start, end)]
        if not text.isascii():
            spoken = [(last + 1 - word.length, last + 1, word) for last, word in self.spoken.iter(self._sound(text))]
            if spoken:
                written = {hit[:2] for hit in found}
                found += [hit for hit in spoken if hit[:2] not in written]
        found.sort(key=_BY_PLACE)
        if traits & _DENYING_SIGN:
            found = _without_cut_signs(found)
        if traits & _DENIAL:  # a denial inside of a sign's own word (没有意识) denies nothing
            signs = [hit[:2] for hit in found if hit[2].signs]
            found = [h for h in found if not (h[2].traits & _DENIAL and any(s <= h[0] and h[1] <= e for s, e in signs))]
        return found

    def _sound(self, text: str) -> str:
        return "".join(map(self.sounds.__getitem__, text))

    def _word(self, word: str, roles: set[tuple[str, str]]) -> _Word:
        cues, signs, groups = (
            sorted(name for role, name in roles if role == kind) for kind in ("cue", "sign", "group")
        )
        traits = _NEUTRAL if "中性" in cues else 0
        if cues and cues[0] in _DENIALS:
            traits |= _DENIAL
        if signs and not _DENYING.isdisjoint(word):
            traits |= _DENYING_SIGN
        if word.isascii() and word[0].isalpha():
            traits |= _LATIN
        right: dict[str, set[str]] = {}
        for name in groups:
            for left, pair_signs in self.pairs.get(name, {}).items():
                right.setdefault(left, set()).update(pair_signs)
        return _Word(
            len(word),
            traits,
            cues=tuple(cues),
            signs=self._with_kinds(signs),
            left=tuple(name for name in groups if name in self.lefts and not name.startswith("@@")),
            right={left: self._with_kinds(pair_signs) for left, pair_signs in right.items()},
            body=tuple(name for name in groups if name.startswith("@@")),
        )

    def _with_kinds(self, signs: Iterable[str]) -> tuple[tuple[str, str], ...]:
        return tuple((name, self.kinds[name]) for name in sorted(signs))

    def _read(self) -> None:
        with (TABLES / "cues.csv").open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                for word in row["词语"].split():
                    self._add(word, ("cue", row["语言标记"]))
        with (TABLES / "signs.csv").open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            name = row["征象"]
            if name.startswith("@"):
                for word in row["词语"].split():
                    self._add(word, ("group", name))
                continue
            self.kinds[name] = "境" if "境" in row["类"] else row["类"]
            for word in row["词语"].split():
                left, is_pair, right = word.partition("~")
                if is_pair:
                    self.pairs.setdefault(self._group(right), {}).setdefault(self._group(left), set()).add(name)
                else:
                    self._add(word, ("sign", name))

    def _group(self, word: str) -> str:
        if not word.startswith("@"):
            self._add(word, ("group", f"={word}"))
            return f"={word}"
        return word

    def _add(self, word: str, role: tuple[str, str]) -> None:
        self.words.setdefault(_simplified(word.replace("_", " ").lower()), set()).add(role)


_DENYING = frozenset("没不无")
_DENIALS = frozenset({"否定", "否定短"})


def _without_cut_signs(found: list[_Hit]) -> list[_Hit]:
    """Drop 没有呼吸 where the text goes on to 没有呼吸困难: the longer sign begins inside of it.

    What is dropped itself drops no other: in 没有呼吸没有脉搏 the sign 呼吸没有 goes, and both denials stay.
    """
    kept: set[tuple[int, int]] = set()
    for start, end, word in reversed(found):
        if word.signs and not (word.traits & _DENYING_SIGN and any(start < s < end < e for s, e in kept)):
            kept.add((start, end))
    return [hit for hit in found if not hit[2].signs or hit[:2] in kept]


def _inside_latin(text: str, hit: _Hit) -> bool:
    """Whether a Latin word begins inside of another, or, being short, ends inside of one (longer ones may be stems)."""
    start, end, word = hit
    before, after = text[start - 1 : start], text[end : end + 1]
    return (before.isascii() and before.isalpha()) or (word.length <= 4 and after.isascii() and after.isalpha())


@functools.cache
def _tables() -> _Tables:
    return _Tables()


class _Sounds(dict[str, str]):
    """character → one private character a syllable, without tone; z/zh, c/ch, s/sh and n/ng at the end taken as one.

    Filled as characters turn up: all of them at once would cost each start of a script half a second.
    """

    def __init__(self) -> None:
        self._codes: dict[str, str] = {}

    def __missing__(self, character: str) -> str:
        code = character if not "一" <= character <= "龥" else self._code(character)
        self[character] = code
        return code

    def _code(self, character: str) -> str:
        from pypinyin import Style, lazy_pinyin

        syllable = lazy_pinyin(character, style=Style.NORMAL)[0]
        for long, short in (("zh", "z"), ("ch", "c"), ("sh", "s")):
            if syllable.startswith(long):
                syllable = short + syllable[2:]
        if syllable.endswith(("ing", "eng")):
            syllable = syllable[:-1]
        return self._codes.setdefault(syllable, chr(0xE000 + len(self._codes)))
