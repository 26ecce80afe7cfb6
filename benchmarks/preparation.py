"""data.py on a million records: `make bench-data` (about 25 minutes on 2 cores, 15 GB of disk).

    python benchmarks/preparation.py [RECORDS=1000000] [TOKENIZER=.cache/qwen3-tokenizer]    # 0: one core only

- one process over the real sample, many times over: records per second through reading, cleaning, the audit and the
  tokenizer (the floor that the tokenizer alone sets stands beside it);
- `data.py --audit` over synthetic records: sentences of the real sample, shuffled, and of its lengths times `SHARE`, so
  that a million make 1.5 GB. Time, and the
  memory of all its processes together (proportional set size, sampled every five seconds).

Needs the real sample in ../shared/data and Qwen3's tokenizer (the tests build it). Results:
benchmarks/results/preparation.json and docs/data.md.
"""

import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from assistant import put_between, where  # noqa: E402

from prompts import GENERAL_PROMPT, MEDICAL_PROMPTS  # noqa: E402
from qwenmed import checkpoints, files, findings, rows  # noqa: E402
from qwenmed.preparation import CHUNK, Examiner, Plan  # noqa: E402

SAMPLE = ROOT.parent / "shared" / "data" / "medical_r1_sample.jsonl"
RESULTS = ROOT / "benchmarks" / "results" / "preparation.json"
DOCUMENT = ROOT / "docs" / "data.md"
BEGIN, END = "<!-- bench-data: make bench-data -->", "<!-- /bench-data -->"
REPEATS = 100
SHARE = 0.43


def main() -> None:
    """Measure and keep the figures."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    tokenizer = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / ".cache" / "qwen3-tokenizer"
    real = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core is one thread
    results = {"one_core": one_core(real, tokenizer.resolve())}
    if count:
        with tempfile.TemporaryDirectory(dir=ROOT / ".cache") as name:
            results["many"] = many(real, count, tokenizer.resolve(), Path(name))
    else:
        results["many"] = json.loads(RESULTS.read_text(encoding="utf-8"))["many"]
    results |= where()
    files.write_json(RESULTS, results)
    if DOCUMENT.exists():
        put_between(DOCUMENT, BEGIN, END, table(results))
    print(table(results))


def one_core(real: list[dict], tokenizer: Path) -> dict[str, float]:
    """Records per second in one process, and of the tokenizer alone; in turns, the median of the rounds."""
    plan = Plan({}, findings.Limits(), frozenset(), 0.8, None, tokenizer, 2048, GENERAL_PROMPT, tuple(MEDICAL_PROMPTS))
    examiner, backend = Examiner(plan), checkpoints.load_tokenizer(tokenizer).backend_tokenizer
    texts = [f"{GENERAL_PROMPT}{row['question']}{row['think']}{row['answer']}" for row in real]
    all_speeds, tokenizer_speeds = [], []
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "real.jsonl"
        path.write_text(files.to_jsonl(real), encoding="utf-8")
        for _ in range(REPEATS):
            started = time.perf_counter()
            chunk = list(rows.read_rows(path))
            for start in range(0, len(chunk), CHUNK):
                examiner.examine(chunk[start : start + CHUNK])
            all_speeds.append(len(real) / (time.perf_counter() - started))
            started = time.perf_counter()
            backend.encode_batch_fast(texts, add_special_tokens=False)
            tokenizer_speeds.append(len(real) / (time.perf_counter() - started))
    middle = REPEATS // 2
    return {"records_per_second": sorted(all_speeds)[middle], "tokenizer_alone": sorted(tokenizer_speeds)[middle]}


def many(real: list[dict], count: int, tokenizer: Path, folder: Path) -> dict[str, object]:
    """The time and memory of data.py over synthetic records."""
    source = folder / "source.jsonl"
    synthesise(real, count, source)
    command = [sys.executable, ROOT / "data.py", "--source", source, "--tokenizer", tokenizer, "--audit"]
    started, most = time.perf_counter(), 0
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        most = max(most, memory(process.pid))
        time.sleep(5)  # looking takes time from what is measured
    seconds = time.perf_counter() - started
    assert process.stdout is not None
    print(process.stdout.read())
    return {
        "records": count,
        "gigabytes": source.stat().st_size / 1e9,
        "seconds": seconds,
        "peak_memory_gigabytes": most / 1e9,
        "status": process.returncode,
    }


def synthesise(real: list[dict], count: int, target: Path) -> None:
    """Records that take a share of a real one's sentences, from all of the sample."""
    dice = random.Random(0)
    sentences = {name: [each for row in real for each in split(row[name])] for name in ("question", "think", "answer")}
    sizes = [{name: len(split(row[name])) for name in sentences} for row in real]
    with target.open("w", encoding="utf-8") as file:
        for number in range(count):
            size = dice.choice(sizes)
            row = {
                name: "".join(dice.choices(sentences[name], k=max(1, round(SHARE * size[name])))) for name in sentences
            }
            row["question"] = f"第{number}问：{row['question']}"
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def split(text: str) -> list[str]:
    """A text's sentences, with what ends them."""
    return re.findall(r"[^。！？\n]+[。！？\n]*", text) or [text]


def memory(pid: int) -> int:
    """Bytes that a process and its children really take: what they share counts once."""
    total = 0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total


def table(results: dict) -> str:
    """The figures as the page shows them."""
    one, big = results["one_core"], results["many"]
    return "\n".join(
        (
            f"| 测什么（{results['machine']}） | 测得 | 目标 |",
            "|---|---|---|",
            f"| 一个核：读取、清洗、审计、分词 | **{one['records_per_second']:,.0f} 条/秒**（只分词：{one['tokenizer_alone']:,.0f}） | ≥ 600 |",
            f"| {big['records']:,} 条合成记录（{big['gigabytes']:.2f} GB） | **{big['seconds'] / 60:.1f} 分钟** | ≤ 30 |",
            f"| 它的内存峰值，所有进程合计 | **{big['peak_memory_gigabytes']:.2f} GB** | < 1.5 |",
        )
    )


if __name__ == "__main__":
    main()
