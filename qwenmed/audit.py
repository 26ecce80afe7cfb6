"""The audit of a data set: what was found, in audit.json for programs, in audit.html for people, and in a few lines.

Every number is a count over the rows of this run; the examples are the first that were met. Texts of the data set
stand in the page, escaped: mind who may read it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenmed import files, findings, pages
from qwenmed.collection import DECONTAMINATED, DUPLICATE, INVALID, Collection
from qwenmed.controls import display_width

PAGE = Path(__file__).parent / "audit_page" / "audit.html.jinja"
AUDIT_JSON, AUDIT_HTML = "audit.json", "audit.html"
BARS = 20
REASONS = {
    INVALID: "无效",
    DUPLICATE: "重复",
    DECONTAMINATED: "与评估集重叠",
    **{check.key: check.title for check in findings.CHECKS},
}


def summary(
    collection: Collection,
    parts: Mapping[str, Sequence[int]],
    settings: Mapping[str, Any],
    titles: Mapping[str, str],
    unit: str,
) -> dict[str, Any]:
    """The audit as it stands in audit.json.

    Args:
        parts: the numbers of the records in each part ("train", "val").
        settings: the options of the run.
        titles: the scenarios' titles.
        unit: what lengths are counted in.
    """
    tally, records = collection.tally, len(collection)
    return {
        "settings": dict(settings),
        "sources": [
            {"file": path, "rows": count, "schema": tally.schemas.get(path) or "认不出"}
            for path, count in tally.read.items()
        ],
        "rows": tally.read.total(),
        "records": records,
        "parts": {name: len(numbers) for name, numbers in parts.items()},
        "dropped": [{"kind": kind, "reason": REASONS[kind], "count": count} for kind, count in tally.dropped.items()],
        "masked": dict(tally.masked),
        "checks": [
            {
                "key": check.key,
                "title": check.title,
                "count": tally.found[check.key],
                "share": tally.found[check.key] / records if records else 0,
                "advice": check.advice,
                "done": _done(check, settings),
                "examples": [{"place": place, "text": text} for place, text in tally.examples.get(check.key, [])],
            }
            for check in findings.CHECKS
        ],
        "unit": unit,
        "lengths": {name: lengths(collection.lengths, part, settings) for name, part in parts.items()},
        "scenarios": [
            {"id": name, "title": titles.get(name, name or "看不出"), "count": count}
            for name, count in tally.scenarios.most_common()
        ],
        "suggested": tally.suggested,
    }


def lengths(every: Sequence[int], part: Sequence[int], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Median, 95th percentile, longest, how many are too long, and a histogram of BARS equal steps.

    Args:
        every: the lengths of all records.
        part: the numbers of those that count; not empty.
    """
    import numpy  # which holds five million numbers in a fraction of what a list takes

    values = numpy.sort(numpy.asarray(every)[numpy.asarray(part)])
    longest = int(values[-1])
    step = max(1, -(-longest // BARS))
    return {
        "count": len(values),
        "median": round(float(numpy.median(values))),
        "p95": int(values[min(len(values) - 1, int(0.95 * len(values)))]),
        "longest": longest,
        "over": int((values > settings["max_length"]).sum()),
        "bars": [
            {"from": i * step, "to": (i + 1) * step - 1, "count": int(count)}
            for i, count in enumerate(numpy.bincount(values // step))
        ],
    }


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """Write audit.json and audit.html."""
    page = pages.render(PAGE, {"count": "{:,}".format, "percent": "{:.1%}".format, "shown": _shown}, report=report)
    text = json.dumps(report, ensure_ascii=False, indent=2, default=str) + "\n"
    # A path on the command line need be no text either; JSON's own escape is the same as Python's.
    texts = {folder / AUDIT_JSON: text, folder / AUDIT_HTML: page}
    files.write_whole({path: files.encodable(text) for path, text in texts.items()})


def as_text(report: Mapping[str, Any]) -> str:
    """The report of a run for a terminal."""
    counts = dict.fromkeys((REASONS[INVALID], REASONS[DUPLICATE]), 0)
    counts |= {each["reason"]: each["count"] for each in report["dropped"]}
    lost = "，".join(f"{reason} {count:,}" for reason, count in counts.items())
    kept = sum(report["parts"].values())
    rows, records = report["rows"], report["records"]
    made = "" if rows == records else f"，得到 {records:,} 条记录"
    lines = [f"读到 {rows:,} 行{made}：{lost}，可用 {kept:,}"]
    for check in report["checks"]:
        if check["count"]:
            done = f"（{check['done']}）" if check["done"] else ""
            lines.append(f"  {check['title']}：{check['count']:,} 条，{check['share']:.1%}{done}")
    if report["masked"]:
        lines.append("  个人信息：" + "，".join(f"{kind} {count:,}" for kind, count in report["masked"].items()))
    named = "、".join(f"{each['title']} {each['count']:,}" for each in report["scenarios"])
    guessed = f"（其中 {report['suggested']:,} 条由问题推测）" if report["suggested"] else ""
    lines.append(f"场景{guessed}：{named}")
    over = f"超过 {report['settings']['max_length']}"
    lines += [f"长度（完整对话，{report['unit']}）：", _row("", "条数", "中位数", "p95", "最长", over)]
    for name, each in report["lengths"].items():
        over = each["over"] if report["unit"] == "token" else "未知"
        lines.append(_row(name, each["count"], each["median"], each["p95"], each["longest"], over))
    return "\n".join(lines)


def _shown(value: object) -> str:
    """A setting as a person reads it."""
    if isinstance(value, bool):
        return "是" if value else "否"
    if isinstance(value, dict):
        value = [f"{name}={each}" for name, each in value.items()]
    text = "、".join(map(str, value)) if isinstance(value, list) else str(value or "")
    return text or "–"


def _done(check: findings.Check, settings: Mapping[str, Any]) -> str:
    if check.key in settings["drop"]:
        return "已丢弃"
    if check.key == "personal_data" and settings["redact"]:
        return "已遮住"
    return check.done


def _row(*cells: object) -> str:
    """A table row whose columns stay in line."""
    return "".join(" " * (11 - display_width(cell)) + cell for cell in map(str, cells))
