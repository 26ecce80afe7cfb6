"""Exporting a model of Qwen3-0.6B's shape: time, memory, and llama.cpp's own converter on the same weights.

    python benchmarks/export.py                     # about 15 minutes on 2 cores, most of it self-tests

Random weights in bf16, the real tokenizer. Each export is a process of its own, timed from its start to its end,
imports included; its peak memory is what the kernel counted for it.
- merged, GGUF f16 and q8_0 without the self-test;
- `convert_hf_to_gguf.py` from the source package of llama-cpp-python, on the same folder and types, and how many
  tensors are the same, byte for byte;
- the same two GGUF files with the self-test, read by llama.cpp; its tables are kept.

Results go to benchmarks/results/export.json and into docs/exporting.md.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

from assistant import put_between, where  # noqa: E402
from true_shape import build_true_shape  # noqa: E402

from qwenmed import files  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "export.json"
DOCUMENT = ROOT / "docs" / "exporting.md"
BEGIN, END = "<!-- bench-export: make bench-export -->", "<!-- /bench-export -->"
SOURCES = ROOT / ".cache" / "llama-cpp-sources"
LLAMA_CPP = "llama-cpp-python==0.3.36"
TYPES = ("f16", "q8_0")
TOKENS = 32
LAUNCHER = """
import os, subprocess, sys
_, status, used = os.wait4(subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL).pid, 0)
print(used.ru_maxrss)
sys.exit(status != 0)
"""


def main() -> None:
    """Measure and keep the figures."""
    with tempfile.TemporaryDirectory(dir=ROOT / ".cache") as name:
        folder = Path(name)
        model = build_true_shape(folder / "Qwen3-0.6B-random")
        results = {"merged": export(model, folder, "merged", "--no-self-test")}
        for kind in TYPES:
            results[kind] = export(model, folder, "gguf", "--quant", kind, "--no-self-test")
            ours = next((folder / f"out-gguf-{kind}").glob("*.gguf"))
            theirs, seconds = convert(model, folder, kind)
            results[kind] |= {"converter_seconds": seconds, **same_tensors(ours, theirs)}
        for kind in TYPES:
            tested = export(model, folder, "gguf", "--quant", kind, "--force", "--self-test-tokens", str(TOKENS))
            told = json.loads((folder / f"out-gguf-{kind}" / "export.json").read_text(encoding="utf-8"))
            results[kind] |= {"seconds_with_self_test": tested["seconds"], "self_test": told["self_test"]}
    results |= {"largest_tensor_mib": round(151_936 * 1024 * 2 / 2**20), **where()}
    files.write_json(RESULTS, results)
    put_between(DOCUMENT, BEGIN, END, table(results))
    print(table(results))


def export(model: Path, folder: Path, to: str, *options: str) -> dict:
    """One run of export.py: seconds and peak memory."""
    kind = f"-{options[1]}" if to == "gguf" else ""
    command = [sys.executable, ROOT / "export.py", "-c", model, "--to", to, "-o", folder / f"out-{to}{kind}", *options]
    started = time.perf_counter()
    # Started by a small process: the kernel counts to a child what its parent held when it was forked.
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *command], cwd=folder, stdout=subprocess.PIPE, text=True, check=True
    )
    return {"seconds": round(time.perf_counter() - started, 1), "peak_mib": int(done.stdout.split()[-1]) // 1024}


def convert(model: Path, folder: Path, kind: str) -> tuple[Path, float]:
    """llama.cpp's own converter: its file, and its seconds."""
    script = next(iter(SOURCES.glob("*/vendor/llama.cpp/convert_hf_to_gguf.py")), None)
    if script is None:
        SOURCES.mkdir(parents=True, exist_ok=True)
        # Only the archive is wanted; that pip can't prepare it for building does not matter.
        command = ["-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", LLAMA_CPP]
        subprocess.run([sys.executable, *command, "-d", SOURCES], check=False, capture_output=True)
        with tarfile.open(next(SOURCES.glob("*.tar.gz"))) as archive:
            archive.extractall(SOURCES, filter="data")
        script = next(SOURCES.glob("*/vendor/llama.cpp/convert_hf_to_gguf.py"))
    packages = SOURCES / "packages"  # it imports sentencepiece for any tokenizer
    if not packages.exists():
        install = ["-m", "pip", "install", "--quiet", "--target", packages, "sentencepiece"]
        subprocess.run([sys.executable, *install], check=True)
    target = folder / f"theirs-{kind}.gguf"
    started = time.perf_counter()
    command = [sys.executable, script, model, "--outfile", target, "--outtype", kind]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(packages)})
    return target, round(time.perf_counter() - started, 1)


def same_tensors(ours: Path, theirs: Path) -> dict:
    """How many tensors are the same, byte for byte, by name; and which keys of the header differ."""
    import gguf
    import numpy

    here, there = gguf.GGUFReader(ours), gguf.GGUFReader(theirs)
    mine = {each.name: each for each in here.tensors}
    same = sum(
        each.name in mine
        and mine[each.name].tensor_type == each.tensor_type
        and numpy.array_equal(mine[each.name].data, each.data)
        for each in there.tensors
    )
    keys = sorted(
        key
        for key in {*here.fields, *there.fields}
        if not key.startswith("GGUF.")
        and (
            key not in here.fields
            or key not in there.fields
            or here.fields[key].contents() != there.fields[key].contents()
        )
    )
    return {"tensors": len(there.tensors), "tensors_ours": len(mine), "same_tensors": int(same), "other_keys": keys}


def table(results: dict) -> str:
    """The figures as Markdown."""
    lines = [
        f"形状为 Qwen3-0.6B、权重随机（bf16）、真正的词表；{results['machine']}，没有 GPU。每次导出是一个单独的进程，时间含启动和导入。",
        "",
        "| 导出 | 秒 | 目标 | 内存峰值 MiB | llama.cpp 自己的转换器，秒 | 相同的张量 |",
        "|---|---|---|---|---|---|",
        f"| merged（bf16） | **{results['merged']['seconds']}** | ≤ 20 | {results['merged']['peak_mib']:,} | | |",
    ]
    limit = 1.3 * results["largest_tensor_mib"] + 500e6 / 2**20
    for kind, goal in (("f16", ""), ("q8_0", "≤ 25")):
        found = results[kind]
        lines.append(
            f"| GGUF {kind} | **{found['seconds']}** | {goal} | {found['peak_mib']:,}（目标 ≤ {limit:,.0f}） "
            f"| {found['converter_seconds']} | {found['same_tensors']}/{found['tensors']} |"
        )
    lines += [
        "",
        f"自检，llama.cpp，8 条回复各 {TOKENS} token（随机权重的分布很平，两个 token 常常并列，回复不会自己结束）：",
        "",
        "| 类型 | 含自检共几秒 | 提示相同 | 文字相同 + 并列处分开 | 贪心 token 相同 + 并列 | 平均 KL | 最大 KL |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in TYPES:
        tested = results[kind]["self_test"]
        lines.append(
            f"| {kind} | {results[kind]['seconds_with_self_test']} | {tested['same_prompts']}/8 "
            f"| {tested['same_texts']} + {tested['tied_texts']} / 8 "
            f"| {tested['same_tokens']} + {tested['tied_tokens']} / {tested['tokens']} "
            f"| {tested['mean_kl']:.2g} | {tested['largest_kl']:.2g} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
