"""Curves and histograms as inline SVG, drawn so that they are readable on light and on dark ground."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

INK = "#7d838c"  # of axes and text: enough contrast on white and on near-black
COLOURS = ("#2f7ed8", "#e07b39", "#2ca58d", "#b04fc4")
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "raydiffusion",  # the same file for the same numbers
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "grid.color": INK,
    "grid.alpha": 0.2,
}


@dataclass(frozen=True)
class Curve:
    """A line: x, y of equal length; error: half-width of its band, or None."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(visible=True)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any) -> str:
    target = io.StringIO()
    figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    return text[text.index("<svg") :]


def lines(curves: Sequence[Curve], x_label: str, y_label: str, width: float = 5.2, height: float = 2.8) -> str:
    """Lines over one another, as SVG."""
    import matplotlib as mpl

    with mpl.rc_context(SETTINGS):
        figure, axes = _figure(width, height)
        for curve, colour in zip(curves, COLOURS * len(curves), strict=False):
            marker = "o" if len(curve.x) <= 30 else None
            axes.plot(curve.x, curve.y, color=colour, label=curve.name, linewidth=1.6, marker=marker, markersize=3.5)
            if curve.error is not None:
                y, error = np.asarray(curve.y), np.asarray(curve.error)
                axes.fill_between(curve.x, y - error, y + error, color=colour, alpha=0.2, linewidth=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_formatter(_thousands)
        if len(curves) > 1:
            axes.legend()
        return _svg(figure)


def _thousands(value: float, _place: Any = None) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"


def histograms(
    parts: Sequence[tuple[str, NDArray[np.float64]]],
    x_label: str,
    mark: tuple[float, str] | None = None,
    width: float = 5.2,
    height: float = 2.6,
) -> str:
    """Shares of each part over common bins, as SVG. mark: a vertical line and its name."""
    import matplotlib as mpl

    every = np.concatenate([values for _, values in parts])
    edges = np.linspace(every.min(), every.max() + 1e-9, 36)
    with mpl.rc_context(SETTINGS):
        figure, axes = _figure(width, height)
        for (name, values), colour in zip(parts, COLOURS, strict=False):
            weights = np.full(len(values), 100 / len(values))
            axes.hist(values, edges, weights=weights, color=colour, alpha=0.45, label=name, edgecolor=colour)
        if mark is not None:
            axes.axvline(mark[0], color=INK, linestyle="--", linewidth=1.2)
            axes.annotate(
                mark[1], (mark[0], 1.0), xycoords=("data", "axes fraction"), xytext=(4, -10), textcoords="offset points"
            )
        axes.set_xlabel(x_label)
        axes.set_ylabel("% of images")
        axes.legend()
        return _svg(figure)


def bars(names: Sequence[str], shares: Sequence[float], bar: float | None, width: float = 5.2) -> str:
    """Shares, 0 to 1, one horizontal bar each, as SVG. bar: what is demanded, a vertical line."""
    import matplotlib as mpl

    with mpl.rc_context(SETTINGS):
        figure, axes = _figure(width, 0.8 + 0.22 * len(names))
        places = np.arange(len(names))
        axes.barh(places, [100 * share for share in shares], color=COLOURS[0], height=0.65)
        axes.set_yticks(places, [str(name) for name in names])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.grid(visible=False, axis="y")
        if bar is not None:
            axes.axvline(100 * bar, color=INK, linestyle="--", linewidth=1.2)
        axes.set_xlabel("% of samples of the class that the judge gives it")
        return _svg(figure)
