"""Ten thousand corrupted lines of forty kinds among good ones: none crashes, each is reported, no good row is lost."""

import json
import random
import subprocess
import sys

import pytest
from conftest import ROOT, run_script
from test_data import rows_of
from test_findings import some_rows


def text(**changes):
    return json.dumps(
        {"question": "头痛怎么办？", "think": "想", "answer": "请休息。", **changes}, ensure_ascii=False
    ).encode()


WHOLE = text()
# Kind → a line without its end. Each must be reported with its file and line.
CORRUPTED = {
    "cut in a string": WHOLE[:20],
    "cut before the brace": WHOLE[:-1],
    "cut in a name": b'{"quest',
    "cut in a character": WHOLE[:16],
    "one brace": b"{",
    "one bracket": b"[",
    "one quote": b'"',
    "two objects": WHOLE + WHOLE,
    "something behind": WHOLE + b" x",
    "single quotes": b"{'question': 'q', 'answer': 'a'}",
    "no quotes": b"{question: q, answer: a}",
    "trailing comma": b'{"question": "q", "answer": "a",}',
    "comment": b"// a comment",
    "csv line": b"q,t,a",
    "html": b"<html><body>502 Bad Gateway</body></html>",
    "bad escape": b'{"question": "\\x41", "answer": "a"}',
    "bare control character": b'{"question": "a\x01b", "answer": "a"}',
    "a number": b"5",
    "a text": b'"question"',
    "a list": b"[1, 2]",
    "null": b"null",
    "true": b"true",
    "NaN alone": b"NaN",
    "empty object": b"{}",
    "other fields": b'{"a": 1, "b": 2}',
    "no answer": b'{"question": "q", "think": "t"}',
    "blank question": b'{"question": "  ", "answer": "a"}',
    "answer is null": b'{"question": "q", "answer": null}',
    "answer is NaN": b'{"question": "q", "answer": NaN}',
    "answer is a list": b'{"question": "q", "answer": ["a"]}',
    "question is a number": b'{"question": 5, "answer": "a"}',
    "think is an object": b'{"question": "q", "think": {}, "answer": "a"}',
    "field twice": b'{"question": "q", "question": "r", "answer": "a"}',
    "NUL": WHOLE.replace(b"\xe5\xa4\xb4", b"\x00"),
    "NULs only": b"\x00" * 50,
    "invalid UTF-8": WHOLE.replace(b"\xe5\xa4\xb4", b"\xff\xfe"),
    "GBK": WHOLE.decode().encode("gbk"),
    "UTF-16": WHOLE.decode().encode("utf-16-le").replace(b"\n", b""),
    "half a surrogate pair": b'{"question": "\\ud83d", "answer": "a"}',
    "nested 1,000 deep": b'{"question": "q", "answer": "a", "x": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    "nested 100,000 deep": b"[" * 100_000,
    "number of 5,000 digits": b'{"question": ' + b"1" * 5000 + b"}",
    "unfinished thinking": b'{"question": "q", "answer": "<think>t"}',
    "conversation without an answer": b'{"messages": [{"role": "user", "content": "q"}]}',
}


@pytest.fixture(scope="module")
def corrupted(tmp_path_factory):
    """The file, the line numbers of what is broken, and the good rows."""
    assert len(CORRUPTED) >= 40
    folder, dice = tmp_path_factory.mktemp("corrupted"), random.Random(0)
    good = [json.dumps(row, ensure_ascii=False).encode() for row in some_rows(500)]
    kinds = [kind for kind in CORRUPTED if "100,000" not in kind]  # 100 kB a line: a few are enough
    lines = [(CORRUPTED[kinds[i % len(kinds)]], False) for i in range(10_000)] + [(line, True) for line in good]
    lines += [(CORRUPTED["nested 100,000 deep"], False)] * 3
    dice.shuffle(lines)
    lines.insert(100, (b'{"question": "q", "answer": "' + b"a" * 50_000_000 + b'"}', False))
    lines = [(b"\xef\xbb\xbf" + good[0], True), *(each for each in lines if each[0] != good[0]), (b"{}", False)]
    with (folder / "in.jsonl").open("wb") as file:
        for line, _ in lines:
            file.write(line + dice.choice((b"\n", b"\r\n")))
    return folder, [number for number, (_, is_good) in enumerate(lines, 1) if not is_good], good


def test_each_corrupted_line_is_reported_and_every_good_row_is_kept(corrupted):
    folder, broken, good = corrupted
    done = run_script("data.py", "--source", "in.jsonl", "--audit", cwd=folder)
    assert done.status == 3 and "Traceback" not in done.err, done.err[-2000:]
    written = rows_of(folder / "train.jsonl") + rows_of(folder / "val.jsonl")
    assert sorted(row["question"] for row in written) == sorted(json.loads(row)["question"] for row in good)
    dropped = rows_of(folder / "dropped.jsonl")
    assert len(dropped) == len(broken) >= 10_000
    assert [int(row["place"].removeprefix("in.jsonl:")) for row in dropped] == broken
    assert all(row["reason"] for row in dropped)
    assert f"无效 {len(broken):,}" in done.out and "另有" in done.err


def test_line_of_50_megabytes_takes_no_memory_of_its_size(corrupted):
    resource = pytest.importorskip("resource")  # not on Windows
    folder, _, _ = corrupted
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from qwenmed import rows\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "count = sum(1 for _ in rows.read_rows(Path('in.jsonl')))\n"
        "print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], cwd=folder, capture_output=True, text=True, check=True
    )
    count, kilobytes = map(int, done.stdout.split())
    assert count > 10_000 and kilobytes < 45_000 * (1 if resource and sys.platform != "darwin" else 1024)


@pytest.mark.parametrize("kind", CORRUPTED)
def test_reason_fits_the_kind(kind, tmp_path):
    """A file of one good row and one broken row; the reasons are read by people."""
    from qwenmed import sources

    path = tmp_path / "a.jsonl"
    path.write_bytes(WHOLE + b"\n" + CORRUPTED[kind] + b"\n")
    found, problems = sources.read_records(path)
    assert len(found) == 1 and [problem.place for problem in problems] == [f"{path}:2"]
    words = {
        "NUL": "NUL", "NULs only": "NUL", "invalid UTF-8": "UTF-8", "GBK": "UTF-8", "UTF-16": "NUL",
        "half a surrogate pair": "代理对", "field twice": "question 出现两次", "nested 100,000 deep": "嵌套过深",
        "no answer": "缺少 answer", "a list": "应为一个 JSON 对象", "other fields": "认不出这种格式",
    }  # fmt: skip
    assert words.get(kind, "") in problems[0].reason, problems[0]


def test_good_rows_of_odd_looks_are_kept(tmp_path):
    from qwenmed import sources

    odd = [
        b"\xef\xbb\xbf" + WHOLE, WHOLE + b"\r", b"  " + WHOLE + b"\t", text(think=None), text(extra=[1, {"x": None}]),
        text(answer="\u2028\u0085 行"), text(question="x" * 100_000), WHOLE.replace(b"}", b', "f1": NaN}'),
        WHOLE.replace(b"}", b', "f1": -Infinity}'), text(answer="\\n"), b'{"question": "\\ud83d\\ude00", "answer": "a"}',
    ]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n\n".join(odd) + b"\n\n")
    found, problems = sources.read_records(path)
    assert len(found) == len(odd) and not problems
