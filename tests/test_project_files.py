"""What stands beside the code: licence, citation, changelog and hooks say the same as pyproject.toml."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml
from conftest import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]

# https://www.apache.org/licenses/LICENSE-2.0.txt
APACHE_SHA256 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def pinned(package):
    """The version of a package in the dev extra."""
    (version,) = (pin.partition("==")[2] for pin in PROJECT["optional-dependencies"]["dev"] if pin.startswith(package))
    return version


def test_licence_is_the_unmodified_apache_text():
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_SHA256
    assert " ".join(read("LICENSE").split()).startswith("Apache License Version 2.0, January 2004")
    assert "APPENDIX: How to apply the Apache License to your work." in read("LICENSE")
    assert PROJECT["license"] == "Apache-2.0" and PROJECT["license-files"] == ["LICENSE"]


def test_citation_names_this_version_its_licence_and_the_report_of_qwen3():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["title"] and citation["authors"]
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]
    (report,) = citation["references"]
    assert report["identifiers"][0]["value"] == "arXiv:2505.09388" and report["url"].endswith("/2505.09388")


def test_newest_section_of_the_changelog_is_this_version():
    newest = re.search(r"^## (.+)$", read("CHANGELOG.md"), re.MULTILINE)[1]
    assert f"[{PROJECT['version']}]" in newest


def test_hooks_run_the_ruff_that_lint_runs():
    hooks = {repo["repo"]: repo for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]}
    ruff = hooks["https://github.com/astral-sh/ruff-pre-commit"]
    assert ruff["rev"] == f"v{pinned('ruff')}"
    assert [hook["id"] for hook in ruff["hooks"]] == ["ruff-check", "ruff-format"]


def test_contributors_are_told_of_every_make_target_and_of_every_slow_suite():
    makefile, page = read("Makefile"), read("docs/contributing.md")
    targets = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[1].split()
    assert not [target for target in targets if not re.search(rf"`(make )?{target}`", page)]
    suites = re.findall(r"--ignore (tests/\w+)", makefile)
    assert suites and not [suite for suite in suites if f"`{suite}`" not in page]


def test_lint_checks_types_with_a_pinned_mypy():
    assert pinned("mypy") and "-m mypy" in read("Makefile")
    assert {"qwenmed", "*.py"} <= set(PYPROJECT["tool"]["mypy"]["files"])


needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


def stand_in(path, version):
    """A Python that says it is of this version; what it is to run with `-m` it only names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    code = (
        f"import sys; sys.version_info = {version}; exec(sys.argv[2]) if sys.argv[1] == '-c' else print(sys.argv[2:])"
    )
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    return path


def make_environment(folder, python):
    """`make .venv/.ready` in a copy of what it reads."""
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", f"PYTHON={python}", ".venv/.ready"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", check=False)


@needs_make
def test_python_that_is_too_old_is_named_before_an_environment_is_made(tmp_path):
    done = make_environment(tmp_path, stand_in(tmp_path / "python", (3, 10, 12)))
    assert done.returncode == 2 and not done.stdout and not (tmp_path / ".venv").exists()
    assert "需要 Python 3.11" in done.stderr and "3.10" in done.stderr
    assert "make PYTHON=/路径/python3.11 .venv/.ready" in done.stderr


@needs_make
@pytest.mark.parametrize(
    ("there", "made"), [((3, 10, 12), "['venv', '--clear', '.venv']"), ((3, 11, 0), "['venv', '.venv']")]
)
def test_environment_is_made_anew_only_where_its_python_is_too_old(tmp_path, there, made):
    stand_in(tmp_path / ".venv" / "bin" / "python", there)
    done = make_environment(tmp_path, stand_in(tmp_path / "python", (3, 12, 1)))
    assert done.returncode == 0 and made in done.stdout, done.stderr
