"""What the tests share: running the real scripts, a demo model, and a run trained on eight records."""

import atexit
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

REAL_SAMPLE = ROOT.parent / "shared" / "data" / "medical_r1_sample.jsonl"

# What a model needs to learn eight records by heart in about 20 seconds on 2 cores.
QUICK = ["--max-steps", "110", "--batch-size", "4", "--eval-steps", "0.5", "--logging-steps", "10"]

needs_gguf = pytest.mark.skipif(
    not importlib.util.find_spec("gguf"), reason="gguf is not installed: pip install -e '.[gguf]'"
)
needs_llama = pytest.mark.skipif(
    not importlib.util.find_spec("llama_cpp"),
    reason="llama-cpp-python is not installed: pip install -e '.[gguf]'",
)


@dataclass
class Finished:
    """A script that has ended."""

    status: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""


class ScriptServer:
    """The process that runs scripts in forked children; see script_server.py."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("script_server.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT,
        )  # fmt: skip

    def run(self, script: Path, arguments: list[str], cwd: Path, stdin: bytes, timeout: float) -> "Finished":
        """Run a script to its end."""
        with tempfile.TemporaryDirectory() as name:
            streams = {stream: Path(name) / stream for stream in ("stdin", "stdout", "stderr")}
            for path in streams.values():
                path.write_bytes(stdin if path.name == "stdin" else b"")
            request = {"script": str(script), "arguments": arguments, "cwd": str(cwd)}
            request |= {stream: str(path) for stream, path in streams.items()}
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            pid = json.loads(self._process.stdout.readline())["pid"]
            killer = threading.Timer(timeout, os.kill, (pid, signal.SIGKILL))
            killer.start()
            status = json.loads(self._process.stdout.readline())["status"]
            killer.cancel()
            assert status != -signal.SIGKILL, f"{script.name} did not end within {timeout} s"
            return Finished(status, *(streams[each].read_bytes().decode() for each in ("stdout", "stderr")))

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


@functools.cache
def script_server() -> ScriptServer:
    """The one of this test process."""
    server = ScriptServer()
    atexit.register(server.close)
    return server


def run_script(
    script: str,
    *arguments: object,
    cwd: Path,
    stdin: str | bytes = "",
    timeout: int = 240,
    env=None,
    server: ScriptServer | None = None,
) -> Finished:
    """Run a top-level script as a user would, offline; with an environment of its own, from the very start."""
    data = stdin if isinstance(stdin, bytes) else stdin.encode()
    if env is None and hasattr(os, "fork"):
        return (server or script_server()).run(ROOT / script, [str(each) for each in arguments], cwd, data, timeout)
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=cwd,
        input=data,
        capture_output=True,
        timeout=timeout,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})},
        check=False,
    )
    return Finished(done.returncode, done.stdout.decode(), done.stderr.decode())


def log_history(run: Path) -> list[dict]:
    """What a run has logged, as its run.json tells it."""
    return json.loads((run / "run.json").read_text(encoding="utf-8"))["log_history"]


def assert_user_error(done: Finished, *words: str) -> None:
    """One clear line on stderr that names everything in `words`, status 2, no traceback."""
    assert done.status == 2, (done.status, done.err)
    assert "Traceback" not in done.err
    assert done.last_line.startswith("错误："), done.err
    for word in words:
        assert word in done.last_line, (word, done.last_line)


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory) -> Path:
    """The untrained demo model."""
    from prompts import MEDICAL_PROMPTS
    from qwenmed.demo import build_demo_model

    return build_demo_model(tmp_path_factory.mktemp("models") / "demo", MEDICAL_PROMPTS.values())


@pytest.fixture(scope="session")
def tokenizer(demo_model):
    """The demo model's tokenizer."""
    from qwenmed.checkpoints import load_tokenizer

    return load_tokenizer(demo_model)


@pytest.fixture(scope="session")
def demo_rows() -> list[dict]:
    """The bundled records."""
    from qwenmed.demo import demo_records

    return [record.row for record in demo_records()]


@dataclass
class Workplace:
    """A folder in which the demo model was trained on a few records."""

    folder: Path
    rows: list[dict]
    log: str

    @property
    def run(self) -> Path:
        return self.folder / "output" / "demo-full"


# The long files, those that wait for the shared training last: neither of two workers is left alone with one at the end.
LONG_FILES = [
    "test_training", "test_download", "test_export", "test_engine_llama", "test_data", "test_redact",
    "test_engine_openai", "test_eval", "test_triage", "test_hostile", "test_assistant", "test_conversation",
    "test_privacy", "test_checkpoints", "test_engine", "test_hostile_files",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    """The long files first; with `--dist loadfile --no-loadscope-reorder` that is the order in which they begin."""
    place = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish(session):
    """Begin with the training that many tests wait for, beside the others that don't."""
    wanted = any("trained" in item.fixturenames for item in session.items)
    first = os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0"
    if wanted and first and not session.config.option.collectonly:
        threading.Thread(target=train_once, args=(shared_folder(session.config),), daemon=True).start()


def shared_folder(config) -> Path:
    """A folder of this test run that its processes share."""
    folder = config._tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def train_once(shared: Path) -> None:
    """Train in `shared` unless that has been done; the test processes wait for the one that does it."""
    from qwenmed.demo import demo_records

    with FileLock(shared / "trained.lock", thread_local=False):
        if not (shared / "trained.log").exists():
            rows = [record.row for record in demo_records()]
            log = train_on_ten_records(shared / "trained", rows[::10])
            (shared / "trained.log").write_text(log, encoding="utf-8")


@pytest.fixture(scope="session")
def trained(request) -> Workplace:
    """`data.py` and `train.py` on ten records, as processes; eight of them are learnt by heart."""
    shared = shared_folder(request.config)
    train_once(shared)
    kept = (shared / "trained" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    log = (shared / "trained.log").read_text(encoding="utf-8")
    return Workplace(shared / "trained", [json.loads(line) for line in kept], log)


def train_on_ten_records(folder: Path, rows: list[dict]) -> str:
    """Run the two stages in `folder`; returns what the training printed."""
    folder.mkdir()
    source = folder / "mine.jsonl"
    source.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    server = ScriptServer() if hasattr(os, "fork") else None  # its own: the tests' is in use meanwhile
    data = run_script("data.py", "--source", source, "--val-ratio", "0.2", cwd=folder, server=server)
    assert data.status == 0, data.err
    train = run_script("train.py", "--model", "demo", *QUICK, cwd=folder, server=server)
    assert train.status == 0, train.err
    if server:
        server.close()
    return train.err


@pytest.fixture
def small_data(tmp_path, demo_rows):
    """A folder with train.jsonl and val.jsonl of a few records."""
    for name, rows in (("train", demo_rows[:8]), ("val", demo_rows[8:10])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def best(trained):
    """The checkpoint of the trained demo model."""
    from qwenmed import checkpoints

    return checkpoints.find(str(trained.run))


@pytest.fixture(scope="module")
def adapter(best, tmp_path_factory) -> Path:
    """A LoRA adapter on it, random, whose card knows the base's hash."""
    import torch
    from peft import LoraConfig, get_peft_model

    from qwenmed import checkpoints

    folder = tmp_path_factory.mktemp("lora") / "adapter"
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(checkpoints.load_base(best.path, torch.float32), config).save_pretrained(folder)
    checkpoints.write_card(folder, {"base_weights_sha256": checkpoints.weights_sha256(best.path)})
    return folder


@pytest.fixture
def merged(best, tmp_path) -> Path:
    """The trained model, written for other programs."""
    from qwenmed import merged_model

    folder = tmp_path / "merged"
    folder.mkdir()
    merged_model.write_merged(best, folder, "fp32")
    return folder


def cpu_config(settings, folder):
    """The trainer's configuration for a training on a CPU that has room for everything."""
    from qwenmed import configuration, planner, shapes

    cpu = planner.Card("cpu", 2**40, False, "the CPU")
    plan, *_ = planner.plans(shapes.known("Qwen/Qwen3-0.6B"), settings, cpu, 64)
    return configuration.sft_config(settings, folder, plan, cpu)
