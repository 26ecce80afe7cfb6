"""What stands before every request of the server: keys, hosts, sizes, the headers of every answer, and its patience.

Plain ASGI, so that a stream is passed through piece by piece. Errors have OpenAI's form.
"""

import asyncio
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

# Bytes of a request.
LARGEST_BODY = 1_000_000
# Seconds that a request may take to become whole.
PATIENCE = 30.0
# What may be asked without a key: the page itself (it asks for the key), and whether the server is alive.
OPEN_PATHS = frozenset({"/", "/chat.js", "/chat.css", "/page.json", "/healthz", "/favicon.ico"})
# Names by which a server on the loopback is asked; another one is a web page that a stranger made point here.
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """ASGI middleware.

    Args:
        app: what it stands before.
        keys: API keys, one of which a request must bear; none are asked for if empty.
        hosts: allowed Host names; any if empty.
        largest_body: bytes.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        keys: Sequence[str] = (),
        hosts: Collection[str] = (),
        largest_body: int = LARGEST_BODY,
    ) -> None:
        self._app, self._hosts, self._largest = app, frozenset(hosts), largest_body
        self._too_large = "request_too_large", f"请求超过 {largest_body:,} 字节"
        # Of equal length, so that the comparison takes the same time whatever is sent.
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or answer it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        guarded = _with_headers(send)
        if refusal := self._refusal(scope["path"], headers):
            await _answer(guarded, *refusal)
            return
        await self._app(scope, self._limited(receive), guarded)

    def _refusal(self, path: str, headers: dict[str, str]) -> tuple[int, str, str] | None:
        """Status, code and words for a request that may not pass."""
        if self._hosts and _host_name(headers.get("host", "")) not in self._hosts:
            return 421, "wrong_host", "这个地址不由本服务回答 (unknown Host)"
        if self._keys and path not in OPEN_PATHS and not self._has_key(headers.get("authorization", "")):
            return 401, "invalid_api_key", "缺少 API 密钥，或密钥不对 (missing or wrong API key)"
        length = headers.get("content-length", "")
        if length and not (length.isascii() and length.isdigit()):
            return 400, "invalid_request", "Content-Length 不是数字"
        if length and int(length) > self._largest:
            return 413, *self._too_large
        return None

    def _has_key(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        # All are compared: how long it takes does not tell which one was near.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(matches)

    def _limited(self, receive: Receive) -> Receive:
        """The body, refused where it outgrows its limit though its length was not told."""
        from starlette.exceptions import HTTPException

        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._largest:  # the application answers what a middleware raises
                    raise HTTPException(413, (*self._too_large, None))
            return message

        return limited


def patient_protocol(seconds: float = PATIENCE) -> type[asyncio.Protocol]:
    """The protocol of uvicorn with an end to its patience: a connection whose request does not become whole is closed.

    By itself it waits for ever, so that half a header on each of a few hundred connections locks all others out.

    Args:
        seconds: from a connection's beginning, or a further request's first byte, to the request's last.
    """
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    class PatientProtocol(AutoHTTPProtocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._begin()

        def data_received(self, data: bytes) -> None:
            self._begin()
            super().data_received(data)
            # A cycle that has ended is the request's before.
            if self.cycle and not (self.cycle.more_body or self.cycle.response_complete):
                self._end()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end()
            super().connection_lost(exc)

        def _begin(self) -> None:
            if not self._deadline:
                self._deadline = self.loop.call_later(seconds, self.transport.close)

        def _end(self) -> None:
            if self._deadline:
                self._deadline.cancel()
                self._deadline = None

    return PatientProtocol


def error_body(message: str, kind: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_kind(status: int) -> str:
    """OpenAI's type of error for an HTTP status."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")


def _host_name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].lower()


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", [])}
            added = [(name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in names]
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await send(message)

    return sending


async def _answer(send: Send, status: int, code: str, words: str) -> None:
    body = json.dumps(error_body(words, error_kind(status), code), ensure_ascii=False).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
