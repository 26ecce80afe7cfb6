"""The real data set's records as training samples, with the real Qwen3 tokenizer.

Skipped, and saying so, where the sample does not lie beside the checkout or the vocabulary is not installed.
"""

import shutil
from pathlib import Path

import pytest
from conftest import REAL_SAMPLE, ROOT

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
