"""The real data set's records through data → 20 training steps → inference, with the real Qwen3 tokenizer.

Skipped, and saying so, where the sample does not lie beside the checkout or the vocabulary is not installed.
"""

import json
import shutil
from pathlib import Path

import pytest
from conftest import REAL_SAMPLE, ROOT, run_script

from qwenmed import chat, checkpoints, lengths, records, sources

CACHE = ROOT / ".cache" / "qwen3-tokenizer"

CONTROL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
ADDED = [
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
]  # fmt: skip

pytestmark = pytest.mark.skipif(not REAL_SAMPLE.is_file(), reason=f"the real sample {REAL_SAMPLE} is not here")


def build_real_tokenizer(folder: Path) -> Path:
    """Qwen3's own tokenizer, from the vocabulary that the dashscope package carries; 1.7 s, then cached."""
    if (folder / "tokenizer.json").is_file():
        return folder
    from importlib.resources import files

    dashscope = pytest.importorskip("dashscope", reason="the real Qwen vocabulary (pip install dashscope) is not here")
    pytest.importorskip("tiktoken")
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    from qwenmed.demo import qwen3_chat_template

    vocabulary = str(files(dashscope) / "resources" / "qwen.tiktoken")
    vocab, merges = TikTokenConverter(vocab_file=vocabulary).extract_vocab_merges_from_model(vocabulary)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL], special_tokens=True)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ADDED])
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = qwen3_chat_template()
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    return folder


@pytest.fixture(scope="module")
def real_tokenizer():
    return checkpoints.load_tokenizer(build_real_tokenizer(CACHE))


@pytest.fixture(scope="module")
def found():
    return sources.read_records(REAL_SAMPLE)[0]


@pytest.fixture(scope="module")
def small_model(real_tokenizer, tmp_path_factory):
    """Qwen3's architecture with the true vocabulary of 151,936, hidden 64, two layers, random weights."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("models") / "small"
    config = Qwen3Config(
        vocab_size=151_936, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=40_960, tie_word_embeddings=True,
        eos_token_id=151_645, pad_token_id=151_643,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.95, top_k=20, eos_token_id=[151_645, 151_643], pad_token_id=151_643
    )
    model.save_pretrained(folder)
    real_tokenizer.save_pretrained(folder)
    return folder


def test_token_ids_are_those_of_qwen3(real_tokenizer):
    ids = {token: real_tokenizer.convert_tokens_to_ids(token) for token in (*CONTROL, *ADDED)}
    assert ids["<|endoftext|>"] == 151_643 and ids["<|im_start|>"] == 151_644 and ids["<|im_end|>"] == 151_645
    assert ids["<think>"] == 151_667 and ids["</think>"] == 151_668 and len(real_tokenizer) == 151_669


def test_every_record_trains_thinking_answer_and_end_of_turn_only(real_tokenizer, found):
    chat.check_template(real_tokenizer)
    for record in found:
        ids, labels = chat.render_sample(real_tokenizer, chat.training_row(record, "系统"))
        start = next(i for i, label in enumerate(labels) if label != -100)
        assert all(label == -100 for label in labels[:start]) and labels[start:] == ids[start:]
        assert ids[start] == 151_667 and ids[-2] == 151_645 and ids.count(151_645) == 3
        text = real_tokenizer.decode(ids[start:])
        assert text == records.format_output(record).rstrip("\n") + "<|im_end|>\n" or record.answer.endswith("\n")


def test_overlong_real_records_keep_their_end(real_tokenizer, found):
    rows, report = lengths.fit_rows(real_tokenizer, [(record, "系统") for record in found], 700, "shorten")
    assert report.shortened > 10 and report.whole > 10
    for row, length in zip(rows, report.lengths, strict=True):
        ids, _ = chat.render_sample(real_tokenizer, row)
        assert len(ids) == length <= 700 and ids[-2] == 151_645
        answer = row["completion"][0]["content"]
        assert real_tokenizer.decode(ids).rstrip("\n").endswith(f"</think>\n\n{answer.lstrip()}<|im_end|>")


@pytest.mark.parametrize("script", ["train.py", "train_lora.py"])
def test_data_then_twenty_steps_then_inference(small_model, tmp_path, script, record_property):
    data = run_script("data.py", "--source", REAL_SAMPLE, "--tokenizer", small_model, cwd=tmp_path)
    assert data.status == 0, data.err
    counts = {
        words[0]: words[1] for line in data.out.splitlines() if (words := line.split()) and words[0] in ("train", "val")
    }
    assert counts == {"train": "108", "val": "12"}

    rate = "1e-2" if script == "train_lora.py" else "3e-3"
    done = run_script(
        script, "--model", small_model, "--max-steps", "20", "--batch-size", "1", "--gradient-accumulation-steps", "1",
        "--learning-rate", rate, "--max-length", "640", "--overlong", "shorten", "--logging-steps", "1",
        "--eval-steps", "20", "--sample-tokens", "8", "--output-dir", "run", cwd=tmp_path,
    )  # fmt: skip
    assert done.status == 0, done.err
    run = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in run["log_history"] if "loss" in entry]
    assert len(losses) == 20
    assert losses[0] == pytest.approx(11.93, abs=0.1)  # ln(151,936): an untrained model knows nothing
    assert losses[-1] < losses[0] - (0.5 if script == "train.py" else 0.05)
    record_property("loss_at_steps_1_and_20", (losses[0], losses[-1]))
    print(f"\n{script}: loss at step 1 {losses[0]:.3f}, at step 20 {losses[-1]:.3f}")

    answer = run_script("inference.py", "高血压患者饮食要注意什么？", "-c", "run", "-m", "8", "--json", cwd=tmp_path)
    assert answer.status == 0, answer.err
    reply = json.loads(answer.out)
    assert reply["thinking_tokens"] + reply["answer_tokens"] <= 8 and reply["prompt_tokens"] > 20
