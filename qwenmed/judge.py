"""A judge model that compares two answers; off unless asked for.

Judges favour what stands first and what is longer (Zheng et al., 2023, arXiv:2306.05685). Each pair is therefore
judged in both orders; only two verdicts that agree make a win, and how often the first answer was preferred is
reported beside it. A pair that lacks a verdict – the judge refused it, or wrote no conclusion – counts for nothing and
is listed. The thinking is not shown to the judge.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwenmed import chat
from qwenmed.bootstrap import HIGHER, Bootstrap, plain, ratio_sample
from qwenmed.engine import Engine, Generation, Prompt
from qwenmed.errors import UserError

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

# Of an answer without a conclusion, so many characters of its end are kept: there the conclusion should stand.
SHOWN = 100

Row = Mapping[str, Any]
# A verdict, or None and why there is none.
Said = tuple[str | None, str]


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
        baseline: rows of predictions with `id`, `question`, `reference` and `answer`.
        others: by model, rows to the same questions in the same order.
    """
    said = iter(list(_asked(engine, baseline, others)))
    results = []
    for model, rows in others.items():
        pairs = [(str(row["id"]), next(said), next(said)) for row in rows]
        results.append({"model": model, **_counted(pairs, bootstrap)})
    return {"model": engine.name, "prompt": f"{SYSTEM}\n\n{PROMPT}", "results": results}


def _asked(engine: Engine, baseline: Sequence[Row], others: Mapping[str, Sequence[Row]]) -> Iterator[Said]:
    """What is said of each pair with the model's answer first, and then with the baseline's first."""
    prompts = [
        Prompt(chat.user_messages(PROMPT.format(question=ours["question"], reference=ours["reference"],
                                                first=first["answer"], second=second["answer"]), SYSTEM), MAX_TOKENS)
        for rows in others.values()
        for ours, base in zip(rows, baseline, strict=True)
        for first, second in ((ours, base), (base, ours))
    ]  # fmt: skip
    return map(_said, engine.generate(prompts))


def _said(result: Generation | UserError) -> Said:
    if isinstance(result, UserError):
        return None, str(result)
    found = verdict(result.reply.answer)
    end = " ".join(result.reply.answer.split())[-SHOWN:] or result.finish_reason
    return (found, "") if found else (None, f"没有写出结论：{end}")


def _counted(pairs: Sequence[tuple[str, Said, Said]], bootstrap: Bootstrap) -> dict[str, Any]:
    """Wins and losses of the pairs that got both verdicts; the others are no ties, and are listed."""
    judged = [(one, other) for _, (one, _), (other, _) in pairs if one and other]
    left_out = [
        {"id": id_, "error": why_one or why_other}
        for id_, (_, why_one), (_, why_other) in pairs
        if why_one or why_other
    ]
    outcomes = [1 if pair == (FIRST, SECOND) else -1 if pair == (SECOND, FIRST) else 0 for pair in judged]
    net, nothing = ratio_sample((each, 1) for each in outcomes), ratio_sample((0, 1) for _ in outcomes)
    first = ratio_sample((pair.count(FIRST), 2 - pair.count(TIE)) for pair in judged)
    return {
        "wins": outcomes.count(1),
        "ties": outcomes.count(0),
        "losses": outcomes.count(-1),
        "unclear": len(left_out),
        "left_out": left_out,
        "net": plain(bootstrap.difference(net, nothing, HIGHER)),
        "first": plain(bootstrap.estimate(first)),
    }
