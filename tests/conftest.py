"""What the tests share: running the real scripts, a demo model, and a run trained on eight records."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

REAL_SAMPLE = ROOT.parent / "shared" / "data" / "medical_r1_sample.jsonl"

# What a model needs to learn eight records by heart in about 20 seconds on 2 cores.
QUICK = ["--max-steps", "110", "--batch-size", "4", "--eval-steps", "0.5", "--logging-steps", "10"]


@dataclass
class Finished:
    """A script that has ended."""

    status: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""


def run_script(
    script: str, *arguments: object, cwd: Path, stdin: str | bytes = "", timeout: int = 240, env=None
) -> Finished:
    """Run a top-level script as a user would, offline."""
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=cwd,
        input=stdin if isinstance(stdin, bytes) else stdin.encode(),
        capture_output=True,
        timeout=timeout,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})},
        check=False,
    )
    return Finished(done.returncode, done.stdout.decode(), done.stderr.decode())


def assert_user_error(done: Finished, *words: str) -> None:
    """One clear line on stderr that names everything in `words`, status 2, no traceback."""
    assert done.status == 2, (done.status, done.err)
    assert "Traceback" not in done.err
    assert done.last_line.startswith("错误："), done.err
    for word in words:
        assert word in done.last_line, (word, done.last_line)


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory) -> Path:
    """The untrained demo model."""
    from prompts import MEDICAL_PROMPTS
    from qwenmed.demo import build_demo_model

    return build_demo_model(tmp_path_factory.mktemp("models") / "demo", MEDICAL_PROMPTS.values())


@pytest.fixture(scope="session")
def tokenizer(demo_model):
    """The demo model's tokenizer."""
    from qwenmed.checkpoints import load_tokenizer

    return load_tokenizer(demo_model)


@pytest.fixture(scope="session")
def demo_rows() -> list[dict]:
    """The bundled records."""
    from qwenmed.demo import demo_records

    return [record.row for record in demo_records()]


@dataclass
class Workplace:
    """A folder in which the demo model was trained on a few records."""

    folder: Path
    rows: list[dict]
    log: str

    @property
    def run(self) -> Path:
        return self.folder / "output" / "demo-full"


@pytest.fixture(scope="session")
def trained(tmp_path_factory, demo_rows) -> Workplace:
    """`data.py` and `train.py` on ten records, as subprocesses; eight of them are learnt by heart.

    The test processes share one: whoever comes first makes it.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder, log = shared / "trained", shared / "trained.log"
    with FileLock(shared / "trained.lock"):
        if not log.exists():
            log.write_text(train_on_ten_records(folder, demo_rows[::10]), encoding="utf-8")
    kept = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    return Workplace(folder, kept, log.read_text(encoding="utf-8"))


def train_on_ten_records(folder: Path, rows: list[dict]) -> str:
    """Run the two stages in `folder`; returns what the training printed."""
    folder.mkdir()
    source = folder / "mine.jsonl"
    source.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    data = run_script("data.py", "--source", source, "--val-ratio", "0.2", cwd=folder)
    assert data.status == 0, data.err
    train = run_script("train.py", "--model", "demo", *QUICK, cwd=folder)
    assert train.status == 0, train.err
    return train.err


@pytest.fixture
def small_data(tmp_path, demo_rows):
    """A folder with train.jsonl and val.jsonl of a few records."""
    for name, rows in (("train", demo_rows[:8]), ("val", demo_rows[8:10])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return tmp_path
