"""Counts what each fault did, and keeps the counts in benchmarks/results/faults.json.

`python tests/faults/tally.py` prints them as a table.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "faults.json"
COUNTS: dict[str, dict[str, int]] = defaultdict(lambda: {"tried": 0, "hit": 0, "exact": 0, "explained": 0, "lost": 0})


def tally(name: str, *, hit: bool = True, exact: bool = False, explained: bool = False) -> None:
    """Count one point: it was tried, it hit a living process, and afterwards all was exact, or explained, or lost."""
    row = COUNTS[name]
    row["tried"] += 1
    row["hit"] += hit
    row["exact"] += exact
    row["explained"] += explained and not exact
    row["lost"] += not (exact or explained)


@pytest.fixture(scope="session", autouse=True)
def kept_counts() -> Iterator[None]:
    """Write the counts when the tests end; those of faults that were not tried this time stay."""
    yield
    old = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    text = json.dumps({**old, **COUNTS}, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
    RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    print(
        "| 故障 · fault | 次数 tried | 命中 hit | 完全一致 exact | 说明了怎么办 explained | 丢失 lost |\n|---|---|---|---|---|---|"
    )
    for fault, row in sorted(json.loads(RESULTS.read_text(encoding="utf-8")).items()):
        print(
            "|", fault, "|", " | ".join(str(row[name]) for name in ("tried", "hit", "exact", "explained", "lost")), "|"
        )
