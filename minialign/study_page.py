"""What the study found as a page: tables with intervals, figures, and the words that somebody wrote beside them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .evaluate import contrasts
from .models.pretrained import InputError
from .prompts import CATEGORIES
from .training import atomic


@dataclass(frozen=True)
class Row:
    """A line of a table: a cell, or one of its points; x and series are its place in a figure over an axis."""

    label: str
    cell: str
    point: str = ""
    x: float | None = None
    series: str = ""
    apart: bool = False  # nothing was fine-tuned, or harm was done: seeds scatter otherwise than in the other rows


@dataclass(frozen=True)
class Question:
    """Cells that are compared: a table and a figure."""

    title: str
    rows: Sequence[Row]
    reference: int  # the row that the others are compared with
    panels: Sequence[str]  # metrics of the figure
    axis: str = ""  # what x is; without it the figure has a line a row
    rewards: bool = False  # whether the reward models are compared, too
    metrics: Sequence[str] = ("aligned", "unseen", "readable", "fidelity", "cmmd", "diversity", "mean_reward")


METRICS = {  # title, number of digits; in percent where there are none
    "aligned": ("aligned ↑", 0),
    "unseen": ("unseen prompts ↑", 0),
    "readable": ("readable ↑", 0),
    "fidelity": ("Fréchet distance ↓", 2),
    "cmmd": ("CMMD ↓", 2),
    "diversity": ("diversity ↑", 3),
    "mean_reward": ("mean reward ↑", 3),
    "gap": ("reward − aligned", 3),
    "held_out accuracy": ("accuracy ↑", 0),
    "held_out auc": ("AUC ↑", 3),
    "held_out ece": ("calibration error ↓", 3),
    "unseen accuracy": ("accuracy, unseen prompts ↑", 0),
    "unseen auc": ("AUC, unseen prompts ↑", 3),
    "unseen ece": ("calibration error, unseen prompts ↓", 3),
}
OF_REWARD = [metric for metric in METRICS if " " in metric]  # of the reward model; the others are of images
Results = dict[tuple[str, int], dict[str, Any]]  # by cell and seed


def values(results: Results, rows: Sequence[Row], metric: str, seeds: Sequence[int]) -> Tensor:
    """A metric (R,S) of rows and seeds, float64."""

    def value(row: Row, seed: int) -> float:
        result = results[row.cell, seed]
        kind, _, key = metric.partition(" ")
        found = result[kind][key] if key else result["points"][row.point][metric]
        return math.nan if found is None else found

    return torch.tensor([[value(row, seed) for seed in seeds] for row in rows], dtype=torch.float64)


def told(value: float, metric: str, signed: bool = False) -> str:
    """A metric's number as the page shows it; differences of parts are in points."""
    digits = METRICS[metric][1]
    if math.isnan(value):
        return "–"
    if digits == 0:
        return f"{100 * value:+.1f}" if signed else f"{value:.1%}".replace("%", " %")
    return f"{value:{'+' if signed else ''}.{digits}f}"


def spans(numbers: Tensor, rows: Sequence[Row], reference: int) -> list[tuple[float, float]]:
    """The interval of each row's difference from the reference's; no number where one is missing."""
    if numbers.isnan().any():
        return [(math.nan, math.nan)] * len(rows)
    apart = [i for i, row in enumerate(rows) if row.apart]
    return [(low, high) for _, low, high in contrasts(numbers, reference, apart)]


def table(question: Question, rows: Sequence[Row], metrics: Sequence[str], found: Results, seeds: Sequence[int]) -> str:
    """Means over the seeds and, but for the reference, the intervals of their differences from it, in Markdown."""
    reference = rows.index(question.rows[question.reference])
    numbers = [values(found, rows, metric, seeds) for metric in metrics]
    columns = [(metric, part, spans(part, rows, reference)) for metric, part in zip(metrics, numbers)]
    lines = ["|  | " + " | ".join(METRICS[metric][0] for metric in metrics) + " |", "| --- |" + " --- |" * len(metrics)]
    for i, row in enumerate(rows):
        cells = []
        for metric, part, intervals in columns:
            low, high = intervals[i]
            mean = told(float(part[i].mean()), metric)
            span = f"{told(low, metric, True)} to {told(high, metric, True)}"
            span = f"**{span}**" if low > 0 or high < 0 else span
            cells.append(mean if i == reference or math.isnan(low) else f"{mean} ({span})")
        lines.append(f"| {row.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def taught(question: Question) -> list[Row]:
    """The rows that differ in the reward model."""
    return [row for row in question.rows if not row.apart and not row.cell.endswith("-alone")]


def block(name: str, question: Question, found: Results, seeds: Sequence[int]) -> str:
    """The tables and the picture of a question, in Markdown."""
    parts = [table(question, question.rows, question.metrics, found, seeds)]
    if question.rewards:
        parts = ["The reward, on held-out images of prompts that it knows, and on images of unseen ones:",
                 table(question, taught(question), OF_REWARD, found, seeds),
                 "The model that is fine-tuned with it:", *parts]  # fmt: skip
    parts.append(f"![{question.title}](study-{name}.png)")
    return "\n\n".join(parts)


def categories(jobs: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Tensor]]]:
    """Groups, and of each the part aligned before and after by the main job of each seed, two of (S,)."""
    groups = ["overall", *CATEGORIES, "seen", "unseen"]
    sides = [
        [
            torch.tensor([job["alignment"][side][group] for job in jobs], dtype=torch.float64)
            for side in ("before", "after")
        ]
        for group in groups
    ]
    return groups, sides


def categories_block(jobs: Sequence[dict[str, Any]]) -> str:
    """The first question, from the main jobs: Student's t interval over the seeds."""
    lines = ["|  | before | after | gain |", "| --- | --- | --- | --- |"]
    groups, sides = categories(jobs)
    rows = [(f"aligned, {group}", before, after, "aligned") for group, (before, after) in zip(groups, sides)]
    for metric in ("readable", "fidelity", "cmmd", "diversity", "mean_reward"):
        both = [
            torch.tensor([math.nan if job[metric][side] is None else job[metric][side] for job in jobs]).double()
            for side in ("before", "after")
        ]
        rows.append((METRICS[metric][0], both[0], both[1], metric))
    for label, before, after, metric in rows:
        if torch.stack([before, after]).isnan().any():
            continue
        gain, low, high = (told(x, metric, True) for x in contrasts(torch.stack([before, after]), 0)[1])
        sides_told = [told(float(side.mean()), metric) for side in (before, after)]
        lines.append(f"| {label} | {' | '.join(sides_told)} | {gain} ({low} to {high}) |")
    lines += ["", "![Before and after by category](study-categories.png)", "", "The main jobs one by one:", ""]
    lines += [
        "| seed | aligned | seen | unseen | AUC of the reward, of the CLIP score |",
        "| --- | --- | --- | --- | --- |",
    ]
    for job in jobs:
        cells = []
        for group in ("overall", "seen", "unseen"):
            before, after = (job["alignment"][side][group] for side in ("before", "after"))
            gain, *ends = (told(x, "aligned", True) for x in (after - before, *job["alignment"]["ci95"]["gain"][group]))
            cells.append(f"{told(before, 'aligned')} → {told(after, 'aligned')}: {gain} ({' to '.join(ends)})")
        cells.append(
            f"{told(job['reward']['auc'], 'held_out auc')}, {told(job['reward']['clip_score_auc'], 'held_out auc')}"
        )
        lines.append(f"| {job['settings']['seed']} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ the figures
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def _figure(width: float, height: float, columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    return figure, panels


def _percent(axes: Any, metric: str, y: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    if METRICS[metric][1] == 0:
        axis = axes.yaxis if y else axes.xaxis
        axis.set_major_locator(MaxNLocator(6 if y else 4, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(PercentFormatter(1, decimals=0))


def plot_categories(path: Path, jobs: Sequence[dict[str, Any]]) -> None:
    """Before and after of each group; small dots are seeds."""
    groups, sides = categories(jobs)
    figure, (axes,) = _figure(7, 3.2, 1)
    for i, (before, after) in enumerate(reversed(sides)):
        axes.plot([before.mean(), after.mean()], [i, i], color="0.8", linewidth=2, zorder=1)
        for side, color, name in ((before, "#777777", "before"), (after, COLORS[0], "after")):
            axes.scatter(side, [i] * len(side), 9, color=color, alpha=0.5, linewidths=0)
            axes.scatter(side.mean(), i, 55, color=color, linewidths=0, label=name if i == 0 else None, zorder=2)
    axes.set_yticks(range(len(groups)), reversed(groups))
    axes.set(xlim=(0, 1), xlabel="aligned, by the simulated annotator")
    _percent(axes, "aligned", y=False)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    _save(figure, path)


def plot(path: Path, question: Question, found: Results, seeds: Sequence[int]) -> None:
    """A panel a metric: means, and the intervals of their differences from the reference, whose mean is the line."""
    rows = list(question.rows)
    if question.axis:
        figure, panels = _figure(1 + 2.9 * len(question.panels), 3.2, len(question.panels))
    else:
        figure, panels = _figure(2.4 + 2.1 * len(question.panels), 0.9 + 0.27 * len(rows), len(question.panels))
    for axes, metric in zip(panels, question.panels):
        shown = taught(question) if metric in OF_REWARD else rows
        means, halves, reference = _means(question, shown, metric, found, seeds)
        line = axes.axhline if question.axis else axes.axvline
        line(means[reference], color="0.8", linewidth=1, zorder=0)
        axes.set_title(METRICS[metric][0], fontsize=10)
        if not question.axis:
            placed = [(row, mean, half, -rows.index(row)) for row, mean, half in zip(shown, means.tolist(), halves)]
            for row, mean, half, y in placed:
                color = "#777777" if row.apart else COLORS[0]
                axes.errorbar(mean, y, xerr=half, fmt="o", markersize=4, color=color, elinewidth=1)
            _limit(axes, placed, metric)
            axes.set_yticks([-i for i in range(len(rows))], [row.label for row in rows])
            axes.set_ylim(0.6 - len(rows), 0.6)
            if axes is not panels[0]:
                axes.tick_params(labelleft=False)
            _percent(axes, metric, y=False)
            continue
        for row, mean in zip(shown, means.tolist()):
            if row.x is None:
                axes.axhline(mean, color="#777777", linewidth=1, linestyle=":", label=row.label)
        ticks = sorted({row.x for row in shown if row.x is not None})
        for k, series in enumerate(dict.fromkeys(row.series for row in shown if row.x is not None)):
            same = [i for i, row in enumerate(shown) if row.x is not None and row.series == series]
            places = [ticks.index(shown[i].x or 0) + 0.12 * k for i in same]  # side by side: bars can be told apart
            axes.errorbar(places, means[same], [halves[i] for i in same], marker="o", markersize=4, linewidth=1.2,
                          elinewidth=1, color=COLORS[k], label=series or None)  # fmt: skip
        axes.set_xticks(range(len(ticks)), [f"{x:,g}" for x in ticks], rotation=40 if len(ticks) > 6 else 0)
        axes.set_xlabel(question.axis, fontsize=9)
        _percent(axes, metric)
    if question.axis and any(row.series for row in rows):
        panels[0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def _limit(axes: Any, placed: Sequence[tuple[Row, float, float, int]], metric: str) -> None:
    """Show what rows (with mean, half interval and y) that scatter alike need; a mean beyond is told at the edge."""
    low = min(mean - half for row, mean, half, _ in placed if not row.apart)
    high = max(mean + half for row, mean, half, _ in placed if not row.apart)
    room = 0.6 * (high - low)
    if math.isnan(room):  # a quick study has metrics without a value
        return
    axes.set_xlim(low - room, high + room)
    for _, mean, _, y in placed:
        if mean < low - room:
            axes.text(low - room, y, f" ← {told(mean, metric)}", va="bottom", fontsize=8, color="#777777")
        if mean > high + room:
            axes.text(high + room, y, f"{told(mean, metric)} → ", va="bottom", ha="right", fontsize=8, color="#777777")


def _means(
    question: Question, rows: Sequence[Row], metric: str, found: Results, seeds: Sequence[int]
) -> tuple[Tensor, list[float], int]:
    """The rows' means, half the intervals of their differences from the reference, and which row that is."""
    numbers, reference = values(found, rows, metric, seeds), list(rows).index(question.rows[question.reference])
    halves = [(high - low) / 2 for low, high in spans(numbers, rows, reference)]
    halves[reference] = 0.0
    return numbers.mean(1), halves, reference


def plot_trade_off(path: Path, question: Question, found: Results, seeds: Sequence[int]) -> None:
    """The curve between alignment and fidelity along x: aligned against each of the panels' metrics."""
    figure, panels = _figure(8.4, 3.6, len(question.panels))
    rows = list(question.rows)
    aligned, y_half, _ = _means(question, rows, "aligned", found, seeds)
    for axes, metric in zip(panels, question.panels):
        other, x_half, _ = _means(question, rows, metric, found, seeds)
        how = {"fmt": "o", "markersize": 5, "elinewidth": 0.7}
        for i, row in enumerate(rows):
            color, place = "#777777" if row.apart else COLORS[0], (float(other[i]), float(aligned[i]))
            axes.errorbar(*place, y_half[i], x_half[i], color=color, **how)
            axes.annotate(
                row.label if row.x is None else f"{row.x:g}", place, (5, 5), textcoords="offset points", fontsize=9
            )
        axes.plot(other[1:], aligned[1:], color=COLORS[0], linewidth=1, alpha=0.5, zorder=0)
        axes.set_xlabel(METRICS[metric][0], fontsize=9)
        axes.margins(0.12)
        _percent(axes, "aligned")
    panels[0].set_ylabel("aligned, by the simulated annotator", fontsize=9)
    figure.suptitle(question.axis, fontsize=10)
    _save(figure, path)


def plot_strips(path: Path, strips: dict[str, Path], prompts: Sequence[str]) -> None:
    """Rows of images side by side, by label, one of each prompt."""
    figure, (axes,) = _figure(8.4, 0.9 * len(strips) + 0.9, 1)
    rows = [np.asarray(Image.open(strip)) for strip in strips.values()]
    height, width = rows[0].shape[0], rows[0].shape[1] // len(prompts)
    axes.imshow(np.concatenate(rows), interpolation="bicubic")
    axes.set_yticks([height * (i + 0.5) for i in range(len(rows))], list(strips))
    titles = [textwrap.fill(text, 14) for text in prompts]
    axes.set_xticks([width * (i + 0.5) for i in range(len(prompts))], titles, fontsize=7)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    _save(figure, path, dpi=80)


def _save(figure: Any, path: Path, dpi: int = 150) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)


# --------------------------------------------------------------------------------------------------------- the page
HEAD = """# The study: what each design choice does

The world is small and embedded in the package, and the annotator is **simulated**: a program that looks at pixels.
Nothing here was shown of people, nor of Stable Diffusion.
"""


Draw = Callable[[Path], None]  # writes a figure


def write_page(path: Path, blocks: dict[str, tuple[str, str]], figures: Mapping[str, Draw]) -> None:
    """Write figures (name -> what draws it) beside the page `path`, and `with_blocks` into it."""
    for name, draw in figures.items():
        draw(path.with_name(f"study-{name}.png"))
    text = with_blocks(path, blocks)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def with_blocks(path: Path, blocks: dict[str, tuple[str, str]]) -> str:
    """A page with what is between the marks of each block (name -> title, body) replaced, or added at the end.

    What is written outside of the marks stays. InputError where a mark has lost its other half.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else HEAD
    for name, (title, body) in blocks.items():
        begin, end = f"<!-- measured: {name} -->", f"<!-- end of {name} -->"
        if begin not in text and end not in text:
            text += f"\n## {title}\n\n{begin}\n{end}\n"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise InputError(f"{path}: needs {begin} and, below it, {end}, each once, or none of both")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{body}\n\n{end}{rest.split(end)[1]}"
    return text
