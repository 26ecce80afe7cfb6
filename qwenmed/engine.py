"""What every engine shares: the typed chunks of a stream, and the rules by which a reply goes on and ends.

An engine turns prompts into replies. There are three: `engine_transformers` (a loaded model), `engine_openai`
(any OpenAI-compatible server) and `engine_llama` (a GGUF file). A stream yields `Chunk`s and then one
`Generation`; whoever wants only the result loops over it.

Two failures of small models are ended here, token by token, for the engines that choose tokens themselves:
- Thinking that eats the whole reply. `ReplyGuide` closes the thinking at its budget, and always early enough
  that room for an answer is left (budget forcing, as in s1, arXiv:2501.19393).
- Repetition. `find_loop` looks for a tail that is a block repeated again and again. In the thinking it closes
  the thinking, in the answer it ends the reply.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from qwenmed import chat
from qwenmed.errors import UserError

Messages = Sequence[dict[str, str]]

# Of a reply's tokens those that the thinking may not take; a quarter where that is less.
ANSWER_ROOM = 512

# A loop: a block that stands there at least four times and takes at least so many tokens (or characters).
LOOP_REPEATS = 4
LOOP_LENGTH = 64
# How far back loops are looked for: a block of up to 128 tokens, about two sentences.
LOOP_WINDOW = 512
# Looking costs some tens of microseconds; once in so many tokens is often enough.
LOOP_INTERVAL = 16


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; None leaves a value to the model's own generation config.

    Attributes:
        temperature: 0 is greedy.
        top_p: share of probability that is sampled from.
        seed: fixes sampling, reply by reply.
    """

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None

    def over(self, default: "Sampling") -> "Sampling":
        """This one, with the default's values where it says nothing."""
        return Sampling(
            default.temperature if self.temperature is None else self.temperature,
            default.top_p if self.top_p is None else self.top_p,
            default.seed if self.seed is None else self.seed,
        )


# Everything as the model's own generation config says.
MODELS_OWN = Sampling()
# Qwen3's model card, thinking mode; for engines whose model does not tell its own.
QWEN3_SAMPLING = Sampling(temperature=0.6, top_p=0.95)
QWEN3_TOP_K = 20


@dataclass(frozen=True)
class Prompt:
    """One question to an engine.

    Attributes:
        messages: system prompt, earlier turns, question.
        max_tokens: limit of new tokens, thinking included.
        think_budget: limit of thinking tokens, its two tags included; 0 asks for no thinking, None sets
            no limit but the room for an answer.
        sampling: how this reply's tokens are chosen; what is None, or all of it, is as the engine does it.
    """

    messages: Messages
    max_tokens: int
    think_budget: int | None = None
    sampling: Sampling | None = None


@dataclass(frozen=True)
class Chunk:
    """A piece of a reply as it comes: `kind` is "thinking" or "answer"."""

    kind: str
    text: str


@dataclass(frozen=True)
class Generation:
    """A finished reply.

    Attributes:
        reply: thinking and answer, taken apart.
        finish_reason: "stop" – the model ended its turn; "length" – the token limit was reached;
            "think_budget" – the engine closed the thinking, at its budget, in a loop, or where the model
            would have ended without an answer; the answer then ended by itself;
            "repetition" – the answer went round in circles and was ended.
        prompt_tokens, thinking_tokens, answer_tokens: counts; thinking includes its two tags.
        seconds: wall time; in a batch from a row's start to its end, while others ran beside it.
    """

    reply: chat.Reply
    finish_reason: str
    prompt_tokens: int
    thinking_tokens: int
    answer_tokens: int
    seconds: float = field(compare=False)


class Engine(Protocol):
    """What turns prompts into replies.

    Attributes:
        name: the model, for output rows.
        notice: a text that the model wants shown with every answer, or "".
        context_length: tokens that prompt and reply may take together; None if it is not known.
        fingerprint: changes whenever the same prompt may get another reply: model and sampling.
    """

    name: str
    notice: str
    fingerprint: str

    @property
    def context_length(self) -> int | None: ...  # noqa: D102

    def count_tokens(self, messages: Messages) -> int | None:
        """Tokens of the rendered prompt, or None if only the server can tell."""

    def stream(self, prompt: Prompt) -> Iterator[Chunk | Generation]:
        """Yield the reply's chunks as they come, and at the end its `Generation`.

        Closing the iterator, or an exception in its consumer, ends the generation.

        Raises:
            UserError: the prompt does not fit, or the engine failed.
        """

    def generate(self, prompts: Iterable[Prompt | Any]) -> Iterator[Generation | UserError | Any]:
        """Answer many prompts, one result for each in their order; what fails comes as its UserError.

        Prompts are taken only as far ahead as the engine needs. Whatever is no `Prompt` is passed through in its
        place: rows that need no answer keep their order among those that do.
        """


class ReplyGuide:
    """Follows one reply token by token: what must come next, and whether it has ended.

    Args:
        limit: largest number of new tokens.
        budget: largest number of thinking tokens, tags included, or None.
        tags: ids of the opening and the closing think tag.
        closing: ids that close the thinking.
        stop_ids: ids that end a turn.
        state: how the prompt leaves the reply: "open" to anything, within its "thinking", or with
            "no thinking" wanted.
    """

    def __init__(
        self,
        limit: int,
        budget: int | None,
        tags: tuple[int, int],
        closing: Sequence[int],
        stop_ids: Iterable[int],
        state: str = "open",
    ) -> None:
        self.ids: list[int] = []
        self.finish_reason: str | None = None
        self._limit = limit
        self._budget = thinking_limit(limit, budget, len(closing))
        self._opened, self._closed = tags
        self._closing, self._stop_ids = list(closing), frozenset(stop_ids)
        self._thinking = state == "thinking"
        self._no_thinking = state == "no thinking"
        self._think_end = 0  # tokens up to and including the last closing tag
        self._forced: list[int] = []
        self._cut_thinking = False

    @property
    def forced(self) -> int | None:
        """The token that must come next, or None if the model may choose."""
        return self._forced[0] if self._forced else None

    @property
    def thinking_tokens(self) -> int:
        """Tokens of the thinking so far, tags included."""
        return len(self._body) if self._thinking else self._think_end

    @property
    def answer_tokens(self) -> int:
        """Tokens of the answer so far, without the one that ends the turn."""
        return len(self._body) - self.thinking_tokens

    def generation(self, reply: chat.Reply, prompt_tokens: int, seconds: float) -> Generation:
        """The finished reply with its counts."""
        assert self.finish_reason is not None
        return Generation(
            reply=reply,
            finish_reason=self.finish_reason,
            prompt_tokens=prompt_tokens,
            thinking_tokens=self.thinking_tokens,
            answer_tokens=self.answer_tokens,
            seconds=seconds,
        )

    @property
    def _body(self) -> list[int]:
        return self.ids[:-1] if self.ids and self.ids[-1] in self._stop_ids else self.ids

    def take(self, sampled: int) -> int:
        """Note the next token and return it: the sampled one, unless another must stand in its place."""
        token = self._forced.pop(0) if self._forced else self._allowed(sampled)
        self.ids.append(token)
        if token == self._opened:
            self._thinking = True
        elif token == self._closed:
            self._thinking, self._think_end = False, len(self.ids)
        if token in self._stop_ids:
            self.finish_reason = "think_budget" if self._cut_thinking else "stop"
        elif len(self.ids) >= self._limit:
            self.finish_reason = "length"
        elif not self._forced:
            self._look_after()
        return token

    def _allowed(self, token: int) -> int:
        """The token, unless it would cost the answer.

        A model whose thinking was cut may try to go on with it: a line break stands for its tags. One that ends
        its turn within the thinking has given no answer yet: the thinking is closed, and it goes on.
        """
        if self._thinking and token in self._stop_ids:
            self._forced, self._cut_thinking = self._closing[1:], True
            return self._closing[0]
        ended = self._no_thinking or (self._cut_thinking and not self._thinking)
        return self._closing[0] if ended and token in (self._opened, self._closed) else token

    def _look_after(self) -> None:
        in_circles = len(self.ids) % LOOP_INTERVAL == 0 and find_loop(self.ids)
        if self._thinking and (in_circles or len(self.ids) + len(self._closing) > self._budget):
            self._forced, self._cut_thinking = list(self._closing), True
        elif in_circles and not self._thinking and self.ids[self._think_end + LOOP_LENGTH :]:
            self.finish_reason = "repetition"


def reply_limit(prompt_tokens: int, max_tokens: int, context_length: int) -> int:
    """How many of `max_tokens` the context has room for behind the prompt.

    Raises:
        UserError: the prompt alone fills it.
    """
    if prompt_tokens >= context_length:
        raise UserError(f"问题太长：{prompt_tokens} 个 token，模型的上下文只有 {context_length}", None, "请缩短问题")
    return min(max_tokens, context_length - prompt_tokens)


def thinking_limit(limit: int, budget: int | None, closing: int = 3) -> int:
    """Tokens that the thinking may take of `limit`, so that an answer still has room behind it."""
    room = max(closing + 1, limit - min(ANSWER_ROOM, limit // 4))
    return room if budget is None else min(budget, room)


def find_loop(sequence: Sequence) -> int | None:
    """The length of the block that a sequence ends in again and again, or None if it does not.

    Works on token ids and on text alike. Linear in the window: the prefix function (Knuth, Morris, Pratt)
    of the reversed tail gives the shortest period of each of its beginnings.
    """
    tail = sequence[-LOOP_WINDOW:][::-1]
    border = [0] * len(tail)
    for i in range(1, len(tail)):
        k = border[i - 1]
        while k and tail[i] != tail[k]:
            k = border[k - 1]
        border[i] = k + (tail[i] == tail[k])
        length, period = i + 1, i + 1 - border[i]
        if length >= LOOP_LENGTH and period * LOOP_REPEATS <= length:
            return period
    return None
