"""The chunked head gives the loss and the gradients of the plain one."""

import pytest
import torch
from torch.nn import functional

from qwenmed import checkpoints, head
from qwenmed.head import ChunkedLoss, add_loss_head, completion_loss


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_loss_and_gradients_are_those_of_the_whole_logits(chunk):
    torch.manual_seed(0)
    hidden = torch.randn(2, 40, 16, requires_grad=True)
    weight = torch.randn(300, 16, requires_grad=True)
    labels = torch.randint(0, 300, (2, 40))
    labels[0, :15] = labels[1, :3] = labels[1, 30:] = -100

    plain = functional.cross_entropy(
        (hidden @ weight.T)[:, :-1].reshape(-1, 300), labels[:, 1:].reshape(-1), reduction="sum"
    )
    expected = torch.autograd.grad(plain, (hidden, weight))
    loss = completion_loss(hidden, weight, labels, chunk)
    (loss / 3).backward()

    assert relative(loss, plain) < 1e-6
    assert relative(hidden.grad, expected[0] / 3) < 1e-5 and relative(weight.grad, expected[1] / 3) < 1e-5


def test_half_precision_rounds_the_gradients_but_not_the_loss():
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 1500, 32, requires_grad=True), torch.randn(300, 32, requires_grad=True)
    labels = torch.randint(0, 300, (1, 1500))
    completion_loss(hidden, weight, labels).backward()
    exact = completion_loss(hidden, weight, labels).item()
    for half in (weight, weight.bfloat16()):
        some, head = hidden.detach().requires_grad_(), half.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = completion_loss(some, head, labels)
        loss.backward()
        # Of sums over 16,384, bf16 knows every 128th.
        assert loss.dtype == torch.float32 and exact > 16_384 and abs(loss.item() - exact) < 1
        assert head.grad.dtype == half.dtype
        assert relative(some.grad, hidden.grad) < 0.01 and relative(head.grad.float(), weight.grad) < 0.01


def test_away_from_the_cpu_a_whole_chunk_is_worked_on_at_a_time(monkeypatch):
    sizes, loss_and_gradient = [], head._loss_and_gradient
    monkeypatch.setattr(
        head, "_loss_and_gradient", lambda logits, goals: sizes.append(len(logits)) or loss_and_gradient(logits, goals)
    )
    for device, expected in (("meta", [24, 16]), ("cpu", [8] * 5)):
        rows, weight = torch.zeros(40, 4, device=device), torch.zeros(50, 4, device=device)
        targets = torch.zeros(40, dtype=torch.long, device=device)
        ChunkedLoss.apply(rows, weight, targets, 24, torch.float32)
        assert sizes == expected
        sizes.clear()


def test_frozen_head_still_passes_the_gradient_on():
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 9, 8, requires_grad=True), torch.randn(50, 8)
    labels = torch.randint(0, 50, (1, 9))
    completion_loss(hidden, weight, labels).backward()
    plain = functional.cross_entropy((hidden @ weight.T)[0, :-1], labels[0, 1:], reduction="sum")
    assert relative(hidden.grad, torch.autograd.grad(plain, hidden)[0]) < 1e-5


def test_batch_without_a_label_gives_a_zero_that_can_go_backward():
    hidden = torch.randn(1, 5, 8, requires_grad=True)
    loss = completion_loss(hidden, torch.randn(50, 8), torch.full((1, 5), -100))
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any()


def test_patched_model_gives_its_own_loss_and_still_its_logits(demo_model):
    model = checkpoints.load_base(demo_model, torch.float32).eval()
    ids = torch.arange(300, 330)[None]
    labels = ids.clone()
    labels[:, :12] = -100
    before = model(input_ids=ids, labels=labels)
    add_loss_head(model)
    after = model(input_ids=ids, labels=labels)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)
    assert relative(model(input_ids=ids, labels=labels, only_loss=True) / 18, before.loss) < 1e-5
