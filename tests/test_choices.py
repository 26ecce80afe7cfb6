"""Multiple-choice questions: the files, the likeliest letter, the letter in an answer."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_scoring import plain

from prompts import MEDICAL_SCENARIOS
from qwenmed import chat, checkpoints, choices
from qwenmed.errors import UserError

GOOD = {"question": "哪个是？", "options": ["甲", "乙", "丙"], "answer": "B"}


def written(folder, *rows):
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("综上，应当首选氨氯地平。\n答案：B", "B"),
        ("答案：**C**", "C"),
        ("**答案**：B", "B"),
        ("**正确答案：** B", "B"),
        ("答案：`B`", "B"),
        ("正确选项是B", "B"),
        ("**正确选项**为 **B**。", "B"),
        ("答案是 D。", "D"),
        ("【答案】A", "A"),
        ("答案: \\boxed{A}", "A"),
        ("答案：Ｃ", "C"),
        ("A 不对，B 也不对。所以选择 D。", "D"),
        ("答案：A。不，再想想，答案：B", "B"),
        ("B", "B"),
        ("（C）", "C"),
        ("B. 低盐饮食", "B"),
        ("选项B不对，应选C", "C"),
        ("AB型血的人……", None),
        ("答案：ABO血型", None),
        ("答案：E", None),
        ("不知道。", None),
        ("", None),
    ],
)
def test_letter_is_found_where_an_answer_states_it(answer, letter):
    assert choices.parse_choice(answer, "ABCD") == letter


@given(st.text(max_size=200))
def test_any_text_is_a_letter_of_the_question_or_none(text):
    assert choices.parse_choice(text, "ABCD") in (*"ABCD", None)


def test_options_may_be_a_list_or_lettered_and_the_answer_a_letter_or_the_text(tmp_path):
    lettered = {**GOOD, "options": {"A": "甲", "B": "乙", "C": "丙"}, "answer": "b"}
    found = choices.read_choices(written(tmp_path, GOOD, lettered, {**GOOD, "answer": "乙", "scenario": "diagnosis"}))
    assert [(each.options, each.answer) for each in found] == [({"A": "甲", "B": "乙", "C": "丙"}, "B")] * 3
    assert found[2].scenario == "diagnosis" and "A. 甲\nB. 乙" in found[0].text


def test_options_with_a_gap_keep_their_right_answer(tmp_path):
    gap = {"question": "哪个是？", "options": {"A": "甲", "C": "丙", "D": "丁"}, "answer": "C"}
    numbered = {"question": "哪个是？", "options": {"1": "甲", "2": "乙"}, "answer": "2"}
    first, second = choices.read_choices(written(tmp_path, gap, numbered))
    assert first.options[first.answer] == "丙" and second.options[second.answer] == "乙"


def test_two_questions_with_one_id_are_refused_with_both_places(tmp_path):
    with pytest.raises(UserError) as caught:
        choices.read_choices(written(tmp_path, {**GOOD, "id": 3}, GOOD, {**GOOD, "id": "3"}))
    assert "mine.jsonl:3" in str(caught.value) and "mine.jsonl:1" in str(caught.value)
    with pytest.raises(UserError, match="mine.jsonl:1"):  # the number of the second row is its id
        choices.read_choices(written(tmp_path, {**GOOD, "id": 2}, GOOD))


@pytest.mark.parametrize(
    "row, words",
    [
        ({**GOOD, "question": " "}, "question"),
        ({**GOOD, "options": ["甲"]}, "options"),
        ({**GOOD, "options": ["甲", 2]}, "options"),
        ({**GOOD, "options": None}, "options"),
        ({**GOOD, "answer": "D"}, "answer"),
        ({**GOOD, "answer": 1}, "answer"),
        (["甲"], "JSON"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(tmp_path, row, words):
    with pytest.raises(UserError) as caught:
        choices.read_choices(written(tmp_path, GOOD, row))
    assert "mine.jsonl:2" in str(caught.value) and words in str(caught.value)


def test_likeliest_letter_is_that_of_a_plain_computation(demo_model, tokenizer, tmp_path):
    import torch

    model = checkpoints.load_base(demo_model, torch.float32).eval()
    found = choices.read_choices(written(tmp_path, GOOD, {**GOOD, "question": "哪个不是？"}))
    likeliest = list(choices.likeliest_letters(model, tokenizer, found, "系统"))
    for each, chosen in zip(found, likeliest, strict=True):
        prompt = chat.render_prompt(tokenizer, chat.user_messages(each.text, "系统"))
        prompt += chat.empty_thinking_ids(tokenizer)
        losses = {}
        for letter in each.options:
            ids = prompt + tokenizer(f"答案：{letter}", add_special_tokens=False)["input_ids"]
            losses[letter] = plain(model, ids, range(len(prompt), len(ids)))
        assert chosen == min(losses, key=losses.get)


def test_bundled_questions_cover_every_scenario_and_no_letter_is_favoured():
    found = choices.read_choices(choices.BUNDLED)
    assert len(found) == len({each.question for each in found}) == 60
    assert Counter(each.scenario for each in found) == dict.fromkeys(MEDICAL_SCENARIOS, 6)
    assert set(Counter(each.answer for each in found).values()) == {15}
    longest = [max(each.options, key=lambda letter: len(each.options[letter])) == each.answer for each in found]
    assert sum(longest) <= 24  # choosing the longest option would be right in no more than 40 %
    rows = [json.loads(line) for line in choices.BUNDLED.read_text(encoding="utf-8").splitlines()]
    assert all(row["explanation"] and row["source"] for row in rows)
