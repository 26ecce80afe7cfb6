"""What the machine can do: device, number types, attention.

bf16 counts only where the GPU has it natively (compute capability ≥ 8.0; torch's own check counts emulation).
"""

import contextlib
import importlib.util
import platform
import sys
from typing import TYPE_CHECKING, Any

from qwenmed.errors import UserError

if TYPE_CHECKING:
    import torch

# Rows whose logits exist at one time; the head goes by it, and the memory is computed with it.
HEAD_ROWS = 512


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


def inference_dtype(device: "torch.device") -> "torch.dtype":
    """Number type for generation."""
    import torch

    if has_native_bf16(device):
        return torch.bfloat16
    return torch.float16 if device.type in ("cuda", "mps") else torch.float32


# Below so many parameters nothing is to be gained, and fp32 stays the reference.
SMALL_MODEL = 20_000_000
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


def has_triton() -> bool:
    """Whether TRL finds Triton, which Linux builds of torch for GPUs bring along."""
    from transformers.utils import is_triton_available

    return is_triton_available()


def is_own_head(kind: str, fp16: bool, triton: bool) -> bool:
    """Whether the output layer's loss is head.py's: without Triton TRL's takes much more memory.

    Not in fp16: head.py forms its gradients before they are scaled, and small ones would become zero.

    Args:
        kind: of device.
        fp16: mixed precision.
        triton: whether it is there.
    """
    return kind != "cuda" or not (triton or fp16)


def missing_for_8_bit() -> list[str]:
    """What the 8-bit optimizer lacks: torchao, and on a GPU machine Triton, by which it compiles itself."""
    import torch

    needed = ["torchao", "triton"] if torch.cuda.is_available() else ["torchao"]
    return [name for name in needed if importlib.util.find_spec(name) is None]


def how_to_get_8_bit() -> str:
    """The commands that install what the 8-bit optimizer lacks here."""
    triton = "pip install triton-windows（没有试过）" if sys.platform == "win32" else "pip install triton"
    commands = {"torchao": "pip install -e '.[quant]'", "triton": triton}
    return "，再 ".join(commands[name] for name in missing_for_8_bit() or ["torchao"])


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
    """Peak memory of this process: allocated and reserved on a GPU, resident set otherwise; in GiB.

    Empty where the system does not tell.
    """
    import torch

    if device.type == "cuda":
        return {
            "gpu_allocated": round(torch.cuda.max_memory_allocated(device) / 2**30, 3),
            "gpu_reserved": round(torch.cuda.max_memory_reserved(device) / 2**30, 3),
        }
    with contextlib.suppress(ImportError):  # no such module on Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
        return {"resident": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)}
    import psutil

    with contextlib.suppress(AttributeError):  # which psutil knows on Windows only
        return {"resident": round(psutil.Process().memory_info().peak_wset / 2**30, 3)}
    return {}


def free_memory(device: "torch.device") -> int:
    """Bytes that can still be taken: of the GPU, torch's own reserve included, or of the machine."""
    import torch

    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    import psutil

    return psutil.virtual_memory().available


# How torch tells that memory ran out, mostly in a plain RuntimeError: on Linux, on Windows, on a Mac, and with CUDA.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "CUDA out of memory",
)


def says_out_of_memory(text: str) -> bool:
    """Whether an error's text, or what a process has printed, is of memory that ran out."""
    return any(words in text for words in _OUT_OF_MEMORY)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch has an error of its own for its GPU allocator, and plain ones elsewhere."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and says_out_of_memory(str(error))


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks instead of returning them to the kernel at once.

    A training step on the CPU frees and takes the same large blocks again and again; returning them cost
    a quarter of the time (measured: 1.09 → 1.41 steps/s for the demo model on 2 cores).
    """
    import ctypes

    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of <malloc.h>
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        # Older ones take no more than 32 MiB; without the first, the second would hold the first at 128 KiB.
        if libc.mallopt(mmap_threshold, 2**30) or libc.mallopt(mmap_threshold, 2**25):
            libc.mallopt(trim_threshold, 2**31 - 1)
