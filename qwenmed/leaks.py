"""Which evaluation rows a model has seen in training: fingerprints in run.json, and the chain of runs behind a model.

A row counts as seen if its question or its answer stands in the training data, letters and digits alone compared:
another comma or a full-width form does not hide it, a rewording does. A model's own runs are known, what its base
model was pretrained on is not.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenmed import files, tracking
from qwenmed.near_duplicates import plain
from qwenmed.records import Record

# Shorter answers ("是的。") stand in many records.
SHORTEST_ANSWER = 20


@dataclass
class TrainedOn:
    """What is known of a model's training data.

    Attributes:
        texts: fingerprints of the questions and answers.
        runs: the run.json files that they stand in.
        unknown: runs that keep no fingerprints.
    """

    texts: set[str] = field(default_factory=set)
    runs: list[Path] = field(default_factory=list)
    unknown: list[Path] = field(default_factory=list)


def text_fingerprint(text: str) -> str:
    """16 hex digits for a text, of its letters and digits alone."""
    return hashlib.blake2b(plain(text).encode(), digest_size=8).hexdigest()


def record_fingerprints(record: Record) -> set[str]:
    """The fingerprints by which a record is known again."""
    texts = [record.question, *([record.answer] if len(record.answer) >= SHORTEST_ANSWER else [])]
    return {text_fingerprint(text) for text in texts}


def fingerprints(records: Iterable[Record]) -> list[str]:
    """The fingerprints of a training set, sorted."""
    return sorted(set().union(*(record_fingerprints(record) for record in records)))


def trained_on(paths: Iterable[Path]) -> TrainedOn:
    """What a model was trained on here, in its own run and in the runs of the checkpoints that it began from.

    Args:
        paths: the model: its folder, an adapter's base beside it, or a GGUF file.
    """
    found, waiting, seen = TrainedOn(), list(paths), set()
    while waiting:
        path = waiting.pop()
        if path.resolve() in seen:
            continue
        seen.add(path.resolve())
        run_file, run = run_of(path)
        if run_file is None:
            continue
        texts = _nested(run, "data", "train", "texts")
        (found.runs if isinstance(texts, list) else found.unknown).append(run_file)
        found.texts.update(text for text in texts or () if isinstance(text, str))
        if isinstance(base := run.get("base_model"), str):
            # As the run saw it from its own working folder, which may be another than ours.
            waiting += [each for each in (Path(base), path.parent.parent.parent / base) if each.is_dir()]
    return found


def run_of(path: Path) -> tuple[Path | None, dict[str, Any]]:
    """The run.json of the run that made a checkpoint, and what it holds; (None, {}) for a model from elsewhere."""
    for file in (path / tracking.RUN_FILE, path.parent / tracking.RUN_FILE):
        if file.is_file():
            run = files.read_json(file)
            return file, run if isinstance(run, dict) else {}
    return None, {}


def _nested(value: Any, *names: str) -> Any:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value
