"""What a normal run looks like: normal.json, the curves and changes of several seeds of the main job with its defaults.

    python -m minialign.pages.normal RUN RUN RUN

writes it from finished runs that differ in their seed alone. report.html draws it as bands behind a run's curves and
says where the run leaves them. It belongs to one model with its settings: a run of others is not compared with it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..engine.commands import Parser, run_command
from ..engine.run import is_run, read_metrics
from ..engine.settings import BY_NAME
from ..files import InputError, read_json, write_json
from ..measures import PICTURE

FILE = Path(__file__).with_name("normal.json")
SECTIONS = 5  # of a curve: in each a run's mean is compared with all that was logged in it
CURVES = ("reward mse", "reward classification", "finetune model_loss", "finetune pretrain_loss",
          "finetune gradient_norm")  # fmt: skip
CHANGES = ("simulated annotator", "reward", "diversity", *PICTURE)  # from the base to the fine-tuned model


# ------------------------------------------------------------------------------------------------ what a run has left
def read_curves(path: Path) -> dict[str, np.ndarray]:
    """Curves of metrics.jsonl, "stage key" -> (N,2) of steps and values; a step that was logged again counts once."""
    curves: dict[str, dict[int, float]] = {}
    for row in read_metrics(path) if path.exists() else []:
        for key in row.keys() - {"stage", "step"}:
            if row[key] is not None:
                curves.setdefault(f"{row['stage']} {key}", {})[row["step"]] = row[key]
    return {name: np.array(sorted(values.items()), dtype=float).reshape(-1, 2) for name, values in curves.items()}


def read_changes(evaluation: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What changed from base to fine-tuned model, of CHANGES: "gain", and "gain_ci95" where there is one."""
    base, tuned = [*(evaluation.get("models") or {}), "", ""][:2]
    judged, picture = evaluation.get("judged") or {}, evaluation.get("picture") or {}
    entries = {name: (table.get(tuned) or {}).get("overall") or {} for name, table in judged.items()}
    entries |= {name: table.get(tuned) or {} for name, table in picture.items()}
    before, after = ((evaluation.get("diversity") or {}).get(model) for model in (base, tuned))
    if before is not None and after is not None:
        entries["diversity"] = {"gain": after - before}
    return {name: entries[name] for name in CHANGES if entries.get(name, {}).get("gain") is not None}


def belongs_to(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The model and the settings that decide how a run goes: all but its seed, and those that change nothing."""
    kept = {key: value for key, value in settings.items() if key in BY_NAME and not BY_NAME[key].free and key != "seed"}
    return {"model_digest": config.get("model_digest"), "settings": dict(sorted(kept.items()))}


# ------------------------------------------------------------------------------------------------------------ the band
def in_sections(points: np.ndarray, steps: float) -> list[np.ndarray]:
    """The values of a curve (N,2) in each of SECTIONS equal sections of its steps, 1 to `steps`."""
    section = np.ceil(points[:, 0] * SECTIONS / steps).clip(1, SECTIONS) - 1
    return [points[section == i, 1] for i in range(SECTIONS)]


def make_band(runs: Sequence[Path]) -> dict[str, Any]:
    """The content of normal.json from finished runs; InputError unless they differ in their seed, and in it alone."""
    contents = [_read_run(run) for run in runs]
    for run, one in zip(runs[1:], contents[1:]):
        if one["belongs to"] != contents[0]["belongs to"]:
            raise InputError(f"{run}: has another model or other settings than {runs[0]}; accepted: another seed alone")
    seeds = [one["seed"] for one in contents]
    if len(set(seeds)) < max(2, len(runs)):
        raise InputError(f"runs of seeds {', '.join(map(str, seeds))}; accepted: two runs or more, each with its own")
    curves: dict[str, Any] = {}
    for name in CURVES:
        if all(name in one["curves"] for one in contents):
            steps = max(one["curves"][name][-1, 0] for one in contents)
            split = zip(*(in_sections(one["curves"][name], steps) for one in contents))
            sections = [np.concatenate(section) for section in split]
            ends = [(section.min(), section.max()) for section in sections]
            low = [_short(end - abs(end) / 2000) for end, _ in ends]  # so that rounding leaves no value outside
            high = [_short(end + abs(end) / 2000) for _, end in ends]
            curves[name] = {"steps": int(steps), "low": low, "high": high}
    changes = {
        name: [one["changes"][name]["gain"] for one in contents]
        for name in CHANGES
        if all(name in one["changes"] for one in contents)
    }
    return {"minialign": __version__, "seeds": seeds, **contents[0]["belongs to"], "curves": curves, "changes": changes}


def _read_run(run: Path) -> dict[str, Any]:
    results = read_json(run / "results.json") if is_run(run) and (run / "results.json").is_file() else {}
    if "evaluation" not in results:
        raise InputError(f"{run}: no finished run; accepted: a folder of python -m minialign.finetune")
    curves = read_curves(run / "metrics.jsonl")
    if any(len(curves[name]) < SECTIONS for name in CURVES if name in curves):
        raise InputError(f"{run}: curves of fewer than {SECTIONS} logged steps; accepted: longer runs")
    settings = results["settings"]
    return {
        "seed": settings["seed"],
        "belongs to": belongs_to(read_json(run / "config.json"), settings),
        "curves": curves,
        "changes": read_changes(results["evaluation"]),
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


# -------------------------------------------------------------------------------------------------- a run and the band
def unlike(band: Mapping[str, Any], config: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """In words, why a run is not one that the band is of; "" where it is."""
    mine = belongs_to(config, settings)
    if mine["model_digest"] != band["model_digest"]:
        return "another model"
    other = []
    for key in dict.fromkeys([*band["settings"], *mine["settings"]]):
        if key in BY_NAME:  # what one of them lacks is younger than it, and had its default
            a, b = (one["settings"].get(key, BY_NAME[key].bundled) for one in (mine, band))
            other += [BY_NAME[key].flag] * (a != b)
    return f"other settings ({', '.join(other)})" if other else ""


def leaves(points: np.ndarray, band: Mapping[str, Any]) -> list[tuple[int, int, str]]:
    """Where a curve (N,2) leaves its band: (first step, last step, "above" or "below").

    It does in the sections where its mean is above all that other seeds logged there, or below: single values scatter,
    and of few seeds one in two would lie outside.
    """
    stretches: list[tuple[int, int, str]] = []
    for i, values in enumerate(in_sections(points, band["steps"])):
        above, below = len(values) and values.mean() > band["high"][i], len(values) and values.mean() < band["low"][i]
        if not above and not below:
            continue
        first, last = (round(edge * band["steps"] / SECTIONS) for edge in (i, i + 1))
        side = "above" if above else "below"
        if stretches and stretches[-1][1:] == (first, side):
            first = stretches.pop()[0]
        stretches.append((first, last, side))
    return stretches


# --------------------------------------------------------------------------------------------------------- the command
def main() -> None:
    parser = Parser(prog="python -m minialign.pages.normal", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="finished runs that differ in --seed alone")
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE", help="(default: the package's normal.json)")
    args: argparse.Namespace = parser.parse_args()
    band = make_band(args.runs)
    write_json(args.out, band)
    print(f"{args.out}: {len(json.dumps(band)):,} bytes of {len(args.runs)} runs")


if __name__ == "__main__":
    run_command(main)
