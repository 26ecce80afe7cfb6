"""The commands of README.md and README_EN.md: taken out of their code blocks, and how each is verified.

A command that no entry of `WAYS` knows has no way to be verified, and fails the tests.
"""

import ast
import re
from dataclasses import dataclass

from conftest import ROOT

READMES = ("README.md", "README_EN.md")
SHELL, PYTHON = ("bash", "powershell"), "python"

# What verifies a command, by what it looks like; the first that fits counts. See tests/readme/test_commands_run.py.
WAYS = [
    (r"make [\w-]+", "make_target"),
    (r"pip install -r \S+", "requirements"),
    (r"pip install -e '\.\[[\w,-]+\]'", "extras"),
    (r"Set-ExecutionPolicy -Scope Process -Force \w+", "execution_policy"),
    (r"\.venv\\Scripts\\activate", "windows_activate"),
    (r"source \.venv/bin/activate", "activate"),
    (r"python -m venv \.venv", "make_environment"),
    (r"(\(cd \S+ && )?(ollama|vllm) .+", "printed_by_export"),
    (r"curl .+", "asked_of_the_server"),
    (r"python serve\.py.*", "server"),
    (r"python medical_assistant\.py(?!.* (-q|-b) ).*", "conversation"),
    (r"python \w+\.py.*", "script"),
]


@dataclass(frozen=True)
class Command:
    """What a reader is told to run.

    Attributes:
        language: "python" for a block of code, otherwise the shell.
        text: verbatim, comments included; a line that goes on after a backslash is one command.
        bare: without its comment.
        file: the README it stands in.
    """

    language: str
    text: str
    bare: str
    file: str

    @property
    def way(self) -> str | None:
        """The name of what verifies it, or None."""
        if self.language == PYTHON:
            return "scenario_example" if "MEDICAL_SCENARIOS[" in self.text else "code"
        return next((name for pattern, name in WAYS if re.fullmatch(pattern, self.bare, re.DOTALL)), None)


def commands_of(file: str) -> list[Command]:
    """The commands of one README, in its order; a Python block is one."""
    found = []
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / file).read_text(encoding="utf-8"), re.M | re.S):
        if language == PYTHON:
            found.append(Command(language, block, ast.unparse(ast.parse(block)), file))
            continue
        assert language in SHELL, f"{file}: commands are in bash, powershell or python blocks, not {language}"
        for line in re.sub(r"\\\n", "\0", block).splitlines():
            text = line.replace("\0", "\\\n")
            if bare := without_comment(text):
                found.append(Command(language, text, bare, file))
    return found


def all_commands() -> list[Command]:
    """Those of all READMEs, each once."""
    once: dict[str, Command] = {}
    for file in READMES:
        for command in commands_of(file):
            once.setdefault(command.bare, command)
    return list(once.values())


def without_comment(text: str) -> str:
    """A line of shell without its comment: what follows a # that stands after a blank, outside of quotes."""
    quote = ""
    for place, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "#" and (place == 0 or text[place - 1].isspace()):
            return text[:place].strip()
    return text.strip()
