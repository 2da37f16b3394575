"""The study's page: tables with intervals, figures, and the words that its author wrote beside them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..files import InputError, atomic
from ..measures import Contrast, contrasts, holm, student_p, student_t
from .cards import in_order
from .figures import COLORS, GREY, in_percent, name_ends, panels, save

GOAL = 0.04  # the largest half-width that intervals of differences in alignment should have


@dataclass(frozen=True)
class Row:
    """A row of a table: a cell; x and series are its place in a figure over an axis."""

    label: str
    cell: str
    x: float | None = None
    series: str = ""
    apart: bool = False  # nothing was learned in it, so its variance over seeds is another than the other rows'


@dataclass(frozen=True)
class Question:
    """Cells that are compared: a table and a figure. A metric "aligned, *" is one of each group of prompts."""

    title: str
    rows: Sequence[Row]
    reference: int  # the row that the others are compared with
    metrics: Sequence[str]
    panels: Sequence[str]  # metrics of the figure
    axis: str = ""  # what x is; without it the figure has a line for each row

    def expanded(self, groups: Sequence[str]) -> Question:
        """The same question with a metric for each group in place of those of all."""
        metrics, shown = (
            [metric.replace("*", group) for metric in some for group in (groups if "*" in metric else [""])]
            for some in (self.metrics, self.panels)
        )
        return replace(self, metrics=metrics, panels=shown)


@dataclass(frozen=True)
class Finding:
    """What the paper found: `one` less `other`, each a cell and its metric, is above 0 (expected 1) or below it (-1).

    With `expected` 0 the paper found no loss: one of less than `margin` counts as none.
    """

    source: str
    claim: str
    one: tuple[str, str]
    other: tuple[str, str]
    expected: int
    margin: float = 0.05


class Match(NamedTuple):
    """Two kinds of sets that are compared: in words, as results have it, and what the paper found of each."""

    title: str
    key: str
    alignment: str
    fidelity: str


class Metric(NamedTuple):
    """How a number is shown, and the least and the most that it can be."""

    title: str
    digits: int  # 0: it is a fraction, shown in percent
    reach: tuple[float, float] = (0, 1)


METRICS = {  # by what stands before the group of prompts
    "aligned": Metric("aligned ↑", 0),
    "readable": Metric("readable ↑", 0),
    "fidelity": Metric("Fréchet distance ↓", 2, (0, math.inf)),
    "diversity": Metric("diversity ↑", 3, (0, 2)),
    "reward": Metric("reward ↑", 3),
    "pairs": Metric("pairs ↑", 0),
    "auc": Metric("AUC ↑", 3),
    "ece": Metric("calibration error ↓", 3),
    "calls": Metric("UNet passes", -1, (0, math.inf)),
}
OF_IMAGES = {"readable": "readable", "fidelity": "frechet", "diversity": "diversity"}  # in results.json
Results = dict[tuple[str, int], dict[str, Any]]  # by cell and seed: numbers by metric


def kind(metric: str) -> Metric:
    """How a metric is shown; of a comparison of sets as a fraction."""
    return METRICS.get(metric.partition(", ")[0], METRICS["pairs"])


def title(metric: str) -> str:
    """The head of a metric's column."""
    group = metric.partition(", ")[2]
    return kind(metric).title if not group else f"{kind(metric).title.rstrip('↑↓ ')}, {group} {kind(metric).title[-1]}"


def values(results: Results, rows: Sequence[Row], metric: str, seeds: Sequence[int]) -> Tensor:
    """A metric (R,S) of rows and seeds, float64; no number where a cell has none."""
    by_row = [[results[row.cell, seed].get(metric) for seed in seeds] for row in rows]
    numbers = [[math.nan if value is None else value for value in one] for one in by_row]
    return torch.tensor(numbers, dtype=torch.float64)


def formatted(value: float, metric: str, signed: bool = False) -> str:
    """A metric's number as the page shows it; differences of fractions are in percentage points."""
    digits = kind(metric).digits
    if math.isnan(value):
        return "–"
    if digits == 0:
        return f"{100 * value:+.1f}" if signed else f"{100 * value:.1f} %"
    return f"{value:,.0f}" if digits < 0 else f"{value:{'+' if signed else ''}.{digits}f}"


def compared(numbers: Tensor, rows: Sequence[Row], reference: int) -> list[Contrast]:
    """Each row's difference from the reference's; no number of a row without all of its own, or if all are planned.

    UNet passes are planned: they are the same for all seeds.
    """
    result = [Contrast(math.nan, math.nan, math.nan, 1.0)] * len(rows)
    known = [i for i in range(len(rows)) if not numbers[i].isnan().any()]
    if reference in known and (numbers[known] != numbers[known][:, :1]).any():
        apart = [k for k, i in enumerate(known) if rows[i].apart]
        for i, one in zip(known, contrasts(numbers[known], known.index(reference), apart)):
            result[i] = one
    return result


def table(question: Question, results: Results, seeds: Sequence[int]) -> str:
    """Means over the seeds and, but for the reference, the intervals of their differences from it, in Markdown.

    Bold are differences that are significant at 5 % when their p values are corrected for all of the table's.
    """
    rows, reference = question.rows, question.reference
    numbers = [values(results, rows, metric, seeds) for metric in question.metrics]
    differences = [compared(metric_values, rows, reference) for metric_values in numbers]
    places = [(k, i) for k in range(len(numbers)) for i in range(len(rows)) if i != reference]
    places = [(k, i) for k, i in places if not math.isnan(differences[k][i].low)]
    bold = {place for place, p in zip(places, holm([differences[k][i].p for k, i in places])) if p < 0.05}
    images = results[rows[reference].cell, seeds[0]].get("fidelity images")
    heads = [f"{title(one)} ({images:,} images)" if one == "fidelity" else title(one) for one in question.metrics]
    lines = ["|  | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for i, row in enumerate(rows):
        cells = []
        for k, metric in enumerate(question.metrics):
            mean = formatted(float(numbers[k][i].mean()), metric)
            one = differences[k][i]
            span = f"{formatted(one.low, metric, True)} to {formatted(one.high, metric, True)}"
            span = f"**{span}**" if (k, i) in bold else span
            cells.append(f"{mean} ({span})" if (k, i) in places else mean)
        lines.append(f"| {row.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\nCorrected for {len(places)} comparisons (Holm)." + width(question, differences)


def width(question: Question, differences: Sequence[Sequence[Contrast]]) -> str:
    """The half-width of the intervals of differences in alignment, which rows that are alike share, beside its goal."""
    if "aligned" not in question.metrics:
        return ""
    halves = [
        100 * (one.high - one.low) / 2
        for i, one in enumerate(differences[list(question.metrics).index("aligned")])
        if i != question.reference and not question.rows[i].apart and not math.isnan(one.low)
    ]
    if not halves:
        return ""
    half = halves[0]
    return f" Half-width of the intervals of differences in alignment: {half:.1f} points (goal: {100 * GOAL:.0f})."


def block(name: str, question: Question, results: Results, seeds: Sequence[int]) -> str:
    """The table and the picture of a question, in Markdown."""
    return f"{table(question, results, seeds)}\n\n![{question.title}](study-{name}.png)"


# ------------------------------------------------------------------------------------------------- the paper's findings
def mean_of(numbers: Tensor) -> Contrast:
    """A mean over seeds (S,), its 95 % interval and the p value of 0, by Student's t."""
    mean, error = float(numbers.mean()), float(numbers.std()) / math.sqrt(len(numbers))
    half, freedom = student_t(len(numbers) - 1) * error, len(numbers) - 1
    return Contrast(mean, mean - half, mean + half, student_p(mean / error, freedom) if error else float(mean == 0))


def verdict(finding: Finding, one: Contrast, p: float) -> str:
    """The rule: "reproduces" or "does not" where the data show it, else "cannot be told".

    A difference reproduces where its corrected p value is below 5 % and its sign is the paper's, and does not where the
    sign is the other one. No loss reproduces where the interval lies above -margin, and does not where it lies below.
    """
    if math.isnan(one.difference):
        return "cannot be told"
    if finding.expected:
        if p >= 0.05:
            return "cannot be told"
        return "reproduces" if one.difference * finding.expected > 0 else "does not"
    if one.low > -finding.margin:
        return "reproduces"
    return "does not" if one.high < -finding.margin else "cannot be told"


class JudgedFinding(NamedTuple):
    """A finding with its two means and their difference here, and the verdict."""

    finding: Finding
    means: tuple[float, float]
    ours: Contrast
    verdict: str


def judged_findings(
    findings: Sequence[Finding], results: Results, seeds: Sequence[int]
) -> tuple[list[JudgedFinding], int]:
    """All findings judged, and the number of those with a sign, for which their p values are corrected."""
    sides = [
        torch.stack([values(results, [Row("", cell)], metric, seeds)[0] for cell, metric in (one.one, one.other)])
        for one in findings
    ]
    ours = [mean_of(one - other) for one, other in sides]
    signed = [i for i, finding in enumerate(findings) if finding.expected and not math.isnan(ours[i].difference)]
    corrected = dict(zip(signed, holm([ours[i].p for i in signed])))
    judged = []
    for i, finding in enumerate(findings):
        one, other = sides[i].mean(1).tolist()
        said = verdict(finding, ours[i], corrected.get(i, 1.0))
        judged.append(JudgedFinding(finding, (one, other), ours[i], said))
    return judged, len(signed)


def findings_block(findings: Sequence[Finding], results: Results, seeds: Sequence[int]) -> str:
    """The paper's findings beside ours, both numbers of each, and a verdict on each, in Markdown."""
    lines = ["| the paper |  | here | difference | verdict |", "| --- | --- | --- | --- | --- |"]
    judged, number = judged_findings(findings, results, seeds)
    for finding, means, ours, said in judged:
        both = [
            f"{metric.rpartition('; ')[2]} {formatted(mean, metric)}" if "; " in metric else formatted(mean, metric)
            for mean, (_, metric) in zip(means, (finding.one, finding.other))
        ]
        metric = finding.one[1]
        difference, low, high = (formatted(x, metric, True) for x in ours[:3])
        unit = " points" if kind(metric).digits == 0 else ""
        cells = [finding.source, finding.claim, ", ".join(both), f"{difference}{unit} ({low} to {high})", said]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\nCorrected for {number} comparisons (Holm)."


def sets_block(
    matches: Sequence[Match], raters: Mapping[str, str], groups: Sequence[str], results: Results, seeds: Sequence[int]
) -> str:
    """Won, tied and lost prompts of each match of sets with Student's intervals over the seeds, in Markdown.

    By kind and rater; by group of prompts for the first of the raters.
    """
    prompts, distinct = ([results["sets", seed][f"{one} prompts"] for seed in seeds] for one in ("set", "distinct"))
    lines = [f"| of {prompts[0]} prompts a seed |  | rater | prompts | won | tied | lost | the paper: won to lost |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
    places = [(rater, "") for rater in raters] + [(next(iter(raters)), group) for group in groups]
    for match in matches:
        for what in ("alignment", "fidelity"):
            for rater, group in places:
                cells = []
                for end in ("won", "tied", "lost"):
                    metric = outcome_metric(match, what, rater, end) + (f", {group}" if group else "")
                    (mean,), (ends,) = _means([Row("", "sets")], metric, results, seeds)
                    mean_, low, high = (formatted(x, metric) for x in (mean, *ends))
                    cells.append(f"{mean_} ({low} to {high})")
                paper = "" if group else getattr(match, what)
                lines.append(
                    f"| {match.title} | {what} | {raters[rater]} | {group or 'all'} | {' | '.join(cells)} | {paper} |"
                )
    different = f"At least {min(distinct)} of the {prompts[0]} prompts of a seed are different ones."
    return "\n".join([*lines, "", different, "", "![Sets of images](study-sets.png)"])


def outcome_metric(match: Match, what: str, rater: str, end: str) -> str:
    return f"{match.key}; {what}; {rater}; {end}"


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


def before_and_after(jobs: Sequence[dict[str, Any]]) -> list[tuple[str, Tensor, str]]:
    """What the main jobs say of both models: its name, the numbers (2,S), and the metric that they are shown as."""
    groups, sides = categories(jobs)
    rows = [(f"aligned, {group}", torch.stack(both), "aligned") for group, both in zip(groups, sides)]

    def add(label: str, metric: str, by_job: Sequence[Sequence[float | None]]) -> None:
        numbers = [[math.nan if value is None else value for value in both[:2]] for both in by_job]
        rows.append((label, torch.tensor(numbers).double().T, metric))

    evaluations = [job["evaluation"] for job in jobs]
    references = {one["reference"] for one in evaluations}  # in words, and how many images
    for metric, key in OF_IMAGES.items():
        if metric != "fidelity":
            add(title(metric), metric, [list(one[key].values()) for one in evaluations])
        elif len(references) == 1:  # distances of unequal numbers of images do not compare
            add(f"{title(metric)} ({references.pop()})", metric, [list(one[key].values()) for one in evaluations])
    add("reward ↑", "reward", [[side["overall"]["value"] for side in _sides(job, "reward")] for job in jobs])
    for name in evaluations[0]["picture"]:
        add(name, "reward", [[side["value"] for side in one["picture"][name].values()] for one in evaluations])
    return rows


def categories_block(jobs: Sequence[dict[str, Any]]) -> str:
    """The first question, from the main jobs: Student's t interval over the seeds."""
    lines = ["|  | base | fine-tuned | gain |", "| --- | --- | --- | --- |"]
    for label, both, metric in before_and_after(jobs):
        if not both.isnan().any():
            gain, low, high = (formatted(x, metric, True) for x in contrasts(both, 0)[1][:3])
            base, tuned = (formatted(mean, metric) for mean in both.mean(1).tolist())
            lines.append(f"| {label} | {base} | {tuned} | {gain} ({low} to {high}) |")
    return "\n".join([*lines, "", "![Base and fine-tuned model by group of prompts](study-categories.png)"])


# ------------------------------------------------------------------------------------------------------ the figures
Ends = tuple[float, float]


def own_intervals(values: Tensor, metric: str, apart: Sequence[int] = ()) -> list[Ends]:
    """Student's 95 % interval of each row's mean of values (R,S) over S seeds, within what the metric can reach.

    Rows share one variance, estimated within all but the rows `apart`; each of these has its own. The interval is of a
    mean by itself: whether two means differ is in the tables, where differences within seeds are compared.
    """
    seeds, known = values.shape[1], ~values.isnan().any(1)
    alike = [i for i in range(len(values)) if i not in apart and known[i]]
    low, high = kind(metric).reach
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


def _means(rows: Sequence[Row], metric: str, results: Results, seeds: Sequence[int]) -> tuple[list[float], list[Ends]]:
    """The rows' means and their own intervals."""
    numbers = values(results, rows, metric, seeds)
    return numbers.mean(1).tolist(), own_intervals(numbers, metric, [i for i, row in enumerate(rows) if row.apart])


def _bars(mean: float, ends: Ends) -> list[list[float]]:
    """An interval as matplotlib's error bars."""
    return [[max(0.0, mean - ends[0])], [max(0.0, ends[1] - mean)]]


def _percent(axis: Any, metric: str, ticks: int) -> None:
    if kind(metric).digits == 0:
        in_percent(axis, ticks)


def _note(figure: Any, seeds: int, more: str = "", what: str = "means with their 95 % intervals") -> None:
    """What points and bars are, below a figure."""
    figure.supxlabel(f"{what} over {seeds} seeds{more}", fontsize=9, color=GREY)


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


def plot(path: Path, question: Question, results: Results, seeds: Sequence[int]) -> None:
    """A panel for each metric: means with their own intervals over an axis, or a line for each row."""
    (_plot_over_axis if question.axis else _plot_rows)(path, question, results, seeds)


def _plot_rows(path: Path, question: Question, results: Results, seeds: Sequence[int]) -> None:
    rows, reference = list(question.rows), question.rows[question.reference]
    columns = min(3, len(question.panels))
    figure, axes_of = panels(len(question.panels), columns, 0.9 + 0.3 * len(rows))
    for i, (axes, metric) in enumerate(zip(axes_of, question.panels)):
        means, ends = _means(rows, metric, results, seeds)
        axes.axvline(means[question.reference], color="0.8", linewidth=1, zorder=0)
        placed = [(row, mean, span, -k) for k, (row, mean, span) in enumerate(zip(rows, means, ends))]
        for row, mean, span, y in _within(axes, placed, metric):
            color = GREY if row.apart else COLORS[0]
            axes.errorbar(mean, y, xerr=_bars(mean, span), fmt="o", markersize=4.5, color=color, elinewidth=1.2)
        axes.set_title(title(metric), fontsize=9, loc="left")
        axes.set_yticks([-k for k in range(len(rows))], [row.label for row in rows])
        axes.set_ylim(0.6 - len(rows), 0.6)
        axes.tick_params(labelleft=i % columns == 0)
        _percent(axes.xaxis, metric, 4)
    _note(figure, len(seeds), f"; gray line: {reference.label}")
    save(figure, path)


def _plot_over_axis(path: Path, question: Question, results: Results, seeds: Sequence[int]) -> None:
    number = len(question.panels)
    figure, axes_of = panels(number, min(3, number), 2.9)
    rows = list(question.rows)
    for axes, metric in zip(axes_of, question.panels):
        means, ends = _means(rows, metric, results, seeds)
        ticks = sorted({row.x for row in rows if row.x is not None})
        for row, mean in zip(rows, means):
            if row.x is None and not math.isnan(mean):
                axes.axhline(mean, color=GREY, linewidth=1, linestyle=":")
                axes.annotate(row.label, (0, mean), (0, 3), textcoords="offset points", fontsize=9, color=GREY)
        names = []
        for k, series in enumerate(dict.fromkeys(row.series for row in rows if row.x is not None)):
            same = [i for i, row in enumerate(rows) if row.x is not None and row.series == series]
            places = [ticks.index(rows[i].x or 0) + 0.12 * k for i in same]  # side by side: bars do not overlap
            bars = np.concatenate([_bars(means[i], ends[i]) for i in same], 1)
            axes.errorbar(places, [means[i] for i in same], bars, marker="os^D"[k % 4], markersize=4.5, linewidth=1.2,
                          elinewidth=1, color=COLORS[k])  # fmt: skip
            if series and not math.isnan(means[same[-1]]):
                names.append((places[-1], means[same[-1]], series, COLORS[k]))
        axes.set_xticks(range(len(ticks)), [f"{x:,g}" for x in ticks])
        axes.set_xlabel(textwrap.fill(question.axis, 34), fontsize=9)
        axes.set_title(title(metric), fontsize=9, loc="left")
        _percent(axes.yaxis, metric, 6)
        if names:
            name_ends(axes, names)
    _note(figure, len(seeds))
    save(figure, path)


Placed = tuple[Row, float, Ends, int]  # a row, its mean with its interval, and its height in the figure


def _within(axes: Any, placed: Sequence[Placed], metric: str) -> list[Placed]:
    """Limit a panel to what the rows that scatter alike need; what lies within. Other means are written at the edge."""
    alike = [ends for row, _, ends, _ in placed if not row.apart and not math.isnan(ends[0])]
    low, high = min((ends[0] for ends in alike), default=0.0), max((ends[1] for ends in alike), default=0.0)
    room = 0.3 * (high - low)
    if room == 0:  # a quick study has metrics without a value
        return list(placed)
    low, high = low - room, high + room
    axes.set_xlim(low, high)
    for _, mean, _, y in placed:
        if mean < low:
            axes.text(low, y, f" ← {formatted(mean, metric)}", va="center", fontsize=9, color=GREY)
        if mean > high:
            axes.text(high, y, f"{formatted(mean, metric)} → ", va="center", ha="right", fontsize=9, color=GREY)
    return [one for one in placed if low <= one[1] <= high]


def plot_trade_off(path: Path, question: Question, results: Results, seeds: Sequence[int]) -> None:
    """Alignment against the panel's metric, a point for each row with its name beside it, joined in their order."""
    from matplotlib.patheffects import withStroke

    figure, (axes,) = panels(1, 1, 4.2)
    metric = question.panels[0]
    rows = [row for row in question.rows if not values(results, [row], metric, seeds).isnan().any()]
    aligned, y_ends = _means(rows, "aligned", results, seeds)
    other, x_ends = _means(rows, metric, results, seeds)
    axes.plot(other, aligned, color=GREY, linewidth=1, alpha=0.4, zorder=1)
    for i, row in enumerate(rows):
        color, place = GREY if row.apart else COLORS[0], (other[i], aligned[i])
        spans = _bars(aligned[i], y_ends[i]), _bars(other[i], x_ends[i])
        axes.errorbar(*place, *spans, fmt="none", ecolor=color, elinewidth=1, alpha=0.6)
        axes.scatter(*place, 36, color=color, linewidths=0, zorder=3)
        text = axes.annotate(row.label, place, (8, 6), textcoords="offset points", fontsize=10, color=color, zorder=4)
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    what = title(metric).rstrip(" ↓")
    axes.set_xlabel(f"{what} to drawings of what the images show (lower is better)", fontsize=9)
    axes.set_ylabel("images judged good", fontsize=9)
    axes.margins(0.22)
    _percent(axes.yaxis, "aligned", 6)
    _note(figure, len(seeds))
    save(figure, path)


def plot_sets(path: Path, matches: Sequence[Match], rater: str, results: Results, seeds: Sequence[int]) -> None:
    """A bar for each match and kind: the fractions of prompts that were won, tied and lost, each named in its bar."""
    places = [(match, what) for match in matches for what in ("alignment", "fidelity")]
    figure, (axes,) = panels(1, 1, 0.8 + 0.55 * len(places))
    for k, (match, what) in enumerate(places):
        left, y = 0.0, -k - 0.4 * (k // 2)
        for end, color, ink in (("won", COLORS[0], "white"), ("tied", "0.85", "black"), ("lost", COLORS[1], "white")):
            share = float(values(results, [Row("", "sets")], outcome_metric(match, what, rater, end), seeds).mean())
            axes.barh(y, share, 0.7, left, color=color)
            if share >= 0.09:
                axes.text(
                    left + share / 2, y, f"{end} {100 * share:.0f} %", ha="center", va="center", color=ink, fontsize=9
                )
            left += share
    heights = [-k - 0.4 * (k // 2) for k in range(len(places))]
    axes.set_yticks(heights, [textwrap.fill(f"{what}: {match.title}", 42) for match, what in places])
    axes.set(xlim=(0, 1))
    in_percent(axes.xaxis)
    _note(figure, len(seeds), f"; two thirds of {rater} decide on each prompt", "means")
    save(figure, path)


# --------------------------------------------------------------------------------------------------------- the page
HEAD = """# The study: what each design choice does

The data set is a toy data set that comes with the package, and the annotator is **simulated**: a program that reads
pixels. Nothing here was shown with people's labels or on Stable Diffusion.
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
