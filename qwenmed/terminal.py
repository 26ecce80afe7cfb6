"""The conversation at a terminal: menus, streaming display, commands."""

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenmed.controls import printable
from qwenmed.errors import UserError

HELP = """\
直接输入问题即可提问，上文会一并发给模型。命令：
  help       显示本帮助
  samples    列出本场景的示例问题，输入编号即可提问
  scenario   换一个场景
  clear      清空对话，重新开始
  save [文件] 保存对话（只有你自己可读）
  quit       退出（Ctrl-D 也可以；回答时按 Ctrl-C 只停止这一条回答）"""

COMMANDS = {
    "help": {"help", "帮助", "?", "？", "/help"},
    "samples": {"samples", "示例", "/samples"},
    "scenario": {"scenario", "场景", "/scenario"},
    "clear": {"clear", "清空", "/clear"},
    "quit": {"quit", "exit", "q", "退出", "/quit", "/exit"},
}


class Quit(Exception):
    """The user has asked to leave, or the input has ended."""


class Display:
    """Shows a reply as it comes: thinking dimmed and labelled apart from the answer."""

    def __init__(self, out=None) -> None:
        self._out = out or sys.stdout
        self._colour = self._out.isatty() and "NO_COLOR" not in os.environ
        self._kind: str | None = None

    def piece(self, kind: str, text: str) -> None:
        """Show a piece of "emergency" (a fixed text), "thinking", "answer" or "closing" (what the program adds)."""
        text = printable(text)
        if kind != self._kind:
            if self._kind is not None:
                self._write("\n" if self._kind == "emergency" else "\n\n")
            label = {"thinking": "【思考】\n", "answer": "【回答】\n"}.get(kind, "")
            self._write(self._styled(kind, label))
            self._kind = kind
        self._write(self._styled(kind, text) + ("\n" if kind == "emergency" else ""))

    def end(self) -> None:
        """The reply has ended."""
        self._write("\n")
        self._kind = None

    def _styled(self, kind: str, text: str) -> str:
        style = {"thinking": "2", "emergency": "1;31"}.get(kind)
        return f"\033[{style}m{text}\033[0m" if self._colour and text and style else text

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


class Session:
    """The interactive mode.

    Args:
        scenarios: id → name, in menu order.
        samples: id → sample questions.
        ask: asks a question in a scenario and yields (kind, piece) pairs.
        clear: starts a new conversation.
        save: saves the conversation to a path and returns it.
        scenario: the scenario to begin in, or None for the menu.
    """

    def __init__(
        self,
        scenarios: Mapping[str, str],
        samples: Mapping[str, Sequence[str]],
        ask: Callable[[str, str], Iterable[tuple[str, str]]],
        clear: Callable[[], None],
        save: Callable[[Path | None], Path],
        scenario: str | None = None,
    ) -> None:
        self._scenarios, self._samples = scenarios, samples
        self._ask, self._clear, self._save = ask, clear, save
        self._scenario = scenario
        self._offered: Sequence[str] = ()

    def run(self) -> None:
        """Talk until the user leaves or the input ends."""
        _enable_line_editing()
        print("Qwen3 医疗助手。输入 help 查看命令，quit 退出。")
        try:
            if self._scenario is None:
                self._choose_scenario()
            else:
                self._announce()
            while True:
                self._turn(_read(f"\n[{self._scenarios[self._scenario]}] 您的问题："))
        except Quit:
            print("再见，祝您健康。")

    def _turn(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        command = next((name for name, words in COMMANDS.items() if line.lower() in words), None)
        if not line:
            print("问题是空的；输入 help 查看命令。")
        elif word.lower() in {"save", "/save", "保存"}:
            self._save_to(rest.strip())
        elif command:
            getattr(self, f"_do_{command}")()
        elif _is_number(line, len(self._offered)):
            question = self._offered[int(line) - 1]
            print(f"问：{question}")
            self._answer(question)
        else:
            self._answer(line)

    def _answer(self, question: str) -> None:
        display = Display()
        try:
            for kind, text in self._ask(question, self._scenario):
                display.piece(kind, text)
            display.end()
        except KeyboardInterrupt:
            display.end()
            print("（已停止这一条回答，对话保留）")
        except UserError as error:
            print(printable(f"错误：{error}"))

    def _do_help(self) -> None:
        print(HELP)

    def _do_samples(self) -> None:
        self._offered = self._samples.get(self._scenario, ())
        if not self._offered:
            print("这个场景没有示例问题。")
            return
        for number, question in enumerate(self._offered, 1):
            print(f"  {number}. {question}")
        print("输入编号即可提问。")

    def _do_scenario(self) -> None:
        self._choose_scenario()

    def _do_clear(self) -> None:
        self._clear()
        print("对话已清空。")

    def _do_quit(self) -> None:
        raise Quit

    def _save_to(self, name: str) -> None:
        try:
            print(f"对话已保存：{self._save(Path(name) if name else None)}")
        except (UserError, OSError, ValueError) as error:  # a NUL in a file name is a ValueError
            print(printable(f"错误：没有保存：{error}"))

    def _choose_scenario(self) -> None:
        ids = list(self._scenarios)
        print("\n请选择场景：")
        for number, id_ in enumerate(ids, 1):
            print(f"  {number:2}. {self._scenarios[id_]}（{id_}）")
        while True:
            line = _read(f"编号 1–{len(ids)}：")
            if line.lower() in COMMANDS["quit"]:
                raise Quit
            if _is_number(line, len(ids)):
                self._scenario = ids[int(line) - 1]
                break
            match = next((id_ for id_ in ids if line in (id_, self._scenarios[id_])), None)
            if match:
                self._scenario = match
                break
            print(f"请输入 1 到 {len(ids)} 的编号，或 quit 退出。")
        self._offered = ()
        self._announce()

    def _announce(self) -> None:
        print(f"场景：{self._scenarios[self._scenario]}。输入 samples 查看示例问题。")


def batch_row_as_text(scenarios: Mapping[str, str]) -> Callable[[Mapping[str, Any]], str]:
    """What shows an output row of a batch to a reader, with the scenario's name."""

    def as_text(row: Mapping[str, Any]) -> str:
        head = f"—— {row['id']}. [{scenarios.get(row['scenario'], row['scenario'])}] {row['question']}"
        parts = [row.get("answer", ""), f"错误：{row['error']}" if "error" in row else ""]
        return printable("\n".join([head, *filter(None, parts)]) + "\n")

    return as_text


def print_reply(pieces: Iterable[tuple[str, str]]) -> None:
    """Show one reply on stdout."""
    display = Display()
    for kind, text in pieces:
        display.piece(kind, text)
    display.end()


def _is_number(line: str, largest: int) -> bool:
    """Whether a line is a number from 1; int() itself refuses one of more than 4300 digits."""
    return line.isdecimal() and len(line) < 10 and 1 <= int(line) <= largest


def _read(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        print()
        raise Quit from None
    except (OSError, ValueError):  # stdin was closed, or its terminal has gone
        raise Quit from None


def _enable_line_editing() -> None:
    try:
        import readline  # noqa: F401  input() uses it once it is imported; Windows has none and needs none
    except ImportError:
        return


def batch_progress(total: int) -> Any:
    """A progress bar on stderr for a batch."""
    from tqdm import tqdm

    return tqdm(total=total, unit="题", file=sys.stderr, dynamic_ncols=True)
