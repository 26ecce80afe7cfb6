"""doctor.py: a healthy patient is told so, and each planted fault is found, with what to do about it."""

import importlib.metadata
import json
import os
import shutil
import stat
import sys
from types import SimpleNamespace

import pytest
from conftest import REAL_SAMPLE, run_script

from prompts import GENERAL_PROMPT, MEDICAL_PROMPTS
from qwenmed import checkup, checkup_machine, checkup_training
from qwenmed.settings import TrainSettings

QUICK = ("--offline", "--no-steps", "--json")


@pytest.fixture
def patient(tmp_path, demo_model, small_data):
    """A folder with a whole model and data, which a test then spoils."""
    shutil.copytree(demo_model, small_data / "model")
    return small_data


def examined(folder, *arguments, status=None, **more):
    done = run_script("doctor.py", "--model", "model", *arguments, cwd=folder, **more)
    assert "Traceback" not in done.err, done.err
    report = json.loads(done.out)
    assert done.status == (0 if report["ok"] else 1) and (status is None or done.status == status), report
    return report


def marks(report, mark):
    return {each["what"]: each for each in report["findings"] if each["mark"] == mark}


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def change_template(folder, old, new):
    path = folder / "model" / "chat_template.jinja"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def found_in(findings, mark):
    return [each for each in findings if each.mark == mark]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_healthy_patient_is_told_so_after_two_real_steps(patient, method):
    before = sorted(path for path in patient.rglob("*") if path.is_file())
    report = examined(patient, "--method", method, "--offline", "--json", status=0)
    good = marks(report, "ok")
    assert {
        "模型",
        "分词器",
        "停止符",
        "对话模板",
        "数据",
        "长度",
        "掩码",
        "训练器的掩码",
        "两步训练",
        "SwanLab",
    } <= good.keys()
    assert "→" in good["两步训练"]["found"] and "最后是 <|im_end|>" in good["训练器的掩码"]["found"]
    assert sorted(path for path in patient.rglob("*") if path.is_file()) == before


def test_table_and_sample_are_for_people(patient):
    done = run_script("doctor.py", "--model", "model", "--offline", "--no-steps", cwd=patient)
    assert done.status == 0, done.err
    assert "⟦<think>" in done.out and "<|im_end|>\n⟧" in done.out and "<|im_start|>assistant\n⟦" in done.out
    assert "✓ 模型" in done.out and done.out.rstrip().endswith("✗ 0")
    assert all(line.startswith("检查：") for line in done.err.strip().splitlines() if "swanlab" not in line)


def test_sample_is_coloured_on_a_terminal():
    from doctor import DIM, TRAINED, paint, show

    sample = checkup_training.Sample("a:1", [("提示", False), ("答\x1b[31m", True)], ["答", "\x1b[31m"])
    text = show(sample, colours=True)
    assert f"{DIM}提示" in text and f"{TRAINED}答" in text and "\x1b[31m" not in text
    assert paint("✗ 坏\n  → 修") == "\x1b[31m✗\x1b[0m 坏\n  → 修"


def test_tokens_that_share_a_character_are_shown_as_one(tokenizer):
    ids = tokenizer("嗳气😷。", add_special_tokens=False)["input_ids"]
    pieces = list(checkup_training._pieces(tokenizer, ids))
    assert "".join(pieces) == "嗳气😷。" and "\ufffd" not in "".join(pieces) and len(pieces) < len(ids)


# The planted faults: the machine


def test_fault_01_package_is_missing_and_02_has_another_version(tmp_path):
    there = importlib.metadata.version("numpy")
    file = tmp_path / "requirements.txt"
    file.write_text(f"no-such-package==1.0\nnumpy==0.1\ndatasketch=={importlib.metadata.version('datasketch')}\n")
    findings = list(checkup_machine.environment(file))
    (bad,), mind = found_in(findings, checkup.BAD), found_in(findings, checkup.MIND)
    assert "no-such-package" in bad.found and "requirements.txt" in bad.fix
    assert any(f"numpy {there}（应为 0.1）" in each.found for each in mind)


def fake_driver(folder, monkeypatch):
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 535.54.03\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for nvidia-smi is a shell script")
@pytest.mark.parametrize(("built", "words"), [(None, "CPU 版 torch"), ("13.0", "驱动是 535.54.03")])
def test_fault_03_cpu_torch_beside_a_gpu_and_04_driver_too_old(tmp_path, monkeypatch, built, words):
    import torch

    fake_driver(tmp_path, monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (finding,) = checkup_machine.gpu()
    assert finding.mark == checkup.BAD and words in finding.found
    assert_replaces_torch(finding.fix)


def assert_replaces_torch(fix):
    """pip counts an installed 2.13.0+cpu as 2.13.0 and leaves it where it is."""
    pinned = checkup_machine.pins(checkup_machine.REQUIREMENTS)["torch"]
    assert fix.index("pip uninstall -y torch") < fix.index(f"pip install torch=={pinned} --index-url https://")


def fake_gpu(monkeypatch, capability=(9, 0), arches=("sm_80", "sm_90"), free=70, total=80):
    import torch

    properties = SimpleNamespace(name="NVIDIA X", major=capability[0], minor=capability[1])
    for name, value in {
        "is_available": True, "get_device_properties": properties, "get_device_capability": capability,
        "mem_get_info": (free * 2**30, total * 2**30), "get_arch_list": list(arches),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


@pytest.mark.parametrize(("capability", "tag"), [((12, 0), "cu130"), ((6, 1), "cu126")])
def test_fault_05_torch_not_built_for_the_card(monkeypatch, capability, tag):
    fake_gpu(monkeypatch, capability=capability)
    (bad,) = found_in(checkup_machine.gpu(), checkup.BAD)
    assert "sm_{}{}".format(*capability) in bad.found and f"/whl/{tag} " in bad.fix
    assert_replaces_torch(bad.fix)


def test_gpu_of_an_older_kind_or_in_use_is_said_and_a_good_one_is_good(monkeypatch):
    fake_gpu(monkeypatch)
    assert {each.mark for each in checkup_machine.gpu()} == {checkup.GOOD}
    fake_gpu(monkeypatch, capability=(7, 5), arches=("sm_75",), free=5, total=16)
    mind = found_in(checkup_machine.gpu(), checkup.MIND)
    assert [each.what for each in mind] == ["bf16", "显存"] and "nvidia-smi" in mind[1].fix


def test_fault_06_disk_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    (bad,) = found_in(checkup_machine.room(tmp_path), checkup.BAD)
    assert bad.what == "磁盘" and "1.0 GB" in bad.found and "--output-dir" in bad.fix


def test_fault_07_no_hub_and_no_local_model(patient):
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "MODELSCOPE_ENDPOINT": "http://127.0.0.1:9"}
    done = run_script("doctor.py", "--model", "org/other", "--no-steps", "--json", cwd=patient, env=environment)
    bad = marks(json.loads(done.out), "error")
    assert done.status == 1 and "两个来源都连不上" in bad["模型来源"]["found"] and "--model" in bad["模型来源"]["fix"]


def test_hub_that_answers_is_timed(tmp_path, monkeypatch):
    from hub_server import HubServer

    (tmp_path / "a.txt").write_text("x")
    server = HubServer(tmp_path)
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(name, server.url)
    findings = list(checkup_machine.hubs(needed=True))
    server.close()
    assert [each.mark for each in findings] == [checkup.GOOD] * 2 and "秒内回应" in findings[0].found


def test_fault_08_variable_that_crashes_swanlab():
    (finding,) = checkup_machine.swanlab({"SWANLAB_PROJECT": "x"})
    assert finding.mark == checkup.BAD and "SWANLAB_PROJ_NAME" in finding.fix


# The planted faults: model, tokenizer, template


def test_fault_09_weights_are_missing(patient):
    (patient / "model" / "model.safetensors").unlink()
    assert "不完整" in marks(examined(patient, *QUICK), "error")["模型"]["found"]


def test_model_of_the_hub_that_is_here_in_part_is_examined_and_not_fetched(patient):
    (patient / "models").mkdir()
    (patient / "model").rename(patient / "models" / "other")
    (patient / "models" / "other" / "model.safetensors").unlink()
    done = run_script("doctor.py", "--model", "org/other", *QUICK, cwd=patient)
    found = marks(json.loads(done.out), "error")["模型"]["found"]
    assert done.status == 1 and "不完整" in found and "下载" not in done.err


def test_fault_10_weights_are_cut(patient):
    path = patient / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "模型" in marks(examined(patient, *QUICK), "error")


def test_fault_11_adapter_given_as_the_model(patient):
    (patient / "model" / "adapter_config.json").write_text("{}")
    assert "LoRA 适配器" in marks(examined(patient, *QUICK), "error")["模型"]["found"]


def test_fault_12_padding_is_the_end_of_the_turn(patient):
    change_json(patient / "model" / "tokenizer_config.json", pad_token="<|im_end|>")
    bad = marks(examined(patient, *QUICK), "error")
    assert "停不下来" in bad["填充符"]["found"] and "<|endoftext|>" in bad["填充符"]["fix"]


def test_fault_13_template_without_the_end_of_the_turn(patient):
    change_template(patient, "{{- '<|im_end|>\\n' }}", "{{- '\\n' }}")
    assert "对话模板" in marks(examined(patient, *QUICK), "error")


def test_fault_14_template_that_drops_the_thinking(patient):
    change_template(patient, "reasoning_content.strip('\\n')", "''")
    assert "对话模板" in marks(examined(patient, *QUICK), "error")


def test_fault_15_no_template(patient):
    (patient / "model" / "chat_template.jinja").unlink()
    assert "没有对话模板" in marks(examined(patient, *QUICK), "error")["分词器"]["found"]


def test_fault_16_training_text_differs_from_what_inference_renders(patient):
    change_template(patient, "{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n\\n' }}")
    assert "对话模板" in marks(examined(patient, *QUICK), "error")


def test_fault_17_tokenizer_of_another_model(patient, demo_model):
    from safetensors.torch import load_file, save_file

    path = patient / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:-100].clone()
    save_file(weights, path, metadata={"format": "pt"})
    assert "词表" in marks(examined(patient, *QUICK), "error")


def test_fault_18_tokenizer_that_loses_text(patient):
    path = patient / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    model, lost = tokenizer["model"], "ð"  # the first byte of emoji and of rare characters
    model["vocab"] = {token: number for token, number in model["vocab"].items() if lost not in token}
    model["merges"] = [pair for pair in model["merges"] if lost not in "".join(pair)]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    assert "文字变了" in marks(examined(patient, *QUICK), "error")["分词器"]["found"]


def test_fault_19_generation_config_without_the_end_of_the_turn(patient):
    change_json(patient / "model" / "generation_config.json", eos_token_id=0)
    mind = marks(examined(patient, *QUICK, status=0), "warning")
    assert "<|im_end|>" in mind["停止符"]["found"] and mind["停止符"]["fix"]


def test_fault_20_weights_that_are_not_numbers(patient):
    from safetensors.torch import load_file, save_file

    path = patient / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    bad = marks(examined(patient, "--offline", "--json", "--method", "full"), "error")
    assert "不是有限的数" in bad["两步训练"]["found"]


def test_fault_21_random_weights_under_a_pretrained_model_s_name(patient):
    config = json.loads((patient / "model" / "config.json").read_text(encoding="utf-8"))
    del config["notice"]
    (patient / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    mind = marks(examined(patient, "--offline", "--json", status=0), "warning")
    assert "随机的权重" in mind["两步训练"]["found"]


# The planted faults: data


def test_fault_22_no_data_yet(patient):
    (patient / "train.jsonl").unlink()
    assert "python data.py" in marks(examined(patient, *QUICK), "error")["数据"]["fix"]


def test_fault_23_broken_row(patient):
    with (patient / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"question": "只有问题"}\n')
    bad = marks(examined(patient, *QUICK), "error")["数据"]
    assert "train.jsonl:9" in bad["found"] and "data.py --source" in bad["fix"]


def test_fault_24_validation_questions_in_the_training_data(patient):
    shutil.copyfile(patient / "train.jsonl", patient / "val.jsonl")
    mind = marks(examined(patient, *QUICK, status=0), "warning")
    assert "8 个验证问题" in mind["数据泄漏"]["found"]


def test_fault_25_no_sample_fits(patient):
    assert "--max-length" in marks(examined(patient, *QUICK, "--max-length", "16"), "error")["长度"]["fix"]


def test_fault_26_half_prepared_data(patient):
    (patient / ".unfinished").touch()
    assert "打断" in marks(examined(patient, *QUICK), "error")["数据"]["found"]


def test_fault_27_more_memory_than_there_is(patient, monkeypatch):
    from qwenmed import hardware

    settings = TrainSettings(model=str(patient / "model"))
    for free, mark in ((10**12, checkup.GOOD), (10**6, checkup.BAD)):
        monkeypatch.setattr(hardware, "free_memory", lambda _, free=free: free)
        doctor = checkup_training.TrainingCheckup(settings, GENERAL_PROMPT, MEDICAL_PROMPTS)
        list(doctor.model())
        (finding,) = doctor.memory()
        assert finding.mark == mark and "计算值" in finding.found
    assert "关掉别的程序" in finding.fix


# The mask


def row_of(tokenizer):
    from qwenmed import chat
    from qwenmed.records import Record

    row = chat.training_row(Record("问？", "想", "答。"), "系统")
    return row, *chat.render_sample(tokenizer, row)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda ids, labels: (ids, [-100] * len(ids)), "没有一个 token"),
        (lambda ids, labels: (ids[:-2], labels[:-2]), "不是 <|im_end|>"),
        (lambda ids, labels: ([ids[1], *ids[1:]], labels), "提示与推理"),
        (lambda ids, labels: (ids, [*labels[:-4], *[-100] * 4]), "不是 <|im_end|>"),
    ],
)
def test_mask_that_is_empty_endless_or_over_another_prompt_fails(tokenizer, spoil, words):
    row, ids, labels = row_of(tokenizer)
    (good,) = checkup_training.mask_findings(tokenizer, ids, labels, row)
    assert good.mark == checkup.GOOD
    (bad,) = checkup_training.mask_findings(tokenizer, *spoil(ids, labels), row)
    assert bad.mark == checkup.BAD and words in bad.found


# The frame


def test_check_that_raises_is_a_finding_and_the_others_go_on():
    def broken():
        yield checkup.Finding(checkup.GOOD, "一", "好")
        raise RuntimeError("out of luck\nand more")

    def refused():
        raise checkup.UserError("坏了", "这里", "修")
        yield

    findings = list(checkup.examine([("甲", broken), ("乙", refused)], lambda name: None))
    assert [each.mark for each in findings] == [checkup.GOOD, checkup.BAD, checkup.BAD]
    assert "out of luck" in findings[1].found and findings[2].fix == "修" and "这里" in findings[2].found
    text = checkup.as_text(findings, 60)
    assert "→ 修" in text and text.endswith("✓ 1，! 0，✗ 2") and all(len(line) <= 60 for line in text.splitlines())


@pytest.mark.skipif(not REAL_SAMPLE.is_file(), reason=f"the real sample {REAL_SAMPLE} is not here")
def test_real_records_are_examined(patient):
    report = examined(
        patient, *QUICK, "--train-file", str(REAL_SAMPLE), "--val-file", "val.jsonl", "--max-length", "4096", status=0
    )
    assert "训练 120 条" in marks(report, "ok")["数据"]["found"]
