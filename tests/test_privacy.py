"""Privacy: what a person asked is found where they wanted it, and nowhere else; nobody is called.

One journey serves all tests: the real scripts over the demo, with a home folder and a temporary folder of their
own, in a network namespace without any route where the system lets us make one.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import ROOT

MARKER = "机密" + "zq7Kx3vW9"
QUESTION = f"我是{MARKER}，头痛三天了怎么办？"

# Python runs this before the script. The hook sees every use of Python's own sockets, by whatever library.
RECORDER = """\
import os, sys
def note(event, arguments):
    if event in {"socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"}:
        target = arguments[1] if event.startswith(("socket.connect", "socket.send")) else arguments[0]
        host = target[0] if isinstance(target, tuple) else target
        unix = isinstance(target, (str, bytes)) and event.startswith(("socket.connect", "socket.send"))
        if not unix and host not in ("127.0.0.1", "::1", "localhost", None):
            with open(os.environ["CONNECTIONS"], "a", encoding="utf-8") as file:
                file.write(f"{sys.argv[0]} {event} {target}\\n")
sys.addaudithook(note)
"""


def may_unshare():
    return (
        bool(shutil.which("unshare")) and not subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode
    )


@dataclass
class Journey:
    """Where the scripts ran, and what they showed."""

    root: Path
    shown: dict[str, str] = field(default_factory=dict)
    isolated: bool = field(default_factory=may_unshare)

    def __post_init__(self):
        for name in ("work", "home", "tmp", "site"):
            (self.root / name).mkdir()
        (self.root / "site" / "sitecustomize.py").write_text(RECORDER, encoding="utf-8")

    @property
    def work(self):
        return self.root / "work"

    @property
    def connections(self):
        file = self.root / "connections"
        return file.read_text(encoding="utf-8").splitlines() if file.exists() else []

    def start(self, *command, **options):
        """A command as a user would start it, with a home of its own; HF_HUB_OFFLINE is not set for them."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "OMP_NUM_THREADS") if name in os.environ}
        own = {
            "HOME": str(self.root / "home"), "TMPDIR": str(self.root / "tmp"), "PYTHONPATH": str(self.root / "site"),
            "CONNECTIONS": str(self.root / "connections"), "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        prefix = ["unshare", "-rn"] if self.isolated else []
        return subprocess.Popen(
            [*prefix, *map(str, command)], cwd=self.work, env=kept | own, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
        )  # fmt: skip

    def run(self, name, script, *arguments, stdin="", status=0):
        process = self.start(sys.executable, ROOT / script, *arguments)
        out, err = process.communicate(stdin.encode(), timeout=240)
        self.shown[name] = out.decode() + err.decode()
        assert process.returncode == status, self.shown[name]

    def holders(self, text=MARKER):
        """Every file below work, home and tmp that holds the text in its name or content, in any usual encoding."""
        forms = [text.encode(), text.encode("utf-16-le"), text.encode("utf-16-be"), json.dumps(text)[1:-1].encode()]
        found = set()
        for folder in ("work", "home", "tmp"):
            for path in (self.root / folder).rglob("*"):
                if path.is_file() and (text in path.name or any(form in path.read_bytes() for form in forms)):
                    found.add(str(path.relative_to(self.root)))
        return found


@pytest.fixture(scope="module")
def journey(tmp_path_factory, demo_rows):
    way = Journey(tmp_path_factory.mktemp("journey"))
    rows = [row | {"question": f"{row['question']}（{MARKER}{number}）"} for number, row in enumerate(demo_rows[:10])]
    (way.work / "mine.jsonl").write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
    )
    (way.work / "asked.json").write_text(
        json.dumps([QUESTION, {"question": QUESTION, "scenario": "x"}]), encoding="utf-8"
    )
    way.run("data", "data.py", "--source", "mine.jsonl")
    way.run(
        "train",
        "train.py",
        "--model",
        "demo",
        "--max-steps",
        2,
        "--batch-size",
        2,
        "--eval-steps",
        1,
        "--sample-tokens",
        8,
    )
    way.run("batch", "medical_assistant.py", "-b", "asked.json", "-o", "answers.jsonl", "-m", 4, status=3)
    way.run("single", "medical_assistant.py", "-q", "-", "-m", 4, "--save-history", "kept.json", stdin=QUESTION)
    talk = f"1\n{QUESTION}\nsave {'长' * 300}\n{QUESTION}\nquit\n"  # the saving fails
    way.run("interactive", "medical_assistant.py", "-m", 4, stdin=talk)
    return way


ASKED_FOR = {
    "work/mine.jsonl", "work/asked.json",  # what the person brought
    "work/train.jsonl", "work/val.jsonl", "work/train_format.jsonl", "work/val_format.jsonl",
    "work/answers.jsonl", "work/kept.json",
    "work/output/demo-full/samples.jsonl",  # validation questions with their answers, as README says
}  # fmt: skip


def test_question_is_found_where_it_was_asked_for_and_nowhere_else(journey):
    assert journey.holders() == ASKED_FOR


def test_readme_names_every_file_that_holds_questions():
    text = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    for name in ("train.jsonl", "*_format.jsonl", "samples.jsonl", "--save-history", "-o"):
        assert name in text
    assert "samples.jsonl" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_swanlab_keeps_no_text_but_the_generated_samples(journey):
    run = journey.work / "output" / "demo-full"
    texts = [path for path in (run / "swanlog").rglob("*") if path.is_file() and "media" in path.parts]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    generated = {sample["generated_answer"].strip() for sample in samples}
    assert {path.read_text(encoding="utf-8").strip() for path in texts} <= generated


def test_training_says_nothing_of_the_questions(journey):
    assert MARKER not in journey.shown["data"] and MARKER not in journey.shown["train"]
    assert "没有保存" in journey.shown["interactive"]


def test_history_is_readable_by_its_owner_only(journey):
    assert (journey.work / "kept.json").stat().st_mode & 0o077 == 0


def test_nothing_stays_in_home_or_tmp_but_caches(journey):
    left = {str(path.relative_to(journey.root)) for path in (journey.root / "tmp").rglob("*") if path.is_file()}
    assert not left, left  # torch leaves an empty folder
    assert {path.name for path in (journey.root / "home").iterdir()} <= {".cache", ".config", ".swanlab"}


def test_no_connection_is_tried(journey):
    if not journey.isolated:
        pytest.skip("unshare -rn is not allowed here: a route might have hidden an attempt")
    assert journey.connections == []


def test_the_recorder_would_see_an_attempt(journey):
    code = (
        "import socket, urllib.request\n"
        "for what in (lambda: urllib.request.urlopen('http://example.invalid'),"
        " lambda: socket.create_connection(('192.0.2.1', 9), 1), lambda: socket.create_connection(('127.0.0.1', 9), 1)):\n"
        "    try: what()\n"
        "    except OSError: pass\n"
    )
    journey.start(sys.executable, "-c", code).communicate(timeout=60)
    seen, _ = journey.connections, (journey.root / "connections").unlink()
    assert any("example.invalid" in line for line in seen) and any("192.0.2.1" in line for line in seen)
    assert not any("127.0.0.1" in line for line in seen)


CRASH = f"""\
import sys
sys.path.insert(0, {str(ROOT)!r})
import medical_assistant
from qwenmed import cli
from qwenmed.sampler import Sampler
def broken(self, *arguments, **options): raise RuntimeError("the card has gone")
Sampler.choose = broken
cli.run(medical_assistant.main)
"""


def test_crash_shows_and_leaves_nothing_of_the_question_and_stdin_keeps_it_off_the_process_list(journey):
    before = journey.holders()
    process = journey.start(sys.executable, "-X", "faulthandler", "-c", CRASH, "-q", "-", "-m", 4)
    process.stdin.write(QUESTION.encode())
    process.stdin.close()
    process.stdin = None
    seen = 0
    while process.poll() is None:
        for place in (Path("/proc") / str(process.pid), *children(process.pid)):
            try:
                line, environment = (place / "cmdline").read_bytes(), (place / "environ").read_bytes()
            except OSError:
                continue
            seen += b"-q\0-\0" in line
            assert MARKER.encode() not in line + environment
        time.sleep(0.05)
    out, err = (part.decode() for part in process.communicate(timeout=60))
    assert process.returncode == 1 and "the card has gone" in err and "Traceback" in err
    assert MARKER not in out + err and journey.holders() == before
    assert seen or not Path("/proc").is_dir()


def children(pid):
    try:
        return [
            Path("/proc") / child
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
        ]
    except OSError:
        return []
