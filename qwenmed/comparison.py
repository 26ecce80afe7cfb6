"""From predictions to the numbers of a report: estimates, paired differences, scenarios, examples.

The first model is the baseline: every other one is compared with it, on the rows that all of them have.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from qwenmed import triage
from qwenmed.bootstrap import Bootstrap, Sample
from qwenmed.evaluation import ANSWERS, CHOICES, LETTERS, LM_TASKS, PERPLEXITY, SAFETY, UrgencyQuestion
from qwenmed.measures import BY_KEY, Measure, lm_task_measure, samples, task_sample

EXAMPLES = 20
# Shown scenario by scenario.
BY_SCENARIO = {"perplexity_answer": PERPLEXITY, "chrf": ANSWERS, "choice_generation": CHOICES}

Row = Mapping[str, Any]


class Comparison:
    """Predictions of several models on the same rows.

    Args:
        rows: of predictions.jsonl.
        labels: the models; the first is the baseline.
        bootstrap: draws the rows.
    """

    def __init__(self, rows: Sequence[Row], labels: Sequence[str], bootstrap: Bootstrap) -> None:
        self._labels, self._bootstrap = labels, bootstrap
        self._rows: dict[str, dict[str, dict[str, Row]]] = {}
        for row in rows:
            self._rows.setdefault(row["part"], {}).setdefault(row["model"], {})[row["id"]] = row

    def parts(self) -> dict[str, dict[str, Any]]:
        """For each part: how many rows all its models have, and which were left out and why."""
        return {
            part: {
                "models": self._models(part),
                "rows": len(self._common(part)),
                "left_out": [
                    {"id": row["id"], "model": row["model"], "error": row["error"]}
                    for model in self._models(part)
                    for row in self._rows[part][model].values()
                    if "error" in row
                ],
            }
            for part in self._rows
        }

    def measures(self) -> list[dict[str, Any]]:
        """Every measure with each model's estimate and its difference from the baseline."""
        found = []
        for part in (PERPLEXITY, ANSWERS, LETTERS, CHOICES, SAFETY):
            models, ids = self._models(part), self._common(part)
            by_model = {model: samples(part, [self._rows[part][model][id_] for id_ in ids]) for model in models}
            for key in next(iter(by_model.values()), {}):
                found.append(self._measure(BY_KEY[key], {model: by_model[model][key] for model in models}))
        return [*found, *self._lm_tasks()]

    def _lm_tasks(self) -> Iterator[dict[str, Any]]:
        """The tasks of lm-evaluation-harness as measures."""
        by_task: dict[str, list[str]] = {}
        for id_, row in self._common(LM_TASKS).items():
            by_task.setdefault(row["task"], []).append(id_)
        for task, ids in by_task.items():
            rows = {model: [self._rows[LM_TASKS][model][id_] for id_ in ids] for model in self._models(LM_TASKS)}
            yield self._measure(
                lm_task_measure(task, next(iter(rows.values()))[0]["metric"]),
                {model: task_sample(found) for model, found in rows.items()},
            )

    def scenarios(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Of the measures in `BY_SCENARIO`: scenario → model → estimate."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for key, part in BY_SCENARIO.items():
            groups: dict[str, list[str]] = {}
            for id_, row in self._common(part).items():
                groups.setdefault(row["scenario"], []).append(id_)
            for scenario, ids in groups.items():
                for model in self._models(part):
                    sample = samples(part, [self._rows[part][model][id_] for id_ in ids])[key]
                    estimate = _plain(asdict(self._bootstrap.estimate(sample)))
                    found.setdefault(key, {}).setdefault(scenario, {})[model] = estimate
        return found

    def rows(self, part: str) -> dict[str, list[Row]]:
        """Of each model the rows of a part that all models have."""
        common = self._common(part)
        return {model: [self._rows[part][model][id_] for id_ in common] for model in self._models(part)}

    def lengths(self) -> dict[str, dict[str, list[int]]]:
        """For each model the tokens of its thinkings and of its answers."""
        names = ("thinking_tokens", "answer_tokens")
        rows = {model: self._rows[ANSWERS][model].values() for model in self._models(ANSWERS)}
        return {
            name: {model: [row[name] for row in found if "error" not in row] for model, found in rows.items()}
            for name in names
        }

    def examples(self, seed: int) -> list[dict[str, Any]]:
        """Answers side by side, to rows that the seed chooses."""
        ids = sorted(self._common(ANSWERS))
        shown = ("thinking", "answer", "finish_reason", "thinking_tokens", "answer_tokens")
        return [
            {
                **{name: self._common(ANSWERS)[id_][name] for name in ("id", "question", "scenario")},
                "reference": self._common(ANSWERS)[id_]["reference"],
                "reference_thinking": self._common(ANSWERS)[id_]["reference_thinking"],
                "replies": {
                    model: {name: self._rows[ANSWERS][model][id_][name] for name in shown}
                    for model in self._models(ANSWERS)
                },
            }
            for id_ in sorted(random.Random(seed).sample(ids, min(EXAMPLES, len(ids))), key=ids.index)
        ]

    def _models(self, part: str) -> list[str]:
        return [label for label in self._labels if label in self._rows.get(part, {})]

    def _common(self, part: str) -> dict[str, Row]:
        """The rows, as the first model has them, that every model has without an error."""
        models = self._models(part)
        if not models:
            return {}
        by_model = [self._rows[part][model] for model in models]
        return {
            id_: row
            for id_, row in by_model[0].items()
            if all(id_ in each and "error" not in each[id_] for each in by_model)
        }

    def _measure(self, measure: Measure, by_model: Mapping[str, Sample]) -> dict[str, Any]:
        baseline = self._labels[0]
        differences = {}
        for model, sample in by_model.items():
            if model == baseline or baseline not in by_model:
                continue
            if measure.key.startswith("perplexity") and self._tokens_differ(model, baseline):
                continue  # losses per token of other tokens
            differences[model] = _plain(asdict(self._bootstrap.difference(sample, by_model[baseline], measure.better)))
        return {
            **asdict(measure),
            "estimates": {model: _plain(asdict(self._bootstrap.estimate(by_model[model]))) for model in by_model},
            "differences": differences,
        }

    def tokens_differ(self) -> list[str]:
        """The models to which the references are other tokens than to the baseline."""
        baseline = self._labels[0]
        models = self._models(PERPLEXITY)
        return [model for model in models if baseline in models and self._tokens_differ(model, baseline)]

    def _tokens_differ(self, model: str, baseline: str) -> bool:
        rows = self._rows[PERPLEXITY]
        return any(
            rows[model][id_]["token_ids"] != rows[baseline][id_]["token_ids"] for id_ in self._common(PERPLEXITY)
        )


def rules(questions: Sequence[UrgencyQuestion], bootstrap: Bootstrap) -> dict[str, Any]:
    """How the urgency rules do on questions of known urgency; no model takes part."""
    import numpy as np

    from qwenmed.bootstrap import ratio

    found = {}
    for name, emergency in (("recall", True), ("false_alarms", False)):
        alarms = [
            triage.assess(each.question).level == triage.EMERGENCY for each in questions if each.emergency == emergency
        ]
        columns = np.array([(float(alarm), 1.0) for alarm in alarms]).reshape(-1, 2)
        found[name] = _plain(asdict(bootstrap.estimate(Sample(columns, ratio, share=True))))
    return found


def _plain(numbers: dict[str, Any]) -> dict[str, Any]:
    """With None where a number is none; JSON knows no NaN. Eight digits are more than any of them means."""
    return {
        name: (float(f"{value:.8g}") if math.isfinite(value) else None) if isinstance(value, float) else value
        for name, value in numbers.items()
    }
