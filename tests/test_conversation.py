"""Conversations: what goes into the prompt, saving and loading, the commands, folded thinking, a real terminal."""

import io
import json
import os
import stat
import sys

import pytest
from conftest import ROOT, assert_user_error, run_script
from fakes import Instant

from medical_assistant import MedicalAssistant, suggest_scenario
from prompts import MEDICAL_PROMPTS, MEDICAL_SCENARIOS, SAMPLE_QUESTIONS
from qwenmed import chat, conversation, terminal
from qwenmed.errors import UserError


@pytest.fixture
def talk():
    return MedicalAssistant(engine=Instant())


def last_messages(talk):
    return talk._engine.asked[-1].messages


def test_earlier_turns_go_along_without_their_thinking(talk):
    talk.ask_question("头痛？")
    talk.ask_question("还要多久？", "treatment")
    assert last_messages(talk) == [
        {"role": "system", "content": MEDICAL_PROMPTS["treatment"]},
        {"role": "user", "content": "头痛？"},
        {"role": "assistant", "content": "多休息。"},
        {"role": "user", "content": "还要多久？"},
    ]


def test_whole_turns_leave_when_the_context_fills_and_that_is_told(talk, capsys):
    for i in range(4):
        talk.ask_question(f"{i}" * 1500)
    talk.ask_question("短？", max_tokens=2048)
    contents = [message["content"] for message in last_messages(talk)]
    assert contents[1][0] == "3" and len(contents) == 4
    assert "没有发送最早的 3 轮" in capsys.readouterr().err


class Counting(Instant):
    """Counts how often it is asked to count."""

    counted = 0

    def count_tokens(self, messages):
        self.counted += 1
        return super().count_tokens(messages)


def test_long_conversation_is_counted_a_few_times_and_keeps_all_that_fits():
    turns = conversation.earlier_turns([(f"{i:03}" * 50, "多休息。") for i in range(99)], lambda question: "diagnosis")
    for number, room in ((0, 4096), (1, 10), (1, 4096), (2, 3900), (99, 10), (99, 2048), (99, 3900), (99, 4096)):
        engine = Counting()
        found = conversation.prompt_messages("短？", "", turns[:number], engine, room, True)
        assert engine.counted <= 8 and found == left_out_one_by_one("短？", turns[:number], engine, room)


def left_out_one_by_one(question, turns, engine, max_tokens):
    """The prompt and the turns left out, found the long way."""
    for left_out in range(len(turns) + 1):
        earlier = [(reply.question, reply.said) for reply in turns[left_out:]]
        said = [
            {"role": role, "content": text}
            for turn in earlier
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        messages = chat.user_messages(question, "", said)
        if engine.count_tokens(messages) + max_tokens <= engine.context_length:
            break
    return messages, left_out


def test_full_context_is_an_error_with_the_numbers_where_no_turn_may_leave():
    talk = MedicalAssistant(engine=Instant(), truncate_history=False)
    talk.ask_question("长" * 2000)
    with pytest.raises(UserError, match=r"2\d{3} 个 token.*2048.*4096"):
        talk.ask_question("短？", max_tokens=2048)
    assert len(talk.history) == 1


def test_saved_conversation_is_loaded_and_goes_on(talk, tmp_path):
    talk.ask_question("头痛？")
    talk.ask_question("胸口剧痛，大汗淋漓，左胳膊疼", "emergency")
    path = talk.save_conversation(tmp_path / "c.json")
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = MedicalAssistant(engine=Instant())
    assert again.load_conversation(path) == 2
    assert again.history == talk.history and again.last_reply == talk.last_reply
    again.ask_question("然后呢？")
    assert [m["content"] for m in last_messages(again)][1:4] == ["头痛？", "多休息。", "胸口剧痛，大汗淋漓，左胳膊疼"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["空"]),
        ("{", ["第 1 行"]),
        ("[]", ["不是保存的对话"]),
        ('{"turns": 5}', ["不是保存的对话"]),
        ('{"turns": [5]}', ["第1轮"]),
        ('{"turns": [{}]}', ["第1轮", "question"]),
    ],
)
def test_file_that_is_no_conversation_is_refused_and_the_present_one_stays(talk, tmp_path, content, words):
    talk.ask_question("头痛？")
    (tmp_path / "c.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        talk.load_conversation(tmp_path / "c.json")
    assert all(word in str(caught.value) for word in words) and len(talk.history) == 1


@pytest.mark.parametrize(("field", "value"), [("scenario", "surgery"), ("seconds", "x"), ("reasons", [1]), ("said", 5)])
def test_turn_that_was_tampered_with_is_refused(talk, tmp_path, field, value):
    talk.ask_question("头痛？")
    path = talk.save_conversation(tmp_path / "c.json")
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved["turns"][0][field] = value
    path.write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(UserError, match="第1轮"):
        talk.load_conversation(path)


def test_automatic_scenario_is_told_with_its_reason_and_kept_for_a_turn_without_a_clue(talk):
    pieces = list(talk.stream("尿酸高，能吃豆腐吗？", "auto"))
    assert pieces[0][0] == "scenario" and "营养指导" in pieces[0][1] and talk.last_reply.scenario == "nutrition"
    list(talk.stream("好的，谢谢", "auto"))
    assert talk.last_reply.scenario == "nutrition"
    assert last_messages(talk)[0]["content"] == MEDICAL_PROMPTS["nutrition"]
    assert next(talk.stream("谢谢", "auto")) == ("scenario", "营养指导（沿用上一题）")
    (row,) = talk.batch([{"question": "尿酸高，能吃豆腐吗？", "scenario": "auto"}])
    assert row["scenario"] == "nutrition"
    assert suggest_scenario("嗯").scenario == "diagnosis"


# The session, fed with lines.


def session(talk, lines, monkeypatch, capsys, scenario="diagnosis", think="show"):
    """What a session shows that is fed with these lines."""
    left = iter([*lines, "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(left))

    def ask(question, chosen):
        return talk.stream(question, chosen)

    terminal.Session(talk, ask, MEDICAL_SCENARIOS, SAMPLE_QUESTIONS, scenario, think).run()
    return capsys.readouterr().out


def test_retry_asks_the_last_question_again_in_its_place(talk, monkeypatch, capsys):
    shown = session(talk, ["/retry", "头痛？", "多久？", "/retry"], monkeypatch, capsys)
    assert "还没有可以重新回答的问题" in shown and "问：多久？" in shown
    assert [reply.question for reply in talk.history] == ["头痛？", "多久？"]
    asked = [[m["content"] for m in prompt.messages[1:]] for prompt in talk._engine.asked]
    assert asked[-1] == asked[-2] == ["头痛？", "多休息。", "多久？"]


def test_retry_that_fails_leaves_the_turn_where_it_was(talk, monkeypatch, capsys):
    talk.ask_question("头痛？")

    def broken(prompt):
        raise UserError("服务器中途断开")
        yield

    monkeypatch.setattr(talk._engine, "stream", broken)
    shown = session(talk, ["/retry", "再问？"], monkeypatch, capsys)
    assert shown.count("错误：服务器中途断开") == 2 and [reply.question for reply in talk.history] == ["头痛？"]


def test_interrupted_answer_leaves_the_conversation_and_the_session(talk, monkeypatch, capsys):
    talk.ask_question("头痛？")
    whole = talk._engine.stream

    def interrupted(prompt):
        yield next(whole(prompt))
        raise KeyboardInterrupt

    monkeypatch.setattr(talk._engine, "stream", interrupted)
    shown = session(talk, ["多久？"], monkeypatch, capsys)
    assert "已停止这一条回答，对话保留" in shown and "再见" in shown
    assert [reply.question for reply in talk.history] == ["头痛？"]


def test_scenario_by_number_id_name_and_automatically(talk, monkeypatch, capsys):
    lines = [
        "/scenario 6",
        "/scenario pediatric",
        "/scenario 老年健康",
        "/scenario auto",
        "/scenario 牙科",
        "能吃豆腐吗？",
    ]
    shown = session(talk, lines, monkeypatch, capsys)
    for name in ("营养指导", "儿科咨询", "老年健康", "自动选择"):
        assert f"场景：{name}。" in shown
    assert "没有场景 牙科" in shown and "〔场景：营养指导" in shown


def test_zero_in_the_menu_chooses_automatically(talk, monkeypatch, capsys):
    shown = session(talk, ["x", "0", "能吃豆腐吗？"], monkeypatch, capsys, scenario=None)
    assert " 0. 自动选择" in shown and "〔场景：营养指导" in shown and "请输入 1 到 10 的编号" in shown


def test_thinking_is_shown_folded_or_hidden(talk, monkeypatch, capsys):
    lines = ["一？", "/think", "二？", "/think hide", "三？", "/think show", "/think x"]
    shown = session(talk, lines, monkeypatch, capsys)
    one, two, three, rest = (shown.split("【回答】")[i] for i in range(4))
    assert "【思考】\n想" in one and "【思考】已收起，1 字" in two
    assert "【思考】" not in three.split("思考不显示。")[1]
    assert "【思考】\n想" in rest and "用法：/think" in rest


def test_words_that_begin_a_question_are_no_commands(talk, monkeypatch, capsys):
    questions = ["help 我看看这个报告", "retry", "think 怎么翻译？", "清空肠道的药怎么吃？", "/etc 是什么？"]
    shown = session(talk, questions, monkeypatch, capsys)
    assert len(talk.history) == 4 and "没有命令 /etc" in shown


def test_save_load_and_clear(talk, monkeypatch, capsys, tmp_path):
    path = tmp_path / "c.json"
    lines = ["头痛？", f"/save {path}", "/clear", f"/load {path}", "/load", f"/load {tmp_path}/no.json", "多久？"]
    shown = session(talk, lines, monkeypatch, capsys)
    assert "对话已清空" in shown and "已载入 1 轮对话" in shown and "上一个问题：头痛？" in shown
    assert "用法：/load" in shown and "没有载入：文件不存在" in shown
    assert [reply.question for reply in talk.history] == ["头痛？", "多久？"]


def test_every_command_of_the_help_exists():
    named = {line.split()[0].removeprefix("/") for line in terminal.HELP.splitlines() if line.lstrip().startswith("/")}
    assert named == {command[0] for command in terminal.COMMANDS}
    assert all(hasattr(terminal.Session, f"_do_{name}") for name in named)


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_folded_thinking_gives_a_sign_of_life_on_a_screen_only():
    screen, pipe = Screen(), io.StringIO()
    for out in (screen, pipe):
        display = terminal.Display(out, think="summary")
        for piece in ("用户", "说头痛"):
            display.piece("thinking", piece)
        display.piece("answer", "多休息。")
        display.end()
    assert "\r思考中… 5 字" in screen.getvalue().replace("\033[2m", "").replace("\033[0m", "")
    assert pipe.getvalue() == "【思考】已收起，5 字\n\n【回答】\n多休息。\n"


# The command line.


def test_command_line_loads_continues_and_saves(trained, tmp_path):
    first, second = (row for row in trained.rows[:2])
    common = ("-c", trained.run, "-m", "60")
    done = run_script(
        "medical_assistant.py", "-q", first["question"], "--save-history", "a.json", *common, cwd=tmp_path
    )
    assert done.status == 0, done.err
    done = run_script(
        "medical_assistant.py", "-q", second["question"], "--load", "a.json", "--save-history", "b.json", *common,
        "--think", "hide", "-s", "auto", cwd=tmp_path,
    )  # fmt: skip
    assert done.status == 0 and "已载入 1 轮对话" in done.err and "【思考】" not in done.out, done.err
    turns = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))["turns"]
    assert [turn["question"] for turn in turns] == [first["question"], second["question"]]
    assert turns[1]["prompt_tokens"] > turns[0]["prompt_tokens"]
    assert_user_error(
        run_script("medical_assistant.py", "-q", "问", "--load", "no.json", cwd=tmp_path), "no.json", "不存在"
    )


pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")


def test_real_terminal_edits_lines_takes_chinese_and_stops_an_answer(trained, tmp_path):
    import pexpect

    row = trained.rows[0]
    child = pexpect.spawn(
        sys.executable,
        [str(ROOT / "medical_assistant.py"), "-c", str(trained.run), "-s", row["scenario"], "--seed", "0"],
        cwd=str(tmp_path), encoding="utf-8", timeout=60, dimensions=(40, 100),
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "xterm"},
    )  # fmt: skip
    child.expect("您的问题：")
    child.send("/hxx\x7f\x7felp\r")  # typed wrong, two characters taken back
    child.expect("列出本场景的示例问题")
    child.expect("您的问题：")
    child.send(row["question"] + "\r")
    child.expect("【思考】")
    child.expect("免责声明")
    child.expect("您的问题：")
    child.send("\x1b[A\x1b[A\r")  # two lines up in the history
    child.expect("列出本场景的示例问题")
    child.expect("您的问题：")
    child.send("\x03")
    child.expect("再按一次 Ctrl-C 退出")
    child.send("\x04")
    child.expect("再见")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0 and list(tmp_path.iterdir()) == []


def test_terminal_that_vanishes_costs_nothing_that_was_to_be_saved(trained, tmp_path):
    import time

    import pexpect

    child = pexpect.spawn(
        sys.executable,
        [str(ROOT / "medical_assistant.py"), "-c", str(trained.run), "-s", "diagnosis", "-m", "30", "--save-history", "h.json"],
        cwd=str(tmp_path), encoding="utf-8", timeout=60, env={**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "xterm"},
    )  # fmt: skip
    child.expect("您的问题：")
    child.send("头痛怎么办？\r")
    child.expect("免责声明")
    child.expect("您的问题：")
    os.close(child.child_fd)  # as when the window is closed: the system sends SIGHUP
    deadline = time.monotonic() + 20
    while child.isalive() and time.monotonic() < deadline:
        time.sleep(0.1)
    child.closed = True
    assert not child.isalive() and child.signalstatus is None
    assert len(json.loads((tmp_path / "h.json").read_text(encoding="utf-8"))["turns"]) == 1
