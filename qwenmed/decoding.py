"""Many replies decoded together, row by row of different length, with rows that come and go.

`generate` of transformers runs a padded batch until its longest row has ended, and copies the whole key/value
cache at every token. Here (continuous batching, as in Orca, OSDI 2022, reduced to what one process needs):
- a row that has ended leaves at once, and waiting ones take its place, so that no slot runs idle;
- the cache grows into spare room in place (`GrowingLayer`);
- rows that share a system prompt share its keys and values, which are computed once.

A batch is a rectangle: a row's tokens stand in the order of its columns with gaps between them that a mask
hides – on the left (rows of other lengths) and behind the shared prefix (prompts of other lengths).

This module imports torch and transformers at once; it is imported when a model is loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Columns of spare room; a cache of 500 tokens is then copied four times in all instead of 500 times.
SPARE = 128

KeysValues = list[tuple[torch.Tensor, torch.Tensor]]


class GrowingLayer(DynamicLayer):
    """A cache layer that writes new keys and values into spare room; `keys` and `values` view the used part.

    Shapes: (rows, key/value heads, columns, head size).
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new columns; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room = key_states[:, :, :0], value_states[:, :, :0]
        used, new = self.get_seq_length(), key_states.shape[-2]
        if used + new > self._room[0].shape[-2]:
            self._room = tuple(
                _with_room(old[:, :, :used], states, used + new + SPARE)
                for old, states in zip(self._room, (key_states, value_states), strict=True)
            )
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, used : used + new] = states
        self.keys, self.values = (room[:, :, : used + new] for room in self._room)
        return self.keys, self.values

    def set(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Replace the contents."""
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = self._room = keys, values


def _with_room(old: torch.Tensor, like: torch.Tensor, columns: int) -> torch.Tensor:
    rows, heads, _, size = like.shape
    room = like.new_empty(rows, heads, columns, size)
    room[:, :, : old.shape[-2]] = old
    return room


@dataclass
class Batch:
    """Rows that are decoded together.

    Attributes:
        cache: keys and values of all columns.
        mask: (rows, columns) bool, where a row has a token.
        positions: (rows,) position of each row's next token.
        logits: (rows, vocabulary) float32, from which each row's next token is chosen.
    """

    cache: DynamicCache
    mask: torch.Tensor
    positions: torch.Tensor
    logits: torch.Tensor

    def step(self, model: Any, tokens: Sequence[int]) -> None:
        """Let each row go on with its chosen token."""
        ids = torch.tensor(tokens, device=self.mask.device)[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], dim=1)
        self.logits = _forward(model, ids, self.mask, self.positions[:, None], self.cache)
        self.positions = self.positions + 1

    def keep(self, rows: Sequence[int]) -> "Batch":
        """Drop all other rows, and the columns in which no row is left; returns itself."""
        index = torch.tensor(rows, device=self.mask.device, dtype=torch.long)
        self.mask, self.positions, self.logits = self.mask[index], self.positions[index], self.logits[index]
        first = int(self.mask.any(dim=0).to(torch.uint8).argmax())
        self.mask = self.mask[:, first:]
        for layer in self.cache.layers:
            layer.set(layer.keys[index, :, first:], layer.values[index, :, first:])
        return self

    def join(self, other: "Batch") -> "Batch":
        """Take in another batch's rows, behind one's own; returns itself."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.set(
                torch.cat([_pad_left(mine.keys, width), _pad_left(theirs.keys, width)]),
                torch.cat([_pad_left(mine.values, width), _pad_left(theirs.values, width)]),
            )
        masks = [torch.nn.functional.pad(b.mask, (width - b.mask.shape[1], 0)) for b in (self, other)]
        self.mask = torch.cat(masks)
        self.positions = torch.cat([self.positions, other.positions])
        self.logits = torch.cat([self.logits, other.logits])
        return self

    def keys_values(self, row: int, columns: int) -> KeysValues:
        """The first columns of one row's keys and values, layer by layer, each of shape (1, heads, columns, size)."""
        return [
            (layer.keys[row : row + 1, :, :columns], layer.values[row : row + 1, :, :columns])
            for layer in self.cache.layers
        ]


def prefill(model: Any, prompts: Sequence[Sequence[int]], prefix: KeysValues | None, prefix_length: int) -> Batch:
    """Read the prompts.

    Args:
        prompts: token ids; all begin with the same `prefix_length` tokens, and each has more than these.
        prefix: keys and values of the shared beginning, or None where there is none.
    """
    device = model.device
    rests = [prompt[prefix_length:] for prompt in prompts]
    width = max(map(len, rests))
    rows = len(prompts)
    # Pads hold any valid id; the mask hides them.
    ids = torch.tensor([[rest[0]] * (width - len(rest)) + list(rest) for rest in rests], device=device)
    own = torch.tensor([[False] * (width - len(rest)) + [True] * len(rest) for rest in rests], device=device)
    positions = prefix_length + own.long().cumsum(dim=1) - 1
    cache = empty_cache(model)
    if prefix is not None:
        for layer, (keys, values) in zip(cache.layers, prefix, strict=True):
            layer.set(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))
    mask = torch.cat([own.new_ones(rows, prefix_length), own], dim=1)
    logits = _forward(model, ids, mask, positions.clamp(min=0), cache)
    return Batch(cache, mask, positions[:, -1] + 1, logits)


def empty_cache(model: Any) -> DynamicCache:
    """A cache whose layers grow in place."""
    cache = DynamicCache()
    cache.layers = [GrowingLayer() for _ in range(model.config.num_hidden_layers)]
    return cache


def bytes_per_token(model: Any) -> int:
    """Bytes of keys and values that one token takes in all layers."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize


@torch.inference_mode()
def _forward(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
) -> torch.Tensor:
    output = model(
        input_ids=ids,
        attention_mask=None if mask.all() else mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1].float()


def _pad_left(states: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[-2], 0))
