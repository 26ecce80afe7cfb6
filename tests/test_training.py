"""What training does to data, weights and folders."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, assert_user_error, cpu_config, log_history, run_script

from qwenmed import chat, checkpoints, configuration, run, training
from qwenmed.engine import Generation
from qwenmed.errors import UserError
from qwenmed.records import Record
from qwenmed.settings import LoraSettings, TrainSettings

RECORDS = [Record(f"第{i}个问题？", "想一想" * (i + 1), f"第{i}个回答。") for i in range(6)]


@pytest.fixture
def trainer_of(demo_model, tokenizer, tmp_path):
    """Builds a trainer over RECORDS with given settings."""
    import torch

    def build(kind=TrainSettings, **options):
        settings = kind(model="demo", swanlab="disabled", **options)
        rows = [chat.training_row(record, "系统") for record in RECORDS]
        model = checkpoints.load_base(demo_model, torch.float32)
        config = cpu_config(settings, tmp_path / "run")
        adapter = configuration.lora_config(settings) if kind is LoraSettings else None
        found = training.Rows(rows, rows[:2], RECORDS[:2], {}, [f"rows:{n}" for n in range(1, 7)])
        card = {"method": "test"}
        return training.build_trainer(
            model, tokenizer, found, config, card, (), adapter, settings.optimizer_in_backward == "on"
        )

    return build


def test_trainer_sees_exactly_the_rendered_tokens_and_mask(trainer_of, tokenizer):
    trainer = trainer_of()
    for record, row in zip(RECORDS, trainer.train_dataset, strict=True):
        ids, labels = chat.render_sample(tokenizer, chat.training_row(record, "系统"))
        assert row["input_ids"] == ids and row["labels"] == labels


def test_batches_mask_their_padding(trainer_of, tokenizer):
    trainer = trainer_of()
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[5]])
    assert ((batch["labels"] == -100) | (batch["labels"] == batch["input_ids"])).all()
    lengths = [len(trainer.train_dataset[i]["input_ids"]) for i in (0, 5)]
    assert (batch["labels"][0, lengths[0] :] == -100).all()
    assert batch["labels"][1, lengths[1] - 2] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_weights_are_full_precision_without_a_gpu(trainer_of):
    import torch

    trainer = trainer_of()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert not trainer.args.bf16 and not trainer.args.fp16


def test_several_visible_gpus_do_not_stop_a_single_process(trainer_of, monkeypatch):
    from trl import SFTConfig

    prepare = SFTConfig.__post_init__

    def sees_two(config):
        prepare(config)
        config._n_gpu = 2

    monkeypatch.setattr(SFTConfig, "__post_init__", sees_two)
    trainer = trainer_of(batch_size=2)
    assert trainer.args.n_gpu == 1 and trainer.args.train_batch_size == 2


def test_lora_trains_the_seven_projections_and_nothing_else(trainer_of):
    trainer = trainer_of(LoraSettings)
    trained = {name.split(".")[-4] for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_adapters_of_a_quantised_model_are_fp32_where_nothing_computes_in_bf16(trainer_of, monkeypatch):
    import torch
    from transformers import Qwen3ForCausalLM

    monkeypatch.setattr(Qwen3ForCausalLM, "is_loaded_in_4bit", True, raising=False)
    adapters = [each for each in trainer_of(LoraSettings).model.parameters() if each.requires_grad]
    assert adapters and all(each.dtype == torch.float32 for each in adapters)


def test_fields_of_the_trainer_are_handed_through(trainer_of):
    trainer = trainer_of(sft={"optim": "adafactor", "adam_beta2": 0.9}, neftune_alpha=5)
    assert trainer.args.optim == "adafactor" and trainer.args.adam_beta2 == 0.9
    assert trainer.args.neftune_noise_alpha == 5
    lora = trainer_of(LoraSettings, rslora=True, dora=True).model.peft_config["default"]
    assert lora.use_rslora and lora.use_dora


@pytest.mark.parametrize(
    ("sft", "words"),
    [
        ({"optimiser": "adafactor"}, "optim"),
        ({"learning_rate": 1e-3}, "--learning-rate"),
        ({"optim": "no such thing"}, "no such thing"),
    ],
)
def test_field_that_can_not_be_handed_through_is_said_before_the_model_is_loaded(tmp_path, sft, words):
    with pytest.raises(UserError, match=words):
        cpu_config(TrainSettings(sft=sft), tmp_path)


def test_training_stops_when_the_validation_loss_does_not_fall_any_more(demo_model, small_data):
    done = run_script(
        "train.py", "--model", demo_model, "--learning-rate", "1e-12", "--max-steps", "40", "--eval-steps", "2",
        "--early-stopping", "1", "--best-by", "eval_loss", "--batch-size", "1", "--gradient-accumulation-steps", "1", "--sample-tokens", "0",
        "--swanlab", "disabled", "--output-dir", "run", cwd=small_data,
    )  # fmt: skip
    assert done.status == 0, done.err
    run = json.loads((small_data / "run" / "run.json").read_text(encoding="utf-8"))
    assert run["steps"] < 40 and run["status"] == "finished" and run["settings"]["early_stopping"] == 1


def test_record_of_which_one_sample_fits_counts_as_trained_on(tokenizer, tmp_path):
    from qwenmed import files, leaks, lengths

    record = Record("问题？", "想一想。", "回答。", scenario="s")
    prompts = ("短", "长" * 60)
    fits, too_long = lengths.SampleLengths(tokenizer).of_many([(record, prompt) for prompt in prompts])
    for name in ("train", "val"):
        row = {"question": record.question, "think": record.think, "answer": record.answer, "scenario": "s"}
        (tmp_path / f"{name}.jsonl").write_text(files.to_jsonl([row]), encoding="utf-8")
    settings = TrainSettings(
        train_file=str(tmp_path / "train.jsonl"),
        val_file=str(tmp_path / "val.jsonl"),
        max_length=(fits + too_long) // 2,
    )
    rows = training.load_rows(settings, tokenizer, prompts[0], {"s": prompts[1]})
    assert len(rows.train) == 1 and len(rows.val_records) == 1
    assert leaks.text_fingerprint(record.question) in rows.summary["train"]["texts"]


def test_packed_samples_do_not_see_each_other(trainer_of, demo_model):
    import torch

    trainer = trainer_of(packing="on", max_length=2048)
    model = checkpoints.load_base(demo_model, torch.float32).eval()
    packed = trainer.data_collator([trainer.train_dataset[0]])
    assert len(trainer.train_dataset) == 1  # six short samples in one row
    with torch.no_grad():
        together = model(input_ids=packed["input_ids"], position_ids=packed["position_ids"], use_cache=False).logits[0]
        starts = (packed["position_ids"][0] == 0).nonzero().flatten().tolist()[: len(RECORDS)]
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            alone = model(input_ids=packed["input_ids"][:, start:end], use_cache=False).logits[0]
            torch.testing.assert_close(together[start:end][: len(alone)], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packing", ["on", "off"])
def test_sample_with_a_loss_that_is_no_number_is_named(trainer_of, tokenizer, packing, monkeypatch):
    import torch

    trainer = trainer_of(packing=packing, max_length=2048, batch_size=1 if packing == "on" else 6, max_steps=1)
    guilty, _ = chat.render_sample(tokenizer, trainer.rows.train[3])
    forward = trainer.model.forward

    def broken(*args, input_ids, **kwargs):
        """What the fourth sample goes through gives NaN."""
        found = forward(*args, input_ids=input_ids, **kwargs)
        needle = torch.tensor(guilty)
        if any(
            (window == needle).all()
            for row in input_ids
            for window in row.unfold(0, min(len(guilty), len(row)), 1)
            if len(row) >= len(guilty)
        ):
            if isinstance(found, torch.Tensor):
                return found * math.nan
            found.logits = found.logits * math.nan
        return found

    monkeypatch.setattr(trainer.model, "forward", broken)
    with pytest.raises(UserError, match=r"第 1 步的损失是 NaN 或无穷大（rows:4）"):
        trainer.train()


def test_gradient_that_is_no_number_names_the_samples_of_its_step(trainer_of, monkeypatch):
    trainer = trainer_of(batch_size=2, gradient_accumulation_steps=1, max_steps=1)
    trainer.model.model.layers[0].mlp.up_proj.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(UserError, match=r"第 1 步的梯度是 NaN 或无穷大（rows:\d、rows:\d）"):
        trainer.train()


def test_updating_within_the_backward_pass_gives_the_same_weights_and_keeps_no_gradient(trainer_of):
    import torch

    def trained(**options):
        trainer = trainer_of(
            gradient_accumulation_steps=1, batch_size=2, max_steps=3, learning_rate=1e-3, max_grad_norm=1e9, **options
        )
        most = []
        if options:  # count the gradients that are there at one time
            for weight in trainer.model.parameters():
                weight.register_post_accumulate_grad_hook(
                    lambda _: most.append(sum(each.grad is not None for each in trainer.model.parameters()))
                )
        trainer.args.eval_strategy = "no"
        trainer.train()
        return dict(trainer.model.named_parameters()), max(most, default=0)

    (plain, _), (at_once, most) = trained(), trained(optimizer_in_backward="on")
    for name in plain:
        torch.testing.assert_close(at_once[name], plain[name], rtol=1e-5, atol=1e-7)
    assert most <= 1


def test_benchmark_counts_the_rows_that_a_step_really_takes(trainer_of, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from benchmarks.training import tokens_trained

    for in_backward, rows in (("off", 2 * 4), ("on", 2)):
        trainer = trainer_of(batch_size=2, gradient_accumulation_steps=4, optimizer_in_backward=in_backward)
        whole = sum(map(len, trainer.train_dataset["input_ids"]))
        assert tokens_trained(trainer, 3) == pytest.approx(whole / len(RECORDS) * rows * 3)


def test_finished_run_leaves_everything_it_promises(trained):
    run = json.loads((trained.run / "run.json").read_text(encoding="utf-8"))
    assert run["status"] == "finished" and run["settings"]["seed"] == 42
    assert len(run["data"]["train"]["sha256"]) == 64 and run["chat_template_sha256"] and run["versions"]["torch"]
    assert run["metrics"]["last_loss"] < 0.5 < run["metrics"]["first_loss"]
    assert (trained.run / "loss.png").read_bytes().startswith(b"\x89PNG")
    samples = [json.loads(line) for line in (trained.run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(samples) == 2 and all("generated_answer" in sample for sample in samples)  # two validation rows exist
    assert list((trained.run / "swanlog").glob("run-*"))


def test_number_of_checkpoints_is_bounded_and_each_describes_itself(trained):
    found = checkpoints.finished_checkpoints(trained.run)
    assert 1 <= len(found) <= 2
    card = json.loads((found[-1] / "checkpoint.json").read_text(encoding="utf-8"))
    assert card["method"] == "full" and card["settings"]["model"] == "demo"
    assert not (found[-1] / "README.md").exists()


def test_stop_tokens_are_written_with_the_checkpoint(trained, tokenizer):
    config = json.loads((checkpoints.finished_checkpoints(trained.run)[-1] / "generation_config.json").read_text())
    ends = {tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.convert_tokens_to_ids("<|endoftext|>")}
    assert set(config["eos_token_id"]) == ends


def test_swanlab_stores_no_question_no_command_line_and_no_hostname(trained):
    import socket

    stored = b"".join(file.read_bytes() for file in (trained.run / "swanlog").rglob("*") if file.is_file())
    assert stored
    for secret in (*(row["question"] for row in trained.rows), "--max-steps", socket.gethostname()):
        assert secret.encode() not in stored


def test_second_run_into_a_used_folder_is_refused(trained):
    done = run_script("train.py", "--model", "demo", cwd=trained.folder)
    assert_user_error(done, "output/demo-full", "--resume", "--output-dir")


COMMON = ["--batch-size", "2", "--logging-steps", "1", "--sample-tokens", "0", "--swanlab", "disabled"]


def test_ctrl_c_saves_a_checkpoint_and_resume_ends_where_an_unbroken_run_ends(small_data, demo_model):
    command = ["train.py", "--model", demo_model, "--max-steps", "24", "--eval-steps", "6", *COMMON]
    whole = run_script(*command, "--output-dir", "whole", cwd=small_data)
    assert whole.status == 0, whole.err

    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *map(str, command[1:]), "--output-dir", "cut"],
        cwd=small_data,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_for(small_data / "cut" / "checkpoint-6" / "trainer_state.json", process)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 130, error
    assert "Traceback" not in error and "--resume" in error

    done = run_script(*command, "--output-dir", "cut", "--resume", cwd=small_data)
    assert done.status == 0, done.err
    assert _losses(small_data / "cut") == _losses(small_data / "whole")


def test_terminate_signal_saves_and_exits_143(small_data, demo_model):
    arguments = ["--model", demo_model, "--max-steps", "500", "--eval-steps", "2", *COMMON, "--output-dir", "run"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *map(str, arguments)],
        cwd=small_data,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_for(small_data / "run" / "checkpoint-2" / "trainer_state.json", process)
    process.terminate()
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 143, error
    assert checkpoints.finished_checkpoints(small_data / "run")


def test_second_run_into_the_same_folder_is_refused_until_the_first_is_dead(small_data, demo_model):
    arguments = ["--model", demo_model, "--max-steps", "500", "--eval-steps", "400", *COMMON, "--output-dir", "run"]
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    first = subprocess.Popen(command, cwd=small_data, stderr=subprocess.DEVNULL)
    try:
        _wait_for(small_data / "run" / "run.json", first)
        assert_user_error(run_script("train.py", *arguments, cwd=small_data), "另一个训练", "run", "--output-dir")
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    # The lock of a process that was killed holds nobody.
    done = run_script("train.py", *arguments, "--max-steps", "1", cwd=small_data)
    assert done.status == 0, done.err


def _wait_for(file, process):
    until = time.monotonic() + 120
    while not file.exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)


def _losses(folder):
    return [(entry["step"], entry["loss"]) for entry in log_history(folder) if "loss" in entry]


def test_broken_tracker_does_not_stop_the_training(small_data, demo_model):
    (small_data / "run").mkdir()
    (small_data / "run" / "swanlog").write_text("a file where the tracker wants a folder", encoding="utf-8")
    options = ["--max-steps", "2", "--eval-steps", "2", *COMMON, "--swanlab", "offline", "--output-dir", "run"]
    done = run_script("train.py", "--model", demo_model, *options, cwd=small_data)
    assert done.status == 0, done.err
    assert "SwanLab 不可用" in done.err and checkpoints.finished_checkpoints(small_data / "run")


def test_full_disk_while_saving_keeps_the_finished_checkpoints(small_data, demo_model):
    disk = small_data / "disk"
    disk.mkdir()
    if os.name != "posix" or os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("needs root on Linux to mount a small file system")
    # Room for one checkpoint of the demo model (weights 11 MB, optimizer 21 MB), not for two.
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", disk], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        options = ["--max-steps", "4", "--eval-steps", "2", *COMMON, "--output-dir", disk / "run"]
        done = run_script("train.py", "--model", demo_model, *options, cwd=small_data)
        assert_user_error(done, "磁盘空间已满", "--resume")
        assert [path.name for path in (disk / "run").glob("checkpoint-*")] == ["checkpoint-2"]
        assert checkpoints.finished_checkpoints(disk / "run")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "no/such/dir/x"], ["no/such/dir/x", "模型目录不存在"]),
        (["--model", "train.jsonl"], ["train.jsonl", "模型应是目录"]),
        (["--train-file", "missing.jsonl"], ["missing.jsonl", "data.py"]),
        (["--learning-rate", "-1"], ["--learning-rate"]),
        (["--max-length", "abc"], ["--max-length"]),
        (["--config", "missing.yaml"], ["missing.yaml"]),
        (["--config", "bad.yaml"], ["epochs", "bad.yaml"]),
        (["--config", "unknown.yaml"], ["learning_rte", "unknown.yaml"]),
    ],
)
def test_bad_settings_give_one_line_before_any_work(small_data, arguments, words):
    (small_data / "bad.yaml").write_text("epochs: many\n", encoding="utf-8")
    (small_data / "unknown.yaml").write_text("learning_rte: 1\n", encoding="utf-8")
    done = run_script("train.py", *arguments, cwd=small_data)
    assert_user_error(done, *words)
    assert not (small_data / "output").exists()


def test_wrong_field_of_the_trainer_leaves_no_run_behind(small_data, demo_model):
    done = run_script("train.py", "--model", demo_model, "--sft", "optimiser=x", cwd=small_data)
    assert_user_error(done, "optimiser", "optim")
    assert not list((small_data / "output").rglob("run.json"))


def test_bad_row_in_training_file_is_named(small_data, demo_model):
    with (small_data / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"question": "只有问题"}\n')
    assert_user_error(run_script("train.py", "--model", demo_model, cwd=small_data), "train.jsonl:9", "answer")


def test_yaml_settings_apply_and_the_command_line_wins(small_data, demo_model):
    (small_data / "my.yaml").write_text("max_steps: 9\nlearning_rate: 1e-4\nbatch_size: 2\n", encoding="utf-8")
    done = run_script(
        "train.py", "--config", "my.yaml", "--model", demo_model, "--max-steps", "1", "--sample-tokens", "0",
        "--swanlab", "disabled", "--output-dir", "run", cwd=small_data,
    )  # fmt: skip
    assert done.status == 0, done.err
    settings = json.loads((small_data / "run" / "run.json").read_text(encoding="utf-8"))["settings"]
    assert (settings["max_steps"], settings["learning_rate"], settings["batch_size"]) == (1, 1e-4, 2)


def test_best_by_last_keeps_the_last_checkpoint_even_when_validation_gets_worse(trained):
    validation = [entry["eval_loss"] for entry in log_history(trained.run) if "eval_loss" in entry]
    assert validation[-1] > validation[0]  # it is learning by heart
    assert checkpoints.run_checkpoint(trained.run, "best").name == "checkpoint-110"


def test_a_sample_that_could_not_be_generated_spoils_no_finished_training(capsys):
    made = Generation(chat.Reply("想", "答"), "stop", 9, 2, 2, 0.1)
    answered = run._answered(RECORDS[:3], [made, UserError("内存或显存不足", None, "请减小 -m"), made])
    assert answered == [(RECORDS[0], made), (RECORDS[2], made)]
    assert "一条样本没有生成：内存或显存不足" in capsys.readouterr().err
    assert run._answered([], []) == []
