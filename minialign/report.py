"""The last page of a run: report.html, one file that shows what feedback changed, beside what it cost.

`write_report` reads what the stages left in the run folder: results.json, samples.json, metrics.jsonl, config.json. The
page asks the network for nothing and runs no script: pictures are data URIs, charts are SVG in the page. Charts need
matplotlib (the extra `report`); without it their numbers stand in tables. What a run did not measure is left out.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .evaluate import wilson_interval
from .prompts import CATEGORIES
from .training import atomic

SIDES = ("before", "after")
MARKS = {"good": "✓ good", "bad": "✗ bad", "skip": "– skip"}  # a sign and a word: color alone would not do
SHOWN, LARGEST = 6, 256  # pairs of a category before the fold; pixels of the longer side of a picture in the page
FLAGS = (
    "out", "model", "feedback", "pretrain", "clip", "recipe", "seed", "steps", "beta", "batch_size", "learning_rate",
    "lr_schedule", "warmup", "weighting", "tau", "clip_norm", "ema", "prompt_dropout", "min_snr", "noise_offset",
    "lora", "sampling_steps", "guidance", "draw_batch", "test_images", "dtype", "accumulate",
    "gradient_checkpointing", "compile", "parallel", "checkpoint_every", "keep", "validate_every",
)  # fmt: skip
COSTS = {  # key in results.json: name, meaning, format
    "fidelity": ("Fréchet distance", "of CLIP image features to {}: lower is better", "{:.3g}"),
    "diversity": ("Diversity", "CLIP distance between images of one prompt: higher is more varied", "{:.3g}"),
    "readable": ("Readable", "images clear enough to be judged: higher is better", "{:.1%}"),
    "mean_reward": ("Mean reward", "by the reward model, which fine-tuning aimed at: higher is better", "{:.3f}"),
}
REWARD = {
    "auc": ("AUC of the reward model", "on held-out labels; chance is 0.5, perfect is 1", "{:.3f}"),
    "clip_score_auc": ("AUC of the raw CLIP score", "on the same images, with nothing learned", "{:.3f}"),
    "accuracy": ("Accuracy", "taking a reward above one half for good", "{:.1%}"),
    "good_fraction": ("Labelled good", "", "{:.1%}"),
    "labels": ("Labels", "", "{:,.0f}"),
    "held_out": ("Held-out labels", "that the reward model did not learn from", "{:,.0f}"),
}
CURVES = {  # stage and key in metrics.jsonl: title
    ("reward", "mse"): "Reward model: squared error",
    ("reward", "classification"): "Reward model: prompt classification",
    ("finetune", "model_loss"): "Fine-tuning: loss on the model’s own images",
    ("finetune", "pretrain_loss"): "Fine-tuning: loss on pre-training pairs",
}
# Charts are drawn in stand-in colors that become the CSS variables of these names: they follow light and dark mode.
PALETTE = {name: f"#0a0b{index:02x}" for index, name in enumerate(("paper", "ink", "soft", "line", "before", "after"))}
STYLE = """
:root{color-scheme:light dark;--paper:#fcfcfb;--ink:#1d2024;--soft:#63686f;--line:#dddfe2;--before:#989da6;
--after:#1b6e93;--good:#17764a;--bad:#b0412b}
@media(prefers-color-scheme:dark){:root{--paper:#16181b;--ink:#e4e6e8;--soft:#9ba1a9;--line:#34383e;--before:#7f868f;
--after:#62b5d8;--good:#63c795;--bad:#ec917a}}
*{box-sizing:border-box}body{margin:0 auto;padding:2.5rem 1.25rem 4rem;max-width:60rem;background:var(--paper);
color:var(--ink);font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-variant-numeric:tabular-nums;overflow-wrap:break-word}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .6rem;font-weight:650;letter-spacing:-.015em;text-wrap:balance}
h2{font-size:1.2rem;line-height:1.3;margin:3.2rem 0 .4rem;font-weight:650}
h3{font-size:.95rem;margin:1.8rem 0 .6rem;font-weight:600}p{max-width:42rem;margin:.4rem 0}
.soft,figcaption,small,summary,th,dt{color:var(--soft)}figcaption b{color:var(--ink);font-weight:600}
.headline{font-size:clamp(2.4rem,9vw,4rem);line-height:1.1;font-weight:650;letter-spacing:-.03em;margin:2rem 0 .3rem}
.headline span{color:var(--soft);font-weight:400}.headline b{color:var(--after);font-weight:inherit}
.note{border-left:3px solid var(--line);padding-left:.9rem;margin:1.2rem 0}
.pairs,.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(17rem,100%),1fr));gap:1.6rem 1.75rem;
margin-top:.8rem}
.charts{grid-template-columns:repeat(auto-fill,minmax(min(22rem,100%),1fr));gap:1.5rem 3rem;align-items:start;
margin-top:1rem}figure{margin:0;min-width:0}figcaption{font-size:.875rem;line-height:1.45;margin-bottom:.5rem}
.two{display:grid;grid-template-columns:1fr 1fr;gap:.5rem;font-size:.8rem}.two span{margin-left:.45em;font-weight:600}
.pairs figcaption{margin:.1rem 0 0;font-size:.9rem}.pairs figcaption i{font-size:.8rem;white-space:nowrap}
img{display:block;width:100%;height:auto;border-radius:4px;background:var(--line);margin-bottom:.2rem}
.good{color:var(--good)}.bad{color:var(--bad)}
.key{display:inline-block;width:.7em;height:.7em;border-radius:2px;margin:0 .35em 0 0}.key~.key{margin-left:.9em}
svg{display:block;width:100%;height:auto;max-width:30rem}svg text{font-family:inherit!important}
.table{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;width:100%}td small{display:block;line-height:1.4}
th,td{text-align:right;padding:.4rem 0 .4rem 1rem;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:500}th:first-child,td:first-child{text-align:left;padding-left:0}
summary{cursor:pointer;font-size:.85rem;margin:.6rem 0}dl{columns:2 20rem;column-gap:3rem;font-size:.9rem}
dl div{display:flex;justify-content:space-between;gap:1rem;padding:.25rem 0;border-bottom:1px solid var(--line);
break-inside:avoid}dd{margin:0;text-align:right;overflow-wrap:anywhere}a{color:var(--after)}
pre{border:1px solid var(--line);border-radius:4px;padding:.7rem .9rem;white-space:pre-wrap;overflow-x:auto;
font:.85rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}code,pre span{white-space:nowrap}
"""
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
"""
PAPER = """<h2>The method</h2><p>Kimin Lee, Hao Liu, Moonkyung Ryu, Olivia Watkins, Yuqing Du, Craig Boutilier, Pieter
Abbeel, Mohammad Ghavamzadeh, Shixiang Shane Gu: Aligning Text-to-Image Models using Human Feedback, 2023.
<a href="https://arxiv.org/abs/2302.12192">arXiv:2302.12192</a></p>
"""
NO_CHARTS = '<p class="soft">Tables stand for the charts: <code>pip install -e ".[report]"</code> brings them.</p>'


def write_report(run: Path) -> Path:
    """Write `run`/report.html from the files of a finished run; its path. Files that are missing leave gaps."""
    results, samples, config = (_read(run / f"{name}.json") for name in ("results", "samples", "config"))
    found = _flat(results)
    body = [_alignment(found), _reward(found), _training(run / "metrics.jsonl"), _time(found)]
    if "<svg" not in "".join(body):
        body.insert(0, NO_CHARTS)
    pictures = [_pairs(run, samples.get("samples") or []), _rounds(found.get("rounds", [])), _validation(run)]
    body = [_opening(found), *pictures, *body, _settings(run, found, config), PAPER]
    path = run / "report.html"
    with atomic(path) as temporary:
        page = f"{HEAD}<title>minialign: {escape(run.resolve().name)}</title><style>{STYLE}</style></head>\n<body>\n"
        temporary.write_text(page + "\n".join(filter(None, body)) + "</body></html>\n", encoding="utf-8")
    return path


def _opening(found: dict[str, Any]) -> str:
    """What was done, how much it changed, and who says so."""
    labels, images = found.get("counts.labels"), found.get("counts.images")
    judge = str(found.get("judge", ""))
    simulated = "simulated" in judge
    who = " by a simulated annotator" if simulated else ""
    weighting = found.get("settings.weighting", "reward")
    how = "their reward" if weighting == "reward" else f"the {weighting} of their reward"
    parts = [
        f"<h1>A text-to-image model, fine-tuned on {f'{labels:,} ' if labels else ''}labels{who}</h1>",
        f"<p>A reward model learned from the labels and scored {f'{images:,}' if images else 'all'} images. The model "
        f"was then fine-tuned on these images, weighted by {how}, after Lee et al. 2023.</p>",
    ]
    before, after = (found.get(f"alignment.{side}.overall") for side in SIDES)
    if before is not None and after is not None:
        span = found.get("alignment.ci95.gain.overall")
        sure = f" (95% interval {_points(*span)})" if span else ""
        if span and span[0] <= 0:
            sure += ": alignment fell" if span[1] < 0 else ": the interval holds zero, so no change is certain"
        judged = f", of {found['counts.evaluated']:,} by each model" if "counts.evaluated" in found else ""
        what = f"Images that show what their prompt asks for{judged}" if simulated else f"Images judged good{judged}"
        parts.append(f'<p class="headline">{before:.1%} <span>→</span> <b>{after:.1%}</b></p>')
        parts.append(f"<p>{what}: <strong>{_points(after - before)} points</strong>{sure}.</p>")
    if simulated:
        who = "a <strong>simulated annotator</strong>, a program that looks at the pixels alone. No person judged them."
        parts.append(f'<p class="note">Labels and judgements of these images are by {who}</p>')
    elif judge:
        own = " The model was fine-tuned towards that same reward: this is no independent test." * ("reward" in judge)
        parts.append(f'<p class="note">Judged by the <strong>{escape(judge)}</strong>.{own}</p>')
    return "\n".join(parts)


def _pairs(run: Path, samples: list[dict[str, Any]]) -> str:
    """The images before and after from the same starting noise, category by category."""
    groups: dict[str, dict[str, list[str]]] = {category: {} for category in CATEGORIES}
    for sample in samples:
        prompt, cells = escape(str(sample.get("prompt", ""))), ""
        for side in SIDES:
            shot = sample.get(side) or {}
            verdict = shot.get("verdict")
            mark = f'<span class="{verdict}">{MARKS[verdict]}</span>' if verdict in MARKS else ""
            cells += f"<div>{_picture(run / str(shot.get('image')), f'{side}: {prompt}')}{side}{mark}</div>"
        new = " <i>unseen prompt</i>" if sample.get("split") == "unseen" else ""
        pair = f'<figure><div class="two">{cells}</div><figcaption><b>{prompt}</b>{new}</figcaption></figure>'
        groups.setdefault(sample.get("category") or "", {}).setdefault(sample.get("split") or "", []).append(pair)
    body = ""
    for category, splits in groups.items():
        first = SHOWN // max(1, len(splits))  # of seen and of unseen prompts alike
        shown = [pair for pairs in splits.values() for pair in pairs[:first]]
        folded = [pair for pairs in splits.values() for pair in pairs[first:]]
        body += f"<h3>{escape(category).capitalize()}</h3>" if shown and category else ""
        body += f'<div class="pairs">{"".join(shown)}</div>' if shown else ""
        if folded:
            more = f"<summary>{len(folded)} more</summary>"
            body += f'<details>{more}<div class="pairs">{"".join(folded)}</div></details>'
    lead = (
        "Left the pre-trained model, right the fine-tuned one, from the same noise. The first of each kind, not picked."
    )
    return f"<h2>Before and after</h2><p>{lead}</p>{body}" if body else ""


def _rounds(rounds: Sequence[dict[str, Any]]) -> str:
    """What each round of a run changed, from the model of the one before."""
    rows = []
    for number, one in enumerate(rounds, 1):
        sides = [one["alignment"][side]["overall"] for side in SIDES]
        costs = [one[key].get("after") if one.get(key) else None for key in ("fidelity", "diversity", "mean_reward")]
        numbers = [*(f"{value:.1%}" for value in sides), _points(*one["alignment"]["ci95"]["gain"]["overall"])]
        rows.append((f"{number}", *numbers, *("–" if value is None else f"{value:.3g}" for value in costs)))
    header = ("round", "aligned before", "after", "gain, 95%", "Fréchet distance", "diversity", "mean reward")
    links = [f'<a href="round-{i}/report.html">round {i}</a>' for i in range(2, len(rounds) + 1)]
    more = f"<p>Each with its own report: {', '.join(links)}.</p>"
    return f"<h2>Rounds</h2>{_table(header, rows)}{more}" if rows else ""


def _validation(run: Path) -> str:
    """Grids that were drawn in the course of the fine-tuning, the first, the middle and the last."""
    grids = sorted((run / "validation").glob("step-*.png"), key=lambda path: int(path.stem[5:]))
    chosen = sorted({0, len(grids) // 2, len(grids) - 1}) if grids else []
    shown = [
        f"<figure><figcaption>Step {grids[i].stem[5:]}</figcaption>"
        f"{_picture(grids[i], f'images at step {grids[i].stem[5:]}', 2 * LARGEST)}</figure>"
        for i in chosen
    ]
    return _section("In the course of the fine-tuning", shown)


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


def _alignment(found: dict[str, Any]) -> str:
    """Alignment by kind of prompt, and what came with it."""
    rows, cells = [], []
    for key in ("overall", *CATEGORIES, "seen", "unseen"):
        values: list[Any] = [found.get(f"alignment.{side}.{key}") for side in SIDES]
        if None not in values:
            spans: list[Any] = [found.get(f"alignment.ci95.{part}.{key}") for part in (*SIDES, "gain")]
            texts = [f"{v:.1%}" + (f"\n{s[0]:.1%} to {s[1]:.1%}" if s else "") for v, s in zip(values, spans)]
            gain = _points(values[1] - values[0]) + (f"\n{_points(*spans[2])}" if spans[2] else "")
            rows.append((key, values, spans))
            cells.append((key, *texts, gain))
    keys = "".join(f'<span class="key" style="background:var(--{side})"></span>{side}' for side in SIDES)
    note, table = f" by kind of prompt, with 95% intervals<br>{keys}", _table(("", *SIDES, "points"), cells)
    chart = _figure("Alignment", note, table, partial(_bars, rows), (4.3, 0.4 + 0.4 * len(rows)))
    truth = "fresh drawings" if "simulated" in str(found.get("judge")) else "the images labelled good"
    costs = [
        (f"{name}\n{meaning.format(truth)}", *(form.format(found[f"{key}.{side}"]) for side in SIDES))
        for key, (name, meaning, form) in COSTS.items()
        if all(f"{key}.{side}" in found for side in SIDES)
    ]
    return _section("What changed", [chart, _table(("", *SIDES), costs)])


def _reward(found: dict[str, Any]) -> str:
    """How good the reward model is on labels that it did not learn from."""
    facts = [
        (f"{name}\n{meaning}", form.format(found[f"reward.{key}"]))
        for key, (name, meaning, form) in REWARD.items()
        if f"reward.{key}" in found
    ]
    bins = [
        (part["predicted"], part["observed"], part["count"])
        for part in found.get("reward.calibration", [])
        if part.get("count") and None not in part.values()
    ]
    table = _table(("predicted", "labelled good", "images"), [(f"{p:.2f}", f"{o:.2f}", f"{n:,}") for p, o, n in bins])
    note = ": how many are labelled good, by predicted reward, with 95% intervals; beneath, the images of each bin"
    chart = _figure("Calibration", note, table, partial(_calibration, bins), (4.3, 3.6))
    return _section("The reward model", [chart, _table((), facts)])


def _training(path: Path) -> str:
    """Training curves from metrics.jsonl."""
    curves: dict[tuple[str, str], dict[int, float]] = {curve: {} for curve in CURVES}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):  # a killed run may have left a part of a line
            line = json.loads(text)
            for stage, key in CURVES:
                if line["stage"] == stage and line.get(key) is not None:
                    curves[stage, key][line["step"]] = line[key]  # a resumed run tells steps again: the last counts
    charts = []
    for curve, values in curves.items():
        points = np.array(sorted(values.items()), dtype=float).reshape(-1, 2)
        table = _table(("step", "mean"), [(f"{step:,.0f}", f"{value:.4g}") for step, value in _means(points, 8)])
        charts.append(_figure(CURVES[curve], "", table, partial(_curve, points), (4.3, 2.2)))
    return _section("Training", charts)


def _time(found: dict[str, Any]) -> str:
    """Where the time went."""
    times = {key[8:]: value for key, value in found.items() if key.startswith("seconds.")}
    total = f"{_duration(times.pop('total'))} in all" if "total" in times else "Time"
    table = _table(("stage", "time"), [(key, _duration(value)) for key, value in times.items()])
    chart = _figure(total, "", table, partial(_stages, times), (4.3, 0.3 + 0.3 * len(times)))
    return _section("Where the time went", [chart])


def _settings(run: Path, found: dict[str, Any], config: dict[str, Any]) -> str:
    """The command that does the same again, and all settings."""
    config.setdefault("settings", {})
    config["settings"] |= {key[9:]: value for key, value in found.items() if key.startswith("settings.")}
    settings = {key.removeprefix("settings."): value for key, value in _flat(config).items()}
    if settings.get("weighting") == "reward":
        settings.pop("tau", None)
    given = {"out": run} | {
        flag: settings[flag] for flag in FLAGS if settings.get(flag) is not None and settings[flag] is not False
    }
    given |= {"rounds": len(found["rounds"])} if "rounds" in found else {}
    flags = (
        f"--{flag.replace('_', '-')}" + (f" {shlex.quote(str(value))}" if value is not True else "")
        for flag, value in given.items()
    )
    command = f"python -m minialign.finetune {' '.join(f'<span>{escape(flag)}</span>' for flag in flags)}"
    rows = (f"<div><dt>{escape(key)}</dt><dd>{escape(str(value))}</dd></div>" for key, value in settings.items())
    again = '<p class="soft">Where this run is already finished, add <code>--fresh</code> to start over.</p>'
    return f"<h2>Do it again</h2><pre>{command}</pre>{again}<h2>Settings</h2><dl>{''.join(rows)}</dl>"


def _bars(rows: Sequence[tuple[str, Any, Any]], figure: Any) -> None:
    """Alignment before and after: overall, the categories, seen and unseen prompts are three groups."""
    axes = figure.subplots()
    places = [i + 0.4 * (key in CATEGORIES) + 0.8 * (key in ("seen", "unseen")) for i, (key, _, _) in enumerate(rows)]
    for place, (_, values, spans) in zip(places, rows):
        for side, offset, value, span in zip(SIDES, (-0.19, 0.19), values, spans):
            axes.barh(place + offset, value, 0.34, color=PALETTE[side])
            for color, width in (("paper", 3.0), ("ink", 1.2)):  # a halo keeps the interval apart from its bar
                axes.hlines(place + offset, *(span or (value, value)), color=PALETTE[color], linewidth=width)
        axes.text(1.03, place, f"{100 * values[0]:.0f} → {100 * values[1]:.0f}%", va="center")
    axes.set(xlim=(0, 1), xticks=[0, 0.25, 0.5, 0.75, 1], xticklabels=["0", "25", "50", "75", "100%"])
    axes.set_yticks(places, [key for key, _, _ in rows])
    axes.invert_yaxis()
    axes.grid(axis="x")


def _calibration(bins: Sequence[tuple[float, float, int]], figure: Any) -> None:
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=PALETTE["soft"], linewidth=0.8, dashes=(4, 3))
    for predicted, observed, count in bins:
        axes.vlines(predicted, *wilson_interval(round(observed * count), count), color=PALETTE["after"], linewidth=1)
        axes.text(predicted, -0.1, f"{count:,}", ha="center", va="center", fontsize=8)
    axes.plot([p for p, _, _ in bins], [o for _, o, _ in bins], "o-", color=PALETTE["after"], markersize=4.5)
    ticks, labels = [0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"]
    axes.set(xlim=(0, 1), ylim=(-0.17, 1.02), xlabel="predicted reward", ylabel="labelled good")
    axes.set(xticks=ticks, yticks=ticks, xticklabels=labels, yticklabels=labels)
    axes.grid()


def _curve(points: np.ndarray, figure: Any) -> None:
    axes = figure.subplots()
    for number, width, alpha in ((400, 0.8, 0.35), (25, 1.6, 1.0)):
        axes.plot(*_means(points, number).T, color=PALETTE["after"], linewidth=width, alpha=alpha)
    axes.set_xlabel("step")
    axes.grid(axis="y")


def _stages(times: dict[str, float], figure: Any) -> None:
    axes = figure.subplots()
    longest = max(times.values())
    axes.barh(list(times), list(times.values()), 0.6, color=PALETTE["before"])
    for key, value in times.items():
        axes.text(value + 0.02 * longest, key, _duration(value), va="center")
    axes.set(xlim=(0, 1.3 * longest), xticks=[])
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)


def _figure(title: str, note: str, table: str, draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    """A chart with its numbers folded beneath; without matplotlib the numbers alone; without numbers nothing."""
    if not table:
        return ""
    caption = f"<figcaption><b>{escape(title)}</b>{note}</figcaption>"
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return f"<div>{caption}{table}</div>"
    ink, soft, line = (PALETTE[name] for name in ("ink", "soft", "line"))
    look: Any = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10, "axes.axisbelow": True}
    look |= {f"axes.spines.{side}": False for side in ("top", "right", "left")}
    look |= {"text.color": ink, "axes.labelcolor": soft, "xtick.color": soft, "ytick.color": line}
    look |= {"ytick.labelcolor": ink, "axes.edgecolor": line, "grid.color": line, "grid.linewidth": 0.7}
    look |= {"xtick.major.size": 0, "ytick.major.size": 0}
    with matplotlib.rc_context(look):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file := io.StringIO(), format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue().partition("<svg")[2].replace("xlink:href", "href")
    svg = re.sub(r'<style.*?</style>|<metadata>.*?</metadata>|<!--.*?-->| xmlns\S*?="[^"]*"', "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # names that would stand on the page twice
    svg = re.sub(r'width="\S+" height="\S+"', f'role="img" aria-label="{escape(title)}"', svg, count=1)
    for name, stand_in in PALETTE.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    return f"<div>{caption}<svg{svg}<details><summary>the numbers</summary>{table}</details></div>"


def _section(title: str, parts: Sequence[str]) -> str:
    return f'<h2>{title}</h2><div class="charts">{"".join(parts)}</div>' if any(parts) else ""


def _table(header: Iterable[str], rows: Sequence[Iterable[str]]) -> str:
    """An HTML table, empty where there are no rows; cells are escaped, what follows a line break in them is small."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = ""
    for row in rows:
        cells = (escape(cell).partition("\n") for cell in row)
        body += f"<tr>{''.join(f'<td>{cell}<small>{more}</small></td>' for cell, _, more in cells)}</tr>"
    return f'<div class="table"><table><tr>{head}</tr>{body}</table></div>' if rows else ""


def _read(path: Path) -> dict[str, Any]:
    """An object from a file of JSON, empty where there is no file; numbers that are not finite count as missing."""
    text = path.read_text(encoding="utf-8") if path.exists() else "{}"
    values: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
    return values


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values in one level, named by their path such as "reward.auc", without the missing ones (None)."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if value is not None:
            flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _means(points: np.ndarray, number: int) -> np.ndarray:
    """Means of `number` consecutive parts of points (N,2), or the points themselves where they are fewer."""
    return np.array([part.mean(0) for part in np.array_split(points, number) if len(part)]).reshape(-1, 2)


def _points(*differences: float) -> str:
    """A difference of fractions in percentage points with its sign, or an interval of them."""
    return " to ".join(f"{100 * difference:+.1f}" for difference in differences).replace("-", "−")


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
