"""An answer as the user gets it: the fixed text of an emergency, what the model said, cautions, disclaimer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwenmed import triage
from qwenmed.batch import Request

if TYPE_CHECKING:
    from qwenmed.engine import Engine, Generation


@dataclass(frozen=True)
class AssistantReply:
    """One answer and how it came about.

    Attributes:
        urgency: "emergency", "urgent" or "routine", by rules and not by the model.
        reasons: the rules that fired.
        answer: as shown: an emergency's fixed text first, closed by cautions, the model's notice and the disclaimer.
        raw_answer: as generated; "" if the model gave none.
        cautions: names of the cautions that the answer called for; "contradiction" if it talked an emergency
            down and was withheld – then only `raw_answer` has it.
        finish_reason: "stop", "length", "think_budget" or "repetition"; see `engine.Generation`.
        seconds: wall time.
        model: the checkpoint's folder, the server's model, or the GGUF file.
    """

    question: str
    scenario: str
    urgency: str
    reasons: tuple[str, ...]
    thinking: str
    answer: str
    raw_answer: str
    cautions: tuple[str, ...]
    finish_reason: str
    prompt_tokens: int
    thinking_tokens: int
    answer_tokens: int
    seconds: float
    model: str

    @property
    def said(self) -> str:
        """What the conversation goes on from: the model's answer, or what stood in place of a withheld one."""
        return self.answer if triage.WITHHELD in self.cautions else self.raw_answer

    def as_row(self, id_: Any = None) -> dict[str, Any]:
        """The reply as an output row; `id` first where there is one."""
        row = vars(self) | {"reasons": list(self.reasons), "cautions": list(self.cautions)}
        del row["raw_answer"]
        return row if id_ is None else {"id": id_, **row}


def compose(
    question: str,
    scenario: str,
    urgency: triage.Urgency,
    generation: "Generation",
    max_tokens: int,
    engine: "Engine",
) -> AssistantReply:
    """Put a reply together from what was asked, what the rules say and what the model generated."""
    raw = generation.reply.answer
    unfinished = (
        triage.NO_ANSWER.format(limit=max_tokens) if generation.finish_reason == "length" else triage.EMPTY_ANSWER
    )
    checked = triage.check_answer(raw, question, urgency) if raw else triage.CheckedAnswer(unfinished)
    return AssistantReply(
        question=question,
        scenario=scenario,
        urgency=urgency.level,
        reasons=urgency.reasons,
        thinking=generation.reply.thinking,
        answer=triage.close_answer(checked.text, engine.notice, urgency),
        raw_answer=raw,
        cautions=checked.cautions,
        finish_reason=generation.finish_reason,
        prompt_tokens=generation.prompt_tokens,
        thinking_tokens=generation.thinking_tokens,
        answer_tokens=generation.answer_tokens,
        seconds=round(generation.seconds, 3),
        model=engine.name,
    )


def failed_row(request: Request, error: str) -> dict[str, Any]:
    """The output row of a question that the model was not asked; its urgency does not depend on the model."""
    urgency = triage.assess(request.question)
    row = {"id": request.id, "question": request.question, "scenario": request.scenario, "urgency": urgency.level}
    if urgency.level == triage.EMERGENCY:
        row["answer"] = triage.close_answer("", urgency=urgency)
    return {**row, "error": error}
