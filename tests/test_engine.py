"""How a reply goes on and ends, and many replies decoded together."""

import itertools
from dataclasses import replace

import pytest
import torch
from fakes import Parrot, spoken
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenmed import chat, decoding
from qwenmed.engine import ANSWER_ROOM, LOOP_LENGTH, Generation, Prompt, ReplyGuide, Sampling, find_loop, thinking_limit
from qwenmed.engine_transformers import TransformersEngine
from qwenmed.errors import UserError

OPEN, CLOSE, STOP, BREAK = 1, 2, 3, 4
CLOSING = [BREAK, CLOSE, BREAK]


def guide(limit=100, budget=None, **rest):
    return ReplyGuide(limit, budget, (OPEN, CLOSE), CLOSING, [STOP], **rest)


def follow(guide, tokens):
    """What a reply becomes when the model says these tokens."""
    for token in tokens:
        guide.take(token)
        if guide.finish_reason:
            break
    return guide


def ordinary(start=10):
    """Tokens without end and without a loop."""
    return itertools.count(start)


def test_reply_that_ends_by_itself_is_left_alone():
    done = follow(guide(), [OPEN, 10, 11, CLOSE, 12, 13, 14, STOP])
    assert (done.finish_reason, done.thinking_tokens, done.answer_tokens) == ("stop", 4, 3)


def test_thinking_is_closed_at_its_budget_and_the_answer_follows():
    done = guide(budget=20)
    follow(done, itertools.chain([OPEN], itertools.islice(ordinary(), 20), [50, 51, STOP]))
    assert done.ids[:18] == [OPEN, *range(10, 27)] and done.ids[18:21] == CLOSING
    assert (done.finish_reason, done.thinking_tokens) == ("think_budget", 20)
    assert done.ids[21:] == [50, 51, STOP]


@settings(max_examples=100, deadline=None)
@given(limit=st.integers(8, 3000), budget=st.none() | st.integers(1, 3000))
def test_thinking_never_takes_the_room_of_the_answer(limit, budget):
    done = follow(guide(limit, budget), itertools.chain([OPEN], ordinary()))
    assert done.finish_reason == "length" and len(done.ids) == limit
    assert done.thinking_tokens <= max(thinking_limit(limit, budget), 3)  # two tags and a line break are the least
    assert done.answer_tokens >= min(ANSWER_ROOM, limit // 4)


def test_model_that_goes_on_thinking_after_the_cut_gets_line_breaks_for_its_tags():
    done = follow(guide(budget=5), [OPEN, 10, 11, 99, 99, 99, 20, CLOSE, 21, OPEN, 22, STOP])
    assert done.ids[6:] == [20, BREAK, 21, BREAK, 22, STOP] and done.thinking_tokens == 5


def test_turn_that_ends_within_the_thinking_still_gets_an_answer():
    done = follow(guide(), [OPEN, 10, STOP, 98, 97, 20, STOP])
    assert done.ids == [OPEN, 10, *CLOSING, 20, STOP] and done.finish_reason == "think_budget"


def test_no_thinking_means_none_whatever_the_model_writes():
    done = follow(guide(state="no thinking"), [OPEN, 10, CLOSE, 11, STOP])
    assert done.ids == [BREAK, 10, BREAK, 11, STOP]
    assert (done.thinking_tokens, done.answer_tokens, done.finish_reason) == (0, 4, "stop")


def test_thinking_that_the_prompt_has_opened_counts():
    done = follow(guide(budget=10, state="thinking"), ordinary())
    assert CLOSE in done.ids[:10]


def test_loop_in_the_thinking_closes_it_and_one_in_the_answer_ends_the_reply():
    sentence = list(range(20, 30))
    done = follow(guide(1000), itertools.chain([OPEN], itertools.cycle(sentence)))
    assert done.finish_reason == "repetition" and done.ids.count(CLOSE) == 1
    assert done.thinking_tokens < 150 and done.answer_tokens < 150


def test_honest_repetition_is_no_loop():
    table = [*([7, 8, 7, 9] * 10), *range(100, 160)]  # a table's rule, and then its rows
    assert find_loop(table) is None
    assert find_loop(list(range(1000))) is None and find_loop([5] * (LOOP_LENGTH - 1)) is None
    assert find_loop("一天三次，饭后服用。" * 3) is None


@settings(max_examples=200, deadline=None)
@given(head=st.lists(st.integers(0, 5), max_size=80), block=st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_every_block_that_stands_there_often_enough_is_found(head, block):
    times = max(4, -(-LOOP_LENGTH // len(block)))
    period = find_loop(head + block * times)
    assert period is not None and period <= len(block)


@settings(max_examples=200, deadline=None)
@given(sequence=st.lists(st.integers(0, 2), max_size=200))
def test_what_is_called_a_loop_is_one(sequence):
    period = find_loop(sequence)
    if period:
        length = max(LOOP_LENGTH, 4 * period)
        tail = sequence[-length:]
        assert all(tail[i] == tail[i - period] for i in range(period, len(tail)))


# Decoding, on the demo model with random weights: greedy text must not depend on the company.


@pytest.fixture(scope="module")
def model(demo_model):
    from qwenmed import checkpoints

    return checkpoints.load_base(demo_model, torch.float32).eval()


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    return TransformersEngine(model, tokenizer, Sampling(temperature=0))


def prompts(rows, count=9):
    """Prompts of different lengths, system prompts and limits."""
    made = []
    for i in range(count):
        system = [None, "你是医生。", "你是营养师，请给出建议。"][i % 3]
        made.append(Prompt(chat.user_messages(rows[i]["question"] * (1 + i % 4), system), 6 + 5 * (i % 5)))
    return made


def reference(model, tokenizer, prompt):
    """The same reply by transformers' own generate."""
    ids = chat.render_prompt(tokenizer, prompt.messages)
    output = model.generate(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
        max_new_tokens=prompt.max_tokens, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    text = chat.TokenText(tokenizer)
    return chat.parse_reply("", text.feed(output[0, len(ids) :].tolist()) + text.close())


def test_together_streamed_and_by_generate_the_greedy_text_is_the_same(model, tokenizer, demo_rows):
    asked = prompts(demo_rows)
    for batch_size in (1, 3, 32):  # with three, rows come and go
        engine = TransformersEngine(model, tokenizer, Sampling(temperature=0), batch_size=batch_size)
        together = list(engine.generate(asked))
        assert [each.reply for each in together] == [reference(model, tokenizer, prompt) for prompt in asked]
        streamed = [list(engine.stream(prompt))[-1] for prompt in asked]
        assert streamed == together


def test_shared_beginnings_are_computed_once_and_change_nothing(model, tokenizer, demo_rows, monkeypatch):
    read = []
    whole = decoding.prefill

    def listening(model, prompts, prefix, prefix_length):
        read.append(sum(len(prompt) - prefix_length for prompt in prompts))
        return whole(model, prompts, prefix, prefix_length)

    monkeypatch.setattr(decoding, "prefill", listening)
    engine = TransformersEngine(model, tokenizer, Sampling(temperature=0))
    system = "你是一位非常谨慎的医生，请先排除危险情况，再给出建议。" * 6
    first, second = (Prompt(chat.user_messages(row["question"], system), 4) for row in demo_rows[:2])
    once = [list(engine.stream(first))[-1], list(engine.stream(second))[-1]]
    cold, system_and_rest = read[:2], read[2:]
    assert sum(cold) == engine.count_tokens(first.messages) and sum(system_and_rest) < sum(cold) / 2
    read.clear()
    assert list(engine.stream(first))[-1] == once[0] and read == [1]
    assert list(engine.generate([first, second])) == once


def test_seeded_replies_repeat_and_do_not_depend_on_the_rows_beside_them(model, tokenizer, demo_rows):
    engine = TransformersEngine(model, tokenizer, Sampling(temperature=1.0, top_p=0.9, seed=7))
    asked = prompts(demo_rows, 4)
    together = list(engine.generate(asked))
    assert together == list(engine.generate(asked)) == [list(engine.stream(prompt))[-1] for prompt in asked]
    other = TransformersEngine(model, tokenizer, Sampling(temperature=1.0, top_p=0.9, seed=8))
    assert list(other.generate(asked)) != together


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-38, 1e-6])
def test_tiny_temperature_is_greedy_and_harms_no_row_beside_it(model, tokenizer, demo_rows, temperature):
    engine = TransformersEngine(model, tokenizer, Sampling(temperature=1.0, seed=7))
    tiny, other = prompts(demo_rows, 2)
    beside = engine.generate([replace(tiny, sampling=Sampling(temperature=temperature)), other])
    greedy = replace(tiny, sampling=Sampling(temperature=0))
    assert list(beside) == [list(engine.stream(greedy))[-1], list(engine.stream(other))[-1]]


def test_seed_zero_is_a_seed(model, tokenizer, demo_rows):
    engine = TransformersEngine(model, tokenizer, Sampling(temperature=1.0, seed=0))
    prompt = prompts(demo_rows, 1)[0]
    assert list(engine.stream(prompt))[-1] == list(engine.stream(prompt))[-1]


def test_what_is_no_prompt_keeps_its_place(engine, demo_rows):
    asked = prompts(demo_rows, 3)
    too_long = Prompt(chat.user_messages("长" * 9000, None), 4)
    found = list(engine.generate([{"row": 1}, asked[0], too_long, "x", asked[1], UserError("坏")]))
    assert found[0] == {"row": 1} and found[3] == "x" and str(found[5]) == "坏"
    assert isinstance(found[1], Generation) and isinstance(found[4], Generation)
    assert isinstance(found[2], UserError) and "4096" in str(found[2])


def test_prompts_are_taken_only_as_far_ahead_as_needed(model, tokenizer, demo_rows):
    taken = itertools.count()
    prompt = prompts(demo_rows, 1)[0]
    engine = TransformersEngine(model, tokenizer, Sampling(temperature=0), batch_size=2)
    results = engine.generate(prompt if next(taken) % 3 else {"passed": True} for _ in range(10_000))
    for _ in range(10):
        next(results)
    assert next(taken) < 60
    results.close()


def test_running_out_of_memory_halves_the_batch_and_loses_no_row(model, tokenizer, demo_rows):
    class Narrow:
        """A model that has no memory for more than two rows."""

        def __init__(self):
            self.widest = 0

        def __getattr__(self, name):
            return getattr(model, name)

        def __call__(self, input_ids, **rest):
            if len(input_ids) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.widest = max(self.widest, len(input_ids))
            return model(input_ids=input_ids, **rest)

    asked = prompts(demo_rows)
    narrow = Narrow()
    engine = TransformersEngine(narrow, tokenizer, Sampling(temperature=0), batch_size=8)
    wide = TransformersEngine(model, tokenizer, Sampling(temperature=0))
    assert list(engine.generate(asked)) == list(wide.generate(asked)) and narrow.widest == 2


@pytest.mark.parametrize("place", ["Batch.keep", "Batch.join", "GrowingLayer.update"])
def test_running_out_of_memory_while_rows_come_and_go_loses_no_answer(model, tokenizer, demo_rows, monkeypatch, place):
    owner, name = place.split(".")
    owner, calls = getattr(decoding, owner), itertools.count()
    whole = getattr(owner, name)

    def failing(*arguments, **options):
        if next(calls) in (1, 2):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(*arguments, **options)

    asked = prompts(demo_rows)
    wide = list(TransformersEngine(model, tokenizer, Sampling(temperature=0)).generate(asked))
    monkeypatch.setattr(owner, name, failing)
    engine = TransformersEngine(model, tokenizer, Sampling(temperature=0), batch_size=8)
    assert list(engine.generate(asked)) == wide and next(calls) > 2


def test_row_that_fits_into_no_memory_is_an_error_of_its_own(model, tokenizer, demo_rows):
    class Full:
        def __getattr__(self, name):
            return getattr(model, name)

        def __call__(self, input_ids, **rest):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    engine = TransformersEngine(Full(), tokenizer, Sampling(temperature=0))
    asked = prompts(demo_rows, 3)
    assert all("内存" in str(result) for result in engine.generate(asked))
    with pytest.raises(UserError, match="内存"):
        list(engine.stream(asked[0]))


def test_rows_that_wait_hold_no_memory_yet(model, tokenizer, demo_rows, monkeypatch):
    from qwenmed import engine_transformers as module

    engine = TransformersEngine(model, tokenizer, Sampling(temperature=0))
    row = engine.row(0, prompts(demo_rows, 1)[0])
    whole = decoding.bytes_per_token(model) * (len(row.ids) + row.limit)
    monkeypatch.setattr(module, "free_memory", lambda device: 10 * whole / module.MEMORY_SHARE + 1)
    assert engine.rows_that_fit([], [row] * 128) == 10
    read = [row] * 20
    held = 20 * len(row.ids) / (len(row.ids) + row.limit)
    assert engine.rows_that_fit(read, []) == engine.rows_that_fit(read, [row] * 128) == int(10 + held)


def test_model_that_fits_into_no_memory_is_one_line_with_a_way_out(demo_model, monkeypatch):
    from transformers import Qwen3ForCausalLM

    from qwenmed import checkpoints, engines, evaluation

    def full(self, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.16 GiB.")

    monkeypatch.setattr(Qwen3ForCausalLM, "to", full)
    with pytest.raises(UserError, match="放不下这个模型.*--device cpu"):
        engines.open_engine(engines.EngineSettings(checkpoint=str(demo_model), device="cpu"))
    candidate = evaluation.Candidate("demo", engines.EngineSettings(device="cpu"), checkpoints.find(str(demo_model)))
    with pytest.raises(UserError, match="放不下这个模型"):
        evaluation._load(candidate)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.16 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GiB, other allocations: 384.00 KiB)"),
    ],
)
def test_lack_of_memory_is_known_on_every_device_and_system(error):
    from qwenmed import hardware

    assert hardware.is_out_of_memory(error)


def test_a_bug_is_not_taken_for_lack_of_memory(tokenizer):
    class Broken(Parrot):
        def __call__(self, **rest):
            raise RuntimeError("a bug")

    engine = TransformersEngine(Broken([1]), tokenizer)
    with pytest.raises(RuntimeError, match="a bug"):
        list(engine.generate([Prompt(chat.user_messages("问", None), 4)]))


def test_budget_and_room_reach_the_reply(tokenizer):
    opened = tokenizer.convert_tokens_to_ids("<think>")
    words = tokenizer("用户说胸口发紧，先排除心脏问题，再考虑其他原因。", add_special_tokens=False)["input_ids"]
    ids = spoken(tokenizer, opened, *words, *words, "请就医。")
    engine = TransformersEngine(Parrot(ids), tokenizer)
    messages = chat.user_messages("问", "系统")
    *_, cut = engine.stream(Prompt(messages, 200, think_budget=10))
    assert cut.finish_reason == "think_budget" and cut.thinking_tokens <= 10 and cut.reply.thinking_closed
    assert cut.reply.answer.endswith("请就医。")
    *_, none = engine.stream(Prompt(messages, 200, think_budget=0))
    assert none.reply.thinking == "" and none.thinking_tokens == 0 and none.reply.thinking_closed
    (batched,) = engine.generate([Prompt(messages, 200, think_budget=10)])
    assert batched == cut


def test_cache_that_grows_in_place_holds_what_was_written():
    layer = decoding.GrowingLayer()
    written = []
    for width in (5, 1, 1, 300, 1):
        states = torch.randn(2, 3, width, 4)
        written.append(states)
        keys, values = layer.update(states, states * 2)
        whole = torch.cat(written, dim=2)
        assert torch.equal(keys, whole) and torch.equal(values, whole * 2)
        assert layer.get_seq_length() == whole.shape[2]


def test_fingerprint_of_an_adapter_changes_with_its_base(model, tokenizer, tmp_path):
    import os

    from qwenmed import checkpoints, engines

    def fingerprint(base):
        found = checkpoints.Checkpoint(tmp_path / "adapter", base, card={}, notice="")
        return engines.engine_of(engines.EngineSettings(device="cpu"), found, model, tokenizer).fingerprint

    for folder in ("adapter", "one", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").touch()
        os.utime(tmp_path / folder / "model.safetensors", (1, 1))
    one = fingerprint(tmp_path / "one")
    assert one == fingerprint(tmp_path / "one") != fingerprint(tmp_path / "other")
    os.utime(tmp_path / "one" / "model.safetensors", (2, 2))
    assert one != fingerprint(tmp_path / "one")


def test_number_type_of_the_cpu_is_measured():
    from qwenmed import hardware

    dtype, factor = hardware.faster_cpu_dtype(1, 256, 512)
    assert factor > 0 and dtype == (torch.bfloat16 if factor >= hardware.CLEARLY_FASTER else torch.float32)


def test_number_type_is_told_for_a_large_model_and_fp32_for_a_small_one(demo_model, monkeypatch, capsys):
    from qwenmed import engines, hardware

    settings = engines.EngineSettings(checkpoint=str(demo_model), device="cpu")
    assert engines.open_engine(settings).model.dtype == torch.float32
    assert "数值类型" not in capsys.readouterr().err
    monkeypatch.setattr(hardware, "SMALL_MODEL", 0)
    monkeypatch.setattr(hardware, "faster_cpu_dtype", lambda rows, *sizes: (torch.bfloat16, 2.0 if rows == 1 else 1.5))
    assert engines.open_engine(settings).model.dtype == torch.bfloat16
    assert "bf16" in (told := capsys.readouterr().err) and "2.0 倍" in told and "--dtype" in told
    fixed = engines.EngineSettings(checkpoint=str(demo_model), device="cpu", dtype="fp32")
    assert engines.open_engine(fixed, for_batch=True).model.dtype == torch.float32


def test_assistant_page_shows_the_measured_figures():
    import json

    from benchmarks import assistant

    results = json.loads(assistant.RESULTS.read_text(encoding="utf-8"))
    assert assistant.table(results) in assistant.PAGE.read_text(encoding="utf-8")
