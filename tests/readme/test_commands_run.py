"""Every command of the READMEs, verbatim, in a copy of the project and without a network: `make test-readme`.

The commands run in the READMEs' order, in one folder, as a reader would type them. What makes that short is what a
reader could have as well: Qwen/Qwen3-0.6B, which the hub (a loopback server) serves, is the demo model trained on
eight records, with a short context, and its folder recommends four steps of training. Servers and conversations
are started, used once and stopped. What can't be run here – `make`, `pip install`, Ollama, vLLM, Windows' activate –
is held against what it names. Each command is printed with how it was verified.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from chat_server import ChatServer, say
from conftest import ROOT
from hub_server import HubServer
from readme_commands import Command, all_commands

PROJECT = ("qwenmed", "configs", "Makefile", "pyproject.toml", "requirements.txt", "sample_questions.json")
FOUR_STEPS = "{max_steps: 4, eval_steps: 2, gradient_accumulation_steps: 1, sample_tokens: 32}"
RECOMMENDED = f"full: {FOUR_STEPS}\nlora: {FOUR_STEPS}\n"
CONTEXT = 512  # tokens, in which the replies of a model that has learnt next to nothing end
PORT = 8000  # as the READMEs say
LONGEST = 900  # seconds; machines may be busy

RAN, CHECKED, SKIPPED, FAILED = "ran", "checked, not run", "skipped", "FAILED"


class Skip(Exception):
    """The command needs an optional package that is not here."""


@dataclass
class Verdict:
    """What came of a command."""

    kind: str
    note: str
    seconds: float = 0.0


class Reader:
    """Follows the READMEs in a folder of their own; each method named in `readme_commands.WAYS` is one way.

    Each returns (kind, note) or raises AssertionError.
    """

    def __init__(self, folder: Path, home: Path, model_hub: HubServer, data_hub: HubServer) -> None:
        self.folder, self.home, self.model_hub, self.data_hub = folder, home, model_hub, data_hub
        self.printed = ""  # by everything that ran
        self.curls = [command for command in all_commands() if command.way == "asked_of_the_server"]
        self.curl_out: dict[str, str] = {}

    def follow(self, command: Command) -> Verdict:
        started = time.monotonic()
        try:
            kind, note = getattr(self, command.way or "unknown")(command)
        except Skip as skip:
            kind, note = SKIPPED, str(skip)
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            kind, note = FAILED, str(error)
        return Verdict(kind, note, time.monotonic() - started)

    # How things run

    def environment(self, text: str) -> dict[str, str]:
        """Nothing but loopback is to be reached; a variable of the person who tests must not change a thing."""
        hub = self.model_hub if "download_model.py" in text else self.data_hub
        env = {
            name: value for name, value in os.environ.items() if not name.startswith(("SWANLAB", "PYTHON", "OPENAI"))
        }
        return env | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}",
            "HOME": str(self.home),
            "MODELSCOPE_ENDPOINT": hub.url,
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0" if "download_model.py" in text else "1",
            "OMP_NUM_THREADS": "1",  # beside other work, two threads wait for each other
            "NO_PROXY": "*",
            "TERM": "dumb",
        }

    def run(self, text: str) -> str:
        """Run a line in bash; returns what it printed on stdout."""
        done = subprocess.run(
            ["bash", "-c", text], cwd=self.folder, env=self.environment(text), capture_output=True, timeout=LONGEST,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        out, err = done.stdout.decode(), done.stderr.decode()
        self.printed += out
        assert done.returncode == 0, f"status {done.returncode}: {err.strip()[-600:]}"
        assert "Traceback" not in err, err[-600:]
        return out

    @contextlib.contextmanager
    def running(self, text: str, until):
        """Start a line in bash, wait until `until()` is true, and stop it with SIGTERM."""
        check_port_is_free()
        process = subprocess.Popen(
            ["bash", "-c", f"exec {text}"], cwd=self.folder, env=self.environment(text), stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            end = time.monotonic() + 120
            while not until():
                assert process.poll() is None, f"ended by itself with status {process.returncode}"
                assert time.monotonic() < end, "did not answer within two minutes"
                time.sleep(0.2)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            status = process.wait(timeout=60)
        assert status == 143, f"stopped with status {status} instead of 143"

    def file(self, pattern: str) -> Path:
        """The newest file of this pattern."""
        found = sorted(self.folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)
        assert found, f"left no {pattern}"
        return found[-1]

    # The ways

    def script(self, command: Command) -> tuple[str, str]:
        name = re.match(r"python (\w+)\.py", command.bare)[1]
        if "gguf" in command.bare or "--to ollama" in command.bare:
            needed = "llama_cpp" if name == "medical_assistant" else "gguf"
            if not importlib.util.find_spec(needed):
                raise Skip(f"{needed} is not installed: pip install -e '.[gguf]'")
        out = self.run(command.text)
        return RAN, getattr(self, f"after_{name}")(command.bare, out)

    def after_download_model(self, bare: str, out: str) -> str:
        assert (self.folder / out.strip() / "config.json").is_file()
        return f"{out.strip()}, from the loopback hub"

    def after_data(self, bare: str, out: str) -> str:
        for name in ("train.jsonl", "val.jsonl", "train_format.jsonl", "val_format.jsonl"):
            assert time.time() - self.file(name).stat().st_mtime < LONGEST, f"{name} is old"
        if "--audit" in bare:
            assert time.time() - self.file("audit.html").stat().st_mtime < LONGEST
        return re.search("读到.*", out)[0]

    def after_doctor(self, bare: str, out: str) -> str:
        assert out.rstrip().endswith("✗ 0"), out[-2000:]
        return out.rstrip().splitlines()[-1]

    def after_train(self, bare: str, out: str) -> str:
        if "--plan" in bare:
            assert "→" in out and "会选：" in out, out
            return out.strip().splitlines()[-1]
        run = json.loads(self.file("output/*/run.json").read_text(encoding="utf-8"))
        folder = self.file("output/*/run.json").parent
        assert run["status"] == "finished"
        for name in ("loss.png", "samples.jsonl", "swanlog", "checkpoint-4/checkpoint.json"):
            assert (folder / name).exists(), name
        if given := re.search(r"--output-dir (\S+)", bare):
            assert folder == self.folder / given[1]
        return f"{folder.relative_to(self.folder)}, {run['steps']} steps"

    after_train_lora = after_train

    def after_inference(self, bare: str, out: str) -> str:
        assert "【回答】" in out or "【思考】" in out
        return "answered"

    def after_medical_assistant(self, bare: str, out: str) -> str:
        if "--triage" in bare:
            assert json.loads(out)["urgency"] == "emergency"
            return out.strip()[:60]
        if given := re.search(r" -b (\S+) -o (\S+)", bare):
            asked, told = ((self.folder / given[number]).read_text(encoding="utf-8") for number in (1, 2))
            rows = [json.loads(line) for line in told.splitlines()]
            assert len(rows) == len(json.loads(asked)) and not any(row.get("error") for row in rows)
            return f"{len(rows)} rows answered"
        assert "【免责声明】" in out
        if "emergency" in bare:
            assert out.startswith("【紧急】") and "立即拨打120" in out
        return "answered, with its disclaimer"

    def after_eval(self, bare: str, out: str) -> str:
        report = self.file("eval_report/report.html")
        assert self.file("eval_report/report.json") and self.file("eval_report/predictions.jsonl")
        return f"{report.relative_to(self.folder)}, {report.stat().st_size:,} bytes"

    def after_export(self, bare: str, out: str) -> str:
        folder = self.file("exports/*/export.json").parent
        assert json.loads((folder / "export.json").read_text(encoding="utf-8"))["self_test"]
        return f"{folder.relative_to(self.folder)}, self-test passed"

    def conversation(self, command: Command) -> tuple[str, str]:
        """On a terminal: choose a scenario, ask a question, leave."""
        import pexpect

        server = None
        if f"localhost:{PORT}" in command.bare:
            check_port_is_free()
            model = re.search(r"--model (\S+)", command.bare)[1]
            server = ChatServer(say({"reasoning_content": "想"}, {"content": "多休息。"}), models=[model], port=PORT)
        try:
            child = pexpect.spawn(
                "bash", ["-c", command.text], cwd=str(self.folder), env=self.environment(command.text), timeout=120,
                encoding="utf-8", dimensions=(40, 200),
            )  # fmt: skip
            try:
                for waited, typed in [("编号 0", "1"), ("您的问题", "头痛三天了怎么办？"), ("免责声明", "/quit")]:
                    child.expect(waited)
                    child.sendline(typed)
                child.expect(pexpect.EOF)
            except pexpect.ExceptionPexpect as error:
                raise AssertionError(str(error)[-600:]) from error
            finally:
                child.close()
            assert child.exitstatus == 0, child.exitstatus
            if server:
                assert server.asked, "the server was not asked"
        finally:
            if server:
                server.close()
        return RAN, "one question, at a terminal" + (", of a stand-in server" if server else "")

    def server(self, command: Command) -> tuple[str, str]:
        """Start it, look at the page, run the READMEs' curl lines against it, stop it."""
        import httpx

        def answers() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(f"http://127.0.0.1:{PORT}/healthz").status_code == 200
            return False

        with self.running(command.bare, answers):
            page = httpx.get(f"http://127.0.0.1:{PORT}/")
            assert page.status_code == 200 and "<html" in page.text
            for each in self.curls:
                self.curl_out[each.bare] = self.run(each.text) if shutil.which("curl") else as_httpx(each)
        return RAN, "the page came, stopped by SIGTERM (143)"

    def asked_of_the_server(self, command: Command) -> tuple[str, str]:
        assert command.bare in self.curl_out, "no server ran before"
        out = self.curl_out[command.bare]
        pieces = [json.loads(line[6:]) for line in out.splitlines() if line.startswith("data: {")]
        content = "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces if piece["choices"])
        assert "【免责声明】" in content and out.rstrip().endswith("[DONE]"), out[-300:]
        return RAN, "while serve.py ran" + ("" if shutil.which("curl") else " (by httpx: no curl here)")

    def code(self, command: Command) -> tuple[str, str]:
        (self.folder / "example.py").write_text(command.text, encoding="utf-8")
        assert "【免责声明】" in self.run("python example.py")
        return RAN, "as a script"

    def scenario_example(self, command: Command) -> tuple[str, str]:
        with (self.folder / "prompts.py").open("a", encoding="utf-8") as file:
            file.write(f"\n{command.text}")
        self.run(
            "python -c 'from prompts import *; last = list(MEDICAL_SCENARIOS)[-1]; "
            "assert MEDICAL_PROMPTS[last].startswith(GENERAL_PROMPT) and len(SAMPLE_QUESTIONS[last]) > 1'"
        )
        return RAN, "added to prompts.py"

    def make_environment(self, command: Command) -> tuple[str, str]:
        self.run(command.text)
        assert (self.folder / ".venv" / "pyvenv.cfg").is_file()
        return RAN, ".venv made"

    def activate(self, command: Command) -> tuple[str, str]:
        which = self.run(f"{command.text}\ncommand -v python").strip()
        assert Path(which).parent == self.folder / ".venv" / "bin", which
        return RAN, "python is then .venv's"

    def execution_policy(self, command: Command) -> tuple[str, str]:
        policy = command.bare.split()[-1]
        assert f"Set-ExecutionPolicy -ExecutionPolicy {policy} " in activate_ps1().read_text(encoding="utf-8")
        return CHECKED, "Activate.ps1 itself asks for this policy"

    def windows_activate(self, command: Command) -> tuple[str, str]:
        told = command.bare.replace("\\", "/").rpartition("/")[0]
        assert sysconfig.get_path("scripts", "nt_venv", {"base": ".venv"}).replace("\\", "/") == told
        assert activate_ps1().is_file()
        return CHECKED, "venv puts Activate.ps1 there on Windows"

    def make_target(self, command: Command) -> tuple[str, str]:
        target = command.bare.split()[1]
        wanted = {"demo": ["data.py", "train.py", "train_lora.py", "eval.py", "export.py"], "test": ["pytest"]}[target]
        if shutil.which("make"):
            recipe = self.run(f"make --dry-run {target}")
            assert all(word in recipe for word in wanted), recipe
        called = f"make {target}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        return CHECKED, "the target's steps are listed" + (", and .ci/run calls it" if called else "")

    def requirements(self, command: Command) -> tuple[str, str]:
        lines = (self.folder / command.bare.split()[-1]).read_text(encoding="utf-8").splitlines()
        return CHECKED, installed(line for line in lines if line and not line.startswith("#"))

    def extras(self, command: Command) -> tuple[str, str]:
        project = tomllib.loads((self.folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        names = re.search(r"\[(.*)\]", command.bare)[1].split(",")
        known = project["optional-dependencies"]
        assert set(names) <= set(known), f"not among {sorted(known)}"
        return CHECKED, installed(pin for name in names for pin in known[name])

    def printed_by_export(self, command: Command) -> tuple[str, str]:
        if "ollama" in command.bare and not importlib.util.find_spec("gguf"):
            raise Skip("gguf is not installed, so that export.py --to ollama did not run")
        assert f"{command.bare}\n" in self.printed, "export.py has not printed this line"
        return CHECKED, "word for word what export.py has printed"

    def unknown(self, command: Command) -> tuple[str, str]:
        raise AssertionError("no way to run or to check it: see readme_commands.WAYS")


def activate_ps1() -> Path:
    """The script that PowerShell runs for `activate`, where venv takes it from."""
    import venv

    (script,) = (Path(venv.__file__).parent / "scripts").rglob("[aA]ctivate.ps1")
    return script


def installed(pins) -> str:
    """Hold pins against what is installed here."""
    same, missing = 0, []
    for pin in pins:
        name, version = re.match(r"([\w.-]+)(?:\[.*\])?==([^;\s]+)", pin).groups()
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        assert found.partition("+")[0] == version, f"{name} is {found} here, {version} there"
        same += 1
    return f"{same} pins are installed here" + (f"; not here: {', '.join(missing)}" if missing else "")


def check_port_is_free() -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", PORT))
        except OSError:
            raise AssertionError(f"port {PORT}, which the READMEs name, is taken on this machine") from None


def as_httpx(command: Command) -> str:
    """A curl line, where there is no curl."""
    import shlex

    import httpx

    words = shlex.split(command.bare.replace("\\\n", " "))
    url = next(word for word in words if word.startswith("http"))
    header = words[words.index("-H") + 1].split(": ")
    data = words[words.index("-d") + 1]
    return httpx.post(url, content=data.encode(), headers=dict([header]), timeout=LONGEST).text


def lay_out(folder: Path, trained, rows: list[dict]) -> tuple[HubServer, HubServer]:
    """A copy of the project with the reader's own files, and the two hubs."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in PROJECT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    mine = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[2::10])
    (folder / "我的数据.jsonl").write_text(mine, encoding="utf-8")
    (folder / "question.txt").write_text("孩子发烧三天了，要去医院吗？\n", encoding="utf-8")

    model = folder.parent / "hub" / "model"
    model.mkdir(parents=True)
    checkpoint = next(trained.run.glob("checkpoint-*/model.safetensors")).parent
    for pattern in ("config.json", "generation_config.json", "model.safetensors", "token*", "*.jinja", "vocab*"):
        for path in checkpoint.glob(pattern):
            shutil.copy(path, model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = CONTEXT
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (model / "recommended_training.yaml").write_text(RECOMMENDED, encoding="utf-8")
    shutil.copytree(model, folder / "models" / "demo")
    data = folder.parent / "hub" / "data"
    data.mkdir()
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[1::5])
    (data / "r1_data_example.jsonl").write_text(lines, encoding="utf-8")
    return HubServer(model, "Qwen/Qwen3-0.6B"), HubServer(data, "krisfu/delicate_medical_r1_data")


@pytest.fixture(scope="module")
def verdicts(request, trained, demo_rows, tmp_path_factory):
    """Every command's verdict, by its text; printed as they come."""
    folder = tmp_path_factory.mktemp("readme") / "qwen3-medical"
    folder.mkdir()
    home = tmp_path_factory.mktemp("home")
    hubs = lay_out(folder, trained, demo_rows)
    reader = Reader(folder, home, *hubs)
    capture = request.config.pluginmanager.getplugin("capturemanager")
    found = {}
    for command in all_commands():
        verdict = found[command.bare] = reader.follow(command)
        with capture.global_and_fixture_disabled():
            print(table_row(command, verdict), flush=True)
    for hub in hubs:
        hub.close()
    return found


def table_row(command: Command, verdict: Verdict) -> str:
    """A command and how it was verified."""
    shown = " ".join(command.bare.split())
    shown = shown if len(shown) <= 100 else f"{shown[:99]}…"
    return f"{verdict.kind:<17}{verdict.seconds:>5.0f} s  {shown}\n{'':25}{verdict.note}"


def title(command: Command) -> str:
    return re.sub(r"\W+", "-", command.bare.encode("ascii", "ignore").decode())[:70].strip("-")


@pytest.mark.parametrize("command", all_commands(), ids=title)
def test_command_does_what_the_readme_says(verdicts, command):
    verdict = verdicts[command.bare]
    if verdict.kind == SKIPPED:
        pytest.skip(verdict.note)
    assert verdict.kind in (RAN, CHECKED), verdict.note


def test_a_command_that_nobody_can_verify_fails(tmp_path):
    command = Command("bash", "rm -rf x", "rm -rf x", "README.md")
    reader = Reader(tmp_path, tmp_path, None, None)
    assert command.way is None and reader.follow(command).kind == FAILED
