"""How good and how fast the urgency rules are: python benchmarks/triage.py

Prints the confusion table of the labelled sets under tests/triage and questions a second on one core, and writes
benchmarks/results/triage.json.
"""

import json
import platform
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qwenmed import files, triage  # noqa: E402

SETS = ("dev", "dev_wide", "fit", "heldout", "heldout_wide", "heldout_fields")
ROUNDS = 5
LEVELS = (triage.EMERGENCY, triage.URGENT, triage.ROUTINE)


def main() -> None:
    """Measure each set."""
    triage.assess("胸口疼")  # loads the tables
    results = {name: measure(ROOT / "tests" / "triage" / f"{name}.jsonl") for name in SETS}
    folder = ROOT / "benchmarks" / "results"
    files.write_json(folder / "triage.json", {"python": platform.python_version(), "sets": results})


def measure(path: Path) -> dict:
    """Confusion counts, shares and speed on one set."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    seconds = float("inf")
    for _ in range(ROUNDS):  # the quickest of several: other programs only ever slow one down
        started = time.process_time()
        found = [triage.assess(row["question"]).level for row in rows]
        seconds = min(seconds, time.process_time() - started)
    counts = Counter(zip((row["label"] for row in rows), found, strict=True))
    total = {label: sum(counts[label, level] for level in LEVELS) for label in LEVELS}
    alarms = sum(counts[label, triage.EMERGENCY] for label in LEVELS[1:])
    result = {
        "questions": len(rows),
        "confusion": {label: {level: counts[label, level] for level in LEVELS} for label in LEVELS},
        "recall": round(counts[triage.EMERGENCY, triage.EMERGENCY] / total[triage.EMERGENCY], 4),
        "false_alarms": round(alarms / (total[triage.URGENT] + total[triage.ROUTINE]), 4),
        # Emergencies that are not even sent to a doctor today, and the patients for today that are told so.
        "unnoticed": round(counts[triage.EMERGENCY, triage.ROUTINE] / total[triage.EMERGENCY], 4),
        "recall_of_urgent": round(1 - counts[triage.URGENT, triage.ROUTINE] / total[triage.URGENT], 4),
        "questions_per_second": round(len(rows) / seconds),
    }
    print(path.name, json.dumps(result, ensure_ascii=False))
    for row, level in zip(rows, found, strict=True):
        if path.stem.startswith("dev") and (row["label"] == triage.EMERGENCY) != (level == triage.EMERGENCY):
            print(f"  {row['label']} → {level}: {row['question']}")
    return result


if __name__ == "__main__":
    main()
