"""The figures: SVG inside the report, PNG files beside a reward model, a comparison and the study's page.

matplotlib draws them (the extra `report`) and is imported when it is needed, since that is slow. Without it `svg`
returns an empty string and `plot_calibration` and `plot_best_of` write nothing. Every PNG is as wide as a README shows
it, 800 pixels, at twice the resolution.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic
from ..measures import FEWEST, wilson_interval
from ..prompts import CATEGORIES
from .cards import REWARD_MODELS, is_fraction, judged_by

WIDTH, DPI = 8.0, 200  # inches and dots per inch of a PNG
COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # for the color-blind (Okabe and Ito)
GREY = "#6f6f6f"
SMOOTHED = 5  # a running mean is over a fifth of a curve
BAND = 0.25  # opacity of the band of normal runs
# The report's charts are drawn in stand-in colors that become the CSS variables of these names, so that they follow
# light mode, dark mode and print.
PALETTE = {name: f"#0a0b{index:02x}" for index, name in enumerate(("paper", "ink", "soft", "line", "base", "tuned"))}

Bin = Mapping[str, float]  # "predicted" and "observed": means over its images; "count": their number


# ------------------------------------------------------------------------------------------- what several figures need
def svg(title: str, draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    """What `draw` draws on a matplotlib figure of `size` (inches), as an <svg> element; "" without matplotlib.

    The same numbers give the same text, and its text is the page's: readable, in the page's font and colors.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    ink, soft, line = (PALETTE[name] for name in ("ink", "soft", "line"))
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10, "axes.axisbelow": True}
    style["text.parse_math"] = False  # a dollar sign is one
    style |= {f"axes.spines.{side}": False for side in ("top", "right", "left")}
    style |= {"text.color": ink, "axes.labelcolor": soft, "xtick.color": soft, "ytick.color": line}
    style |= {"ytick.labelcolor": ink, "axes.edgecolor": line, "grid.color": line, "grid.linewidth": 0.7}
    style |= {"xtick.major.size": 0, "ytick.major.size": 0}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file := io.StringIO(), format="svg", transparent=True, metadata=nothing)
    text = file.getvalue().partition("<svg")[2].replace("xlink:href", "href")
    unused = r'<style.*?</style>|<metadata>.*?</metadata>|<!--.*?-->| xmlns\S*?="[^"]*"'
    text = re.sub(unused, "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # names that would stand on the page twice
    text = re.sub(r'width="\S+" height="\S+"', f'role="img" aria-label="{escape(title)}"', text, count=1)
    for name, stand_in in PALETTE.items():
        text = text.replace(stand_in, f"var(--{name})")
    return f"<svg{text}"


def panels(number: int, columns: int, height: float, **options: Any) -> tuple[Any, list[Any]]:
    """A figure of README width with `number` panels in rows of `columns`, each `height` inches high."""
    from matplotlib.figure import Figure

    rows = -(-number // columns)
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    all_axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for axes in all_axes[number:]:
        axes.set_axis_off()
    for axes in all_axes[:number]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    return figure, all_axes[:number]


def save(figure: Any, path: Path, dpi: int = DPI) -> None:
    """Write a figure as PNG."""
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)


def in_percent(axis: Any, ticks: int = 6) -> None:
    """Label an axis of fractions in percent."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def name_ends(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Name lines that end at (x, y, name, color) beside their ends, where they do not overlap."""
    axes.autoscale_view()  # the limits are needed
    ends = sorted(ends, key=lambda end: end[1])
    across, up = (axes.transScale + axes.transLimits).transform([end[:2] for end in ends]).T
    for (_, _, name, color), x, y in zip(ends, across, spread(up.tolist())):
        style = {
            "xycoords": "axes fraction",
            "textcoords": "offset points",
            "annotation_clip": False,
            "parse_math": False,
        }
        axes.annotate(name, (x, y), (8, 0), color=color, va="center", fontsize=9, **style)


def spread(heights: Sequence[float], step: float = 0.08) -> list[float]:
    """Rising heights in a panel, from 0 to 1, moved up until they are `step` apart, and down where that is above 1."""
    apart: list[float] = []
    for height in heights:
        apart.append(max(height, apart[-1] + step) if apart else height)
    for i in reversed(range(len(apart))):
        apart[i] = min(apart[i], 1 - step * (len(apart) - 1 - i))
    return apart


# --------------------------------------------------------------------------------------------------------- calibration
def calibration(axes: Any, bins: Sequence[Bin], color: str, line: str) -> None:
    """Points of the fraction labelled good against the mean reward of each bin, of FEWEST images at least.

    A point's area stands for its number of images, its bar is Wilson's 95 % interval. Color `line` is the diagonal's.
    """
    axes.plot([0, 1], [0, 1], color=line, linewidth=0.8, dashes=(4, 3), zorder=1)
    total = sum(bin["count"] for bin in bins)
    if total < FEWEST:
        axes.text(0.03, 0.9, f"too few images: {total:.0f}")
    for bin in bins if total >= FEWEST else ():
        ends = wilson_interval(round(bin["observed"] * bin["count"]), int(bin["count"]))
        axes.vlines(bin["predicted"], *ends, color=color, linewidth=1, zorder=2)
        area = 700 * bin["count"] / total
        axes.scatter(bin["predicted"], bin["observed"], area, color=color, alpha=0.8, linewidths=0, zorder=3)
    ticks, labels = [0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"]
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal", xlabel="predicted reward")
    axes.set(xticks=ticks, yticks=ticks, xticklabels=labels, yticklabels=labels)


def plot_calibration(path: Path, measured: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Reliability diagrams as PNG: a row for each kind of held-out prompts, a column for each of `measured`'s models.

    measured: model -> "known prompts" or "new prompts" -> what `measure` returns.
    """
    try:
        import matplotlib  # noqa: F401  that it is there
    except ImportError:
        return
    splits = list(dict.fromkeys(split for one in measured.values() for split in one))
    places = [(split, name) for split in splits for name in measured]
    figure, all_axes = panels(len(places), len(measured), 3.1, sharex=True, sharey=True)
    for axes, (split, name) in zip(all_axes, places):
        one = measured[name].get(split, {})
        calibration(axes, one.get("calibration") or [], GREY if name == "clip" else COLORS[0], "0.6")
        error = f": ECE {one['ece']:.3f}" if one.get("ece") is not None else ""
        axes.set_title(f"{REWARD_MODELS[name]},\n{split}{error}", fontsize=10)
        axes.label_outer()
    for axes in all_axes[:: len(measured)]:
        axes.set_ylabel("fraction labelled good")
    figure.supxlabel("a point's area is its number of images, its bar the 95 % interval", fontsize=9, color=GREY)
    save(figure, path)


# ----------------------------------------------------------------------------------------------------------- best of N
def best_of_n(axes: Any, curves: Sequence[tuple[str, str, Mapping[str, Any]]], colors: Sequence[str]) -> None:
    """Curves (name, line style, "value" and "ci95" over N), each named at its end, solid ones with bands of 95 %."""
    for (_, style, curve), color in zip(curves, colors):
        x = range(1, len(curve["value"]) + 1)
        axes.plot(x, curve["value"], style, color=color, marker=".")
        spans = [span or (value, value) for value, span in zip(curve["value"], curve["ci95"])]
        if style == "-":  # more bands would hide one another
            axes.fill_between(x, *zip(*spans), color=color, alpha=0.13, linewidth=0)
    axes.set_xlabel("N images of a prompt to choose from")
    axes.xaxis.get_major_locator().set_params(integer=True)
    ends = [(len(curve["value"]), curve["value"][-1], name) for name, _, curve in curves]
    name_ends(axes, [(*end, color) for end, color in zip(ends, colors)])


def plot_best_of(path: Path, curves: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """The curves of best of N as PNG, a panel for each judge: chooser -> judge -> model -> "value", "ci95" over N.

    Nothing is written where each prompt has one image, since there is nothing to choose.
    """
    try:
        import matplotlib  # noqa: F401  that it is there
    except ImportError:
        return
    judges = list(dict.fromkeys(judge for tables in curves.values() for judge in tables))
    longest = [len(curve["value"]) for tables in curves.values() for one in tables.values() for curve in one.values()]
    if max(longest, default=1) == 1:
        return
    figure, all_axes = panels(len(judges), 1, 3.0)
    for axes, judge in zip(all_axes, judges):
        shown = [
            (f"{name}, chosen by {chooser}", "-" if chooser == "reward" or "reward" not in curves else "--", curve)
            for chooser, tables in curves.items()
            for name, curve in tables.get(judge, {}).items()
        ]
        names = list(dict.fromkeys(name for tables in curves.values() for name in tables.get(judge, {})))
        colors = (GREY, *COLORS)
        best_of_n(axes, shown, [colors[names.index(name.rpartition(", ")[0]) % len(colors)] for name, _, _ in shown])
        axes.set_title(f"best of N: {judged_by(judge)}", fontsize=10, loc="left")
        axes.set_ylabel("mean over prompts, band: 95 %", fontsize=9)
        if is_fraction(judge):
            in_percent(axes.yaxis)
    save(figure, path)


# ---------------------------------------------------------------------------------------------------- report's charts
Group = tuple[str, Sequence[float], Sequence[Sequence[float] | None]]  # name, a value of each model, their intervals


def bars(groups: Sequence[Group], percent: bool, figure: Any) -> None:
    """A bar for the base and one for the fine-tuned model in each group; categories and what follows stand apart."""
    axes = figure.subplots()
    ahead = {"overall": 0.0} | dict.fromkeys(CATEGORIES, 0.4)
    places = [i + ahead.get(name, 0.8) for i, (name, _, _) in enumerate(groups)]
    for place, (_, values, spans) in zip(places, groups):
        for side, offset, value, span in zip(("base", "tuned"), (-0.19, 0.19), values, spans):
            axes.barh(place + offset, value, 0.34, color=PALETTE[side])
            for color, width in (("paper", 3.0), ("ink", 1.2)):  # a halo sets the interval off from its bar
                axes.hlines(place + offset, *(span or (value, value)), color=PALETTE[color], linewidth=width)
        first, second = (f"{100 * value:.0f}" if percent else f"{value:.2f}" for value in values)
        axes.text(1.03, place, f"{first} → {second}{' %' * percent}", va="center")
    labels = ["0", "25", "50", "75", "100 %"] if percent else ["0", "0.25", "0.5", "0.75", "1"]
    axes.set(xlim=(0, 1), xticks=[0, 0.25, 0.5, 0.75, 1], xticklabels=labels)
    axes.set_yticks(places, [name for name, _, _ in groups])
    axes.invert_yaxis()
    axes.grid(axis="x")


def reliability(bins: Sequence[Bin], figure: Any) -> None:
    """The report's calibration chart."""
    axes = figure.subplots()
    calibration(axes, bins, PALETTE["tuned"], PALETTE["soft"])
    axes.set_ylabel("fraction labelled good")
    axes.grid()


def window(number: int) -> int:
    """How many of a curve's points its running mean is over: a fifth of them, 1 (no mean) of few."""
    length = max(5, number // SMOOTHED)
    return length if number >= 2 * length else 1


def running_mean(points: np.ndarray, length: int) -> np.ndarray:
    """Means (N-length+1,2) of points (N,2) over a window that is as long at the ends as in the middle."""
    return np.stack([np.convolve(column, np.ones(length) / length, "valid") for column in points.T], 1)


def curve(points: np.ndarray, length: int, band: Mapping[str, Any] | None, figure: Any) -> None:
    """Points (N,2) of a training curve, over them their running mean, and behind them the band of normal runs."""
    axes = figure.subplots()
    if band:
        edges = np.linspace(0, band["steps"], len(band["low"]) + 1)
        axes.stairs(band["high"], edges, baseline=band["low"], fill=True, color=PALETTE["base"], alpha=BAND, zorder=1)
    if length > 1:
        axes.plot(*points.T, color=PALETTE["base"], linewidth=0.8, alpha=0.8)
    axes.plot(*running_mean(points, length).T, color=PALETTE["tuned"], linewidth=1.8)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.grid(axis="y")


def by_labels(measured: Mapping[str, Any], figure: Any) -> None:
    """AUC by the number of labels that a reward learned from, on an axis where doublings are as far apart."""
    axes = figure.subplots()
    shown = [
        one for one in zip(measured["labels"], measured["auc"]["value"], measured["auc"]["ci95"]) if one[1] is not None
    ]
    labels, values, spans = zip(*shown)
    axes.plot(labels, values, color=PALETTE["tuned"], marker=".", linewidth=1.2)
    for number, value, span in shown:
        axes.vlines(number, *(span or (value, value)), color=PALETTE["tuned"], linewidth=1)
    axes.set(xscale="log", xlabel="labels")
    axes.set_xticks(labels, [f"{number:,}" for number in labels])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.grid(axis="y")


def stages(times: Mapping[str, float], as_text: Callable[[float], str], figure: Any) -> None:
    """A bar for the seconds of each stage, with `as_text` of them beside it."""
    axes = figure.subplots()
    longest = max(times.values()) or 1.0
    axes.barh(list(times), list(times.values()), 0.6, color=PALETTE["base"])
    for key, value in times.items():
        axes.text(value + 0.02 * longest, key, as_text(value), va="center")
    axes.set(xlim=(0, 1.3 * longest), xticks=[])
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
