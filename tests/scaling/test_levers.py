"""The memory levers that need torchao: 8-bit states in the real scripts, stochastic rounding, exact resume.

torchao lies in .cache/quant (`make test-scaling` puts it there). Its optimizers compile themselves; here torch.compile
is switched off, which changes no number and saves minutes.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, log_history
from safetensors.torch import load_file

QUANT = ROOT / ".cache" / "quant"
pytestmark = pytest.mark.skipif(not (QUANT / "torchao").is_dir(), reason="torchao is not there: make test-scaling")
ENVIRONMENT = {"PYTHONPATH": str(QUANT), "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ARGUMENTS = """--max-steps 4 --eval-steps 2 --logging-steps 1 --sample-tokens 0 --swanlab disabled --best-by last
    --save-total-limit 3 --learning-rate 1e-3 --batch-size 2 --gradient-accumulation-steps 1""".split()  # noqa: SIM905


def run(*command, cwd):
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=os.environ | ENVIRONMENT, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.parametrize("script", ["train.py", "train_lora.py"])
def test_training_with_8_bit_states_resumes_bit_for_bit(small_data, demo_model, tmp_path, script):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    both = [ROOT / script, "--model", demo_model, *ARGUMENTS, "--optimizer", "adamw_8bit"]
    done = run(*both, "--output-dir", whole, cwd=small_data)
    assert "8 位 AdamW" in done.stderr
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoint-4")
    run(*both, "--output-dir", broken, "--resume", cwd=small_data)
    found = [[entry["loss"] for entry in log_history(each) if "loss" in entry] for each in (whole, broken)]
    assert found[0] == found[1] and found[0][-1] < found[0][0]
    file = "model.safetensors" if script == "train.py" else "adapter_model.safetensors"
    first, second = (load_file(each / "checkpoint-4" / file) for each in (whole, broken))
    assert all(torch.equal(first[name], second[name]) for name in first)
    card = json.loads((whole / "checkpoint-4" / "checkpoint.json").read_text(encoding="utf-8"))
    assert card["plan"] == {"weights": "fp32", "optimizer": "adamw_8bit", "in_backward": False, "autocast": None}


def test_bf16_weights_learn_at_a_small_rate_only_with_stochastic_rounding(demo_model, tokenizer, tmp_path):
    """The smallest plan of a GPU – bf16 weights, 8-bit states, updates within the backward pass – on a CPU."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}]
import json
from pathlib import Path
import torch
from qwenmed import chat, checkpoints, configuration, planner, training
from qwenmed.records import Record
from qwenmed.settings import TrainSettings
settings = TrainSettings(swanlab="disabled", learning_rate=1e-5, max_steps=4, batch_size=2, warmup_steps=0,
                         lr_scheduler="constant", eval_steps=99, sft={{"eval_strategy": "no", "save_strategy": "no"}})
cpu = planner.Card("cpu", 2**40, False, "")
tokenizer = checkpoints.load_tokenizer(Path({str(tmp_path / "tokenizer")!r}))
rows = [chat.training_row(Record(f"第{{i}}个问题？", "想一想。" * 9, f"第{{i}}个回答。"), "系统") for i in range(8)]
found = {{}}
for name, rounding in (("stochastic", "true"), ("nearest", "false")):
    plan = planner.Plan(False, "bf16", None, "adamw_8bit", True, 0, 64, {{}})
    config = configuration.sft_config(settings, Path({str(tmp_path / "run")!r}), plan, cpu)
    config.optim_args = f"bf16_stochastic_round={{rounding}}"
    model = checkpoints.load_base(Path({str(demo_model)!r}), plan.dtype)
    before = {{name: weight.detach().clone() for name, weight in model.named_parameters()}}
    trainer = training.build_trainer(model, tokenizer, training.Rows(rows, rows[:1], [], {{}}), config, {{}}, in_backward=True)
    trainer.train()
    assert all(weight.dtype == torch.bfloat16 and weight.grad is None for weight in model.parameters())
    moved = sum((weight != before[name]).sum().item() for name, weight in model.named_parameters() if weight.dim() > 1)
    found[name] = moved / sum(weight.numel() for weight in model.parameters() if weight.dim() > 1)
    states = [state for state in trainer.optimizer.optimizer.state.values() if hasattr(state["exp_avg"], "codes")]
    found["quantised"] = sum(state["exp_avg"].numel() for state in states) / sum(map(torch.numel, before.values()))
print(json.dumps(found))
"""
    found = json.loads(run("-c", code, cwd=tmp_path).stdout.splitlines()[-1])
    assert found["stochastic"] > 2 * found["nearest"] and found["stochastic"] > 0.05, found
    assert found["quantised"] > 0.99
