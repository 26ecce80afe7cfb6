"""The loss of a causal model without its whole logits: only the rows that count meet the vocabulary.

At Qwen3's 151,936 words the logits of 2,048 tokens take 1.2 GiB in fp32, and a plain loss several times that.
Here the rows go through in chunks of `HEAD_ROWS`, and the gradients are formed on the way; prompt and padding rows are
dropped before. torch's `linear_cross_entropy` does the same in fp32, but of bf16 weights it gives the loss itself in
bf16 (8,512 for 8,493), and takes four times as long where it is to sum up in fp32. TRL's own fused head does this job on
GPUs with Triton, and in fp16; elsewhere it scores every row and took 2 to 3 times as long here (benchmarks/).

Imports torch at once, so import this module where it is used.
"""

import functools
from typing import TYPE_CHECKING, Any

import torch

from qwenmed.hardware import HEAD_ROWS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rows that a CPU works on by turns: at 151,936 words 5 MB in fp32, so that they need not be fetched from memory each time.
ROWS_IN_CACHE = 8


class ChunkedLoss(torch.autograd.Function):
    """Cross entropy of rows with a vocabulary head, summed.

    Under mixed precision its matrices are multiplied in half precision, as the layers' are; everything else is fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk_rows: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """The loss, a scalar in fp32; the gradients are formed with it, since they need the same logits.

        Args:
            rows: hidden states, (rows, width).
            weight: of the head, (vocabulary, width).
            targets: (rows,).
            chunk_rows: rows whose logits exist at one time.
            dtype: to multiply matrices in.
        """
        of_rows, of_weight = ctx.needs_input_grad[:2]
        head = weight.to(dtype)
        rows_grad = torch.empty_like(rows) if of_rows else None
        # In half precision to the end: rounded once more than the layers' gradients, with half as much to move.
        weight_grad = torch.empty_like(head) if of_weight else None
        loss = torch.zeros((), device=rows.device)
        at_a_time = ROWS_IN_CACHE if rows.device.type == "cpu" else chunk_rows
        for start in range(0, len(rows), chunk_rows):
            chunk = slice(start, start + chunk_rows)
            some, goals = rows[chunk].to(dtype), targets[chunk, None]
            wrong = some @ head.T
            for logits, goal in zip(wrong.split(at_a_time), goals.split(at_a_time), strict=True):
                loss += _loss_and_gradient(logits, goal)
            if rows_grad is not None:
                rows_grad[chunk] = wrong @ head
            if weight_grad is not None:
                weight_grad.addmm_(wrong.T, some, beta=1 if start else 0)
        ctx.save_for_backward(rows_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, loss_grad: torch.Tensor) -> Any:
        """The gradients of rows and weight, scaled in place: it can be called once."""
        rows_grad, weight_grad = ctx.saved_tensors
        if rows_grad is not None:
            rows_grad = rows_grad.mul_(loss_grad)
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(loss_grad).to(ctx.weight_dtype)
        return rows_grad, weight_grad, None, None, None


def _loss_and_gradient(logits: torch.Tensor, goals: torch.Tensor) -> torch.Tensor:
    """The summed loss of some rows of logits, which become their own gradients; computed in fp32."""
    scores = logits.float()
    right, highest = scores.gather(-1, goals), scores.amax(-1, keepdim=True)
    sums = scores.sub_(highest).exp_().sum(-1, keepdim=True)
    scores.div_(sums).scatter_add_(-1, goals, torch.full_like(right, -1))
    if scores is not logits:
        logits.copy_(scores)
    return (sums.log() + highest - right).sum()


@torch.compiler.disable
def completion_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_rows: int = HEAD_ROWS
) -> torch.Tensor:
    """Summed negative log-likelihood of the labelled tokens, as a scalar in fp32.

    Args:
        hidden: last hidden states, (batch, length, width).
        weight: of the vocabulary head, (vocabulary, width).
        labels: (batch, length), -100 where a token does not count; position t is predicted from t - 1.
        chunk_rows: rows whose logits exist at one time.
    """
    targets = labels[:, 1:]
    counts = targets != -100
    if not counts.any():  # stays connected to the model, so that backward() works
        return hidden.sum().float() * 0.0
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    with torch.autocast(kind, enabled=False):
        return ChunkedLoss.apply(hidden[:, :-1][counts], weight, targets[counts], chunk_rows, dtype)


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
