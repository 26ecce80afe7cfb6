"""Exports of a model of Qwen3-0.6B's true shape, with the real tokenizer: what is written, said, and answered."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, needs_llama, run_script
from true_shape import build_true_shape

from qwenmed.triage import DISCLAIMER

pytest.importorskip("gguf", reason="gguf is not installed: pip install -e '.[gguf]'")
# Random weights never end a reply, and a token takes a tenth of a second.
SHORT = ["--self-test-tokens", "8"]
# An environment of its own means a process of its own, which is not held to one thread.
ALL_CORES = {"OMP_NUM_THREADS": str(os.cpu_count())}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_true_shape(tmp_path_factory.mktemp("true") / "Qwen3-0.6B")


def told(folder):
    return json.loads((folder / "export.json").read_text(encoding="utf-8"))["self_test"]


def test_merged_folder_is_the_same_weights(model, tmp_path):
    from safetensors import safe_open

    done = run_script(
        "export.py",
        "-c",
        model,
        "--to",
        "merged",
        "-o",
        "out",
        "--no-self-test",
        cwd=tmp_path,
        timeout=900,
        env=ALL_CORES,
    )
    assert done.status == 0, done.err
    with (
        safe_open(model / "model.safetensors", framework="pt") as before,
        safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as after,
    ):
        assert set(before.keys()) == set(after.keys()) and len(before.keys()) == 310
        assert all(before.get_tensor(name).equal(after.get_tensor(name)) for name in before.keys())  # noqa: SIM118


@needs_llama
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_gguf_passes_its_self_test_and_answers(model, tmp_path, kind):
    done = run_script(
        "export.py",
        "-c",
        model,
        "--to",
        "gguf",
        "--quant",
        kind,
        "-o",
        "out",
        *SHORT,
        cwd=tmp_path,
        timeout=900,
        env=ALL_CORES,
    )
    assert done.status == 0, done.err + done.out
    found = told(tmp_path / "out")
    assert found["passed"] and found["same_prompts"] == 8 and found["tokens"] == 64
    answered = run_script(
        "medical_assistant.py", "-c", "out", "-q", "头痛三天了怎么办？", "-m", "8", cwd=tmp_path, env=ALL_CORES
    )
    assert answered.status == 0 and DISCLAIMER in answered.out, answered.err


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_gguf_is_written_in_little_memory(model, tmp_path):
    """At most 1.3 times the largest tensor and 500 MB, the libraries included."""
    code = (
        "import sys; from pathlib import Path; from qwenmed.gguf_file import write_gguf\n"
        "write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), 'q8_0')\n"
        "status = Path('/proc/self/status').read_text(encoding='utf-8')\n"
        "print(next(line.split()[1] for line in status.splitlines() if line.startswith('VmHWM')))"
    )
    command = [sys.executable, "-c", code, model, tmp_path / "a.gguf"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    largest = 151_936 * 1024 * 2
    assert int(done.stdout) * 1024 <= 1.3 * largest + 500e6
