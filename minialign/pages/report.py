"""The last page of a run: report.html, one file that shows what feedback changed, beside what it cost.

`write_report` reads what the stages left in the run folder: results.json, metrics.jsonl, config.json and the images
that results.json names. The page asks the network for nothing and runs no script: images are data URIs, charts are
SVG. Charts need matplotlib (the extra `report`); without it their numbers stand in tables. What a run did not
measure is left out.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..engine.commands import plural
from ..engine.settings import as_shell, command
from ..files import atomic, read_json
from ..measures import wilson_interval
from ..prompts import CATEGORIES
from . import figures, normal
from .cards import (
    REWARD_MODELS,
    difference,
    in_order,
    interval,
    is_fraction,
    judged_by,
    number,
    reward_words,
    significance,
    twice_as_many,
)

SINGULAR = {"new combinations": "new combination", "new objects": "new object", "unseen": "unseen prompt"}
MARKS = {"good": "✓ good", "bad": "✗ bad", "skip": "– skip"}  # a sign and a word: color alone would not do
SHOWN, LARGEST = 6, 256  # pairs of a category before the fold; pixels of the longer side of an image in the page
FLAG = "<code>--test-images</code>"
OUTCOMES = ("won", "tied", "lost")  # of pairs of sets
FEW = 100  # judged images of each model, below which the page says that they are few
ONE = "one number for all images, so it has no interval"
COSTS = {  # key of an evaluation: name, meaning, whether it is a fraction of images
    "frechet": ("Fréchet distance", f"between CLIP features of the images and of {{}}: lower is better; {ONE}", False),
    "cmmd": ("CMMD", f"another distance between the same features: lower is better; {ONE}", False),
    "diversity": ("Diversity", "CLIP distance between images of one prompt: higher is more varied", False),
    "readable": ("Readable", "images clear enough to be judged: higher is better", True),
}
REWARD = {  # key in what a reward model's measurement holds: name, meaning, whether it is a fraction
    "auc": ("AUC", "chance that a good image scores above a bad one; 0.5 is guessing", False),
    "accuracy": ("Accuracy", "predicting good where the reward is above one half", True),
    "ece": ("Calibration error", "between reward and fraction labelled good: lower is better", False),
    "brier": ("Brier score", "mean squared error: lower is better", False),
    "prompt_accuracy": ("Prompt accuracy", "good images that score highest for their own prompt", True),
    "pairs_ranked_right": ("Pairs ranked right", "of two compared images the better one scores higher", True),
}
PICTURE = {  # key of an evaluation's `picture`: what it is
    "saturation": "how colorful a pixel is, from 0 for grey to 1",
    "brightness": "from 0 for black to 1 for white",
    "edge density": "fraction of the pixels on an edge",
    "color entropy": "in bits: how many colors an image has, from 0 for one to 9",
}
CURVES = {  # of metrics.jsonl: title
    "reward mse": "Reward model: squared error",
    "reward classification": "Reward model: prompt classification loss",
    "reward comparison": "Reward model: loss on compared images",
    "finetune model_loss": "Fine-tuning: denoising loss on the model’s own images",
    "finetune pretrain_loss": "Fine-tuning: denoising loss on pre-training pairs",
    "finetune gradient_norm": "Fine-tuning: gradient norm",
    "finetune learning_rate": "Fine-tuning: learning rate",
}
LIGHT = """--paper:#fcfcfb;--ink:#1d2024;--soft:#5d6269;--line:#dddfe2;--base:#989da6;--tuned:#1b6e93;--good:#17764a;
--bad:#b0412b"""
STYLE = (
    f"""
:root{{color-scheme:light dark;{LIGHT}}}
@media(prefers-color-scheme:dark){{:root{{--paper:#16181b;--ink:#e4e6e8;--soft:#9ba1a9;--line:#34383e;--base:#7f868f;
--tuned:#62b5d8;--good:#63c795;--bad:#ec917a}}}}
@media print{{:root{{color-scheme:light;{LIGHT};--paper:#fff}}}}
"""
    + """
*{box-sizing:border-box}body{margin:0 auto;padding:2.5rem 1.25rem 4rem;max-width:60rem;background:var(--paper);
color:var(--ink);font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-variant-numeric:tabular-nums;overflow-wrap:break-word}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .6rem;font-weight:650;letter-spacing:-.015em;text-wrap:balance}
h2{font-size:1.2rem;line-height:1.3;margin:3.2rem 0 .4rem;font-weight:650}
h3{font-size:.95rem;margin:1.8rem 0 .6rem;font-weight:600}p{max-width:42rem;margin:.4rem 0}
.soft,figcaption,small,summary,th,dt{color:var(--soft)}figcaption b{color:var(--ink);font-weight:600}
.headline{font-size:clamp(2.4rem,9vw,4rem);line-height:1.1;font-weight:650;letter-spacing:-.03em;margin:2rem 0 .3rem}
.headline span{color:var(--soft);font-weight:400}.headline b{color:var(--tuned);font-weight:inherit;white-space:nowrap}
.note{border-left:3px solid var(--line);padding-left:.9rem;margin:1.2rem 0}
.pairs,.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(17rem,100%),1fr));gap:1.6rem 1.75rem;
margin-top:.8rem}
.charts{grid-template-columns:repeat(auto-fill,minmax(min(22rem,100%),1fr));gap:1.8rem 3rem;align-items:start;
margin-top:1rem}.charts>.table{grid-column:1/-1}figure{margin:0;min-width:0}
figcaption{font-size:.875rem;line-height:1.45;margin-bottom:.5rem}
.two{display:grid;grid-template-columns:1fr 1fr;gap:.5rem;font-size:.8rem}.two span{margin-left:.45em;font-weight:600;
white-space:nowrap}
.pairs figcaption{margin:.1rem 0 0;font-size:.9rem;max-height:7.3em;overflow-y:auto}
.pairs figcaption i{font-size:.8rem;white-space:nowrap}
img{display:block;width:100%;height:auto;border-radius:4px;background:var(--line);margin-bottom:.2rem}
.good{color:var(--good)}.bad{color:var(--bad)}.key{white-space:nowrap;margin-right:1.1em}
.key:before{content:"";display:inline-block;border:.35em solid var(--base);border-radius:2px;margin-right:.4em}
.key.tuned:before{border-color:var(--tuned)}.key.band:before{opacity:.35}
svg{display:block;width:100%;height:auto;max-width:30rem}svg text{font-family:inherit!important}
.table{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;width:100%}td small{display:block;line-height:1.4}
th,td{text-align:right;padding:.4rem 0 .4rem 1rem;border-bottom:1px solid var(--line);vertical-align:top}
th,td:not(:first-child){white-space:nowrap}th{font-weight:500}th:first-child,td:first-child{text-align:left;padding-left:0}
td:first-child{min-width:7rem}figure td:first-child{min-width:0}figure table{font-size:.8rem}
summary{cursor:pointer;font-size:.85rem;margin:.6rem 0}dl{columns:2 20rem;column-gap:3rem;font-size:.9rem}
dl div{display:flex;justify-content:space-between;gap:1rem;padding:.25rem 0;border-bottom:1px solid var(--line);
break-inside:avoid}dd{margin:0;text-align:right;overflow-wrap:anywhere}a{color:var(--tuned)}
code,pre span{white-space:nowrap}
pre{border:1px solid var(--line);border-radius:4px;padding:.7rem .9rem;white-space:pre-wrap;
font:.85rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
@media(max-width:30rem){table{font-size:.8rem}th,td{padding-left:.6rem}td small{white-space:normal}
td:first-child{min-width:5rem}}
@media print{body{padding:0;max-width:none;font-size:.85rem}h2,h2+p,h3,.charts figcaption,summary{break-after:avoid}
h2{margin-top:2rem}figure,tr,pre,p{break-inside:avoid}figure table{font-size:.72rem}figure td small{white-space:normal}
th,td{padding-left:.6rem}td:first-child{min-width:4.5rem}
.pairs figcaption{max-height:none}summary{list-style:none}
.pairs{grid-template-columns:repeat(3,1fr);gap:1rem}.two{font-size:.65rem}
.charts{grid-template-columns:1fr 1fr;gap:1.2rem 2rem}
details::details-content{content-visibility:visible;display:block;block-size:auto;opacity:1}}
"""
)
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
"""
PAPER = """<h2>The method</h2><p>Kimin Lee, Hao Liu, Moonkyung Ryu, Olivia Watkins, Yuqing Du, Craig Boutilier, Pieter
Abbeel, Mohammad Ghavamzadeh, Shixiang Shane Gu: Aligning Text-to-Image Models using Human Feedback, 2023.
<a href="https://arxiv.org/abs/2302.12192">arXiv:2302.12192</a></p>
"""
NO_CHARTS = '<p class="soft">Tables stand in for the charts: <code>pip install -e ".[report]"</code> adds them.</p>'
FLAT = """A flat denoising loss is normal: it depends on the random timestep and noise of each step far more than on
what fine-tuning changes. Whether fine-tuning works shows under “What changed”: the mean reward and the fraction of good
images should rise, diversity should not fall too far, and the samples above should look right."""
HACKING = """A model that exploits its reward often changes the look of its images. <strong>Look at the images</strong>
before you trust the gain."""


def write_report(run: Path) -> Path:
    """Write `run`/report.html from the files of a finished run; its path. Files that are missing leave gaps."""
    results, config = (_read(run / f"{name}.json") for name in ("results", "config"))
    evaluation = results.get("evaluation") or {}
    settings = {**(config.get("settings") or {}), **(results.get("settings") or {})}
    band: dict[str, Any] = read_json(normal.FILE) if normal.FILE.is_file() else {}
    unlike = normal.unlike(band, config, settings) if band else "nothing to be compared with"
    body = [
        _opening(results, evaluation),
        _pairs(run, evaluation),
        _validation(run),
        _what_changed(evaluation, band, unlike),
        _reward(results.get("reward") or {}),
        _training(run / "metrics.jsonl", band, unlike),
        _comparisons(results.get("comparisons") or {}),
        _time(results.get("seconds") or {}),
        _model(run),
        _settings(run, config, settings),
        PAPER,
    ]
    if "<svg" not in "".join(body):
        body.insert(3, NO_CHARTS)
    path = run / "report.html"
    with atomic(path) as temporary:
        page = f"{HEAD}<title>minialign: {escape(run.resolve().name)}</title><style>{STYLE}</style></head>\n<body>\n"
        temporary.write_text(page + "\n".join(filter(None, body)) + "</body></html>\n", encoding="utf-8")
    return path


# ----------------------------------------------------------------------------------------------- what is seen first
def _opening(results: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """What was done, how much it changed, and who says so."""
    counts, judge = results.get("counts") or {}, str(evaluation.get("judge") or "")
    labels, images = counts.get("labels"), counts.get("images")
    who = " by a simulated annotator" if "simulated" in judge else ""
    weighting = (results.get("settings") or {}).get("weighting", "reward")
    weight = "its reward" if weighting == "reward" else f"a function of its reward ({escape(str(weighting))})"
    scored, reward = f"{images:,}" if images else "all", results.get("reward") or {}
    title, source = f"fine-tuned on {f'{labels:,} ' if labels else ''}labels{who}", "the labels"
    if not labels and "comparisons" in reward:
        title, source = f"fine-tuned on {plural(reward['comparisons'], 'comparison')}", "comparisons of images"
    source = f"A reward model learned from {source}"
    if "terms" in reward:
        title, source = "fine-tuned by a given reward", f"A given reward, {escape(reward_words(reward))},"
    blocks = [
        f"<h1>A text-to-image model, {title}</h1>",
        f"<p>{source}{'' if 'terms' in reward else ' and'} scored {scored} images. The model "
        f"was then fine-tuned on these images, each weighted by {weight}, after Lee et al. 2023.</p>",
        _headline(evaluation, judge),
    ]
    said = _who_judged(judge)
    return "\n".join([*blocks, f'<p class="note">{said}</p>' if said else ""])


def _who_judged(judge: str) -> str:
    """Who says which images are good, and what that is worth."""
    if "simulated" in judge:
        return """Labels and verdicts are by a <strong>simulated annotator</strong>, a program that looks only at the
pixels. No person judged these images."""
    if judge == "reward":
        return """Judged by the <strong>reward model</strong>, towards which the model was fine-tuned: this is not an
independent test. People can judge the same images: <code>python -m minialign.label</code> on each folder in
<code>compare/</code>."""
    return f"Judged by <strong>{escape(judge)}</strong>." if judge else ""


def _headline(evaluation: Mapping[str, Any], judge: str) -> str:
    """The judge's number before and after in large letters, the gain with its interval, and a word on few images."""
    entries = [groups.get("overall") or {} for _, groups in _judged(evaluation, judge)[:2]]
    values = [entry["value"] for entry in entries if entry.get("value") is not None]
    if len(values) < 2:
        return ""
    (before, after), percent, number = values, is_fraction(judge), entries[1].get("n") or 0
    what = "Images that show what their prompt asks for" if "simulated" in judge else _capital(judged_by(judge))
    gain, ends = entries[1].get("gain", after - before), entries[1].get("gain_ci95")
    sure = f"95&nbsp;% interval {_minus(interval(ends, percent, signed=True))}" + f": {significance(ends)}" * bool(ends)
    lines = [
        f'<p class="headline">{_number(before, percent)} <span>→</span> <b>{_number(after, percent)}</b></p>',
        f"<p>{escape(what)}, {number:,}{'' if percent else ' images'} of each model judged: "
        f"<strong>{_minus(difference(gain, percent))}{' points' * percent}</strong> ({sure}).</p>",
    ]
    if number < FEW:
        few = f"Only {number:,} images of each model were judged" if number > 1 else "Only one image was judged"
        lines.append(f"<p><strong>{few}</strong>: too few for a firm conclusion ({FLAG} sets the number).</p>")
    return "\n".join(lines)


def _judged(evaluation: Mapping[str, Any], judge: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The models that a judge judged, and its means by group; the model that gains are over comes first."""
    table = (evaluation.get("judged") or {}).get(judge) or {}
    return [(name, table[name]) for name in evaluation.get("models") or table if name in table]


def _pairs(run: Path, evaluation: Mapping[str, Any]) -> str:
    """The images of both models from the same starting noise, category by category."""
    models = list(evaluation.get("models") or {})[:2]
    kinds: dict[str, dict[str, list[str]]] = {category: {} for category in CATEGORIES}
    for sample in evaluation.get("samples") or []:
        prompt, cells, groups = escape(str(sample.get("prompt", ""))), "", sample.get("groups") or []
        for model in models:
            verdict = (sample.get("verdicts") or {}).get(model)
            mark = f'<span class="{verdict}">{MARKS[verdict]}</span>' if verdict in MARKS else ""
            place, name = run / str((sample.get("images") or {}).get(model)), escape(model)
            cells += f"<div>{_picture(place, f'{name}: {prompt}')}{name}{mark}</div>"
        category = next((group for group in groups if group in CATEGORIES), "")
        others = [group for group in groups if group != category]
        names = ", ".join(SINGULAR.get(group, group) for group in others if group != "seen")
        caption = f"<b>{prompt}</b>" + (f" <i>{escape(names)}</i>" if names else "")
        pair = f'<figure><div class="two">{cells}</div><figcaption>{caption}</figcaption></figure>'
        kinds.setdefault(category, {}).setdefault(str(others), []).append(pair)
    body = "".join(_folded(category, splits) for category, splits in kinds.items())
    lead = f"""Left the {" model, right the ".join(map(escape, models))} model, from the same starting noise. These are
the first images of each kind, not chosen."""
    return f"<h2>Before and after</h2><p>{lead}</p>{body}" if body else ""


def _folded(category: str, splits: Mapping[str, Sequence[str]]) -> str:
    """Pairs of a category under its name: the first of each group (seen, new objects) are shown, the others folded."""
    first = SHOWN // max(1, len(splits))
    open_ = [pair for pairs in splits.values() for pair in pairs[:first]]
    folded = [pair for pairs in splits.values() for pair in pairs[first:]]
    body = f"<h3>{escape(_capital(category))}</h3>" if open_ and category else ""
    body += f'<div class="pairs">{"".join(open_)}</div>' if open_ else ""
    more = f'<summary>{len(folded)} more</summary><div class="pairs">{"".join(folded)}</div>'
    return body + (f"<details>{more}</details>" if folded else "")


def _validation(run: Path) -> str:
    """Grids that were sampled during fine-tuning: the first, the middle and the last."""
    grids = sorted((run / "validation").glob("step-*.png"), key=lambda path: int(path.stem[5:]))
    chosen = sorted({0, len(grids) // 2, len(grids) - 1}) if grids else []
    shown_ = [
        f"<figure><figcaption>Step {grids[i].stem[5:]}</figcaption>"
        f"{_picture(grids[i], f'samples at step {grids[i].stem[5:]}', 2 * LARGEST)}</figure>"
        for i in chosen
    ]
    return _section("Samples during fine-tuning", shown_)


def _picture(path: Path, alt: str, largest: int = LARGEST) -> str:
    """An <img> that carries its own pixels; small images are left to the browser, which enlarges them smoothly."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except OSError:
        return "<p>no image</p>"
    form = "JPEG" if max(image.size) > largest else "PNG"
    image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    image.save(file := io.BytesIO(), form, quality=90)
    data = f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
    return f'<img src="{data}" width="{image.width}" height="{image.height}" alt="{alt}">'


# ----------------------------------------------------------------------------------------------------- what changed
def _what_changed(evaluation: Mapping[str, Any], band: Mapping[str, Any], unlike: str) -> str:
    """Alignment by kind of prompt, and what else changed; before them, whether normal runs change as much."""
    judge, usual = str(evaluation.get("judge") or ""), {} if unlike else band["changes"]
    section = _section("What changed", [_groups(evaluation, judge), _changes(evaluation, usual)])
    return section.replace("</h2>", f"</h2>{_usual(evaluation, band, unlike)}", 1) + _sets(evaluation)


def _usual(evaluation: Mapping[str, Any], band: Mapping[str, Any], unlike: str) -> str:
    """Whether changes lie among those of normal runs; a warning where images changed more than twice as much."""
    seeds = band.get("changes", {})
    gains = {key: one["gain"] for key, one in normal.read_changes(evaluation).items() if key in seeds}
    judges = evaluation.get("judged") or {}
    outside = [name for name, gain in gains.items() if not min(seeds[name]) <= gain <= max(seeds[name])]
    # twice, as one normal run in four exceeds the largest change of three (docs/method.md)
    larger = [name for name in PICTURE if name in gains and abs(gains[name]) > 2 * max(map(abs, seeds[name]))]
    said, runs = "", _default_runs(band)
    if gains and not unlike:
        names = ", ".join(judged_by(name) if name in judges else name for name in outside)
        said = f"<p>Beside this run’s changes stand the lowest and the highest of {runs}. "
        said += f"Outside them: {escape(names)}. With so few runs, a normal run may be outside too." if outside else ""
        said += "</p>" if outside else "All lie between them.</p>"
    if larger:
        whose = " (another model or other settings, so a rough measure)" if unlike else ""
        told = "; ".join(f"{name} {_minus(difference(gains[name], False))} ({_span(seeds[name])})" for name in larger)
        said += f"""<p class="note"><strong>Warning</strong>: the images changed more than twice as much as in any of
{runs}{whose}: {told}. {HACKING}</p>"""
    return said


def _span(changes: Sequence[float], percent: bool = False) -> str:
    """The lowest and the highest of the changes of default runs."""
    return _minus(" to ".join(difference(end, percent) for end in (min(changes), max(changes))))


def _default_runs(band: Mapping[str, Any]) -> str:
    """The runs that a band is of, in words; "" where there is no band."""
    seeds = band.get("seeds", [])
    return f"{len(seeds)} default runs of the bundled model (seeds {', '.join(map(str, seeds))})" if seeds else ""


def _groups(evaluation: Mapping[str, Any], judge: str) -> str:
    """The chart of the judge's number by group of prompts: overall, the categories, then whatever groups there are."""
    sides, percent = _judged(evaluation, judge)[:2], is_fraction(judge)
    rows: list[figures.Group] = []
    cells: list[tuple[str, ...]] = []
    for group in in_order(group for _, groups in sides for group in groups) if len(sides) == 2 else ():
        entries = [groups.get(group) or {} for _, groups in sides]
        values = [entry["value"] for entry in entries if entry.get("value") is not None]
        if len(values) == 2:
            rows.append((group, values, [entry.get("ci95") for entry in entries]))
            cells.append((f"{group}\n{entries[1].get('n', 0):,} images", *_cells(entries, percent)))
    table = _table(("", *(name for name, _ in sides), "difference"), cells)
    keys = _keys(dict(zip(("base", "tuned"), (name for name, _ in sides))))
    note = f" by kind of prompt, with 95&nbsp;% intervals<br>{keys}"
    chart, size = partial(figures.bars, rows, percent), (4.3, 0.5 + 0.5 * len(rows))
    return _figure(_capital(judged_by(judge)), note, table, chart, size, beside=True)


def _cells(entries: Sequence[Mapping[str, Any]], percent: bool) -> list[str]:
    """Each model's number with its interval, and each further model's gain with its own and what it says."""
    cells = []
    for i, entry in enumerate(entries):
        span = f"\n{interval(entry.get('ci95'), percent)}" if "ci95" in entry else ""
        cells.append(_number(entry.get("value"), percent) + span)
        if i and entry.get("gain") is None:
            cells.append("–")
        elif i:
            ends, gain = entry.get("gain_ci95"), difference(entry["gain"], percent)
            said = "\n" + significance(ends).replace(" %", "\N{NO-BREAK SPACE}%") if ends else ""
            cells.append(_minus(f"{gain}\n{interval(ends, percent, signed=True)}{said}"))
    return cells


def _changes(evaluation: Mapping[str, Any], usual: Mapping[str, Sequence[float]] = {}) -> str:
    """A table of all that an evaluation measured of all images of its models; beside it `usual`, of default runs."""

    def beside(name: str, percent: bool = False) -> list[str]:
        return [_span(usual[name], percent) if name in usual else ""] * bool(usual)

    models, judge, rows = list(evaluation.get("models") or {}), str(evaluation.get("judge") or ""), []
    for name in sorted(evaluation.get("judged") or {}, key=lambda name: name != judge):
        table = evaluation["judged"][name]
        entries = [(table.get(model) or {}).get("overall") or {} for model in models]
        if any(entry.get("value") is not None for entry in entries):
            aim, percent = "\nwhat fine-tuning aimed at" * (name == "reward"), is_fraction(name)
            rows.append((_capital(judged_by(name)) + aim, *_cells(entries, percent), *beside(name, percent)))
    truth = evaluation.get("reference") or "good images"
    for key, (title, meaning, percent) in COSTS.items():
        numbers = evaluation.get(key) or {}
        if any(numbers.get(model) is not None for model in models):
            entries = [{"value": numbers.get(model)} for model in models]
            first, gains = entries[0]["value"], (evaluation.get("gains") or {}).get(key) or {}
            for entry in entries[1:] if first is not None else ():
                entry["gain"] = None if entry["value"] is None else entry["value"] - first
            for model, gain in gains.items():
                entries[models.index(model)] |= gain
            cells = _cells(entries, percent)
            if not gains:
                cells = [cell.partition("\n")[0] for cell in cells]
            rows.append((f"{title}\n{meaning.format(truth)}", *cells, *beside(key, percent)))
    for name, meaning in PICTURE.items():
        if numbers := (evaluation.get("picture") or {}).get(name):
            cells = _cells([numbers.get(model) or {} for model in models], False)
            rows.append((f"{_capital(name)}\n{meaning}", *cells, *beside(name)))
    header = ["", *models[:1]]
    for model in models[1:]:
        header += [model, "difference" if len(models) == 2 else f"over {models[0]}"]
    return _table([*header, *["default runs"] * bool(usual)], rows)


def _sets(evaluation: Mapping[str, Any]) -> str:
    """A table of the sets of images that raters compared (--sets): each further model's against the first's."""
    sets, (base, *others) = evaluation.get("sets") or {}, evaluation.get("models") or [""]
    rows = []
    for kind, raters in (sets.get("compared") or {}).items():
        for rater, models in raters.items():
            for model, groups in models.items():
                outcome, whose = groups["overall"], f"{model}, " * (len(others) > 1)
                fractions = [(outcome[name], outcome["n"]) for name in OUTCOMES]
                ends = [interval(wilson_interval(round(value * n), n), True) for value, n in fractions]
                cells = [f"{_number(value, True)}\n{span}" for (value, _), span in zip(fractions, ends)]
                rows.append((f"{_capital(kind)}\n{whose}by {rater}", *cells, f"{outcome['n']:,}"))
    if not rows:
        return ""
    whose = f"the {others[0]} model’s set" if len(others) == 1 else "the named model’s set"
    note = f"""A pair is won where two thirds of the raters prefer {escape(whose)} to the {escape(base)} model’s, lost
where two thirds prefer the {escape(base)} model’s, else tied. Alignment counts images that show what their
prompt asks for, fidelity images that look like a clean drawing. With 95&nbsp;% intervals."""
    title = f"Sets of {sets['size']} images of a prompt"
    return f"<h3>{title}</h3><p>{note}</p>{_table(('', *OUTCOMES, 'pairs of sets'), rows)}"


def _comparisons(comparisons: Mapping[str, Mapping[str, Any]]) -> str:
    """The same tables of each further comparison, under its models and its name in results.json."""
    tables = [
        f"<h3>{escape(' and '.join(one.get('models') or ()))} <small>{escape(name)}</small></h3>"
        + _changes(one)
        + _sets(one)
        for name, one in comparisons.items()
    ]
    return f"<h2>Further comparisons</h2>{''.join(tables)}" if tables else ""


# -------------------------------------------------------------------------------------------- how it came about
def _reward(reward: Mapping[str, Any]) -> str:
    """How well the reward model predicts labels that it did not learn from, of known prompts and of new ones."""
    measured, held_out = reward.get("measured") or {}, reward.get("held_out") or {}
    splits = list(dict.fromkeys(split for quality in measured.values() for split in quality))
    named = ("given", "auxiliary", "comparisons", "plain")
    own: Mapping[str, Any] = next((measured[name] for name in named if measured.get(name)), {})
    charts = [_calibration(split, (own.get(split) or {}).get("calibration") or []) for split in splits]

    def row(title: str, one: Mapping[str, Any], key: str, percent: bool = False, digits: int = 3) -> tuple[str, ...]:
        values = ((one.get(split) or {}).get(key) for split in splits)
        return title, *(_number(value, percent, digits) for value in values)

    rows = []
    for key, (title, meaning, percent) in REWARD.items():
        rows.append(row(f"{title}\n{meaning}", own, key, percent))
        if key == "auc":
            others = [(name, quality) for name, quality in measured.items() if quality is not own]
            rows += [row(f"{title}, {REWARD_MODELS.get(name, name)}", quality, key) for name, quality in others]
    rows.append(row("Labelled good", held_out, "good_fraction", percent=True))
    rows += [row("Held-out labels", held_out, "labels", digits=0), row("Their prompts", held_out, "prompts", digits=0)]
    rows += [row("Held-out comparisons", held_out, "comparisons", digits=0)]
    rows = [cells for cells in rows if set(cells[1:]) != {"–"}]
    note = f"""<p>Measured on labels that it did not learn from. <em>Known prompts</em> have other images among those
that it learned from; <em>new prompts</em> have none.{_of_labels(reward)}</p>"""
    charts.append(_by_labels(reward.get("curve") or {}))
    section = _section("The reward model", [*charts, _table(("", *splits), rows if splits else [])])
    return section.replace("</h2>", f"</h2>{note}", 1)


def _by_labels(curve: Mapping[str, Any]) -> str:
    """The chart of how well a reward predicts by the number of labels, where it was measured (reward --curve)."""
    if not any(value is not None for value in (curve.get("auc") or {}).get("value", [])):
        return ""
    rows = []
    for i, labels in enumerate(curve["labels"]):
        cells = [f"{labels:,}"]
        for key, percent in (("auc", False), ("accuracy", True), ("pairs", True)):
            ends = curve[key]["ci95"][i]
            cells.append(_number(curve[key]["value"][i], percent) + (f"\n{interval(ends, percent)}" if ends else ""))
        rows.append(cells)
    note = f""": AUC on held-out prompts, mean of {curve["splits"]} random splits, 95&nbsp;% intervals.
{escape(_minus(twice_as_many(curve)))}"""
    table = _table(("labels", "AUC", "accuracy", "pairs ranked right"), rows)
    return _figure("How many labels", note, table, partial(figures.by_labels, curve), (4.3, 2.6))


def _of_labels(reward: Mapping[str, Any]) -> str:
    """How many labels there are and how many of them are good."""
    if not reward.get("labels"):
        return ""
    good = reward.get("good_fraction")
    return f" Of all {reward['labels']:,} labels {_number(good, True)} are good." if good is not None else ""


def _calibration(split: str, bins: Sequence[Mapping[str, float]]) -> str:
    """The chart of the fraction labelled good by predicted reward."""
    bins = [bin for bin in bins if bin.get("count") and None not in bin.values()]
    rows = []
    for bin in bins:
        ends = wilson_interval(round(bin["observed"] * bin["count"]), int(bin["count"]))
        observed = f"{_number(bin['observed'], True)}\n{interval(ends, True)}"
        rows.append((f"{bin['predicted']:.2f}", observed, f"{bin['count']:,.0f}"))
    table = _table(("predicted reward", "labelled good", "images"), rows)
    note = """: fraction of images labelled good, by predicted reward, in bins of equally many images, with
95&nbsp;% intervals. A point’s area is its number of images. On the dashed line, the reward is the probability of a good
label."""
    return _figure(f"Calibration on {split}", note, table, partial(figures.reliability, bins), (4.3, 4.0))


def _training(path: Path, band: Mapping[str, Any], unlike: str) -> str:
    """Training curves from metrics.jsonl, over the band of normal runs where this run is one of these."""
    curves, charts, left = normal.read_curves(path), [], []
    for name, title in CURVES.items():
        points = curves.get(name, np.empty((0, 2)))
        if not len(points):
            continue
        rows = [chunk.mean(0) for chunk in np.array_split(points, min(8, len(points)))]
        table = _table(("step", "mean"), [(f"{step:,.0f}", f"{value:.4g}") for step, value in rows])
        length = figures.window(len(points)) if name != "finetune learning_rate" else 1  # which has no noise
        steps = length * (points[-1, 0] - points[0, 0]) / max(1, len(points) - 1)
        of_others = None if unlike else band["curves"].get(name)
        keys = {"base": "each logged value", "tuned": f"mean of {steps:,.0f} steps"} if length > 1 else {}
        keys |= {"band": "default runs"} if of_others else {}
        note = f"<br>{_keys(keys)}" if keys else ""
        charts.append(_figure(title, note, table, partial(figures.curve, points, length, of_others), (4.3, 2.2)))
        if of_others and (outside := normal.leaves(points, of_others)):
            where = ", ".join(f"{side} from step {first:,} to {last:,}" for first, last, side in outside)
            left.append(f"{title} ({where})")
    said = ""
    if band and unlike:
        said = f"""<p>No bands of normal curves are drawn: they are known for {_default_runs(band)}. This run has
{escape(unlike)}.</p>"""
    elif band:
        said = f"<p>The bands hold all values that {_default_runs(band)} logged in each fifth of the steps. "
        said += f"The mean of this run leaves them: {'; '.join(left)}." if left else "This run lies inside all of them."
        said += "</p>"
    section = _section("Training", charts)
    return section.replace("</h2>", f"</h2><p>{FLAT}</p>{said}", 1)


def _time(seconds: Mapping[str, Any]) -> str:
    """Where the time went."""
    times = {key: value for key, value in seconds.items() if key != "total" and value is not None}
    total = f"{_duration(seconds['total'])} in all" if seconds.get("total") is not None else "Time"
    table = _table(("stage", "time"), [(key, _duration(value)) for key, value in times.items()])
    chart = _figure(total, "", table, partial(figures.stages, times, _duration), (4.3, 0.3 + 0.3 * len(times)))
    return _section("Where the time went", [chart])


def _model(run: Path) -> str:
    """Where the fine-tuned model is, and the lines that load it."""
    if not (run / "model").is_dir():
        return ""
    lines = f"""from minialign import Pipeline
pipe = Pipeline.from_pretrained({json.dumps(str(run / "model"), ensure_ascii=False)})
pipe.generate(["a prompt"])[0].save("image.png")"""
    where = 'The fine-tuned model is in <a href="model/">model/</a>, in the layout that diffusers reads:'
    return f"<h2>Use the model</h2><p>{where}</p><pre>{escape(lines)}</pre>"


def _settings(run: Path, config: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The command that does the same again, and all settings."""
    bundled = bool(config.get("world"))
    words = re.sub(r"(?<= )--[a-z-]+", r"<span>\g<0></span>", escape(as_shell(command(settings, bundled, run))))
    note = "Settings that are not named have their defaults. This folder is finished: name another to repeat the run."
    if not bundled:
        note += " Add --feedback FILE with the labels (python -m minialign.label with --export FILE writes them)."
    rows = _flat({**config, "settings": settings})
    facts = "".join(
        f"<div><dt>{escape(key.removeprefix('settings.'))}</dt><dd>{escape(str(value))}</dd></div>"
        for key, value in rows.items()
    )
    again = f'<h2>Repeat the run</h2><pre>{words}</pre><p class="soft">{note}</p>'
    return f"{again}<h2>Settings</h2><dl>{facts}</dl>"


# ------------------------------------------------------------------------------------------------ pieces of the page
def _figure(
    title: str, note: str, table: str, draw: Callable[[Any], None], size: tuple[float, float], beside: bool = False
) -> str:
    """A chart with its numbers beside it or folded beneath; without matplotlib the numbers alone."""
    if not table:
        return ""
    caption = f"<figcaption><b>{escape(title)}</b>{note}</figcaption>"
    chart = figures.svg(title, draw, size)
    if beside and chart:
        return f"<figure>{caption}{chart}</figure><figure>{table}</figure>"
    numbers = f"<details><summary>the numbers</summary>{table}</details>" if chart else table
    return f"<figure>{caption}{chart}{numbers}</figure>"


def _keys(names: Mapping[str, str]) -> str:
    """A legend: what is drawn in the color of "base", of "tuned", and as a "band"."""
    return "".join(f'<span class="key {kind}">{escape(name)}</span>' for kind, name in names.items())


def _section(title: str, charts: Sequence[str]) -> str:
    return f'<h2>{title}</h2><div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def _table(header: Iterable[str], rows: Sequence[Iterable[str]]) -> str:
    """An HTML table, empty where there are no rows; cells are escaped, what follows a line break in them is small."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = ""
    for row in rows:
        cells = (escape(cell).partition("\n") for cell in row)
        small = ((cell, more.replace("\n", "<br>")) for cell, _, more in cells)
        body += f"<tr>{''.join(f'<td>{cell}<small>{more}</small></td>' for cell, more in small)}</tr>"
    return f'<div class="table"><table><tr>{head}</tr>{body}</table></div>' if rows else ""


def _read(path: Path) -> dict[str, Any]:
    """An object from a file of JSON, empty where there is no file; numbers that are not finite count as missing."""
    text = path.read_text(encoding="utf-8") if path.exists() else "{}"
    values: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
    return values


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values in one level, named by their path such as "versions.torch", without the missing ones (None)."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if value is not None:
            flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _number(value: float | None, percent: bool, digits: int = 3) -> str:
    """`number` for the page: a dash where there is none, and no line break before a percent sign."""
    return "–" if value is None else number(value, percent, digits).replace(" ", "\N{NO-BREAK SPACE}")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _minus(text: str) -> str:
    """Signed numbers with the sign that is as wide as a plus."""
    return text.replace("-", "−")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
