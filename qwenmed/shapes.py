"""The sizes of a Qwen3 model: what memory and work are computed from, with no weights at hand."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Of config.json of the published models (huggingface.co/Qwen): hidden size, intermediate size, layers, attention heads,
# and whether the word embeddings are the output layer too. All have 8 key-value heads of 128 and 151,936 words.
QWEN3 = {
    "Qwen/Qwen3-0.6B": (1024, 3072, 28, 16, True),
    "Qwen/Qwen3-1.7B": (2048, 6144, 28, 16, True),
    "Qwen/Qwen3-4B": (2560, 9728, 36, 32, True),
    "Qwen/Qwen3-8B": (4096, 12288, 36, 32, False),
    "Qwen/Qwen3-14B": (5120, 17408, 40, 40, False),
    "Qwen/Qwen3-32B": (5120, 25600, 64, 64, False),
}


@dataclass(frozen=True)
class Shape:
    """The sizes of one model.

    Attributes:
        width: of the hidden states.
        inner: of the gated feed-forward part.
        queries, keys: values of all attention heads together, and of all key-value heads.
        tied: whether the word embeddings are the output layer too.
    """

    width: int
    inner: int
    layers: int
    queries: int
    keys: int
    head: int
    words: int
    tied: bool

    @property
    def linear_parameters(self) -> int:
        """Weights of the seven linear projections of one layer."""
        return sum(into * out for into, out in self.linears)

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the seven linear projections of one layer."""
        width, inner = self.width, self.inner
        attention = [(width, self.queries), (width, self.keys), (width, self.keys), (self.queries, width)]
        return [*attention, (width, inner), (width, inner), (inner, width)]

    @property
    def embedding(self) -> int:
        """Weights of the word embeddings, and of the output layer."""
        return self.words * self.width

    @property
    def parameters(self) -> int:
        """All weights; a tied output layer counts once."""
        norms = 2 * self.width + 2 * self.head
        stack = self.layers * (self.linear_parameters + norms) + self.width
        return stack + self.embedding * (1 if self.tied else 2)

    def lora_parameters(self, rank: int) -> int:
        """Weights of LoRA adapters on all seven projections."""
        return self.layers * rank * sum(into + out for into, out in self.linears)


def known(model: str) -> Shape | None:
    """The shape of a published Qwen3 by its id; None for any other."""
    if model not in QWEN3:
        return None
    width, inner, layers, heads, tied = QWEN3[model]
    return Shape(width, inner, layers, heads * 128, 8 * 128, 128, 151_936, tied)


def of_config(config: Mapping[str, Any]) -> Shape:
    """The shape that a model's config.json tells."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return Shape(
        width=config["hidden_size"],
        inner=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        queries=config["num_attention_heads"] * head,
        keys=config.get("num_key_value_heads", config["num_attention_heads"]) * head,
        head=head,
        words=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
    )
