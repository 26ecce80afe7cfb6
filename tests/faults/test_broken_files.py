"""Every kind of file that the project reads, cut in half, emptied, and filled with garbage.

Each is either still usable, or refused in one line that says what and where; no traceback, nothing hangs.
"""

import json
import random
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from forked import Child
from tally import kept_counts, tally  # noqa: F401
from test_kills import SIZES, heavy_imports  # noqa: F401

DAMAGES = {
    "一半": lambda content: content[: len(content) // 2],
    "清空": lambda content: b"",
    "乱码": lambda content: random.Random(len(content)).randbytes(max(len(content), 64)),
}


def run(script: str, *arguments: object, cwd: Path) -> tuple[int, str]:
    """(exit status, everything it printed) of a script."""
    log = cwd.parent / f"{cwd.name}.log"
    child = Child(script, *arguments, cwd=cwd, log=log)
    return child.wait(), child.text()


def check(status: int, text: str, broken: Path, kind: str) -> None:
    """Usable all the same, or refused in one line; counted."""
    assert "Traceback" not in text, text
    assert status in (0, 2, 3), (status, text)
    if status == 2:
        last = text.strip().splitlines()[-1]
        assert last.startswith("错误：") and (broken.name in text or str(broken.parent.name) in last), text
    tally(f"损坏的文件：{kind}", exact=status == 0, explained=status != 0)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_broken_data_file(name, damage, tmp_path, demo_rows):
    import pandas

    frame = pandas.DataFrame([{key: row[key] for key in ("question", "think", "answer")} for row in demo_rows])
    path = tmp_path / name
    if name.endswith("parquet"):
        frame.to_parquet(path)
    elif name.endswith("csv"):
        frame.to_csv(path, index=False)
    else:
        frame.to_json(path, orient="records", lines=name.endswith("l"), force_ascii=False)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    work = tmp_path / "work"
    work.mkdir()
    status, text = run("data.py", "--source", path, cwd=work)
    check(status, text, path, "数据")
    assert status != 2 or not list(work.glob("*.jsonl"))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["q.json", "q.jsonl", "q.csv"])
def test_broken_batch_file(name, damage, tmp_path):
    content = {
        "q.json": json.dumps([{"question": f"问题{i}"} for i in range(30)], ensure_ascii=False),
        "q.jsonl": "".join(json.dumps({"question": f"问题{i}"}, ensure_ascii=False) + "\n" for i in range(30)),
        "q.csv": "question,scenario\n" + "头痛怎么办,diagnosis\n" * 30,
    }[name]
    work = tmp_path / "work"
    work.mkdir()
    path = work / name
    path.write_bytes(DAMAGES[damage](content.encode()))
    check(*run("medical_assistant.py", "--triage", "-b", name, cwd=work), path, "批量问题")


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_training_rows_and_settings(damage, small_data, demo_model):
    for name in ("train.jsonl", "val.jsonl", "settings.yaml"):
        work = shutil.copytree(small_data, small_data.parent / f"{small_data.name}-{name}")
        path = work / name
        if name.endswith("yaml"):
            shutil.copy(ROOT / "configs" / "full.yaml", path)
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
        config = ("--config", path) if name.endswith("yaml") else ()
        result = run("train.py", "--model", demo_model, *SIZES, *config, "--max-steps", "1", cwd=work)
        check(*result, path, "训练数据和设置")


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_checkpoint_file(damage, trained, tmp_path):
    from qwenmed import checkpoints

    good = checkpoints.run_checkpoint(trained.run, "best")
    for name in sorted(path.name for path in good.iterdir() if path.is_file()):
        work = tmp_path / "work"
        run_copy = shutil.copytree(trained.run, work / "output" / "demo-full")
        path = run_copy / good.name / name
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
        result = run("inference.py", "-c", run_copy / good.name, "-m", "2", "头痛怎么办", cwd=work)
        check(*result, path, "检查点")
        shutil.rmtree(work)


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_diary_of_a_run_loses_nothing(damage, trained, tmp_path):
    run_copy = shutil.copytree(trained.run, tmp_path / "work" / "output" / "demo-full")
    path = run_copy / "run.json"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    status, text = run("inference.py", "-c", "best", "-m", "2", "头痛怎么办", cwd=tmp_path / "work")
    assert status == 0, text
    check(status, text, path, "run.json")


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_state_of_a_checkpoint_is_refused_or_passed_over_on_resume(damage, small_data, demo_model):
    arguments = ("--model", demo_model, "--output-dir", "output/run", *SIZES)
    half = (*arguments[:4], *SIZES[2:], "--max-steps", "4")
    status, text = run("train.py", *half, cwd=small_data)
    assert status == 0, text
    newest = small_data / "output" / "run" / "checkpoint-4"
    kept = shutil.copytree(small_data / "output", small_data / "kept")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"):
        shutil.rmtree(small_data / "output")
        shutil.copytree(kept, small_data / "output")
        path = newest / name
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
        check(*run("train.py", *arguments, "--resume", cwd=small_data), path, "续训的状态")
