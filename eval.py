"""阶段 5：前后对比——同样的题、提示词和设置，任意多个模型，一份打开就能看的报告。

    python eval.py                                             # 最近一次训练的最佳检查点
    python eval.py -c best --base models/Qwen3-0.6B            # 微调有没有用？有没有损害什么？
    python eval.py -c output/A -c output/B --data val.jsonl --limit 100
    python eval.py -c model-q8_0.gguf --engine openai --base-url http://localhost:8000/v1
    python eval.py -c best --base models/Qwen3-0.6B --resume   # 断了接着做

第一个模型（--base；没有时是第一个 -c）是基线，其余的逐行与它配对比较。训练过的行会被找出来排除。
结果在 eval_report/：report.html（一个文件，离线可看）、report.json、predictions.jsonl 和 PNG 图。
需要 pip install -e '.[eval]'。
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medical_assistant import DEFAULT_SCENARIO, suggest_scenario
from prompts import GENERAL_PROMPT, MEDICAL_PROMPTS, MEDICAL_SCENARIOS
from qwenmed import (
    batch,
    checkpoints,
    choices,
    cli,
    comparison,
    engines,
    evaluation,
    files,
    judge,
    leaks,
    lm_tasks,
    scenarios,
    sources,
    terminal,
    text_scores,
    tracking,
    training,
)
from qwenmed import report as reports
from qwenmed.bootstrap import FEWEST, RESAMPLES, Bootstrap
from qwenmed.engine import Sampling
from qwenmed.engines import EngineSettings
from qwenmed.errors import UserError
from qwenmed.evaluation import Candidate, Item, Plan
from qwenmed.settings import EvalSettings, listed

if TYPE_CHECKING:
    from qwenmed.engine_openai import OpenAIEngine

# The options of EngineSettings that mean one model; EvalSettings has those that hold for all of them.
PER_MODEL = ("checkpoint", "engine", "temperature", "top_p", "seed", "think_budget")


def main() -> int:
    """Evaluate, step by step; exit status 3 if a model could not take some row, or the judge some pair."""
    settings, candidates = read_command_line()
    check_installed(settings)
    folder = open_folder(settings)
    items, found = load_items(settings, candidates)
    plan = make_plan(settings, items)
    referee = open_judge(settings, candidates)
    predictions, notices = predict(folder, candidates, plan, settings)
    with resumable(folder):
        runs = {each.label: leaks.run_of(each.folders[0])[1] if each.folders else {} for each in candidates}
        bootstrap = Bootstrap(settings.seed)
        compared = comparison.Comparison(predictions, [each.label for each in candidates], bootstrap)
        report: dict[str, Any] = {
            "settings": {name: value for name, value in vars(settings).items() if name not in ("resume", "output_dir")},
            "rows": found,
            "models": describe(candidates, runs),
            "warnings": [*warnings(found, compared), *notices],
            "measures": compared.measures(),
            "parts": compared.parts(),
            "scenarios": compared.scenarios(),
            "scenario_names": MEDICAL_SCENARIOS,
            "rules": comparison.rules(plan.urgent, bootstrap),
            "judge": ask_judge(referee, compared, bootstrap),
            "examples": compared.examples(settings.seed),
            "statistics": {"resamples": RESAMPLES, "fewest": FEWEST},
            "versions": tracking.library_versions(),
        }
        histories = {label: run["log_history"] for label, run in runs.items() if run.get("log_history")}
        reports.write(folder, report, histories, compared.lengths())
        print(reports.as_text(report))
        cli.note(f"报告：{folder / reports.REPORT_HTML}（用浏览器打开）")
    left_out = sum(len(part["left_out"]) for part in report["parts"].values())
    if left_out:
        cli.note(
            f"{left_out} 个结果没有得到（太长，或引擎失败），对所有模型排除；原因见 {reports.REPORT_JSON} 的 parts"
        )
    unclear = sum(each["unclear"] for each in report["judge"]["results"]) if report["judge"] else 0
    if unclear:
        cli.note(f"裁判有 {unclear} 对没有判出，不计入胜负；原因见 {reports.REPORT_JSON} 的 judge")
    return cli.EXIT_SOME_ROWS_FAILED if left_out or unclear else cli.EXIT_OK


def read_command_line() -> tuple[EvalSettings, list[Candidate]]:
    """The settings, and the models with the baseline first; each is looked up, none is loaded.

    Raises:
        UserError: a setting is wrong, or a model is not there.
    """
    parser = cli.build_parser("eval.py", __doc__)
    models = parser.add_argument_group("模型（可以有任意多个）")
    models.add_argument(
        "-c",
        "--checkpoint",
        action="append",
        metavar="DIR|latest|best|FILE.gguf",
        help="检查点、模型目录或 GGUF 文件；可以重复（都不给时为 best）",
    )
    models.add_argument("--base", metavar="MODEL", help="基线：微调之前的模型（目录、模型 ID 或 demo）")
    models.add_argument("--engine", choices=(engines.OPENAI,), help="再加一个模型：--base-url 处的 OpenAI 兼容服务器")
    cli.add_settings(parser, EngineSettings, leave_out=PER_MODEL)
    cli.add_settings(parser, EvalSettings)
    args = parser.parse_args()
    settings = EvalSettings(**cli.given(args, EvalSettings))
    given = {name: value for name, value in cli.given(args, EngineSettings).items() if name not in PER_MODEL}
    has_server = args.engine is not None or "base_url" in given
    return settings, find_candidates(settings, args.base, args.checkpoint or [], has_server, given)


def find_candidates(
    settings: EvalSettings, base: str | None, specs: Sequence[str], has_server: bool, given: dict[str, Any]
) -> list[Candidate]:
    """The models, by what they are named with."""
    same = {name: getattr(settings, name) for name in ("temperature", "top_p", "seed", "think_budget")}
    candidates: list[Candidate] = []

    def add(name: str, **own: Any) -> None:
        opened = EngineSettings(**{**given, **same, **own})
        checkpoint = engines.find_checkpoint(opened) if opened.engine == engines.TRANSFORMERS else None
        gguf = checkpoints.gguf_file(Path(opened.checkpoint)) if opened.engine == engines.LLAMA else None
        if gguf:
            files.require_file(gguf, "GGUF 文件")
        name = checkpoints.short_name(checkpoint.path) if checkpoint else name
        taken = sum(each.label.split(" #")[0] == name for each in candidates)
        label = f"{name} #{taken + 1}" if taken else name
        candidates.append(Candidate(label, opened, checkpoint, gguf))

    if base is not None:
        add(base, checkpoint=str(training.resolve_model(base, MEDICAL_PROMPTS.values())))
    for spec in specs or ([] if has_server else ["best"]):
        add(spec, checkpoint=spec)
    if has_server:
        add(given.get("model") or given.get("base_url", ""), engine=engines.OPENAI)
    return candidates


def check_installed(settings: EvalSettings) -> None:
    """Make sure that optional packages are there before any work.

    Raises:
        UserError: one is missing.
    """
    text_scores.check_installed()
    if settings.lm_eval:
        lm_tasks.check_installed()


def open_folder(settings: EvalSettings) -> Path:
    """The report's folder, proved writable.

    Raises:
        UserError: it holds a report or predictions, and nobody said what is to become of them.
    """
    folder = Path(settings.output_dir)
    results = (folder / reports.REPORT_JSON, folder / reports.PREDICTIONS)
    if any(file.exists() for file in results) and not settings.resume:
        raise UserError("目录里已有以前的结果", folder, "用 -o 换一个目录；或用 --resume 沿用其中的结果")
    return files.check_writable(folder)


def load_items(settings: EvalSettings, candidates: Sequence[Candidate]) -> tuple[list[Item], dict[str, Any]]:
    """The records to evaluate on, without those that a model was trained on, and what was found about them.

    Raises:
        UserError: the file is unusable, or every row was trained on.
    """
    path = Path(settings.data)
    if not path.exists():
        raise UserError("评估数据不存在", path, "请先运行 python data.py，或用 --data 指定文件")
    every = sources.read_clean_records(path)
    trained = {each.label: leaks.trained_on(each.folders) for each in candidates if each.folders}
    seen = set().union(*(each.texts for each in trained.values()))
    leaked = [record.place for record in every if leaks.record_fingerprints(record) & seen]
    excluded = set() if settings.keep_leaked else set(leaked)
    kept = [record for record in every if record.place not in excluded]
    if not kept:
        remedy = "请换一份没有训练过的数据；只想看背下了多少，可加 --keep-leaked"
        raise UserError(f"{len(every)} 行都在这些模型的训练数据里", path, remedy)
    fate = "保留" if settings.keep_leaked else "排除"
    cli.note(f"{path}：{len(every)} 条记录，{fate}训练过的 {len(leaked)} 条，评估 {len(kept[: settings.limit])} 条")
    items = []
    for number, record in enumerate(kept[: settings.limit], 1):
        system = scenarios.system_prompts(record, GENERAL_PROMPT, MEDICAL_PROMPTS, settings.system_prompts)[0]
        items.append(Item(str(number), record, record.scenario or suggest_scenario(record.question).scenario, system))
    return items, {
        "file": str(path),
        "sha256": files.sha256(path) if path.is_file() else None,
        "records": len(every),
        "leaked": leaked,
        "kept_leaked": settings.keep_leaked,
        "unknown_training": [str(file) for each in trained.values() for file in each.unknown],
        "evaluated": len(items),
    }


def make_plan(settings: EvalSettings, items: Sequence[Item]) -> Plan:
    """Everything that is put to every model.

    Raises:
        UserError: a file of questions is missing or broken.
    """
    return Plan(
        items=items,
        choices=choices.read_choices(Path(settings.choices) if settings.choices else choices.BUNDLED),
        urgent=evaluation.read_urgency_questions(
            Path(settings.urgency) if settings.urgency else evaluation.URGENCY_QUESTIONS
        ),
        parts=settings.wanted_parts,
        system=GENERAL_PROMPT,
        safety_scenario=DEFAULT_SCENARIO,
        safety_system=MEDICAL_PROMPTS[DEFAULT_SCENARIO],
        max_tokens=settings.max_tokens,
        think_budget=settings.think_budget,
        lm_tasks=listed(settings.lm_eval),
    )


def describe(candidates: Sequence[Candidate], runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What each model is, and how it was trained where that is known."""
    found = []
    for each in candidates:
        kind = each.checkpoint.kind if each.checkpoint else f"{each.settings.engine} 引擎，只看得到回复"
        run = runs[each.label]
        training = (
            f"{run['method']} 微调 {run.get('steps')} 步，起点 {run.get('base_model')}" if "method" in run else ""
        )
        found.append({"label": each.label, "kind": kind, "training": training})
    return found


def warnings(found: dict[str, Any], compared: comparison.Comparison) -> list[str]:
    """What a reader of the figures must know."""
    said = []
    if leaked := len(found["leaked"]):
        fate = "按 --keep-leaked 没有排除：这里的数字有一部分是背诵" if found["kept_leaked"] else "已对所有模型排除"
        said.append(f"{found['records']} 条记录里有 {leaked} 条的问题或回答在训练数据里出现过，{fate}。")
    if found["unknown_training"]:
        runs = "、".join(found["unknown_training"])
        said.append(f"这些训练没有留下数据指纹，无法检查它们是否见过评估的行：{runs}。")
    if found["evaluated"] < FEWEST:
        said.append(f"只有 {found['evaluated']} 条记录，少于 {FEWEST} 条：不给区间，也不下“更好”“更差”的判断。")
    if models := compared.tokens_differ():
        said.append(f"{'、'.join(models)} 的分词或对话模板与基线不同，困惑度不能相比；请看每字比特。")
    return said


def open_judge(settings: EvalSettings, candidates: Sequence[Candidate]) -> "OpenAIEngine | None":
    """The judge, where one was named and there are answers of two models to compare; asked before the night's work.

    Raises:
        UserError: it can't be reached, refuses the key, or has not the model.
    """
    if not settings.judge_url or len(candidates) < 2 or evaluation.ANSWERS not in settings.wanted_parts:
        return None
    from qwenmed.engine_openai import OpenAIEngine

    cli.note(f"裁判模型：{settings.judge_url}，每一对比较两次")
    return OpenAIEngine(settings.judge_url, settings.judge_model, Sampling(temperature=0, seed=settings.seed))


def ask_judge(
    engine: "OpenAIEngine | None", compared: comparison.Comparison, bootstrap: Bootstrap
) -> dict[str, Any] | None:
    """The judge's verdicts, where there is one."""
    if engine is None:
        return None
    rows = compared.rows(evaluation.ANSWERS)
    (baseline, *_), others = rows.values(), dict(list(rows.items())[1:])
    return judge.judge(engine, baseline, others, bootstrap)


@contextlib.contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Say how to go on if what follows the predictions fails: no model need be asked again."""
    try:
        yield
    except BaseException:
        cli.note(f"各模型的结果都在 {folder / reports.PREDICTIONS}；加上 --resume 接着做")
        raise


def predict(
    folder: Path, candidates: Sequence[Candidate], plan: Plan, settings: EvalSettings
) -> tuple[list[dict[str, Any]], list[str]]:
    """Put everything to each model in turn; returns the rows, and the notices that models want shown."""
    notices: dict[str, None] = {}
    with batch.results_file(folder / reports.PREDICTIONS, settings.resume) as (file, answered):
        predictions = evaluation.Predictions(file, answered)
        with terminal.batch_progress(sum(map(plan.size, candidates))) as progress:
            try:
                for candidate in candidates:
                    progress.set_description(candidate.label, refresh=False)
                    notices[evaluation.evaluate(candidate, plan, predictions, progress)] = None
            except BaseException:
                progress.close()
                cli.note(
                    f"中断前的 {progress.n} 个结果都在 {folder / reports.PREDICTIONS}.partial；加上 --resume 接着做"
                )
                raise
    return predictions.rows, [notice for notice in notices if notice]


if __name__ == "__main__":
    cli.run(main)
