"""What foreign text may not do: steer a terminal, or pass for the control tokens of a chat.

Two different things. A terminal obeys escape sequences, so questions and answers are shown without them.
A trainer that is not ours reads `*_format.jsonl` and may take `<|im_end|>` in a text for the token; our own
renderer needs none of this, it tells text from tokens (`chat.SANITIZE`).
"""

import json
import re
import unicodedata

# Line feed and tab stay; a carriage return would let a text overwrite its own line.
_VISIBLE = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: "\u2421", 0x0D: None}
# C1 controls (U+009B begins an escape sequence just as ESC [ does) and half surrogate pairs.
_REPLACED = dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], "\ufffd")
# What turns the reading direction can make a text read as another one (CVE-2021-42574).
_BIDI = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_PRINTABLE = _VISIBLE | _REPLACED | dict.fromkeys(_BIDI)

_UNSAFE_IN_JSON = {code: f"\\u{code:04x}" for code in (0x7F, *range(0x80, 0xA0), *_BIDI)}

_ANY_UNSAFE = re.compile("[" + "".join(map(chr, _UNSAFE_IN_JSON)) + "]")

# Bounded on both sides, so that no text makes it slow.
_TOKEN_LIKE = re.compile(r"<(?=\|[A-Za-z0-9_]{1,40}\|>|/?(?:think|tool_call|tool_response)>)")


def printable(text: str) -> str:
    """The text as a terminal may show it: control characters visible, direction marks left out.

    Works character by character, so that a stream may be treated piece by piece.
    """
    return text.translate(_PRINTABLE)


def display_width(text: str) -> int:
    """How many columns of a terminal a text takes; a Chinese character is two wide."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def json_line(row: object) -> str:
    """One JSON object on a line that a terminal may show; a parser reads it back unchanged."""
    text = json.dumps(row, ensure_ascii=False)
    # Looking is twenty times as fast as translating, and a batch writes a hundred thousand lines.
    return text.translate(_UNSAFE_IN_JSON) if _ANY_UNSAFE.search(text) else text


def as_plain_words(text: str) -> str:
    """The text with a full-width "＜" in what any tokenizer of Qwen3 would take for a control token."""
    return _TOKEN_LIKE.sub("＜", text)
