"""The conversation at a terminal: menus, streaming display, commands."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from qwenmed.answers import AssistantReply
from qwenmed.batch import AUTO, Answered, Request
from qwenmed.controls import printable
from qwenmed.errors import UserError

HELP = """\
直接输入问题即可提问，上文会一并发给模型。命令（斜杠可以省略，/think、/retry、/load 除外）：
  /help               显示本帮助
  /samples            列出本场景的示例问题，输入编号即可提问
  /scenario [场景]    换一个场景（编号、名称，或 auto 按问题自动选择）
  /think [show|hide|summary]  显示、隐藏或收起思考；/think show 也会展开上一条的思考
  /retry              重新回答上一个问题
  /save [文件]        保存对话（只有你自己可读）
  /load 文件          接着以前保存的对话
  /clear              清空对话，重新开始；换一位咨询者时请用它
  /quit               退出（Ctrl-D 也可以；回答时按 Ctrl-C 只停止这一条回答）"""

# Each command's names; the first is the method's.
COMMANDS = (
    ("help", "/help", "帮助", "?", "？"),
    ("samples", "/samples", "示例"),
    ("scenario", "/scenario", "场景"),
    ("think", "/think"),
    ("retry", "/retry"),
    ("save", "/save", "保存"),
    ("load", "/load"),
    ("clear", "/clear", "清空"),
    ("quit", "/quit", "/exit", "exit", "q", "退出"),
)
# Words that begin a question as well ("think …") are commands with a slash only.
SLASH_ONLY = ("think", "retry", "load")
# These take what follows them; the others stand alone, or they are a question ("help me").
WITH_ARGUMENT = ("scenario", "think", "save", "load")
THINK_MODES = ("show", "hide", "summary")
_ALONE = {name: command[0] for command in COMMANDS for name in command if name not in SLASH_ONLY}


class Assistant(Protocol):
    """What the terminal needs of an assistant; see `MedicalAssistant`."""

    history: list[AssistantReply]

    @property
    def last_reply(self) -> AssistantReply | None: ...  # noqa: D102
    def load_model(self, for_batch: bool = False) -> Any: ...  # noqa: D102
    def stream(self, question: str, scenario_type: str, max_tokens: int) -> Iterator[tuple[str, str]]: ...  # noqa: D102
    def batch(self, rows: Iterable[Request], *, answered: Answered | None) -> Iterator[dict[str, Any]]: ...  # noqa: D102
    def clear(self) -> None: ...  # noqa: D102
    def take_back(self) -> AssistantReply | None: ...  # noqa: D102
    def save_conversation(self, path: str | Path | None = None) -> Path: ...  # noqa: D102
    def load_conversation(self, path: Path) -> int: ...  # noqa: D102


class Quit(Exception):
    """The user has asked to leave, or the input has ended."""


class Display:
    """Shows a reply as it comes: thinking dimmed and labelled apart from the answer.

    Args:
        think: "show", "hide", or "summary" – one line that says how long it is.
    """

    def __init__(self, out: TextIO | None = None, think: str = "show") -> None:
        self._out = out or sys.stdout
        self._live = self._out.isatty()
        self._colour = self._live and "NO_COLOR" not in os.environ
        self._think = think
        self._kind: str | None = None
        self._folded = 0  # characters of a thinking that is not shown

    def piece(self, kind: str, text: str) -> None:
        """Show a piece of "emergency" (fixed), "scenario", "thinking", "answer" or "closing" (the program's)."""
        text = printable(text)
        if kind == "thinking" and self._think != "show":
            self._fold(text)
            return
        self._unfold()
        if kind != self._kind:
            if self._kind is not None:
                self._write("\n" if self._kind in ("emergency", "scenario") else "\n\n")
            self._write(self._styled(kind, {"thinking": "【思考】\n", "answer": "【回答】\n"}.get(kind, "")))
            self._kind = kind
        text = f"〔场景：{text}〕" if kind == "scenario" else text
        self._write(self._styled(kind, text) + ("\n" if kind == "emergency" else ""))

    def end(self) -> None:
        """The reply has ended."""
        self._unfold()
        self._write("\n")
        self._kind = None

    def _fold(self, text: str) -> None:
        if not self._folded and self._kind is not None:
            self._write("\n")
            self._kind = None
        self._folded += len(text)
        if self._live:  # a sign of life in place of the thinking
            self._write(self._styled("thinking", f"\r思考中… {self._folded} 字"))

    def _unfold(self) -> None:
        if not self._folded:
            return
        if self._live:
            self._write("\r\033[K")
        if self._think == "summary":
            self._write(self._styled("thinking", f"【思考】已收起，{self._folded} 字") + "\n\n")
        self._folded = 0

    def _styled(self, kind: str, text: str) -> str:
        style = {"thinking": "2", "scenario": "2", "emergency": "1;31"}.get(kind)
        return f"\033[{style}m{text}\033[0m" if self._colour and text and style else text

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


class Session:
    """The interactive mode.

    Args:
        assistant: keeps the conversation.
        ask: asks it a question in a scenario and yields (kind, piece) pairs.
        scenarios: id → name, in menu order.
        samples: id → sample questions.
        scenario: the scenario to begin in, or None for the menu.
        think: how thinking is shown, one of `THINK_MODES`.
    """

    def __init__(
        self,
        assistant: Assistant,
        ask: Callable[[str, str], Iterable[tuple[str, str]]],
        scenarios: Mapping[str, str],
        samples: Mapping[str, Sequence[str]],
        scenario: str | None = None,
        think: str = "show",
    ) -> None:
        self._assistant, self._ask = assistant, ask
        self._scenarios, self._samples = {**scenarios, AUTO: "自动选择"}, samples
        self._scenario = scenario or ""  # none chosen yet
        self._think = think
        self._offered: Sequence[str] = ()
        self._read = line_reader()

    def run(self) -> None:
        """Talk until the user leaves or the input ends."""
        print("Qwen3 医疗助手。输入 /help 查看命令，/quit 退出。")
        try:
            if not self._scenario:
                self._choose_scenario()
            else:
                self._announce()
            warned = False
            while True:
                try:
                    line = self._read(f"\n[{self._scenarios[self._scenario]}] 您的问题：")
                except KeyboardInterrupt:
                    if warned or not sys.stdin.isatty():
                        raise
                    warned = True
                    print("（再按一次 Ctrl-C 退出）")
                    continue
                warned = False
                self._turn(line)
        except Quit:
            print("再见，祝您健康。")

    def _turn(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        command = _ALONE.get(word.lower())
        if command and rest.strip() and command not in WITH_ARGUMENT:
            command = None
        if not line:
            print("问题是空的；输入 /help 查看命令。")
        elif command:
            arguments = (rest.strip(),) if command in WITH_ARGUMENT else ()
            getattr(self, f"_do_{command}")(*arguments)
        elif word.startswith("/") and word.isascii():
            print(printable(f"没有命令 {word}；输入 /help 查看命令。"))
        elif _is_number(line, len(self._offered)):
            question = self._offered[int(line) - 1]
            print(f"问：{question}")
            self._answer(question, self._scenario)
        else:
            self._answer(line, self._scenario)

    def _answer(self, question: str, scenario: str) -> bool:
        display = Display(think=self._think)
        try:
            for kind, text in self._ask(question, scenario):
                display.piece(kind, text)
            display.end()
            return True
        except KeyboardInterrupt:
            display.end()
            print("（已停止这一条回答，对话保留）")
        except UserError as error:
            display.end()
            print(printable(f"错误：{error}"))
        return False

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

    def _do_scenario(self, wanted: str) -> None:
        if not wanted:
            self._choose_scenario()
        elif chosen := self._named(wanted):
            self._enter(chosen)
        else:
            print(printable(f"没有场景 {wanted}；输入 /scenario 从菜单里选。"))

    def _do_think(self, mode: str) -> None:
        if mode not in ("", *THINK_MODES):
            print("用法：/think show（显示）、/think hide（隐藏）、/think summary（收起）")
            return
        folded = self._think != "show"
        self._think = mode or ("show" if folded else "summary")
        print({"show": "思考会显示。", "hide": "思考不显示。", "summary": "思考会收起。"}[self._think])
        last = self._assistant.last_reply
        if folded and self._think == "show" and last and last.thinking:
            display = Display()
            display.piece("thinking", last.thinking)
            display.end()

    def _do_retry(self) -> None:
        last = self._assistant.take_back()
        if last is None:
            print("还没有可以重新回答的问题。")
            return
        print(printable(f"问：{last.question}"))
        if not self._answer(last.question, last.scenario):
            self._assistant.history.append(last)  # a retry that was stopped costs nothing

    def _do_save(self, name: str) -> None:
        try:
            print(f"对话已保存：{self._assistant.save_conversation(Path(name) if name else None)}")
        except (UserError, OSError, ValueError) as error:  # a NUL in a file name is a ValueError
            print(printable(f"错误：没有保存：{error}"))

    def _do_load(self, name: str) -> None:
        if not name:
            print("用法：/load 文件")
            return
        try:
            turns = self._assistant.load_conversation(Path(name))
        except (UserError, OSError, ValueError) as error:
            print(printable(f"错误：没有载入：{error}"))
            return
        print(f"已载入 {turns} 轮对话。")
        if self._assistant.last_reply:
            print(printable(f"上一个问题：{self._assistant.last_reply.question}"))

    def _do_clear(self) -> None:
        self._assistant.clear()
        print("对话已清空。")

    def _do_quit(self) -> None:
        raise Quit

    def _choose_scenario(self) -> None:
        ids = [id_ for id_ in self._scenarios if id_ != AUTO]
        print("\n请选择场景：")
        for number, id_ in enumerate(ids, 1):
            print(f"  {number:2}. {self._scenarios[id_]}（{id_}）")
        print(f"   0. {self._scenarios[AUTO]}（{AUTO}）")
        while True:
            line = self._read(f"编号 0–{len(ids)}：")
            if _ALONE.get(line.lower()) == "quit":
                raise Quit
            if chosen := self._named(line):
                self._enter(chosen)
                return
            print(f"请输入 1 到 {len(ids)} 的编号（0 为自动选择），或 quit 退出。")

    def _named(self, text: str) -> str | None:
        """The scenario that a number, an id or a name stands for."""
        ids = [id_ for id_ in self._scenarios if id_ != AUTO]
        if text == "0":
            return AUTO
        if _is_number(text, len(ids)):
            return ids[int(text) - 1]
        return next((id_ for id_, name in self._scenarios.items() if text in (id_, name)), None)

    def _enter(self, scenario: str) -> None:
        self._scenario, self._offered = scenario, ()
        self._announce()

    def _announce(self) -> None:
        hint = "每个问题会按内容选择场景。" if self._scenario == AUTO else "输入 /samples 查看示例问题。"
        print(f"场景：{self._scenarios[self._scenario]}。{hint}")


def line_reader() -> Callable[[str], str]:
    """What reads a line from the user: with editing, history and wide characters at a terminal, plainly elsewhere.

    It raises `Quit` where the input has ended.
    """
    if sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty():
        from prompt_toolkit import PromptSession

        ask = PromptSession().prompt  # the history of this session only; nothing is written to a file
    else:
        ask = input

    def read(prompt: str) -> str:
        try:
            return ask(prompt).strip()
        except EOFError:
            print()
            raise Quit from None
        except (OSError, ValueError):  # stdin was closed, or its terminal has gone
            raise Quit from None

    return read


def batch_row_as_text(scenarios: Mapping[str, str]) -> Callable[[Mapping[str, Any]], str]:
    """What shows an output row of a batch to a reader, with the scenario's name."""

    def as_text(row: Mapping[str, Any]) -> str:
        head = f"—— {row['id']}. [{scenarios.get(row['scenario'], row['scenario'])}] {row['question']}"
        parts = [row.get("answer", ""), f"错误：{row['error']}" if "error" in row else ""]
        return printable("\n".join([head, *filter(None, parts)]) + "\n")

    return as_text


def print_reply(pieces: Iterable[tuple[str, str]], think: str = "show") -> None:
    """Show one reply on stdout."""
    display = Display(think=think)
    try:
        for kind, text in pieces:
            display.piece(kind, text)
    finally:
        display.end()


def _is_number(line: str, largest: int) -> bool:
    """Whether a line is a number from 1; int() itself refuses one of more than 4300 digits."""
    return line.isdecimal() and len(line) < 10 and 1 <= int(line) <= largest


def batch_progress(total: int) -> Any:
    """A progress bar on stderr for a batch."""
    from tqdm import tqdm

    return tqdm(total=total, unit="题", file=sys.stderr, dynamic_ncols=True)


def reading_progress() -> Any:
    """A counter on stderr for rows whose number is not known; nothing for what is done at once."""
    from tqdm import tqdm

    return tqdm(unit="行", desc="读取并检查", file=sys.stderr, dynamic_ncols=True, delay=2, leave=False)
