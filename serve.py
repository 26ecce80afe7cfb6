"""阶段 7：网页和 OpenAI 兼容的 API，都经过医疗助手——紧急规则、回答检查和免责声明在每一条回复里。

    python serve.py                                  # http://127.0.0.1:8000/ ，最近一次训练的最佳检查点
    python serve.py -c exports/Qwen3-0.6B-lora-gguf-q8_0 --port 9000
    python serve.py --host 0.0.0.0 --api-key-file keys.txt      # 给别的机器用：必须有密钥
    python serve.py --engine openai --base-url http://gpu:8000/v1       # 由 vLLM 生成，规则仍在这里

    curl -N http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"model": "medical:diagnosis", "stream": true, "messages": [{"role": "user", "content": "头痛三天了怎么办？"}]}'

model 是 medical（自动选择场景）或 medical:场景；思考在 reasoning_content 里，与 content 分开。
需要 pip install -e '.[serve]'。部署、限度与实测见 docs/serving.md。
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from medical_assistant import MedicalAssistant, suggest_scenario
from prompts import MEDICAL_SCENARIOS, SAMPLE_QUESTIONS
from qwenmed import cli, conversation, engines, files, triage
from qwenmed.answers import AssistantReply
from qwenmed.engines import EngineSettings
from qwenmed.errors import UserError
from qwenmed.settings import ServeSettings

if TYPE_CHECKING:
    from qwenmed.api import Service
    from qwenmed.api_types import ChatRequest
    from qwenmed.engine import Engine
    from qwenmed.scheduler import Caller

# Open files that the server asks the system for: each connection is one.
MOST_FILES = 65_536
# How long running answers may take after SIGTERM, in seconds.
GRACE = 30
KEY_LENGTH = 16


def main() -> None:
    """Read the settings, load the model, serve until a signal comes."""
    settings, engine_settings = read_command_line()
    keys = read_keys(settings)
    check_installed()
    with listen(settings) as listener:  # a port that is taken is told before a model is loaded
        service = build_service(settings, engine_settings)
        serve(settings, keys, service, listener)


def read_command_line() -> tuple[ServeSettings, EngineSettings]:
    """The settings.

    Raises:
        UserError: a value is outside of its range.
    """
    parser = cli.build_parser("serve.py", __doc__)
    cli.add_settings(parser, ServeSettings)
    cli.add_settings(parser, EngineSettings)
    args = parser.parse_args()
    return ServeSettings(**cli.given(args, ServeSettings)), EngineSettings(**cli.given(args, EngineSettings))


def read_keys(settings: ServeSettings) -> list[str]:
    """The API keys, one a line.

    Raises:
        UserError: the file is missing, a key is short, or other machines could ask without any.
    """
    keys = []
    if settings.api_key_file:
        path = Path(settings.api_key_file)
        keys = [line.strip() for line in files.read_text(path).splitlines() if line.strip()]
        if any(len(key) < KEY_LENGTH for key in keys):
            remedy = "例如 python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            raise UserError(f"密钥太短，每个至少 {KEY_LENGTH} 个字符", path, remedy)
    if not settings.is_loopback and not keys:
        remedy = "请用 --api-key-file 给出密钥，或只在本机使用（--host 127.0.0.1）"
        raise UserError("别的机器能访问的地址必须有密钥", settings.host, remedy)
    return keys


def check_installed() -> None:
    """Make sure that the optional packages are there before a model is loaded.

    Raises:
        UserError: one is missing.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"没有安装 {error.name}", None, "请运行 pip install -e '.[serve]'") from None


def listen(settings: ServeSettings) -> socket.socket:
    """The socket that the server listens on.

    Raises:
        UserError: the port is taken, or the address is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    # A port that was left a moment ago may be taken again; on Windows that option would share one that is in use.
    reuse = "SO_REUSEADDR" if os.name == "posix" else "SO_EXCLUSIVEADDRUSE"
    listener.setsockopt(socket.SOL_SOCKET, getattr(socket, reuse), 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        remedy = "端口可能被占用，或不允许使用；请用 --port 换一个，或检查 --host"
        raise UserError(f"不能在这个地址上监听：{error.strerror or error}", address_of(settings), remedy) from None
    return listener


def address_of(settings: ServeSettings) -> str:
    """The server's address for a browser."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{settings.port}"


def build_service(settings: ServeSettings, engine_settings: EngineSettings) -> "Service":
    """Load the engine, and what answers with it."""
    from qwenmed.api import Service
    from qwenmed.jobs import Gate
    from qwenmed.scheduler import Scheduler

    engine = engines.open_engine(engine_settings, for_batch=settings.slots > 1)
    slots = 1 if engine_settings.engine == engines.LLAMA else settings.slots  # llama.cpp answers one at a time
    budget = engine_settings.think_budget

    def answer(
        caller: "Caller", asked: "ChatRequest", scenario: str, told: dict[str, Any]
    ) -> Iterator[tuple[str, str]]:
        """One request, answered by an assistant of its own that knows the conversation so far."""
        assistant = MedicalAssistant(
            engine=cast("Engine", caller),  # one question: `generate` is not asked for
            think_budget=budget if asked.think_budget is None else asked.think_budget,
        )
        assistant.history = conversation.earlier_turns(
            asked.turns, lambda question: suggest_scenario(question).scenario, caller.notice
        )
        question = asked.question
        limit = min(asked.limit or settings.max_tokens, settings.max_tokens)
        if settings.log_content:
            cli.note(f"问（{scenario}）：{question}")
        yield from assistant.stream(question, scenario, limit, asked.system)
        told.update(summary(assistant.history[-1]))
        if settings.log_content:
            cli.note(f"答：{assistant.history[-1].answer}")

    return Service(
        scheduler=Scheduler(engine, slots),
        gate=Gate(slots, settings.waiting),
        answer=answer,
        scenarios=MEDICAL_SCENARIOS,
        page={
            "scenarios": [
                {"id": id_, "name": name, "samples": SAMPLE_QUESTIONS[id_]} for id_, name in MEDICAL_SCENARIOS.items()
            ],
            "disclaimer": triage.DISCLAIMER,
            "model": engine.name,
            "needs_key": bool(settings.api_key_file),
        },
        timeout=settings.request_timeout,
    )


def summary(reply: AssistantReply) -> dict[str, Any]:
    """What OpenAI's form has no place for."""
    names = ("urgency", "scenario", "finish_reason")
    told = {name: getattr(reply, name) for name in names}
    return {**told, "reasons": list(reply.reasons), "cautions": list(reply.cautions)}


def allow_connections() -> None:
    """Raise the limit of open files as far as the system lets a user; a shell's is often a few hundred."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(MOST_FILES, hard)
    if wanted > soft != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def serve(settings: ServeSettings, keys: list[str], service: "Service", listener: socket.socket) -> None:
    """Serve; a signal ends it when the running answers have ended, at most half a minute later."""
    import uvicorn

    from qwenmed import web_guard
    from qwenmed.api import build_app

    hosts = (*web_guard.LOOPBACK, settings.host) if settings.is_loopback else ()
    allow_connections()
    config = uvicorn.Config(
        web_guard.Guard(build_app(service), keys, hosts),
        http=web_guard.patient_protocol(),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE,
    )
    address = address_of(settings)
    needed = "需要密钥" if keys else "不需要密钥（只限本机）"
    cli.note(f"网页：{address}/    API：{address}/v1    {needed}    停止：Ctrl-C")
    uvicorn.Server(config).run([listener])


if __name__ == "__main__":
    cli.run(main)
