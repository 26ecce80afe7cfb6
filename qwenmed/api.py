"""The server: OpenAI's chat completions over the assistant, and the page that talks to it.

Each request is answered by the assistant, so that the urgency rules, the check of the answer and the disclaimer are in
every reply: an emergency's fixed text is the beginning of `content` and comes before any token is generated. What
OpenAI's form has no place for – urgency, scenario, why it ended – stands in the field `medical`.

This module imports FastAPI at once; it is imported when the server starts.
"""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from qwenmed import cli, triage
from qwenmed.api_types import ChatRequest, ErrorBody
from qwenmed.engine import Generation, Sampling
from qwenmed.engine_openai import ServerError
from qwenmed.errors import UserError
from qwenmed.jobs import END, Full, Gate, Job
from qwenmed.metrics import Metrics
from qwenmed.scheduler import Caller, EngineFailed, Scheduler
from qwenmed.web_guard import error_body, error_kind

PAGE = Path(__file__).parent / "chat_page"
PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/chat.js": ("chat.js", "text/javascript"),
    "/chat.css": ("chat.css", "text/css"),
}
MODEL = "medical"
RETRY_SECONDS = 5
CODES = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed"}
# OpenAI knows two of our four reasons; the exact one stands in `medical`.
FINISH_REASONS = {"stop": "stop", "length": "length", "think_budget": "stop", "repetition": "stop"}


@dataclass
class Service:
    """What the server is made of.

    Attributes:
        scheduler: the engine, shared.
        gate: bounds the requests.
        answer: (caller, request, scenario) → the (kind, text) pieces of an answer, and what to tell at its end.
        scenarios: their ids and names.
        page: what the page shows besides: samples, disclaimer.
        timeout: seconds that a request may take.
    """

    scheduler: Scheduler
    gate: Gate
    answer: Callable[[Caller, ChatRequest, str, dict[str, Any]], Iterator[tuple[str, str]]]
    scenarios: Mapping[str, str]
    page: Mapping[str, Any]
    timeout: float
    metrics: Metrics = field(default_factory=Metrics)


def build_app(service: Service) -> FastAPI:
    """The application; `web_guard.Guard` belongs before it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.scheduler.close()
        service.gate.pool.shutdown(wait=False, cancel_futures=True)

    # The interactive documentation would load scripts from another host.
    app = FastAPI(title="Qwen3 医疗助手", version="1", docs_url=None, redoc_url=None, lifespan=lifespan)
    _handle_errors(app, service)
    _add_page(app, service)
    _add_api(app, service)
    return app


def _add_page(app: FastAPI, service: Service) -> None:
    def page_file(name: str, kind: str) -> Callable[[], Response]:
        content = (PAGE / name).read_bytes()
        return lambda: Response(content, media_type=f"{kind}; charset=utf-8")

    for path, (name, kind) in PAGE_FILES.items():
        app.add_api_route(path, page_file(name, kind), include_in_schema=False)
    app.add_api_route("/favicon.ico", lambda: Response(status_code=204), include_in_schema=False)
    app.add_api_route("/page.json", lambda: JSONResponse(dict(service.page)), include_in_schema=False)


def _add_api(app: FastAPI, service: Service) -> None:
    errors = {status: {"model": ErrorBody} for status in (400, 401, 404, 413, 422, 429, 500, 502, 503, 504)}

    @app.get("/healthz", tags=["state"])
    def health() -> dict[str, Any]:
        """Whether the server is alive, and how much it has to do."""
        return {"status": "ok", "active": service.scheduler.active, "inside": service.gate.inside}

    @app.get("/metrics", tags=["state"], response_class=PlainTextResponse)
    def metrics() -> PlainTextResponse:
        """Counters for Prometheus."""
        text = service.metrics.text(service.scheduler.active, service.gate.inside)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", tags=["openai"])
    def models() -> dict[str, Any]:
        """The names that `model` takes: the assistant, and the assistant in one scenario."""
        names = [MODEL, *(f"{MODEL}:{scenario}" for scenario in service.scenarios)]
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": 0, "owned_by": "qwenmed"} for name in names],
        }

    @app.post("/v1/chat/completions", tags=["openai"], responses=errors, response_model=None)
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        """Answer a conversation's last question, whole or as a stream of events."""
        scenario = _scenario(asked, service.scenarios)
        reply = _Reply(service, asked, scenario)
        if asked.stream:
            reply.enter()  # a full house is told by the status, not in the stream
            return StreamingResponse(
                reply.stream(), media_type="text/event-stream", headers={"x-accel-buffering": "no"}
            )
        return await reply.whole(request)


def _scenario(asked: ChatRequest, scenarios: Mapping[str, str]) -> str:
    """The scenario that a request names, by its field or by the model's name; "auto" if it names none."""
    name, _, by_model = asked.model.partition(":")
    known = f"可选 {MODEL}，或 {'、'.join(f'{MODEL}:{each}' for each in scenarios)}"
    if name != MODEL or (by_model and by_model not in (*scenarios, "auto")):
        raise HTTPException(404, ("model_not_found", f"没有模型 {asked.model[:100]}：{known}", "model"))
    scenario = asked.scenario or by_model or "auto"
    if scenario not in (*scenarios, "auto"):
        raise HTTPException(
            400, ("unknown_scenario", f"没有场景 {scenario}：可选 {'、'.join(scenarios)}、auto", "scenario")
        )
    return scenario


class _Reply:
    """One chat completion."""

    def __init__(self, service: Service, asked: ChatRequest, scenario: str) -> None:
        seed = None if asked.seed is None else asked.seed % 2**32
        self._service, self._asked = service, asked
        self._caller = Caller(service.scheduler, Sampling(asked.temperature, asked.top_p, seed), asked.stops)
        self._medical: dict[str, Any] = {}
        self._job = Job(
            self._caller, lambda: service.answer(self._caller, asked, scenario, self._medical), service.timeout
        )
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self._inside = contextlib.ExitStack()
        self._watch = service.metrics.watch()

    def enter(self) -> None:
        """Take a place and begin.

        Raises:
            HTTPException: 429, there is none.
        """
        try:
            self._inside.enter_context(self._service.gate.enter())
        except Full:
            self._watch.done("rejected", None)
            headers = {"retry-after": str(RETRY_SECONDS)}
            raise HTTPException(429, ("rate_limit_exceeded", "正在回答的问题太多，请稍后再试", None), headers) from None
        self._job.start(self._service.gate.pool)

    async def whole(self, request: Request) -> Response:
        """The answer in one piece; nothing is generated for a client that has gone."""
        self.enter()
        content, thinking, warning = "", "", ""
        failure: HTTPException | None = None
        gone = asyncio.ensure_future(_disconnected(request))
        gone.add_done_callback(lambda done: None if done.cancelled() else self._job.stop())
        outcome = "failed"
        try:
            async for event in self._job.events():
                self._watch.piece(event.kind)
                if event.error:
                    raise event.error
                if event.kind == "thinking":
                    thinking += event.text
                elif event.kind != END:
                    warning = warning or (event.text if event.kind == "emergency" else "")
                    content = _appended(content, event.kind, event.text)
            outcome = "ok" if self._generation else "gone"
        except Exception as error:
            outcome, failure = self._failure(error)
            if not warning:
                raise failure from None
        finally:
            gone.cancel()
            self._leave(outcome)
        if failure:  # an emergency's fixed text needs no model, and a client might not show an error
            medical = {"urgency": triage.EMERGENCY, "error": failure.detail[1]}
            return self._completion(triage.close_answer(warning), "", "stop", {"medical": medical})
        if not self._generation:
            return Response(status_code=499)  # nobody reads it
        more = {"usage": self._usage, "medical": self._medical}
        return self._completion(content, thinking, self._finish_reason, more)

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        outcome, content = "gone", ""
        try:
            yield self._event({"role": "assistant", "content": ""})
            async for event in self._job.events():
                self._watch.piece(event.kind)
                if event.error:
                    raise event.error
                if event.kind == "thinking":
                    yield self._event({"reasoning_content": event.text})
                elif event.kind == "scenario":
                    yield self._event({}, medical={"scenario": event.text})
                elif event.kind != END:
                    grown = _appended(content, event.kind, event.text)
                    medical = {"urgency": "emergency"} if event.kind == "emergency" else None
                    yield self._event({"content": grown[len(content) :]}, medical=medical)
                    content = grown
            if self._generation:
                yield self._event({}, self._finish_reason, self._medical)
                if self._asked.stream_options and self._asked.stream_options.include_usage:
                    yield _sse({**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage})
                yield b"data: [DONE]\n\n"
                outcome = "ok"
        except Exception as error:  # the status is sent already; the client must still learn of it
            outcome, failure = self._failure(error)
            code, words, param = failure.detail
            yield _sse(error_body(words, error_kind(failure.status_code), code, param))
        finally:
            self._leave(outcome)

    def _leave(self, outcome: str) -> None:
        self._job.stop()
        self._inside.close()
        self._watch.done(outcome, self._generation)

    def _failure(self, error: Exception) -> tuple[str, HTTPException]:
        """What ended an answer: its outcome, and what the client is told; stderr has what is not the question's fault."""
        if isinstance(error, TimeoutError):
            return "timeout", HTTPException(504, ("timeout", f"{self._service.timeout:g} 秒之内没有答完", None))
        if isinstance(error, ServerError):
            cli.note(f"出错：{error}")
            return "failed", HTTPException(502, ("upstream_failed", "生成回答的服务器出错，请稍后再试", None))
        if isinstance(error, EngineFailed):
            cli.note(f"出错：{error}")
            return "failed", HTTPException(503, ("engine_failed", str(error), None))
        if isinstance(error, UserError):
            # Where it happened is for the operator: an address, a file.
            told = UserError(error.what, None, error.remedy)
            return "failed", HTTPException(400, ("invalid_request", str(told), None))
        cli.note(f"出错：{type(error).__name__}")
        return "failed", HTTPException(500, ("internal_error", "服务器内部错误", None))

    def _completion(self, content: str, thinking: str, finish_reason: str, more: dict[str, Any]) -> JSONResponse:
        message = {"role": "assistant", "content": content, "reasoning_content": thinking or None}
        choice = {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}
        return JSONResponse({**self._head("chat.completion"), "choices": [choice], **more})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._asked.model}

    def _event(
        self, delta: dict[str, Any], finish_reason: str | None = None, medical: dict[str, Any] | None = None
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        more = {"medical": medical} if medical else {}
        return _sse({**self._head("chat.completion.chunk"), "choices": [choice], **more})

    @property
    def _generation(self) -> Generation | None:
        return self._caller.generation

    @property
    def _finish_reason(self) -> str:
        assert self._generation is not None  # asked for once it is there, as below
        return FINISH_REASONS[self._generation.finish_reason]

    @property
    def _usage(self) -> dict[str, Any]:
        made = self._generation
        assert made is not None
        completion = made.thinking_tokens + made.answer_tokens
        return {
            "prompt_tokens": made.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": made.prompt_tokens + completion,
            "completion_tokens_details": {"reasoning_tokens": made.thinking_tokens},
        }


def _appended(content: str, kind: str, text: str) -> str:
    """The content with a further piece; a piece of another kind begins a paragraph."""
    if kind == "scenario":
        return content
    if kind == "closing":
        return f"{content}\n\n{text}" if content and text else content + text
    if kind == "emergency":
        return f"{text}\n\n"
    return content + text


async def _disconnected(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


def _sse(document: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode()


def _handle_errors(app: FastAPI, service: Service) -> None:
    @app.exception_handler(HTTPException)
    async def told(request: Request, error: HTTPException) -> JSONResponse:
        # What FastAPI itself refuses comes as bare words.
        code = CODES.get(error.status_code)
        code, words, param = error.detail if isinstance(error.detail, tuple) else (code, str(error.detail), None)
        body = error_body(words, error_kind(error.status_code), code, param)
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(each) for each in first["loc"] if each != "body")
        words = f"{place}: {first['msg']}" if place else str(first["msg"])
        return JSONResponse(error_body(words, "invalid_request_error", "invalid_request", place or None), 400)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        cli.note(f"出错：{type(error).__name__}（{request.url.path}）")
        return JSONResponse(error_body("服务器内部错误", "server_error", "internal_error"), 500)
