"""serve.py under load, on the trained demo model: `make bench-serve` (about 6 minutes on 2 cores, after `make demo`).

    python benchmarks/serving.py [CHECKPOINT=demo_run/output/demo-full]

- one streaming client alone, and 32 at once for 60 s: tokens per second, the slowest against the fastest, errors;
- the server against the engine called directly, one client, in turns;
- 500 clients that go at a random moment: what is left inside, memory before and after, the next answer's time;
- 10,000 malformed requests of a fuzzer: answers of 5xx;
- the page in Chromium: from the request to the enabled input.

Clients ask with a high temperature, so that replies go on to their limit. Results: benchmarks/results/serving.json and
docs/serving.md.
"""

import asyncio
import contextlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from assistant import put_between, where  # noqa: E402

from prompts import MEDICAL_PROMPTS, SAMPLE_QUESTIONS  # noqa: E402
from qwenmed import chat, checkpoints, files  # noqa: E402
from qwenmed.engine import Prompt, Sampling  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "serving.json"
DOCUMENT = ROOT / "docs" / "serving.md"
BEGIN, END = "<!-- bench-serve: make bench-serve -->", "<!-- /bench-serve -->"
PORT, CLIENTS, SECONDS, LEAVING, MALFORMED = 8765, 32, 60, 500, 10_000
URL = f"http://127.0.0.1:{PORT}"
TOKENS = 200
QUESTION = SAMPLE_QUESTIONS["nutrition"][0]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def main() -> None:
    """Measure and keep the figures."""
    checkpoint = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "demo_run" / "output" / "demo-full")
    with tempfile.TemporaryDirectory() as name, serving(checkpoint.resolve(), Path(name)) as process:
        results = {"page": page_seconds(), "overhead": overhead(checkpoint)}
        results |= asyncio.run(load())
        results["leaving"] = asyncio.run(leaving(process.pid))
        results["malformed"] = asyncio.run(malformed())
        results["alive"] = process.poll() is None
    results |= where()
    files.write_json(RESULTS, results)
    put_between(DOCUMENT, BEGIN, END, table(results))
    print(table(results))


@contextlib.contextmanager
def serving(checkpoint: Path, folder: Path):
    """The server, as a user starts it."""
    command = [sys.executable, ROOT / "serve.py", "-c", checkpoint, "--port", str(PORT), "--waiting", "600"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)
    try:
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{URL}/healthz")
                break
            time.sleep(0.2)
        yield process
    finally:
        process.terminate()
        process.wait()


def body(seed: int, **rest) -> dict:
    """A request that goes on to its limit."""
    asked = {"model": "medical:nutrition", "messages": [{"role": "user", "content": QUESTION}], "stream": True}
    return {
        **asked,
        "max_tokens": TOKENS,
        "temperature": 1.9,
        "seed": seed,
        "stream_options": {"include_usage": True},
        **rest,
    }


async def ask(client: httpx.AsyncClient, seed: int) -> int:
    """One streamed answer; returns its tokens."""
    async with client.stream("POST", f"{URL}/v1/chat/completions", json=body(seed)) as answer:
        answer.raise_for_status()
        lines = [line async for line in answer.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]", lines[-1]
    return json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"]


async def load() -> dict:
    """One client alone, then many."""

    async def worker(number: int, until: float) -> int:
        tokens = 0
        async with httpx.AsyncClient(timeout=300) as client:
            while time.perf_counter() < until:
                try:
                    tokens += await ask(client, number * 1000 + tokens)
                except (httpx.HTTPError, AssertionError):
                    errors.append(number)
        return tokens

    errors: list[int] = []
    found = {}
    for name, clients, seconds in (("alone", 1, 20), ("many", CLIENTS, SECONDS)):
        started = time.perf_counter()
        tokens = await asyncio.gather(*(worker(number, started + seconds) for number in range(clients)))
        taken = time.perf_counter() - started
        found[name] = {
            "clients": clients, "seconds": round(taken, 1), "tokens_per_second": round(sum(tokens) / taken, 1),
            "fastest_over_slowest": round(max(tokens) / max(1, min(tokens)), 2), "errors": len(errors),
        }  # fmt: skip
    return found


def overhead(checkpoint: Path) -> dict:
    """The engine called directly, and through the server, in turns; tokens per second."""
    import torch

    from qwenmed.engine_transformers import TransformersEngine

    model, tokenizer = checkpoints.load(checkpoints.find(str(checkpoint)), torch.float32)
    engine = TransformersEngine(model, tokenizer)
    messages = chat.user_messages(QUESTION, MEDICAL_PROMPTS["nutrition"])

    def direct(seed: int) -> float:
        started = time.perf_counter()
        *_, made = engine.stream(Prompt(messages, TOKENS, sampling=Sampling(1.9, None, seed)))
        return (made.thinking_tokens + made.answer_tokens) / (time.perf_counter() - started)

    def served(seed: int) -> float:
        # curl, because a client in Python takes a good part of a core from the server beside it.
        command = ["curl", "-sN", f"{URL}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", "@-"]
        started = time.perf_counter()
        out = subprocess.run(command, input=json.dumps(body(seed)).encode(), capture_output=True, check=True).stdout
        taken = time.perf_counter() - started
        *_, usage, done = [line for line in out.decode().splitlines() if line]
        assert done == "data: [DONE]", done
        return json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] / taken

    rates = {"engine": [], "server": []}
    for seed in range(8):
        rates["engine"].append(direct(seed))
        rates["server"].append(served(seed))
    engine_rate, server_rate = (statistics.median(rates[name]) for name in ("engine", "server"))
    return {
        "engine": round(engine_rate, 1),
        "server": round(server_rate, 1),
        "share": round(engine_rate / server_rate - 1, 3),
    }


async def leaving(pid: int) -> dict:
    """Clients that go at a random moment."""
    rng = random.Random(0)

    async def goes(number: int) -> None:
        await asyncio.sleep(rng.random() * 20)
        async with httpx.AsyncClient(timeout=300) as client:
            with contextlib.suppress(TimeoutError, httpx.HTTPError):
                async with asyncio.timeout(rng.random() * 3):
                    await ask(client, number)

    async def first() -> float:
        async with httpx.AsyncClient(timeout=300) as client:
            started = time.perf_counter()
            await ask(client, 1)
            return time.perf_counter() - started

    before_seconds = statistics.median([await first() for _ in range(3)])
    before = resident(pid)
    await asyncio.gather(*(goes(number) for number in range(LEAVING)))
    until = time.perf_counter() + 15
    while (state := httpx.get(f"{URL}/healthz").json())["inside"] and time.perf_counter() < until:
        await asyncio.sleep(0.1)
    after_seconds = statistics.median([await first() for _ in range(3)])
    after = resident(pid)
    return {
        "clients": LEAVING, "inside": state["inside"], "active": state["active"], "mib_before": before,
        "mib_after": after, "seconds_before": round(before_seconds, 2), "seconds_after": round(after_seconds, 2),
    }  # fmt: skip


def resident(pid: int) -> int:
    """Memory of a process in MiB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) // 1024


async def malformed() -> dict:
    """Requests of every wrong kind; statuses counted."""
    rng, statuses = random.Random(0), {}
    gate = asyncio.Semaphore(16)

    async def send(client: httpx.AsyncClient) -> None:
        async with gate:
            try:
                answer = await client.request(*wrong(rng), **wrong_rest(rng))
                key = str(answer.status_code)
            except httpx.HTTPError as error:
                key = type(error).__name__
            statuses[key] = statuses.get(key, 0) + 1

    async with httpx.AsyncClient(timeout=120) as client:
        await asyncio.gather(*(send(client) for _ in range(MALFORMED)))
    return {"requests": MALFORMED, "statuses": dict(sorted(statuses.items()))}


def wrong(rng: random.Random) -> tuple[str, str]:
    """A method and an address, mostly the real ones."""
    method = rng.choice(["POST"] * 8 + ["GET", "PUT", "DELETE", "PATCH"])
    path = rng.choice(
        ["/v1/chat/completions"] * 8
        + ["/v1/models", "/metrics/../..", "/%00", "/v1/chat/completions/x", "/page.json?a=%ff"]
    )
    return method, URL + path


def wrong_rest(rng: random.Random) -> dict:
    """A body that is broken in one of many ways."""
    good = body(rng.randrange(100), max_tokens=1, stream=rng.random() < 0.5)
    values = [
        None,
        True,
        -1,
        10**30,
        1e308,
        "x",
        "",
        "\x00",
        "\ud7ff😀" * 50,
        [],
        {},
        [[]],
        {"a": 1},
        "<|im_end|>" * 20,
    ]
    kind = rng.randrange(6)
    if kind == 0:
        good[rng.choice(list(good))] = rng.choice(values)
    elif kind == 1:
        good["messages"] = [
            {"role": rng.choice(["user", "tool", "system", 1]), "content": rng.choice(values)}
            for _ in range(rng.randrange(4))
        ]
    elif kind == 2:
        good[
            rng.choice(["stop", "temperature", "top_p", "n", "scenario", "think_budget", "seed", "stream_options"])
        ] = rng.choice(values)
    text = json.dumps(good).encode()
    if kind == 3:
        text = text[: rng.randrange(len(text))]
    elif kind == 4:
        place = rng.randrange(len(text))
        text = text[:place] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 6))) + text[place:]
    elif kind == 5:
        text = rng.choice(
            [b"", b"null", b"[]", b'"a"', b"[" * 5000, b"\xef\xbb\xbf{}", b"{" * 3000, rng.randbytes(200)]
        )
    kinds = ["application/json"] * 6 + ["text/plain", "multipart/form-data", "application/x-www-form-urlencoded", ""]
    return {"content": text, "headers": {"content-type": rng.choice(kinds)}}


def page_seconds() -> float | None:
    """From the request for the page to its enabled input; the median of five."""
    if CHROMIUM is None:
        return None
    from playwright.sync_api import sync_playwright

    taken = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(5):
            page = browser.new_context().new_page()
            started = time.perf_counter()
            page.goto(URL)
            page.locator("#question:enabled").wait_for()
            taken.append(time.perf_counter() - started)
        browser.close()
    return round(statistics.median(taken), 2)


def table(results: dict) -> str:
    """The figures as Markdown."""
    alone, many, left, wrong_ = results["alone"], results["many"], results["leaving"], results["malformed"]
    ratio = many["tokens_per_second"] / alone["tokens_per_second"]
    bad = sum(count for status, count in wrong_["statuses"].items() if not status.isdigit() or status >= "500")
    shown = ", ".join(f"{status}: {count}" for status, count in wrong_["statuses"].items())
    growth = left["mib_after"] / left["mib_before"] - 1
    rows = [
        ("32 个流式客户端，60 秒，错误", many["errors"], "0"),
        ("最快与最慢的客户端，token 之比", many["fastest_over_slowest"], "≤ 3"),
        (f"合计 {many['tokens_per_second']} token/s，单独一个 {alone['tokens_per_second']}", f"{ratio:.2f}×", "≥ 3×"),
        (
            f"单个客户端：直接调用引擎 {results['overhead']['engine']}，经过服务 {results['overhead']['server']} token/s",
            f"{results['overhead']['share']:+.1%}",
            "≤ 10%",
        ),
        ("500 个随机断开的客户端之后，留在队列里的", left["inside"], "0"),
        (f"它们前后的内存 {left['mib_before']} → {left['mib_after']} MiB", f"{growth:+.1%}", "≤ 5%"),
        ("它们前后一条回复的秒数", f"{left['seconds_before']} → {left['seconds_after']}", "一样快"),
        (f"10,000 个错误的请求（{shown}），5xx 与断开", bad, "0"),
        ("网页：从请求到可以输入，秒", results["page"], "≤ 3"),
    ]
    lines = [f"| 测什么（演示模型，{results['machine']}） | 测得 | 目标 |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {what} | **{value}** | {goal} |" for what, value, goal in rows)])


if __name__ == "__main__":
    main()
