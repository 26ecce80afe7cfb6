"""The chat page in headless Chromium, on the trained demo model. `make screenshots` keeps the pictures."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from test_api import EMERGENCY, idle, running_server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not here (Debian package chromium)")

DESK, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def server(trained, tmp_path_factory):
    with running_server(trained, tmp_path_factory.mktemp("page"), "--temperature", "0") as (address, process, _):
        yield address, process


@pytest.fixture(scope="module")
def address(server):
    return server[0]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """Opens the page; at the end nothing may have been complained of, and no other host asked."""
    complaints, foreign, contexts = [], [], []

    def open_(viewport=DESK, **options):
        context = browser.new_context(viewport=viewport, **options)
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda request: None if request.url.startswith((address, "blob:")) else foreign.append(request.url),
        )
        page.goto(address)
        page.locator("#question:enabled").wait_for()
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not complaints and not foreign


def answered(page, count=1):
    page.locator('#conversation[aria-busy="false"]').wait_for()
    answers = page.locator("article.answer")
    assert answers.count() == count
    return answers.last


def keep(page, name):
    """A screenshot, kept where SCREENSHOTS says (`make screenshots`)."""
    folder = os.environ.get("SCREENSHOTS")
    picture = page.screenshot()
    assert picture.startswith(b"\x89PNG")
    if folder:
        (Path(folder) / f"{name}.png").write_bytes(picture)


def test_two_scenarios_are_asked_and_thinking_folds(open_page, trained):
    page = open_page()
    assert page.locator("#scenario option").count() == 11 and page.locator("#samples button").count() == 4
    for row in trained.rows[1::-1]:
        if page.locator("article").count():
            page.click("#clear")  # the demo model knows its records without a conversation before them
        page.select_option("#scenario", row["scenario"])
        page.fill("#question", row["question"])
        page.click("#send")
        answer = answered(page)
        assert row["answer"][:20] in answer.inner_text()
        details = answer.locator("details")
        assert "思考了" in details.locator("summary").inner_text() and details.get_attribute("open") is None
        details.locator("summary").click()
        assert details.locator(".text").inner_text()[:10] == row["think"][:10]
        keep(page, "chat-desktop")
        details.locator("summary").click()
        assert details.get_attribute("open") is None
        assert "免责声明" in answer.inner_text() and page.locator("#disclaimer").is_visible()
        assert page.locator("#alarm").is_hidden() == ("【紧急】" not in answer.inner_text())


def test_emergency_is_told_before_a_token_is_generated(open_page, trained):
    page = open_page()
    page.fill("#question", EMERGENCY)
    page.press("#question", "Enter")
    page.locator("#alarm:visible").wait_for()
    early = page.locator("article.answer").inner_text()
    assert "120" in page.locator("#alarm").inner_text() and "【紧急】请立即拨打120" in early
    answer = answered(page)
    assert answer.get_attribute("class") == "answer urgent" and page.locator("#alarm").is_visible()
    keep(page, "chat-emergency")


def test_running_answer_is_stopped_and_asked_again(open_page, server, trained):
    address, process = server
    page = open_page()
    page.fill("#question", max(trained.rows, key=lambda row: len(row["think"] + row["answer"]))["question"])
    page.press("#question", "Enter")
    page.locator("article.answer details:visible").wait_for()
    process.send_signal(signal.SIGSTOP)  # or the answer may end before the button is reached
    page.locator("#stop").click()
    process.send_signal(signal.SIGCONT)
    assert "（已停止）" in answered(page).inner_text() and idle(address)
    page.click("#retry")
    again = answered(page)
    assert "（已停止）" not in again.inner_text() and page.locator("article.question").count() == 1


def test_conversation_is_downloaded_and_a_reload_begins_anew(open_page, trained):
    page = open_page()
    assert page.locator("#download").is_disabled()
    page.fill("#question", trained.rows[0]["question"])
    page.press("#question", "Enter")
    answered(page)
    with page.expect_download() as waiting:
        page.click("#download")
    told = json.loads(Path(waiting.value.path()).read_text(encoding="utf-8"))
    assert told["turns"][0]["question"] == trained.rows[0]["question"] and "120" in told["disclaimer"]
    assert waiting.value.suggested_filename.startswith("conversation_")
    page.reload()
    page.locator("#question:enabled").wait_for()
    assert page.locator("article").count() == 0 and page.locator("#welcome").is_visible()


def test_telephone_shows_everything_without_scrolling_sideways(open_page, trained):
    page = open_page(PHONE, color_scheme="dark")
    page.locator("#samples button").first.click()
    answered(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for each in ("#scenario", "#question", "#send", "#retry", "#disclaimer", "#download"):
        box = page.locator(each).bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"], each
        assert box["y"] + box["height"] <= PHONE["height"], each
    keep(page, "chat-phone")


def test_keyboard_alone_is_enough(open_page, trained):
    page = open_page()
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.type("第一行")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type(trained.rows[0]["question"])
    assert page.input_value("#question").count("\n") == 1
    page.keyboard.press("Control+A")
    page.keyboard.type(trained.rows[0]["question"])
    page.keyboard.press("Enter")
    answered(page)
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.id") == "scenario"
    page.keyboard.press("ArrowDown")
    assert page.input_value("#scenario") == "diagnosis"
    page.keyboard.press("Shift+Tab")  # the thinking's fold
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    page.keyboard.press("Enter")
    assert page.locator("article.answer details").get_attribute("open") is not None


def test_labels_are_chinese_and_english(open_page):
    page = open_page()
    assert page.locator("#send").inner_text() == "发送" and page.evaluate("document.documentElement.lang") == "zh-CN"
    page.click("#language")
    assert page.locator("#send").inner_text() == "Send" and page.evaluate("document.documentElement.lang") == "en"
    assert page.locator("#scenario option").nth(1).inner_text() == "Symptoms"
    assert "call 120" in page.locator("#disclaimer").inner_text()


def test_page_takes_questions_soon(browser, address):
    page = browser.new_page()
    started = time.perf_counter()
    page.goto(address)
    page.locator("#question:enabled").wait_for()
    assert time.perf_counter() - started < 30  # how long it takes is measured in benchmarks/serving.py
    page.close()


def test_key_is_asked_for_and_used(browser, trained, tmp_path):
    (tmp_path / "keys.txt").write_text("k" * 20, encoding="utf-8")
    with running_server(trained, tmp_path, "--api-key-file", tmp_path / "keys.txt", "--temperature", "0") as (
        address,
        *_,
    ):
        page = browser.new_page()
        page.goto(address)
        page.locator("#key-form:visible").wait_for()
        page.fill("#key", "k" * 20)
        page.press("#key", "Enter")
        page.fill("#question", trained.rows[0]["question"])
        page.press("#question", "Enter")
        page.locator("article.answer details:visible").wait_for()
        answered(page)
        page.close()
