"""Fit the points by which a question's urgency is weighed: make fit-points

Logistic regression (scikit-learn, the [urgency] extra) on the phrases of the labelled questions in tests/triage,
those held out excepted. Writes qwenmed/urgency/points.csv and crisis.csv, and what five-fold cross-validation says of
them to benchmarks/results/points.json. Run it again after adding or correcting a question, then benchmarks/triage.py.
"""

import csv
import hashlib
import io
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qwenmed import files, points, signs  # noqa: E402

SETS = ("dev.jsonl", "dev_wide.jsonl", "fit.jsonl")
FOLDS = 5
RARE = 2  # a phrase of one question alone teaches nothing
STRENGTH = 1.0  # inverse of the L2 penalty, chosen by cross-validation among 0.03, 0.1, 0.3, 1, 2
SMALL = 5  # fewer points than these in every column are left out
# Topics of emergencies that call for the helpline.
CRISIS = re.compile(
    "suic|self_?harm|self_cut|farewell|goodbye|violen|threat|psychosis|homicid|infanticid|abuse|danger_(?:to_)?others"
    "|child_danger|harm_others|domestic|bully|hanging|hostage|assault|command_hall|mania|^depress|despair|jump|sexual"
)


def main() -> None:
    """Fit, write the tables, and measure by cross-validation."""
    paths = [ROOT / "tests" / "triage" / name for name in SETS]
    rows = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    found = [points.phrases(signs.normalise(row["question"])) for row in rows]
    labels = np.array([("routine", "urgent", "emergency").index(row["label"]) for row in rows])
    is_new = np.array(["writer" in row for row in rows])
    table = fit(found, labels == 2, labels >= 1)
    write(points.TABLE, ("词语", "急症", "当天"), table)

    emergencies = np.flatnonzero(labels == 2)
    words = [found[i] for i in emergencies]
    is_crisis = np.array([bool(CRISIS.search(rows[i]["topic"])) for i in emergencies])
    crisis_table = fit(words, is_crisis)
    write(points.CRISIS_TABLE, ("词语", "危机"), crisis_table)

    weighed = cross_validate(found, labels, is_new, labels == 2, labels >= 1)
    everywhere = np.ones(len(words), dtype=bool)
    crisis = cross_validate(words, is_crisis, everywhere, is_crisis)
    summary = {
        "questions": Counter(row["label"] for row in rows),
        "phrases": len(table) - 1,
        "phrases_of_a_crisis": len(crisis_table) - 1,
        "sha256": {path.name: hashlib.sha256(path.read_text(encoding="utf-8").encode()).hexdigest() for path in paths},
        "cross_validation": {
            "questions": int(is_new.sum()),
            "emergency": shares(weighed[is_new, 0], labels[is_new] == 2),
            "today": shares(weighed[is_new, 1], labels[is_new] >= 1),
            "crisis_among_emergencies": shares(crisis[:, 0], is_crisis),
        },
    }
    files.write_json(ROOT / "benchmarks" / "results" / "points.json", summary)
    print(json.dumps(summary, ensure_ascii=False, indent=1))


def fit(found: list[set[str]], *targets: np.ndarray) -> dict[str, tuple[int, ...]]:
    """Points for each target of the phrases by which questions are given; "" holds the intercepts."""
    counts = Counter(phrase for phrases in found for phrase in phrases)
    known = sorted(phrase for phrase, count in counts.items() if count >= RARE and "\n" not in phrase)
    columns = {phrase: i for i, phrase in enumerate(known)}
    where = [(i, columns[phrase]) for i, phrases in enumerate(found) for phrase in phrases if phrase in columns]
    present = csr_matrix((np.ones(len(where)), tuple(np.array(where).T)), shape=(len(found), len(known)))
    table = dict(zip(["", *known], zip(*(weights(present, target) for target in targets), strict=True), strict=True))
    return {phrase: p for phrase, p in table.items() if not phrase or max(map(abs, p)) >= SMALL}


def weights(present: csr_matrix, is_positive: np.ndarray) -> list[int]:
    """Points of the empty phrase (the intercept) and of each column."""
    model = LogisticRegression(C=STRENGTH, solver="lbfgs", max_iter=2000).fit(present, is_positive)
    return [round(100 * float(weight)) for weight in (model.intercept_[0], *model.coef_[0])]


def write(path: Path, head: tuple[str, ...], table: dict[str, tuple[int, ...]]) -> None:
    """Write a table, the empty phrase first, then by its first points."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows((p, *table[p]) for p in sorted(table, key=lambda p: (p != "", -table[p][0], p)))
    files.write_whole({path: text.getvalue()})


def cross_validate(found: list[set[str]], strata: np.ndarray, judged: np.ndarray, *targets: np.ndarray) -> np.ndarray:
    """(questions, targets) points of each judged question from a fit that has not seen it; the others are always seen."""
    own, others = np.flatnonzero(judged), np.flatnonzero(~judged)
    weighed = np.zeros((len(found), len(targets)))
    for seen, unseen in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(own, strata[own]):
        train = np.concatenate([others, own[seen]])
        table = fit([found[i] for i in train], *(target[train] for target in targets))
        for i in own[unseen]:
            weighed[i] = np.add.reduce([table[p] for p in found[i] & table.keys()] + [table[""]])
    return weighed


def shares(weighed: np.ndarray, is_positive: np.ndarray) -> dict[str, float]:
    """Recall and false alarms at 0 points."""
    is_called = weighed >= 0
    return {
        "recall": round(float(is_called[is_positive].mean()), 4),
        "false_alarms": round(float(is_called[~is_positive].mean()), 4),
    }


if __name__ == "__main__":
    main()
