"""Checkpoints: finding them, telling full models from adapters, loading them, describing them.

The trainer writes `trainer_state.json` last: a checkpoint where it is missing or cut off was not finished and
is never chosen by `latest`, `best` or `--resume`. `checkpoint.json` beside the weights says how they were made.
"""

import hashlib
import json
import math
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenmed import chat, files
from qwenmed.errors import UserError
from qwenmed.hub import missing_model_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CARD_FILE = "checkpoint.json"
STATE_FILE = "trainer_state.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
GGUF = ".gguf"


@dataclass(frozen=True)
class Checkpoint:
    """A folder that answers can come from.

    Attributes:
        path: the folder.
        base: for a LoRA adapter the folder of its base model, otherwise None.
        card: what the checkpoint says of itself; empty for a model that was not trained here.
        notice: a text to be shown with every answer of this model, or "".
    """

    path: Path
    base: Path | None
    card: dict[str, Any]
    notice: str

    @property
    def kind(self) -> str:
        """What it is, in the user's words."""
        return "LoRA 适配器" if self.base else "完整模型"


def find(spec: str, output_root: Path = Path("output"), base_model: Path | None = None) -> Checkpoint:
    """The checkpoint that `-c` names: `latest`, `best`, a checkpoint, a model folder or a run's folder.

    Args:
        spec: what the user gave.
        output_root: where runs lie.
        base_model: where an adapter's base model lies now, if it has moved.

    Raises:
        UserError: there is none, or it lacks weights, tokenizer or its base model.
    """
    if spec in ("latest", "best"):
        path = newest_run_checkpoint(output_root, spec)
    else:
        path = Path(spec)
        if not path.exists():
            raise UserError("检查点不存在", path, _available(output_root))
        if not path.is_dir():
            raise UserError(
                "检查点应是目录，而这是一个文件", path, "请给出含 config.json 或 adapter_config.json 的目录"
            )
        if is_run_folder(path):
            path = run_checkpoint(path, "best")
    return describe(path, base_model)


def describe(path: Path, base_model: Path | None = None) -> Checkpoint:
    """Look at a checkpoint folder without loading weights.

    Raises:
        UserError: something is missing or broken; the message says what.
    """
    if (path / ADAPTER_CONFIG).is_file():
        base = _adapter_base(path, base_model)
    else:
        base = None
        check_weights(path)
    notice = read_config(base or path).get("notice", "")
    return Checkpoint(path, base, read_card(path), notice if isinstance(notice, str) else "")


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path names: itself, or the only one in a folder that holds no model of another form.

    Raises:
        UserError: the folder holds several.
    """
    if path.suffix.lower() == GGUF:
        return path
    if not path.is_dir() or (path / "config.json").is_file() or (path / ADAPTER_CONFIG).is_file():
        return None
    found = sorted(each for each in path.iterdir() if each.suffix.lower() == GGUF)
    if len(found) > 1:
        raise UserError(f"目录里有 {len(found)} 个 GGUF 文件", path, f"请用 -c 指出一个，例如 -c {found[0]}")
    return found[0] if found else None


def read_config(folder: Path) -> dict[str, Any]:
    """A model's config.json; empty if it holds something else than an object."""
    config = files.read_json(folder / "config.json")
    return config if isinstance(config, dict) else {}


def newest_run_checkpoint(output_root: Path, which: str) -> Path:
    """The latest or best finished checkpoint of the run under `output_root` that saved last.

    Raises:
        UserError: no run has saved any.
    """
    found = [path for run in _runs(output_root) for path in finished_checkpoints(run)]
    if not found:
        raise UserError(
            f"没有可用的检查点，无法选择 {which}", output_root, "请先运行 python train.py，或用 -c 指定模型目录"
        )
    newest = max(found, key=lambda path: ((path / STATE_FILE).stat().st_mtime_ns, _step(path)))
    return newest if which == "latest" else run_checkpoint(newest.parent, which)


def run_checkpoint(run: Path, which: str) -> Path:
    """The "latest" or the "best" finished checkpoint of one run.

    The best has the lowest validation loss, unless the run was told that its last one is (`--best-by last`).

    Raises:
        UserError: the run has saved none.
    """
    finished = finished_checkpoints(run)
    if not finished:
        raise UserError("这个训练目录里没有完整的检查点", run, "训练可能在第一次保存前中断；请重新训练")
    trained_with = read_card(finished[-1]).get("settings")
    if which == "latest" or (isinstance(trained_with, dict) and trained_with.get("best_by") == "last"):
        return finished[-1]
    scored = [(loss, path) for path in finished if (loss := _eval_loss(path)) is not None]
    return min(scored, key=lambda pair: pair[0])[1] if scored else finished[-1]


def finished_checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run, by step."""
    return sorted((path for path in run.glob("checkpoint-*") if _trainer_state(path)), key=_step)


def remove_unfinished(run: Path) -> None:
    """Remove the checkpoints of a run that were never finished."""
    for path in set(run.glob("checkpoint-*")) - set(finished_checkpoints(run)):
        shutil.rmtree(path, ignore_errors=True)


def is_run_folder(path: Path) -> bool:
    """Whether a folder is a run's output folder rather than a model."""
    has_model = (path / "config.json").is_file() or (path / ADAPTER_CONFIG).is_file()
    return not has_model and any(path.glob("checkpoint-*"))


def check_weights(path: Path) -> None:
    """Make sure that a checkpoint has its weights as safetensors; a pickle, which can run code, is never read.

    Raises:
        UserError: they are missing, or there as a pickle only; the message says how to convert it.
    """
    if not (path / ADAPTER_CONFIG).is_file():
        if missing := missing_model_files(path):
            raise UserError(f"检查点不完整，缺少 {'、'.join(missing)}", path, "请换一个检查点，或重新训练/下载")
    elif not (path / ADAPTER_WEIGHTS).is_file():
        pickled = (path / "adapter_model.bin").is_file()
        how = "只有 adapter_model.bin：pickle 能执行代码，不载入；转换方法见 SECURITY.md"
        raise UserError(f"LoRA 检查点缺少 {ADAPTER_WEIGHTS}", path, how if pickled else "请换一个检查点，或重新训练")


def check_states(path: Path) -> None:
    """Make sure that the states a training resumes from are whole; torch keeps each as a zip archive.

    Raises:
        UserError: one is empty or cut off.
    """
    for state in sorted([*path.glob("*.pt"), *path.glob("*.pth")]):
        with state.open("rb") as file:
            start = file.read(2)
        if not start or (start == b"PK" and not zipfile.is_zipfile(state)):
            remedy = f"删除目录 {path.name} 后用 --resume 从前一个检查点继续"
            raise UserError("优化器、调度器或随机数的状态不完整", state, remedy)


def trained_prompts(path: Path) -> frozenset[str]:
    """The hashes of the system prompts that a model was trained with; empty where it does not say.

    Args:
        path: a checkpoint, an export, or a GGUF file beside whose card it lies.
    """
    found = read_card(path if path.is_dir() else path.parent).get("system_prompts")
    return frozenset(found) if isinstance(found, list) and all(isinstance(each, str) for each in found) else frozenset()


def write_card(path: Path, card: dict[str, Any]) -> None:
    """Let a checkpoint say of itself how it was made."""
    files.write_json(path / CARD_FILE, card)


def load_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """Load a tokenizer, from this machine only.

    Raises:
        UserError: it can't be read or has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the libraries raise anything, a bare Exception too, over a file they did not expect
        raise UserError(f"分词器无法读取：{_first_line(error)}", path, "请重新下载模型，或换一个检查点") from error
    if not tokenizer.chat_template:
        raise UserError("分词器没有对话模板", path, "请使用 Qwen3 自带的分词器")
    chat.guard_control_tokens(tokenizer)
    return tokenizer


def load_base(
    path: Path, dtype: "torch.dtype | str", attention: str = "sdpa", four_bit: bool = False
) -> "PreTrainedModel":
    """Load a full model's weights from a folder, safetensors only and without running code from it.

    Args:
        dtype: of the weights in memory; "auto" for the one they are stored in.
        four_bit: the linear layers in NF4, computing in `dtype` (QLoRA, arXiv:2305.14314); needs bitsandbytes.

    Raises:
        UserError: files are missing or broken, or a weight is absent, which transformers would make up.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar for the training is enough
    if missing := missing_model_files(path):
        raise UserError(f"模型不完整，缺少 {'、'.join(missing)}", path, "请运行 python download_model.py，或换一个目录")
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **({"quantization_config": _nf4(dtype)} if four_bit else {}),
        )
    except Exception as error:  # as in load_tokenizer
        raise UserError(f"模型无法载入：{_first_line(error)}", path, "请重新下载模型，或换一个检查点") from error
    if absent := sorted(report["missing_keys"]) + sorted(name for name, *_ in report["mismatched_keys"]):
        what = f"权重与 config.json 不符：{len(absent)} 个张量缺失或形状不对，如 {absent[0]}"
        raise UserError(what, path, "请重新下载模型，或换一个检查点")
    return model


def _nf4(dtype: "torch.dtype | str") -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def tensor_slices(folder: Path) -> Iterator[tuple[str, Any]]:
    """The name of each tensor in a folder's safetensors, and what tells its shape and type without loading it."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  no iterator
                yield name, weights.get_slice(name)


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """The shape of each tensor in a folder's safetensors, without loading any."""
    return {name: each.get_shape() for name, each in tensor_slices(folder)}


def count_parameters(folder: Path) -> int:
    """Number of parameters of a model folder, without loading it (tied weights stand there once)."""
    return sum(math.prod(shape) for shape in tensor_shapes(folder).values())


def weights_sha256(folder: Path) -> str:
    """A hash of all weight files of a model folder; by it an adapter knows its base again."""
    hashes = [files.sha256(file) for file in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def tokenizer_folder(checkpoint: Checkpoint) -> Path:
    """Where a checkpoint's tokenizer lies: its own, or that of its base."""
    has_tokenizer = (checkpoint.path / "tokenizer_config.json").is_file()
    return checkpoint.path if has_tokenizer or not checkpoint.base else checkpoint.base


def load(checkpoint: Checkpoint, dtype: "torch.dtype") -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load model and tokenizer for inference; an adapter is merged into its base.

    Raises:
        UserError: files are missing or broken, or the adapter was made for another model.
    """
    model = load_base(checkpoint.base or checkpoint.path, dtype)
    if checkpoint.base:
        model = merge_adapter(model, checkpoint.path)
    return model.eval(), load_tokenizer(tokenizer_folder(checkpoint))


def merge_adapter(model: "PreTrainedModel", adapter: Path) -> "PreTrainedModel":
    """Merge a LoRA adapter into a loaded base model.

    Raises:
        UserError: the adapter is broken or does not fit the model.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    except Exception as error:  # as in load_tokenizer
        remedy = "请用 --base-model 指定训练时所用的基础模型"
        raise UserError(f"LoRA 适配器与基础模型不匹配或已损坏：{_first_line(error)}", adapter, remedy) from error


def short_name(path: Path) -> str:
    """A model's name for people: its folder, and its run where it is a checkpoint of one."""
    path = path.resolve()
    return f"{path.parent.name}/{path.name}" if path.name.startswith("checkpoint-") else path.name


def _adapter_base(path: Path, base_model: Path | None) -> Path:
    check_weights(path)
    config = files.read_json(path / ADAPTER_CONFIG)
    recorded = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    recorded = recorded if isinstance(recorded, str) else ""
    candidates = [base_model] if base_model else [Path(recorded), path.parent.parent.parent / recorded]
    base = next((folder for folder in candidates if (folder / "config.json").is_file()), None)
    if base is None:
        missing = base_model or recorded
        remedy = "它被移动或删除了？请用 --base-model 指定它现在的目录"
        raise UserError(f"找不到 LoRA 的基础模型 {missing}", path, remedy)
    if lacking := missing_model_files(base):
        raise UserError(
            f"LoRA 的基础模型不完整，缺少 {'、'.join(lacking)}", base, "请重新下载，或用 --base-model 指定另一份"
        )
    return base


def _runs(output_root: Path) -> list[Path]:
    return [folder for folder in output_root.glob("*") if folder.is_dir()] if output_root.is_dir() else []


def read_card(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; empty where it says nothing that can be read."""
    card = files.read_json(checkpoint / CARD_FILE) if (checkpoint / CARD_FILE).is_file() else {}
    return card if isinstance(card, dict) else {}


def _trainer_state(checkpoint: Path) -> dict[str, Any] | None:
    """The trainer's state, or None where it is missing or cut off."""
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def _eval_loss(checkpoint: Path) -> float | None:
    """The validation loss measured at the checkpoint's own step."""
    history = (_trainer_state(checkpoint) or {}).get("log_history")
    for entry in history if isinstance(history, list) else []:
        loss = entry.get("eval_loss") if isinstance(entry, dict) else None
        if isinstance(loss, (int, float)) and entry.get("step") == _step(checkpoint):
            return loss
    return None


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _available(output_root: Path) -> str:
    found = [str(path) for run in _runs(output_root) for path in finished_checkpoints(run)]
    listed = f"可用的有：{'、'.join(sorted(found)[-5:])}；" if found else ""
    return f"{listed}也可以用 -c latest 或 -c best"


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
