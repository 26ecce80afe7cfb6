"""A loopback server with the chat-completions interface that answers, or misbehaves, as it is told."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer:
    """Serves what `answers` says, one entry a request, the last one again and again.

    An entry is a function of the request's handler and body.

    Attributes:
        asked: the bodies of the requests, in order.
        keys: the Authorization headers.
        most_at_once: the largest number of requests that were open together.
    """

    def __init__(self, *answers, models=("demo",), port=0):
        self.answers, self.models = list(answers), list(models)
        self.asked, self.keys, self.paths = [], [], []
        self.most_at_once, self._open, self._lock = 0, 0, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                send_json(self, {"object": "list", "data": [
                    {"id": each, "object": "model", "max_model_len": 4096} for each in outer.models
                ]})  # fmt: skip

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.asked.append(body)
                    outer.keys.append(self.headers["Authorization"])
                    outer._open += 1
                    outer.most_at_once = max(outer.most_at_once, outer._open)
                    answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                try:
                    answer(self, body)
                except OSError:
                    pass  # the client has left
                finally:
                    with outer._lock:
                        outer._open -= 1

            def log_message(self, *arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def send_json(handler, document, status=200, headers=()):
    data = json.dumps(document).encode()
    handler.send_response(status)
    for name, value in headers:
        handler.send_header(name, value)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def begin_stream(handler):
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()


def send_event(handler, text):
    data = f"data: {text}\n\n".encode()
    handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    handler.wfile.flush()


def event(finish=None, **delta):
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return json.dumps(
        {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "demo", "choices": [choice]}
    )


def say(*deltas, finish="stop", usage=None, pause=0.0):
    """Stream these deltas (dictionaries) and end well."""

    def answer(handler, body):
        begin_stream(handler)
        for delta in deltas:
            send_event(handler, event(**delta))
            time.sleep(pause)
        send_event(handler, event(finish=finish))
        if usage:
            tail = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "demo", "choices": []}
            send_event(handler, json.dumps({**tail, "usage": usage}))
        send_event(handler, "[DONE]")
        handler.wfile.write(b"0\r\n\r\n")

    return answer


def fail(status, message="no", headers=()):
    return lambda handler, body: send_json(handler, {"error": {"message": message}}, status, headers)


def hang(seconds):
    return lambda handler, body: time.sleep(seconds)


def drop(*deltas):
    """Break off in the middle of the stream."""

    def answer(handler, body):
        begin_stream(handler)
        for delta in deltas:
            send_event(handler, event(**delta))
        handler.close_connection = True
        handler.connection.close()

    return answer


def raw(*texts):
    """Stream events with these texts, whatever they are."""

    def answer(handler, body):
        begin_stream(handler)
        for text in texts:
            send_event(handler, text)
        handler.wfile.write(b"0\r\n\r\n")

    return answer
