"""How fast the assistant answers, against the way the tutorials' scripts do it; `make bench-assistant`.

    python benchmarks/assistant.py                    # all three parts, about 20 minutes on 2 cores
    python benchmarks/assistant.py --only rows

Parts, each a ratio of two things measured in one run:
- batch: 64 questions, decoded together, against one after another through fp32 `generate` (the original's way);
  Qwen3-0.6B's shape with random weights. The originals are measured on every fourth question, half of them
  before and half after ours.
- single: one stream from a Q8_0 file through llama.cpp, against the same `generate`, and against llama.cpp
  called without our engine.
- rows: 100,000 rows through `-b` with an engine that answers at once: rows per second and memory.

Results go to benchmarks/results/assistant.json and, as a table, into docs/assistant.md.
"""

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from prompts import MEDICAL_PROMPTS, MEDICAL_SCENARIOS  # noqa: E402
from qwenmed import chat, files  # noqa: E402
from qwenmed.engine import Generation, Prompt, Sampling  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "assistant.json"
PAGE = ROOT / "docs" / "assistant.md"
BEGIN, END = "<!-- bench-assistant: make bench-assistant -->", "<!-- /bench-assistant -->"
PARTS = ("batch", "single", "rows")
GREEDY = Sampling(temperature=0)


def main() -> None:
    """Measure the parts, print the table, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens for each question")
    parser.add_argument("--rows", type=int, default=100_000)
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for part in [args.only] if args.only else PARTS:
        print(f"== {part}", file=sys.stderr, flush=True)
        results[part] = {**{"batch": batch, "single": single, "rows": rows}[part](args), **where()}
        files.write_json(RESULTS, results)
    put_between(PAGE, BEGIN, END, table(results))
    print(table(results))


def where() -> dict:
    """Machine and versions."""
    import torch

    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def random_qwen3(folder: Path):
    """A model of Qwen3-0.6B's shape with random weights and the demo's tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from qwenmed.checkpoints import load_tokenizer
    from qwenmed.demo import build_tokenizer, demo_records

    torch.manual_seed(0)
    texts = [text for record in demo_records() for text in (record.question, record.think, record.answer)]
    build_tokenizer([*texts, *MEDICAL_PROMPTS.values()], folder)
    tokenizer = load_tokenizer(folder)
    config = Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval(), tokenizer


def questions(count: int, tokens: int) -> list[Prompt]:
    """Real prompts of all scenarios."""
    from qwenmed.demo import demo_records

    records = list(itertools.islice(itertools.cycle(demo_records()), count))
    return [Prompt(chat.user_messages(each.question, MEDICAL_PROMPTS[each.scenario]), tokens) for each in records]


def original(model, tokenizer, prompt: Prompt) -> list[int]:
    """The original's way: one question through `generate`."""
    import torch

    ids = torch.tensor([chat.render_prompt(tokenizer, prompt.messages)], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=prompt.max_tokens, do_sample=False,
            eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    return output[0, ids.shape[1] :].tolist()


def batch(args) -> dict:
    """64 questions together against one after another."""
    import torch

    from qwenmed.engine_transformers import BATCH_SIZE, TransformersEngine

    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = random_qwen3(Path(folder))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    prompts = questions(args.questions, args.tokens)
    engine = TransformersEngine(model, tokenizer, GREEDY)
    some = list(range(0, len(prompts), 4))
    original(model, tokenizer, Prompt(prompts[0].messages, 4))  # warm up

    def measure_original(which):
        started = time.perf_counter()
        return {i: original(model, tokenizer, prompts[i]) for i in which}, time.perf_counter() - started

    first, before = measure_original(some[: len(some) // 2])
    started = time.perf_counter()
    ours = list(engine.generate(prompts))
    seconds = time.perf_counter() - started
    second, after = measure_original(some[len(some) // 2 :])
    theirs = {**first, **second}
    same = 0
    for i, ids in theirs.items():
        text = chat.TokenText(tokenizer)
        same += chat.parse_reply("", text.feed(ids) + text.close()) == ours[i].reply
    per_minute = len(prompts) / seconds * 60
    originals = len(theirs) / (before + after) * 60
    new_tokens = sum(each.thinking_tokens + each.answer_tokens for each in ours)
    return {
        "questions": len(prompts), "new_tokens_each": args.tokens, "batch_size": BATCH_SIZE,
        "dtype": str(model.dtype), "same_text": f"{same}/{len(theirs)}",
        "questions_per_minute": round(per_minute, 2), "original_questions_per_minute": round(originals, 2),
        "tokens_per_second": round(new_tokens / seconds, 1),
        "original_tokens_per_second": round(originals / 60 * args.tokens, 1),
        "ratio": round(per_minute / originals, 2),
    }  # fmt: skip


def single(args) -> dict:
    """One stream: llama.cpp Q8_0 through our engine, bare llama.cpp, and fp32 `generate`."""
    import llama_cpp

    from qwenmed.engine_llama import LlamaEngine
    from qwenmed.engine_transformers import TransformersEngine
    from qwenmed.gguf_file import write_gguf

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, tokenizer = random_qwen3(folder)
        model.save_pretrained(folder)
        engine = LlamaEngine(write_gguf(folder, folder / "model-q8_0.gguf"), GREEDY)
    prompt = questions(1, args.tokens)[0]
    transformers_engine = TransformersEngine(model, tokenizer, GREEDY)
    rates: dict[str, list[float]] = {"ours": [], "llama.cpp": [], "original": [], "transformers engine": []}

    def rate(tokens: int, started: float) -> float:
        return tokens / (time.perf_counter() - started)

    for turn in range(4):
        # The tail of the prompt changes, so that nothing is answered from a cache.
        asked = Prompt([*prompt.messages[:-1], {"role": "user", "content": f"{prompt.messages[-1]['content']}{turn}"}],
                       args.tokens)  # fmt: skip
        started = time.perf_counter()
        *_, reply = engine.stream(asked)
        rates["ours"].append(rate(reply.thinking_tokens + reply.answer_tokens, started))
        ids = engine._prompt_ids(asked.messages)
        engine._llama.reset()
        engine._llama.eval(ids[: len(ids) // 2])  # our stream had the first half, the system prompt, cached
        started = time.perf_counter()
        stream = engine._llama.generate(ids, temp=0.0, top_k=20, top_p=0.95, min_p=0.0)
        rates["llama.cpp"].append(rate(len(list(itertools.islice(stream, args.tokens))), started))
        started = time.perf_counter()
        rates["original"].append(rate(len(original(model, tokenizer, asked)), started))
        started = time.perf_counter()
        *_, reply = transformers_engine.stream(asked)
        rates["transformers engine"].append(rate(reply.thinking_tokens + reply.answer_tokens, started))
    middle = {name: sorted(values)[len(values) // 2] for name, values in rates.items()}
    return {
        "new_tokens": args.tokens, "llama_cpp_python": llama_cpp.__version__,
        "tokens_per_second": {name: round(value, 1) for name, value in middle.items()},
        "ratio": round(middle["ours"] / middle["original"], 2),
        "of_llama_cpp": round(middle["ours"] / middle["llama.cpp"], 3),
        "transformers_engine_ratio": round(middle["transformers engine"] / middle["original"], 2),
    }  # fmt: skip


class InstantEngine:
    """Answers at once; what is left is our own work for a row."""

    name, notice, context_length, fingerprint = "instant", "", 4096, "instant"

    def count_tokens(self, messages) -> int:
        """About one token a character."""
        return sum(len(message["content"]) for message in messages)

    def generate(self, prompts):
        """The same reply for everyone."""
        reply = chat.Reply("用户描述的症状没有危险信号，先说明可能原因，再给护理建议。" * 4,
                           "多数情况下与劳累和睡眠不足有关。建议规律作息、适量饮水；若持续超过一周，请到门诊检查。" * 3)  # fmt: skip
        for prompt in prompts:
            yield Generation(reply, "stop", 60, 80, 90, 0.0) if isinstance(prompt, Prompt) else prompt


def rows(args) -> dict:
    """100,000 rows through the batch command with an instant engine, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "questions.jsonl"
        scenarios = list(MEDICAL_SCENARIOS)
        texts = [prompt.messages[-1]["content"] for prompt in questions(100, 1)]
        with source.open("w", encoding="utf-8") as file:
            for i in range(args.rows):
                row = {"id": i, "question": f"{texts[i % 100]}（第{i}位）", "scenario": scenarios[i % len(scenarios)]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        code = (
            "import json, resource, sys, time\n"
            f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'benchmarks')!r}]\n"
            "import medical_assistant, assistant\n"
            "from qwenmed import triage\n"
            "triage.assess('头痛')\n"
            "from qwenmed import commands\n"
            "from qwenmed.batch import Requests\n"
            "from pathlib import Path\n"
            "helper = medical_assistant.MedicalAssistant(engine=assistant.InstantEngine())\n"
            f"source = Path({str(source)!r})\n"
            "import psutil\n"
            "before, started = psutil.Process().memory_info().rss / 2**20, time.perf_counter()\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
            "requests = Requests(source, medical_assistant.MEDICAL_SCENARIOS, 'diagnosis', 2048)\n"
            "status = commands.answer_batch(helper, requests, Path(f'{source}.out.jsonl'))\n"
            "seconds = time.perf_counter() - started\n"
            "print(json.dumps({'seconds': seconds, 'mib_over_start': peak() - before, 'status': status}))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ}
        )
        figures = json.loads(done.stdout.splitlines()[-1])
        written = Path(f"{source}.out.jsonl").read_bytes().count(b"\n")
    return {
        "rows": written, "rows_per_second": round(written / figures["seconds"]),
        "mib_over_start": round(figures["mib_over_start"], 1), "status": figures["status"],
    }  # fmt: skip


def table(results: dict) -> str:
    """The figures and the aims beside each other, as Markdown."""
    lines = ["| 测什么（2 核 CPU） | 测得 | 目标 | 怎么测 |", "|---|---|---|---|"]
    if part := results.get("batch"):
        how = (
            f"每分钟 {part['questions_per_minute']} 题对 {part['original_questions_per_minute']} 题；"
            f"{part['dtype'].removeprefix('torch.')}，每题 {part['new_tokens_each']} 个新 token，"
            f"贪心文字相同 {part['same_text']}"
        )
        lines.append(f"| {part['questions']} 题批量，对逐题 `generate` | **{part['ratio']}×** | ≥ 5× | {how} |")
    if part := results.get("single"):
        rate = part["tokens_per_second"]
        how = f"{rate['ours']} 对 {rate['original']} token/s；直接调用 llama.cpp 为 {rate['llama.cpp']}"
        lines.append(f"| 单题，llama.cpp Q8_0，对 fp32 `generate` | **{part['ratio']}×** | ≥ 2.2× | {how} |")
    if part := results.get("rows"):
        how = f"{part['rows']:,} 行，引擎立即回答；内存比开始时多 {part['mib_over_start']} MiB（目标 < 150）"
        lines.append(f"| 批量本身的开销 | **{part['rows_per_second']:,} 行/秒** | ≥ 2,000 行/秒 | {how} |")
    return "\n".join(lines)


def put_between(page: Path, begin: str, end: str, text: str) -> None:
    """Put a benchmark's table between its marks in a page of the docs."""
    before, rest = page.read_text(encoding="utf-8").split(begin)
    files.write_whole({page: f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"})


if __name__ == "__main__":
    main()
