"""Runs a top-level script in a forked child, so that twenty of them cost one import of torch."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT
from script_server import become

LIMIT = 120  # seconds after which a child counts as hung


class Child:
    """A script that runs in a process group of its own.

    Args:
        script: a top-level script.
        arguments: its command line.
        cwd: where it runs; its output goes to cwd/../<name>.log, outside of what is checked.
    """

    def __init__(self, script: str, *arguments: object, cwd: Path, log: Path) -> None:
        self.log = log
        log.write_bytes(b"")
        self.pid = os.fork()
        if self.pid == 0:
            os.environ["HF_HUB_OFFLINE"] = "1"
            streams = {"stdin": os.devnull, "stdout": log, "stderr": log}
            become({"script": str(ROOT / script), "arguments": [*map(str, arguments)], "cwd": cwd, **streams})
        self.status: int | None = None

    def alive(self) -> bool:
        """Whether it still runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is None

    def wait(self) -> int:
        """Its exit status, when it has ended by itself."""
        end = time.monotonic() + LIMIT
        while self.alive():
            assert time.monotonic() < end, f"hung: {self.text()}"
            time.sleep(0.005)
        return self.status

    def kill_when(self, reached: Callable[[], bool], delay: float = 0.0) -> bool:
        """kill -9 of the whole group, `delay` seconds after something was reached; False if it had ended before."""
        end = time.monotonic() + LIMIT
        while not reached():
            if not self.alive():
                return False
            assert time.monotonic() < end, f"never came there: {self.text()}"
            time.sleep(0.0005)
        time.sleep(delay)
        if not self.alive():
            return False
        os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):  # it may not have reached its own group yet
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()
        return True

    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def delays(seed: int, count: int, longest: float) -> list[float]:
    """Random moments, the same in every run."""
    moments = random.Random(seed)
    return [moments.uniform(0, longest) for _ in range(count)]
