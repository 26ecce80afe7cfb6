"""The perplexity of eval.py: does it agree with a plain computation, how long does it take, does memory grow?

    python benchmarks/evaluation.py               # 3 to 8 minutes on 2 cores; needs ../shared/data

On 120 real records with the real Qwen3 vocabulary and a random model of hidden size 256 (4 layers):
- agreement: the largest relative difference of any row's loss from a plain one – one row at a time, whole logits,
  fp32;
- seconds for the 120 rows, against the plain computation in the same run;
- peak memory at 24 and at 96 rows, each in a process of its own.

Results go to benchmarks/results/evaluation.json.
"""

import json
import multiprocessing
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

from assistant import where  # noqa: E402
from conftest import REAL_SAMPLE  # noqa: E402
from test_real_sample import CACHE, build_real_tokenizer  # noqa: E402

from prompts import GENERAL_PROMPT  # noqa: E402
from qwenmed import chat, checkpoints, files, scoring, sources  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "evaluation.json"


def main() -> None:
    """Measure and keep the figures."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        few, many = pool.map(peak_memory, [24, 96], chunksize=1)
    results = {**agreement(), "peak_mib_24_rows": few, "peak_mib_96_rows": many, **where()}
    files.write_json(RESULTS, results)
    print(json.dumps(results, ensure_ascii=False, indent=2))


def model_and_references():
    """The random model, and the 120 records as it is scored on them."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = checkpoints.load_tokenizer(build_real_tokenizer(CACHE))
    config = Qwen3Config(
        vocab_size=151_936, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    found = sources.read_records(REAL_SAMPLE)[0]
    rows = [chat.training_row(record, GENERAL_PROMPT) for record in found]
    return Qwen3ForCausalLM(config).eval(), [scoring.reference(tokenizer, row) for row in rows]


def peak_memory(rows: int) -> int:
    """The process's peak after so many rows, in MiB above what the loaded model takes."""
    model, references = model_and_references()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak so far, of the loading, is forgotten
    before = _peak_kib()
    for _ in scoring.score_references(model, references[:rows]):
        pass
    return round((_peak_kib() - before) / 1024)


def _peak_kib() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def agreement() -> dict:
    """Ours against the plain computation."""
    model, references = model_and_references()
    started = time.perf_counter()
    ours = list(scoring.score_references(model, references))
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    theirs = [plain(model, each) for each in references]
    plain_seconds = time.perf_counter() - started
    worst = max(
        abs(one - other) / other
        for found, losses in zip(ours, theirs, strict=True)
        for one, other in zip((found.thinking_nll, found.answer_nll), losses, strict=True)
    )
    return {
        "rows": len(references),
        "tokens": sum(len(each.ids) for each in references),
        "largest_relative_difference": worst,
        "seconds": round(seconds, 2),
        "seconds_plain": round(plain_seconds, 2),
    }


def plain(model, reference) -> tuple[float, float]:
    """Thinking's and answer's losses of one row, from its whole logits in fp32."""
    import torch

    ids = torch.tensor([list(reference.ids)])
    with torch.no_grad():
        shares = torch.log_softmax(model(input_ids=ids).logits[0].float(), dim=-1)
    losses = -shares[:-1].gather(1, ids[0, 1:, None])[:, 0].double()
    return tuple(float(sum(losses[place - 1] for place in span)) for span in reference.spans)


if __name__ == "__main__":
    main()
