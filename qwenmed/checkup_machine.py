"""What doctor.py asks of the machine: Python and packages, GPU and driver, memory and disk, hubs, SwanLab."""

import contextlib
import importlib.metadata
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from qwenmed import hardware, tracking
from qwenmed.checkup import BAD, GOOD, MIND, Finding

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"
PYTHON = (3, 11)
# With these a run begins; what else it needs depends on the model (TrainingCheckup.memory).
FREE_DISK, FREE_MEMORY = 5e9, 4e9
HUBS = {"ModelScope": "https://www.modelscope.cn", "Hugging Face": "https://huggingface.co"}
HUB_SECONDS = 5.0
# Uninstalled first: to pip an installed 2.13.0+cpu is 2.13.0 already, whatever index it is pointed to.
OTHER_TORCH = (
    "先 pip uninstall -y torch，再 pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/{tag} "
    "（{tag} 这一段按显卡和驱动在 pytorch.org 查）"
)


def environment(requirements: Path = REQUIREMENTS) -> Iterator[Finding]:
    """Python, the encoding, and the pinned packages."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info >= PYTHON:
        yield Finding(GOOD, "Python", f"{version}，{platform.platform()}")
    else:
        yield Finding(BAD, "Python", f"{version} 太旧", "请用 Python 3.11 或更新的版本建虚拟环境")
    if sys.prefix == sys.base_prefix:
        yield Finding(MIND, "虚拟环境", "没有使用", "python -m venv .venv，避免与别的项目的版本冲突")
    wanted = pins(requirements)
    missing, other = [], []
    for name, version in wanted.items():
        try:
            there = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if there != version:
            other.append(f"{name} {there}（应为 {version}）")
    fix = "pip install -r requirements.txt"
    if missing:
        yield Finding(BAD, "依赖", f"缺少 {'、'.join(missing)}", fix)
    if other:
        yield Finding(MIND, "依赖", f"版本与测试过的不同：{'、'.join(other)}", fix)
    if not missing and not other:
        yield Finding(GOOD, "依赖", f"{len(wanted)} 个包的版本都与 requirements.txt 相同")


def pins(requirements: Path) -> dict[str, str]:
    """The exact versions of a requirements file."""
    if not requirements.is_file():  # an installed package lies without it
        return {}
    lines = requirements.read_text(encoding="utf-8").splitlines()
    return {match[1]: match[2] for line in lines if (match := re.match(r"([\w.-]+)==([\w.]+)\s*$", line))}


def gpu() -> Iterator[Finding]:
    """The GPU: whether torch can use it, its number types, its free memory."""
    import torch

    driver = nvidia_driver()
    built = torch.version.cuda
    if torch.cuda.is_available():
        device = torch.device("cuda")
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        name = (
            f"{properties.name}，计算能力 {properties.major}.{properties.minor}，CUDA {built}，驱动 {driver or '未知'}"
        )
        yield Finding(GOOD, "GPU", name)
        supported = torch.cuda.get_arch_list()
        own = f"sm_{properties.major}{properties.minor}"
        same_major = any(each.startswith(f"sm_{properties.major}") for each in supported)
        if supported and own not in supported and not same_major:
            older = (properties.major, properties.minor) < (7, 5)  # Volta and what came before: not in CUDA 13
            fix = f"请换支持这块卡的 torch：{OTHER_TORCH.format(tag='cu126' if older else 'cu130')}"
            yield Finding(BAD, "GPU 架构", f"这个 torch 没有为 {own} 编译", fix)
        if hardware.has_native_bf16(device):
            yield Finding(GOOD, "bf16", "原生支持")
        else:
            yield Finding(
                MIND, "bf16", "没有原生 bf16，会用 fp32 权重 + fp16 自动混合精度", "不用做什么；显存紧张时用 LoRA"
            )
        if free < 0.8 * total:
            used = f"{(total - free) / 2**30:.1f} GiB 被别的程序占用"
            yield Finding(MIND, "显存", f"{total / 2**30:.1f} GiB，{used}", "用 nvidia-smi 看看是谁，关掉它")
        else:
            yield Finding(GOOD, "显存", f"{free / 2**30:.1f} / {total / 2**30:.1f} GiB 可用")
    elif driver and built is None:
        fix = f"请换带 CUDA 的 torch：{OTHER_TORCH.format(tag='cu130')}"
        yield Finding(BAD, "GPU", f"有 NVIDIA 驱动 {driver}，装的却是 CPU 版 torch {torch.__version__}", fix)
    elif driver:
        fix = f"请把驱动升级到支持 CUDA {built} 的版本，或换较低 CUDA 版本的 torch：{OTHER_TORCH.format(tag='cu126')}"
        yield Finding(BAD, "GPU", f"torch（CUDA {built}）用不了这块卡，驱动是 {driver}", fix)
    elif torch.backends.mps.is_available():
        yield Finding(GOOD, "GPU", "Apple MPS")
    else:
        fix = "演示模型几分钟即可；训练 0.6B 建议用 12 GB 以上的显卡"
        yield Finding(MIND, "GPU", f"没有，用 CPU（{torch.get_num_threads()} 线程）", fix)


def nvidia_driver() -> str | None:
    """The version of NVIDIA's driver, or None where there is none."""
    program = shutil.which("nvidia-smi")
    if not program:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def room(folder: Path) -> Iterator[Finding]:
    """Free memory and disk."""
    import psutil

    memory = psutil.virtual_memory()
    text = f"{memory.available / 1e9:.1f} / {memory.total / 1e9:.1f} GB 可用"
    mark = GOOD if memory.available >= FREE_MEMORY else MIND
    yield Finding(mark, "内存", text, "" if mark == GOOD else "请关掉别的程序；载入 0.6B 需要约 4 GB")
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.1f} GB 可用（{folder.absolute()}）"
    if free >= FREE_DISK:
        yield Finding(GOOD, "磁盘", text)
    else:
        yield Finding(BAD, "磁盘", text, "模型和检查点放不下：请清理磁盘，或换一个目录（--output-dir）")


def hubs(needed: bool) -> Iterator[Finding]:
    """Whether the hubs answer, and how fast.

    Args:
        needed: whether the model must still be fetched.
    """
    reached = []
    for name, address in hub_addresses().items():
        started = time.perf_counter()
        problem = _reach(address)
        seconds = time.perf_counter() - started
        if problem is None:
            reached.append(name)
            yield Finding(GOOD, name, f"{address} 在 {seconds:.2f} 秒内回应")
        else:
            fix = "可设 HF_ENDPOINT 使用镜像" if name == "Hugging Face" else "请检查网络或代理"
            yield Finding(MIND, name, f"{address} 连不上：{problem}", fix)
    if needed and not reached:
        fix = "请检查网络；或把模型拷到本地，用 --model 目录；演示模型 --model demo 不联网"
        yield Finding(BAD, "模型来源", "模型不在本地，两个来源都连不上", fix)


def hub_addresses(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The hubs' addresses, mirrors as their clients take them from the environment."""
    found = dict(HUBS)
    if mirror := environment.get("HF_ENDPOINT"):
        found["Hugging Face"] = mirror
    if domain := environment.get("MODELSCOPE_ENDPOINT"):
        found["ModelScope"] = domain if "://" in domain else f"https://{domain}"
    return found


def _reach(address: str) -> str | None:
    """What went wrong in asking for a page, or None; an answer of any status is an answer."""
    request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "qwen3-medical-assistant"})
    try:
        with urllib.request.urlopen(request, timeout=HUB_SECONDS):
            return None
    except urllib.request.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__


def swanlab(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Whether the tracker starts, in the mode that a training would use."""
    if "SWANLAB_PROJECT" in environment:
        fix = "请改用 SWANLAB_PROJ_NAME，并 unset SWANLAB_PROJECT"
        yield Finding(BAD, "SwanLab", "环境变量 SWANLAB_PROJECT 会让它启动失败", fix)
        return
    mode = tracking.swanlab_mode(None)
    if mode == "online":
        yield Finding(GOOD, "SwanLab", "有 SWANLAB_API_KEY：训练时上传（--swanlab offline 只记在本地）")
        return
    said: list[str] = []
    quiet = contextlib.redirect_stderr(io.StringIO())  # where it would keep its record, which is gone at once
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, quiet:
        tracker = tracking.Tracker(said.append)
        tracker.start(mode, Path(folder), "doctor", {}, None)
        tracker.finish()
    if said:
        yield Finding(MIND, "SwanLab", said[0], "训练不受影响；不想用它：--swanlab disabled")
    else:
        yield Finding(GOOD, "SwanLab", "离线记录可用；看面板：pip install 'swanlab[dashboard]'")
