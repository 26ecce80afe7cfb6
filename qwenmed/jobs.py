"""One request's answer, made in a thread and read by the event loop; and the gate that bounds how many there are."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from qwenmed.scheduler import Caller, Cancelled

END = "end"


class Full(Exception):
    """No room for a further request."""


class Gate:
    """Counts requests from their arrival to their end; one too many is turned away.

    Args:
        slots: answers that are generated at a time.
        waiting: requests that may wait besides.
    """

    def __init__(self, slots: int, waiting: int) -> None:
        self.capacity = slots + waiting
        self.inside = 0
        # A thread for each request inside: it does nothing but wait for the next token.
        self.pool = ThreadPoolExecutor(self.capacity, thread_name_prefix="answer")

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """Be inside.

        Raises:
            Full: there is no room.
        """
        if self.inside >= self.capacity:
            raise Full
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


@dataclass(frozen=True)
class Event:
    """A piece of an answer: a kind of `MedicalAssistant.stream`, or `END` with the error that ended it, if any."""

    kind: str
    text: str = ""
    error: Exception | None = None


class Job:
    """An answer on its way.

    Args:
        caller: the engine as this request sees it; by it the answer is stopped.
        pieces: makes the answer's (kind, text) pairs, in a thread.
        seconds: most that it may take.
    """

    def __init__(self, caller: Caller, pieces: Callable[[], Iterator[tuple[str, str]]], seconds: float) -> None:
        self.caller, self._pieces, self._until = caller, pieces, time.monotonic() + seconds
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._done = threading.Event()

    def start(self, pool: ThreadPoolExecutor) -> "Job":
        """Begin; must be called in the event loop."""
        loop = asyncio.get_running_loop()
        pool.submit(self._run, loop)
        return self

    async def events(self) -> AsyncIterator[Event]:
        """The pieces as they come; the last one is `END`.

        Raises:
            TimeoutError: it took longer than it may; it is stopped then.
        """
        while True:
            async with asyncio.timeout(max(0.0, self._until - time.monotonic())):
                event = await self._events.get()
            yield event
            if event.kind == END:
                return

    def stop(self) -> None:
        """Let the answer end before its next token; it is not missed any more."""
        if not self._done.is_set():
            self.caller.ticket.cancel()

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        def tell(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        error = None
        try:
            for kind, text in self._pieces():
                tell(Event(kind, text))
        except Cancelled:
            pass
        except Exception as raised:
            error = raised
        finally:
            self._done.set()
            tell(Event(END, error=error))
