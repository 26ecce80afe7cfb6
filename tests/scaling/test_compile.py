"""`--compile` changes no loss, and compiles for one length only. A cold start takes a minute."""

import shutil

import pytest
from conftest import log_history, run_script

ARGUMENTS = """--packing on --max-length 256 --max-steps 3 --eval-steps 3 --logging-steps 1 --sample-tokens 0
    --swanlab disabled --gradient-accumulation-steps 1 --learning-rate 1e-3""".split()  # noqa: SIM905


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
def test_compiled_training_has_the_losses_of_the_plain_one(small_data, demo_model, tmp_path):
    found = {}
    environment = {"TORCH_LOGS": "recompiles", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        arguments = ["--model", demo_model, "--output-dir", tmp_path / name, *ARGUMENTS, *more]
        done = run_script("train.py", *arguments, cwd=small_data, timeout=600, env=environment)
        assert done.status == 0, done.err[-3000:]
        found[name] = [entry["loss"] for entry in log_history(tmp_path / name) if "loss" in entry]
    assert len(found["plain"]) == 3 and found["compiled"] == pytest.approx(found["plain"], rel=1e-5)
    # The forward pass in training and in evaluation; a length of its own for each row would be compiled for each time.
    assert done.err.count("Recompiling function forward") <= 2, done.err[-5000:]
