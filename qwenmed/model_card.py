"""What goes beside exported weights: the model card, and Ollama's Modelfile (`export_pages/`)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenmed import checkpoints, files
from qwenmed.engine import QWEN3_SAMPLING, QWEN3_TOP_K
from qwenmed.measures import BY_KEY
from qwenmed.report import interval

PAGES = Path(__file__).parent / "export_pages"
# Tokens that Ollama gives memory to; its own default of 4,096 cuts long conversations.
OLLAMA_CONTEXT = 8192


def card(
    name: str,
    checkpoint: checkpoints.Checkpoint,
    run: Mapping[str, Any],
    report: Path,
    general_prompt: str,
    form: str,
    usage: str,
    self_test: str | None,
) -> str:
    """The README.md of an exported model.

    Args:
        name: of the model.
        run: the run.json of the training, or {}.
        report: a report.json of eval.py, which may or may not be there and know the checkpoint.
        general_prompt: the system prompt that all training rows begin with.
        form: what it was exported to, in words.
        usage: commands.
        self_test: its table, or None.
    """
    metrics = run.get("metrics")
    losses = metrics if isinstance(metrics, dict) else {}
    shown = {"first_loss": "训练开始", "last_loss": "训练结束", "last_eval_loss": "验证"}
    told = [f"{title} {losses[key]:.4f}" for key, title in shown.items() if isinstance(losses.get(key), (int, float))]
    return _render(
        "model_card.md.jinja",
        name=name,
        base_id=_base_id(run),
        licence="apache-2.0" if _base_id(run).startswith("Qwen/") else "other",
        notice=checkpoint.notice,
        usage=usage,
        general_prompt=general_prompt,
        form=form,
        checkpoint=checkpoints.short_name(checkpoint.path),
        run=run,
        metrics=_metrics(run, report, checkpoints.short_name(checkpoint.path)),
        losses="，".join(told),
        self_test=self_test,
    )


def modelfile(name: str, file: str, folder: Path, scenario: str, system: str) -> str:
    """Ollama's Modelfile for a GGUF file that lies beside it.

    Args:
        file: the GGUF file's name.
        folder: a model folder, for its generation config.
        scenario: its title.
        system: the system prompt.
    """
    path = folder / "generation_config.json"
    config: Any = files.read_json(path) if path.is_file() else {}
    greedy = isinstance(config, dict) and config.get("do_sample") is False
    own = config if isinstance(config, dict) and config.get("do_sample") else {}
    parameters = {
        "temperature": 0 if greedy else own.get("temperature", QWEN3_SAMPLING.temperature),
        "top_p": own.get("top_p", QWEN3_SAMPLING.top_p),
        "top_k": own.get("top_k", QWEN3_TOP_K),
        "min_p": own.get("min_p") or 0,
        "repeat_penalty": 1,  # Ollama's own default is 1.1, which no other engine here applies
        "num_ctx": OLLAMA_CONTEXT,
        "num_predict": 2048,
    }
    template = (PAGES / "qwen3.gotmpl").read_text(encoding="utf-8").rstrip("\n")
    return _render(
        "Modelfile.jinja",
        title=name,
        name=ollama_name(name),
        file=file,
        template=template,
        parameters=parameters,
        scenario=scenario,
        system=system,
    )


def ollama_name(name: str) -> str:
    """The name as Ollama allows it: lower case, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._") or "qwen3-medical"


def _render(page: str, **values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.ChainableUndefined, keep_trailing_newline=True
    )
    return environment.from_string((PAGES / page).read_text(encoding="utf-8")).render(**values)


def _base_id(run: Mapping[str, Any]) -> str:
    """The hub's ID of what the training began from, or "" where it was a folder."""
    settings = run.get("settings")
    model: Any = settings.get("model") if isinstance(settings, dict) else None
    is_id = isinstance(model, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not Path(model).exists()
    return model if is_id and not model.startswith((".", "output/", "models/", "exports/")) else ""


def _metrics(run: Mapping[str, Any], report: Path, label: str) -> list[dict[str, Any]]:
    """The figures that are known, those of a report before those of the training's end."""
    found: dict[str, dict[str, Any]] = {}
    # The training's end measures its best checkpoint; another one has no such figures.
    best = Path(str(run.get("best_checkpoint") or "")).name
    ended = run.get("evaluation") if label.endswith(f"/{best}") else None
    for key, estimate in (ended if isinstance(ended, dict) else {}).items():
        if key in BY_KEY and estimate:
            found[key] = _metric(key, estimate, "训练结束时的验证集")
    document: Any = files.read_json(report) if report.is_file() else {}
    for measure in document.get("measures", []) if isinstance(document, dict) else []:
        estimate = measure.get("estimates", {}).get(label)
        if estimate and measure.get("key") in BY_KEY:
            found[measure["key"]] = _metric(measure["key"], estimate, f"eval.py，{document['rows']['file']}")
    return list(found.values())


def _metric(key: str, estimate: Mapping[str, Any], source: str) -> dict[str, Any]:
    measure = BY_KEY[key]
    return {
        "name": measure.name,
        "value": interval(estimate, measure.unit),
        "rows": estimate["rows"],
        "source": source,
    }
