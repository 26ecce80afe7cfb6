"""What the machine can do: device, number types, attention.

Rules (each printed once where it is used, with the option that overrides it):
- bf16 only where the GPU has it natively (compute capability ≥ 8.0; torch's own check counts emulation);
- older GPUs train with fp32 weights under fp16 autocast, never with pure fp16 weights (NaN in one AdamW
  step; Qwen3#670);
- the CPU trains and generates in fp32.
"""

import contextlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwenmed.errors import UserError

if TYPE_CHECKING:
    import torch

# Rows whose logits exist at one time; the head goes by it, and the memory is computed with it.
HEAD_ROWS = 512
# Bytes a parameter takes in full fine-tuning with AdamW: weight, gradient and two moments, all fp32.
FP32_TRAINING_BYTES = 16
# Share of the card that weights and optimizer may fill, so that activations have room.
FP32_MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Precision:
    """How a run computes.

    Attributes:
        weights: type of the weights that are stored, and of those that are trained.
        autocast: "bf16", "fp16" or None.
        reason: one line for the user.
    """

    weights: "torch.dtype"
    autocast: str | None
    reason: str


def pick_device(wanted: str = "auto") -> "torch.device":
    """The device to run on.

    Raises:
        UserError: the wanted one is not there.
    """
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        wanted = next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available[wanted]:
        remedy = (
            "请检查驱动与 torch 的 CUDA 版本（python -c 'import torch; print(torch.version.cuda)'），或用 --device cpu"
        )
        raise UserError(f"设备 {wanted} 不可用", None, remedy)
    return torch.device(wanted)


def has_native_bf16(device: "torch.device") -> bool:
    """Whether bf16 runs natively: NVIDIA from compute capability 8.0 (Ampere) on, newer ones included."""
    import torch

    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def full_precision(device: "torch.device", parameters: int) -> Precision:
    """Number types for full fine-tuning of a model of `parameters` weights."""
    import torch

    if device.type != "cuda":
        return Precision(torch.float32, None, "fp32 权重，不用混合精度")
    total = torch.cuda.get_device_properties(device).total_memory
    fits = parameters * FP32_TRAINING_BYTES <= total * FP32_MEMORY_SHARE
    if not has_native_bf16(device):
        return Precision(torch.float32, "fp16", "fp32 权重 + fp16 自动混合精度（这块 GPU 没有原生 bf16）")
    if fits:
        return Precision(torch.float32, "bf16", "fp32 主权重 + bf16 自动混合精度")
    return Precision(
        torch.bfloat16, "bf16", f"显存放不下 fp32 主权重（需约 {parameters * 16 / 2**30:.1f} GiB），改用 bf16 权重"
    )


def training_bytes(
    config: Mapping[str, Any], parameters: int, precision: Precision, tokens: int, lora_rank: int | None = None
) -> dict[str, int]:
    """What a training step holds in memory, computed from the model's sizes; bytes by kind.

    Weights, gradients and AdamW's two moments are exact; activations (with checkpointing on a GPU, without on a CPU)
    and the head are an estimate that leaves out the libraries' own buffers.

    Args:
        config: the model's config.json.
        parameters: of the model.
        tokens: in one batch: sequences times their length.
        lora_rank: of the adapters on all linear layers; None for full fine-tuning.
    """
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    size = precision.weights.itemsize
    heads = config["num_attention_heads"] * config["head_dim"]
    shared = config["num_key_value_heads"] * config["head_dim"]
    trained = parameters
    if lora_rank is not None:
        ends = [(width, heads), (width, shared), (width, shared), (heads, width), *[(width, inner)] * 3]
        trained = layers * lora_rank * sum(into + out for into, out in ends)
    state = 4 if lora_rank is not None else size
    half = 2 if precision.autocast else size
    layer = tokens * (6 * width + 2 * (heads + shared) + 3 * inner) * half
    checkpointed = precision.autocast is not None
    chunk = min(tokens, HEAD_ROWS) * config["vocab_size"]
    return {
        "权重": parameters * size + (trained * 4 if lora_rank is not None else 0),
        "梯度": trained * state,
        "优化器": 2 * trained * state,
        "激活": tokens * width * layers * half + layer if checkpointed else layers * layer,
        "输出层": 2 * chunk * 4,
    }


def lora_precision(device: "torch.device") -> Precision:
    """Number types for LoRA: a frozen base in half precision where the hardware has it; adapters in fp32."""
    import torch

    if device.type != "cuda":
        return Precision(torch.float32, None, "fp32 权重，不用混合精度")
    if has_native_bf16(device):
        return Precision(torch.bfloat16, "bf16", "bf16 冻结权重 + fp32 LoRA 权重，bf16 自动混合精度")
    return Precision(torch.float32, "fp16", "fp32 权重 + fp16 自动混合精度（这块 GPU 没有原生 bf16）")


def inference_dtype(device: "torch.device") -> "torch.dtype":
    """Number type for generation."""
    import torch

    if has_native_bf16(device):
        return torch.bfloat16
    return torch.float16 if device.type in ("cuda", "mps") else torch.float32


# Below so many parameters nothing is to be gained, and fp32 stays the reference.
SMALL_MODEL = 100_000_000
# bf16 must be that much faster, so that noise does not decide what a model says.
CLEARLY_FASTER = 1.3


def faster_cpu_dtype(rows: int, hidden: int, intermediate: int) -> "tuple[torch.dtype, float]":
    """Measure which number type generates faster on this CPU, in about 0.3 s.

    It depends on the rows: one row waits for memory, where bf16 has half to fetch; many rows compute, where
    few CPUs are quick in bf16 (measured on 2 cores of an AVX512-BF16 machine: 2.2 times faster for one row,
    2.8 times slower for 32).

    Args:
        rows: replies that are generated together.
        hidden, intermediate: the model's sizes.

    Returns:
        The type, and by what factor bf16 was faster than fp32.
    """
    import time

    import torch

    def seconds(dtype: "torch.dtype") -> float:
        # More weights than any cache holds, as a whole model has.
        weights = [torch.ones(intermediate, hidden, dtype=dtype) for _ in range(16)]
        inputs, best = torch.ones(rows, hidden, dtype=dtype), float("inf")
        with torch.inference_mode():
            for _ in range(4):
                started = time.perf_counter()
                for done, weight in enumerate(weights, 1):
                    torch.nn.functional.linear(inputs, weight)
                    taken = time.perf_counter() - started
                    if taken > 1:  # a CPU without bf16 may take minutes; this is answer enough
                        return min(best, taken / done * len(weights))
                best = min(best, taken)
        return best

    factor = seconds(torch.float32) / seconds(torch.bfloat16)
    return (torch.bfloat16 if factor >= CLEARLY_FASTER else torch.float32), factor


def describe(device: "torch.device") -> dict[str, Any]:
    """The hardware, for run.json."""
    import torch

    found: dict[str, Any] = {
        "device": device.type,
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return found


def peak_memory_gib(device: "torch.device") -> dict[str, float]:
    """Peak memory of this process: allocated and reserved on a GPU, resident set otherwise; in GiB."""
    import torch

    if device.type == "cuda":
        return {
            "gpu_allocated": round(torch.cuda.max_memory_allocated(device) / 2**30, 3),
            "gpu_reserved": round(torch.cuda.max_memory_reserved(device) / 2**30, 3),
        }
    with contextlib.suppress(ImportError):  # no such module on Windows
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
        return {"resident": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)}
    return {}


def free_memory(device: "torch.device") -> int:
    """Bytes that can still be taken: of the GPU, torch's own reserve included, or of the machine."""
    import torch

    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    import psutil

    return psutil.virtual_memory().available


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks instead of returning them to the kernel at once.

    A training step on the CPU frees and takes the same large blocks again and again; returning them cost
    a quarter of the time (measured: 1.09 → 1.41 steps/s for the demo model on 2 cores).
    """
    import ctypes

    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of <malloc.h>
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)
