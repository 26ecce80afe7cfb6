"""What a client is told when an answer fails: by status and kind whose fault it is, and an emergency's text all the same."""

import asyncio
import time

import httpx
import pytest
from fakes import Instant

from qwenmed import triage
from qwenmed.api import Service, build_app
from qwenmed.engine_openai import ServerError
from qwenmed.errors import UserError
from qwenmed.jobs import Gate
from qwenmed.scheduler import EngineFailed, Scheduler

ADDRESS = "http://10.1.2.3:8001/v1"
WARNING = triage.emergency_text(triage.assess("胸口像石头压着二十分钟了，出冷汗，左胳膊也疼，怎么办？"))


def ask(answer, timeout=10.0, **rest):
    """The response of an application that answers so, and what it has counted."""
    service = Service(Scheduler(Instant(), 1), Gate(1, 1), answer, {}, {}, timeout)

    async def post():
        transport = httpx.ASGITransport(build_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"messages": [{"role": "user", "content": "怎么办？"}], **rest}
            return await client.post("/v1/chat/completions", json=body)

    return asyncio.run(post()), service.metrics.text(0, 0)


def fails(error, warning=""):
    """An answer that ends with this error."""

    def answer(caller, asked, scenario, told):
        if warning:
            yield "emergency", warning
        yield "thinking", "想"
        raise error

    return answer


def hangs(caller, asked, scenario, told):
    """An emergency's answer that does not get beyond the fixed text."""
    yield "emergency", WARNING
    while not caller.ticket.cancelled:
        time.sleep(0.01)


failures = pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ServerError("连不上服务器", ADDRESS, "请检查地址"), 502, "请稍后再试"),
        (EngineFailed("服务正在关闭", None, "请稍后再试"), 503, "服务正在关闭"),
        (RuntimeError(ADDRESS), 500, "服务器内部错误"),
        (UserError("问题太长", ADDRESS, "请缩短问题"), 400, "问题太长。请缩短问题"),
    ],
)


@failures
def test_whose_fault_a_failure_is_shows_in_its_status_and_no_address_in_its_words(capsys, error, status, words):
    answer, counted = ask(fails(error))
    assert answer.status_code == status and words in answer.json()["error"]["message"]
    assert (answer.json()["error"]["type"] == "server_error") == (status >= 500)
    streamed, _ = ask(fails(error), stream=True)
    assert words in streamed.text and ('"type": "server_error"' in streamed.text) == (status >= 500)
    assert "10.1.2.3" not in answer.text + streamed.text
    assert 'outcome="failed"' in counted and ("出错" in capsys.readouterr().err) == (status >= 500)


@failures
def test_emergency_is_answered_with_its_fixed_text_whatever_fails(error, status, words):
    answer, counted = ask(fails(error, WARNING))
    (choice,) = answer.json()["choices"]
    assert answer.status_code == 200 and choice["message"]["content"] == triage.close_answer(WARNING)
    assert "120" in choice["message"]["content"] and answer.json()["medical"]["urgency"] == "emergency"
    assert words in answer.json()["medical"]["error"] and "10.1.2.3" not in answer.text
    assert 'outcome="failed"' in counted


def test_emergency_is_answered_with_its_fixed_text_when_the_time_is_up():
    answer, counted = ask(hangs, timeout=0.3)
    assert answer.status_code == 200 and "120" in answer.json()["choices"][0]["message"]["content"]
    assert 'outcome="timeout"' in counted
