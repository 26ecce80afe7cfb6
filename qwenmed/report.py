"""The report of an evaluation: report.json for programs, report.html for people, the pictures beside them.

The page is one file: pictures and styles are inside of it, it asks no other host for anything, and texts of models
and data sets are escaped. report.html is made of what stands in report.json and of the pictures, nothing else.
"""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenmed import bootstrap, files, pages, plots
from qwenmed.comparison import BY_SCENARIO
from qwenmed.measures import BY_KEY

PAGE = Path(__file__).parent / "report_page" / "report.html.jinja"
REPORT_JSON, REPORT_HTML, PREDICTIONS = "report.json", "report.html", "predictions.jsonl"

VERDICTS = {
    bootstrap.BETTER: ("better", "更好 better"),
    bootstrap.WORSE: ("worse", "更差 worse"),
    bootstrap.NO_DIFFERENCE: ("same", "看不出差别 no difference shown"),
    None: ("plain", "不论好坏"),
}
ENDINGS = {"stop": "自己结束", "length": "到了长度上限", "think_budget": "思考被收尾", "repetition": "重复，被停止"}


def write(folder: Path, report: Mapping[str, Any], histories: Mapping[str, Any], lengths: Mapping[str, Any]) -> None:
    """Write report.json, the pictures and report.html into a folder.

    Args:
        report: the numbers, as they stand in report.json.
        histories: loss histories by model.
        lengths: as `Comparison.lengths`.
    """
    pictures = draw(report, histories, lengths)
    for name, picture in pictures.items():
        plots.write(folder / f"{name}.png", picture)
    page = render(report, pictures)
    files.write_whole(
        {
            folder / REPORT_JSON: json.dumps(report, ensure_ascii=False, indent=2) + "\n",
            folder / REPORT_HTML: page,
        }
    )


def draw(report: Mapping[str, Any], histories: Mapping[str, Any], lengths: Mapping[str, Any]) -> dict[str, bytes]:
    """The pictures that there are numbers for, by name."""
    pictures = {}
    for key, by_scenario in report["scenarios"].items():
        if len(by_scenario) > 1:
            axis = {"perplexity_answer": "perplexity of the reference answer", "chrf": "chrF"}
            pictures[f"scenarios_{key}"] = plots.scenario_bars(by_scenario, axis.get(key, "share of right choices"))
    if histories:
        pictures["losses"] = plots.losses(histories)
    if any(any(by_model.values()) for by_model in lengths.values()):
        pictures["lengths"] = plots.length_histograms(lengths)
    return pictures


def render(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The page."""
    encoded = {name: base64.b64encode(picture).decode() for name, picture in pictures.items()}
    return pages.render(
        PAGE,
        {"figure": figure, "signed": lambda value, unit: figure(value, unit, signed=True)},
        report=report,
        pictures=encoded,
        verdicts=VERDICTS,
        endings=ENDINGS,
        scenario_names={key: BY_KEY[key].name for key in BY_SCENARIO},
        summary=summary(report),
    )


def summary(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each model but the baseline: the names of the measures by verdict."""
    found = []
    for model in [each["label"] for each in report["models"][1:]]:
        by_verdict: dict[str, list[str]] = {bootstrap.BETTER: [], bootstrap.WORSE: [], bootstrap.NO_DIFFERENCE: []}
        for measure in report["measures"]:
            verdict = measure["differences"].get(model, {}).get("verdict")
            if verdict:
                by_verdict[verdict].append(measure["name"])
        found.append({"model": model, **{VERDICTS[verdict][0]: names for verdict, names in by_verdict.items()}})
    return found


def figure(value: float | None, unit: str, signed: bool = False) -> str:
    """A number for a person: three significant digits; shares in percent, differences of shares in points."""
    if value is None:
        return "—"
    value = value * 100 if unit == "%" else value
    size = abs(value)
    digits = 0 if size >= 1000 else 1 if size >= 100 or unit == "%" else 2 if size >= 0.1 or not size else 4
    text = f"{value:+,.{digits}f}" if signed else f"{value:,.{digits}f}"
    return f"{text.replace('-', '−')}{'pp' if signed and unit == '%' else unit}"


def as_text(report: Mapping[str, Any]) -> str:
    """The summary table for a terminal, as Markdown."""
    models = [each["label"] for each in report["models"]]
    lines = ["| 指标 | " + " | ".join(models) + " |", "|---|" + "---|" * len(models)]
    for measure in report["measures"]:
        cells = []
        for model in models:
            estimate, difference = measure["estimates"].get(model), measure["differences"].get(model)
            cell = interval(estimate, measure["unit"]) if estimate else "—"
            if difference and difference["verdict"]:
                cell += f"；{VERDICTS[difference['verdict']][1].split()[0]}"
            cells.append(cell)
        lines.append(f"| {measure['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def interval(estimate: Mapping[str, Any], unit: str) -> str:
    """An estimate with its 95 % interval, where it has one."""
    text = figure(estimate["value"], unit)
    if estimate["low"] is None:
        return text
    return f"{text} [{figure(estimate['low'], unit)}, {figure(estimate['high'], unit)}]"
