"""Other people's data sets: recognised by themselves, conversations taken apart, the rest by --map."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenmed import rows, schemas
from qwenmed.records import Problem, Record

THOUGHT = "<think>\n想\n</think>\n\n休息。"


def parsed(row, **mapping):
    found = schemas.parse_row(row, "f:1", mapping or None)
    assert isinstance(found, list), found
    return [(r.question, r.think, r.answer, r.system, r.history) for r in found]


ONE = [("头痛？", "想", "休息。", None, ())]


@pytest.mark.parametrize(
    ("row", "schema"),
    [
        ({"question": "头痛？", "think": "想", "answer": "休息。"}, schemas.OWN),
        ({"question": "头痛？", "answer": THOUGHT}, schemas.OWN),
        ({"Question": "头痛？", "Complex_CoT": "想", "Response": "休息。"}, schemas.NAMED),
        ({"question": "头痛？", "reasoning (reasoning_content)": "想", "response (content)": "休息。"}, schemas.NAMED),
        ({"input": "头痛？", "reasoning_content": "想", "content": "休息。", "score": 9}, schemas.NAMED),
        ({"prompt": "头痛？", "response": THOUGHT}, schemas.NAMED),
        ({"instruction": "头痛？", "input": "", "output": THOUGHT}, schemas.ALPACA),
        ({"instruction": "", "input": "头痛？", "output": THOUGHT}, schemas.FORMATTED),
        ({"messages": [{"role": "user", "content": "头痛？"}, {"role": "assistant", "content": THOUGHT}]}, schemas.MESSAGES),
        (
            {"messages": [
                {"role": "user", "content": [{"type": "text", "text": "头痛？"}]},
                {"role": "assistant", "reasoning_content": "想", "content": "休息。"},
            ]},
            schemas.MESSAGES,
        ),
        (
            {"prompt": [{"role": "user", "content": "头痛？"}], "completion": [{"role": "assistant", "content": THOUGHT}]},
            schemas.MESSAGES,
        ),
        ({"conversations": [{"from": "human", "value": "头痛？"}, {"from": "gpt", "value": THOUGHT}]}, schemas.SHAREGPT),
        # DeepSeek's template opens the thinking in the prompt: only its end stands in the text.
        ({"conversations": [{"role": "user", "content": "头痛？"}, {"role": "assistant", "content": "想\n</think>\n\n休息。"}]}, schemas.SHAREGPT),
    ],
)  # fmt: skip
def test_common_schemas_are_recognised_by_themselves(row, schema):
    assert schemas.recognise(row) == schema
    assert parsed(row) == ONE


def test_alpaca_s_input_belongs_to_the_question_unless_the_instruction_is_a_role():
    row = {"instruction": "翻译成英文", "input": "头痛", "output": "headache"}
    assert parsed(row) == [("翻译成英文\n头痛", "", "headache", None, ())]
    row = {"instruction": "现在你是一名医生，请回答患者的问题。", "input": "头痛？", "output": "休息。"}
    assert parsed(row) == [("头痛？", "", "休息。", "现在你是一名医生，请回答患者的问题。", ())]


def test_conversation_gives_one_record_per_answer_and_drops_earlier_thinking():
    row = {
        "messages": [
            {"role": "system", "content": "系统"},
            {"role": "user", "content": "一？"},
            {"role": "assistant", "content": "<think>\n想一\n</think>\n\n甲。"},
            {"role": "user", "content": "二"},
            {"role": "user", "content": "二二？"},
            {"role": "assistant", "content": "乙。", "reasoning_content": "想二"},
            {"role": "user", "content": "谢谢"},
        ]
    }
    assert parsed(row) == [
        ("一？", "想一", "甲。", "系统", ()),
        ("二\n\n二二？", "想二", "乙。", "系统", (("一？", "甲。"),)),
    ]


def test_turn_of_weight_0_is_history_and_no_sample():
    turns = [("user", "一？"), ("assistant", "甲。"), ("user", "二？"), ("assistant", "乙。")]
    messages = [{"role": role, "content": text} for role, text in turns]
    messages[1]["weight"] = 0
    assert parsed({"messages": messages}) == [("二？", "", "乙。", None, (("一？", "甲。"),))]


def test_what_is_read_from_another_schema_is_written_in_ours_and_read_back_the_same():
    row = {"conversations": [{"from": who, "value": text} for who, text in (
        ("system", "系统"), ("human", "一？"), ("gpt", THOUGHT), ("human", "二？"), ("gpt", "<think>又想</think>乙。"),
    )]}  # fmt: skip
    found = schemas.parse_row(row, "f:1")
    for record in found:
        (again,) = schemas.parse_row(json.loads(json.dumps(record.row)), "f:1")
        assert again == record and schemas.recognise(record.row) == schemas.OWN


def test_mapping_names_the_fields_of_an_unknown_schema():
    row = {"提问": "头痛？", "推理": "想", "回复": "休息。", "角色": "系统"}
    assert isinstance(schemas.parse_row(row, "f:1"), Problem)
    assert "--map" in schemas.parse_row(row, "f:1").reason and "提问" in schemas.parse_row(row, "f:1").reason
    assert parsed(row, question="提问", think="推理", answer="回复", system="角色") == [
        ("头痛？", "想", "休息。", "系统", ())
    ]
    wrong = schemas.parse_row({"提问": "头痛？"}, "f:1", {"question": "提问", "answer": "回复"})
    assert isinstance(wrong, Problem) and "回复" in wrong.reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "user", "content": "问？"}]}, "没有一条 assistant"),
        ({"messages": [{"role": "assistant", "content": "答"}]}, "前面却没有问题"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "角色"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [1]}]},
            "角色",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "文本以外"),
        ({"messages": ["x"]}, "第 1 条消息应为对象"),
        ({"messages": [{"role": "user", "content": 5}]}, "应为文本"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "<think>没完"}]}, "思考没有结束"),
        ({"instruction": "问", "output": "<think>想</think>"}, "没有回答"),
        ({"question": "q", "answer": "a", "history": [["一个"]]}, "history"),
        ({"a": 1}, "认不出"),
        ({}, "认不出"),
    ],
)
def test_row_that_can_not_be_used_says_why(row, reason):
    found = schemas.parse_row(row, "f:1")
    assert isinstance(found, Problem) and reason in found.reason, found


def test_history_reaches_the_model_without_thinking_and_the_mask_covers_the_last_answer_only(tokenizer):
    from qwenmed import chat

    record = Record("二？", "想二", "乙。", history=(("一？", "甲。</think>尾"),))
    ids, labels = chat.render_sample(tokenizer, chat.training_row(record, "系统"))
    assert tokenizer.decode([x for x in labels if x != -100]) == "<think>\n想二\n</think>\n\n乙。<|im_end|>\n"
    text = tokenizer.decode(ids)
    assert "<|im_start|>assistant\n甲。</think>尾<|im_end|>" in text and text.count("<think>") == 1


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz"])
def test_gzipped_files_are_read_and_a_cut_one_is_said(tmp_path, name):
    row = {"question": "头痛？", "think": "想", "answer": "休息。"}
    many = [row | {"question": f"头痛{i}？" * 50} for i in range(200)]
    texts = {
        "a.jsonl.gz": "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in many),
        "a.json.gz": json.dumps(many, ensure_ascii=False),
        "a.csv.gz": "question,think,answer\n" + "".join(f"{each['question']},想,休息。\n" for each in many),
    }
    packed = gzip.compress(texts[name].encode())
    path = tmp_path / name
    path.write_bytes(packed)
    assert [row["question"] for _, row in rows.read_rows(path)] == [each["question"] for each in many]
    path.write_bytes(packed[:-20])
    with pytest.raises(rows.UserError, match="gzip 文件损坏"):
        list(rows.read_rows(path))


def test_long_json_list_is_read_in_pieces(tmp_path, monkeypatch):
    from qwenmed import json_list

    monkeypatch.setattr(json_list, "PIECE", 7)
    values = [{"question": "问" * 50, "answer": "a]},{"}, 12345, "文本", [1, [2]], {}, None, -1.5e3]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")
    assert [row for _, row in rows.read_rows(path)] == values
    for text in ("[]", "[ ]"):
        path.write_text(text, encoding="utf-8")
        assert list(rows.read_rows(path)) == []
    for text, where in (
        ("[1,\n 2", "第 2 行"),
        ("[1 2]", "第 1 行第 4 列"),
        ("[1,]", "第 1 行"),
        ("[1]]", "第 1 行第 4 列"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(rows.UserError, match=where):
            list(rows.read_rows(path))


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=6)
    | st.sampled_from([THOUGHT, "问？", "<think>没完"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
messages = st.lists(
    st.fixed_dictionaries({}, optional={
        "role": st.sampled_from(["system", "user", "assistant", "tool", 5]), "from": st.sampled_from(["human", "gpt", None]),
        "content": values, "value": values, "reasoning_content": values, "weight": st.integers(0, 1), "tool_calls": values,
    }) | values, max_size=5,
)  # fmt: skip
names = [
    "question",
    "think",
    "answer",
    "instruction",
    "input",
    "output",
    "history",
    "system",
    "scenario",
    "Question",
    "Complex_CoT",
    "Response",
    "prompt",
    "completion",
    "context",
]


@settings(max_examples=400, deadline=None)
@given(
    row=st.fixed_dictionaries(
        {},
        optional={
            **{name: values for name in names},
            "messages": messages,
            "conversations": messages,
            "conversation": messages,
        },
    ),
    mapping=st.none() | st.just({"question": "prompt", "answer": "output", "think": "context"}),
)
def test_any_row_is_records_or_a_problem_and_what_is_accepted_is_read_back_the_same(row, mapping):
    found = schemas.parse_row(row, "f:1", mapping)
    if isinstance(found, Problem):
        assert found.reason and "\n" not in str(found)
        return
    assert found
    for record in found:
        assert record.question.strip() and record.answer.strip()
        again = schemas.parse_row(json.loads(json.dumps(record.row, default=str)), "f:1")
        assert again == [record], (record, again)
