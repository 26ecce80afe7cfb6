"""kill -9 at 20 moments each of preparing data, training, answering a batch and saving a conversation.

After each: no good file lost, no half file under a good name, and the next run continues exactly.
"""

import hashlib
import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import ROOT
from forked import Child, delays
from script_server import preload
from tally import kept_counts, tally  # noqa: F401

from qwenmed import files
from qwenmed.errors import UserError

POINTS = 20
FORMATTED = ("train_format.jsonl", "val_format.jsonl")


@pytest.fixture(scope="session", autouse=True)
def heavy_imports():
    """Load what the scripts load once, before any child is forked; one thread, so that a fork is safe."""
    preload()


def digest(folder: Path, pattern: str) -> dict[str, str]:
    """name → SHA-256 of the files in a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob(pattern))}


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_kill_during_data_preparation_leaves_whole_files_that_belong_together(tmp_path, demo_rows, demo_model):
    """An old preparation lies there; the new one is killed; what lies there afterwards parses, and fits together."""
    old = write_rows(tmp_path / "old.jsonl", demo_rows[:40])
    new = write_rows(tmp_path / "new.jsonl", [dict(row, question=row["question"] + "？") for row in demo_rows])

    def prepare(folder: Path, source: Path) -> Child:
        return Child("data.py", "--source", source, "--tokenizer", demo_model, cwd=folder, log=tmp_path / "log")

    before, after = tmp_path / "before", tmp_path / "after"
    for folder, source in ((before, old), (after, new)):
        folder.mkdir()
        assert prepare(folder, source).wait() == 0
    wanted_old, wanted_new = digest(before, "*.jsonl"), digest(after, "*.jsonl")
    started = time.monotonic()
    assert prepare(after, new).wait() == 0
    took = time.monotonic() - started
    for point, delay in enumerate(delays(1, POINTS, 1)):
        work = shutil.copytree(before, tmp_path / f"work{point}")
        child = prepare(work, new)
        # A third of the kills come while the temporary files are being written and renamed.
        begun = (lambda w=work: any(w.glob(".*.tmp"))) if point % 3 == 0 else (lambda: True)
        killed = child.kill_when(begun, delay * 0.002 if point % 3 == 0 else delay * took)
        found = digest(work, "*.jsonl")
        assert set(found) == set(wanted_old)
        assert all(found[name] in (wanted_old[name], wanted_new[name]) for name in found), "a half file"
        mixed = found not in (wanted_old, wanted_new)
        if mixed:  # the training would say so
            with pytest.raises(UserError, match="两次准备"):
                files.check_belong_together(work / "train.jsonl")
        assert prepare(work, new).wait() == 0
        assert digest(work, "*.jsonl") == wanted_new
        files.check_belong_together(work / "train.jsonl")
        tally("data.py", hit=killed, exact=not mixed, explained=mixed)


SIZES = ["--max-steps", "8", "--eval-steps", "2", "--batch-size", "2", "--gradient-accumulation-steps", "1",
         "--logging-steps", "1", "--sample-tokens", "0", "--swanlab", "disabled", "--device", "cpu"]  # fmt: skip


@pytest.mark.parametrize("script", ["train.py", "train_lora.py"])
def test_kill_during_training_keeps_the_last_good_checkpoint_and_resume_ends_bit_for_bit(
    script, small_data, demo_model
):
    from qwenmed import checkpoints

    def train(name: str, *more: str) -> Child:
        arguments = ("--model", demo_model, "--output-dir", f"output/{name}", *SIZES, *more)
        return Child(script, *arguments, cwd=small_data, log=small_data / "log")

    assert train("whole").wait() == 0, (small_data / "log").read_text()
    weights = "model.safetensors" if script == "train.py" else "adapter_model.safetensors"
    whole = digest(small_data / "output" / "whole" / "checkpoint-8", weights)
    assert whole
    for point, delay in enumerate(delays(2, POINTS // 2, 1.5)):
        run = small_data / "output" / f"cut{point}"

        def saving(folder: Path = run) -> bool:
            return any(not (checkpoint / "trainer_state.json").exists() for checkpoint in folder.glob("checkpoint-*"))

        child = train(run.name)
        while_saving = point % 2 == 0
        killed = child.kill_when(
            saving if while_saving else lambda r=run: (r / "run.json").exists(), delay / 50 if while_saving else delay
        )
        for checkpoint in checkpoints.finished_checkpoints(run):
            checkpoints.check_weights(checkpoint)
        status = train(run.name, "--resume").wait()
        assert status == 0, (small_data / "log").read_text()
        exact = digest(run / "checkpoint-8", weights) == whole
        tally(script + ("（写检查点时）" if while_saving else ""), hit=killed, exact=exact)
        assert exact
        shutil.rmtree(run)


def test_kill_during_a_batch_keeps_the_answers_and_the_old_file(tmp_path, trained):
    questions = write_rows(
        tmp_path / "q.jsonl", [{"id": str(i), "question": row["question"]} for i, row in enumerate(trained.rows * 12)]
    )
    out, partial = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.partial"

    def ask(target=out, *more) -> Child:
        arguments = ("-b", questions, "-o", target, "-c", trained.run, "-m", "12", "--device", "cpu", *more)
        return Child("medical_assistant.py", *arguments, cwd=tmp_path, log=tmp_path / "log")

    assert ask().wait() == 0, (tmp_path / "log").read_text()
    timeless = [{**row, "seconds": 0} for row in rows_of(out)]
    old = out.read_bytes()
    for delay in delays(3, POINTS, 1.2):
        partial.unlink(missing_ok=True)
        child = ask()
        killed = child.kill_when(partial.exists, delay)
        assert not killed or out.read_bytes() == old, "the finished file of the run before was touched"
        lines = partial.read_text(encoding="utf-8").split("\n") if partial.exists() else []
        written = [json.loads(line) for line in lines[:-1]]  # the last line may be cut
        assert [row["id"] for row in written] == [row["id"] for row in timeless[: len(written)]]
        tally("medical_assistant.py -b", hit=killed, exact=True)
    assert ask().wait() == 2 and "--resume" in (tmp_path / "log").read_text(encoding="utf-8")
    assert out.read_bytes() == old

    again = tmp_path / "again.jsonl"
    kept = 0
    for delay in delays(5, 6, 1.5):  # one resumed run after another is killed
        child = ask(again, "--resume")
        killed = child.kill_when(again.with_name("again.jsonl.partial").exists, delay)
        parts = [again.with_name(f"again.jsonl.{each}") for each in ("partial", "answered")]
        found = {
            json.loads(line)["id"]
            for part in parts if part.exists()
            for line in part.read_text(encoding="utf-8").split("\n")[:-1]
        }  # fmt: skip
        assert not killed or len(found) >= kept
        kept = len(found)
        tally("medical_assistant.py -b --resume", hit=killed, exact=True)
        if not killed:
            break
    assert ask(again, "--resume").wait() == 0
    assert [{**row, "seconds": 0} for row in rows_of(again)] == timeless
    assert [path.name for path in tmp_path.glob("again.jsonl*")] == ["again.jsonl"]


def test_kill_during_saving_leaves_the_old_conversation_or_the_new_one(tmp_path):
    script = tmp_path / "save.py"
    path = tmp_path / "c" / "conversation.json"
    old, new = {"turns": ["旧" * 50]}, {"turns": ["新" * 400_000]}
    files.write_json(path, old, private=True)
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\nfrom qwenmed import files\n"
        f"while True: files.write_json(Path({str(path)!r}), {{'turns': ['新' * 400_000]}}, private=True)\n",
        encoding="utf-8",
    )
    for delay in delays(4, POINTS, 0.15):
        child = Child(str(script), cwd=tmp_path, log=tmp_path / "log")
        killed = child.kill_when(lambda: any(path.parent.glob(".*.tmp")), delay)
        assert json.loads(path.read_text(encoding="utf-8")) in (old, new)
        assert path.stat().st_mode & 0o777 == 0o600
        for rest in path.parent.glob(".*.tmp"):
            rest.unlink()
        tally("保存对话", hit=killed and child.status == -signal.SIGKILL, exact=True)
