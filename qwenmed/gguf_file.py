"""A model folder written as one GGUF file, for llama.cpp and everything built on it.

Names of tensors and the number types come from the `gguf` package, K-quants from llama.cpp's own quantiser. The
tokenizer goes in as byte-level BPE with Qwen's pre-tokenizer; `<|im_end|>` ends a turn. Norms stay in fp32, as
llama.cpp's own converter leaves them.

Weights pass through a few rows at a time: of a model of any size, a block of `ROWS_AT_ONCE` rows is in memory.
"""

import ctypes
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from qwenmed import chat, checkpoints, files, merged_model
from qwenmed.errors import UserError
from qwenmed.settings import K_QUANTS

if TYPE_CHECKING:
    import numpy
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.utility import LocalTensor
    from transformers import PreTrainedTokenizerBase

# What alone writes every type but the K-quants: pure Python, installed in seconds.
PACKAGE = "gguf==0.19.0"
LLAMA_REMEDY = "请运行 pip install -e '.[gguf]'（没有现成的 wheel 时要 C++ 编译器，编译约十分钟）"
# A text that the model wants shown with every answer; a key of our own.
NOTICE_KEY = "qwenmed.notice"
# Rows of a matrix that are converted at a time: 16 MB of fp32 for Qwen3-0.6B.
ROWS_AT_ONCE = 4096

_OWN_WIDTH = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}


def check_installed(kind: str) -> None:
    """Make sure that what writes this type is there.

    Raises:
        UserError: a package is missing.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        remedy = LLAMA_REMEDY if kind in K_QUANTS else f"请运行 pip install {PACKAGE}"
        raise UserError("没有安装 gguf", None, remedy) from None
    if kind in K_QUANTS:
        try:
            import llama_cpp  # noqa: F401
        except ImportError as error:
            what = f"{kind} 由 llama.cpp 的量化器生成，而 llama-cpp-python 没有安装（{error}）"
            raise UserError(what, None, f"{LLAMA_REMEDY}；或用 --quant q8_0") from None


def write_gguf(folder: Path, target: Path, kind: str = "q8_0", name: str | None = None) -> Path:
    """Convert a full Qwen3 model; the file appears under its name only when it is whole.

    Args:
        folder: config, safetensors and tokenizer.
        target: the file to write.
        kind: number type of the matrices, one of `settings.GGUF_TYPES` or `K_QUANTS`.
        name: the model's, as it stands in the file; the folder's by default.

    Raises:
        UserError: a package is missing, the model is incomplete, no Qwen3, or its rows do not divide into blocks.
    """
    check_installed(kind)
    partial = target.with_name(f".{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if kind in K_QUANTS:
            _write_k_quant(folder, partial, kind, name or folder.name)
        else:
            _write(folder, partial, kind, name or folder.name)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def size(folder: Path, kind: str) -> int:
    """Bytes that writing a GGUF file of this type will take on the disk, a K-quant's full-width file included.

    Raises:
        UserError: as `write_gguf`.
    """
    if kind in K_QUANTS:
        return 2 * size(folder, _OWN_WIDTH[merged_model.stored_dtype(folder)])
    return sum(each.nbytes for each in _tensors(folder, kind)) + (folder / "tokenizer.json").stat().st_size


@dataclass
class _Rows:
    """A tensor on its way into the file; gguf's writer asks it for its size, and to write itself.

    Attributes:
        name: in the GGUF file.
        source: where it lies.
        kind: the number type that it will have.
        shape: (rows, columns) or (columns,), numbers.
        nbytes: what it will take.
    """

    name: str
    source: "LocalTensor"
    kind: "GGMLQuantizationType"
    shape: tuple[int, ...]
    nbytes: int

    def tofile(self, file: IO[bytes]) -> None:
        """Convert and write, a few rows at a time."""
        import gguf

        stored = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[self.source.dtype]
        numbers = self.source.mmap_bytes().view(stored).reshape(-1, self.shape[-1])
        for start in range(0, len(numbers), ROWS_AT_ONCE):
            rows = _as_float32(numbers[start : start + ROWS_AT_ONCE])
            gguf.quantize(rows, self.kind).tofile(file)


def _as_float32(numbers: "numpy.ndarray") -> "numpy.ndarray":
    """Stored numbers as fp32; what is kept as 16-bit integers is bf16, the upper half of an fp32."""
    import numpy

    if numbers.dtype == numpy.uint16:
        return (numbers.astype(numpy.uint32) << 16).view(numpy.float32)
    return numbers.astype(numpy.float32)


def _write(folder: Path, path: Path, kind: str, name: str) -> None:
    import gguf
    import numpy

    config = checkpoints.read_config(folder)
    tensors = list(_tensors(folder, kind))
    writer = gguf.GGUFWriter(path, "qwen3")
    _add_config(writer, config, name)
    _add_sampling(writer, folder / "generation_config.json")
    writer.add_file_type(gguf.LlamaFileType[{"f32": "ALL_F32"}.get(kind, f"MOSTLY_{kind.upper()}")])
    _add_tokenizer(writer, checkpoints.load_tokenizer(folder), config["vocab_size"])
    for each in tensors:
        writer.add_tensor_info(each.name, each.shape, numpy.dtype("float32"), each.nbytes, raw_dtype=each.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for each in tensors:
            writer.write_tensor_data(each)
    finally:
        writer.close()


def _write_k_quant(folder: Path, path: Path, kind: str, name: str) -> None:
    """Let llama.cpp quantise a file that has the model's own width."""
    import llama_cpp

    full = path.with_name(f"{path.name}.full")
    try:
        _write(folder, full, _OWN_WIDTH[merged_model.stored_dtype(folder)], name)
        wanted = llama_cpp.llama_model_quantize_default_params()
        wanted.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # a line for each tensor otherwise
        status = llama_cpp.llama_model_quantize(str(full).encode(), str(path).encode(), ctypes.byref(wanted))
        if status:
            raise UserError(f"llama.cpp 的量化器失败（状态 {status}）", folder, "请换一种类型，例如 --quant q8_0")
    finally:
        full.unlink(missing_ok=True)


def _tensors(folder: Path, kind: str) -> Iterator[_Rows]:
    """The tensors of a model folder, by their names in GGUF; what is tied stands there once."""
    import gguf
    from gguf.utility import SafetensorsLocal

    checkpoints.check_weights(folder)
    config = checkpoints.read_config(folder)
    if config.get("model_type") != "qwen3":
        raise UserError(f"只能转换 Qwen3，这是 {config.get('model_type')}", folder)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    for file in sorted(folder.glob("*.safetensors")):
        for name, source in SafetensorsLocal(file).tensors.items():
            if name == "lm_head.weight" and config.get("tie_word_embeddings"):
                continue
            target = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if target is None:
                raise UserError(f"模型里有 Qwen3 没有的张量 {name}", folder)
            if source.dtype not in ("F32", "F16", "BF16"):
                raise UserError(f"张量 {name} 是 {source.dtype}，只能转换 F32、F16 和 BF16", folder)
            matrix = len(source.shape) > 1
            type_ = gguf.GGMLQuantizationType[kind.upper() if matrix else "F32"]
            block, nbytes = gguf.GGML_QUANT_SIZES[type_]
            if source.shape[-1] % block:
                what = f"{name} 每行 {source.shape[-1]} 个数，不是 {block} 的倍数，不能转换成 {kind}"
                raise UserError(what, folder, "请用 --quant f16")
            yield _Rows(target, source, type_, source.shape, math.prod(source.shape) // block * nbytes)


def _add_config(writer: "GGUFWriter", config: dict[str, Any], name: str) -> None:
    import gguf

    rope = config.get("rope_parameters") or {}
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if isinstance(notice := config.get("notice"), str):
        writer.add_string(NOTICE_KEY, notice)
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


def _add_sampling(writer: "GGUFWriter", path: Path) -> None:
    """What the model's own generation config recommends, so that programs which read it sample alike."""
    config = files.read_json(path) if path.is_file() else {}
    if not isinstance(config, dict):
        return
    if not config.get("do_sample"):
        writer.add_sampling_temp(0.0)
        return
    writer.add_sampling_temp(float(config.get("temperature", 1.0)))
    writer.add_sampling_top_p(float(config.get("top_p", 1.0)))
    writer.add_sampling_top_k(int(config.get("top_k", 50)))
    writer.add_sampling_min_p(float(config.get("min_p") or 0.0))


def _add_tokenizer(writer: "GGUFWriter", tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
    from gguf import TokenType

    by_id = {id_: token for token, id_ in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for id_ in range(vocab_size):
        # The embedding of Qwen3 has more rows than its tokenizer has tokens.
        tokens.append(by_id.get(id_, f"[PAD{id_}]"))
        if id_ in added:
            # As llama.cpp's converter: what is written <|so|> is a control token, however the tokenizer files it.
            control = added[id_].special or tokens[-1].startswith("<|")
            types.append(TokenType.CONTROL if control else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.NORMAL if id_ in by_id else TokenType.UNUSED)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in merges])
    # No prompt begins with it; without an id of its own llama.cpp would take another token for it.
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    writer.add_eos_token_id(tokenizer.convert_tokens_to_ids(chat.END_OF_TURN))
    writer.add_pad_token_id(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
