"""eval.py as its users run it: the report, its honesty, its resuming, its errors, its looks."""

import json
import shutil
from pathlib import Path

import pytest
from chat_server import ChatServer, say
from conftest import assert_user_error, run_script

from qwenmed import report as reports
from qwenmed.bootstrap import BETTER, FEWEST, NO_DIFFERENCE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

CHOICES = [
    {
        "question": f"第{i}题：成人诊室血压达到多少可诊断高血压？",
        "options": ["120/80", "140/90", "180/120"],
        "answer": "B",
    }
    for i in range(6)
]
URGENT = [
    *({"question": f"我爸{i}0岁，突然胸口像石头压着，出冷汗", "emergency": True} for i in range(5, 8)),
    {"question": "感冒了能吃辣吗？", "emergency": False},
]
SMALL = ["--choices", "choices.jsonl", "--urgency", "urgent.jsonl", "--temperature", "0", "-m", "300"]


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def evaluate(folder: Path, *arguments: object):
    write_rows(folder / "choices.jsonl", CHOICES)
    write_rows(folder / "urgent.jsonl", URGENT)
    return run_script("eval.py", *arguments, *SMALL, cwd=folder)


def read_report(folder: Path):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def workplace(trained, tmp_path_factory) -> Path:
    """A copy of the folder in which the demo model was trained."""
    return shutil.copytree(trained.folder, tmp_path_factory.mktemp("eval") / "work")


@pytest.fixture(scope="module")
def before_and_after(workplace):
    """The trained model against its untrained self, on the rows that it was trained on."""
    done = evaluate(
        workplace, "-c", "output/demo-full", "--base", "demo", "--data", "train.jsonl", "--keep-leaked", "-o", "seen"
    )
    assert done.status == 0, done.err
    return done, workplace / "seen"


@pytest.fixture
def serve():
    running = []

    def start(answer):
        running.append(ChatServer(answer))
        return running[-1]

    yield start
    for server in running:
        server.close()


def by_key(report):
    return {measure["key"]: measure for measure in report["measures"]}


def test_trained_model_is_better_than_its_untrained_self_on_what_it_learnt(before_and_after):
    done, folder = before_and_after
    report = read_report(folder)
    trained = report["models"][1]["label"]
    assert report["models"][0]["label"] == "demo" and trained.startswith("demo-full/checkpoint-")
    verdicts = {key: measure["differences"][trained]["verdict"] for key, measure in by_key(report).items()}
    for key in ("perplexity_thinking", "perplexity_answer", "chrf", "bleu", "rouge-2", "well_formed", "stopped"):
        assert verdicts[key] == BETTER, key
    assert by_key(report)["perplexity_answer"]["estimates"][trained]["value"] < 2
    assert "更好" in done.out and "困惑度" in done.out and "report.html" in done.err


def test_every_verdict_follows_from_its_interval(before_and_after):
    for measure in read_report(before_and_after[1])["measures"]:
        for found in measure["differences"].values():
            if found["verdict"] not in (None, NO_DIFFERENCE):
                assert found["differing"] >= FEWEST and (found["low"] > 0 or found["high"] < 0), measure["key"]


def test_leaked_rows_that_were_kept_are_announced(before_and_after):
    report = read_report(before_and_after[1])
    assert len(report["rows"]["leaked"]) == report["rows"]["evaluated"] == 8
    assert any("背诵" in warning for warning in report["warnings"])
    assert "背诵" in (before_and_after[1] / "report.html").read_text(encoding="utf-8")


def test_training_scripts_report_the_same_perplexity(before_and_after, workplace):
    run = json.loads((workplace / "output" / "demo-full" / "run.json").read_text(encoding="utf-8"))
    assert {"perplexity_thinking", "perplexity_answer", "well_formed", "stopped"} <= run["evaluation"].keys()
    # Of the rendered validation samples: two records, each with the general and with its scenario's prompt.
    assert run["evaluation"]["perplexity_answer"]["rows"] == run["data"]["val"]["samples"]


def test_run_with_all_predictions_there_gives_the_same_report_to_the_byte(before_and_after, workplace):
    _, folder = before_and_after
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = evaluate(
        workplace, "-c", "output/demo-full", "--base", "demo", "--data", "train.jsonl", "--keep-leaked", "-o", "seen",
        "--resume",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_killed_run_goes_on_from_its_predictions_and_a_biased_judge_decides_nothing(before_and_after, workplace, serve):
    _, folder = before_and_after
    cut = workplace / "cut"
    cut.mkdir()
    data = (folder / "predictions.jsonl").read_bytes()
    (cut / "predictions.jsonl.partial").write_bytes(data[: len(data) * 2 // 3])  # in the middle of a line
    server = serve(say({"content": "两段都不错。\n结论：一"}))
    arguments = ["-c", "output/demo-full", "--base", "demo", "--data", "train.jsonl", "--keep-leaked", "-o", "cut"]
    assert_user_error(evaluate(workplace, *arguments), "--resume")
    done = evaluate(workplace, *arguments, "--resume", "--judge-url", server.url)
    assert done.status == 0, done.err
    timed = lambda folder: [m for m in read_report(folder)["measures"] if m["key"] != "speed"]  # noqa: E731
    assert timed(cut) == timed(folder)
    assert (cut / "predictions.jsonl").exists() and not list(cut.glob("*.partial"))

    judge = read_report(cut)["judge"]
    (result,) = judge["results"]
    assert (result["wins"], result["ties"], result["losses"]) == (0, 8, 0) and len(server.asked) == 16
    assert result["first"]["value"] == 1 and result["net"]["verdict"] == NO_DIFFERENCE
    assert "结论：平" in judge["prompt"] and "裁判的提示词" in (cut / "report.html").read_text(encoding="utf-8")
    assert not any("<think>" in message["content"] for body in server.asked for message in body["messages"])


def test_judge_that_can_not_be_asked_is_told_before_any_model_is(before_and_after, workplace, serve):
    arguments = ["-c", "output/demo-full", "--base", "demo", "--data", "train.jsonl", "--keep-leaked", "-o", "judged"]
    server = serve(say())
    done = evaluate(workplace, *arguments, "--judge-url", server.url, "--judge-model", "another")
    assert_user_error(done, "another", server.url)
    assert server.asked == [] and not list((workplace / "judged").glob("predictions*"))


def test_failure_behind_the_predictions_keeps_them_and_says_how_to_go_on(before_and_after, workplace):
    _, folder = before_and_after
    failed = workplace / "failed"
    (failed / "report.html").mkdir(parents=True)  # no file can take this name
    shutil.copy(folder / "predictions.jsonl", failed)
    arguments = ["-c", "output/demo-full", "--base", "demo", "--data", "train.jsonl", "--keep-leaked", "-o", "failed"]
    assert_user_error(evaluate(workplace, *arguments), "failed", "--resume")
    done = evaluate(workplace, *arguments, "--resume")
    assert done.status != 0 and "predictions.jsonl；加上 --resume" in done.err, done.err
    assert (failed / "predictions.jsonl").read_bytes() == (folder / "predictions.jsonl").read_bytes()


def test_judge_that_does_not_conclude_is_no_success(before_and_after, workplace, serve):
    shutil.copytree(before_and_after[1], workplace / "unclear")
    server = serve(say({"content": "说不好。"}))
    arguments = ["-c", "output/demo-full", "--base", "demo", "--data", "train.jsonl", "--keep-leaked", "-o", "unclear"]
    done = evaluate(workplace, *arguments, "--resume", "--judge-url", server.url)
    assert done.status == 3 and "裁判有 8 对没有判出" in done.err, done.err
    (result,) = read_report(workplace / "unclear")["judge"]["results"]
    assert result["unclear"] == 8 and result["ties"] == 0 and "说不好" in result["left_out"][0]["error"]
    assert '<td data-label="判不出">8</td>' in (workplace / "unclear" / "report.html").read_text(encoding="utf-8")


def test_rows_that_were_trained_on_are_left_out(workplace):
    train = (workplace / "train.jsonl").read_text(encoding="utf-8").splitlines()
    val = (workplace / "val.jsonl").read_text(encoding="utf-8").splitlines()
    write_rows(workplace / "mixed.jsonl", map(json.loads, [*val, train[0]]))
    done = evaluate(
        workplace, "-c", "output/demo-full", "--data", "mixed.jsonl", "--parts", "perplexity", "-o", "mixed"
    )
    assert done.status == 0, done.err
    report = read_report(workplace / "mixed")
    assert report["rows"]["leaked"] == ["mixed.jsonl:3"] and report["rows"]["evaluated"] == 2
    assert any("已对所有模型排除" in warning for warning in report["warnings"])
    # Two rows are no basis for any claim.
    for measure in report["measures"]:
        assert all(estimate["low"] is None for estimate in measure["estimates"].values())


def test_row_beyond_the_context_is_counted_and_shown_not_cut(workplace):
    val = [json.loads(line) for line in (workplace / "val.jsonl").read_text(encoding="utf-8").splitlines()]
    endless = {"question": "头疼怎么办？" * 3000, "think": "", "answer": "请就医。"}
    write_rows(workplace / "long.jsonl", [*val, endless])
    done = evaluate(
        workplace, "-c", "output/demo-full", "--data", "long.jsonl", "--parts", "perplexity,answers", "-o", "long"
    )
    assert done.status == 3 and "2 个结果没有得到" in done.err, done.err
    parts = read_report(workplace / "long")["parts"]
    for part in ("perplexity", "answers"):
        assert parts[part]["rows"] == 2 and [each["id"] for each in parts[part]["left_out"]] == ["3"]
        assert "上下文" in parts[part]["left_out"][0]["error"]
    assert "1 条不可比" in (workplace / "long" / "report.html").read_text(encoding="utf-8")


def test_server_that_says_one_token_is_evaluated_without_likelihoods(serve, workplace):
    server = serve(say({"content": "的"}))
    write_rows(
        workplace / "bare.jsonl", [{"question": f"第{i}问？", "think": "", "answer": "请就医。"} for i in range(7)]
    )
    done = evaluate(workplace, "--engine", "openai", "--base-url", server.url, "--data", "bare.jsonl", "-o", "server")
    assert done.status == 0, done.err
    found = by_key(read_report(workplace / "server"))
    assert "perplexity_answer" not in found and "choice_letters" not in found
    assert found["chrf"]["estimates"]["http" + server.url[4:]]["value"] == 0
    assert found["choice_parsed"]["estimates"][server.url]["value"] == 0
    assert found["help_shown"]["estimates"][server.url]["value"] == 1  # the rules', not the model's
    assert found["help_model"]["estimates"][server.url]["value"] == 0


def test_server_that_says_nothing_is_evaluated(serve, workplace):
    server = serve(say())
    write_rows(workplace / "bare.jsonl", [{"question": "问？", "think": "想", "answer": "请就医。"}])
    done = evaluate(
        workplace, "--engine", "openai", "--base-url", server.url, "--data", "bare.jsonl", "--parts", "answers",
        "-o", "silent",
    )  # fmt: skip
    assert done.status == 0, done.err
    found = by_key(read_report(workplace / "silent"))
    assert found["has_answer"]["estimates"][server.url]["value"] == 0
    assert found["rouge-l"]["estimates"][server.url] == {"value": 0.0, "low": None, "high": None, "rows": 1}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--data", "train.jsonl"], ["训练数据里", "--keep-leaked"]),
        (["--data", "nowhere.jsonl"], ["nowhere.jsonl", "data.py"]),
        (["--data", "empty.jsonl"], ["empty.jsonl", "空的"]),
        (["--parts", "perplexity,beauty"], ["--parts", "beauty"]),
        (["--limit", "0"], ["--limit"]),
        (["--choices", "broken.jsonl"], ["broken.jsonl:1", "options"]),
        (["--urgency", "broken.jsonl"], ["broken.jsonl:1", "emergency"]),
        (["-c", "nowhere"], ["nowhere"]),
        (["-c", "nowhere.gguf"], ["nowhere.gguf"]),
        (["--engine", "openai"], ["--base-url"]),
        (["-o", "seen"], ["seen", "--resume"]),
        (["--lm-eval", "cmmlu"], ["lm-eval"]),
        (["--temperature", "9"], ["--temperature"]),
    ],
)
def test_wrong_input_is_one_line_that_says_what_to_do(before_and_after, workplace, arguments, words):
    (workplace / "empty.jsonl").write_text("", encoding="utf-8")
    write_rows(workplace / "broken.jsonl", [{"question": "问？"}])
    done = run_script("eval.py", *arguments, "-o" if "-o" not in arguments else "--seed", "1", cwd=workplace)
    assert_user_error(done, *words)
    assert not (workplace / "1" / "report.json").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not here (Debian package chromium)")
def test_report_is_readable_in_a_browser_on_a_desk_and_on_a_telephone(before_and_after):
    from playwright.sync_api import sync_playwright

    page_file = before_and_after[1] / "report.html"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for width, height in ((1280, 900), (390, 844)):
            page = browser.new_context(viewport={"width": width, "height": height}, offline=True).new_page()
            complaints, asked = [], []
            page.on("console", lambda message, complaints=complaints: complaints.append(message.text))
            page.on("pageerror", lambda error, complaints=complaints: complaints.append(str(error)))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(page_file.as_uri())
            assert page.title().startswith("评估报告")
            assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing to scroll sideways
            assert page.locator("table .better").count() >= 5
            for picture in page.locator("img").all():
                assert picture.evaluate("image => image.complete && image.naturalWidth") > 100
            examples = page.locator(".example:visible")
            assert examples.count() == 8
            assert page.locator(".example details[open]").count() == 0  # the thinking is folded
            page.locator(".example summary").first.click()
            assert page.locator(".example details[open]").count() == 1
            wanted = page.locator(".example b").nth(3).inner_text()
            page.get_by_role("searchbox").fill(wanted)
            assert examples.count() == 1 and "1 题" in page.locator("#found").inner_text()
            page.get_by_role("searchbox").fill("绝不会有的词")
            assert examples.count() == 0
            page.get_by_role("searchbox").fill("")
            assert examples.count() == 8
            assert page.screenshot().startswith(b"\x89PNG")
            assert complaints == [] and all(url.startswith(("file:", "data:")) for url in asked)
        browser.close()


def test_hostile_text_stays_text_in_the_report(before_and_after):
    report = read_report(before_and_after[1])
    evil = "</div><script>alert(1)</script><img src=x onerror=alert(2)>"
    for example in report["examples"]:
        example.update(question=evil, reference=evil, reference_thinking=evil)
        for reply in example["replies"].values():
            reply.update(thinking=evil, answer=evil)
    report["models"][0].update(kind=evil, training=evil)
    page = reports.render(report, {})
    assert "alert(1)</script>" not in page and "<img src=x" not in page and "&lt;script&gt;alert(1)" in page
