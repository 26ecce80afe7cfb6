"""How the next token is chosen: greedily, or sampled as the model's generation config and the caller say."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwenmed.engine import Sampling

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig
    from transformers.generation import LogitsProcessorList

# Logits divided by less may overflow to infinity, from which nothing can be drawn: the whole batch would end.
GREEDY_BELOW = 1e-5


class Sampler:
    """Chooses tokens: greedily, or from the warped distribution with a generator of each row's own."""

    def __init__(self, config: "GenerationConfig", sampling: Sampling) -> None:
        given = sampling.temperature
        temperature = (config.temperature if config.do_sample else 0) if given is None else given
        self._greedy = not temperature or temperature < GREEDY_BELOW
        self._seed = sampling.seed
        self._temperature = temperature
        self._top_p = config.top_p if sampling.top_p is None else sampling.top_p
        self._top_k, self._min_p = config.top_k, config.min_p

    def generator(self, device: "torch.device") -> "torch.Generator | None":
        """A row's own generator, so that its reply does not depend on the rows beside it; None without a seed."""
        import torch

        if self._seed is None or self._greedy:
            return None
        return torch.Generator(device).manual_seed(self._seed)

    def choose(self, logits: "torch.Tensor", generators: Sequence["torch.Generator | None"]) -> list[int]:
        """One token id for each row of (rows, vocabulary) logits."""
        import torch

        if self._greedy:
            return logits.argmax(dim=-1).tolist()
        shares = torch.softmax(self._warpers(None, logits), dim=-1)
        if generators[0] is None:
            return torch.multinomial(shares, 1).flatten().tolist()
        return [int(torch.multinomial(row, 1, generator=own)) for row, own in zip(shares, generators, strict=True)]

    @functools.cached_property
    def _warpers(self) -> "LogitsProcessorList":
        from transformers.generation import (
            LogitsProcessorList,
            MinPLogitsWarper,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        # In the order in which transformers' own generate applies them.
        steps = LogitsProcessorList([TemperatureLogitsWarper(float(self._temperature))])
        if self._top_k:
            steps.append(TopKLogitsWarper(self._top_k))
        if self._top_p is not None and self._top_p < 1:
            steps.append(TopPLogitsWarper(self._top_p))
        if self._min_p:
            steps.append(MinPLogitsWarper(self._min_p))
        return steps
