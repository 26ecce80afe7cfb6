"""The pictures: loss curves, lengths of replies, scenarios. Figures are made by hand, without pyplot's global state."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Narrow enough to be read on a telephone.
SIZE, DPI = (6.0, 3.6), 150
# Where one is installed, names of models may be Chinese; the labels of the axes are the field's English terms.
CHINESE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Microsoft YaHei", "PingFang SC", "Hiragino Sans GB",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "SimHei", "Noto Serif CJK SC",
)  # fmt: skip


def losses(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Training and validation loss over the steps, as a PNG.

    Args:
        histories: for each run, by name, the trainer's log history.
    """
    with _figure() as figure:
        axes = figure.add_subplot()
        for number, (name, history) in enumerate(histories.items()):
            for key, label, style in (("loss", "training loss", "-"), ("eval_loss", "validation loss", "o-")):
                points = [(entry["step"], entry[key]) for entry in history if key in entry]
                color = f"C{number}" if len(histories) > 1 else None
                if points:
                    label = f"{name}: {label}" if len(histories) > 1 else label
                    alpha = 0.5 if len(histories) > 1 and key == "loss" else 1
                    axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, color=color, alpha=alpha)
        title = next(iter(histories)) if len(histories) == 1 else ""
        axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
        return _png(figure)


def length_histograms(lengths: Mapping[str, Mapping[str, Sequence[int]]]) -> bytes:
    """Histograms of tokens, one picture with a panel for each kind, as a PNG.

    Args:
        lengths: for each kind, e.g. "thinking_tokens", the lengths of each model's replies.
    """
    with _figure() as figure:
        panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
        for axes, (kind, by_model) in zip(panels, lengths.items(), strict=True):
            longest = max((value for values in by_model.values() for value in values), default=0)
            edges = [longest / 20 * i for i in range(21)] if longest else [0, 1]
            for name, values in by_model.items():
                axes.hist(values, bins=edges, histtype="stepfilled", alpha=0.4, label=name)
            axes.set(xlabel=kind.replace("_", " "))
            axes.grid(alpha=0.3)
        panels[0].set(ylabel="replies")
        panels[-1].legend(fontsize=8)
        return _png(figure)


def scenario_bars(by_scenario: Mapping[str, Mapping[str, Mapping[str, Any]]], label: str) -> bytes:
    """A bar for each scenario and model, with its interval, as a PNG.

    Args:
        by_scenario: scenario → model → estimate (value, low, high).
        label: of the axis.
    """
    models = list(next(iter(by_scenario.values())))
    height = 0.8 / len(models)
    with _figure((SIZE[0], 1.2 + 0.42 * len(by_scenario))) as figure:
        axes = figure.add_subplot()
        for number, model in enumerate(models):
            estimates = [each[model] for each in by_scenario.values()]
            places = [i + (number - (len(models) - 1) / 2) * height for i in range(len(estimates))]
            axes.barh(places, [each["value"] or 0 for each in estimates], height, label=model)
            for place, each in zip(places, estimates, strict=True):
                if each["low"] is not None:
                    axes.plot([each["low"], each["high"]], [place, place], color="black", linewidth=1)
        axes.set_yticks(range(len(by_scenario)), list(by_scenario))
        axes.invert_yaxis()
        axes.set(xlabel=label)
        axes.grid(alpha=0.3, axis="x")
        figure.legend(loc="outside upper left", ncols=len(models), fontsize=8)
        return _png(figure)


def write(path: Path, picture: bytes) -> None:
    """Write a picture whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(picture)
    temporary.replace(path)


@contextlib.contextmanager
def _figure(size: tuple[float, float] = SIZE) -> "Iterator[Figure]":
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    there = {font.name for font in font_manager.fontManager.ttflist}
    fonts = [*(name for name in CHINESE_FONTS if name in there)][:1]
    with matplotlib.rc_context({"font.family": ["DejaVu Sans", *fonts]}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # no Chinese font: boxes instead
        yield Figure(figsize=size, dpi=DPI, layout="constrained")


def _png(figure: "Figure") -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    stream = io.BytesIO()
    # Without the version of matplotlib, so that the same numbers make the same file.
    FigureCanvasAgg(figure).print_png(stream, metadata={"Software": None})
    return stream.getvalue()
