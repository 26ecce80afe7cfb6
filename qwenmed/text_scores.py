"""How close an answer comes to the reference: chrF, BLEU and ROUGE, as their libraries compute them.

- chrF (Popović, 2015): character n-grams up to 6, sacrebleu's default, over the whole set.
- BLEU (Papineni et al., 2002): sacrebleu with `tokenize="zh"`, over the whole set; its default tokenizer takes a
  Chinese sentence for one word.
- ROUGE-1, -2, -L (Lin, 2004): F1 of rouge-chinese over jieba's words, mean over rows; 0 for an empty answer. A word
  counts as often as the reference has it: by its default, `exclusive=True`, the library compares sets, and an answer
  that says everything eight times would score full. Its ROUGE-L takes both texts as one sequence each.

The corpus scores are made of counts that add up over rows, which is what the bootstrap needs. They are taken from
sacrebleu's metrics by the two steps of its own paired bootstrap (sacrebleu/significance.py).
"""

import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwenmed.bootstrap import Sample, ratio_sample
from qwenmed.errors import UserError

if TYPE_CHECKING:
    import numpy as np

PACKAGES = ("sacrebleu", "rouge_chinese", "jieba")
ROUGE = ("rouge-1", "rouge-2", "rouge-l")


def check_installed() -> None:
    """Make sure that the libraries are there.

    Raises:
        UserError: one is missing.
    """
    import importlib.util

    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"没有安装 {'、'.join(missing)}", None, "请运行 pip install -e '.[eval]'")


def text_samples(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Sample]:
    """What each score is made of: "chrf", "bleu", "rouge-1", "rouge-2", "rouge-l" and "length_ratio".

    Args:
        hypotheses: the answers, without their thinking; "" where there was none.
        references: the reference answers, in the same order.
    """
    from sacrebleu.metrics import BLEU, CHRF

    pairs = list(zip(hypotheses, references, strict=True))
    rouge = [_rouge(*pair) for pair in pairs]
    return {
        "chrf": _corpus_sample(CHRF(), hypotheses, references),
        "bleu": _corpus_sample(BLEU(tokenize="zh"), hypotheses, references),
        **{name: ratio_sample((scores[i] * 100, 1) for scores in rouge) for i, name in enumerate(ROUGE)},
        "length_ratio": ratio_sample((len(hypothesis), len(reference)) for hypothesis, reference in pairs),
    }


def _corpus_sample(metric: Any, hypotheses: Sequence[str], references: Sequence[str]) -> Sample:
    import numpy as np

    if not hypotheses:
        return Sample(np.zeros((0, 1)), lambda sums: sums[..., 0])
    counts = np.array(metric._extract_corpus_statistics(hypotheses, [references]), dtype=float)
    return Sample(counts, functools.partial(_score, metric))


def _score(metric: Any, sums: "np.ndarray") -> "np.ndarray":
    """The score for each row of summed counts."""
    import numpy as np

    flat = sums.reshape(-1, sums.shape[-1])
    scores = [metric._compute_score_from_stats([int(round(each)) for each in row]).score for row in flat]
    return np.array(scores).reshape(sums.shape[:-1])


def _rouge(hypothesis: str, reference: str) -> tuple[float, ...]:
    """F1 of ROUGE-1, -2 and -L, from 0 to 1."""
    from rouge_chinese import Rouge

    pair = words(hypothesis), words(reference)
    if not all(pair):
        return (0.0,) * len(ROUGE)
    scores = Rouge(metrics=list(ROUGE), exclusive=False).get_scores(*pair)[0]
    return tuple(scores[name]["f"] for name in ROUGE)


@functools.lru_cache(maxsize=4096)  # each reference meets every model's answer
def words(text: str) -> str:
    """A text with jieba's words set apart by blanks."""
    import jieba

    jieba.setLogLevel(logging.WARNING)
    return " ".join(word for word in jieba.lcut(text) if word.strip())
