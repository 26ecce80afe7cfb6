"""What the server takes and gives: OpenAI's chat completions, and the few fields of our own.

This module imports pydantic at once; it is imported when the server starts.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

# Limits of one request; the body's size is limited before it is parsed.
MOST_MESSAGES = 200
LONGEST_TEXT = 100_000
MOST_TOKENS = 32_768

Text = Annotated[str, StringConstraints(max_length=LONGEST_TEXT)]


class TextPart(BaseModel):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=100)] | None = None

    @property
    def text(self) -> str:
        """Its text; parts are joined."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class StreamOptions(BaseModel):
    """What a stream ends with."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """POST /v1/chat/completions."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: Annotated[str, StringConstraints(max_length=200)] = "medical"
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[str, StringConstraints(max_length=200)]
        | list[Annotated[str, StringConstraints(max_length=200)]]
        | None
    ) = None
    n: Literal[1] | None = None
    scenario: Annotated[str, StringConstraints(max_length=50)] | None = Field(
        None, description="One of the ten scenarios, or auto."
    )
    think_budget: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = Field(
        None, description="Most tokens of thinking; 0 asks for none."
    )

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > 4 or not all(stops):
            raise ValueError("at most 4 stop sequences, none of them empty")
        return value

    @model_validator(mode="after")
    def _ends_with_a_question(self) -> "ChatRequest":
        if self.messages[-1].role != "user" or not self.messages[-1].text.strip():
            raise ValueError("the last message must be a user's, and not empty")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts at which an answer is to end."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit(self) -> int | None:
        """The most tokens of a reply, thinking included."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def system(self) -> str | None:
        """The client's own system prompt, if it sends one."""
        texts = [message.text for message in self.messages if message.role in ("system", "developer")]
        return "\n".join(texts).strip() or None

    @property
    def turns(self) -> list[tuple[str, str]]:
        """Earlier questions with their answers; an answer without a question is left out."""
        return self._divided[0]

    @property
    def question(self) -> str:
        """What is asked now: all that the user has said since the last answer."""
        return self._divided[1]

    @property
    def _divided(self) -> tuple[list[tuple[str, str]], str]:
        """The conversation; messages of a user that follow one another are one question, for signs come one by one."""
        turns, waiting = [], []
        for message in self.messages:
            text = message.text.strip()
            if message.role == "user" and text:
                waiting.append(text)
            elif message.role == "assistant" and waiting:
                turns.append(("\n".join(waiting), text))
                waiting = []
        return turns, "\n".join(waiting)


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    error: ErrorDetail
