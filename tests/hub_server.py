"""A loopback server that speaks the listing and download routes of ModelScope and Hugging Face.

The routes and fields are those which the real clients (modelscope 1.40, huggingface_hub 2.4) ask for.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c" * 40


class HubServer:
    """Serves one model folder under one id.

    Attributes:
        requests: (method, path, Range header) of everything that was asked.
        cuts: after how many bytes to break the next weights downloads off, one entry each.
        wrong_checksum: whether the listed SHA-256 of the weights is a wrong one.
        stall: send half of the weights and then nothing more.
    """

    def __init__(self, model_id: str, folder: Path) -> None:
        self.model_id, self.folder = model_id, folder
        self.requests: list[tuple[str, str, str | None]] = []
        self.cuts: list[int] = []
        self.wrong_checksum = self.stall = False
        self._released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.is_file())

    def sha256(self, path: Path) -> str:
        if self.wrong_checksum and path.suffix == ".safetensors":
            return "0" * 64
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def starts_asked(self) -> list[int]:
        """The first byte of each request for a part of a file."""
        ranges = [asked for method, _, asked in self.requests if method == "GET" and asked]
        return [int(asked.removeprefix("bytes=").split("-")[0]) for asked in ranges]

    def _handler(hub):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def do_HEAD(self):
                self._answer("HEAD")

            def do_GET(self):
                self._answer("GET")

            def _answer(self, method):
                hub.requests.append((method, self.path, self.headers.get("Range")))
                url = urlsplit(self.path)
                path, query = unquote(url.path), parse_qs(url.query)
                model = hub.model_id
                if path == f"/api/v1/models/{model}/repo/files":
                    listed = [
                        {
                            "Path": f.name,
                            "Name": f.name,
                            "Type": "blob",
                            "Size": f.stat().st_size,
                            "Sha256": hub.sha256(f),
                        }
                        for f in hub.files()
                    ]
                    self._json({"Code": 200, "Success": True, "Data": {"Files": listed}}, method)
                elif path == f"/api/v1/models/{model}/repo":
                    self._file(query["FilePath"][0], method)
                elif path in (f"/api/v1/models/{model}", f"/api/v1/models/{model}/revisions"):
                    self._json({"Code": 200, "Success": True, "Data": {"Name": model, "RevisionMap": {}}}, method)
                elif path.startswith(f"/api/models/{model}/revision/") or path == f"/api/models/{model}":
                    siblings = [{"rfilename": f.name} for f in hub.files()]
                    self._json({"id": model, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}, method)
                elif path.startswith(f"/api/models/{model}/tree/"):
                    self._json([hub._tree_entry(f) for f in hub.files()], method)
                elif path.startswith(f"/{model}/resolve/"):
                    self._file(path.rsplit("/", 1)[-1], method)
                else:
                    self._json({"Code": 404, "Success": False, "Message": "not found"}, method, 404)

            def _json(self, value, method, status=200):
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                if status == 404:
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if method == "GET":
                    self.wfile.write(body)

            def _file(self, name, method):
                path = hub.folder / Path(name).name
                if not path.is_file():
                    self._json({"Code": 404, "Message": "no such file"}, method, 404)
                    return
                body, start = path.read_bytes(), 0
                asked = self.headers.get("Range")
                if asked:
                    first, _, last = asked.removeprefix("bytes=").partition("-")
                    start, end = int(first), int(last) if last else len(body) - 1
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{end}/{len(body)}")
                    body = body[start : end + 1]
                else:
                    self.send_response(200)
                digest = hub.sha256(path)
                self.send_header("ETag", f'"{digest}"')
                self.send_header("X-Linked-Etag", f'"{digest}"')
                self.send_header("X-Linked-Size", str(path.stat().st_size))
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if method != "GET":
                    return
                if hub.cuts and path.suffix == ".safetensors":
                    self.wfile.write(body[: hub.cuts.pop(0)])
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.close()
                    return
                if hub.stall and path.suffix == ".safetensors":
                    self.wfile.write(body[: len(body) // 2])
                    hub._released.wait(60)
                    return
                self.wfile.write(body)

        return Handler

    def _tree_entry(self, path: Path) -> dict:
        size = path.stat().st_size
        entry = {"type": "file", "path": path.name, "size": size, "oid": "a" * 40}
        if path.suffix == ".safetensors":
            entry["lfs"] = {"oid": self.sha256(path), "size": size, "pointerSize": 130}
        return entry
