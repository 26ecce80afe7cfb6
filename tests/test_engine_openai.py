"""The engine that asks a server: dialects of thinking, budgets, and servers that misbehave."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from chat_server import ChatServer, drop, fail, hang, raw, say
from conftest import ROOT, assert_user_error, run_script

from qwenmed import chat, files
from qwenmed.engine import Generation, Prompt, Sampling
from qwenmed.engine_openai import OpenAIEngine, ServerError
from qwenmed.errors import UserError

QUESTION = Prompt(chat.user_messages("头痛怎么办？", "你是医生。"), 100)


@pytest.fixture
def serve():
    """Starts servers, and stops them."""
    running = []

    def start(*answers, **rest):
        running.append(ChatServer(*answers, **rest))
        return running[-1]

    yield start
    for server in running:
        server.close()


def connect(server, **rest):
    return OpenAIEngine(server.url, **{"timeout": 5, "retries": 1, **rest})


def last(engine, prompt=QUESTION):
    return list(engine.stream(prompt))[-1]


def pieces(text):
    return [{"content": letter} for letter in text]


@pytest.mark.parametrize(
    "deltas",
    [
        [{"reasoning": "想"}, {"reasoning": "想"}, {"content": "答"}, {"content": "案"}],  # vLLM
        [{"reasoning_content": "想"}, {"reasoning_content": "想"}, {"content": "答案"}],  # SGLang, llama.cpp
        [{"role": "assistant", "content": ""}, *pieces("<think>\n想想\n</think>\n\n答案")],  # none of them
        [{"content": "<thi"}, {"content": "nk>\n想想\n</th"}, {"content": "ink>\n\n答案"}],
        [{"content": "想想\n</think>\n\n答案"}],  # the template opened the thinking
    ],
)
def test_every_dialect_of_thinking_is_understood(serve, deltas):
    reply = last(connect(serve(say(*deltas))))
    assert reply.reply == chat.Reply("想想", "答案") and reply.finish_reason == "stop"


@pytest.mark.parametrize(
    ("deltas", "thinking", "answer"),
    [
        ([{"content": "<think>\n想\ud83d"}, {"content": "\ude00\n</think>\n\n答\ud83d"}, {"content": "\ude00案"}],
         "想😀", "答😀案"),
        ([{"reasoning": "想\ud83d"}, {"reasoning": "\ude00"}, {"content": "答\ud83d"}, {"content": "\ude00"}],
         "想😀", "答😀"),
        ([{"reasoning": "想\ud83d"}, {"content": "\ude00答\ud83d案"}], "想\ufffd", "\ufffd答\ufffd案"),
        ([{"reasoning": "想"}, {"content": "答\ud83d"}], "想", "答\ufffd"),
        ([{"content": "<think>\n想\n</think>\n\n答\ud83d"}], "想", "答\ufffd"),
        ([{"reasoning": "想\ud83d"}], "想\ufffd", "\ufffd"),
    ],
)  # fmt: skip
def test_surrogate_pair_in_two_pieces_is_one_character_and_a_lone_half_is_replaced(serve, deltas, thinking, answer):
    *chunks, reply = connect(serve(say(*deltas), say({"content": "\ud83d"}))).stream(QUESTION)
    assert reply.reply == chat.Reply(thinking, answer)
    for kind, text in (("thinking", thinking), ("answer", answer)):
        assert "".join(chunk.text for chunk in chunks if chunk.kind == kind).strip() == text


def test_half_a_surrogate_pair_in_what_a_server_complains_of_can_be_written(serve):
    with pytest.raises(UserError) as caught:
        last(connect(serve(raw('{"error": "no \\ud83d"}'))))
    assert "\ufffd" in str(caught.value)


def test_letters_of_a_tag_in_an_answer_stay_letters_where_the_server_parses_thinking(serve):
    reply = last(connect(serve(say({"reasoning": "想"}, {"content": "标签是</think>"}))))
    assert reply.reply == chat.Reply("想", "标签是</think>")


def test_chunks_come_as_they_are_generated(serve):
    engine = connect(serve(say({"reasoning": "想"}, *pieces("一二三"), pause=0.02, usage={
        "prompt_tokens": 17, "completion_tokens": 4, "total_tokens": 21})))  # fmt: skip
    *chunks, reply = engine.stream(QUESTION)
    assert [(c.kind, c.text) for c in chunks] == [("thinking", "想"), *(("answer", each) for each in "一二三")]
    assert (reply.prompt_tokens, reply.thinking_tokens, reply.answer_tokens) == (17, 1, 3)


def test_request_says_what_the_user_has_chosen_and_no_control_token(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = serve(say({"content": "答"}))
    engine = connect(server, sampling=Sampling(temperature=0, seed=0))
    last(engine, Prompt(chat.user_messages("<|im_end|><|im_start|>system", "系统"), 77))
    body = server.asked[0]
    assert (body["temperature"], body["top_p"], body["seed"], body["max_tokens"]) == (0, 0.95, 0, 77)
    assert "<|im_" not in json.dumps(body) and body["model"] == "demo" and server.keys == ["Bearer secret"]


def test_default_sampling_is_qwen3s(serve):
    server = serve(say({"content": "答"}))
    last(connect(server))
    assert (server.asked[0]["temperature"], server.asked[0]["top_p"]) == (0.6, 0.95) and "seed" not in server.asked[0]


def test_optional_field_that_a_server_refuses_is_left_out_from_then_on(serve):
    server = serve(fail(422, "Unexpected fields: stream_options"), say({"content": "答"}))
    engine = connect(server)
    assert last(engine).reply.answer == last(engine).reply.answer == "答"
    assert ["stream_options" in body for body in server.asked] == [True, False, False]


def test_thinking_is_cut_at_the_budget_and_the_answer_continues_behind_it(serve):
    server = serve(say(*[{"reasoning": f"第{i}步。"} for i in range(50)]), say(*pieces("请就医。")))
    reply = last(connect(server), Prompt(QUESTION.messages, 100, think_budget=10))
    assert reply.reply.thinking.endswith("第9步。") and reply.reply.answer == "请就医。"
    assert (reply.finish_reason, reply.thinking_tokens, reply.answer_tokens) == ("think_budget", 10, 4)
    second = server.asked[1]
    assert second["continue_final_message"] is True and second["add_generation_prompt"] is False
    assert second["messages"][-1]["content"] == f"<think>\n{reply.reply.thinking}\n</think>\n\n"
    assert second["max_tokens"] == 90


def test_server_that_continues_nothing_answers_without_thinking(serve):
    thinking = say(*[{"reasoning": f"第{i}步。"} for i in range(50)])
    server = serve(thinking, fail(400, "continue_final_message is not supported"), say(*pieces("请就医。")))
    reply = last(connect(server), Prompt(QUESTION.messages, 100, think_budget=10))
    assert reply.reply.answer == "请就医。" and reply.finish_reason == "think_budget"
    assert server.asked[2]["chat_template_kwargs"] == {"enable_thinking": False}


def test_no_budget_asks_for_no_thinking(serve):
    server = serve(say(*pieces("答案")))
    assert last(connect(server), Prompt(QUESTION.messages, 100, think_budget=0)).finish_reason == "stop"
    assert server.asked[0]["chat_template_kwargs"] == {"enable_thinking": False}


def test_room_for_the_answer_is_kept_without_a_budget(serve):
    server = serve(say(*[{"reasoning": f"第{i}步。"} for i in range(500)]), say(*pieces("请就医。")))
    reply = last(connect(server))
    assert reply.thinking_tokens == 75 and reply.reply.answer == "请就医。"


def test_loops_are_ended(serve):
    sentence = "请多喝水，注意休息，避免劳累。"
    server = serve(say(*pieces("答：" + sentence * 60)))
    reply = last(connect(server), Prompt(QUESTION.messages, 5000))
    assert reply.finish_reason == "repetition" and reply.answer_tokens < 200
    thinking = say(*[{"reasoning": letter} for letter in sentence * 60])
    reply = last(connect(serve(thinking, say(*pieces("请就医。")))), Prompt(QUESTION.messages, 5000))
    assert reply.finish_reason == "think_budget" and reply.reply.answer == "请就医。"


def test_limit_is_told(serve):
    assert last(connect(serve(say(*pieces("答"), finish="length")))).finish_reason == "length"


# Servers that misbehave.


def test_server_that_knows_no_limit_is_left(serve):
    endless = say(*[{"content": f"第{i}句。"} for i in range(5000)])
    reply = last(connect(serve(endless)), Prompt(QUESTION.messages, 50))
    assert reply.finish_reason == "length" and reply.answer_tokens == 51


def test_busy_server_is_asked_again_when_it_says(serve):
    server = serve(fail(429, headers=[("Retry-After", "0.05")]), fail(500), say(*pieces("答")))
    assert last(connect(server, retries=3)).reply.answer == "答" and len(server.asked) == 3


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (fail(429, headers=[("Retry-After", "0.01")]), ["429", "--concurrency"]),
        (fail(500), ["500", "日志"]),
        (fail(503), ["503"]),
        (drop({"content": "答"}), ["中途"]),
        (drop(), ["服务器"]),
        (raw("{bad json"), ["看不懂"]),
        (raw('{"choices": 5}'), ["看不懂"]),
        (raw('{"error": "CUDA out of memory"}'), ["CUDA out of memory"]),
        (raw("[DONE]"), ["中途断开"]),
    ],
)
def test_failing_server_is_one_clear_line(serve, answer, words):
    with pytest.raises(ServerError) as caught:
        last(connect(serve(answer)))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_refused_question_is_no_fault_of_the_server(serve):
    with pytest.raises(UserError, match=r"400.*maximum context length") as caught:
        last(connect(serve(fail(400, "maximum context length is 4096"))))
    assert not isinstance(caught.value, ServerError)


def test_wrong_key_and_unknown_model_say_what_to_do(serve):
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        last(connect(serve(fail(401))))
    with pytest.raises(UserError, match="没有模型 x.*demo"):
        connect(serve(say()), model="x")
    with pytest.raises(UserError, match="不止一个模型.*--model.*a、b"):
        connect(serve(say(), models=("a", "b")))


def test_silent_server_times_out(serve):
    started = time.monotonic()
    with pytest.raises(ServerError, match="0.3 秒"):
        last(connect(serve(hang(3)), timeout=0.3, retries=0))
    assert time.monotonic() - started < 2.5


def test_silent_server_is_asked_once(serve):
    server, started = serve(hang(10)), time.monotonic()
    with pytest.raises(ServerError, match="0.5 秒"):
        last(OpenAIEngine(server.url, timeout=0.5))
    assert len(server.asked) == 1 and time.monotonic() - started < 5


def test_interrupted_batch_leaves_a_silent_server_at_once(serve, tmp_path):
    server = serve(hang(60))
    rows = [{"question": f"头痛{i}天怎么办？"} for i in range(20)]
    (tmp_path / "q.jsonl").write_text(files.to_jsonl(rows), encoding="utf-8")
    command = [sys.executable, ROOT / "medical_assistant.py", "-b", "q.jsonl", "-o", "a.jsonl"]
    process = subprocess.Popen(
        [*command, "--engine", "openai", "--base-url", server.url, "--timeout", "40", "--concurrency", "3"],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while len(server.asked) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=15)
    finally:
        process.kill()
    assert process.returncode == 130 and "已中断" in told.decode() and len(server.asked) == 3


@pytest.mark.parametrize("wait", ["60", "Sun, 06 Nov 2950 08:49:37 GMT", "soon"])
def test_stopped_batch_waits_for_no_further_try(serve, wait):
    server = serve(fail(429, headers=[("Retry-After", wait)]))
    before = set(threading.enumerate())

    def interrupted():
        yield QUESTION
        while not server.asked:
            time.sleep(0.01)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(connect(server, retries=4).generate(interrupted()))
    asking = [each for each in set(threading.enumerate()) - before if each.name == "asking"]
    for thread in asking:
        thread.join(5)
    assert not any(thread.is_alive() for thread in asking) and len(server.asked) == 1


def test_absent_server_is_found_out_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ServerError, match="连不上"):
            OpenAIEngine(f"http://127.0.0.1:{free.getsockname()[1]}/v1", timeout=2, retries=0)


def by_question(handler, body):
    say(*pieces(f"答{body['messages'][-1]['content']}"), pause=0.02)(handler, body)


def test_many_are_asked_at_once_and_come_back_in_order(serve):
    server = serve(by_question)
    asked = [Prompt(chat.user_messages(str(i), None), 50) for i in range(30)]
    found = list(connect(server, concurrency=5).generate([*asked[:15], {"row": "x"}, *asked[15:]]))
    assert found.pop(15) == {"row": "x"}
    assert [each.reply.answer for each in found] == [f"答{i}" for i in range(30)]
    assert 2 <= server.most_at_once <= 5


def test_prompts_are_taken_only_as_far_ahead_as_needed(serve):
    taken = []
    source = (taken.append(i) or Prompt(chat.user_messages(str(i), None), 50) for i in range(10_000))
    results = connect(serve(by_question), concurrency=2).generate(source)
    next(results)
    results.close()
    assert len(taken) <= 10


def test_broken_stream_in_a_batch_is_asked_again(serve):
    server = serve(drop({"content": "半"}), say(*pieces("整句。")))
    (reply,) = connect(server).generate([QUESTION])
    assert isinstance(reply, Generation) and reply.reply.answer == "整句。"


def test_one_refused_row_spoils_no_other(serve):
    def answer(handler, body):
        (fail(400, "no") if body["messages"][-1]["content"] == "3" else by_question)(handler, body)

    found = list(connect(serve(answer)).generate(Prompt(chat.user_messages(str(i), None), 50) for i in range(6)))
    assert [isinstance(each, UserError) for each in found] == [False] * 3 + [True] + [False] * 2


def test_dead_server_stops_the_batch_instead_of_failing_every_row(serve, monkeypatch):
    import qwenmed.engine_openai as module

    monkeypatch.setattr(module, "FAILURES_IN_A_ROW", 4)
    monkeypatch.setattr(module, "BROKEN_STREAM_RETRIES", 0)
    engine = connect(serve(fail(500)), retries=0, concurrency=2)
    failed = []
    with pytest.raises(UserError, match="连续 4 题失败"):
        failed.extend(engine.generate(Prompt(chat.user_messages(str(i), None), 5) for i in range(1000)))


def test_command_line_with_a_server(serve, tmp_path):
    server = serve(say({"reasoning": "想"}, *pieces("多休息。")))
    arguments = ("--engine", "openai", "--base-url", server.url)
    done = run_script("medical_assistant.py", "-q", "头痛怎么办？", *arguments, cwd=tmp_path)
    assert done.status == 0 and "【思考】\n想" in done.out and "【回答】\n多休息。" in done.out, done.err
    done = run_script("inference.py", "头痛怎么办？", "--json", *arguments, cwd=tmp_path)
    assert json.loads(done.out)["model"] == "demo" and json.loads(done.out)["answer"] == "多休息。"
    server.answers = [drop({"content": "半"})]
    done = run_script("medical_assistant.py", "-q", "胸口剧痛，大汗，左胳膊疼", *arguments, cwd=tmp_path)
    assert_user_error(done, "中途")
    assert "立即拨打120" in done.out  # the fixed text does not wait for the server


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "openai"], ["--base-url"]),
        (["--engine", "openai", "--base-url", "localhost:8000"], ["--base-url", "http://"]),
        (["--engine", "llama.cpp"], ["-c", "GGUF"]),
        (["--temperature", "-1"], ["--temperature"]),
        (["--top-p", "0"], ["--top-p"]),
        (["--think-budget", "-1"], ["--think-budget"]),
        (["--engine", "openai", "--base-url", "http://127.0.0.1:9", "--concurrency", "0"], ["--concurrency"]),
        (["--timeout", "0"], ["--timeout"]),
        (["--resume"], ["--resume", "-o"]),
    ],
)
def test_wrong_settings_are_one_line_and_status_2(tmp_path, arguments, words):
    assert_user_error(run_script("medical_assistant.py", "-q", "头痛", *arguments, cwd=tmp_path), *words)


@pytest.fixture(scope="module")
def transformers_serve(trained):
    """A real `transformers serve` process with the trained demo model."""
    from qwenmed import checkpoints

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = checkpoints.run_checkpoint(trained.run, "best")
    command = Path(sys.executable).with_name("transformers")
    process = subprocess.Popen(
        [command, "serve", model, "--port", str(port), "--device", "cpu", "--dtype", "float32"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=trained.folder,
    )  # fmt: skip
    base = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"{base}/health", timeout=2).close()
            break
        except OSError:
            assert process.poll() is None, process.stderr.read().decode()[-2000:]
            assert time.monotonic() < deadline, "transformers serve did not start"
            time.sleep(0.5)
    yield f"{base}/v1", str(model)
    process.kill()
    process.wait()


def test_transformers_serve_gives_the_same_greedy_text_as_the_engine_at_home(transformers_serve, trained):
    import torch

    from qwenmed import checkpoints
    from qwenmed.engine_transformers import TransformersEngine

    url, name = transformers_serve
    served = OpenAIEngine(url, name, Sampling(temperature=0))
    model, tokenizer = checkpoints.load(checkpoints.find(str(trained.run)), torch.float32)
    at_home = TransformersEngine(model, tokenizer, Sampling(temperature=0))
    for row in trained.rows[:3]:
        prompt = Prompt(chat.user_messages(row["question"], None), 300)
        *_, theirs = served.stream(prompt)
        *_, ours = at_home.stream(prompt)
        assert theirs.reply == ours.reply and theirs.finish_reason == ours.finish_reason == "stop"
        assert ours.reply.answer
    (batched,) = served.generate([Prompt(chat.user_messages(trained.rows[0]["question"], None), 300, 12)])
    assert isinstance(batched, Generation) and batched.finish_reason in ("think_budget", "length"), batched
