"""The lock file says what is installed, and SECURITY.md's way of converting a pickle works."""

import re
import shutil
import subprocess
import sys

from conftest import ROOT

from qwenmed import checkpoints


def pins(text):
    found = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s\\]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def test_lock_holds_every_pin_and_a_hash_of_every_package():
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    wanted, locked = pins((ROOT / "requirements.txt").read_text(encoding="utf-8")), pins(lock)
    assert len(locked) > len(wanted) and wanted.items() <= locked.items()
    entries = [entry for entry in re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE) if not entry.startswith("#")]
    assert len(entries) == len(locked)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry) for entry in entries)
    assert "://" not in "".join(entries), "a package from a URL of its own"


def convert(folder):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "SECURITY.md").read_text(encoding="utf-8"), re.DOTALL)
    return subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, check=False)


def test_security_page_converts_a_pickled_model_and_no_bomb(demo_model, tmp_path):
    import torch
    from test_hostile_files import plant

    model = shutil.copytree(demo_model, tmp_path / "model")
    before = checkpoints.load_base(model, torch.float32)
    torch.save(before.state_dict(), model / "pytorch_model.bin")  # tied weights stand in it twice
    (model / "model.safetensors").unlink()
    plant(model / "adapter_model.bin", tmp_path / "marker")
    assert convert(model).returncode != 0 and not (tmp_path / "marker").exists()
    after = checkpoints.load_base(model, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
