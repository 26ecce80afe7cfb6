"""Likelihoods: those of a plain computation, whatever is put together with what."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwenmed import chat, checkpoints, scoring
from qwenmed.errors import UserError
from qwenmed.records import Record
from qwenmed.scoring import Marked


@pytest.fixture(scope="module")
def model(demo_model):
    return checkpoints.load_base(demo_model, torch.float32).eval()


@pytest.fixture(scope="module")
def records(demo_rows):
    found = [Record(row["question"], row["think"], row["answer"]) for row in demo_rows[::9]]
    return [*found, Record("短？", "", "是。"), Record("长？", "想了又想。" * 200, "是的。")]


def rows(records):
    return [chat.training_row(record, "你是医生。") for record in records]


def plain(model, ids, span):
    """One row, its whole logits, in double precision."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(ids)])).logits[0].double()
    shares = torch.log_softmax(logits, dim=-1)
    return -sum(float(shares[place - 1, ids[place]]) for place in span)


def test_losses_are_those_of_a_plain_computation_row_by_row(model, tokenizer, records):
    references = [scoring.reference(tokenizer, row) for row in rows(records)]
    for each, found in zip(references, scoring.score_references(model, references), strict=True):
        thinking, answer = (plain(model, each.ids, span) for span in each.spans)
        assert found.thinking_nll == pytest.approx(thinking, rel=1e-4)
        assert found.answer_nll == pytest.approx(answer, rel=1e-4)


def test_what_goes_through_beside_a_row_does_not_change_its_loss(model, tokenizer, records):
    references = [scoring.reference(tokenizer, row) for row in rows(records)]
    together = list(scoring.score_references(model, references))
    for each, found in zip(references, together, strict=True):
        (alone,) = scoring.score_references(model, [each])
        assert found.thinking_nll == pytest.approx(alone.thinking_nll, rel=1e-5)
        assert found.answer_nll == pytest.approx(alone.answer_nll, rel=1e-5)


def test_spans_are_the_thinking_and_the_answer_with_their_ends(tokenizer):
    (row,) = rows([Record("问？", "想一想", "答案。")])
    found = scoring.reference(tokenizer, row)
    thinking, answer = ("".join(tokenizer.decode([found.ids[i] for i in span])) for span in found.spans)
    assert thinking == "\n想一想\n</think>" and answer == "\n\n答案。<|im_end|>"
    assert found.characters == (3, 3)


def test_no_thinking_counts_no_tokens(model, tokenizer):
    (row,) = rows([Record("问？", "", "答案。")])
    (found,) = scoring.score_references(model, [scoring.reference(tokenizer, row)])
    assert found.thinking_tokens == 0 and found.thinking_nll == 0 and found.answer_tokens > 2


def test_perplexity_of_an_untrained_model_is_about_its_vocabulary(model, tokenizer, records):
    found = list(scoring.score_references(model, [scoring.reference(tokenizer, row) for row in rows(records)]))
    loss = sum(each.answer_nll for each in found) / sum(each.answer_tokens for each in found)
    assert loss == pytest.approx(math.log(model.config.vocab_size), rel=0.02)


def test_an_adapter_is_scored_through_its_base(demo_model, tokenizer, records):
    from peft import LoraConfig, get_peft_model

    base = checkpoints.load_base(demo_model, torch.float32).eval()
    references = [scoring.reference(tokenizer, row) for row in rows(records[:2])]
    before = list(scoring.score_references(base, references))
    adapted = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    after = list(scoring.score_references(adapted, references))
    for each, old, new in zip(references, before, after, strict=True):
        assert new.answer_nll == pytest.approx(plain(adapted, each.ids, each.spans[1]), rel=1e-4)
        assert new.answer_nll != pytest.approx(old.answer_nll, rel=1e-4)


def test_a_token_outside_of_the_vocabulary_is_an_error_in_words(model):
    with pytest.raises(UserError, match="词表不一致"):
        list(scoring.summed_losses(model, [Marked([1, 2, 10_000_000], [range(1, 3)])]))


def test_many_sequences_of_many_lengths_come_back_in_order(model):
    sequences = [Marked(list(range(1, 3 + i * 37 % 101)), [range(1, 2 + i % 2)]) for i in range(150)]
    found = list(scoring.summed_losses(model, iter(sequences)))
    for i in (0, 63, 64, 149):
        assert found[i] == pytest.approx([plain(model, sequences[i].ids, sequences[i].spans[0])], rel=1e-4)


class NoDoubles(TorchDispatchMode):
    """Plays a device without float64, as Apple's MPS is, on tensors of the meta device; what is fetched from it is 0."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.is_nonzero.default:
            return False
        if func is torch.ops.aten.to.dtype_layout and args[0].is_meta and kwargs["device"].type == "cpu":
            return torch.zeros(args[0].shape, dtype=kwargs["dtype"])
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.is_meta and found.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return found


def test_device_without_double_precision_can_score(demo_model):
    model = checkpoints.load_base(demo_model, torch.float32).eval().to("meta")
    with NoDoubles():
        assert list(scoring.summed_losses(model, [Marked([1, 2, 3], [range(1, 3)])])) == [[0.0]]
