"""Fetching models and data sets from ModelScope and Hugging Face, and telling a whole model folder from a part.

How a download goes: the source lists the repository (names, sizes, checksums) within a few seconds or counts
as unreachable; the list is checked before a byte is written; the hub's client transfers into a hidden folder
beside the target and picks up a broken-off file where it stopped; every file is compared with the list; only
then does the folder take its name.

Not covered: two processes that fetch into the same folder at once (the checksums tell, and the bytes are
fetched again); repositories whose model needs code of its own.
"""

import contextlib
import hashlib
import json
import queue
import shutil
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypeVar

from qwenmed.errors import UserError
from qwenmed.hub_clients import (
    HUGGINGFACE,
    LISTING_SECONDS,
    MODELSCOPE,
    SOURCES,
    Listing,
    RemoteFile,
    disk_error,
    reason,
)
from qwenmed.rows import DATA_SUFFIXES

# The data set of the original project. No copy of it on Hugging Face could be verified.
DATASET_IDS: dict[str, str | None] = {MODELSCOPE: "krisfu/delicate_medical_r1_data", HUGGINGFACE: None}

# What a model is loaded from. Neither the same weights as .bin, .gguf or .onnx, which would double the download,
# nor code.
MODEL_SUFFIXES = (".safetensors", ".json", ".txt", ".jinja", ".model", ".yaml", ".md")

# In a fetched model's folder: which repository it is, and at which revision.
SOURCE_FILE = ".source.json"

T = TypeVar("T")
Say = Callable[[str], None]


def missing_model_files(folder: Path) -> list[str]:
    """What a folder lacks to be a loadable model; empty if it is complete. Loads nothing.

    Weights that were cut off count as missing: the header of the file tells how long it must be.
    """
    if not folder.is_dir():
        return ["整个目录"]
    missing = [name for name in ("config.json", "tokenizer_config.json") if not _present(folder / name)]
    vocabulary = all(_present(folder / name) for name in ("vocab.json", "merges.txt"))
    if not vocabulary and not _present(folder / "tokenizer.json"):
        missing.append("tokenizer.json")
    return missing + _missing_weights(folder)


def fetch_model(
    model_id: str,
    local_dir: Path,
    source: str | None = None,
    revision: str | None = None,
    say: Say = lambda message: None,
) -> Path:
    """The folder of a model, fetched unless a complete copy is there (which costs no network).

    Args:
        model_id: e.g. "Qwen/Qwen3-0.6B".
        local_dir: where it belongs.
        source: "modelscope", "huggingface", or None for the one and, if it can't be reached or has no such
            model, the other.
        revision: a branch, tag or commit; None for the source's default.
        say: takes the decisions made on the way.

    Raises:
        UserError: it can't be had, with what each source said; or `local_dir` holds something else, another model too.
        OSError: the disk can't take it.
    """
    if not missing_model_files(local_dir):
        _check_source(local_dir, model_id, revision, say)
        return local_dir
    check_free(local_dir)
    return _fetch("model", dict.fromkeys([source] if source else SOURCES, model_id), revision, local_dir, say)


def _check_source(folder: Path, model_id: str, revision: str | None, say: Say) -> None:
    """Make sure that a model's folder is the one that is asked for; two repositories may share their last name.

    Without a revision any will do: `train.py` takes by its id what `download_model.py --revision` has fetched.

    Raises:
        UserError: it is another one.
    """
    wanted = _titled(model_id, revision)
    try:
        note = json.loads((folder / SOURCE_FILE).read_bytes())
        there = _titled(note["id"], note["revision"])
    except (OSError, ValueError, KeyError, TypeError):
        say(f"使用已有的 {folder}，没有核对它是不是 {wanted}")
        return
    if note["id"] != model_id or (revision and note["revision"] != revision):
        remedy = "请移走它，或换一个目录（download_model.py 用 --local-dir）"
        raise UserError(f"这个目录里是 {there}，不是 {wanted}", folder, remedy)
    if there != wanted:
        say(f"使用已有的 {folder}：{there}")


def _titled(model_id: str, revision: str | None) -> str:
    return f"{model_id}（版本 {revision}）" if revision else model_id


def fetch_dataset(
    dataset_id: str | None,
    source: str | None,
    local_dir: Path,
    revision: str | None = None,
    say: Say = lambda message: None,
) -> Path:
    """The folder of a data set's files (JSONL, JSON, CSV, Parquet), fetched unless it is there.

    Args:
        dataset_id: None for the original project's data set.
        source: as in `fetch_model`.

    Raises:
        UserError: as `fetch_model`, or the source has no known copy of the default data set.
        OSError: the disk can't take it.
    """
    ids = {name: dataset_id or DATASET_IDS[name] for name in ([source] if source else SOURCES)}
    known = {name: id_ for name, id_ in ids.items() if id_}
    if source and not known:
        remedy = "请用 --source modelscope，或自行下载后用 --source 指定文件或目录"
        raise UserError(f"{SOURCES[source].title} 上没有已核实的默认数据集，需要给出数据集 ID", None, remedy)
    if local_dir.is_dir() and any(local_dir.iterdir()):
        say(f"使用已下载的数据集 {local_dir}（删除该目录可重新下载）")
        return local_dir
    check_free(local_dir)
    return _fetch("dataset", known, revision, local_dir, say)


def check_free(folder: Path) -> None:
    """Make sure that nothing of the user's stands where a download or a new model is to go.

    Raises:
        UserError: a file, or a folder that holds something, is there.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        what = (
            f"目录已存在但不完整：缺少 {'、'.join(missing_model_files(folder))}" if folder.is_dir() else "这是一个文件"
        )
        raise UserError(what, folder, "请移走它，或换一个目录（download_model.py 用 --local-dir）")


def _fetch(kind: str, ids: Mapping[str, str], revision: str | None, local_dir: Path, say: Say) -> Path:
    """List, transfer, verify, rename."""
    source, listing = _first_listing(kind, ids, revision, local_dir, say)
    title = SOURCES[source].title
    size = sum(file.size or 0 for file in listing.files) / 1e6
    say(f"从 {title} 下载 {listing.repo_id} 到 {local_dir}（{len(listing.files)} 个文件，{size:,.1f} MB）")
    with _partial_folder(local_dir, say) as partial:
        _transfer(source, listing, partial, say)
        _remove_leftovers(partial, listing)
        if kind == "model" and (missing := missing_model_files(partial)):
            raise UserError(f"{listing.repo_id} 不是完整的模型：缺少 {'、'.join(missing)}", title, "请换一个模型")
        if kind == "model":
            note = json.dumps({"id": listing.repo_id, "revision": revision})
            (partial / SOURCE_FILE).write_text(note, encoding="utf-8")
        if local_dir.is_dir():  # an empty one; Windows can't rename onto it
            local_dir.rmdir()
        partial.replace(local_dir)
    return local_dir


def _first_listing(
    kind: str, ids: Mapping[str, str], revision: str | None, local_dir: Path, say: Say
) -> tuple[str, Listing]:
    """The first source that answers, and what it lists of use."""
    failures: list[str] = []
    for source, repo_id in ids.items():
        if failures:
            say(f"{failures[-1]}。改用 {SOURCES[source].title}")
        try:
            listing = _within(LISTING_SECONDS, SOURCES[source].list, repo_id, kind, revision)
        except Exception as error:
            failures.append(f"{SOURCES[source].title} {reason(error)}")
            continue
        return source, _usable(listing)
    names = "、".join(sorted(set(ids.values())))
    what, option = ("模型", "--model") if kind == "model" else ("数据集", "--source")
    remedy = f"请检查 ID 和网络（代理、HF_ENDPOINT）；也可以自行下载到本地目录，再用 {option} 目录 指定"
    raise UserError(f"无法下载{what} {names}：{'；'.join(failures)}", local_dir, remedy)


def _within(seconds: float, work: Callable[..., T], *arguments: object) -> T:
    """The result of `work`, or TimeoutError.

    In a thread of its own, because resolving a name has no time-out where packets are dropped, and because the
    clients' own time-outs and retries take up to minutes. An abandoned thread ends with the process.
    """
    outcome: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((work(*arguments), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"{seconds:g} 秒内没有应答") from None
    if error is not None:
        raise error
    return result


def _usable(listing: Listing) -> Listing:
    """The list without what is not used: other formats of the weights, code, images and the like.

    Raises:
        UserError: it names a file outside of its folder, or is no model or data set that can be used.
    """
    data = (*DATA_SUFFIXES, ".md") if listing.kind == "dataset" else MODEL_SUFFIXES
    files = tuple(
        file
        for file in listing.files
        if file.path.lower().endswith((*data, "license")) and not file.path.startswith(("original/", "onnx/"))
    )
    paths = [file.path for file in files]
    for path in paths:
        parts = PurePosixPath(path.replace("\\", "/")).parts
        if ".." in parts or parts[0] == "/" or PureWindowsPath(path).drive:
            raise UserError(f"{listing.repo_id} 含有越出目录的文件名 {path!r}", None, "请不要使用这个仓库")
    if listing.kind == "dataset":
        lacks = [] if any(path.lower().endswith(DATA_SUFFIXES) for path in paths) else ["数据文件"]
    else:
        lacks = [] if "config.json" in paths else ["config.json"]
        lacks += [] if any(path.endswith(".safetensors") for path in paths) else ["safetensors 权重"]
    if lacks:
        remedy = "请换一个仓库（只有 GGUF 或 .bin 权重的仓库不能用来训练）" if listing.kind == "model" else None
        raise UserError(f"{listing.repo_id} 的仓库里没有 {'、'.join(lacks)}", None, remedy)
    return Listing(listing.repo_id, listing.kind, listing.revision, listing.endpoint, files)


def _transfer(source: str, listing: Listing, folder: Path, say: Say) -> None:
    """Fill `folder`, fetching files that came damaged once more.

    Raises:
        UserError: it broke off, or files stay damaged; what is whole stays for the next run.
        OSError: the disk can't take it.
    """
    what = f"从 {SOURCES[source].title} 下载 {listing.repo_id}"
    other = next(name for name in SOURCES if name != source)
    remedy = f"请稍后重新运行，会接着下载，或换用 --source {other}"
    for _ in range(2):
        try:
            SOURCES[source].transfer(listing, folder)
        except Exception as error:
            if failed_disk := disk_error(error):
                failed_disk.filename = failed_disk.filename or str(folder)
                raise failed_disk from None
            kept = f"已下载的部分保留在 {folder}"
            raise UserError(f"{what} 时中断：{reason(error)}", kept, remedy) from error
        if not (damaged := _discard_damaged(folder, listing.files)):
            return
        say(f"校验和不符，没有采用：{'、'.join(damaged)}")
    raise UserError(f"{what}：两次校验和不符（{'、'.join(damaged)}）", None, remedy)


def _discard_damaged(folder: Path, files: Sequence[RemoteFile]) -> list[str]:
    """Remove the files that are not what the list says, and name them."""
    damaged = [file.path for file in files if not _matches(folder / file.path, file)]
    for path in damaged:
        (folder / path).unlink(missing_ok=True)
    return damaged


def _matches(path: Path, file: RemoteFile) -> bool:
    """Whether a file has the size and the checksum, SHA-256 or git's own, that its repository tells."""
    if not path.is_file() or (file.size is not None and path.stat().st_size != file.size):
        return False
    if file.sha256:
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest() == file.sha256.lower()
    if file.git_sha1:
        data = path.read_bytes()  # only small files are kept in git itself
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == file.git_sha1
    return True


@contextlib.contextmanager
def _partial_folder(target: Path, say: Say) -> Iterator[Path]:
    """The hidden folder in which `target` grows; it stays for the next run if anything came, else no trace is left."""
    partial = target.with_name(f".{target.name}.partial")
    created = [parent for parent in partial.parents if not parent.exists()]
    if partial.is_symlink():
        raise UserError("下载目录的位置上是一个链接", partial, "请移走它：下载只写进自己的目录")
    partial.mkdir(parents=True, exist_ok=True)
    for link in [path for path in partial.rglob("*") if path.is_symlink()]:  # neither client makes any
        link.unlink()
    if received := _bytes_in(partial):
        say(f"接着上次的下载（已有 {received / 1e6:,.1f} MB）")
    try:
        yield partial
    finally:
        if partial.is_dir() and not _bytes_in(partial):
            shutil.rmtree(partial, ignore_errors=True)
        for parent in created:
            with contextlib.suppress(OSError):  # it holds something by now
                parent.rmdir()


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _remove_leftovers(folder: Path, listing: Listing) -> None:
    """Remove what the repository does not list: locks, parts and files of another revision."""
    listed = {folder / file.path for file in listing.files}
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder itself
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):
                path.rmdir()
        elif path not in listed:
            path.unlink()


def _present(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _missing_weights(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file() and not (folder / names[0]).is_file():
        try:
            names = sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError):
            names = []
        if not names:
            return [f"{index.name}（损坏）"]
    missing = []
    for name in names:
        if not (folder / name).is_file():
            missing.append(name)
        elif not _is_whole(folder / name):
            missing.append(f"{name}（不完整）")
    if missing == ["model.safetensors"] and any(folder.glob("pytorch_model*.bin*")):
        return ["model.safetensors（只有 pytorch_model.bin：pickle 能执行代码，不载入；转换方法见 SECURITY.md）"]
    return missing


LONGEST_HEADER = 100_000_000  # the safetensors format's own limit


def _is_whole(file: Path) -> bool:
    """Whether a safetensors file has a header that parses and is as long as the header says."""
    size = file.stat().st_size
    with file.open("rb") as content:
        start = content.read(8)
        if len(start) < 8:
            return False
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, LONGEST_HEADER):
            return False
        try:
            header = json.loads(content.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return size == 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return False
