"""One engine for many callers, and what a conversation that comes over the network falls into."""

import dataclasses
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenmed import chat, checkpoints, conversation, triage
from qwenmed.api_types import ChatRequest
from qwenmed.engine import Generation, Prompt, Sampling
from qwenmed.scheduler import Caller, Cancelled, Scheduler, Ticket, _StopFinder

EMERGENCY = "胸口像石头压着二十分钟了，出冷汗，左胳膊也疼，怎么办？"


@given(
    st.lists(st.text("ab停。", max_size=6), max_size=12),
    st.lists(st.text("ab停。", min_size=1, max_size=4), max_size=4),
)
def test_stop_texts_end_an_answer_wherever_the_pieces_are_cut(pieces, stops):
    finder, shown = _StopFinder(stops), ""
    for piece in pieces:
        shown += finder.feed(piece)
        if finder.found:
            break
    shown += "" if finder.found else finder.close()
    whole = "".join(pieces)
    places = [whole.find(stop) for stop in stops if stop in whole]
    if not places:
        assert shown == whole and not finder.found
    else:
        assert finder.found and not any(stop in shown for stop in stops) and whole.startswith(shown)


messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=20)}
)


@given(st.lists(messages, max_size=6), st.text(min_size=1, max_size=20).filter(str.strip))
def test_any_conversation_falls_into_turns(earlier, question):
    request = ChatRequest(messages=[*earlier, {"role": "user", "content": question}])
    assert all(asked for asked, _ in request.turns)
    assert len(request.turns) <= sum(each["role"] == "assistant" for each in earlier)
    heard = "\n".join([*(asked for asked, _ in request.turns), request.question])
    asked = [
        each["content"].strip() for each in [*earlier, {"role": "user", "content": question}] if each["role"] == "user"
    ]
    assert heard == "\n".join(filter(None, asked))


def test_messages_that_follow_one_another_are_one_question():
    def message(role, content):
        return {"role": role, "content": content}

    earlier = [message("user", "胸口疼"), message("user", "出了一身冷汗"), message("assistant", "请坐下。")]
    request = ChatRequest(
        messages=[*earlier, message("user", "还要"), message("system", "简短"), message("user", "多久？")]
    )
    assert request.turns == [("胸口疼\n出了一身冷汗", "请坐下。")] and request.question == "还要\n多久？"
    assert triage.assess(ChatRequest(messages=earlier[:2]).question).level == triage.EMERGENCY


def test_fixed_texts_are_taken_off_an_answer_that_comes_back():
    for question, said in (
        (EMERGENCY, "请坐下。\n\n不要走动。"),
        ("感冒了吃什么药？", "布洛芬每次0.2克。"),
        ("头痛", "多休息。"),
    ):
        urgency = triage.assess(question)
        checked = triage.check_answer(said, question, urgency)
        shown = triage.close_answer(checked.text, "【演示】", urgency)
        assert triage.models_words(shown, "【演示】") == said != shown


@pytest.mark.parametrize("is_crisis", [False, True])
def test_every_emergency_text_is_taken_off_whatever_it_was_found_in(is_crisis):
    for advice in triage._advice():
        urgency = triage.Urgency(triage.EMERGENCY, (), advice, is_crisis)
        shown = triage.close_answer("请坐下。\n\n不要走动。", "", urgency)
        assert triage.models_words(shown) == "请坐下。\n\n不要走动。"


@pytest.mark.parametrize("text", [triage.NO_ANSWER.format(limit=2048), triage.EMPTY_ANSWER])
def test_word_that_there_is_no_answer_is_not_the_models(text):
    for question in (EMERGENCY, "头痛"):
        assert triage.models_words(triage.close_answer(text, "", triage.assess(question))) == ""


def test_earlier_turns_are_read_with_the_one_before_as_when_they_were_asked():
    turns = [("胸口疼", "多久了？"), ("出了一身冷汗", "请坐下。"), ("心里害怕", "深呼吸。")]
    earlier = conversation.earlier_turns(turns, lambda question: "diagnosis", "")
    assert [(reply.question, reply.said) for reply in earlier] == turns
    assert earlier[1].urgency == triage.EMERGENCY and earlier[1].reasons
    # What follows an emergency is read alone, as it was when it was asked.
    assert earlier[0].urgency != triage.EMERGENCY != earlier[2].urgency
    assert earlier[2].urgency == triage.assess("心里害怕").level


@pytest.fixture(scope="module")
def engine(trained):
    import torch

    from qwenmed.engine_transformers import TransformersEngine

    model, tokenizer = checkpoints.load(checkpoints.find(str(trained.run)), torch.float32)
    return TransformersEngine(model, tokenizer, Sampling(temperature=0))


def test_scheduler_says_what_the_engine_says_alone_with_samplings_side_by_side(engine, trained):
    scheduler = Scheduler(engine, 8)
    prompts = [Prompt(chat.user_messages(row["question"], "你是医生。"), 60) for row in trained.rows[:6]]
    wanted = [list(engine.stream(prompt))[-1] for prompt in prompts]
    found: dict[int, Generation] = {}

    def run(number):
        sampling = Sampling(temperature=1.0, seed=number) if number % 3 == 0 else None
        found[number] = list(Caller(scheduler, sampling).stream(prompts[number]))[-1]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    scheduler.close()
    for number in (1, 2, 4, 5):
        assert found[number] == wanted[number]
    sampled = dataclasses.replace(prompts[3], sampling=Sampling(temperature=1.0, seed=3))
    assert found[3] == list(engine.stream(sampled))[-1]


def test_nothing_is_active_after_the_last_answer(engine):
    scheduler = Scheduler(engine, 4)
    list(scheduler.stream(Prompt(chat.user_messages("头痛", None), 4), Ticket()))
    until = time.monotonic() + 5
    while scheduler.active and time.monotonic() < until:
        time.sleep(0.01)
    assert scheduler.active == 0
    scheduler.close()


def test_failing_engine_tells_everybody_and_goes_on(engine, trained):
    scheduler = Scheduler(engine, 4)
    prompt = Prompt(chat.user_messages("头痛", None), 20)
    healthy = engine.model.forward

    def broken(*arguments, **options):
        raise RuntimeError("the card has gone")

    engine.model.forward = broken
    try:
        with pytest.raises(Exception, match="生成失败"):
            list(scheduler.stream(prompt, Ticket()))
    finally:
        engine.model.forward = healthy
    assert isinstance(list(scheduler.stream(prompt, Ticket()))[-1], Generation)
    ticket = Ticket()
    events = scheduler.stream(Prompt(prompt.messages, 1000), ticket)
    next(events)
    ticket.cancel()
    with pytest.raises(Cancelled):
        list(events)
    scheduler.close()


def test_engine_that_answers_one_at_a_time_is_asked_one_at_a_time():
    from fakes import Instant

    busy, most, lock = 0, 0, threading.Lock()

    class Slow(Instant):
        def stream(self, prompt):
            nonlocal busy, most
            with lock:
                busy, most = busy + 1, max(most, busy + 1)
            try:
                yield from super().stream(prompt)
            finally:
                with lock:
                    busy -= 1

    scheduler, found = Scheduler(Slow(), 1), []
    prompt = Prompt(chat.user_messages("头痛", None), 20)
    threads = [threading.Thread(target=lambda: found.append(list(Caller(scheduler).stream(prompt)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 8 and most == 1 and scheduler.active == 0
    holder, waiting = Ticket(), Ticket()
    first = scheduler.stream(prompt, holder)
    next(first)
    second = threading.Thread(target=lambda: pytest.raises(Cancelled, list, scheduler.stream(prompt, waiting)))
    second.start()
    waiting.cancel()
    second.join(10)
    assert not second.is_alive()
    scheduler.close()
