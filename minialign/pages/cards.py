"""Results as text: tables for the terminal, and the cards (README.md) of fine-tuned and reward models.

An `evaluation` here is that of results.json: models by name, judges by name, and the means of each judge's labels or
scores of each model's images, by group of prompts (docs/formats.md). The first model is what the others are compared
with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..engine.commands import plural
from ..prompts import CATEGORIES

SCORES = {"reward": "mean reward", "CLIP score": "mean CLIP score"}  # of these judges; all others label images
MEASURES = {  # key of an evaluation: name in a table of text
    "frechet": "Frechet distance (lower is better)",
    "cmmd": "CMMD (lower is better)",
    "diversity": "diversity (higher is better)",
    "readable": "readable images",
}
REWARD_MODELS = {
    "auxiliary": "with the auxiliary loss",
    "plain": "squared error alone",
    "comparisons": "comparisons alone",
    "clip": "raw CLIP score",
    "given": "--reward",
}


def is_fraction(judge: str) -> bool:
    """Whether what is said of a judge is a fraction of images (it calls them good or bad), and not a mean score."""
    return judge not in SCORES


def judged_by(judge: str) -> str:
    """What a judge's number is, in words."""
    if judge in SCORES:
        return SCORES[judge]
    return f"images judged good by {'people' if judge == 'people' else f'the {judge}'}"


def in_order(groups: Iterable[str]) -> list[str]:
    """Groups of prompts in the order in which they are shown: overall, the categories, then all others."""
    there = dict.fromkeys(groups)
    first = [group for group in ("overall", *CATEGORIES) if group in there]
    return first + [group for group in there if group not in first]


def number(value: float | None, percent: bool, digits: int = 3) -> str:
    """A fraction in percent, or a number; "-" where there is none."""
    return "-" if value is None else f"{100 * value:.1f} %" if percent else f"{value:,.{digits}f}"


def difference(value: float, percent: bool) -> str:
    """A difference with its sign, of fractions in percentage points."""
    return f"{100 * value:+.1f}" if percent else f"{value:+.3f}"


def interval(ends: Sequence[float] | None, percent: bool, signed: bool = False) -> str:
    """The ends of a 95 % interval; images of one prompt have none."""
    if ends is None:
        return "n/a: one prompt"
    return " to ".join(difference(end, percent) if signed else number(end, percent).replace(" %", "") for end in ends)


def significance(ends: Sequence[float] | None) -> str:
    """What a 95 % interval of a difference says of it."""
    if ends is None:
        return "no interval: n/a, one prompt"
    return "no significant difference" if ends[0] <= 0 <= ends[1] else "significant at 5 %"


# ----------------------------------------------------------------------------------------------- models compared
def summary(results: Mapping[str, Any]) -> str:
    """The table that ends a run: base and fine-tuned model by the judge whose verdicts count, and what it cost."""
    evaluation = results["evaluation"]
    return comparison(evaluation | {"judged": {evaluation["judge"]: evaluation["judged"][evaluation["judge"]]},
                                    "best_of_n": {}})  # fmt: skip


def comparison(evaluation: Mapping[str, Any]) -> str:
    """All that an evaluation measured, as a table of text: a column for each model, and one for each gain."""
    models = list(evaluation["models"])
    lines = [line for judge in evaluation["judged"] for line in _judged(evaluation["judged"][judge], judge, models)]
    for key, title in MEASURES.items():
        measured = evaluation.get(key) or {}
        if any(measured.get(name) is not None for name in models):
            cells = {name: number(measured.get(name), key == "readable") for name in models}
            lines.append(_line(title, cells, _gains(evaluation.get("gains", {}).get(key, {}), key == "readable")))
    for measure, table in (evaluation.get("picture") or {}).items():
        means = {name: number(table.get(name, {}).get("value"), False) for name in models}
        lines.append(_line(f"mean {measure}", means, _gains(table, False)))
    for chooser, tables in evaluation.get("best_of_n", {}).items():
        for judge, curves in tables.items():
            if all(len(curve["value"]) == 1 for curve in curves.values()):
                continue  # prompts with one image each leave nothing to choose
            lines += ["", f"best of N, chosen by {chooser}: {judged_by(judge)}"]
            for i in range(max(len(curve["value"]) for curve in curves.values())):
                values = {name: curve["value"][i] for name, curve in curves.items()}
                cells = {name: number(values.get(name), is_fraction(judge)) for name in models}
                lines.append(_line(f"  N = {i + 1}", cells))
    lines += _sets(evaluation.get("sets", {}))
    if evaluation.get("reference"):
        lines += ["", f"(distances are to {evaluation['reference']})"]
    return "\n".join(lines)


def _sets(sets: Mapping[str, Any]) -> list[str]:
    """What raters say of sets of images, each model's against the first's."""
    lines = []
    for kind, raters in sets.get("compared", {}).items():
        lines += ["", f"{kind} of sets of {sets['size']} images of a prompt, against the first model's"]
        for rater, models in raters.items():
            for name, groups in models.items():
                one = groups["overall"]
                ends = ", ".join(f"{outcome} {number(one[outcome], True)}" for outcome in ("won", "tied", "lost"))
                lines.append(f"  {name}, by {rater}: {ends} of {one['n']:,}")
    return lines


def _judged(table: Mapping[str, Mapping[str, Any]], judge: str, models: Sequence[str]) -> list[str]:
    """The lines of one judge: each group's value of each model, and each model's gain over the first."""
    percent, heads = is_fraction(judge), {name: name for name in models}
    lines = [judged_by(judge), _line(f"{'  (95 % intervals)':22}{'images':>8}", heads, dict.fromkeys(models, "gain"))]
    for group in in_order(group for groups in table.values() for group in groups):
        entries = {name: table.get(name, {}).get(group, {}) for name in models}
        gains = _gains(entries, percent)
        count = max(entry.get("n", 0) for entry in entries.values())
        values = {name: _with_interval(entry, percent) for name, entry in entries.items()}
        lines.append(_line(f"  {group:20}{count:8,}", values, gains))
    for name in models[1:]:
        entry = table.get(name, {}).get("overall", {})
        if entry.get("gain") is not None:
            gain = difference(entry["gain"], percent) + " points" * percent
            lines.append(f"  {name} over {models[0]}: {gain}, {significance(entry.get('gain_ci95'))}")
    return [*lines, ""]


def _gains(entries: Mapping[str, Mapping[str, Any]], percent: bool) -> dict[str, str]:
    """Each model's gain with its interval, where it has one."""
    return {
        name: f"{difference(entry['gain'], percent)} ({interval(entry.get('gain_ci95'), percent, signed=True)})"
        for name, entry in entries.items()
        if entry.get("gain") is not None
    }


def _line(title: str, values: Mapping[str, str], gains: Mapping[str, str] | None = None) -> str:
    """A line of the table: what it is of, and a column for each model; beside all but the first, its gain."""
    line, end = title, 30
    for i, (name, value) in enumerate(values.items()):
        end += max(18, len(name) + 2)
        line += f"{value:>{end - len(line)}}"
        if i and gains is not None:
            line += f"{gains.get(name, ''):>26}"
        end += 26 * (i > 0)
    return line.rstrip()


def _with_interval(entry: Mapping[str, Any], percent: bool) -> str:
    """A value with its interval, which is as short as a column is narrow."""
    text, ends = number(entry.get("value"), percent), entry.get("ci95")
    if not ends:
        return text
    low, high = (f"{100 * end:.0f}" if percent else f"{end:.2f}" for end in ends)
    return f"{text} ({low}-{high})"


def model_card(results: Mapping[str, Any]) -> str:
    """The README.md of a fine-tuned model: how it was made, what was measured, and what its author has to fill in."""
    settings = results["settings"]
    base = settings.get("model") or "minialign's bundled model"
    front = ["---", "license: other  # fill in; the base model's license holds for what is made from it"]
    if settings.get("model") and not Path(settings["model"]).exists():
        front.append(f"base_model: {settings['model']}")
    front += ["library_name: diffusers", "pipeline_tag: text-to-image", "tags: [minialign, human-feedback]", "---"]
    return "\n".join(
        [
            *front,
            "",
            "# Fine-tuned with human feedback",
            "",
            f"Made from {base} by minialign {results['minialign']}, reward-weighted likelihood after Lee et al. 2023",
            "(arXiv 2302.12192), in the diffusers layout.",
            "",
            f"## Measured before and after, on {results['counts']['evaluated']} images of each model",
            "",
            "```",
            summary(results),
            "```",
            "",
            *_settings(settings),
        ]
    )


def _settings(settings: Mapping[str, Any]) -> list[str]:
    """The section of a card with all settings that have a value."""
    rows = [f"| {key} | {value} |" for key, value in settings.items() if value is not None]
    return ["## Settings", "", "| setting | value |", "| --- | --- |", *rows, ""]


# ------------------------------------------------------------------------------------------------------- reward models
def reward_table(reward: Mapping[str, Any]) -> str:
    """How well a reward model predicts held-out labels, as text. `reward` is the content of held_out.json."""
    head = "no labels"
    if reward["labels"]:
        head = f"{plural(reward['labels'], 'label')}, {number(reward['good_fraction'], True)} good"
    head += f"; {plural(reward['comparisons'], 'comparison')}." if "comparisons" in reward else "."
    if "terms" in reward:
        head = f"The reward of the images is {reward_words(reward)}.\n{head}"
    if not reward["labels"] and "comparisons" not in reward:
        return f"{head} Nothing was measured."
    lines = []
    for split, held_out in reward["held_out"].items():
        good = held_out["good_fraction"]
        of_prompts = f"of {plural(held_out['prompts'], 'prompt')}"
        summary = f"{split}: {plural(held_out['labels'], 'held-out label')} {of_prompts}"
        if good is not None:
            commoner = "good" if good > 0.5 else "bad"
            summary += f"; always predicting {commoner} is right for {number(max(good, 1 - good), True)}"
        compared = f"{'pairs ranked right':>20}" if "comparisons" in held_out else ""
        summary += f"; {plural(held_out['comparisons'], 'held-out comparison')}" if compared else ""
        heads = f"{'':25}{'accuracy':>9}{'AUC':>7}{'ECE':>7}{'Brier':>7}{'prompt accuracy':>17}{compared}"
        lines += ["", summary, heads]
        for model, by_split in reward["measured"].items():
            if split in by_split:
                lines.append(_predicts(model, by_split[split]))
    if not lines:
        return f"{head} Too few prompts, or labels of one kind only, to hold any out: nothing was measured."
    return "\n".join([head, *lines])


def reward_words(reward: Mapping[str, Any]) -> str:
    """The terms of --reward in words: each with its weight, and how it came to [0,1]."""
    return " + ".join(f"{one['weight']:g} x {one['what']} ({one['how']})" for one in reward["terms"])


def _predicts(model: str, quality: Mapping[str, Any]) -> str:
    """A line of `reward_table`: one model on one kind of prompts."""
    cells = [f"{number(quality.get('accuracy'), True):>9}"]
    cells += [f"{number(quality.get(key), False):>7}" for key in ("auc", "ece", "brier")]
    cells += [f"{number(quality.get('prompt_accuracy'), True):>17}"]
    cells += [f"{number(quality['pairs_ranked_right'], True):>20}"] if "pairs_ranked_right" in quality else []
    return f"  {REWARD_MODELS[model]:23}" + "".join(cells)


def curve_table(curve: Mapping[str, Any]) -> str:
    """How well a reward predicts held-out labels by the number that it learned from, and what twice as many bring."""
    lines = [f"{'labels':>8}{'accuracy':>22}{'AUC':>24}{'pairs ranked right':>24}"]
    for i, labels in enumerate(curve["labels"]):
        cells = []
        for key, percent in (("accuracy", True), ("auc", False), ("pairs", True)):
            ends = curve[key]["ci95"][i]
            bounds = f" ({interval(ends, percent)})" if ends else ""
            cells.append(number(curve[key]["value"][i], percent) + bounds)
        lines.append(f"{labels:8,}{cells[0]:>22}{cells[1]:>24}{cells[2]:>24}")
    splits = f"Means over {curve['splits']} random splits, each with a fifth of the prompts held out, 95 % intervals."
    return "\n".join([*lines, splits, twice_as_many(curve)])


def twice_as_many(curve: Mapping[str, Any]) -> str:
    """One sentence on what twice as many labels would bring, from the last doubling that was measured."""
    (before, now), gain = curve["labels"][-2:], curve["gain"]
    if gain["ci95"] is None:
        return "What twice as many labels would bring cannot be said: too few splits hold out labels of both kinds."
    last = (
        f"the last doubling, from {before:,} to {now:,}, changed the AUC by {difference(gain['value'], False)} (95 % "
        f"interval {interval(gain['ci95'], False, signed=True)})"
    )
    if gain["ci95"][0] <= 0:
        return f"Twice as many labels: no significant gain expected; {last}."
    return f"Doubling the labels again should raise the AUC by at most about the same amount (extrapolated): {last}."


def reward_card(reward: Mapping[str, Any]) -> str:
    """The README.md of a reward model: what it is, how it was made, what was measured."""
    clip = reward["settings"].get("clip") or "minialign's bundled CLIP"
    says = "how likely its annotators were to call an image good for its prompt."
    if not reward["labels"]:
        says = "which of two images of a prompt its annotators were likely to prefer: only differences mean something."
    return f"""# A reward model r(x,z) of images and prompts

Made by minialign {__version__} after Lee et al. 2023 (arXiv 2302.12192), section 3.2: an MLP on the embeddings of
{clip}, frozen.
It predicts, from 0 to 1, {says} It was measured on
held-out images like those that it learned from; how well it predicts for other images is unknown.

    from minialign import RewardModel
    reward = RewardModel.from_pretrained("this folder")
    reward.score(images, prompts)  # PIL images, strings

## Measured on held-out labels

```
{reward_table(reward)}
```

Known prompts have other images among those that it learned from; new prompts have none. ECE is the expected calibration
error in bins of equally many images, Brier the mean squared error. Where people compared images, pairs ranked right is
the fraction of the held-out pairs of which the better image scores higher, ties left out. Prompt accuracy is the
fraction of the good images that score higher for their own prompt than for every contrastive one. The raw CLIP score is
mapped to [0,1] by a logistic regression on the labels that were learned from.

""" + "\n".join(_settings(reward["settings"]))
