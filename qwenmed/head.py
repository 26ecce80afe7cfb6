"""The loss of a causal model without its whole logits: only the rows that count meet the vocabulary.

At Qwen3's 151,936 words the logits of 2,048 tokens take 1.2 GiB in fp32, and a plain loss several times that.
torch's `linear_cross_entropy` goes through the rows in chunks and forms the gradients on the way; prompt and
padding rows are dropped before. Chunks are of `HEAD_ROWS`: torch's automatic choice is 8 to 16 rows at this
width, which is slow. TRL's own fused head does this job on GPUs with Triton; elsewhere it scores every row and
took 2 to 3 times as long here (benchmarks/).
"""

import functools
from typing import TYPE_CHECKING, Any

from qwenmed.hardware import HEAD_ROWS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def completion_loss(
    hidden: "torch.Tensor", weight: "torch.Tensor", labels: "torch.Tensor", chunk_rows: int = HEAD_ROWS
) -> "torch.Tensor":
    """Summed negative log-likelihood of the labelled tokens, as a scalar in fp32.

    Args:
        hidden: last hidden states, (batch, length, width).
        weight: of the vocabulary head, (vocabulary, width).
        labels: (batch, length), -100 where a token does not count; position t is predicted from t - 1.
        chunk_rows: rows whose logits exist at one time.
    """
    import torch
    from torch.nn import LinearCrossEntropyOptions, functional

    targets = labels[:, 1:]
    counts = targets != -100
    if not counts.any():  # stays connected to the model, so that backward() works
        return hidden.sum().float() * 0.0
    options = LinearCrossEntropyOptions(batch_chunk_size=chunk_rows, chunking_method=None)
    rows = hidden[:, :-1][counts]
    with torch.autocast(hidden.device.type, enabled=False):
        loss = functional.linear_cross_entropy(
            rows.to(weight.dtype), weight, targets[counts], reduction="sum", options=options
        )
    return loss.float()


def add_loss_head(model: "PreTrainedModel") -> None:
    """Let `model(..., labels=…, only_loss=True)` return its `completion_loss`; other calls stay as they are.

    Going through the model's own call keeps wrappers around it (LoRA, data parallelism) at work.
    """
    original = model.forward

    @functools.wraps(type(model).forward)  # generate() looks at the signature
    def forward(*args: Any, only_loss: bool = False, **kwargs: Any) -> Any:
        if not only_loss:
            return original(*args, **kwargs)
        labels = kwargs.pop("labels")
        hidden = model.base_model(*args, **kwargs).last_hidden_state
        return completion_loss(hidden, model.get_output_embeddings().weight, labels)

    model.forward = forward
