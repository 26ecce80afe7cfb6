"""The READMEs agree with each other and with the repository; tests/readme runs what they say."""

import json
import re

import pytest
from conftest import ROOT
from readme_commands import READMES, all_commands, commands_of, without_comment

# Pages that another change brings; take them out of here when they are there.
COMING: set[str] = set()


def text_of(file):
    return (ROOT / file).read_text(encoding="utf-8")


def test_every_command_can_be_verified():
    assert not [(command.file, command.text) for command in all_commands() if command.way is None]


def test_both_languages_tell_the_same_commands_in_the_same_order():
    chinese, english = ([command.bare for command in commands_of(file)] for file in READMES)
    assert chinese == english


def test_both_languages_have_the_same_structure():
    def shape(file):
        prose = re.sub(r"^```.*?^```", "", text_of(file), flags=re.M | re.S)
        kinds = [re.match(r"(#+ |\||- |>|!\[)", line) for line in prose.splitlines()]
        return [found[1] for found in kinds if found]

    assert shape("README.md") == shape("README_EN.md")


def test_readme_can_be_read_in_one_go():
    assert all(text_of(file).count("\n") <= 172 for file in READMES)


@pytest.mark.parametrize("file", READMES)
def test_first_screen_has_picture_disclaimer_and_the_two_commands(file):
    first = text_of(file)[: text_of(file).index("make test")]
    assert "docs/images/chat-desktop.png" in first and "make demo" in first
    assert "立即拨打120" in first and "12356" in first and "\n> **" in first


@pytest.mark.parametrize("file", READMES)
def test_powershell_is_allowed_to_activate(file):
    # By default Windows runs no script, and activate is one.
    (told,) = re.findall(r"^```powershell\n(.*?)^```", text_of(file), re.M | re.S)
    assert "Set-ExecutionPolicy" in told[: told.index("\\activate")]


@pytest.mark.parametrize("file", READMES)
def test_every_memory_figure_says_whether_it_was_measured(file):
    section = text_of(file).split("| 1.7B LoRA |")[0].rpartition("\n## ")[2]
    assert re.search(r"\*\*(计算值|computed)\*\*", section), "the figures of the table are computed, and it must say so"
    measured = [line for line in text_of(file).splitlines() if re.search(r"\d\.\d+ GB", line)]
    assert measured and all(re.search("实测|measured", line, re.I) for line in measured)


def test_urgency_figures_are_those_of_the_last_measurement():
    sets = json.loads(text_of("benchmarks/results/triage.json"))["sets"]
    page = text_of("docs/safety.md").replace("**", "")
    for name in ("heldout", "heldout_wide", "heldout_fields"):
        found = sets[name]
        kinds = ("recall", "false_alarms", "unnoticed", "recall_of_urgent")
        figures = " | ".join(f"{100 * found[kind]:.1f}%" for kind in kinds)
        emergencies = sum(found["confusion"]["emergency"].values())
        row = rf"\| {name}：.* \| {found['questions']}（{emergencies}） \| {figures} \|"
        assert re.search(row, page), row
    speeds = [found["questions_per_second"] for found in sets.values()]
    told = f"{round(min(speeds), -2):,}–{round(max(speeds), -2):,}"
    assert f"每秒约 {told} 题" in page and f"({told} a second" in page, told


PAGES = [*READMES, "SECURITY.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text_of(page), flags=re.S)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, heading = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        known = file.resolve().relative_to(ROOT).as_posix()
        assert file.exists() or known in COMING, (page, target)
        if heading and file.exists():
            found = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", each.lower()).strip().replace(" ", "-") for each in found}
            assert heading in anchors, (page, target, anchors)


@pytest.mark.parametrize("page", PAGES)
def test_rows_of_a_table_have_the_cells_of_its_head(page):
    # A | ends a cell even inside of code, unless a backslash stands before it.
    cells = 0
    for line in re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S).splitlines():
        found = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not cells or found in (0, cells), (page, line)
        cells = found


def test_version_that_a_page_tells_to_install_is_the_pinned_one():
    pinned = {*re.findall(r"[\w.-]+==[\d.]+", text_of("requirements.txt") + text_of("pyproject.toml"))}
    names = {pin.partition("==")[0] for pin in pinned}
    told = {(page, pin) for page in PAGES for pin in re.findall(r"[\w.-]+==\d[\d.]*\d", text_of(page))}
    assert {("README.md", "gguf==0.19.0"), ("README_EN.md", "gguf==0.19.0")} <= told
    assert not [(page, pin) for page, pin in told if pin.partition("==")[0] in names and pin not in pinned]


def test_requirements_can_be_read_by_the_pip_of_a_chinese_windows():
    # Python 3.11's own pip decodes the file in the system's code page (GBK) unless its first lines name an encoding.
    first_two = (ROOT / "requirements.txt").read_bytes().split(b"\n")[:2]
    assert any(re.match(rb"#.*coding[:=]\s*utf-8", line) for line in first_two)


def test_comment_ends_a_command_only_outside_of_quotes():
    assert without_comment("make demo    # all of it") == "make demo"
    assert without_comment("""curl -d '{"a": "b # c"}'  # asked""") == """curl -d '{"a": "b # c"}'"""
    assert without_comment("# nothing but words") == ""
