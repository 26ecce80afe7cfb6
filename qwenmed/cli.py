"""What every command line shares: options from settings, signals, exit status.

Exit status: 0 done, 2 the user can mend it, 3 done but some rows failed, 130 Ctrl-C, 143 SIGTERM.
"""

import argparse
import codecs
import contextlib
import dataclasses
import errno
import locale
import os
import signal
import sys
import types
import typing
import warnings
from collections.abc import Callable, Collection, Sequence

from qwenmed import processes
from qwenmed.controls import printable
from qwenmed.errors import UserError

EXIT_OK = 0
EXIT_USER_ERROR = 2
EXIT_SOME_ROWS_FAILED = 3
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception, so that no `except Exception` swallows it."""


class Parser(argparse.ArgumentParser):
    """argparse with a one-line error; its usage block hides the line that matters.

    Attributes:
        general: the group of options that every script has.
    """

    general: argparse._ArgumentGroup

    def error(self, message: str) -> typing.NoReturn:
        """Say what is wrong in one line and leave with status 2."""
        self.exit(EXIT_USER_ERROR, printable(f"错误：{message}。用 {self.prog} --help 查看用法\n"))


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows each default once, and none where there is none."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        bare = (None, argparse.SUPPRESS, False, True)
        plain = any(action.default is value for value in bare) or action.default == [] or not action.option_strings
        if isinstance(action.default, list) and not plain:
            return f"{text}（默认 {' '.join(map(str, action.default))}）"
        return text if plain or "%(default)" in text else f"{text}（默认 %(default)s）"


def build_parser(prog: str, doc: str, arguments: str = "[选项]") -> Parser:
    """A parser whose description is the script's docstring; `arguments` stand in its usage line."""
    parser = Parser(
        prog=prog,
        usage=f"{prog} {arguments}".rstrip(),
        description=doc.strip(),
        formatter_class=lambda prog: _HelpFormatter(prog, max_help_position=32, width=100),
        add_help=False,
        allow_abbrev=False,
    )
    parser.general = parser.add_argument_group("通用")
    parser.general.add_argument("-h", "--help", action="help", help="显示本帮助")
    return parser


def setting(
    default: object,
    help: str,
    group: str,
    *,
    choices: Sequence[str] | None = None,
    short: str | None = None,
    metavar: str | None = None,
) -> typing.Any:
    """A dataclass field that is an option too: its default, help text and help group."""
    meta = {"help": help, "group": group, "choices": choices, "short": short, "metavar": metavar}
    return dataclasses.field(default=default, metadata=meta)


def field_type(settings: type, name: str) -> tuple[type, bool]:
    """The plain type of a settings field and whether None is allowed, e.g. `int | None` → (int, True)."""
    hint = typing.get_type_hints(settings)[name]
    if isinstance(hint, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        return members[0], True
    return hint, False


def add_settings(parser: argparse.ArgumentParser, settings: type, leave_out: Collection[str] = ()) -> None:
    """Add an option for each field of a settings dataclass, grouped as its metadata says.

    An option that is not given leaves nothing in the namespace, so that a YAML file or a model's own
    recommendation can stand between the default and the command line.
    """
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in dataclasses.fields(settings):
        if field.name in leave_out:
            continue
        meta = field.metadata
        group = groups.get(meta["group"]) or parser.add_argument_group(meta["group"])
        groups[meta["group"]] = group
        plain_type, _ = field_type(settings, field.name)
        text = (
            meta["help"]
            if field.default is None or field.default is False
            else f"{meta['help']}（默认 {_shown(field.default)}）"
        )
        text = text.replace("%", "%%")
        names = [meta["short"], "--" + field.name.replace("_", "-")]
        names = [name for name in names if name]
        if plain_type is dict:
            group.add_argument(
                *names, nargs="+", action=_Pairs, default=argparse.SUPPRESS, metavar="NAME=VALUE", help=text
            )
        elif plain_type is bool:
            action = argparse.BooleanOptionalAction if field.default else "store_true"
            group.add_argument(*names, action=action, default=argparse.SUPPRESS, help=text)
        else:
            group.add_argument(
                *names,
                type=plain_type,
                choices=meta["choices"],
                default=argparse.SUPPRESS,
                metavar=None if meta["choices"] else meta["metavar"] or _METAVARS.get(plain_type, "TEXT"),
                help=text,
            )


class _Pairs(argparse.Action):
    """NAME=VALUE words as a dictionary; the values are read as YAML reads them: 5 is a number, true is true."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: typing.Any,
        option_string: str | None = None,
    ) -> None:
        """Add the pairs to those of earlier occurrences of the option."""
        import yaml

        found = dict(getattr(namespace, self.dest, {}))
        for word in values:
            name, sign, value = word.partition("=")
            if not name or not sign:
                parser.error(f"{option_string} 的形式是 NAME=VALUE，而不是 {word!r}")
            try:
                found[name.replace("-", "_")] = yaml.safe_load(value)
            except yaml.YAMLError:
                parser.error(f"{option_string} {name} 的值读不懂：{value!r}")
        setattr(namespace, self.dest, found)


def given(args: argparse.Namespace, settings: type) -> dict[str, typing.Any]:
    """What the command line gave of the fields that `add_settings` made options of."""
    names = (field.name for field in dataclasses.fields(settings))
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


_METAVARS = {int: "N", float: "X", str: "TEXT"}


def _shown(default: object) -> str:
    return "开" if default is True else str(default)


def positive_int(text: str) -> int:
    """Argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("必须是不小于 1 的整数")
    return value


positive_int.__name__ = "正整数"  # argparse names the type in its message


# A context holds some ten thousand characters; beyond this it is the wrong file or an endless device.
LONGEST_INPUT = 10_000_000


def read_stdin(what: str) -> str:
    """What is piped in: UTF-8, or the encoding of this machine's own pipes. Never half of it: a rule looks for words.

    Raises:
        UserError: more than any context holds, in another encoding, or its words were lost on the way.
    """
    data = sys.stdin.buffer.read(LONGEST_INPUT + 1) if sys.stdin else b""
    if len(data) > LONGEST_INPUT:
        raise UserError(f"标准输入里的{what}超过 {LONGEST_INPUT // 1_000_000} MB", None, "请检查管道的来源")
    marked = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    for encoding in (marked, locale.getpreferredencoding(False)):
        with contextlib.suppress(UnicodeDecodeError, LookupError):
            text = data.decode(encoding)
            break
    else:
        remedy = "请把文件另存为 UTF-8；在 Windows 上用管道之前先运行 chcp 65001"
        raise UserError(f"标准输入里的{what}不是 UTF-8 编码", None, remedy)
    if text.isascii() and text.count("?") > sum(map(str.isalnum, text)):  # what Windows PowerShell makes of Chinese
        remedy = "在 PowerShell 里先运行 $OutputEncoding = [Text.Encoding]::UTF8"
        raise UserError(f"标准输入里的{what}只剩下问号", None, remedy)
    return text


def run(main: Callable[[], int | None]) -> typing.NoReturn:
    """Run a script's main and leave with the house's exit status; a traceback means a bug of ours."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore", FutureWarning)  # deprecations concern the pins, not the user
    stream: typing.Any
    for stream in (sys.stdout, sys.stderr):
        # Chinese Windows consoles default to GBK and a pipe there too; our output is UTF-8 everywhere.
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    with contextlib.suppress(AttributeError, ValueError):
        stream = sys.stdin
        stream.reconfigure(errors="replace")  # one wrong byte in a question must not end the conversation
    with contextlib.suppress(ValueError, AttributeError):
        signal.signal(signal.SIGTERM, _raise_terminated)
    with contextlib.suppress(ValueError, AttributeError):  # Windows has no SIGHUP
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup has it ignored
            signal.signal(signal.SIGHUP, _raise_terminated)  # the terminal has gone: what was asked to be saved is
    status = _guarded(main)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    sys.exit(status)


# Set before any of the libraries is imported: no telemetry, and no warnings and bars besides our own.
_QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def _guarded(main: Callable[[], int | None]) -> int:
    try:
        return main() or EXIT_OK
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("\n已中断（Ctrl-C）", file=sys.stderr)  # noqa: T201
        return EXIT_INTERRUPTED
    except Terminated:
        with contextlib.suppress(OSError):  # a terminal that has gone takes no words
            print("已收到终止信号（SIGTERM）", file=sys.stderr)  # noqa: T201
        return EXIT_TERMINATED
    except BrokenPipeError:
        # The reader (`| head`) has left. Point stdout at nothing, so that the interpreter's own flush
        # at exit does not complain a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except OSError as error:
        if error.errno in _OS_REASONS:
            return _fail(str(explain_os_error(error)))
        raise


def _fail(message: str) -> int:
    which = "" if processes.is_first() else f"[进程 {processes.number()}] "
    with contextlib.suppress(OSError):
        print(printable(f"{which}错误：{message}"), file=sys.stderr)  # noqa: T201
    return EXIT_USER_ERROR


_OS_REASONS: dict[int, tuple[str, str | None]] = {
    errno.ENOSPC: ("磁盘空间已满", "请清理磁盘或换一个输出目录；已有文件保持原样"),
    errno.EDQUOT: ("磁盘配额已满", "请清理磁盘或换一个输出目录；已有文件保持原样"),
    errno.EROFS: ("文件系统是只读的", "请换一个可写的输出目录"),
    errno.EACCES: ("没有访问权限", "请检查文件和目录的权限，或换一个目录"),
    errno.EPERM: ("没有操作权限", "请检查文件和目录的权限，或换一个目录"),
    errno.EEXIST: ("同名的文件挡住了要建立的目录", "请换一个目录，或移走这个文件"),
    errno.ENOTDIR: ("路径中有一段不是目录", "请检查路径"),
    errno.EISDIR: ("路径是目录而不是文件", "请检查路径"),
    errno.ENAMETOOLONG: ("路径过长", "请换一个较短的路径"),
    errno.EIO: ("读写出错，终端可能已经关闭", "请检查终端或磁盘"),
    errno.EFBIG: ("文件超过系统允许的大小", "请换一个输出目录"),
}


def explain_os_error(error: OSError) -> UserError:
    """An operating-system error in the user's words; falls back to the system's own text."""
    what, remedy = _OS_REASONS.get(error.errno or 0, (f"系统错误：{error.strerror or error}", None))
    return UserError(what, error.filename, remedy)


def _raise_terminated(signum: int, frame: object) -> None:
    raise Terminated


def note(message: str) -> None:
    """Say a decision or a step, once, on stderr (stdout is for results)."""
    if processes.is_first():
        print(printable(message), file=sys.stderr, flush=True)  # noqa: T201
