"""A loopback server that speaks the routes of ModelScope and Hugging Face which the real clients use.

Read from modelscope_hub 0.5.1 and huggingface_hub 2.4.0:

    GET /api/v1/models/ID/repo/files, /api/v1/datasets/ID/repo/tree      ModelScope's lists
    GET /api/v1/models/ID/repo?FilePath=…                                a file (Range honoured)
    GET /api/models/ID[/revision/R]?blobs=true                           Hugging Face's list
    GET /ID/resolve/COMMIT/FILE, /datasets/ID/resolve/COMMIT/FILE        a file (Range honoured)
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c" * 40


class HubServer:
    """Serves the files of one folder as the model and as the data set `repo_id`.

    Attributes:
        requests: (path, Range header) of everything that was asked.
        listed: names in the lists; those without a file can be asked for in vain.
        cut_after: send so many bytes of the largest file and hang up; after that answer 503 for it.
        stall_after: send so many bytes of the largest file and then nothing more.
        wrong_checksum: list another checksum than the largest file has.
        silent: accept every request and never answer.
    """

    def __init__(self, folder: Path, repo_id: str = "org/tiny") -> None:
        self.folder, self.repo_id = folder, repo_id
        self.requests: list[tuple[str, str | None]] = []
        self.listed = sorted(path.name for path in folder.iterdir() if path.is_file())
        self.largest = max(self.listed, key=lambda name: (folder / name).stat().st_size)
        self.cut_after: int | None = None
        self.stall_after: int | None = None
        self.wrong_checksum = self.silent = False
        self.closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def ranges(self) -> list[str]:
        """The Range headers that were sent, of every file."""
        return [asked for _, asked in self.requests if asked]

    def sizes_and_sums(self, name: str) -> tuple[int, str, str]:
        """Size, SHA-256 and git's checksum, as the lists tell them."""
        path = self.folder / name
        data = path.read_bytes() if path.is_file() else b"{}"
        shown = data + b"!" if self.wrong_checksum and name == self.largest else data
        git = hashlib.sha1(b"blob %d\0" % len(shown) + shown).hexdigest()
        return len(data), hashlib.sha256(shown).hexdigest(), git


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """Nothing: a client that hangs up is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *arguments) -> None:
        """Nothing: pytest shows what matters."""

    def do_GET(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        hub.requests.append((self.path, self.headers.get("Range")))
        if hub.silent:
            hub.closing.wait()
            return
        path, query, id_ = unquote(url.path), parse_qs(url.query), hub.repo_id
        if path in (f"/api/v1/models/{id_}/repo/files", f"/api/v1/datasets/{id_}/repo/tree"):
            self.send_json({"Code": 200, "Data": {"Files": [self.modelscope_entry(name) for name in hub.listed]}})
        elif path in (f"/api/v1/models/{id_}/repo", f"/api/v1/datasets/{id_}/repo"):
            self.send_file(query["FilePath"][0])
        elif path.removesuffix("/revision/main") in (f"/api/models/{id_}", f"/api/datasets/{id_}"):
            siblings = [self.huggingface_entry(name) for name in hub.listed]
            self.send_json({"id": id_, "sha": COMMIT, "siblings": siblings})
        elif path.removeprefix("/datasets").startswith(f"/{id_}/resolve/{COMMIT}/"):
            self.send_file(path.rpartition(f"/{COMMIT}/")[2])
        else:
            self.send_json({"Code": 10010205001, "Message": "not found", "error": "Repository not found"}, 404)

    def modelscope_entry(self, name: str) -> dict:
        size, sha256, _ = self.hub.sizes_and_sums(name)
        return {"Path": name, "Name": name, "Type": "blob", "Size": size, "Sha256": sha256}

    def huggingface_entry(self, name: str) -> dict:
        size, sha256, git = self.hub.sizes_and_sums(name)
        lfs = {"lfs": {"sha256": sha256, "size": size, "pointerSize": 130}} if name == self.hub.largest else {}
        return {"rfilename": name, "size": size, "blobId": git, **lfs}

    def send_json(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, name: str) -> None:
        hub, path = self.hub, self.hub.folder / Path(name).name
        if not path.is_file():
            self.send_json({"Message": "no such file"}, 404)
            return
        faulty = name == hub.largest
        if faulty and hub.cut_after == 0:
            self.send_json({"Message": "gone for now"}, 503)
            return
        data, asked = path.read_bytes(), self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if faulty and hub.cut_after:
            self.wfile.write(data[start : start + hub.cut_after])
            hub.cut_after = 0
            self.close_connection = True
        elif faulty and hub.stall_after:
            self.wfile.write(data[start : start + hub.stall_after])
            self.wfile.flush()
            hub.closing.wait()
        else:
            self.wfile.write(data[start:])
