"""A judge model that compares two answers; off unless asked for.

Judges favour what stands first and what is longer (Zheng et al., 2023, arXiv:2306.05685). Each pair is therefore
judged in both orders; only two verdicts that agree make a win, and how often the first answer was preferred is
reported beside it. The thinking is not shown to the judge.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwenmed import chat
from qwenmed.bootstrap import HIGHER, Bootstrap, plain, ratio_sample
from qwenmed.engine import Engine, Generation, Prompt

SYSTEM = "你是一位严谨的临床医生，负责比较两段给患者的回答。只依据医学上的正确性、安全性（该就医时是否明确说明）和是否切题来判断，不要因为更长、更靠前或措辞更自信而偏向任何一段。"
PROMPT = """【问题】
{question}

【参考回答】
{reference}

【回答一】
{first}

【回答二】
{second}

哪一段回答更好？先用一句话说明理由，最后单独用一行写出“结论：一”“结论：二”或“结论：平”。"""

MAX_TOKENS = 1024
FIRST, SECOND, TIE = "一", "二", "平"
_MARKUP = str.maketrans("", "", "*`")
_CONCLUSION = re.compile(r"结论\s*[：:]")
# 一样好, 二者相当, 一和二都对, 一不如二: these begin with a number too, and prefer none, or the other.
_VERDICT = re.compile(r"[\s“\"「『【（(]*(?:回答|第)?\s*([一二平])(?!样|者|致|般|均|方面|[不差劣]|[段个]?[都、和与及])")

Row = Mapping[str, Any]


def verdict(answer: str) -> str | None:
    """What a judge's answer concludes, or None if it does not say."""
    _, *conclusions = _CONCLUSION.split(answer.translate(_MARKUP))
    found = _VERDICT.match(conclusions[-1]) if conclusions else None
    return found[1] if found else None


def judge(
    engine: Engine, baseline: Sequence[Row], others: Mapping[str, Sequence[Row]], bootstrap: Bootstrap
) -> dict[str, Any]:
    """Compare each model's answers with the baseline's.

    Args:
        engine: the judge.
        baseline: rows of predictions with `question`, `reference` and `answer`.
        others: by model, rows to the same questions in the same order.
    """
    verdicts = iter(list(_asked(engine, baseline, others)))
    results = []
    for model, rows in others.items():
        pairs = [(next(verdicts), next(verdicts)) for _ in rows]
        results.append({"model": model, **_counted(pairs, bootstrap)})
    return {"model": engine.name, "prompt": f"{SYSTEM}\n\n{PROMPT}", "results": results}


def _asked(engine: Engine, baseline: Sequence[Row], others: Mapping[str, Sequence[Row]]) -> Iterator[str | None]:
    """Of each pair the verdict with the model's answer first, and then with the baseline's first."""
    prompts = [
        Prompt(chat.user_messages(PROMPT.format(question=ours["question"], reference=ours["reference"],
                                                first=first["answer"], second=second["answer"]), SYSTEM), MAX_TOKENS)
        for rows in others.values()
        for ours, base in zip(rows, baseline, strict=True)
        for first, second in ((ours, base), (base, ours))
    ]  # fmt: skip
    for result in engine.generate(prompts):
        yield verdict(result.reply.answer) if isinstance(result, Generation) else None


def _counted(pairs: Sequence[tuple[str | None, str | None]], bootstrap: Bootstrap) -> dict[str, Any]:
    outcomes = [1 if pair == (FIRST, SECOND) else -1 if pair == (SECOND, FIRST) else 0 for pair in pairs]
    clear = [each for pair in pairs for each in pair if each is not None]
    net, nothing = ratio_sample((each, 1) for each in outcomes), ratio_sample((0, 1) for _ in outcomes)
    first = ratio_sample((each == FIRST, each != TIE) for each in clear)
    return {
        "wins": outcomes.count(1),
        "ties": outcomes.count(0),
        "losses": outcomes.count(-1),
        "unclear": 2 * len(pairs) - len(clear),
        "net": plain(bootstrap.difference(net, nothing, HIGHER)),
        "first": plain(bootstrap.estimate(first)),
    }
