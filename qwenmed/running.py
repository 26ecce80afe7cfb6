"""The rows that a loaded model decodes now: they come, take a step together, and go one by one."""

import functools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwenmed import chat
from qwenmed.engine import Generation, Prompt

if TYPE_CHECKING:
    from qwenmed.decoding import Batch
    from qwenmed.engine_transformers import TransformersEngine
    from qwenmed.sampler import Sampler


class Row:
    """A prompt on its way to a reply."""

    def __init__(self, number: int, prompt: Prompt, ids: list[int], limit: int, engine: "TransformersEngine") -> None:
        self.number, self.prompt, self.ids, self.limit = number, prompt, ids, limit
        self.guide = engine.guide(self)
        self.sampler = engine.sampler(prompt.sampling)
        self.generator = self.sampler.generator(engine.model.device)
        self._started = time.perf_counter()

    @property
    def ended(self) -> bool:
        """Whether its reply is finished."""
        return self.guide.finish_reason is not None

    def again(self, engine: "TransformersEngine") -> "Row":
        """The same prompt from its beginning."""
        return Row(self.number, self.prompt, self.ids, self.limit, engine)

    def generation(self, reply: chat.Reply) -> Generation:
        """The finished reply."""
        return self.guide.generation(reply, len(self.ids), time.perf_counter() - self._started)


class Running:
    """Rows on their way, and the batch that holds their keys and values.

    Attributes:
        rows: in the order of the batch.
    """

    def __init__(self, engine: "TransformersEngine") -> None:
        self.rows: list[Row] = []
        self._engine = engine
        self._batch: Batch | None = None
        self._tokens: list[int] = []

    def add(self, arriving: Sequence[Row]) -> None:
        """Read the prompts of further rows."""
        groups = self._engine.by_prefix(arriving)
        # Before they are read, so that running out of memory loses none.
        self.rows += [row for group in groups for row in group]
        self._batch = _joined(self._batch, functools.reduce(_joined, map(self._engine.read, groups)))

    def choose(self) -> list[tuple[Row, int]]:
        """Let each row take its next token; those that end with it leave. Returns rows and tokens."""
        taken = list(zip(self.rows, self._chosen(), strict=True))
        going = [place for place, (row, _) in enumerate(taken) if not row.ended]
        self._tokens = [taken[place][1] for place in going]
        self._keep(going)
        return taken

    def advance(self) -> None:
        """Let the rows that go on read the tokens that they have taken."""
        if self._batch:
            self._batch.step(self._engine.model, self._tokens)

    def drop(self, unwanted: Sequence[Row]) -> None:
        """Let rows go that nobody waits for any more."""
        if unwanted:
            self._keep([i for i, row in enumerate(self.rows) if row not in unwanted])

    def clear(self) -> list[Row]:
        """Let all rows go, and free what they took; returns them."""
        rows, self.rows, self._batch = self.rows, [], None
        return rows

    def _keep(self, places: list[int]) -> None:
        if len(places) < len(self.rows):
            assert self._batch is not None
            # First what may run out of memory: `clear` must still find the rows that have ended.
            self._batch = self._batch.keep(places) if places else None
            self.rows = [self.rows[i] for i in places]

    def _chosen(self) -> list[int]:
        """Each row's next token, which its guide has then taken."""
        assert self._batch is not None
        if all(row.sampler is self.rows[0].sampler for row in self.rows):
            chosen = self.rows[0].sampler.choose(self._batch.logits, [row.generator for row in self.rows])
        else:
            chosen = self._chosen_by_sampler()
        return [row.guide.take(token) for row, token in zip(self.rows, chosen, strict=True)]

    def _chosen_by_sampler(self) -> list[int]:
        assert self._batch is not None
        places: dict[Sampler, list[int]] = {}
        for place, row in enumerate(self.rows):
            places.setdefault(row.sampler, []).append(place)
        chosen = [0] * len(self.rows)
        for sampler, some in places.items():
            tokens = sampler.choose(self._batch.logits[some], [self.rows[place].generator for place in some])
            for place, token in zip(some, tokens, strict=True):
                chosen[place] = token
        return chosen


def _joined(batch: "Batch | None", arrived: "Batch") -> "Batch":
    return batch.join(arrived) if batch else arrived
