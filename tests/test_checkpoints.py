"""LoRA on a trained model, and finding, recognising and refusing checkpoints."""

import json
import shutil

import pytest
from conftest import assert_user_error, run_script

from qwenmed import checkpoints
from qwenmed.errors import UserError


@pytest.fixture(scope="session")
def adapter(trained, tmp_path_factory):
    """A folder with a base model, a LoRA run on top of it, and the run's paths as the user would have them."""
    folder = tmp_path_factory.mktemp("lora")
    shutil.copytree(checkpoints.run_checkpoint(trained.run, "best"), folder / "base")
    for name in ("train.jsonl", "val.jsonl"):
        shutil.copy(trained.folder / name, folder / name)
    done = run_script(
        "train_lora.py", "--model", "base", "--max-steps", "4", "--batch-size", "4", "--eval-steps", "2",
        "--sample-tokens", "0", "--swanlab", "disabled", cwd=folder,
    )  # fmt: skip
    assert done.status == 0, done.err
    return folder


def test_lora_run_answers_like_its_base_and_is_recognised(adapter, trained):
    row = trained.rows[0]
    done = run_script("inference.py", row["question"], "-c", "best", cwd=adapter)
    assert done.status == 0, done.err
    assert "LoRA 适配器" in done.err and row["answer"] in done.out
    assert "演示模型" in done.out  # the base's notice holds for its adapters


def test_adapter_whose_base_has_moved_says_so_and_takes_the_new_place(adapter, tmp_path):
    run = shutil.copytree(adapter / "output" / "base-lora", tmp_path / "run")
    checkpoint = checkpoints.run_checkpoint(run, "latest")
    with pytest.raises(UserError, match="--base-model"):
        checkpoints.find(str(checkpoint))
    found = checkpoints.find(str(checkpoint), base_model=adapter / "base")
    assert found.kind == "LoRA 适配器" and found.base == adapter / "base"


def test_adapter_of_another_model_is_refused_on_loading(adapter, tmp_path):
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    other = shutil.copytree(adapter / "base", tmp_path / "other")
    config = Qwen3Config.from_pretrained(other)
    config.hidden_size, config.intermediate_size = 64, 128
    Qwen3ForCausalLM(config).save_pretrained(other)
    checkpoint = checkpoints.run_checkpoint(adapter / "output" / "base-lora", "latest")
    found = checkpoints.find(str(checkpoint), base_model=other)
    with pytest.raises(UserError, match="--base-model"):
        checkpoints.load(found, torch.float32)


def test_merged_adapter_computes_what_the_unmerged_one_does(adapter):
    import torch
    from peft import PeftModel

    found = checkpoints.find(str(adapter / "output" / "base-lora"), base_model=adapter / "base")
    merged, tokenizer = checkpoints.load(found, torch.float32)
    base = checkpoints.load_base(adapter / "base", torch.float32)
    unmerged = PeftModel.from_pretrained(base, str(found.path)).eval()
    ids = torch.tensor([tokenizer("头痛三天了，要紧吗？")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, unmerged(ids).logits, rtol=1e-4, atol=1e-4)


def _copy(trained, folder):
    return shutil.copytree(checkpoints.run_checkpoint(trained.run, "best"), folder / "checkpoint-9")


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_checkpoint_that_lacks_a_file_is_refused_by_name(trained, tmp_path, missing):
    checkpoint = _copy(trained, tmp_path)
    (checkpoint / missing).unlink()
    with pytest.raises(UserError, match=missing.split(".")[0]):
        checkpoints.find(str(checkpoint))


def test_cut_off_weights_are_refused_before_loading(trained, tmp_path):
    checkpoint = _copy(trained, tmp_path)
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match="不完整"):
        checkpoints.find(str(checkpoint))


def test_pickled_adapter_is_refused(adapter, tmp_path):
    run = shutil.copytree(adapter / "output" / "base-lora", tmp_path / "run")
    checkpoint = checkpoints.run_checkpoint(run, "latest")
    (checkpoint / "adapter_model.safetensors").rename(checkpoint / "adapter_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        checkpoints.find(str(checkpoint), base_model=adapter / "base")


def _fake_run(folder, *checkpoints_of):
    for step, losses in checkpoints_of:
        path = folder / f"checkpoint-{step}"
        path.mkdir(parents=True)
        history = [{"step": s, "eval_loss": loss} for s, loss in losses]
        (path / "trainer_state.json").write_text(json.dumps({"log_history": history}), encoding="utf-8")
    return folder


def test_best_has_the_lowest_validation_loss_and_latest_the_highest_step(tmp_path):
    run = _fake_run(tmp_path, (9, [(9, 2.0)]), (20, [(9, 2.0), (20, 1.0)]), (100, [(9, 2.0), (20, 1.0), (100, 3.0)]))
    assert checkpoints.run_checkpoint(run, "best").name == "checkpoint-20"
    assert checkpoints.run_checkpoint(run, "latest").name == "checkpoint-100"


def test_unfinished_checkpoint_is_never_chosen(tmp_path):
    run = _fake_run(tmp_path, (5, [(5, 2.0)]), (9, [(9, 1.0)]))
    (run / "checkpoint-9" / "trainer_state.json").write_text('{"log_hist', encoding="utf-8")
    (run / "checkpoint-12").mkdir()
    assert checkpoints.run_checkpoint(run, "latest").name == "checkpoint-5"


def test_best_and_latest_come_from_the_run_that_saved_last(tmp_path):
    import os

    for number, name in enumerate(("old", "new")):
        run = _fake_run(tmp_path / name, (1, [(1, 1.0 + number)]))
        os.utime(run / "checkpoint-1" / "trainer_state.json", (1000 + number, 1000 + number))
    assert checkpoints.newest_run_checkpoint(tmp_path, "best").parent.name == "new"


def test_scripts_name_the_remedy_when_nothing_was_trained(tmp_path):
    assert_user_error(run_script("inference.py", "头痛", "-c", "latest", cwd=tmp_path), "latest", "train.py")
    assert_user_error(run_script("inference.py", "", "-c", "latest", cwd=tmp_path), "问题是空的")
