"""The engine for a loaded model: streams one reply, or decodes many together (`decoding`).

Sampling follows the model's own generation config where the caller does not say otherwise: temperature, top-p,
top-k and min-p; other fields of it (beams, penalties, forced tokens) are not supported.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qwenmed import chat
from qwenmed.engine import MODELS_OWN, Chunk, Generation, Messages, Prompt, ReplyGuide, Sampling, reply_limit
from qwenmed.errors import UserError
from qwenmed.hardware import free_memory, is_out_of_memory
from qwenmed.running import Row, Running
from qwenmed.sampler import Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qwenmed.decoding import Batch, KeysValues

# Rows decoded together where memory allows (benchmarks/assistant.py; more were not measured).
BATCH_SIZE = 64
# Share of the free memory that keys and values may take.
MEMORY_SHARE = 0.6
# Shared beginnings of prompts that are kept: ten system prompts and a conversation; 0.9 GB in fp32 for Qwen3-0.6B.
PREFIX_TOKENS = 4096
# Callers may each ask for a sampling of their own.
SAMPLERS_KEPT = 256


class TransformersEngine:
    """Generates replies with a loaded model.

    Args:
        model: in eval mode, on its device; kept as `model`.
        tokenizer: the model's own; kept as `tokenizer`.
        sampling: how tokens are chosen.
        name, notice, fingerprint: as in `Engine`.
        batch_size: rows decoded together at most; fewer where memory is short.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        sampling: Sampling = MODELS_OWN,
        *,
        name: str = "",
        notice: str = "",
        fingerprint: str = "",
        batch_size: int = BATCH_SIZE,
    ) -> None:
        self.name, self.notice, self.fingerprint = name, notice, fingerprint
        self.model, self.tokenizer = model, tokenizer
        self._sampling = sampling
        self._samplers: dict[Sampling, Sampler] = {}
        self._batch_size = batch_size
        configured = model.generation_config.eos_token_id
        configured = configured if isinstance(configured, list) else [configured]
        self._stop_ids = chat.stop_ids(tokenizer, [*configured, tokenizer.eos_token_id])
        self._tags = tuple(tokenizer.convert_tokens_to_ids([chat.THINK_START, chat.THINK_END]))
        self._turn_end = tokenizer.convert_tokens_to_ids(chat.END_OF_TURN)
        self._closing = chat.closing_ids(tokenizer)
        self._prefixes = _Prefixes()

    @property
    def context_length(self) -> int:
        """How many tokens prompt and reply may take together."""
        return self.model.config.max_position_embeddings

    def count_tokens(self, messages: Messages) -> int:
        """Tokens of the rendered prompt."""
        return len(chat.render_prompt(self.tokenizer, messages))

    def stream(self, prompt: Prompt) -> Iterator[Chunk | Generation]:
        """Yield the reply's chunks as they are generated, and at the end its `Generation`.

        Closing the iterator, or an exception in its consumer (Ctrl-C included), ends the generation.

        Raises:
            UserError: the prompt alone fills the context, or memory runs out.
        """
        row = self.row(0, prompt)
        parser = chat.ReplyParser(self.tokenizer.decode(row.ids))
        text = chat.TokenText(self.tokenizer)
        try:
            batch = self.read([row], keep=True)
            while True:
                token = row.guide.take(row.sampler.choose(batch.logits, [row.generator])[0])
                yield from (Chunk(*piece) for piece in parser.feed(text.feed([token])))
                if row.ended:
                    break
                batch.step(self.model, [token])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory() from error
        yield from (Chunk(*piece) for piece in parser.feed(text.close()) + parser.close())
        yield row.generation(parser.reply)

    def generate(self, prompts: Iterable[Prompt | Any]) -> Iterator[Generation | UserError | Any]:
        """Answer many prompts together; results come in the order of the prompts, as `Engine` says.

        Prompts are taken a few batches ahead, the longest first, so that rows of a length run together.
        """
        queue, running, size = _Queue(prompts, self.row), Running(self), self._batch_size
        while True:
            queue.fill(2 * size, 8 * self._batch_size)
            yield from queue.ready()
            if not queue.waiting and not running.rows:
                if queue.exhausted:
                    return
                continue
            try:
                if arriving := self._arriving(queue, running.rows, size):
                    running.add(arriving)
                taken = running.choose()
                queue.done |= self._ended(row for row, _ in taken)
                running.advance()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                size = max(1, size // 2)
                cleared = running.clear()
                queue.done |= self._ended(cleared)
                lost = [row for row in cleared if not row.ended]
                if len(cleared) == len(lost) == 1:
                    queue.done[lost[0].number] = out_of_memory()
                else:
                    queue.waiting = [row.again(self) for row in lost] + queue.waiting
                self.forget_prefixes()

    def _arriving(self, queue: "_Queue", active: Sequence[Row], size: int) -> list[Row]:
        """The rows that join the running ones; a few at a time, for each arrival makes the whole batch be copied."""
        if not queue.waiting:
            return []
        free = min(size, self.rows_that_fit(active, queue.waiting)) - len(active)
        return queue.take(max(1, free)) if not active or free >= max(1, size // 8) else []

    def row(self, number: int, prompt: Prompt) -> Row:
        """A prompt, tokenised, on its way to a reply.

        Raises:
            UserError: it alone fills the context.
        """
        ids = chat.render_prompt(self.tokenizer, prompt.messages)
        if prompt.think_budget == 0:
            ids = [*ids, *chat.empty_thinking_ids(self.tokenizer)]
        return Row(number, prompt, ids, reply_limit(len(ids), prompt.max_tokens, self.context_length), self)

    def guide(self, row: Row) -> ReplyGuide:
        """What follows a row's reply token by token."""
        return ReplyGuide(
            row.limit,
            row.prompt.think_budget,
            self._tags,
            self._closing,
            self._stop_ids,
            state="no thinking" if row.prompt.think_budget == 0 else _state(row.ids, self._tags),
        )

    def _ended(self, rows: Iterable[Row]) -> dict[int, Generation]:
        """The finished replies among these rows, by the number of their prompt."""
        return {row.number: row.generation(self._parse(row)) for row in rows if row.ended}

    def _parse(self, row: Row) -> chat.Reply:
        text = chat.TokenText(self.tokenizer)
        return chat.parse_reply(self.tokenizer.decode(row.ids), text.feed(row.guide.ids) + text.close())

    def read(self, rows: Sequence[Row], keep: bool = False) -> "Batch":
        """Prefill rows that share their system prompt; `keep` remembers the only row's whole prompt too."""
        from qwenmed.decoding import prefill

        ids = rows[0].ids
        shared = self._system_length(ids)
        length, states = self._prefixes.longest(ids[: len(ids) - 1 if keep else shared])
        if shared and length < shared:
            part = prefill(self.model, [ids[:shared]], states, length)
            length, states = shared, part.keys_values(0, shared)
            self._prefixes.add(ids[:shared], states)
        batch = prefill(self.model, [row.ids for row in rows], states, length)
        if keep:
            self._prefixes.add(ids, batch.keys_values(0, len(ids)))
        return batch

    def _system_length(self, ids: Sequence[int]) -> int:
        """Tokens of the system block with its `<|im_end|>`; 0 if the first turn is the last one."""
        end = ids.index(self._turn_end) + 1 if self._turn_end in ids else 0
        return end if self._turn_end in ids[end:] else 0

    def sampler(self, sampling: Sampling | None) -> Sampler:
        """What chooses tokens for a prompt's own sampling; the same for all prompts that ask for the same."""
        wanted = (sampling or MODELS_OWN).over(self._sampling)
        if wanted not in self._samplers:
            if len(self._samplers) >= SAMPLERS_KEPT:
                self._samplers.clear()
            self._samplers[wanted] = Sampler(self.model.generation_config, wanted)
        return self._samplers[wanted]

    def by_prefix(self, rows: Sequence[Row]) -> list[list[Row]]:
        """The rows by the beginning that they share."""
        groups: dict[tuple[int, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault(tuple(row.ids[: self._system_length(row.ids)]), []).append(row)
        return list(groups.values())

    def forget_prefixes(self) -> None:
        """Free the keys and values of the beginnings that prompts share."""
        self._prefixes.clear()

    def rows_that_fit(self, running: Sequence[Row], waiting: Sequence[Row]) -> int:
        """How many rows of the longest kind memory has room for, the running ones among them: theirs counts as free."""
        from qwenmed.decoding import bytes_per_token

        per_row = bytes_per_token(self.model) * max(len(row.ids) + row.limit for row in (*running, *waiting))
        held = bytes_per_token(self.model) * sum(len(row.ids) + len(row.guide.ids) for row in running)
        return max(1, int((free_memory(self.model.device) * MEMORY_SHARE + held) / per_row))


class _Queue:
    """The prompts of a run: which wait for a place, and which results wait for those before them.

    Attributes:
        waiting: rows that have no place yet.
        done: results by the number of their prompt.
        exhausted: whether all prompts have been taken.
    """

    def __init__(self, prompts: Iterable[Prompt | Any], make_row: Callable[[int, Prompt], Row]) -> None:
        self.waiting: list[Row] = []
        self.done: dict[int, Any] = {}
        self.exhausted = False
        self._source, self._make_row = enumerate(prompts), make_row
        self._following = 0  # the number of the result that is due next

    def fill(self, ahead: int, held: int) -> None:
        """Take prompts until `ahead` of them wait, or `held` results do."""
        while not self.exhausted and len(self.waiting) < ahead and len(self.done) < held:
            number, prompt = next(self._source, (None, None))
            if number is None:
                self.exhausted = True
            elif not isinstance(prompt, Prompt):
                self.done[number] = prompt
            else:
                try:
                    self.waiting.append(self._make_row(number, prompt))
                except UserError as error:
                    self.done[number] = error

    def ready(self) -> Iterator[Any]:
        """The results whose turn it is."""
        while self._following in self.done:
            yield self.done.pop(self._following)
            self._following += 1

    def take(self, count: int) -> list[Row]:
        """The longest rows that wait; the one whose result is due comes first, lest it wait for ever."""
        self.waiting.sort(key=lambda row: (row.number != self._following, -row.limit, -len(row.ids)))
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        return taken


class _Prefixes:
    """Keys and values of beginnings that prompts share, the last used ones."""

    def __init__(self) -> None:
        self._entries: deque[tuple[list[int], KeysValues]] = deque()

    def longest(self, ids: Sequence[int]) -> "tuple[int, KeysValues | None]":
        """The longest beginning of `ids` that is known: its length, and its keys and values."""
        best, states = 0, None
        for known, kept in self._entries:
            length = _common(known, ids)
            if length > best:
                best, states = length, kept
        if states is None:
            return 0, None
        return best, [(keys[:, :, :best], values[:, :, :best]) for keys, values in states]

    def add(self, ids: Sequence[int], states: "KeysValues") -> None:
        """Remember a beginning; the oldest ones leave when it grows too much, and those that it continues."""
        kept = [entry for entry in self._entries if _common(entry[0], ids) < len(entry[0])]
        self._entries = deque([*kept, (list(ids), states)])
        while len(self._entries) > 1 and sum(len(known) for known, _ in self._entries) > PREFIX_TOKENS:
            self._entries.popleft()

    def clear(self) -> None:
        """Forget all, to free their memory."""
        self._entries.clear()


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _state(ids: Sequence[int], tags: tuple[int, int]) -> str:
    """How the prompt leaves the reply: some templates open the thinking themselves."""
    last = next((token for token in reversed(ids[-8:]) if token in tags), None)
    return "thinking" if last == tags[0] else "open"


def out_of_memory() -> UserError:
    """What is told when memory ran out over a single question."""
    return UserError("内存或显存不足，放不下这一个问题", None, "请减小 -m，缩短问题，或换小一些的模型")
