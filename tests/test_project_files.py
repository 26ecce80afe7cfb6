"""What stands beside the code: licence, citation, changelog and hooks say the same as pyproject.toml."""

import hashlib
import re
import tomllib

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


def test_lint_checks_types_with_a_pinned_mypy():
    assert pinned("mypy") and "-m mypy" in read("Makefile")
    assert {"qwenmed", "*.py"} <= set(PYPROJECT["tool"]["mypy"]["files"])
