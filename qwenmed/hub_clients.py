"""What the clients of ModelScope and Hugging Face do for `hub`: list a repository, transfer its files, say what failed.

Where they fall short (modelscope_hub 0.5, huggingface_hub 2.4):
- Hugging Face's `snapshot_download` checks no checksum of a plain HTTP transfer, throws a broken-off file away,
  and takes any non-empty folder for the model when the hub is down. `transfer_huggingface` uses the client's
  `http_get` instead, which resumes; `hub` compares every file with the list.
- ModelScope's client fetches a file with a wrong checksum three times, and writes one named `../x` outside of
  the folder. It is given the list that `hub` has checked, without the checksums that `hub` checks afterwards.
"""

import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MODELSCOPE, HUGGINGFACE = "modelscope", "huggingface"

# For one source to list its files; two of them and the imports stay below half a minute.
LISTING_SECONDS = 11


@dataclass(frozen=True)
class RemoteFile:
    """A file as its repository lists it; what the source does not tell is None."""

    path: str
    size: int | None
    sha256: str | None
    git_sha1: str | None = None


@dataclass(frozen=True)
class Listing:
    """A repository at one revision: what can be fetched from where.

    Attributes:
        kind: "model" or "dataset".
        endpoint: the site that has it; None for the client's only one.
    """

    repo_id: str
    kind: str
    revision: str | None
    endpoint: str | None
    files: tuple[RemoteFile, ...]


def list_modelscope(repo_id: str, kind: str, revision: str | None) -> Listing:
    """Ask modelscope.cn, or modelscope.ai if only that has it, or MODELSCOPE_ENDPOINT."""
    from modelscope_hub import HubApi

    _quiet_modelscope()
    endpoint = HubApi().resolve_endpoint_for_read(repo_id, repo_type=kind)
    listed = HubApi(endpoint=endpoint).list_repo_files(repo_id, kind, revision=revision)
    # A size of 0 is how it tells both an empty file and one of unknown size.
    files = (RemoteFile(file.path, file.size or None, file.sha256 or None) for file in listed if file.type != "tree")
    return Listing(repo_id, kind, revision, endpoint, tuple(files))


def list_huggingface(repo_id: str, kind: str, revision: str | None) -> Listing:
    """Ask huggingface.co or HF_ENDPOINT; the revision of the answer is a commit."""
    # Read when the client is imported, and there is no other way to say it.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi

    info = HfApi().repo_info(repo_id, repo_type=kind, revision=revision, files_metadata=True, timeout=LISTING_SECONDS)
    files = (
        # What is kept outside of git (LFS) has a SHA-256, what is kept in it has git's own checksum.
        RemoteFile(file.rfilename, file.size, file.lfs.sha256 if file.lfs else None, None if file.lfs else file.blob_id)
        for file in info.siblings or []
    )
    return Listing(repo_id, kind, info.sha, None, tuple(files))


def transfer_modelscope(listing: Listing, folder: Path) -> None:
    """Fetch what is listed and not there; a part stays as FILE.incomplete and is resumed."""
    from modelscope_hub import HubApi
    from modelscope_hub.errors import FileDownloadError

    _quiet_modelscope()
    try:
        HubApi(endpoint=listing.endpoint).download_repo(
            listing.repo_id,
            listing.kind,
            revision=listing.revision,
            local_dir=folder,
            cache_dir=folder,  # its lock files then go with the folder
            file_list=[{"Path": file.path, "Size": file.size} for file in listing.files],
        )
    except FileDownloadError as error:
        failures = list(error.failed_files.values()) or [error]
        raise next(filter(None, map(disk_error, failures)), failures[0]) from error


def transfer_huggingface(listing: Listing, folder: Path) -> None:
    """Fetch what is listed and not there; a part stays as FILE.incomplete, as with ModelScope, and is resumed."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    # Compressed text could not be resumed: a range then counts compressed bytes.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    for file in listing.files:
        target = folder / file.path
        if target.exists():
            continue
        part = target.with_name(f"{target.name}.incomplete")
        part.parent.mkdir(parents=True, exist_ok=True)
        if file.size is not None and part.exists() and part.stat().st_size > file.size:
            part.unlink()
        with part.open("ab") as stream:
            http_get(
                hf_hub_url(listing.repo_id, file.path, repo_type=listing.kind, revision=listing.revision),
                stream,
                resume_size=stream.tell(),
                headers=headers,
                expected_size=file.size,
                displayed_filename=file.path,
            )
        part.replace(target)


@dataclass(frozen=True)
class Source:
    """A hub: its name for people, and the two things asked of it."""

    title: str
    list: Callable[[str, str, str | None], Listing]
    transfer: Callable[[Listing, Path], None]


SOURCES = {
    MODELSCOPE: Source("ModelScope", list_modelscope, transfer_modelscope),
    HUGGINGFACE: Source("Hugging Face", list_huggingface, transfer_huggingface),
}


def _quiet_modelscope() -> None:
    """Our messages tell what its log would; set after the import, which sets the level itself."""
    import logging

    logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)


_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}


def disk_error(error: BaseException | None) -> OSError | None:
    """The failing disk behind an error, if that is what it was; network errors are OSErrors as well."""
    while error is not None:
        if isinstance(error, OSError) and (error.errno in _DISK_ERRORS or error.filename is not None):
            return error
        error = error.__cause__
    return None


def reason(error: BaseException) -> str:
    """What a source said, short and in the user's words."""
    status = getattr(error, "status_code", None) or getattr(getattr(error, "response", None), "status_code", None)
    name = type(error).__name__
    if name == "RevisionNotFoundError":
        return "没有这个版本（404）"
    if status in (401, 404) or name == "NotExistError":  # Hugging Face answers 401 for what does not exist
        return f"没有这个仓库，或需要登录（{status or 404}）"
    if status == 403:
        return "没有访问权限（403）"
    if status:
        return f"答复 HTTP {status}"
    if name == "OfflineModeIsEnabled":
        return "处于离线模式（HF_HUB_OFFLINE=1）"
    if isinstance(error, ConnectionError | TimeoutError) or name in ("ConnectError", "ConnectTimeout", "ProxyError"):
        while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
            error = inner  # "Connection refused" stands at the bottom
        return f"连接失败（{_first_line(getattr(error, 'strerror', None) or error)}）"
    return _first_line(error)


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[E\d+\] ", "", lines[0])[:80]  # ModelScope's error numbers mean nothing to a user
