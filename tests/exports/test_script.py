"""export.py as a process: what it leaves, who reads it, and what an interruption leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, assert_user_error, needs_gguf, needs_llama, run_script

from prompts import MEDICAL_PROMPTS
from qwenmed import chat, checkpoints, merged_model


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    """A folder in which the trained model was exported as merged weights, with the self-test."""
    folder = tmp_path_factory.mktemp("exported")
    done = run_script("export.py", "-c", trained.run, "--to", "merged", cwd=folder)
    assert done.status == 0, done.err
    assert "✗" not in done.out and "贪心文字：8/8" in done.out and "python medical_assistant.py -c" in done.out
    return folder / "exports" / "demo-full-merged"


def test_exported_folder_answers_as_the_checkpoint(exported, trained, tmp_path):
    row = trained.rows[0]
    for script, arguments in (
        ("inference.py", [row["question"]]),
        ("medical_assistant.py", ["-q", row["question"], "-s", row["scenario"]]),
    ):
        done = run_script(script, *arguments, "-c", exported, cwd=tmp_path)
        assert done.status == 0 and row["answer"] in done.out, (done.out, done.err)
        assert "演示模型" in done.out


def test_exported_folder_says_what_it_is_and_what_it_was_trained_on(exported, trained):
    from qwenmed import leaks

    card = (exported / "README.md").read_text(encoding="utf-8")
    for words in (
        "120",
        "12356",
        "不是医疗器械",
        "演示模型",
        "full fine-tuning",
        "困惑度 · 参考回答",
        "贪心文字：8/8",
        "许可",
    ):
        assert words in card, words
    assert "None" not in card and "Undefined" not in card
    told = json.loads((exported / "export.json").read_text(encoding="utf-8"))
    assert told["to"] == "merged" and told["type"] == "fp32" and told["self_test"]["passed"] is True
    assert told["self_test"]["questions"] == 8 and told["self_test"]["ended_there"] > 0
    assert (
        leaks.trained_on([exported]).texts == leaks.trained_on([checkpoints.find(str(trained.run)).path]).texts != set()
    )


def test_eval_knows_the_rows_that_an_exported_model_has_seen(exported, trained, tmp_path):
    done = run_script(
        "eval.py", "-c", exported, "--data", trained.folder / "train.jsonl", "--parts", "perplexity", cwd=tmp_path
    )
    assert_user_error(done, "都在这些模型的训练数据里")


def test_existing_folder_is_kept_unless_told_and_only_an_export_is_replaced(exported, trained, tmp_path):
    before = (exported / "export.json").read_bytes()
    done = run_script("export.py", "-c", trained.run, "--to", "merged", cwd=exported.parent.parent)
    assert_user_error(done, "demo-full-merged", "--force")
    assert (exported / "export.json").read_bytes() == before
    (mine := tmp_path / "mine").mkdir()
    (mine / "thesis.txt").write_text("三年", encoding="utf-8")
    done = run_script("export.py", "-c", trained.run, "--to", "merged", "-o", mine, "--force", cwd=tmp_path)
    assert_user_error(done, "mine", "不会被替换")
    assert (mine / "thesis.txt").is_file()
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "old").touch()
    done = run_script(
        "export.py", "-c", trained.run, "--to", "vllm", "--dtype", "bf16", "-o", copy, "--force", "--no-self-test",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.status == 0, done.err
    assert not (copy / "old").exists() and merged_model.stored_dtype(copy) == "bf16"
    assert "vllm serve" in done.out and "--reasoning-parser qwen3" in done.out and "--engine openai" in done.out
    assert "没有做" in (copy / "README.md").read_text(encoding="utf-8")


def test_adapter_is_exported_with_its_base(adapter, best, tmp_path):
    done = run_script(
        "export.py", "-c", adapter, "--to", "merged", "--self-test-tokens", "24", "--dtype", "bf16", cwd=tmp_path
    )
    assert done.status == 0, done.err
    folder = tmp_path / "exports" / "adapter-merged"
    assert merged_model.stored_dtype(folder) == "bf16" and (folder / "config.json").is_file()
    assert not (folder / "adapter_config.json").exists()


@needs_gguf
@pytest.mark.parametrize("to", ["gguf", "ollama"])
def test_adapter_becomes_a_gguf(adapter, tmp_path, to):
    done = run_script(
        "export.py", "-c", adapter, "--to", to, "--quant", "F16", "-s", "emergency", "--self-test-tokens", "24",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.status == 0, done.err
    folder = tmp_path / "exports" / f"adapter-{to}-f16"
    names = {"README.md", "adapter-F16.gguf", "checkpoint.json", "export.json"} | (
        {"Modelfile"} if to == "ollama" else set()
    )
    assert {path.name for path in folder.iterdir()} == names
    if to == "ollama":
        text = (folder / "Modelfile").read_text(encoding="utf-8")
        assert "FROM ./adapter-F16.gguf" in text and MEDICAL_PROMPTS["emergency"] in text
        assert all(f'PARAMETER stop "{stop}"' in text for stop in chat.STOP_TOKENS)
        assert "ollama create adapter -f Modelfile" in done.out and "--base-url http://localhost:11434/v1" in done.out


@needs_gguf
def test_gguf_that_keeps_every_number_is_held_to_the_strictest_bound(trained, tmp_path):
    done = run_script(
        "export.py", "-c", trained.run, "--to", "gguf", "--quant", "f32", "--self-test-tokens", "16", cwd=tmp_path
    )
    assert done.status == 0, done.err
    assert (tmp_path / "exports" / "demo-full-gguf-f32" / "demo-full-F32.gguf").is_file()
    assert "贪心文字：8/8" in done.out and "要求 ≤ 0.0001" in done.out


@needs_llama
def test_exported_gguf_folder_answers_in_llama_cpp(trained, tmp_path):
    done = run_script("export.py", "-c", trained.run, "--to", "gguf", cwd=tmp_path)
    assert done.status == 0 and "llama.cpp" in done.out, done.err
    row = trained.rows[0]
    for script, arguments in (
        ("inference.py", [row["question"]]),
        ("medical_assistant.py", ["-q", row["question"], "-s", row["scenario"]]),
    ):
        done = run_script(script, *arguments, "-c", "exports/demo-full-gguf-q8_0", cwd=tmp_path)
        assert done.status == 0 and row["answer"] in done.out, (done.out, done.err)
        assert "演示模型" in done.out  # the notice travels in the file
    done = run_script(
        "eval.py", "-c", "exports/demo-full-gguf-q8_0", "--data", trained.folder / "train.jsonl", "--keep-leaked",
        "--limit", "1", "--parts", "answers", "-m", "300", cwd=tmp_path,
    )  # fmt: skip
    assert done.status == 0 and "训练过的 8 条" in done.err, done.err


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_interrupted_export_leaves_nothing_under_its_name(trained, tmp_path, number, status):
    command = [sys.executable, ROOT / "export.py", "-c", trained.run, "--to", "merged"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    partial = tmp_path / "exports" / ".demo-full-merged.partial"
    until = time.monotonic() + 120
    while not (partial / "model.safetensors").exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status and b"Traceback" not in err, err.decode()
    assert not (tmp_path / "exports" / "demo-full-merged").exists()
    assert partial.exists() == (number == signal.SIGKILL)
    if number == signal.SIGKILL:  # what is left of it does not hinder the next one
        again = run_script("export.py", "-c", trained.run, "--to", "merged", "--no-self-test", cwd=tmp_path)
        assert again.status == 0 and [path.name for path in (tmp_path / "exports").iterdir()] == ["demo-full-merged"]
