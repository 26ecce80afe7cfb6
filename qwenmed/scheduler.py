"""One engine for many callers at once: what a server asks its questions through.

A loaded model decodes the callers' rows together (continuous batching, see `running`): a new question joins at the
next token, an answer that ends makes room at once, and a caller who has gone is dropped before the next token. Other
engines answer each caller in the caller's own thread, as many at a time as they are good for.

Callers are threads: `stream` blocks for the next token and nothing else.
"""

import dataclasses
import queue
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, cast

from qwenmed import chat
from qwenmed.engine import Chunk, Engine, Generation, Messages, Prompt, Sampling
from qwenmed.errors import UserError

if TYPE_CHECKING:
    from qwenmed.engine_transformers import TransformersEngine
    from qwenmed.running import Row

# How long the decoding thread may take to end when the server closes.
CLOSE_SECONDS = 10
# How often a caller who waits for a place looks whether it is still wanted.
WAIT_SECONDS = 0.2


class Cancelled(Exception):
    """The caller has gone; nobody waits for the rest."""


class EngineFailed(UserError):
    """The engine, not the question, is at fault; asking again may help."""


class Ticket:
    """One caller's place: the tokens that come for it, and whether it still wants them.

    Attributes:
        row: the prompt on its way; None until the caller's thread has tokenised it.
    """

    def __init__(self) -> None:
        self.row: Row | None = None
        self.events: queue.SimpleQueue[int | Exception] = queue.SimpleQueue()
        self.cancelled = False

    def cancel(self) -> None:
        """Give the place up, from any thread; who waits for tokens gets `Cancelled`."""
        self.cancelled = True
        self.events.put(Cancelled())


class Scheduler:
    """Lets many threads ask one engine.

    Args:
        engine: a `TransformersEngine`, or any other.
        slots: replies at a time.

    Attributes:
        active: how many replies are being generated.
    """

    def __init__(self, engine: Engine, slots: int) -> None:
        self.engine, self.slots = engine, slots
        self._batching = hasattr(engine, "read")
        self._free = threading.BoundedSemaphore(slots)
        self._inbox: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._serving: dict[Row, Ticket] = {}
        self._direct = 0
        self._closed = False
        self._thread = threading.Thread(target=self._decode, name="decoder", daemon=True)
        if self._batching:
            self._thread.start()

    @property
    def active(self) -> int:
        """Replies that are being generated now."""
        return len(self._serving) if self._batching else self._direct

    def stream(self, prompt: Prompt, ticket: Ticket) -> Generator[Chunk | Generation, None, None]:
        """The reply's chunks as they come and then its `Generation`, as `Engine.stream`.

        Raises:
            UserError: the question does not fit, or the engine failed (an `EngineFailed`).
            Cancelled: the ticket was given up.
        """
        return self._batched(prompt, ticket) if self._batching else self._by_itself(prompt, ticket)

    @property
    def _model(self) -> "TransformersEngine":
        """The engine, where rows are decoded together."""
        return cast("TransformersEngine", self.engine)

    def close(self) -> None:
        """End the decoding; those who still wait get an `EngineFailed`."""
        self._closed = True
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def _by_itself(self, prompt: Prompt, ticket: Ticket) -> Generator[Chunk | Generation, None, None]:
        while not self._free.acquire(timeout=WAIT_SECONDS):
            if ticket.cancelled:  # who has gone does not wait for a place
                raise Cancelled
        try:
            self._direct += 1
            for event in self.engine.stream(prompt):
                if ticket.cancelled:
                    raise Cancelled
                yield event
        finally:
            self._direct -= 1
            self._free.release()

    def _batched(self, prompt: Prompt, ticket: Ticket) -> Generator[Chunk | Generation, None, None]:
        engine = self._model
        ticket.row = row = engine.row(0, prompt)
        parser, text = chat.ReplyParser(engine.tokenizer.decode(row.ids)), chat.TokenText(engine.tokenizer)
        self._inbox.put(ticket)
        taken = 0
        try:
            while True:
                event = ticket.events.get()
                if isinstance(event, Exception):
                    raise event
                taken += 1
                yield from (Chunk(*piece) for piece in parser.feed(text.feed([event])))
                if row.ended and taken == len(row.guide.ids):
                    break
        finally:
            ticket.cancelled = True  # no-one reads any more; the decoder drops the row
        yield from (Chunk(*piece) for piece in parser.feed(text.close()) + parser.close())
        yield row.generation(parser.reply)

    # --- the decoding thread -----------------------------------------------------------------------------------------

    def _decode(self) -> None:
        from qwenmed.running import Running

        running = Running(self._model)
        waiting: list[Ticket] = []
        while not self._closed:
            self._collect(waiting, block=not running.rows and not waiting)
            try:
                running.drop([row for row, ticket in self._serving.items() if ticket.cancelled])
                if arriving := self._arriving(running.rows, waiting):
                    self._serving |= {_row(ticket): ticket for ticket in arriving}
                    running.add([_row(ticket) for ticket in arriving])
                for row, token in running.choose() if running.rows else []:
                    self._serving[row].events.put(token)
                # Before the next questions are waited for: those that have ended are active no more.
                self._serving = {row: self._serving[row] for row in running.rows}
                running.advance()
            except Exception as error:  # whoever waits must not wait for ever
                self._fail(error)
                running.clear()
        for ticket in [*waiting, *self._serving.values()]:
            ticket.events.put(EngineFailed("服务正在关闭", None, "请稍后再试"))

    def _collect(self, waiting: list[Ticket], block: bool) -> None:
        """Take what has come in; with nothing to do, wait for it."""
        while block or not self._inbox.empty():
            ticket = self._inbox.get()
            if ticket is None:
                return
            waiting.append(ticket)
            block = False
        waiting[:] = [ticket for ticket in waiting if not ticket.cancelled]

    def _arriving(self, rows: "list[Row]", waiting: list[Ticket]) -> list[Ticket]:
        """The tickets that get a place now, first come first served."""
        if not waiting or len(rows) >= self.slots:
            return []
        fit = self._model.rows_that_fit(rows, list(map(_row, waiting)))
        count = max(0 if rows else 1, min(self.slots, fit) - len(rows))
        arriving, waiting[:] = waiting[:count], waiting[count:]
        return arriving

    def _fail(self, error: Exception) -> None:
        from qwenmed.engine_transformers import is_out_of_memory, out_of_memory

        words = str(out_of_memory()) if is_out_of_memory(error) else f"生成失败：{type(error).__name__}"
        for ticket in self._serving.values():
            ticket.events.put(EngineFailed(words))
        self._serving = {}
        self._model.forget_prefixes()


def _row(ticket: Ticket) -> "Row":
    """The row of a ticket that has come in."""
    assert ticket.row is not None
    return ticket.row


class Caller:
    """The engine as one request sees it: `MedicalAssistant(engine=Caller(…))`.

    Args:
        scheduler: shared by all.
        sampling: the request's own.
        stops: texts at which the answer ends, before them.

    Attributes:
        ticket: by it the reply is stopped.
        generation: the finished reply, once there is one.
    """

    def __init__(self, scheduler: Scheduler, sampling: Sampling | None = None, stops: Sequence[str] = ()) -> None:
        self.name, self.notice = scheduler.engine.name, scheduler.engine.notice
        self.fingerprint, self.context_length = scheduler.engine.fingerprint, scheduler.engine.context_length
        self.ticket = Ticket()
        self.generation: Generation | None = None
        self._scheduler, self._sampling, self._stops = scheduler, sampling, tuple(stops)

    def count_tokens(self, messages: Messages) -> int | None:
        """Tokens of the rendered prompt."""
        return self._scheduler.engine.count_tokens(messages)

    def stream(self, prompt: Prompt) -> Iterator[Chunk | Generation]:
        """As `Scheduler.stream`, with the request's sampling, up to its stop texts."""
        started, tokens = time.perf_counter(), {"thinking": 0, "answer": 0}
        texts = {"thinking": "", "answer": ""}
        finder = _StopFinder(self._stops)
        events = self._scheduler.stream(dataclasses.replace(prompt, sampling=self._sampling), self.ticket)
        for event in events:
            if isinstance(event, Generation):
                if rest := finder.close():
                    yield Chunk("answer", rest)
                self.generation = event
                yield event
                return
            tokens[event.kind] += 1
            shown = finder.feed(event.text) if event.kind == "answer" else event.text
            texts[event.kind] += shown
            if shown:
                yield Chunk(event.kind, shown)
            if finder.found:
                break
        events.close()
        row = self.ticket.row
        reply = chat.Reply(texts["thinking"].strip(), texts["answer"].strip())
        self.generation = Generation(
            reply=reply,
            finish_reason="stop",
            prompt_tokens=len(row.ids) if row else self.count_tokens(prompt.messages) or 0,
            thinking_tokens=row.guide.thinking_tokens if row else tokens["thinking"],
            answer_tokens=row.guide.answer_tokens if row else tokens["answer"],
            seconds=time.perf_counter() - started,
        )
        yield self.generation


class _StopFinder:
    """Passes text on until a stop text stands in it; what may be the beginning of one waits."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._waiting, self.found = stops, "", False

    def feed(self, text: str) -> str:
        """What may be shown now."""
        if not self._stops:
            return text
        self._waiting += text
        places = [place for stop in self._stops if (place := self._waiting.find(stop)) >= 0]
        if places:
            self.found = True
            return self._waiting[: min(places)]
        keep = max(_overlap(self._waiting, stop) for stop in self._stops)
        shown = self._waiting[: len(self._waiting) - keep]
        self._waiting = self._waiting[len(shown) :]
        return shown

    def close(self) -> str:
        """What has waited, when nothing more comes."""
        rest, self._waiting = self._waiting, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of a text are the beginning of a stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)
