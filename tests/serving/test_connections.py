"""Connections: a request that never becomes whole is not waited for, and the port is the server's alone."""

import asyncio
import contextlib
import os
import pkgutil
import socket
import threading
import time

import pytest
import uvicorn

import serve
from qwenmed import web_guard
from qwenmed.settings import ServeSettings

PATIENCE = 0.5
REQUEST = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\n"


async def slow(scope, receive, send):
    """An application whose answer takes longer than a request may."""
    assert scope["type"] == "http"
    body = (await receive())["body"]
    await asyncio.sleep(2 * PATIENCE)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(params=["h11_impl.H11Protocol", "httptools_impl.HttpToolsProtocol"])
def connect(request, monkeypatch):
    """Opens connections to a server with little patience, with either of uvicorn's parsers."""
    pytest.importorskip(request.param.partition("_")[0])
    protocol = pkgutil.resolve_name(f"uvicorn.protocols.http.{request.param}")
    monkeypatch.setattr("uvicorn.protocols.http.auto.AutoHTTPProtocol", protocol)
    http = web_guard.patient_protocol(PATIENCE)
    server = uvicorn.Server(uvicorn.Config(slow, http=http, lifespan="off", log_level="critical"))
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        address = listener.getsockname()
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield lambda: stack.enter_context(socket.create_connection(address, timeout=10))
        server.should_exit = True
        thread.join(10)


def is_closed(client):
    """Whether the server closes a connection in time, and neither at once nor with an answer."""
    started = time.monotonic()
    return client.recv(100) == b"" and PATIENCE / 2 < time.monotonic() - started < 5


def answer(client):
    """A whole answer's status and body."""
    received = b""
    while not received.endswith(b"ping"):
        received += (piece := client.recv(1000))
        assert piece, received
    return received.split(b"\r\n")[0]


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nHost: lo", REQUEST, REQUEST + b"pi"])
def test_request_that_never_becomes_whole_is_closed(connect, begun):
    client = connect()
    client.sendall(begun)
    assert is_closed(client)


def test_answer_may_take_longer_than_a_request_and_the_next_request_has_its_own_time(connect):
    client = connect()
    for _ in range(2):
        client.sendall(REQUEST + b"ping")
        assert answer(client) == b"HTTP/1.1 200 OK"
    client.sendall(REQUEST[:30])
    assert is_closed(client)


@pytest.mark.skipif(os.name != "posix", reason="there is no such limit")
def test_server_may_open_more_files_than_a_shell_lets_it():
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, limit[1]), limit[1]))
        serve.allow_connections()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(serve.MOST_FILES, limit[1]), limit[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


class Asked:
    """A socket that only keeps the options that it was given."""

    def __init__(self, family, kind):
        self.options = []

    def setsockopt(self, level, option, value):
        self.options.append((level, option, value))

    def bind(self, address):
        pass


@pytest.mark.parametrize(("system", "option"), [("posix", socket.SO_REUSEADDR), ("nt", -5)])
def test_port_is_never_shared_with_another_server(monkeypatch, system, option):
    # On Windows SO_REUSEADDR would let two servers listen on one port.
    with monkeypatch.context() as patched:
        patched.setattr(os, "name", system)
        patched.setattr(socket, "SO_EXCLUSIVEADDRUSE", -5, raising=False)
        patched.setattr(socket, "socket", Asked)
        listener = serve.listen(ServeSettings())
    assert listener.options == [(socket.SOL_SOCKET, option, 1)]
