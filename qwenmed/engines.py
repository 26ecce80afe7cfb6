"""Which engine answers, and with which settings: the options that every answering script shares."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenmed import checkpoints, cli, hardware, tracking
from qwenmed.cli import setting
from qwenmed.engine import Engine, Sampling
from qwenmed.engine_transformers import BATCH_SIZE, TransformersEngine
from qwenmed.errors import UserError
from qwenmed.settings import require

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AUTO, TRANSFORMERS, OPENAI, LLAMA = "auto", "transformers", "openai", "llama.cpp"
MODEL, SERVER, GENERATION = "模型", "服务器（--engine openai）", "生成"

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclasses.dataclass
class EngineSettings:
    """What answers, and how."""

    checkpoint: str = setting(
        "best",
        "检查点或模型目录，或 GGUF 文件；best、latest 取最近一次训练的",
        MODEL,
        short="-c",
        metavar="DIR|FILE.gguf|latest|best",
    )
    engine: str = setting(
        AUTO,
        "用什么生成：transformers 本机的检查点；llama.cpp 一个 GGUF 文件；openai 任何 OpenAI 兼容的服务器；"
        "auto 看 -c 给的是目录还是 GGUF",
        MODEL,
        choices=(AUTO, TRANSFORMERS, OPENAI, LLAMA),
    )
    base_model: str | None = setting(None, "LoRA 的基础模型现在的目录", MODEL, metavar="DIR")
    device: str = setting("auto", "设备", MODEL, choices=("auto", "cuda", "mps", "cpu"))
    dtype: str = setting("auto", "数值类型；auto 在 CPU 上实测后选择", MODEL, choices=("auto", *DTYPES))

    base_url: str | None = setting(None, "地址，例如 http://localhost:8000/v1；密钥取自环境变量 OPENAI_API_KEY", SERVER)
    model: str | None = setting(None, "服务器上的模型名（只有一个时可以不给）", SERVER)
    concurrency: int = setting(8, "批量时同时发出的请求数", SERVER)
    timeout: float = setting(120.0, "多少秒没有回应算超时", SERVER)

    temperature: float | None = setting(None, "采样温度；0 为贪心（默认用模型自带的设置，Qwen3 推荐 0.6）", GENERATION)
    top_p: float | None = setting(None, "核采样的概率和（默认用模型自带的设置，Qwen3 推荐 0.95）", GENERATION)
    seed: int | None = setting(None, "固定采样，使结果可以重复", GENERATION)
    think_budget: int | None = setting(
        None, "思考最多占多少 token，到了就收尾并开始回答；0 表示不思考（默认只为回答留出余地）", GENERATION
    )

    def __post_init__(self) -> None:
        """Check ranges and what belongs together; "auto" becomes the engine that it stands for.

        Raises:
            UserError: a value is outside of its range, or an engine lacks what it needs.
        """
        if self.engine == AUTO:
            self.engine = LLAMA if checkpoints.gguf_file(Path(self.checkpoint)) else TRANSFORMERS
        infinite = float("inf")
        require(self, "concurrency", 1 <= self.concurrency <= 1024, "应在 1 与 1024 之间")
        require(self, "timeout", 0 < self.timeout < infinite, "必须大于 0")
        require(self, "temperature", self.temperature is None or 0 <= self.temperature <= 5, "应在 0 与 5 之间")
        require(self, "top_p", self.top_p is None or 0 < self.top_p <= 1, "应大于 0，至多为 1")
        require(self, "seed", self.seed is None or 0 <= self.seed < 2**32, "应在 0 与 2³²-1 之间")
        require(self, "think_budget", self.think_budget is None or self.think_budget >= 0, "不能为负")
        for field in dataclasses.fields(self):
            choices = field.metadata["choices"]
            value = getattr(self, field.name)
            require(self, field.name, not choices or value in choices, f"可选 {'、'.join(choices or ())}")
        if self.engine == OPENAI and not self.base_url:
            raise UserError("--engine openai 需要 --base-url", None, "例如 --base-url http://localhost:8000/v1")
        if self.base_url is not None:
            require(
                self, "base_url", self.base_url.startswith(("http://", "https://")), "应以 http:// 或 https:// 开头"
            )
        if self.engine == LLAMA and self.checkpoint in ("best", "latest"):
            raise UserError("--engine llama.cpp 需要用 -c 指定一个 GGUF 文件")

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(self.temperature, self.top_p, self.seed)


def open_engine(settings: EngineSettings, for_batch: bool = False) -> Engine:
    """Find and load what answers, saying what is happening.

    Args:
        for_batch: whether many replies will be generated together; on a CPU the best number type depends on it.

    Raises:
        UserError: it is not there, not usable, or an optional package is missing.
    """
    if settings.engine == OPENAI:
        from qwenmed.engine_openai import OpenAIEngine

        assert settings.base_url is not None  # or the settings would have refused
        cli.note(f"正在连接 {settings.base_url}")
        engine = OpenAIEngine(
            settings.base_url,
            settings.model,
            settings.sampling,
            concurrency=settings.concurrency,
            timeout=settings.timeout,
        )
        cli.note(f"已连接：{engine.name}")
        return engine
    if settings.engine == LLAMA:
        from qwenmed.engine_llama import LlamaEngine

        path = checkpoints.gguf_file(Path(settings.checkpoint)) or Path(settings.checkpoint)
        cli.note(f"正在载入：GGUF {path}（llama.cpp）")
        return LlamaEngine(path, settings.sampling)
    return _open_transformers(settings, BATCH_SIZE if for_batch else 1)


class TrainedPrompts:
    """The system prompts that a model was trained with here, and a word about those that it was not.

    Args:
        settings: with which the engine was opened.
        engine: the engine.
    """

    def __init__(self, settings: EngineSettings, engine: Engine) -> None:
        local = settings.engine != OPENAI  # a server's model has a name and no folder
        self._hashes = checkpoints.trained_prompts(Path(engine.name)) if local else frozenset()
        self._warned: set[str] = set()

    def warn_of(self, system: str, title: str) -> None:
        """Say once of a prompt that the model has not met in training; a model from elsewhere has met none of ours."""
        if not self._hashes or system in self._warned or tracking.prompt_hash(system) in self._hashes:
            return
        self._warned.add(system)
        remedy = "用 --system-prompts mixed 重新训练可以避免"
        cli.note(f"注意：这个检查点训练时没有见过“{title}”的系统提示词，回答的格式可能不稳；{remedy}")


def find_checkpoint(settings: EngineSettings) -> checkpoints.Checkpoint:
    """The checkpoint that the settings name; no weights are loaded.

    Raises:
        UserError: there is none, or it lacks something.
    """
    return checkpoints.find(settings.checkpoint, base_model=Path(settings.base_model) if settings.base_model else None)


def _open_transformers(settings: EngineSettings, together: int) -> Engine:
    checkpoint = find_checkpoint(settings)
    device = hardware.pick_device(settings.device)
    cli.note(f"正在载入：{checkpoint.kind} {checkpoint.path}（{device.type}）")
    dtype = generation_dtype(settings, device, checkpoint, together)
    model, tokenizer = checkpoints.load(checkpoint, dtype)
    return engine_of(settings, checkpoint, moved(model, device, checkpoint.path), tokenizer)


def moved(model: "PreTrainedModel", device: "torch.device", path: Path) -> "PreTrainedModel":
    """The model on its device.

    Args:
        path: where it came from, for the message.

    Raises:
        UserError: the device has no room for it.
    """
    try:
        return model.to(device)
    except Exception as error:
        if not hardware.is_out_of_memory(error):
            raise
        remedy = "请关掉占用显存的其他程序，换小一些的模型，或用 --device cpu"
        raise UserError(f"设备 {device.type} 的内存放不下这个模型", path, remedy) from error


def engine_of(
    settings: EngineSettings,
    checkpoint: checkpoints.Checkpoint,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
) -> TransformersEngine:
    """The engine over a checkpoint that is loaded already."""
    folders = [checkpoint.path, *([checkpoint.base] if checkpoint.base else [])]
    return TransformersEngine(
        model,
        tokenizer,
        settings.sampling,
        name=str(checkpoint.path),
        notice=checkpoint.notice,
        fingerprint=f"{' '.join(map(_weights, folders))} {model.dtype} {settings.sampling}",
    )


def _weights(folder: Path) -> str:
    """What changes when a folder's weights do, without reading them."""
    return f"{folder.resolve()} {sorted(file.stat().st_mtime_ns for file in folder.glob('*.safetensors'))}"


def generation_dtype(
    settings: EngineSettings, device: "torch.device", checkpoint: checkpoints.Checkpoint, together: int
) -> "torch.dtype":
    """The number type to generate in, measured where a large model runs on a CPU.

    Args:
        together: replies that are generated together.
    """
    import torch

    if settings.dtype != "auto":
        return getattr(torch, DTYPES[settings.dtype])
    folder = checkpoint.base or checkpoint.path
    if device.type != "cpu" or checkpoints.count_parameters(folder) < hardware.SMALL_MODEL:
        return hardware.inference_dtype(device)
    config: Any = checkpoints.read_config(folder)
    dtype, factor = hardware.faster_cpu_dtype(together, config["hidden_size"], config["intermediate_size"])
    name = next(short for short, long in DTYPES.items() if getattr(torch, long) == dtype)
    cli.note(f"数值类型：{name}（实测 bf16 的速度是 fp32 的 {factor:.1f} 倍；可用 --dtype 指定）")
    return dtype
