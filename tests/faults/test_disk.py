"""A full disk at each write, a folder that can't be written, and a clock that jumps."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, run_script
from tally import kept_counts, tally  # noqa: F401
from test_kills import SIZES, digest, heavy_imports, rows_of, write_rows  # noqa: F401


@pytest.fixture
def mounted(tmp_path):
    """Mounts a tmpfs of a size under tmp_path/disk; skips where that isn't allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True, check=False)


def remount_read_only(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)


def assert_explained(done) -> None:
    assert done.status == 2 and "Traceback" not in done.err and done.last_line.startswith("错误："), done.err


@pytest.mark.parametrize("size", ["8k", "32k", "64k", "96k", "120k"])
def test_disk_full_during_data_preparation_keeps_the_old_files(size, mounted, tmp_path, demo_rows):
    disk = mounted(f"size={size}")
    old = [{"instruction": "旧", "input": "旧问题", "output": "旧回答"}]
    write_rows(disk / "train.jsonl", old)
    source = write_rows(tmp_path / "mine.jsonl", demo_rows)
    done = run_script("data.py", "--source", source, "--output-dir", disk, cwd=tmp_path)
    assert_explained(done)
    assert rows_of(disk / "train.jsonl") == old and [path.name for path in disk.iterdir()] == ["train.jsonl"]
    tally("磁盘满：data.py", exact=True)


@pytest.mark.parametrize("size", ["4k", "24k", "6m", "14m", "26m", "33m"])
def test_disk_full_during_training_keeps_what_was_finished(size, mounted, small_data, demo_model):
    from qwenmed import checkpoints

    disk = mounted(f"size={size}")
    done = run_script("train.py", "--model", demo_model, "--output-dir", disk / "run", *SIZES, cwd=small_data)
    assert_explained(done)
    for checkpoint in checkpoints.finished_checkpoints(disk / "run"):
        checkpoints.check_weights(checkpoint)
        checkpoints.check_states(checkpoint)
    tally("磁盘满：train.py", exact=True)


@pytest.mark.parametrize("size", ["4k", "8k"])
def test_disk_full_during_a_batch_says_so_and_leaves_no_half_file_under_the_name(size, mounted, tmp_path, trained):
    disk = mounted(f"size={size}")
    questions = write_rows(tmp_path / "q.jsonl", [{"question": "头痛" * 200}] * 20)
    done = run_script(
        "medical_assistant.py", "-b", questions, "-o", disk / "a.jsonl", "-c", trained.run, "-m", "4", cwd=tmp_path
    )
    assert_explained(done)
    assert not (disk / "a.jsonl").exists()
    tally("磁盘满：批量", exact=True)


@pytest.mark.parametrize("script", ["data.py", "train.py", "medical_assistant.py", "download_model.py"])
def test_read_only_folder_is_a_one_line_error_before_the_work(script, mounted, tmp_path, small_data, demo_model):
    disk = mounted("size=8m")
    remount_read_only(disk)
    arguments = {
        "data.py": ("--source", small_data / "train.jsonl", "--output-dir", disk),
        "train.py": ("--model", demo_model, "--output-dir", disk / "run", *SIZES),
        "medical_assistant.py": ("-b", ROOT / "sample_questions.json", "-o", disk / "a.jsonl", "--triage"),
        "download_model.py": ("demo", "--local-dir", disk / "demo"),
    }[script]
    assert_explained(run_script(script, *arguments, cwd=small_data))
    tally("只读目录", exact=True)


def test_clock_that_jumps_back_changes_neither_the_training_nor_what_is_latest(small_data, demo_model):
    """A training under a clock that runs backwards ends bit for bit as any; resumed from files of the future."""
    jumping = small_data / "site"
    jumping.mkdir()
    (jumping / "sitecustomize.py").write_text(
        "import time\n_real, _calls = time.time, [0]\n"
        "def _jumping():\n    _calls[0] += 1\n    return _real() - 3600.0 * (_calls[0] % 7)\n"
        "time.time = _jumping\n",
        encoding="utf-8",
    )
    env = {"PYTHONPATH": str(jumping), "OMP_NUM_THREADS": "1"}
    results = []
    for name, more in (("plain", {"OMP_NUM_THREADS": "1"}), ("jumping", env)):
        arguments = ("--model", demo_model, "--output-dir", f"output/{name}", *SIZES)
        done = run_script("train.py", *arguments, cwd=small_data, env=more)
        assert done.status == 0, done.err
        results.append(digest(small_data / "output" / name / "checkpoint-8", "model.safetensors"))
    assert results[0] == results[1]
    tally("时钟跳变", exact=True)

    run = small_data / "output" / "plain"
    for folder in run.glob("checkpoint-*"):  # the older one claims to come from the future
        os.utime(folder, (4e9, 4e9) if folder.name != "checkpoint-8" else (0, 0))
    shutil.rmtree(small_data / "output" / "jumping")
    from qwenmed import checkpoints

    assert checkpoints.run_checkpoint(run, "latest").name == "checkpoint-8"
    tally("时钟跳变", exact=True)
