"""The engine for any OpenAI-compatible server: vLLM, SGLang, Ollama, llama.cpp's server, `transformers serve`.

The `openai` client does the HTTP work: requests, time-outs, connection reuse. It would ask again by itself, even
after it was told to stop and after a time-out; so that is done here, with exponential back-off (a server's
Retry-After is obeyed). What else is added is what the servers differ in:
- Thinking comes as `reasoning` (vLLM), as `reasoning_content` (SGLang, llama.cpp, `transformers serve`), or as
  raw `<think>` text within the content.
- Optional fields that a server refuses (`transformers serve` answers 422 to `stream_options`) are left out from
  then on.
- No server has a common way to bound the thinking. At the budget the stream is cut and the reply is continued
  in a second request behind the closed thinking (`continue_final_message`: vLLM, SGLang); where the server
  refuses that, it is asked once more without thinking, which then costs the answer the thinking's help.

Limits: a server that ignores the fields of a continuation thinks anew, within what is left of the tokens. The pieces
of a stream are counted as tokens, which is right unless a server sends several in one piece. What looks like a
control token in a message is broken up, for a server may take it for one.
"""

import contextlib
import email.utils
import functools
import os
import queue
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from qwenmed import chat
from qwenmed.controls import as_plain_words
from qwenmed.engine import MODELS_OWN, QWEN3_SAMPLING, Chunk, Generation, Messages, Prompt, Sampling
from qwenmed.errors import UserError
from qwenmed.server_reply import Reader, whole_characters

# How Qwen3's template is told to leave the thinking out, and how a server to go on with the last message.
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}
CONTINUE = {"add_generation_prompt": False, "continue_final_message": True}

KEY_VARIABLE = "OPENAI_API_KEY"
# Of one request; the first waits 0.5 s, each further one twice as long, at most 8 s.
RETRIES = 4
# Besides all from 500 on: time-out, conflict, too many requests.
TRY_AGAIN = (408, 409, 429)
# A server that wants to be left alone for longer is not waited for.
LONGEST_PAUSE = 120
# A stream that broke off is asked again from its beginning; only a batch can, for nobody has read its start.
BROKEN_STREAM_RETRIES = 2
# A server that fails so many rows one after another is down; the batch stops instead of failing ten thousand.
FAILURES_IN_A_ROW = 20

T = TypeVar("T")


class ServerError(UserError):
    """The server, not the question, is at fault; asking again may help."""


class OpenAIEngine:
    """Asks a server.

    Args:
        base_url: up to and including /v1.
        model: the server's name for the model; None takes the only one it has.
        sampling: what is None is Qwen3's recommendation.
        concurrency: requests at a time in `generate`.
        timeout: seconds without a sign of the server.
        api_key: by default that of the environment.
        retries: further tries of a request that a busy or absent server did not take.

    Raises:
        UserError: the server can't be reached, refuses the key, or has not the model.
    """

    notice = ""

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        sampling: Sampling = MODELS_OWN,
        *,
        concurrency: int = 8,
        timeout: float = 120.0,
        api_key: str | None = None,
        retries: int = RETRIES,
    ) -> None:
        import openai

        self._base_url, self._timeout, self._retries = base_url, timeout, retries
        self._sampling, self._concurrency = sampling.over(QWEN3_SAMPLING), concurrency
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=api_key or os.environ.get(KEY_VARIABLE) or "none",
            timeout=openai.Timeout(timeout, connect=min(timeout, 10.0)),
            max_retries=0,
        )
        # Fields that not every server knows; emptied when one refuses them.
        self._optional: dict[str, Any] = {"stream_options": {"include_usage": True}}
        self._can_continue = True
        served = self._served(model)
        self.name = self._pick(served, model)
        self.context_length = getattr(served.get(self.name), "max_model_len", None)
        self.fingerprint = f"{base_url} {self.name} {sampling}"

    def _served(self, model: str | None) -> dict[str, Any]:
        """The models that the server lists; nothing where it can't list them and one has been named."""
        import openai

        with _explained(self._base_url, self._timeout):
            try:
                return {each.id: each for each in self._retried(self._client.models.list, threading.Event())}
            except (openai.InternalServerError, openai.NotFoundError):
                # `transformers serve` fails so without a hub cache.
                if model is None:
                    raise
                return {}

    def _pick(self, served: dict[str, Any], model: str | None) -> str:
        if model is None and len(served) == 1:
            return next(iter(served))
        listed = "、".join(list(served)[:10]) or "（一个也没有）"
        if model is None:
            raise UserError("服务器上不止一个模型，或没有列出模型", self._base_url, f"请用 --model 指定：{listed}")
        # Some list aliases or nothing; only a list that plainly lacks the model is an error.
        if served and model not in served and f"{model}:latest" not in served:
            raise UserError(f"服务器上没有模型 {model}", self._base_url, f"它有：{listed}")
        return model

    def count_tokens(self, messages: Messages) -> int | None:
        """An upper estimate, one token a character and four a turn; None where the context length is unknown."""
        if self.context_length is None:
            return None
        return sum(len(message["content"]) + 4 for message in messages)

    def stream(self, prompt: Prompt) -> Iterator[Chunk | Generation]:
        """Yield the reply's chunks as they arrive, and at the end its `Generation`.

        Raises:
            UserError: the server failed (a `ServerError`) or refused the question.
        """
        return self._stream(prompt, threading.Event())

    def _stream(self, prompt: Prompt, stopped: threading.Event) -> Iterator[Chunk | Generation]:
        reader = Reader(prompt)
        extra = NO_THINKING if prompt.think_budget == 0 else {}
        yield from self._read(reader, prompt.messages, extra, stopped)
        yield from reader.close_part()
        if reader.wants_answer:
            yield from self._continue(reader, prompt, stopped)
        yield from reader.close_part()
        yield reader.generation()

    def generate(self, prompts: Iterable[Prompt | Any]) -> Iterator[Generation | UserError | Any]:
        """Ask for many prompts at once, `concurrency` at a time; results come in the order of the prompts.

        Raises:
            UserError: the server failed too many times one after another.
        """
        failures, stopped = 0, threading.Event()
        pending: deque[Any] = deque()

        def settle(item: Any) -> Any:
            nonlocal failures
            if not isinstance(item, Future):
                return item
            result = item.result()
            failures = failures + 1 if isinstance(result, ServerError) else 0
            if failures >= max(FAILURES_IN_A_ROW, 2 * self._concurrency):
                raise UserError(f"服务器连续 {failures} 题失败，已停止：{result.what}", self._base_url, result.remedy)
            return result

        workers = _Workers(self._concurrency)
        try:
            for prompt in prompts:
                asked = isinstance(prompt, Prompt)
                pending.append(workers.submit(self._answer, prompt, stopped) if asked else prompt)
                while pending and (len(pending) >= 4 * self._concurrency or _is_done(pending[0])):
                    yield settle(pending.popleft())
            while pending:
                yield settle(pending.popleft())
        finally:
            stopped.set()  # the threads leave their streams at the next piece, and ask no more
            workers.close()

    def _answer(self, prompt: Prompt, stopped: threading.Event) -> Generation | UserError:
        for attempt in range(BROKEN_STREAM_RETRIES + 1):
            try:
                *_, generation = self._stream(prompt, stopped)
                assert isinstance(generation, Generation)
                return generation
            except ServerError as error:
                failure = error
                if attempt == BROKEN_STREAM_RETRIES or stopped.wait(2.0**attempt):
                    break
            except UserError as error:
                return error
        return failure

    def _read(
        self, reader: Reader, messages: Messages, extra: dict[str, Any], stopped: threading.Event
    ) -> Iterator[Chunk]:
        """Feed a request's stream to the reader, until it ends or the reader has enough."""
        with _explained(self._base_url, self._timeout):
            sampling = reader.sampling.over(self._sampling)
            response = self._request(messages, reader.room, extra, sampling, stopped)
        with _explained(self._base_url, self._timeout, streaming=True):
            with contextlib.closing(response):
                for event in response:
                    if stopped.is_set():
                        raise ServerError("已停止", self._base_url)
                    yield from reader.feed(event)
                    if reader.enough:
                        return
            if reader.finish_reason is None:
                raise ServerError("服务器中途断开，回答不完整", self._base_url, "请再试一次，或查看服务器的日志")

    def _request(
        self, messages: Messages, max_tokens: int, extra: dict[str, Any], sampling: Sampling, stopped: threading.Event
    ) -> Any:
        import openai

        fields: dict[str, Any] = {
            "model": self.name,
            "messages": [_harmless(message) for message in messages],
            "max_tokens": max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stream": True,
        }
        if sampling.seed is not None:
            fields["seed"] = sampling.seed
        optional = self._optional  # other threads may empty it meanwhile
        create = functools.partial(self._client.chat.completions.create, **fields, extra_body=extra)
        try:
            return self._retried(functools.partial(create, **optional), stopped)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if not any(name in str(error) for name in optional):
                raise
            self._optional = {}
            return self._retried(create, stopped)

    def _retried(self, ask: Callable[[], T], stopped: threading.Event) -> T:
        """What the server gives; busy or absent, it is asked again. A silent one is not: each try takes all the time."""
        import openai

        for attempt in range(self._retries + 1):
            if stopped.is_set():
                break
            try:
                return ask()
            except openai.APITimeoutError:
                raise
            except (openai.APIConnectionError, openai.APIStatusError) as error:
                pause = _pause(error, attempt)
                if pause is None or attempt == self._retries or stopped.wait(pause):
                    raise
        raise ServerError("已停止", self._base_url)

    def _continue(self, reader: Reader, prompt: Prompt, stopped: threading.Event) -> Iterator[Chunk]:
        """The answer behind a thinking that was closed."""
        reader.begin_answer()
        if self._can_continue:
            begun = f"<think>\n{as_plain_words(reader.thinking)}\n</think>\n\n"
            as_begun = [*prompt.messages, {"role": "assistant", "content": begun}]
            try:
                yield from self._read(reader, as_begun, CONTINUE, stopped)
                return
            except ServerError:
                raise
            except UserError:  # it does not know the fields
                self._can_continue = False
        yield from self._read(reader, prompt.messages, NO_THINKING, stopped)


class _Workers:
    """Threads that ask: daemons, for at its end the interpreter waits for those of a ThreadPoolExecutor.

    Args:
        most: how many.
    """

    def __init__(self, most: int) -> None:
        self._most, self._started = most, 0
        self._tasks: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Let a thread call the function; returns what will have its result."""
        future: Future[Any] = Future()
        self._tasks.put((future, functools.partial(function, *arguments)))
        if self._started < self._most:
            self._started += 1
            threading.Thread(target=self._work, name="asking", daemon=True).start()
        return future

    def close(self) -> None:
        """Let the threads end when nothing is left to do."""
        for _ in range(self._started):
            self._tasks.put(None)

    def _work(self) -> None:
        while task := self._tasks.get():
            future, call = task
            try:
                future.set_result(call())
            except BaseException as error:  # it belongs to whoever waits for the result
                future.set_exception(error)


def _pause(error: Any, attempt: int) -> float | None:
    """Seconds until the next try, as the server says or twice as long each time; None if there shall be none."""
    response = getattr(error, "response", None)  # None: the server was not reached
    if response is not None and response.status_code < 500 and response.status_code not in TRY_AGAIN:
        return None
    told = "" if response is None else response.headers.get("retry-after", "")
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", told):
        seconds = float(told)
    elif date := email.utils.parsedate_tz(told):
        seconds = max(0.0, email.utils.mktime_tz(date) - time.time())
    else:
        seconds = min(0.5 * 2**attempt, 8.0) * random.uniform(0.75, 1)  # lest all rows come back together
    return seconds if seconds <= LONGEST_PAUSE else None


@contextlib.contextmanager
def _explained(base_url: str, timeout: float, streaming: bool = False) -> Iterator[None]:
    """Turn what the client raises into one line for the user; `streaming` once a reply has begun."""
    import httpx
    import openai

    try:
        yield
    except (openai.AuthenticationError, openai.PermissionDeniedError):
        raise UserError("服务器拒绝了密钥", base_url, f"请把密钥放进环境变量 {KEY_VARIABLE}") from None
    except openai.NotFoundError as error:
        raise UserError(f"服务器上没有这个地址或模型：{_words(error)}", base_url, "地址通常以 /v1 结尾") from None
    except (openai.APITimeoutError, httpx.TimeoutException):
        remedy = "请查看服务器是否过载，或用 --timeout 延长"
        raise ServerError(f"服务器 {timeout:g} 秒没有回应", base_url, remedy) from None
    except openai.RateLimitError:
        raise ServerError("服务器一直说太忙（429）", base_url, "请减小 --concurrency，或稍后再试") from None
    except openai.InternalServerError as error:
        raise ServerError(f"服务器出错（{error.status_code}）", base_url, "请查看服务器的日志") from None
    except openai.APIStatusError as error:
        raise UserError(f"服务器不接受这个问题（{error.status_code}）：{_words(error)}", base_url) from None
    except openai.APIConnectionError as error:
        if streaming:
            raise ServerError(f"服务器中途断开：{_words(error)}", base_url, "请再试一次，或查看服务器的日志") from None
        raise ServerError("连不上服务器", base_url, "请检查地址，以及服务是否已经启动") from None
    except (openai.OpenAIError, httpx.HTTPError, ValueError, AttributeError, TypeError) as error:
        # A stream that breaks off, is no JSON, or is JSON of another shape.
        what = "服务器中途断开" if isinstance(error, httpx.HTTPError) else "服务器的回应看不懂"
        raise ServerError(f"{what}：{_words(error)}", base_url, "请查看服务器的日志") from None


def _harmless(message: dict[str, str]) -> dict[str, str]:
    """A message without control tokens in its text; the assistant's own thinking keeps its tags."""
    if message["role"] == "assistant" and message["content"].startswith(chat.THINK_START):
        return message
    return {**message, "content": as_plain_words(message["content"])}


def _words(error: Exception) -> str:
    """An error's text on one line; for one that the server told within a stream, what it told."""
    told = getattr(error, "body", None) or error
    return " ".join(whole_characters(str(told)).split())[:200] or type(error).__name__


def _is_done(item: Any) -> bool:
    return not hasattr(item, "done") or item.done()
