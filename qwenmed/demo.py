"""The embedded default: 100 records, a tokenizer trained from them and a tiny untrained Qwen3.

It goes through exactly the code that Qwen3-0.6B goes through. What makes it different is data in its
folder: `config.json` carries a notice that every script shows with its answers, and
`recommended_training.yaml` carries the settings that suit training from nothing.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwenmed import files
from qwenmed.records import Record
from qwenmed.sources import read_clean_records
from qwenmed.yaml_settings import RECOMMENDATION_FILE

DEMO_DATA = Path(__file__).parent / "demo_data"
DEMO_MODEL = "demo"

NOTICE = (
    "【演示模型】这个小模型只背下了随项目附带的少量记录，用来演示流程；它不懂医学，"
    "它的回答不是医疗建议，也不能据此作任何决定。"
)

VOCAB_SIZE = 4096

# In the order of their ids in Qwen3's own tokenizer (151643 …); the second group is not "special", so that
# the think tags survive decoding.
CONTROL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
ADDED_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip

# Qwen3's own way of cutting text before byte-level BPE (from its tokenizer.json).
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

RECOMMENDED_TRAINING = """\
# 演示模型从随机权重开始训练，需要比微调大得多的学习率和更多轮数；命令行和 --config 优先于这里。
full:
  learning_rate: 2.0e-3
  epochs: 14
  batch_size: 8
  gradient_accumulation_steps: 1
  save_total_limit: 1
  best_by: last  # 它是在背诵：验证损失必然上升，最后的检查点才是背下来的那个
"""


def demo_records() -> list[Record]:
    """The bundled records, ten a scenario, in the order of their files."""
    return read_clean_records(DEMO_DATA)


def build_demo_model(folder: Path, prompts: Iterable[str] = ()) -> Path:
    """Write tokenizer, config and random weights of the demo model as a model folder.

    The folder appears under its name only when it is complete. The same call gives the same weights.

    Args:
        prompts: the system prompts, so that the tokenizer knows their words as well.
    """
    import torch
    from transformers import GenerationConfig, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    texts = [text for record in demo_records() for text in (record.question, record.think, record.answer)]
    tokenizer = build_tokenizer([*texts, *prompts], partial)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(demo_config(len(tokenizer), tokenizer))
    # Greedy: what was learnt by heart should come out as it was learnt.
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=2048,
    )
    model.save_pretrained(partial)
    files.write_whole({partial / RECOMMENDATION_FILE: RECOMMENDED_TRAINING})
    if folder.exists():
        shutil.rmtree(folder)
    partial.replace(folder)
    return folder


def demo_config(vocab_size: int, tokenizer: Any) -> Any:
    """Qwen3's architecture at a few million parameters, embeddings tied as in Qwen3-0.6B."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        dtype="float32",
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        notice=NOTICE,
    )


def build_tokenizer(texts: list[str], folder: Path, vocab_size: int = VOCAB_SIZE) -> Any:
    """Train a byte-level BPE with Qwen3's special tokens and chat template, and save it into `folder`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.NFC()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learner.decoder = decoders.ByteLevel()
    learner.train_from_iterator(
        ["system\n", "user\n", "assistant\n"] * 2 + texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(CONTROL_TOKENS) - len(ADDED_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            max_token_length=12,  # bytes: at most four Chinese characters, so that no sentence becomes one token
            show_progress=False,
        ),
    )
    learned = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=learned["vocab"], merges=[tuple(pair) for pair in learned["merges"]])
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS], special_tokens=True
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED_TOKENS])
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = qwen3_chat_template()
    tokenizer.model_max_length = 4096
    tokenizer.save_pretrained(folder)
    return tokenizer


def qwen3_chat_template() -> str:
    """Qwen3's chat template, from the copy that TRL ships."""
    from importlib.resources import files as package_files

    return (package_files("trl") / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
