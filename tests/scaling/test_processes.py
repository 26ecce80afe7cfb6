"""Two processes train as one would: the same losses at the same global batch, one checkpoint, one voice."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, log_history, run_script
from safetensors.torch import load_file

from qwenmed import checkpoints, processes

ARGUMENTS = """--max-steps 4 --eval-steps 2 --logging-steps 1 --sample-tokens 0 --swanlab disabled --best-by last
    --save-total-limit 3 --learning-rate 1e-3 --gradient-accumulation-steps 2 --device cpu""".split()  # noqa: SIM905


def launch(config, script, *arguments, cwd):
    """`accelerate launch` with one of the project's configurations, on two CPU processes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs" / config)]
    command += [str(ROOT / "tests" / "scaling" / "on_cpu.py"), str(ROOT / script), *map(str, arguments)]
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    return subprocess.run(command, cwd=cwd, env=os.environ | variables, capture_output=True, text=True, timeout=300)


def losses(folder):
    return [entry[kind] for entry in log_history(folder) for kind in ("loss", "eval_loss") if kind in entry]


@pytest.mark.parametrize(
    ("config", "script"),
    [("ddp.yaml", "train.py"), ("fsdp2.yaml", "train.py"), ("fsdp2.yaml", "train_lora.py")],
)
def test_two_processes_train_as_one(small_data, demo_model, tmp_path, config, script):
    both = ["--model", str(demo_model), *ARGUMENTS]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_script(script, *both, "--batch-size", "2", "--output-dir", str(one), cwd=small_data).status == 0
    done = launch(config, script, *both, "--batch-size", "1", "--output-dir", two, cwd=small_data)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(two) == pytest.approx(losses(one), rel=1e-4) and len(losses(two)) == 6
    assert done.stderr.count("最佳检查点：") == done.stderr.count("2 步之后：") == 1
    if config == "fsdp2.yaml":  # the model really was in parts
        assert (two / "checkpoint-4" / "pytorch_model_fsdp.bin").is_file()
    found = checkpoints.describe(two / "checkpoint-4", demo_model if script == "train_lora.py" else None)
    checkpoints.load(found, torch.float32)
    file = "model.safetensors" if script == "train.py" else "adapter_model.safetensors"
    first, second = (load_file(run / "checkpoint-4" / file) for run in (one, two))
    assert first.keys() == second.keys()
    # AdamW turns rounding differences of tiny gradients into whole steps of the learning rate.
    assert all((first[name] - second[name]).abs().max() < 4 * 1e-3 for name in first)


def test_sharded_run_is_resumed(small_data, demo_model, tmp_path):
    import shutil

    both = ["--model", str(demo_model), *ARGUMENTS, "--batch-size", "1", "--output-dir", tmp_path / "run"]
    assert launch("fsdp2.yaml", "train.py", *both, cwd=small_data).returncode == 0
    whole = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    again = launch("fsdp2.yaml", "train.py", *both, "--resume", cwd=small_data)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "checkpoint-2 继续训练" in again.stderr and losses(tmp_path / "run") == whole


def test_error_of_all_is_said_with_the_process_it_comes_from(small_data, demo_model):
    done = launch("ddp.yaml", "train.py", "--model", demo_model, "--learning-rate", "-1", cwd=small_data)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "错误：" in line]
    assert said and all("--learning-rate" in line for line in said)
    assert sum(line.startswith("错误：") for line in said) <= 1


def test_process_alone_needs_nobody(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    assert processes.is_first() and processes.count() == processes.shards() == 1
    assert processes.agree("x") == "x"
    with processes.first_goes_first():
        pass
