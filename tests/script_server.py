"""Runs top-level scripts in forked children, so that eighty runs in the tests cost one import of torch.

A process of its own: it imports the heavy libraries – nothing of ours – once, and forks for each script, which
then runs as with `python script.py`: its own process, working folder, streams and exit status. One thread, so
that a fork is safe. Requests come as JSON lines on stdin; answers are the child's pid and then its status.
"""

import contextlib
import io
import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Import, then serve until stdin ends."""
    sys.path.insert(0, str(ROOT))
    from qwenmed.cli import _QUIET

    os.environ.update({**_QUIET, "HF_HUB_OFFLINE": "1"})
    preload()
    for name in [name for name in sys.modules if name.split(".")[0] == "qwenmed"]:
        del sys.modules[name]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            become(request)
        print(json.dumps({"pid": pid}), file=answers, flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), file=answers, flush=True)


def preload() -> None:
    """What the scripts import before they do anything else."""
    import torch

    torch.set_num_threads(1)  # so that a fork is safe
    import datasets  # noqa: F401
    import jieba
    import jinja2  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import openai  # noqa: F401
    import peft  # noqa: F401
    import rouge_chinese  # noqa: F401
    import sacrebleu  # noqa: F401
    import transformers  # noqa: F401
    import trl  # noqa: F401
    from transformers import AutoTokenizer, Qwen3ForCausalLM  # noqa: F401
    from trl import SFTConfig, SFTTrainer  # noqa: F401

    jieba.setLogLevel(30)
    jieba.initialize()


def become(request: dict) -> NoReturn:
    """Be the script, and never return.

    Args:
        request: `script`, `arguments`, `cwd`, and the existing files that are `stdin`, `stdout` and `stderr`.
    """
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(request["cwd"])
        append = os.O_WRONLY | os.O_APPEND  # both may go to one file
        for number, (name, mode) in enumerate([("stdin", os.O_RDONLY), ("stdout", append), ("stderr", append)]):
            os.dup2(os.open(request[name], mode), number)
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(
                io.BufferedWriter(io.FileIO(number, "w", closefd=False)), encoding="utf-8", line_buffering=True
            )
            for number in (1, 2)
        )
        sys.argv = [request["script"], *request["arguments"]]
        try:
            runpy.run_path(request["script"], run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
