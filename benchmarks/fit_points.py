"""Fit the points by which a question's urgency is weighed: make fit-points

Logistic regression (scikit-learn, the [urgency] extra) on the phrases of the labelled questions in tests/triage,
those held out excepted. Writes qwenmed/urgency/points.csv, and what five-fold cross-validation says of it to
benchmarks/results/points.json. Run it again after adding or correcting a question, then benchmarks/triage.py.
"""

import csv
import hashlib
import json
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
SMALL = 5  # fewer points than these in both columns are left out


def main() -> None:
    """Fit, write the table, and measure by cross-validation."""
    paths = [ROOT / "tests" / "triage" / name for name in SETS]
    rows = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    found = [points.phrases(signs.normalise(row["question"])) for row in rows]
    labels = np.array([("routine", "urgent", "emergency").index(row["label"]) for row in rows])
    table = fit(found, labels)
    write(table)
    summary = {
        "questions": Counter(row["label"] for row in rows),
        "phrases": len(table) - 1,
        "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths},
        "cross_validation": cross_validate(rows, found, labels),
    }
    files.write_json(ROOT / "benchmarks" / "results" / "points.json", summary)
    print(json.dumps(summary, ensure_ascii=False, indent=1))


def fit(found: list[set[str]], labels: np.ndarray) -> dict[str, points.Points]:
    """The table for questions given by their phrases; labels 0 routine, 1 urgent, 2 emergency."""
    counts = Counter(phrase for phrases in found for phrase in phrases)
    known = sorted(phrase for phrase, count in counts.items() if count >= RARE and "\n" not in phrase)
    columns = {phrase: i for i, phrase in enumerate(known)}
    where = [(i, columns[phrase]) for i, phrases in enumerate(found) for phrase in phrases if phrase in columns]
    present = csr_matrix((np.ones(len(where)), tuple(np.array(where).T)), shape=(len(found), len(known)))
    emergency, today = (weights(present, labels >= least) for least in (2, 1))
    table = {phrase: points.Points(e, t) for phrase, e, t in zip(["", *known], emergency, today, strict=True)}
    return {phrase: p for phrase, p in table.items() if not phrase or max(map(abs, p)) >= SMALL}


def weights(present: csr_matrix, is_positive: np.ndarray) -> list[int]:
    """Points of the empty phrase (the intercept) and of each column."""
    model = LogisticRegression(C=STRENGTH, solver="lbfgs", max_iter=2000).fit(present, is_positive)
    return [round(100 * float(weight)) for weight in (model.intercept_[0], *model.coef_[0])]


def write(table: dict[str, points.Points]) -> None:
    """Write the table, what speaks most for an emergency first."""
    with points.TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["词语", "急症", "当天"])
        writer.writerows((p, *table[p]) for p in sorted(table, key=lambda p: (p != "", -table[p].emergency, p)))


def cross_validate(rows: list[dict], found: list[set[str]], labels: np.ndarray) -> dict:
    """Recall and false alarms at 0 points, on questions of the newest set that the fit had not seen."""
    own = np.array([i for i, row in enumerate(rows) if "writer" in row])
    others = np.setdiff1d(np.arange(len(rows)), own)
    weighed = np.zeros((len(rows), 2))
    for seen, unseen in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(own, labels[own]):
        train = np.concatenate([others, own[seen]])
        table = fit([found[i] for i in train], labels[train])
        for i in own[unseen]:
            weighed[i] = np.add.reduce([table[p] for p in found[i] & table.keys()] + [table[""]])
    result = {"questions": len(own)}
    for column, (name, least) in enumerate((("emergency", 2), ("today", 1))):
        is_positive, is_called = labels[own] >= least, weighed[own, column] >= 0
        result[name] = {
            "recall": round(float(is_called[is_positive].mean()), 4),
            "false_alarms": round(float(is_called[~is_positive].mean()), 4),
            "false_alarms_of_routine": round(float(is_called[labels[own] == 0].mean()), 4),
        }
    return result


if __name__ == "__main__":
    main()
