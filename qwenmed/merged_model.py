"""A checkpoint written as one plain model folder that other programs load: adapter merged, ties kept, both stop tokens.

Three things that trained folders get wrong elsewhere are put right here:
- `generation_config.json` lists every token that ends a turn; with one of them missing, replies never end.
- `config.json` says `use_cache: true`, which a training with activation checkpointing had turned off.
- `config.json` names `rope_theta` at its top level too. transformers 5 writes it inside of `rope_parameters` only, and
  transformers 4 and what is built on it then take 10,000 instead of Qwen3's 1,000,000: gibberish (seen with 4.57.3).
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from qwenmed import chat, checkpoints, files
from qwenmed.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What `--dtype` says, by the names that safetensors and torch use.
DTYPES = {"bf16": ("BF16", "bfloat16"), "fp16": ("F16", "float16"), "fp32": ("F32", "float32")}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}

# Copied, not written anew: what trained is what serves.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


def write_merged(checkpoint: checkpoints.Checkpoint, folder: Path, dtype: str) -> None:
    """Write weights, configuration and tokenizer into an existing folder.

    Args:
        checkpoint: a full model, or an adapter with its base; an adapter is merged in fp32.
        dtype: of the written weights, a key of `DTYPES`.

    Raises:
        UserError: something of the checkpoint is missing or broken.
    """
    import torch

    wanted = getattr(torch, DTYPES[dtype][1])
    model, tokenizer = checkpoints.load(checkpoint, torch.float32 if checkpoint.base else wanted)
    model = model.to(wanted)
    _set_generation_config(model, tokenizer)
    model.save_pretrained(folder)
    mend_config(folder / "config.json")
    for name in TOKENIZER_FILES:
        if (source := checkpoints.tokenizer_folder(checkpoint) / name).is_file():
            shutil.copyfile(source, folder / name)
    _forget_this_machine(folder / "tokenizer_config.json")


def stored_dtype(folder: Path) -> str:
    """The number type of a model folder's matrices, a key of `DTYPES`; of several the widest."""
    found = {each.get_dtype() for _, each in checkpoints.tensor_slices(folder) if len(each.get_shape()) > 1}
    known = {stored: name for name, (stored, _) in DTYPES.items()}
    return max((known.get(each, "fp32") for each in found), key=lambda name: (BYTES[name], name))


def size(checkpoint: checkpoints.Checkpoint, dtype: str) -> int:
    """Bytes that the merged weights will take."""
    return checkpoints.count_parameters(checkpoint.base or checkpoint.path) * BYTES[dtype]


def check_base(checkpoint: checkpoints.Checkpoint) -> str:
    """Make sure, before anything is loaded, that an adapter's base is the one that it was trained on.

    Returns:
        What could not be checked, to be told, or "".

    Raises:
        UserError: a matrix has another shape, or the weights are not those that the run has recorded.
    """
    if checkpoint.base is None:
        return ""
    remedy = "请用 --base-model 指定训练时所用的基础模型"
    if wrong := _wrong_shape(checkpoint):
        raise UserError(f"基础模型 {checkpoint.base} 不是这个适配器的：{wrong}", checkpoint.path, remedy)
    recorded = checkpoint.card.get("base_weights_sha256")
    if not isinstance(recorded, str):
        return "这个适配器没有记录基础模型的哈希，只核对了各层的形状"
    if checkpoints.weights_sha256(checkpoint.base) != recorded:
        what = f"基础模型 {checkpoint.base} 的权重与训练时的不同（哈希不一致）"
        raise UserError(what, checkpoint.path, remedy)
    return ""


def _wrong_shape(checkpoint: checkpoints.Checkpoint) -> str | None:
    """The first of an adapter's matrices that its base has no fitting place for, in words."""
    assert checkpoint.base is not None
    base = checkpoints.tensor_shapes(checkpoint.base)
    for name, shape in checkpoints.tensor_shapes(checkpoint.path).items():
        layer, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
        if not layer:
            continue
        there = base.get(f"{layer}.weight")
        if there is None:
            return f"它没有 {layer}"
        # lora_A is (rank, in), lora_B (out, rank); the weight is (out, in).
        ours, theirs = (shape[1], there[1]) if part.startswith("A") else (shape[0], there[0])
        if ours != theirs:
            return f"{layer} 应为 {ours} 维，而它是 {theirs} 维"
    return None


def _set_generation_config(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    config = model.generation_config
    configured = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    # The end of the turn first: programs that read only one id read the first.
    end = tokenizer.convert_tokens_to_ids(chat.END_OF_TURN)
    ids = chat.stop_ids(tokenizer, [*configured, tokenizer.eos_token_id])
    config.eos_token_id = sorted(ids, key=lambda id_: (id_ != end, id_))
    config.pad_token_id = tokenizer.pad_token_id
    config.use_cache = True


def _forget_this_machine(path: Path) -> None:
    """Drop what transformers notes of how a tokenizer was loaded here."""
    config = json.loads(files.read_text(path))
    files.write_json(path, {name: value for name, value in config.items() if name not in _LOADING})


_LOADING = ("is_local", "local_files_only")


def mend_config(path: Path) -> None:
    """Let a config.json that was written in a training say what other programs need: the cache, and `rope_theta`."""
    config = json.loads(files.read_text(path))
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    files.write_json(path, config | {"use_cache": True} | ({} if theta is None else {"rope_theta": theta}))
