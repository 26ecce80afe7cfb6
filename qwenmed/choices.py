"""Multiple-choice questions: reading them, asking them, and telling which option was chosen.

Two ways to ask. By log-likelihood: behind an empty thinking and `答案：`, which letter does the model find most
likely? By generation: the model thinks, answers, and the letter is parsed from the end of its answer. The first
measures what it knows, the second also whether its thinking helps or leads it astray.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwenmed import chat, files, records, rows
from qwenmed.errors import UserError
from qwenmed.scoring import Marked, summed_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# 60 questions over the ten scenarios, written for this project and answered blind by a second reader.
BUNDLED = Path(__file__).parent / "eval_data" / "choices.jsonl"

LETTERS = "ABCDEFGHIJ"
INSTRUCTION = "请从以上选项中选出最合适的一个，并在回答的最后单独用一行写出“答案：字母”。"
ANSWER_PREFIX = "答案："

_MARKUP = str.maketrans("", "", "*`")
# From the clearest way of saying it to the least; of each the last one in the text counts.
_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        r"答案[\])】]?(?:应该|应当|应)?[是为选]?\s*:?\s*\\?(?:boxed)?[\s({\[\"“《【]*([A-J])(?![A-Za-z])",
        r"(?:选择|选项|故选|应选|选)[是为]?\s*:?\s*[\s({\[\"“【]*([A-J])(?![A-Za-z])",
    )
)
_ALONE = re.compile(r"\s*[({\[【]*([A-J])[)}\]】]*(?:[.、,:。\s].*)?", re.DOTALL)


@dataclass(frozen=True)
class Choice:
    """A question with options.

    Attributes:
        options: letter → text, in order.
        answer: the right letter.
        scenario: a scenario id, or None.
    """

    id: str
    question: str
    options: dict[str, str]
    answer: str
    scenario: str | None = None

    @property
    def text(self) -> str:
        """The question as it is asked."""
        listed = "\n".join(f"{letter}. {option}" for letter, option in self.options.items())
        return f"{self.question}\n{listed}\n\n{INSTRUCTION}"


def read_choices(path: Path) -> list[Choice]:
    """Read a JSONL file of `question`, `options` (a list, or letter → text) and `answer` (a letter, or the text).

    Raises:
        UserError: the file is missing or broken, a row is no such question, or two have one id; file and line are
            named.
    """
    choices: list[Choice] = []
    places: dict[str, str] = {}
    for number, (place, row) in enumerate(rows.read_rows(files.require_file(path, "选择题文件")), 1):
        found = _parsed(row, number)
        if isinstance(found, str):
            raise UserError(found, place, '应为 {"question": "…", "options": ["…", "…"], "answer": "A"}')
        claim_id(places, found.id, place)
        choices.append(found)
    return choices


def claim_id(places: dict[str, str], id_: str, place: str) -> None:
    """Note where an id stands; results are kept by id, and a second row would take the first one's place unseen.

    Raises:
        UserError: it is taken; both places are named.
    """
    if id_ in places:
        raise UserError(f"id {id_} 重复：{places[id_]} 已经用了它", place, "请给每行不同的 id，或都不写 id（就用序号）")
    places[id_] = place


def _parsed(row: object, number: int) -> Choice | str:
    """The question, or what is wrong with the row."""
    if isinstance(row, records.Problem):
        return row.reason
    if not isinstance(row, dict) or not files.is_encodable(row):
        return "应为一个 JSON 对象"
    question, options, answer = row.get("question"), row.get("options"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        return "缺少 question"
    names: Sequence[str] = LETTERS
    if isinstance(options, dict):
        names = sorted(options)
        options = [options[name] for name in names]
    if not isinstance(options, list) or not all(isinstance(each, str) and each.strip() for each in options):
        return "options 应为选项文本的列表，或“字母: 文本”"
    if not 2 <= len(options) <= len(LETTERS):
        return f"options 应有 2 到 {len(LETTERS)} 项，实际是 {len(options)} 项"
    by_letter = dict(zip(LETTERS, map(str.strip, options), strict=False))
    right = answer.strip() if isinstance(answer, str) else ""
    # The letters are given anew, so that there is no gap; the answer is meant in the file's own.
    found = [letter for letter, name in zip(by_letter, names, strict=False) if name.strip().upper() == right.upper()]
    found += [letter for letter, text in by_letter.items() if text == right]
    if not found:
        return f"answer {answer!r} 不是选项的字母或文本"
    scenario, id_ = row.get("scenario"), row.get("id", number)
    return Choice(str(id_), question.strip(), by_letter, found[0], scenario if isinstance(scenario, str) else None)


def parse_choice(answer: str, letters: Sequence[str]) -> str | None:
    """The letter that an answer chooses, or None if it does not say."""
    text = unicodedata.normalize("NFKC", answer).translate(_MARKUP)  # full-width letters and colons
    for pattern in _PATTERNS:
        if found := [letter for letter in pattern.findall(text) if letter in letters]:
            return found[-1]
    alone = _ALONE.fullmatch(text)
    return alone[1] if alone and alone[1] in letters else None


def likeliest_letters(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", choices: Sequence[Choice], system: str
) -> Iterator[str]:
    """For each question the letter that the model finds most likely behind an empty thinking and `答案：`."""
    sequences = (_with_letter(tokenizer, each, letter, system) for each in choices for letter in each.options)
    losses = (loss for loss, *_ in summed_losses(model, sequences))
    for each in choices:
        yield min([(next(losses), letter) for letter in each.options])[1]


def _with_letter(tokenizer: "PreTrainedTokenizerBase", choice: Choice, letter: str, system: str) -> Marked:
    prompt = chat.render_prompt(tokenizer, chat.user_messages(choice.text, system))
    prompt += chat.empty_thinking_ids(tokenizer)
    # The whole continuation counts: with some tokenizers the letter is one token with what stands before it.
    continuation = tokenizer(ANSWER_PREFIX + letter, add_special_tokens=False)["input_ids"]
    return Marked([*prompt, *continuation], [range(len(prompt), len(prompt) + len(continuation))])
