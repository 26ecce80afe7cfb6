"""A server's reply, put together from the events of its stream.

Thinking comes as `reasoning`, as `reasoning_content`, or as raw `<think>` text within the content; a reply whose
thinking was cut goes on in a second stream. Each event counts as a token.
"""

import time
from collections.abc import Sequence
from typing import Any

from qwenmed import chat
from qwenmed.engine import LOOP_INTERVAL, MODELS_OWN, Chunk, Generation, Prompt, find_loop, thinking_limit


def whole_characters(text: str) -> str:
    """The text with its surrogate pairs joined; a lone half, which UTF-8 has no way to write, becomes U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class _Pieces:
    """Text that comes in pieces; a server that cuts between the halves of a surrogate pair is waited for."""

    def __init__(self) -> None:
        self._half = ""

    def feed(self, piece: str) -> str:
        """What may be passed on now."""
        text, self._half = self._half + piece, ""
        if "\ud800" <= text[-1:] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        return whole_characters(text)

    def close(self) -> str:
        """What stands for a half that has waited in vain."""
        rest, self._half = self._half, ""
        return whole_characters(rest)


class Reader:
    """Puts a reply together from the events of its stream, or of two."""

    def __init__(self, prompt: Prompt) -> None:
        self.sampling = prompt.sampling or MODELS_OWN
        self._max_tokens = prompt.max_tokens
        self._budget = thinking_limit(prompt.max_tokens, prompt.think_budget)
        self._parser: chat.ReplyParser | None = chat.ReplyParser()  # for a content that holds the thinking
        self._parsed: chat.Reply | None = None
        self._has_fields = False
        self._reasoning, self._content = _Pieces(), _Pieces()
        self._pieces = {"thinking": "", "answer": ""}
        self._tokens = {"thinking": 0, "answer": 0}
        self._usage = 0
        self._started = time.perf_counter()
        self._continued = False
        self.finish_reason: str | None = None
        self.cut_thinking = False

    @property
    def thinking(self) -> str:
        """What has been thought so far."""
        return self._pieces["thinking"].strip()

    @property
    def answer(self) -> str:
        """What has been answered so far."""
        return self._pieces["answer"].strip()

    @property
    def room(self) -> int:
        """Tokens that may still come."""
        return max(1, self._max_tokens - sum(self._tokens.values()))

    @property
    def enough(self) -> bool:
        """Whether nothing more is wanted of this stream."""
        overrun = sum(self._tokens.values()) > self._max_tokens  # a server that knows no limit
        return overrun or self.finish_reason == "repetition" or (self.cut_thinking and not self._continued)

    @property
    def wants_answer(self) -> bool:
        """Whether the thinking was cut, or ended the turn without an answer."""
        ended_in_thinking = self.finish_reason == "stop" and bool(self.thinking)
        return (self.cut_thinking or ended_in_thinking) and not self.answer

    def feed(self, event: Any) -> list[Chunk]:
        """The chunks that one event adds."""
        if usage := getattr(event, "usage", None):
            self._usage = usage.prompt_tokens or self._usage
        if not event.choices:
            return []
        choice = event.choices[0]
        delta = choice.delta
        reasoning = getattr(delta, "reasoning", None) or getattr(delta, "reasoning_content", None)
        chunks = []
        if reasoning:
            self._has_fields = True
            chunks.append(("thinking", self._reasoning.feed(reasoning)))
        if delta.content:
            assert self._parser is not None  # `begin_answer` gives each stream its own
            if half := self._reasoning.close():
                chunks.append(("thinking", half))
            content = self._content.feed(delta.content)
            chunks += [("answer", content)] if self._has_fields else self._parser.feed(content)
        if choice.finish_reason:
            self.finish_reason = "length" if choice.finish_reason == "length" else "stop"
        elif reasoning or delta.content:
            self._count(chunks)
        return self._noted(chunks)

    def close_part(self) -> list[Chunk]:
        """What the parser still held back at the end of a stream."""
        rest = self._content.close()
        chunks = [("thinking", self._reasoning.close())]
        if self._has_fields or self._parser is None:
            return self._noted([*chunks, ("answer", rest)])
        chunks += self._parser.feed(rest) + self._parser.close()
        self._parsed, self._parser = self._parser.reply, None
        return self._noted(chunks)

    def begin_answer(self) -> None:
        """The thinking was cut; what follows in another stream is the answer."""
        self._parser, self._has_fields, self.finish_reason = chat.ReplyParser(), False, None
        self.cut_thinking = self._continued = True

    def generation(self) -> Generation:
        """The finished reply."""
        thinking, answer = self.thinking, self.answer
        if self._parsed and not self._has_fields and not self._continued:
            # The parser knows better than the stream did whether a text was thinking (a tag that nothing opened).
            thinking, answer = self._parsed.thinking, self._parsed.answer
        # None: it was left in the middle, for it went beyond its limit.
        reason = "think_budget" if self.cut_thinking and self.finish_reason == "stop" else self.finish_reason
        return Generation(
            reply=chat.Reply(
                thinking,
                answer,
                thinking_closed=bool(answer) or self.finish_reason == "stop",
                well_formed=self._well_formed(thinking, answer),
            ),
            finish_reason=reason or "length",
            prompt_tokens=self._usage,
            thinking_tokens=self._tokens["thinking"],
            answer_tokens=self._tokens["answer"],
            seconds=time.perf_counter() - self._started,
        )

    def _well_formed(self, thinking: str, answer: str) -> bool:
        """As the parser saw it; a server that separates the thinking itself shows only whether both are there."""
        if self._parsed and not self._has_fields:
            return self._parsed.well_formed
        return bool(thinking and answer) and chat.THINK_START not in answer and chat.THINK_END not in answer

    def _count(self, chunks: Sequence[tuple[str, str]]) -> None:
        # A tag yields no chunk; it belongs to the thinking.
        kind = chunks[-1][0] if chunks else ("answer" if self.answer else "thinking")
        self._tokens[kind] += 1
        in_circles = self._tokens[kind] % LOOP_INTERVAL == 0 and find_loop(self._pieces[kind])
        if kind == "thinking" and not self.cut_thinking:
            self.cut_thinking = bool(in_circles) or self._tokens[kind] >= self._budget
        elif kind == "answer" and in_circles:
            self.finish_reason = "repetition"

    def _noted(self, chunks: Sequence[tuple[str, str]]) -> list[Chunk]:
        for kind, text in chunks:
            self._pieces[kind] += text
        return [Chunk(kind, text) for kind, text in chunks if text]
