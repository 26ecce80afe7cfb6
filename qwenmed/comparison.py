"""From predictions to the numbers of a report: estimates, paired differences, scenarios, examples.

The first model is the baseline: every other one is compared with it, on the rows that all of them have.
"""

import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from qwenmed import triage
from qwenmed.bootstrap import Bootstrap, Sample, plain, share_sample
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
        every: dict[str, dict[str, dict[str, Row]]] = {}
        for row in rows:
            every.setdefault(row["part"], {}).setdefault(row["model"], {})[row["id"]] = row
        # Part → model → id → row, the models in the order of their labels.
        self._every = {
            part: {label: by_model[label] for label in labels if label in by_model} for part, by_model in every.items()
        }
        self._common = {part: _in_all(by_model) for part, by_model in self._every.items()}

    def parts(self) -> dict[str, dict[str, Any]]:
        """For each part: how many rows all its models have, and which were left out and why."""
        return {
            part: {
                "models": list(by_model),
                "rows": len(next(iter(self._common[part].values()))),
                "left_out": [
                    {"id": row["id"], "model": row["model"], "error": row["error"]}
                    for found in by_model.values()
                    for row in found.values()
                    if "error" in row
                ],
            }
            for part, by_model in self._every.items()
        }

    def rows(self, part: str) -> dict[str, list[Row]]:
        """Of each model the rows of a part that all models have."""
        return {model: list(found.values()) for model, found in self._common.get(part, {}).items()}

    @functools.cached_property
    def _samples(self) -> dict[str, dict[str, dict[str, Sample]]]:
        """What the measures are made of: part → model → key."""
        parts = (PERPLEXITY, ANSWERS, LETTERS, CHOICES, SAFETY)
        return {part: {model: samples(part, rows) for model, rows in self.rows(part).items()} for part in parts}

    def measures(self) -> list[dict[str, Any]]:
        """Every measure with each model's estimate and its difference from the baseline."""
        found = []
        for by_model in self._samples.values():
            for key in next(iter(by_model.values()), {}):
                found.append(self._measure(BY_KEY[key], {model: own[key] for model, own in by_model.items()}))
        return [*found, *self._lm_tasks()]

    def _lm_tasks(self) -> Iterator[dict[str, Any]]:
        """The tasks of lm-evaluation-harness as measures."""
        rows = self.rows(LM_TASKS)
        metrics = {row["task"]: row["metric"] for row in next(iter(rows.values()), ())}
        for task, metric in metrics.items():
            own = {model: [row for row in found if row["task"] == task] for model, found in rows.items()}
            by_model = {model: task_sample(found) for model, found in own.items()}
            yield self._measure(lm_task_measure(task, metric), by_model)

    def scenarios(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Of the measures in `BY_SCENARIO`: scenario → model → estimate."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for key, part in BY_SCENARIO.items():
            groups: dict[str, list[int]] = {}
            for number, row in enumerate(next(iter(self.rows(part).values()), ())):
                groups.setdefault(row["scenario"], []).append(number)
            for scenario, numbers in groups.items():
                found.setdefault(key, {})[scenario] = {
                    model: plain(self._bootstrap.estimate(own[key].of(numbers)))
                    for model, own in self._samples[part].items()
                }
        return found

    def lengths(self) -> dict[str, dict[str, list[int]]]:
        """For each model the tokens of its thinkings and of its answers."""
        return {
            name: {
                model: [row[name] for row in found.values() if "error" not in row]
                for model, found in self._every.get(ANSWERS, {}).items()
            }
            for name in ("thinking_tokens", "answer_tokens")
        }

    def examples(self, seed: int) -> list[dict[str, Any]]:
        """Answers side by side, to rows that the seed chooses."""
        by_model = self._common.get(ANSWERS, {})
        first = next(iter(by_model.values()), {})
        ids = sorted(first)
        chosen = sorted(random.Random(seed).sample(ids, min(EXAMPLES, len(ids))))
        asked = ("id", "question", "scenario", "reference", "reference_thinking")
        shown = ("thinking", "answer", "finish_reason", "thinking_tokens", "answer_tokens")
        return [
            {name: first[id_][name] for name in asked}
            | {"replies": {model: {name: rows[id_][name] for name in shown} for model, rows in by_model.items()}}
            for id_ in chosen
        ]

    def tokens_differ(self) -> list[str]:
        """The models to which the references are other tokens than to the baseline."""
        by_model = {model: [row["token_ids"] for row in rows] for model, rows in self.rows(PERPLEXITY).items()}
        baseline = by_model.get(self._labels[0])
        return [model for model, tokens in by_model.items() if baseline is not None and tokens != baseline]

    def _measure(self, measure: Measure, by_model: Mapping[str, Sample]) -> dict[str, Any]:
        baseline = by_model.get(self._labels[0])
        # Losses per token of other tokens can't be compared.
        incomparable = self.tokens_differ() if measure.key.startswith("perplexity") else []
        compared = {
            model: self._bootstrap.difference(sample, baseline, measure.better)
            for model, sample in by_model.items()
            if baseline is not None and sample is not baseline and model not in incomparable
        }
        return {
            **asdict(measure),
            "estimates": {model: plain(self._bootstrap.estimate(sample)) for model, sample in by_model.items()},
            "differences": {model: plain(difference) for model, difference in compared.items()},
        }


def _in_all(by_model: Mapping[str, Mapping[str, Row]]) -> dict[str, dict[str, Row]]:
    """Of each model the rows that every model has without an error, in the first model's order."""
    ids = [
        id_
        for id_ in next(iter(by_model.values()))
        if all(id_ in rows and "error" not in rows[id_] for rows in by_model.values())
    ]
    return {model: {id_: rows[id_] for id_ in ids} for model, rows in by_model.items()}


def rules(questions: Sequence[UrgencyQuestion], bootstrap: Bootstrap) -> dict[str, Any]:
    """How the urgency rules do on questions of known urgency; no model takes part."""
    alarms = [(each.emergency, triage.assess(each.question).level == triage.EMERGENCY) for each in questions]
    return {
        name: plain(bootstrap.estimate(share_sample(alarm for known, alarm in alarms if known == emergency)))
        for name, emergency in (("recall", True), ("false_alarms", False))
    }
