"""Stand-ins for what a test does not want to have: a model, an engine."""

from types import SimpleNamespace

import torch

from qwenmed import chat
from qwenmed.engine import Chunk, Generation, Prompt


def spoken(tokenizer, *parts):
    """Ids of texts, and of tokens where a part is one of the two think tags' ids."""
    ids = []
    for part in parts:
        ids += [part] if isinstance(part, int) else tokenizer._encode_without_added_tokens(part)
    return [*ids, tokenizer.eos_token_id]


class Parrot:
    """A model that says what it is told to, through the interface that the engine uses of one.

    How far a row has come stands in the cache, as with a real model: rows may come, go and change their places.
    """

    device, dtype = torch.device("cpu"), torch.float32
    generation_config = SimpleNamespace(
        eos_token_id=None, do_sample=False, temperature=1.0, top_p=1.0, top_k=50, min_p=None
    )
    vocabulary = 8192

    def __init__(self, ids, context=4096):
        self._ids = torch.tensor(ids)
        self.config = SimpleNamespace(
            max_position_embeddings=context, num_hidden_layers=1, num_key_value_heads=1, head_dim=1
        )

    def __call__(self, input_ids, past_key_values, **rest):
        rows, width = input_ids.shape
        layer = past_key_values.layers[0]
        said = torch.zeros(rows, dtype=torch.long)
        if width == 1 and layer.get_seq_length():
            said = layer.keys[:, 0, -1, 0].long() + 1  # -1 stands for a token of the prompt that is not its last
        states = torch.full((rows, 1, width, 1), -1.0)
        states[:, 0, -1, 0] = said.float()
        past_key_values.update(states, states, 0)
        following = self._ids[said.clamp(max=len(self._ids) - 1)]
        return SimpleNamespace(logits=torch.nn.functional.one_hot(following, self.vocabulary).float()[:, None])


class Instant:
    """An engine that answers at once, and keeps what it was asked."""

    name, notice, context_length, fingerprint = "instant", "", 4096, "instant"

    def __init__(self, answer="多休息。", thinking="想"):
        self.asked = []
        self._reply = chat.Reply(thinking, answer)

    def count_tokens(self, messages):
        return sum(len(message["content"]) for message in messages)

    def stream(self, prompt):
        self.asked.append(prompt)
        yield Chunk("thinking", self._reply.thinking)
        yield Chunk("answer", self._reply.answer)
        yield self._generation()

    def generate(self, prompts):
        for prompt in prompts:
            if isinstance(prompt, Prompt):
                self.asked.append(prompt)
                yield self._generation()
            else:
                yield prompt

    def _generation(self):
        return Generation(self._reply, "stop", 10, 3, 4, 0.5)
