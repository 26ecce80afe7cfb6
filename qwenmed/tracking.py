"""What a run leaves behind: run.json, the loss curve, the SwanLab experiment.

SwanLab is never allowed to stop a training or to wait for a login, and sends or stores no hostname,
command line, console output or Git remote. No question goes there; of texts only the three answers that the
model generates to validation questions.
"""

import contextlib
import datetime
import hashlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwenmed import files, processes

RUN_FILE = "run.json"
PLOT_FILE = "loss.png"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "modelscope", "swanlab", "tokenizers")


class RunFile:
    """`run.json`: everything needed to know – and to repeat – how a checkpoint was made.

    Written whole at each update, so that a run that dies leaves a readable file.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / RUN_FILE
        self.content: dict[str, Any] = {}

    def previous(self) -> dict[str, Any]:
        """What an earlier run into this folder has left; empty if none."""
        if not self.path.is_file():
            return {}
        found = files.read_json(self.path)
        return found if isinstance(found, dict) else {}

    def update(self, **entries: Any) -> None:
        """Add entries and write the file; of several processes the first one does."""
        self.content |= entries
        if processes.is_first():
            files.write_json(self.path, self.content)


def now() -> str:
    """The local time with its offset, to the second."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def text_hash(text: str) -> str:
    """The hex SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def prompt_hash(prompt: str) -> str:
    """By which a system prompt is known again in run.json and checkpoint.json."""
    return text_hash(prompt)[:16]


def library_versions() -> dict[str, str]:
    """The versions of the packages a run depends on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def swanlab_mode(wanted: str | None) -> str:
    """The mode to use: as told, else online where a key is set, else offline."""
    return wanted or ("online" if os.environ.get("SWANLAB_API_KEY") else "offline")


class Tracker:
    """SwanLab behind a guard: the first failure is said once and ends the tracking, not the training.

    Attributes:
        run_id: the experiment's id, or None where there never was one.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.run_id: str | None = None
        self._active = False
        self._say = say

    def start(self, mode: str, log_dir: Path, name: str, config: dict[str, Any], run_id: str | None) -> None:
        """Begin the experiment, or continue `run_id`."""
        if mode == "disabled" or not processes.is_first():
            return
        self._active = True
        self.guarded(self._init, mode, log_dir, name, config, run_id)

    def log_texts(self, key: str, texts: list[str], step: int) -> None:
        """Log generated texts."""
        self.guarded(self._log_texts, key, texts, step)

    def finish(self, state: str = "success") -> None:
        """End the experiment. `state` is SwanLab's: success, crashed or aborted."""
        self.guarded(self._finish, state)

    def guarded(self, action: Callable, *arguments: Any, **options: Any) -> None:
        """Do something with the tracker; what goes wrong is said once and ends the tracking only."""
        if not self._active:
            return
        try:
            with contextlib.redirect_stdout(sys.stderr):  # its notes are no results
                action(*arguments, **options)
        except Exception as error:  # a tracker may fail in any way; the training must go on
            self._active = False
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            self._say(f"SwanLab 不可用，训练继续但不再记录：{reason}")

    def _init(self, mode: str, log_dir: Path, name: str, config: dict[str, Any], run_id: str | None) -> None:
        import swanlab

        if mode == "local" and importlib.util.find_spec("swanboard") is None:
            raise RuntimeError("local 模式需要面板，请运行 pip install 'swanlab[dashboard]'")
        log_dir.mkdir(parents=True, exist_ok=True)
        run = swanlab.init(
            project=os.environ.get("SWANLAB_PROJ_NAME", "qwen3-medical"),
            name=os.environ.get("SWANLAB_EXP_NAME", name),
            mode=mode,
            log_dir=str(log_dir),
            config=config,
            id=run_id,
            resume="allow" if run_id else None,
            settings=swanlab.Settings(
                interactive=False,
                terminal={"proxy_type": "none"},
                # The probe records command line, hostname, working folder and Git remote.
                probe={"hardware": False, "runtime": False, "requirements": False, "git": False, "monitor": False},
            ),
        )
        self.run_id = run.id

    def _log_texts(self, key: str, texts: list[str], step: int) -> None:
        import swanlab

        swanlab.log({key: [swanlab.Text(text) for text in texts]}, step=step)

    def _finish(self, state: str) -> None:
        import swanlab

        swanlab.finish(state=state)
        self._active = False
