"""The server's counters, in Prometheus' text form. No question and no key is in them."""

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwenmed.engine import Generation

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry = CollectorRegistry()
        own = {"registry": self._registry, "namespace": "qwenmed"}
        self.requests = Counter("requests", "Chat completions by outcome", ["outcome"], **own)
        self.tokens = Counter("tokens", "Tokens by kind", ["kind"], **own)
        self.emergencies = Counter("emergencies", "Questions with the fixed text of an emergency", **own)
        self.first = Histogram("first_piece_seconds", "From the request to the first piece", buckets=SECONDS, **own)
        self.whole = Histogram("request_seconds", "From the request to the end", buckets=SECONDS, **own)
        self._active = Gauge("active", "Replies that are being generated", **own)
        self._inside = Gauge("inside", "Requests that are answered or wait", **own)

    def watch(self) -> "Watch":
        """The clock of one request, which begins now."""
        return Watch(self)

    def text(self, active: int, inside: int) -> str:
        """Everything, for /metrics."""
        from prometheus_client import generate_latest

        self._active.set(active)
        self._inside.set(inside)
        return generate_latest(self._registry).decode()


class Watch:
    """What one request adds to the counters."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._started, self._first = metrics, time.perf_counter(), True

    def piece(self, kind: str) -> None:
        """A piece of the answer has come."""
        if kind == "emergency":
            self._metrics.emergencies.inc()
        if self._first and kind in ("emergency", "thinking", "answer"):
            self._first = False
            self._metrics.first.observe(time.perf_counter() - self._started)

    def done(self, outcome: str, generation: "Generation | None") -> None:
        """The request has ended."""
        self._metrics.requests.labels(outcome).inc()
        self._metrics.whole.observe(time.perf_counter() - self._started)
        if generation:
            self._metrics.tokens.labels("prompt").inc(generation.prompt_tokens)
            self._metrics.tokens.labels("thinking").inc(generation.thinking_tokens)
            self._metrics.tokens.labels("answer").inc(generation.answer_tokens)
