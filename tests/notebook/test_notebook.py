"""train.ipynb: the committed copy is clean, and a fresh copy runs from its first cell to its last, offline."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from execute import execute

from prompts import SAMPLE_QUESTIONS
from qwenmed import triage

NOTEBOOK = ROOT / "train.ipynb"

# /home/somebody/… or C:\…, but not what stands behind a word, a tag or a colon: train/val, </td>, https://…
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<])/[A-Za-z_][\w.-]*/[\w.-]+|\b[A-Za-z]:\\\w")


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder in which a copy of the notebook has been executed."""
    folder = tmp_path_factory.mktemp("notebook")
    execute(Path(shutil.copy(NOTEBOOK, folder)), HF_HUB_OFFLINE="1")
    return folder


@pytest.fixture(scope="module")
def executed(workplace):
    return nbformat.read(workplace / NOTEBOOK.name, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook, tag):
    (cell,) = (cell for cell in notebook.cells if tag in cell.metadata.get("tags", []))
    return cell


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def texts(notebook):
    """Everything that the cells have put out, pictures aside."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            yield from (text for kind, text in output.get("data", {}).items() if not kind.startswith("image/"))
            yield output.get("text", "")


def test_exactly_one_cell_holds_the_choice_of_the_model(committed):
    assigning = [cell for cell in code_cells(committed) if re.search(r"^MODEL\b.*=", cell.source, re.MULTILINE)]
    assert assigning == [tagged(committed, "model-choice")]
    assert tagged(committed, "model-choice").source.count("\n") == 0
    others = [cell.source for cell in code_cells(committed) if cell not in assigning]
    assert not [source for source in others if re.search(r"""["']demo["']|Qwen/""", source)]


@pytest.mark.parametrize("which", ["committed", "executed"])
def test_no_output_holds_an_absolute_path(which, request):
    for text in texts(request.getfixturevalue(which)):
        assert str(ROOT) not in text and str(Path.home()) not in text and not ABSOLUTE_PATH.search(text), text


@pytest.mark.parametrize("which", ["committed", "executed"])
def test_every_cell_has_run_once_in_order_without_an_error(which, request):
    cells = code_cells(request.getfixturevalue(which))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert not [
            output for output in cell.outputs if output.output_type == "error" or output.get("name") == "stderr"
        ]


def test_the_committed_copy_is_small_and_knows_nothing_of_when_it_ran(committed):
    assert NOTEBOOK.stat().st_size < 1_000_000
    assert not any("execution" in cell.metadata for cell in committed.cells)


def test_the_loss_falls(workplace):
    run = json.loads((workplace / "notebook_run" / "output" / "demo-full" / "run.json").read_text(encoding="utf-8"))
    assert run["status"] == "finished"
    assert run["metrics"]["last_loss"] < 0.1 * run["metrics"]["first_loss"]


def test_an_emergency_is_answered_by_the_fixed_text_first(executed):
    urgency = triage.assess(SAMPLE_QUESTIONS["emergency"][1])
    fixed = triage.emergency_text(urgency)
    assert fixed and printed(tagged(executed, "emergency")).startswith(fixed)


def test_everything_is_written_below_its_own_folder(workplace, executed):
    assert sorted(path.name for path in workplace.iterdir()) == ["notebook_run", NOTEBOOK.name]
