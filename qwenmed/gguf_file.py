"""A model folder written as one GGUF file, for llama.cpp and everything built on it.

Names of tensors come from the `gguf` package's own table for Qwen3. The tokenizer goes in as byte-level BPE with
Qwen's pre-tokenizer; `<|im_end|>` ends a turn. Norms stay in fp32, as llama.cpp's own converter leaves them.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenmed import checkpoints
from qwenmed.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

TYPES = ("f32", "f16", "bf16", "q8_0")


def write_gguf(folder: Path, target: Path, kind: str = "q8_0") -> Path:
    """Convert a full Qwen3 model; the file appears under its name only when it is whole.

    Args:
        folder: config, safetensors and tokenizer.
        target: the file to write.
        kind: number type of the matrices, one of `TYPES`.

    Raises:
        UserError: the `gguf` package is missing, the model is incomplete or no Qwen3.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("没有安装 gguf", None, "请运行 pip install -e '.[gguf]'") from None
    checkpoints.check_weights(folder)
    config = checkpoints.read_config(folder)
    if config.get("model_type") != "qwen3":
        raise UserError(f"只能转换 Qwen3，这是 {config.get('model_type')}", folder)
    partial = target.with_name(f".{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(partial, "qwen3")
    try:
        _add_config(writer, config, folder.name)
        _add_tokenizer(writer, checkpoints.load_tokenizer(folder), config["vocab_size"])
        _add_tensors(writer, folder, config["num_hidden_layers"], kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _add_config(writer: "GGUFWriter", config: dict[str, Any], name: str) -> None:
    rope = config.get("rope_parameters") or {}
    writer.add_name(name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta") or 1_000_000.0)


def _add_tokenizer(writer: "GGUFWriter", tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
    from gguf import TokenType

    by_id = {id_: token for token, id_ in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for id_ in range(vocab_size):
        # The embedding of Qwen3 has more rows than its tokenizer has tokens.
        tokens.append(by_id.get(id_, f"[PAD{id_}]"))
        if id_ in added:
            types.append(TokenType.CONTROL if added[id_].special else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.NORMAL if id_ in by_id else TokenType.UNUSED)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in merges])
    writer.add_eos_token_id(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    writer.add_pad_token_id(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def _add_tensors(writer: "GGUFWriter", folder: Path, blocks: int, kind: str) -> None:
    import gguf
    from safetensors import safe_open

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, blocks)
    matrices = gguf.GGMLQuantizationType[kind.upper()]
    written = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  no iterator
                target = names.get_name(name, try_suffixes=(".weight", ".bias"))
                if target is None:
                    raise UserError(f"模型里有 Qwen3 没有的张量 {name}", folder)
                if target in written:
                    continue
                written.add(target)
                tensor = weights.get_tensor(name).float().numpy()
                dtype = matrices if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
                writer.add_tensor(target, gguf.quantize(tensor, dtype), raw_dtype=dtype)
