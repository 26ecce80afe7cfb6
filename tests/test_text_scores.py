"""chrF, BLEU and ROUGE are those of their libraries."""

import jieba
import pytest
import sacrebleu
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
    direct = Rouge().get_scores(*joined, avg=True)
    for name in ("rouge-1", "rouge-2", "rouge-l"):
        assert found[name] == pytest.approx(direct[name]["f"] * 100, abs=1e-6)
    assert found["rouge-2"] > 10  # of unsegmented Chinese it would be 0


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
