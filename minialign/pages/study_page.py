"""The study's page: tables with intervals, figures, and the words that its author wrote beside them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..files import InputError, atomic
from ..measures import contrasts, student_t
from .cards import in_order
from .figures import COLORS, GREY, in_percent, panels, save


@dataclass(frozen=True)
class Row:
    """A row of a table: a cell, or one of its points; x and series are its place in a figure over an axis."""

    label: str
    cell: str
    point: str = ""
    x: float | None = None
    series: str = ""
    apart: bool = (
        False  # nothing was fine-tuned, or harm was done: its variance over seeds is another than the other rows'
    )


@dataclass(frozen=True)
class Question:
    """Cells that are compared: a table and a figure."""

    title: str
    rows: Sequence[Row]
    reference: int  # the row that the others are compared with
    panels: Sequence[str]  # metrics of the figure
    axis: str = ""  # what x is; without it the figure has a line for each row
    rewards: bool = False  # whether the reward models are compared, too
    metrics: Sequence[str] = ("aligned", "unseen", "readable", "fidelity", "cmmd", "asked", "diversity", "mean_reward")


class Metric(NamedTuple):
    """How a number is shown, and the least and the most that it can be."""

    title: str
    digits: int  # 0: it is a fraction, shown in percent
    reach: tuple[float, float] = (0, 1)


METRICS = {
    "aligned": Metric("aligned ↑", 0),
    "unseen": Metric("unseen prompts ↑", 0),
    "readable": Metric("readable ↑", 0),
    "fidelity": Metric("Fréchet distance ↓", 2, (0, math.inf)),
    "cmmd": Metric("CMMD ↓", 2, (-math.inf, math.inf)),
    "asked": Metric("distance to what was asked ↓", 2, (0, math.inf)),
    "diversity": Metric("diversity ↑", 3, (0, 2)),
    "mean_reward": Metric("mean reward ↑", 3),
    "gap": Metric("reward − aligned", 3, (-1, 1)),
    "held_out accuracy": Metric("accuracy ↑", 0),
    "held_out auc": Metric("AUC ↑", 3),
    "held_out ece": Metric("calibration error ↓", 3),
    "unseen accuracy": Metric("accuracy, unseen prompts ↑", 0),
    "unseen auc": Metric("AUC, unseen prompts ↑", 3),
    "unseen ece": Metric("calibration error, unseen prompts ↓", 3),
}
OF_REWARD = [metric for metric in METRICS if " " in metric]  # of the reward model; the others are of images
OF_IMAGES = {"readable": "readable", "fidelity": "frechet", "cmmd": "cmmd", "diversity": "diversity"}  # in results.json
Results = dict[tuple[str, int], dict[str, Any]]  # by cell and seed


def values(results: Results, rows: Sequence[Row], metric: str, seeds: Sequence[int]) -> Tensor:
    """A metric (R,S) of rows and seeds, float64."""

    def value(row: Row, seed: int) -> float:
        result = results[row.cell, seed]
        kind, _, key = metric.partition(" ")
        found = result[kind][key] if key else result["points"][row.point][metric]
        return math.nan if found is None else found

    return torch.tensor([[value(row, seed) for seed in seeds] for row in rows], dtype=torch.float64)


def formatted(value: float, metric: str, signed: bool = False) -> str:
    """A metric's number as the page shows it; differences of fractions are in percentage points."""
    digits = METRICS[metric].digits
    if math.isnan(value):
        return "–"
    if digits == 0:
        return f"{100 * value:+.1f}" if signed else f"{100 * value:.1f} %"
    return f"{value:{'+' if signed else ''}.{digits}f}"


def spans(numbers: Tensor, rows: Sequence[Row], reference: int) -> list[tuple[float, float]]:
    """The interval of each row's difference from the reference's; no number where one is missing."""
    if numbers.isnan().any():
        return [(math.nan, math.nan)] * len(rows)
    apart = [i for i, row in enumerate(rows) if row.apart]
    return [(low, high) for _, low, high, _ in contrasts(numbers, reference, apart)]


def table(question: Question, rows: Sequence[Row], metrics: Sequence[str], found: Results, seeds: Sequence[int]) -> str:
    """Means over the seeds and, but for the reference, the intervals of their differences from it, in Markdown."""
    reference = rows.index(question.rows[question.reference])
    numbers = [values(found, rows, metric, seeds) for metric in metrics]
    columns = [(metric, part, spans(part, rows, reference)) for metric, part in zip(metrics, numbers)]
    lines = [
        "|  | " + " | ".join(METRICS[metric].title for metric in metrics) + " |",
        "| --- |" + " --- |" * len(metrics),
    ]
    for i, row in enumerate(rows):
        cells = []
        for metric, part, intervals in columns:
            low, high = intervals[i]
            mean = formatted(float(part[i].mean()), metric)
            span = f"{formatted(low, metric, True)} to {formatted(high, metric, True)}"
            span = f"**{span}**" if low > 0 or high < 0 else span
            cells.append(mean if i == reference or math.isnan(low) else f"{mean} ({span})")
        lines.append(f"| {row.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def of_rewards(question: Question) -> list[Row]:
    """The rows that differ in the reward model."""
    return [row for row in question.rows if not row.apart and not row.cell.endswith("-alone")]


def block(name: str, question: Question, found: Results, seeds: Sequence[int]) -> str:
    """The tables and the picture of a question, in Markdown."""
    parts = [table(question, question.rows, question.metrics, found, seeds)]
    if question.rewards:
        parts = ["The reward model, on held-out images of known prompts and on images of unseen prompts:",
                 table(question, of_rewards(question), OF_REWARD, found, seeds),
                 "The model that is fine-tuned with it:", *parts]  # fmt: skip
    parts.append(f"![{question.title}](study-{name}.png)")
    return "\n\n".join(parts)


Judged = dict[str, dict[str, Any]]  # what a judge says of one model: group of prompts -> "value", "gain", ...


def _sides(job: Mapping[str, Any], judge: str = "") -> tuple[Judged, Judged]:
    """What a judge, by default the one that counts, says of the base and of the fine-tuned model of a main job."""
    evaluation = job["evaluation"]
    base, tuned = list(evaluation["models"])[:2]
    judged = evaluation["judged"][judge or evaluation["judge"]]
    return judged[base], judged[tuned]


def categories(jobs: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Tensor]]]:
    """Groups of prompts, and of each the fraction judged good of the base's and the fine-tuned images, two of (S,)."""
    known = set.intersection(*(set(side) for job in jobs for side in _sides(job)))
    groups = [group for group in in_order(_sides(jobs[0])[0]) if group in known]
    sides = [
        [torch.tensor([_sides(job)[k][group]["value"] for job in jobs], dtype=torch.float64) for k in range(2)]
        for group in groups
    ]
    return groups, sides


def categories_block(jobs: Sequence[dict[str, Any]]) -> str:
    """The first question, from the main jobs: Student's t interval over the seeds."""
    lines = ["|  | base | fine-tuned | gain |", "| --- | --- | --- | --- |"]
    groups, sides = categories(jobs)
    rows = [(f"aligned, {group}", torch.stack(both), "aligned") for group, both in zip(groups, sides)]
    for metric, key in OF_IMAGES.items():
        found = [list(job["evaluation"][key].values())[:2] for job in jobs]
        numbers = [[math.nan if value is None else value for value in both] for both in found]
        rows.append((METRICS[metric].title, torch.tensor(numbers).double().T, metric))
    rewards = [[side["overall"]["value"] for side in _sides(job, "reward")] for job in jobs]
    rows.append((METRICS["mean_reward"].title, torch.tensor(rewards).double().T, "mean_reward"))
    for label, both, metric in rows:
        if not both.isnan().any():
            gain, low, high = (formatted(x, metric, True) for x in contrasts(both, 0)[1][:3])
            base, tuned = (formatted(mean, metric) for mean in both.mean(1).tolist())
            lines.append(f"| {label} | {base} | {tuned} | {gain} ({low} to {high}) |")
    lines += ["", "![Base and fine-tuned model by group of prompts](study-categories.png)", ""]
    return "\n".join([*lines, "The main jobs one by one:", "", *_one_by_one(jobs)])


def _one_by_one(jobs: Sequence[dict[str, Any]]) -> list[str]:
    """A table of the main jobs: their gains, and the area under the curve (AUC) of what scores their images."""
    lines = [
        "| seed | aligned | seen | new combinations | new objects | AUC, known prompts | AUC, new prompts "
        "| CLIP score's, new prompts |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for job in jobs:
        (base, tuned), cells = _sides(job), []
        for group in ("overall", "seen", "new combinations", "new objects"):
            if group not in tuned:
                cells.append("–")
                continue
            entry = tuned[group]
            ends = entry["gain_ci95"] or [math.nan, math.nan]
            gain, *span = (formatted(x, "aligned", True) for x in (entry["gain"], *ends))
            before, after = (formatted(side[group]["value"], "aligned") for side in (base, tuned))
            cells.append(f"{before} → {after}: {gain} ({' to '.join(span)})")
        measured = job["reward"]["measured"]
        for model, split in (("auxiliary", "known prompts"), ("auxiliary", "new prompts"), ("clip", "new prompts")):
            auc = measured.get(model, {}).get(split, {}).get("auc")
            cells.append(formatted(math.nan if auc is None else auc, "held_out auc"))
        lines.append(f"| {job['settings']['seed']} | {' | '.join(cells)} |")
    return lines


# ------------------------------------------------------------------------------------------------------ the figures
Ends = tuple[float, float]


def own_intervals(values: Tensor, metric: str, apart: Sequence[int] = ()) -> list[Ends]:
    """Student's 95 % interval of each row's mean of values (R,S) over S seeds, within what the metric can reach.

    Rows share one variance, estimated within all but the rows `apart`; each of these has its own. The interval is of a
    mean by itself: whether two means differ is in the tables, where differences within seeds are compared.
    """
    seeds, known = values.shape[1], ~values.isnan().any(1)
    alike = [i for i in range(len(values)) if i not in apart and known[i]]
    low, high = METRICS[metric].reach
    ends = []
    for i, mean in enumerate(values.mean(1).tolist()):
        if not known[i]:
            ends.append((math.nan, math.nan))
            continue
        rows = [i] if i in apart else alike
        freedom = len(rows) * (seeds - 1)
        within = float((values[rows] - values[rows].mean(1, keepdim=True)).square().sum())
        half = student_t(freedom) * math.sqrt(within / freedom / seeds)
        ends.append((max(low, mean - half), min(high, mean + half)))
    return ends


def _means(rows: Sequence[Row], metric: str, found: Results, seeds: Sequence[int]) -> tuple[list[float], list[Ends]]:
    """The rows' means and their own intervals."""
    numbers = values(found, rows, metric, seeds)
    return numbers.mean(1).tolist(), own_intervals(numbers, metric, [i for i, row in enumerate(rows) if row.apart])


def _bars(mean: float, ends: Ends) -> list[list[float]]:
    """An interval as matplotlib's error bars."""
    return [[max(0.0, mean - ends[0])], [max(0.0, ends[1] - mean)]]


def _percent(axis: Any, metric: str, ticks: int) -> None:
    if METRICS[metric].digits == 0:
        in_percent(axis, ticks)


def _note(figure: Any, seeds: int, more: str = "") -> None:
    """What points and bars are, below a figure."""
    figure.supxlabel(f"means over {seeds} seeds with their 95 % intervals{more}", fontsize=9, color=GREY)


def plot_categories(path: Path, jobs: Sequence[dict[str, Any]]) -> None:
    """The main jobs' two models in each group of prompts; small dots are seeds."""
    groups, sides = categories(jobs)
    figure, (axes,) = panels(1, 1, 0.8 + 0.45 * len(groups))
    for k, (color, name, offset) in enumerate(((GREY, "base", 0.14), (COLORS[0], "fine-tuned", -0.14))):
        numbers = torch.stack([side[k] for side in sides])
        for i, (mean, ends) in enumerate(zip(numbers.mean(1).tolist(), own_intervals(numbers, "aligned"))):
            y = len(groups) - 1 - i + offset
            axes.scatter(numbers[i], [y] * len(jobs), 9, color=color, alpha=0.45, linewidths=0)
            axes.errorbar(mean, y, xerr=_bars(mean, ends), fmt="o", markersize=6, color=color, elinewidth=1.2)
            if i == 0:
                axes.annotate(name, (mean, y + 0.25), ha="center", va="bottom", color=color, fontsize=9)
    axes.set_yticks(range(len(groups)), reversed(groups))
    axes.set(xlim=(0, 1), ylim=(-0.5, len(groups) - 0.2), xlabel="images judged good by the simulated annotator")
    in_percent(axes.xaxis)
    _note(figure, len(jobs), "; small dots are seeds")
    save(figure, path)


def plot(path: Path, question: Question, found: Results, seeds: Sequence[int]) -> None:
    """A panel for each metric: means with their own intervals over an axis, or a line for each row."""
    if question.axis:
        _plot_over_axis(path, question, found, seeds)
    else:
        _plot_rows(path, question, found, seeds)


def _plot_rows(path: Path, question: Question, found: Results, seeds: Sequence[int]) -> None:
    rows, reference = list(question.rows), question.rows[question.reference]
    columns = 3 if len(question.panels) == 3 else min(2, len(question.panels))
    figure, axes_of = panels(len(question.panels), columns, 0.7 + 0.25 * len(rows))
    for i, (axes, metric) in enumerate(zip(axes_of, question.panels)):
        shown = of_rewards(question) if metric in OF_REWARD else rows
        means, ends = _means(shown, metric, found, seeds)
        axes.axvline(means[shown.index(reference)], color="0.8", linewidth=1, zorder=0)
        placed = [(row, mean, span, -rows.index(row)) for row, mean, span in zip(shown, means, ends)]
        for row, mean, span, y in _within(axes, placed, metric):
            color = GREY if row.apart else COLORS[0]
            axes.errorbar(mean, y, xerr=_bars(mean, span), fmt="o", markersize=4.5, color=color, elinewidth=1.2)
        axes.set_title(METRICS[metric].title, fontsize=10, loc="left")
        axes.set_yticks([-k for k in range(len(rows))], [row.label for row in rows])
        axes.set_ylim(0.6 - len(rows), 0.6)
        axes.tick_params(labelleft=i % columns == 0)
        _percent(axes.xaxis, metric, 4)
    _note(figure, len(seeds), f"; gray line: {reference.label}")
    save(figure, path)


def _plot_over_axis(path: Path, question: Question, found: Results, seeds: Sequence[int]) -> None:
    number = len(question.panels)
    figure, axes_of = panels(number, 3 if number in (3, 5, 6) else min(2, number), 2.5)
    for axes, metric in zip(axes_of, question.panels):
        shown = of_rewards(question) if metric in OF_REWARD else list(question.rows)
        means, ends = _means(shown, metric, found, seeds)
        for row, mean in zip(shown, means):
            if row.x is None:
                axes.axhline(mean, color=GREY, linewidth=1, linestyle=":", label=row.label)
        ticks = sorted({row.x for row in shown if row.x is not None})
        for k, series in enumerate(dict.fromkeys(row.series for row in shown if row.x is not None)):
            same = [i for i, row in enumerate(shown) if row.x is not None and row.series == series]
            places = [ticks.index(shown[i].x or 0) + 0.12 * k for i in same]  # side by side: bars can be told apart
            bars = np.concatenate([_bars(means[i], ends[i]) for i in same], 1)
            axes.errorbar(places, [means[i] for i in same], bars, marker="os^D"[k % 4], markersize=4.5, linewidth=1.2,
                          elinewidth=1, color=COLORS[k], label=series or None)  # fmt: skip
        axes.set_xticks(range(len(ticks)), [f"{x:,g}" for x in ticks], rotation=40 if len(ticks) > 6 else 0)
        axes.set_xlabel(textwrap.fill(question.axis, 34), fontsize=9)
        axes.set_title(METRICS[metric].title, fontsize=10, loc="left")
        _percent(axes.yaxis, metric, 6)
    handles, labels = axes_of[0].get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    _note(figure, len(seeds))
    save(figure, path)


Placed = tuple[Row, float, Ends, int]  # a row, its mean with its interval, and its height in the figure


def _within(axes: Any, placed: Sequence[Placed], metric: str) -> list[Placed]:
    """Limit a panel to what the rows that scatter alike need; what lies within. Other means are written at the edge."""
    low = min(ends[0] for row, _, ends, _ in placed if not row.apart)
    high = max(ends[1] for row, _, ends, _ in placed if not row.apart)
    room = 0.3 * (high - low)
    if math.isnan(room) or room == 0:  # a quick study has metrics without a value
        return list(placed)
    low, high = low - room, high + room
    axes.set_xlim(low, high)
    for _, mean, _, y in placed:
        if mean < low:
            axes.text(low, y, f" ← {formatted(mean, metric)}", va="center", fontsize=9, color=GREY)
        if mean > high:
            axes.text(high, y, f"{formatted(mean, metric)} → ", va="center", ha="right", fontsize=9, color=GREY)
    return [one for one in placed if low <= one[1] <= high]


def plot_trade_off(path: Path, question: Question, found: Results, seeds: Sequence[int]) -> None:
    """Alignment against each of the panels' metrics, a point for each row; rows with an x are joined in its order."""
    from matplotlib.patheffects import withStroke

    figure, axes_of = panels(len(question.panels), len(question.panels), 3.6, sharey=True)
    rows = list(question.rows)
    aligned, y_ends = _means(rows, "aligned", found, seeds)
    for axes, metric in zip(axes_of, question.panels):
        other, x_ends = _means(rows, metric, found, seeds)
        for i, row in enumerate(rows):
            color, place = GREY if row.apart else COLORS[0], (other[i], aligned[i])
            spans = _bars(aligned[i], y_ends[i]), _bars(other[i], x_ends[i])
            axes.errorbar(*place, *spans, fmt="none", ecolor=color, elinewidth=0.8, alpha=0.45)
            axes.scatter(*place, 30, color=color, linewidths=0, zorder=3)
            text = axes.annotate(row.label if row.x is None else f"{row.x:g}", place, (6, 5),
                                 textcoords="offset points", fontsize=9, color=color, zorder=4)  # fmt: skip
            text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        joined = [i for i, row in enumerate(rows) if row.x is not None]
        axes.plot([other[i] for i in joined], [aligned[i] for i in joined], color=COLORS[0], linewidth=1, alpha=0.5)
        axes.set_xlabel(METRICS[metric].title, fontsize=9)
        axes.margins(0.12)
        _percent(axes.yaxis, "aligned", 6)
    axes_of[0].set_ylabel("images judged good", fontsize=9)
    _note(figure, len(seeds), f"; numbers: {question.axis}" * bool(question.axis))
    save(figure, path)


def plot_strips(path: Path, strips: dict[str, Path], prompts: Sequence[str]) -> None:
    """Rows of images side by side, by label, one of each prompt."""
    figure, (axes,) = panels(1, 1, 0.85 * len(strips) + 0.7)
    rows = [np.asarray(Image.open(strip)) for strip in strips.values()]
    height, width = rows[0].shape[0], rows[0].shape[1] // len(prompts)
    axes.imshow(np.concatenate(rows), interpolation="bicubic")
    axes.set_yticks([height * (i + 0.5) for i in range(len(rows))], list(strips))
    titles = [textwrap.fill(text, 12) for text in prompts]
    axes.set_xticks([width * (i + 0.5) for i in range(len(prompts))], titles, fontsize=8)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    save(figure, path, dpi=100)


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
