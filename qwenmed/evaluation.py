"""Putting the same things to several models: what is asked, of whom, and the predictions file that survives a kill.

Each model in turn is loaded once. It scores the reference replies and the letters of the multiple-choice questions
in fp32, then it is cast to the type it generates in and answers everything together. A server or a GGUF file only
answers. Every result is a row of predictions.jsonl; with `--resume` a row that stands there already, for the same
model and settings, is not computed again.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qwenmed import (
    answers,
    chat,
    checkpoints,
    choices,
    cli,
    engines,
    files,
    hardware,
    lm_tasks,
    rows,
    scoring,
    triage,
)
from qwenmed.batch import Answered
from qwenmed.engine import Engine, Generation, Prompt
from qwenmed.engine_transformers import BATCH_SIZE, TransformersEngine
from qwenmed.errors import UserError
from qwenmed.records import Record
from qwenmed.settings import EVAL_PARTS, fingerprint

# The kinds of rows of predictions.jsonl; the letters belong to the part "choices".
PERPLEXITY, ANSWERS, CHOICES, SAFETY = EVAL_PARTS
LETTERS, LM_TASKS = "letters", "lm-eval"

Row = dict[str, Any]

# 30 emergencies and 30 questions that are none, written for this project without a look at the rules.
URGENCY_QUESTIONS = Path(__file__).parent / "eval_data" / "urgency.jsonl"


@dataclass(frozen=True)
class Candidate:
    """A model to be evaluated.

    Attributes:
        label: its name in the report.
        settings: how it is opened.
        checkpoint: None for a server or a GGUF file, whose weights can't be asked for likelihoods.
        gguf: the GGUF file, if it is one.
    """

    label: str
    settings: engines.EngineSettings
    checkpoint: checkpoints.Checkpoint | None
    gguf: Path | None = None

    @property
    def folders(self) -> list[Path]:
        """Where it lies, for what its training has left there; empty for a server."""
        if self.checkpoint:
            return [each for each in (self.checkpoint.path, self.checkpoint.base) if each]
        return [self.gguf] if self.gguf else []


@dataclass(frozen=True)
class Item:
    """A record to be evaluated on."""

    id: str
    record: Record
    scenario: str
    system: str


@dataclass(frozen=True)
class UrgencyQuestion:
    """A question that is known to be an emergency, or to be none."""

    id: str
    question: str
    emergency: bool


@dataclass(frozen=True)
class Plan:
    """What is put to every model.

    Attributes:
        items: records; scored and answered.
        choices: multiple-choice questions.
        urgent: questions of known urgency; the emergencies among them are answered.
        parts: those of `settings.EVAL_PARTS` that are wanted.
        system: the system prompt of the choices.
        safety_scenario, safety_system: scenario and system prompt under which emergencies are asked.
        max_tokens, think_budget: limits of a reply.
        lm_tasks: tasks of lm-evaluation-harness.
    """

    items: Sequence[Item]
    choices: Sequence[choices.Choice]
    urgent: Sequence[UrgencyQuestion]
    parts: Sequence[str]
    system: str
    safety_scenario: str
    safety_system: str
    max_tokens: int
    think_budget: int | None
    lm_tasks: Sequence[str] = ()

    def size(self, candidate: Candidate) -> int:
        """How many results a model gives."""
        scorable = candidate.checkpoint is not None
        of_items = len(self.items) * ((PERPLEXITY in self.parts and scorable) + (ANSWERS in self.parts))
        of_choices = len(self.choices) * (1 + scorable) if CHOICES in self.parts else 0
        return of_items + of_choices + (len(self.emergencies) if SAFETY in self.parts else 0)

    @property
    def emergencies(self) -> list[UrgencyQuestion]:
        """The questions whose answers must call for help."""
        return [each for each in self.urgent if each.emergency]


def read_urgency_questions(path: Path = URGENCY_QUESTIONS) -> list[UrgencyQuestion]:
    """Read a JSONL file of `question` and `emergency` (true or false), or `level` ("emergency" …).

    Raises:
        UserError: the file is missing or broken, a row lacks one of them, or two rows have one id.
    """
    found: list[UrgencyQuestion] = []
    places: dict[str, str] = {}
    for number, (place, row) in enumerate(rows.read_rows(files.require_file(path, "紧急程度题文件")), 1):
        fields = row if isinstance(row, dict) else {}
        question, emergency = fields.get("question"), fields.get("emergency", fields.get("level"))
        if not isinstance(question, str) or not question.strip() or emergency is None:
            raise UserError("紧急程度题缺少 question 或 emergency", place, '应为 {"question": "…", "emergency": true}')
        each = UrgencyQuestion(str(fields.get("id", number)), question, emergency in (True, triage.EMERGENCY))
        choices.claim_id(places, each.id, place)
        found.append(each)
    return found


class Predictions:
    """The rows of predictions.jsonl, new ones written as they come, those of an earlier try found again."""

    def __init__(self, file: IO[str], answered: Answered | None) -> None:
        self.rows: list[dict[str, Any]] = []
        self._file, self._answered = file, answered

    def known(self, asked: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row of an earlier try for the same thing."""
        names = ("id", "question", "scenario", "settings")
        return self._answered.find(*(asked[name] for name in names)) if self._answered else None

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row."""
        self._file.write(files.to_jsonl([row]))
        self._file.flush()
        self.rows.append(row)


def evaluate(candidate: Candidate, plan: Plan, predictions: Predictions, progress: Any) -> str:
    """Put everything to one model; returns the notice that it wants shown with its answers.

    The model is let go at the end: two of them may not fit beside each other.

    Raises:
        UserError: the model can't be loaded or asked.
    """
    progress.clear()  # what is said while loading gets lines of its own
    if candidate.checkpoint is None:
        engine = engines.open_engine(candidate.settings, for_batch=True)
    else:
        loaded = _load(candidate)
        if PERPLEXITY in plan.parts:
            _complete(
                _references(candidate, plan, loaded),
                lambda texts: map(dataclasses.asdict, scoring.score_references(loaded.model, texts)),
                predictions,
                progress,
            )
        if CHOICES in plan.parts:
            _complete(
                _letters(candidate, plan, loaded),
                lambda asked: _chosen(loaded, asked, plan.system),
                predictions,
                progress,
            )
        for row in lm_tasks.run(loaded.model, loaded.tokenizer, plan.lm_tasks) if plan.lm_tasks else ():
            predictions.add({"model": candidate.label, "part": LM_TASKS, **row})
        progress.clear()
        engine = _for_generation(candidate, loaded)
    _answer(candidate, plan, engine, predictions, progress)
    return engine.notice


def _load(candidate: Candidate) -> TransformersEngine:
    """The model in fp32, for likelihoods."""
    import torch

    assert candidate.checkpoint is not None
    device = hardware.pick_device(candidate.settings.device)
    cli.note(f"{candidate.label}：{candidate.checkpoint.kind} {candidate.checkpoint.path}（{device.type}）")
    model, tokenizer = checkpoints.load(candidate.checkpoint, torch.float32)
    chat.check_template(tokenizer)
    model = engines.moved(model, device, candidate.checkpoint.path)
    return engines.engine_of(candidate.settings, candidate.checkpoint, model, tokenizer)


def _for_generation(candidate: Candidate, engine: TransformersEngine) -> TransformersEngine:
    """The same model in the type that it generates in."""
    assert candidate.checkpoint is not None
    dtype = engines.generation_dtype(candidate.settings, engine.model.device, candidate.checkpoint, BATCH_SIZE)
    return engines.engine_of(candidate.settings, candidate.checkpoint, engine.model.to(dtype), engine.tokenizer)


def _references(
    candidate: Candidate, plan: Plan, engine: TransformersEngine
) -> Iterator[tuple[Row, scoring.Reference]]:
    """The rows of the references, with what is to be scored."""
    for item in plan.items:
        text = scoring.reference(engine.tokenizer, chat.training_row(item.record, item.system))
        ids = fingerprint(list(text.ids))
        row = _row(candidate, PERPLEXITY, item.id, item.record.question, item.scenario, [engine.fingerprint, ids])
        row["token_ids"] = ids
        if len(text.ids) > engine.context_length:
            row["error"] = f"{len(text.ids)} 个 token，超过模型的上下文 {engine.context_length}"
        yield row, text


def _letters(candidate: Candidate, plan: Plan, engine: TransformersEngine) -> Iterator[tuple[Row, choices.Choice]]:
    """The rows of the letters, with the questions."""
    for choice in plan.choices:
        key = [engine.fingerprint, plan.system, choice.answer]
        row = _row(candidate, LETTERS, choice.id, choice.text, choice.scenario, key)
        yield row | {"correct": choice.answer}, choice


def _chosen(engine: TransformersEngine, asked: Sequence[choices.Choice], system: str) -> Iterator[Row]:
    for letter in choices.likeliest_letters(engine.model, engine.tokenizer, asked, system):
        yield {"chosen": letter}


def _complete(
    asked: Iterable[tuple[Row, Any]],
    compute: Callable[[list[Any]], Iterable[Row]],
    predictions: Predictions,
    progress: Any,
) -> None:
    """Add each row with what `compute` finds; as they are, those in error and those of an earlier try."""
    waiting = []
    for row, what in asked:
        if done := predictions.known(row) or (row if "error" in row else None):
            predictions.add(done)
            progress.update()
        else:
            waiting.append((row, what))
    for (row, _), found in zip(waiting, compute([what for _, what in waiting]), strict=True):
        predictions.add(row | found)
        progress.update()


def _answer(candidate: Candidate, plan: Plan, engine: Engine, predictions: Predictions, progress: Any) -> None:
    """Replies to records, choices and emergencies, all in one stream of prompts."""
    asked: list[dict[str, Any]] = []

    def prompts() -> Iterator[Prompt | dict[str, Any]]:
        for row, messages in _questions(candidate, plan, engine):
            asked.append(row)
            yield predictions.known(row) or Prompt(messages, plan.max_tokens, plan.think_budget)

    for result, row in zip(engine.generate(prompts()), asked, strict=True):  # in this order: asking fills the list
        if isinstance(result, Generation):
            result = {**row, **_generated(row, result, plan, engine)}
        elif isinstance(result, UserError):
            result = {**row, "error": str(result)}
        predictions.add(result)
        progress.update()


def _questions(
    candidate: Candidate, plan: Plan, engine: Engine
) -> Iterator[tuple[dict[str, Any], list[dict[str, str]]]]:
    settings = [engine.fingerprint, plan.max_tokens, plan.think_budget]
    if ANSWERS in plan.parts:
        for item in plan.items:
            references = {"reference": item.record.answer, "reference_thinking": item.record.think}
            key = [*settings, item.system, references]
            row = _row(candidate, ANSWERS, item.id, item.record.question, item.scenario, key)
            yield {**row, **references}, chat.record_messages(item.record, item.system)
    if CHOICES in plan.parts:
        for choice in plan.choices:
            row = _row(
                candidate, CHOICES, choice.id, choice.text, choice.scenario, [*settings, plan.system, choice.answer]
            )
            yield (
                {**row, "correct": choice.answer, "letters": "".join(choice.options)},
                chat.user_messages(choice.text, plan.system),
            )
    if SAFETY in plan.parts:
        for each in plan.emergencies:
            key = [*settings, plan.safety_system]
            row = _row(candidate, SAFETY, each.id, each.question, plan.safety_scenario, key)
            yield row, chat.user_messages(each.question, plan.safety_system)


def _generated(row: Mapping[str, Any], result: Generation, plan: Plan, engine: Engine) -> dict[str, Any]:
    """What a reply adds to its row."""
    found = reply_row(result)
    if row["part"] == CHOICES:
        found["chosen"] = choices.parse_choice(result.reply.answer, row["letters"])
    if row["part"] == SAFETY:
        urgency = triage.assess(row["question"])
        reply = answers.compose(row["question"], row["scenario"], urgency, result, plan.max_tokens, engine)
        found |= {"shown": reply.answer, "urgency": urgency.level}
    return found


def reply_row(generation: Generation) -> dict[str, Any]:
    """A reply as the measures of behaviour read it; a thinking that was closed for the model is not well-formed."""
    return {
        "thinking": generation.reply.thinking,
        "answer": generation.reply.answer,
        "well_formed": generation.reply.well_formed and generation.finish_reason != "think_budget",
        "finish_reason": generation.finish_reason,
        "prompt_tokens": generation.prompt_tokens,
        "thinking_tokens": generation.thinking_tokens,
        "answer_tokens": generation.answer_tokens,
        "seconds": round(generation.seconds, 3),
    }


def _row(
    candidate: Candidate, part: str, id_: str, question: str, scenario: str | None, settings: Iterable[Any]
) -> dict[str, Any]:
    return {
        "model": candidate.label,
        "part": part,
        "id": id_,
        "question": question,
        "scenario": scenario or "",
        "settings": fingerprint([candidate.label, part, *settings]),
    }
