"""A run goes on exactly where it was, or says why it does not; memory that runs out and losses that are no number."""

import json
import math
import signal

import pytest
import torch
from conftest import assert_user_error, log_history, run_script
from safetensors.torch import load_file

import train
from qwenmed import callbacks, checkpoints, head, resuming
from qwenmed.settings import TrainSettings

SHORT = [
    "--eval-steps",
    "2",
    "--logging-steps",
    "1",
    "--sample-tokens",
    "0",
    "--swanlab",
    "disabled",
    "--best-by",
    "last",
]
ARGUMENTS = [
    *SHORT,
    "--save-total-limit",
    "3",
    "--max-steps",
    "4",
    "--batch-size",
    "2",
    "--gradient-accumulation-steps",
    "1",
    "--learning-rate",
    "1e-3",
]


def run_json(folder):
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def losses(folder):
    return {entry["step"]: entry["loss"] for entry in log_history(folder) if "loss" in entry}


def weights(checkpoint):
    file = "adapter_model.safetensors" if (checkpoint / "adapter_model.safetensors").is_file() else "model.safetensors"
    return load_file(checkpoint / file)


@pytest.fixture
def train_here(small_data, demo_model, tmp_path, monkeypatch):
    """Runs train.py's main in this process."""
    monkeypatch.chdir(small_data)

    def go(*more):
        arguments = ["train.py", "--model", str(demo_model), "--output-dir", str(tmp_path / "run"), *ARGUMENTS, *more]
        monkeypatch.setattr("sys.argv", arguments)
        train.main()
        return tmp_path / "run"

    return go


@pytest.mark.parametrize(
    ("script", "more"),
    [
        ("train.py", []),
        ("train_lora.py", []),
        ("train.py", ["--packing", "on"]),
        ("train_lora.py", ["--packing", "on"]),
    ],
)
def test_half_a_run_and_the_other_half_are_bit_for_bit_a_whole_one(small_data, demo_model, tmp_path, script, more):
    """The newest checkpoint is thrown away, as a kill would: the run goes on from the one before."""
    import shutil

    both = ["--model", str(demo_model), *ARGUMENTS, *more]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_script(script, *both, "--output-dir", str(whole), cwd=small_data).status == 0
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoint-4")
    done = run_script(script, *both, "--output-dir", str(broken), "--resume", cwd=small_data)
    assert done.status == 0 and "checkpoint-2" in done.err
    assert losses(whole) == losses(broken) and len(losses(whole)) == 4
    first, second = weights(whole / "checkpoint-4"), weights(broken / "checkpoint-4")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_resuming_with_other_data_or_settings_is_refused_with_the_differences(
    trained, small_data, demo_model, tmp_path
):
    import shutil

    run = shutil.copytree(trained.run, tmp_path / "run")
    card = checkpoints.read_card(checkpoints.finished_checkpoints(run)[-1])
    settings = card["settings"]
    data = tmp_path / "data"
    shutil.copytree(small_data, data, ignore=shutil.ignore_patterns("output", "models"))
    lines = (data / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (data / "train.jsonl").write_text("\n".join(lines[1:]) + "\n", encoding="utf-8")
    again = [
        "--model", str(demo_model), "--output-dir", str(run), "--resume", "--swanlab", "disabled", "--sample-tokens", "0",
        "--max-steps", str(settings["max_steps"]), "--batch-size", str(settings["batch_size"]), "--learning-rate", "0.5",
    ]  # fmt: skip
    refused = run_script("train.py", *again, cwd=data)
    assert_user_error(refused, "--force-resume")
    assert "训练数据的内容变了" in refused.last_line
    assert f"--learning-rate {settings['learning_rate']} → 0.5" in refused.last_line
    forced = run_script("train.py", *again, "--force-resume", cwd=data)
    assert forced.status == 0 and "仍然继续" in forced.err


def test_only_what_changes_the_training_counts_as_a_difference():
    card = {"method": "full", "settings": {"seed": 1, "max_steps": 5, "device": "cpu"}, "data": {}}
    moved = card | {"settings": {"seed": 1, "max_steps": 5, "device": "cuda", "output_dir": "elsewhere"}}
    assert not list(resuming.differences(card, moved))
    other = card | {"method": "lora", "settings": {"seed": 2, "max_steps": 5, "device": "cpu"}}
    assert list(resuming.differences(card, other)) == ["训练方法 full → lora", "--seed 1 → 2"]


def test_every_setting_is_either_free_or_counts():
    assert {field for field in TrainSettings.__dataclass_fields__} >= resuming.FREE


def test_run_that_runs_out_of_memory_steps_down_and_goes_on_exactly(train_here, monkeypatch, capsys, tmp_path):
    whole = losses(train_here())
    (tmp_path / "run").rename(tmp_path / "whole")
    step = callbacks.MedicalSFTTrainer.training_step

    def greedy(self, *args, **kwargs):
        """Takes too much in the third step, unless some layers are computed again."""
        if self.state.global_step == 2 and self.args.activation_checkpointing_kwargs is None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.16 GiB.")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(callbacks.MedicalSFTTrainer, "training_step", greedy)
    capsys.readouterr()
    before = signal.getsignal(signal.SIGTERM)
    run = train_here()
    assert signal.getsignal(signal.SIGTERM) == before
    said = capsys.readouterr().err
    assert "显存不足，改用下一个计划" in said and "重算一层的激活" in said and "checkpoint-2 继续" in said
    assert losses(run) == pytest.approx(whole, rel=1e-6) and run_json(run)["status"] == "finished"


def test_memory_that_is_never_enough_ends_with_one_line(train_here, monkeypatch):
    def greedy(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(callbacks.MedicalSFTTrainer, "training_step", greedy)
    with pytest.raises(train.cli.UserError, match="最省的计划也放不下"):
        train_here()


def test_loss_that_is_no_number_stops_the_run_and_touches_no_checkpoint(train_here, monkeypatch, tmp_path):
    whole = head.completion_loss

    def broken(hidden, weight, labels):
        """The loss of the fourth step is no number."""
        calls.append(hidden)
        return whole(hidden, weight, labels) * (math.nan if len(calls) > 3 and hidden.requires_grad else 1)

    calls: list = []
    monkeypatch.setattr(head, "completion_loss", broken)
    with pytest.raises(train.cli.UserError, match=r"第 \d 步的损失是 NaN 或无穷大（.*train\.jsonl:\d"):
        train_here()
    run = tmp_path / "run"
    assert [each.name for each in checkpoints.finished_checkpoints(run)] == ["checkpoint-2"]
    assert all(tensor.isfinite().all() for tensor in weights(run / "checkpoint-2").values())


def test_learning_rate_that_ruins_the_weights_saves_none_of_them(small_data, demo_model, tmp_path):
    both = ["--model", str(demo_model), "--output-dir", str(tmp_path / "run"), *ARGUMENTS]
    ruin = [*both, "--learning-rate", "1e38", "--lr-scheduler", "constant", "--warmup-steps", "0", "--eval-steps", "1"]
    done = run_script("train.py", *ruin, cwd=small_data)
    assert_user_error(done, "NaN 或无穷大", "--learning-rate")
    assert not checkpoints.finished_checkpoints(tmp_path / "run")
