"""Fetching models and data sets from ModelScope and Hugging Face, and telling a whole model folder from a part.

A download goes into a hidden folder beside its target and takes the target's name only when it is complete
and verified; a later run goes on from there. The clients do the transfer, its resuming and ModelScope's
checksums. Hugging Face's client (2.4) checks sizes only, so the SHA-256 it lists is checked here, and resumes a
file within a run only: of a later run it is the broken file that starts anew.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import struct
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from qwenmed.errors import UserError

MODELSCOPE, HUGGINGFACE = "modelscope", "huggingface"
TITLES = {MODELSCOPE: "ModelScope", HUGGINGFACE: "Hugging Face"}

# The data set of the original project. No copy of it on Hugging Face could be verified.
DATASET_IDS = {MODELSCOPE: "krisfu/delicate_medical_r1_data", HUGGINGFACE: None}

# Other formats of the same weights, which would double a download, and files that run code.
IGNORED = ["*.bin", "*.pth", "*.pt", "*.onnx", "*.gguf", "*.h5", "*.msgpack", "*.py", "original/*"]

CONNECT_SECONDS = 6
PICKLED = ("pytorch_model.bin", "model.pt", "pytorch_model.bin.index.json")


class SourceError(Exception):
    """One source could not deliver; the message is short and in the user's words."""


def missing_model_files(folder: Path) -> list[str]:
    """What a folder lacks to be a loadable model; empty if it is complete. Loads nothing.

    A weights file that was cut off counts as missing: its header tells how long it must be.
    """
    if not folder.is_dir():
        return ["整个目录"]
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not (folder / "tokenizer_config.json").is_file():
        missing.append("tokenizer_config.json")
    if not (folder / "tokenizer.json").is_file() and not all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    ):
        missing.append("tokenizer.json")
    return missing + _missing_weights(folder)


def fetch_model(
    model_id: str,
    local_dir: Path,
    source: str | None = None,
    revision: str | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Path:
    """The folder of a model, fetched unless a complete copy is there (which costs no network).

    Args:
        model_id: e.g. "Qwen/Qwen3-0.6B".
        local_dir: where it belongs.
        source: "modelscope", "huggingface", or None for the one and then the other.
        revision: a branch, tag or commit; None for the source's default.
        say: takes the decisions made on the way.

    Raises:
        UserError: no source could deliver it; all of them are named with their reasons.
    """
    if not missing_model_files(local_dir):
        return local_dir
    sources = [source] if source else [MODELSCOPE, HUGGINGFACE]
    return _fetch(model_id, "model", local_dir, dict.fromkeys(sources, model_id), revision, missing_model_files, say)


def fetch_dataset(
    dataset_id: str | None,
    source: str,
    local_dir: Path,
    revision: str | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Path:
    """The folder of a data set's repository, fetched as plain files unless it is there.

    Args:
        dataset_id: None for the original project's data set.

    Raises:
        UserError: the source could not deliver it, or has no copy of the default data set.
    """
    if local_dir.is_dir():
        say(f"使用已下载的数据集 {local_dir}（删除该目录可重新下载）")
        return local_dir
    dataset_id = dataset_id or DATASET_IDS[source]
    if dataset_id is None:
        remedy = "请用 --source modelscope，或自行下载后用 --source 文件"
        raise UserError(f"{TITLES[source]} 上没有已核实的 delicate_medical_r1_data", None, remedy)
    return _fetch(dataset_id, "dataset", local_dir, {source: dataset_id}, revision, lambda folder: [], say)


def _fetch(
    repo_id: str,
    kind: str,
    local_dir: Path,
    ids: dict[str, str],
    revision: str | None,
    missing: Callable[[Path], list[str]],
    say: Callable[[str], None],
) -> Path:
    if local_dir.exists() and (not local_dir.is_dir() or any(local_dir.iterdir())):
        lacks = "、".join(missing(local_dir)) if local_dir.is_dir() else "它是一个文件"
        raise UserError(
            f"目标目录已存在但不是完整的模型（缺少 {lacks}）", local_dir, "请移走它，或用 --local-dir 换一个目录"
        )
    partial = local_dir.with_name(f".{local_dir.name}.partial")
    failures = []
    try:
        for source, id_ in ids.items():
            say(f"从 {TITLES[source]} 下载 {id_} …")
            try:
                _download(source, id_, kind, partial, revision)
                if lacks := missing(partial):
                    raise SourceError(f"仓库里缺少 {'、'.join(lacks)}")
            except SourceError as error:
                failures.append(f"{TITLES[source]}：{error}")
                say(f"{TITLES[source]} 不成功：{error}")
                continue
            _remove_bookkeeping(partial)
            if local_dir.is_dir():
                local_dir.rmdir()
            partial.replace(local_dir)
            return local_dir
    finally:
        _remove_if_nothing_came(partial)
    way_out = "--model 本地目录" if kind == "model" else "--source 本地文件"
    remedy = f"请检查网络后重试（会断点续传），或用别的办法下载后用 {way_out} 指定"
    raise UserError(f"无法下载 {repo_id}：{'；'.join(failures)}", None, remedy)


def _download(source: str, repo_id: str, kind: str, folder: Path, revision: str | None) -> None:
    """Fill `folder` from one source.

    Raises:
        SourceError: it could not deliver.
        OSError: the disk could not take it.
    """
    _check_route(_endpoint(source))
    folder.mkdir(parents=True, exist_ok=True)
    (_from_modelscope if source == MODELSCOPE else _from_huggingface)(repo_id, kind, folder, revision)
    _refuse_links_outside(folder)


def _from_modelscope(repo_id: str, kind: str, folder: Path, revision: str | None) -> None:
    import logging

    from modelscope import dataset_snapshot_download, snapshot_download
    from modelscope_hub.errors import HubError, NotExistError

    for name in ("modelscope", "modelscope_hub"):  # their INFO lines say nothing that the bars don't
        logging.getLogger(name).setLevel(logging.CRITICAL)
    download = snapshot_download if kind == "model" else dataset_snapshot_download
    try:
        download(repo_id, revision=revision, local_dir=str(folder), ignore_patterns=IGNORED)
    except NotExistError:
        raise SourceError(f"没有 {repo_id}（404）") from None
    except HubError as error:  # a failed checksum of one file arrives inside the failure of the whole
        mismatch = "Hash mismatch" in str(error)
        raise SourceError("文件的校验和不对，没有采用" if mismatch else _short(error)) from error
    except (OSError, ValueError) as error:
        _raise_as_source_error(error)


def _from_huggingface(repo_id: str, kind: str, folder: Path, revision: str | None) -> None:
    import httpx2  # the client's own HTTP library, whose errors it passes on
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    endpoint = _endpoint(HUGGINGFACE)
    try:
        snapshot_download(
            repo_id, repo_type=kind, revision=revision, local_dir=folder, ignore_patterns=IGNORED, endpoint=endpoint
        )
        tree = HfApi(endpoint=endpoint).list_repo_tree(repo_id, repo_type=kind, revision=revision, recursive=True)
        for entry in tree:
            _check_sha256(folder / entry.path, getattr(getattr(entry, "lfs", None), "sha256", None))
    except RepositoryNotFoundError:
        raise SourceError(f"没有 {repo_id}（404）") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.HTTPError) as error:
        raise SourceError(_short(error)) from error
    except (OSError, ValueError) as error:
        _raise_as_source_error(error)
    except RuntimeError as error:  # so a file of the wrong size arrives
        raise SourceError(_short(error)) from error


def _raise_as_source_error(error: Exception) -> None:
    """A failing disk stays an OSError; what the network did (an OSError as well) becomes a SourceError."""
    local = isinstance(error, OSError) and error.filename is not None and not isinstance(error, ConnectionError)
    if local or getattr(error, "errno", None) in _DISK_ERRORS:
        raise error
    raise SourceError(_short(error)) from error


_DISK_ERRORS = (28, 30, 122)  # ENOSPC, EROFS, EDQUOT


def _check_sha256(file: Path, expected: str | None) -> None:
    if expected is None or not file.is_file():
        return
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != expected:
        file.unlink()  # the next run fetches it anew
        raise SourceError(f"{file.name} 的校验和不对，文件没有采用")


def _endpoint(source: str) -> str:
    if source == MODELSCOPE:
        return os.environ.get("MODELSCOPE_ENDPOINT") or "https://www.modelscope.cn"
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def _check_route(endpoint: str) -> None:
    """Fail within seconds where there is no route; the clients' own retries take half a minute a source.

    Raises:
        SourceError: nothing answers.
    """
    url = urllib.parse.urlsplit(endpoint)
    proxied = url.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(url.netloc)
    if proxied:
        return
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise SourceError(f"连不上 {url.netloc}（{error.strerror or error}）") from None


def _missing_weights(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            return [f"{index.name}（损坏）"]
    else:
        names = ["model.safetensors"]
    missing = []
    for name in names:
        file = folder / name
        if not file.is_file():
            pickled = any((folder / other).is_file() for other in PICKLED)
            missing.append(f"{name}（只有 pickle 格式的权重，请先转换为 safetensors）" if pickled else name)
        elif not _is_whole(file):
            missing.append(f"{name}（不完整）")
    return missing


def _is_whole(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    size = file.stat().st_size
    with file.open("rb") as content:
        start = content.read(8)
        if len(start) < 8:
            return False
        (length,) = struct.unpack("<Q", start)
        if length > size - 8:
            return False
        try:
            header = json.loads(content.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return False
    return size == 8 + length + max(ends, default=0)


def _refuse_links_outside(folder: Path) -> None:
    root = folder.resolve()
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            path.unlink()
            raise SourceError(f"仓库里有指向目录之外的链接 {path.name}")


def _remove_bookkeeping(folder: Path) -> None:
    """Remove what the clients keep for themselves inside of the folder."""
    for path in folder.glob(".*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
    for path in [*folder.glob(".msc"), *folder.glob(".mv")]:
        path.unlink(missing_ok=True)


def _remove_if_nothing_came(partial: Path) -> None:
    """Leave no empty folders behind; a part that holds bytes stays, to be resumed."""
    if not partial.is_dir():
        return
    if any(_holds_bytes(path) for path in partial.rglob("*")):
        return
    shutil.rmtree(partial, ignore_errors=True)
    with contextlib.suppress(OSError):
        partial.parent.rmdir()


def _holds_bytes(path: Path) -> bool:
    bookkeeping = path.suffix in (".lock", ".metadata") or path.name in (".gitignore", "CACHEDIR.TAG", ".msc", ".mv")
    return path.is_file() and not bookkeeping and path.stat().st_size > 0


def _short(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return " ".join(text.split())[:160]
