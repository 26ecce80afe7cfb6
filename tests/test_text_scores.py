"""chrF, BLEU and ROUGE are those of their libraries."""

from collections import Counter

import jieba
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_chinese import Rouge

from qwenmed.text_scores import text_samples

PAIRS = [
    ("高血压患者应当低盐饮食，规律服药，定期测量血压。", "高血压患者要低盐饮食，按医嘱服药，并定期测血压。"),
    ("多喝水，注意休息。\n发热超过三天请就医。", "注意休息，多饮水；发热三天不退应去医院就诊。"),
    ("这是偏头痛。", "您的描述符合偏头痛：一侧搏动性疼痛，怕光，恶心。建议神经内科就诊。"),
]
HYPOTHESES, REFERENCES = ([pair[i] for pair in PAIRS] for i in (0, 1))


def values(hypotheses, references):
    return {name: sample.value for name, sample in text_samples(hypotheses, references).items()}


def test_scores_agree_with_direct_calls_of_the_libraries():
    found = values(HYPOTHESES, REFERENCES)
    assert found["chrf"] == sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES]).score
    assert found["bleu"] == sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES], tokenize="zh").score
    joined = [["\n".join(" ".join(jieba.lcut(line)) for line in text.splitlines()) for text in texts]
              for texts in (HYPOTHESES, REFERENCES)]  # fmt: skip
    direct = Rouge(exclusive=False).get_scores(*joined, avg=True)
    for name in ("rouge-1", "rouge-2", "rouge-l"):
        assert found[name] == pytest.approx(direct[name]["f"] * 100, abs=1e-6)
    assert found["rouge-2"] > 10  # of unsegmented Chinese it would be 0


def f1_of_counts(hypothesis, reference, n):
    """ROUGE-N as Lin (2004) defines it: an n-gram of the reference can be met as often as it stands there."""
    counts = [
        Counter(zip(*(words[i:] for i in range(n)), strict=False))
        for words in ([word for word in jieba.lcut(text) if word.strip()] for text in (hypothesis, reference))
    ]
    both = (counts[0] & counts[1]).total()
    return 2 * both / max(counts[0].total() + counts[1].total(), 1) * 100


def f1_of_subsequence(hypothesis, reference):
    """ROUGE-L of two whole texts: their longest common subsequence of words."""
    ours, theirs = ([word for word in jieba.lcut(text) if word.strip()] for text in (hypothesis, reference))
    row = [0] * (len(theirs) + 1)
    for word in ours:
        before, row = row, [0]
        for i, other in enumerate(theirs):
            row.append(before[i] + 1 if word == other else max(before[i + 1], row[i]))
    return 2 * row[-1] / max(len(ours) + len(theirs), 1) * 100


def test_rouge_counts_a_word_as_often_as_the_reference_has_it():
    reference = REFERENCES[2]
    once, many = values([reference], [reference]), values([reference * 8], [reference])
    assert once["rouge-1"] == pytest.approx(100, abs=1e-3)
    assert many["rouge-1"] == pytest.approx(2 / 9 * 100, abs=1e-3) and many["rouge-2"] < 25


@settings(max_examples=60, deadline=None)
@given(
    *[st.lists(st.sampled_from(["发热", "头痛", "多", "喝水", "，", "。", "\n", "？", "3天", "……"]), max_size=40)] * 2
)
def test_rouge_is_that_of_its_definition_on_any_text(hypothesis, reference):
    texts = "".join(hypothesis), "".join(reference)
    found = values([texts[0]], [texts[1]])
    assert found["rouge-1"] == pytest.approx(f1_of_counts(*texts, 1), abs=1e-3)
    assert found["rouge-2"] == pytest.approx(f1_of_counts(*texts, 2), abs=1e-3)
    assert found["rouge-l"] == pytest.approx(f1_of_subsequence(*texts), abs=1e-3)


def test_every_draw_of_rows_gets_the_score_of_just_those_rows():
    sample = text_samples(HYPOTHESES, REFERENCES)["bleu"]
    drawn = sample.combine(sample.columns[[0, 0, 2]].sum(axis=0))
    texts = [[each[i] for i in (0, 0, 2)] for each in (HYPOTHESES, REFERENCES)]
    assert float(drawn) == pytest.approx(sacrebleu.corpus_bleu(texts[0], [texts[1]], tokenize="zh").score)


def test_equal_texts_score_full():
    found = values(REFERENCES, REFERENCES)
    assert all(
        found[name] == pytest.approx(100, abs=1e-3) for name in ("chrf", "bleu", "rouge-1", "rouge-2", "rouge-l")
    )
    assert found["length_ratio"] == 1


@pytest.mark.parametrize("answer", ["", " \n", "的", "的" * 3000, "。" * 2000, "\n\n\n", "abc " * 900, "🙂"])
def test_hopeless_answers_score_about_nothing_and_break_nothing(answer):
    found = values([answer] * 2, REFERENCES[:2])
    assert all(0 <= found[name] < 15 for name in ("chrf", "bleu", "rouge-1", "rouge-2", "rouge-l")), found


def test_no_rows_are_no_scores():
    assert all(len(sample.columns) == 0 for sample in text_samples([], []).values())
