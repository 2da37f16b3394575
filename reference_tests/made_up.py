"""Run folders with made-up but plausible numbers, in the format that the stages leave, for tests of pages."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from PIL import Image

HOSTILE = "a \"red\" <script>alert(1)</script> & 'blue' star"
MODELS = ("base", "fine-tuned")
GROUPS = ("overall", "count", "color", "background", "combination", "seen", "new combinations", "new objects")


def judged(before: list[float], after: list[float], half: float = 0.04) -> dict[str, Any]:
    """What a judge says of both models by group, 640 images of each."""

    def entry(value: float) -> dict[str, Any]:
        return {"value": value, "n": 640, "ci95": [value - half, value + half]}

    base = {group: entry(value) for group, value in zip(GROUPS, before)}
    tuned = {group: entry(value) for group, value in zip(GROUPS, after)}
    for group, one in tuned.items():
        gain = one["value"] - base[group]["value"]
        one |= {"gain": gain, "gain_ci95": [gain - half - 0.01, gain + half + 0.01]}
    return dict(zip(MODELS, (base, tuned)))


def of_reward(auc: float) -> dict[str, Any]:
    """What a reward model's predictions measured, in bins of equal mass."""
    rewards = (0.02, 0.04, 0.07, 0.12, 0.3, 0.62, 0.85, 0.93, 0.96, 0.99)
    bins = [{"predicted": x, "observed": max(0.0, x - 0.01 * i), "count": 29 + i % 2} for i, x in enumerate(rewards)]
    return {"accuracy": auc - 0.05, "auc": auc, "ece": 0.031, "brier": 0.112, "prompt_accuracy": 0.744} | {
        "calibration": bins
    }


def of_picture(value: float, gain: float, half: float = 0.01) -> dict[str, Any]:
    """A number of the pictures of both models."""
    base, tuned = ({"value": x, "n": 640, "ci95": [x - half, x + half]} for x in (value, value + gain))
    return dict(zip(MODELS, (base, tuned | {"gain": gain, "gain_ci95": [gain - half, gain + half]})))


def results() -> dict[str, Any]:
    """A results.json of the bundled model."""
    before = [0.481, 0.532, 0.613, 0.584, 0.195, 0.496, 0.467, 0.352]
    after = [0.762, 0.793, 0.884, 0.855, 0.516, 0.787, 0.738, 0.611]
    curve = {"value": [0.48, 0.6, 0.66, 0.7], "ci95": [[0.44, 0.52], [0.56, 0.64], [0.62, 0.7], [0.66, 0.74]]}
    best = {"value": [0.76, 0.82, 0.85, 0.87], "ci95": [[0.72, 0.8], [0.78, 0.86], [0.81, 0.89], [0.83, 0.91]]}
    both = {split: of_reward(auc) for split, auc in (("known prompts", 0.918), ("new prompts", 0.884))}
    clip = {split: of_reward(auc) for split, auc in (("known prompts", 0.831), ("new prompts", 0.822))}
    plain = {split: of_reward(auc) for split, auc in (("known prompts", 0.923), ("new prompts", 0.861))}
    return {
        "minialign": "0.1.0",
        "evaluation": {
            "judge": "simulated annotator",
            "models": {
                "base": {"source": "bundled", "images": "compare/base-1234abcd"},
                "fine-tuned": {"source": "runs/shapes/model", "images": "compare/fine-tuned-1234abcd"},
            },
            "reference": "fresh drawings of the prompts",
            "judged": {
                "simulated annotator": judged(before, after),
                "reward": judged([0.412] * 8, [0.683] * 8, 0.012),
                "CLIP score": judged([0.2431], [0.2438], 0.002),
            },
            "frechet": dict(zip(MODELS, (3.41, 4.09))),
            "cmmd": dict(zip(MODELS, (1.207, 1.355))),
            "diversity": dict(zip(MODELS, (0.312, 0.268))),
            "readable": dict(zip(MODELS, (0.957, 0.943))),
            "gains": {"diversity": {"fine-tuned": {"gain": -0.044, "gain_ci95": [-0.061, -0.027]}},
                      "readable": {"fine-tuned": {"gain": -0.014, "gain_ci95": [-0.031, 0.003]}}},
            "picture": {"saturation": of_picture(0.401, 0.023), "brightness": of_picture(0.655, -0.012)},
            "best_of_n": {"reward": {"simulated annotator": dict(zip(MODELS, (curve, best)))}},
            "samples": [],
        },
        "comparisons": {},
        "reward": {
            "labels": 1280, "good_fraction": 0.486, "settings": {"lambda": 0.5, "clip": None},
            "held_out": {"known prompts": {"labels": 192, "prompts": 151, "good_fraction": 0.479},
                         "new prompts": {"labels": 217, "prompts": 23, "good_fraction": 0.502}},
            "measured": {"auxiliary": both, "plain": plain, "clip": clip},
        },
        "seconds": {"generate": 61.2, "label": 1.9, "reward": 14.8, "finetune": 112.3, "evaluate": 34, "total": 224.8},
        "interruptions": 0,
        "settings": {"model": None, "seed": 3, "steps": 300, "beta": 0.1, "batch_size": 64, "note": HOSTILE},
        "counts": {"images": 2560, "labels": 1280, "evaluated": 640},
    }  # fmt: skip


def sample_pairs(folder: Path, pairs: list[tuple[str, list[str]]], size: int = 64) -> list[dict[str, Any]]:
    """Samples of prompts with their groups, and their images in the run folder."""
    rng, samples = random.Random(0), []
    (folder / "compare").mkdir(parents=True, exist_ok=True)
    for i, (prompt, groups) in enumerate(pairs):
        images = {model: f"compare/{model}-{i:03d}.png" for model in MODELS}
        for place in images.values():
            Image.new("RGB", (size, size), tuple(rng.randrange(256) for _ in range(3))).save(folder / place)
        verdicts = {"base": "bad", "fine-tuned": ("good", "skip")[i % 2]}
        samples.append({"prompt": prompt, "seed": i, "groups": groups, "images": images, "verdicts": verdicts})
    return samples


def write_run(folder: Path, values: dict[str, Any], size: int = 64) -> Path:
    """A run folder with `values` as its results, two samples unless it has some, and its seed's training curves."""
    rng = random.Random(values["settings"].get("seed", 0))
    two = [(HOSTILE, ["color", "new combinations"]), ("two stars", ["count", "seen"])]
    values["evaluation"]["samples"] = values["evaluation"]["samples"] or sample_pairs(folder, two, size)
    folder.mkdir(exist_ok=True)
    lines: list[dict[str, Any]] = []
    for i in range(1, 51):
        loss = 0.1 + 0.15 * math.exp(-i / 9) + 0.02 * rng.random()
        lines.append({"stage": "reward", "step": 20 * i, "loss": 1.0, "mse": loss, "classification": 9 * loss})
    for i in range(1, 41):
        losses = {"model_loss": rng.lognormvariate(-2, 0.3), "pretrain_loss": rng.lognormvariate(-1.6, 0.4)}
        rate = 1e-3 * min(1, i / 2) * (0.5 + 0.5 * math.cos(math.pi * i / 40))
        losses |= {"gradient_norm": rng.lognormvariate(-1, 0.5), "learning_rate": rate}
        lines.append({"stage": "finetune", "step": 10 * i, "loss": losses["model_loss"], **losses})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"stage": "finet')
    (folder / "results.json").write_text(json.dumps(values))
    world = "shapes" if values["settings"].get("model") is None else ""
    config = {"minialign": "0.1.0", "world": world, "model_digest": f"digest:{world}"}
    config |= {"settings": values["settings"], "versions": {"torch": "2.99.1"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model").mkdir(exist_ok=True)
    return folder
