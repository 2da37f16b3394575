"""Stage 2 of the method: learn the reward model r(x,z) from the labels of a run, measure it, score all images."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.cache import clip_digest
from ..engine.run import REDO, Run, digest, file_digest
from ..engine.settings import of_stage
from ..files import InputError, atomic, checksum, read_json, write_json, write_tensors
from ..measures import measure, platt
from ..models.clip import CLIP
from ..models.pretrained import WEIGHTS
from ..models.reward import RewardModel
from ..pages.cards import reward_card
from ..pages.figures import plot_calibration
from .labels import Labelled, check_labels, read_labelled, read_labels
from .trainer import rewards_of, train_reward

__all__ = [
    "MODEL",
    "REWARDS",
    "RewardModel",
    "learn",
    "learn_from_run",
    "load_reward",
    "outdated_stages",
    "read_measured",
    "train",
]
MODEL = f"{WEIGHTS[1]}.safetensors"
REWARDS = Path("cache") / "rewards.safetensors"  # of all images of a run, in the store's order


def learn(folder: Path, clip: CLIP, settings: dict[str, Any], log: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Train on the labels of the run `folder`, with and without the auxiliary loss; the content of held_out.json.

    `folder`/reward gets the model with it, what was measured, a reliability diagram and a card; `folder`/cache the
    features and the rewards of all images in the store's order. InputError where there is nothing to learn from.
    """
    data = read_labelled(folder, clip, settings)
    weights = {"auxiliary": settings["lambda"], "plain": 0.0} if settings["lambda"] else {"plain": 0.0}
    models: dict[str, RewardModel] = {}
    for name, weight in weights.items():
        models[name] = train(data, settings, weight, log if not models else lambda row: None)
    model = next(iter(models.values()))
    good = [label > 0.5 for label in data.labels.values()]
    measured = {
        "labels": len(good),
        "good_fraction": sum(good) / len(good),
        "held_out": {
            name: {
                "labels": len(rows),
                "prompts": len({data.prompts[i] for i in rows}),
                "good_fraction": sum(data.labels[i] > 0.5 for i in rows) / len(rows),
            }
            for name, rows in data.held_out.items()
        },
        "measured": judge_rewards(data, models),
        "settings": {setting.name: settings[setting.name] for setting in of_stage("reward")},
    }
    everything = torch.arange(len(data.images)), data.columns[:, :1]
    rewards = rewards_of(model, data.images, data.texts, *(rows.to(data.images.device) for rows in everything))
    write_reward(folder, model, measured, rewards[:, 0])
    return measured


def train(
    data: Labelled,
    settings: dict[str, Any],
    weight_of_classification: float,
    log: Callable[[dict[str, Any]], None] = lambda row: None,
) -> RewardModel:
    """`train_reward` on the labels that are not held out, with the settings of a run."""
    config = {"width": data.images.shape[1], "hidden": settings["hidden"], "clip": settings["clip"]}
    return train_reward(
        data.images, data.texts, data.pairs(data.split.learn), config,
        steps=settings["reward_steps"], batch_size=settings["reward_batch_size"],
        learning_rate=settings["reward_learning_rate"], weight_of_classification=weight_of_classification,
        temperature=settings["temperature"], balanced=settings["balanced"], seed=settings["seed"], log=log,
    )  # fmt: skip


def judge_rewards(data: Labelled, models: dict[str, RewardModel]) -> dict[str, dict[str, Any]]:
    """`measure` of each model, and of the raw CLIP score, on the held-out labels by PARTS.

    A logistic regression on the labels that were not held out brings the CLIP score to [0,1].
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in (*models, "clip")}
    fitted = data.pairs(data.split.learn)
    cosine = torch.cosine_similarity(data.images[fitted.image], data.texts[fitted.prompts[:, 0]])
    a, b = platt(cosine, fitted.label) if data.held_out else (1.0, 0.0)
    for part, rows in data.held_out.items():
        pairs = data.pairs(rows)
        for name, model in models.items():
            rewards = rewards_of(model, data.images, data.texts, pairs.image, pairs.prompts)
            found[name][part] = measure(rewards[:, 0], pairs.label, rewards[:, 1:])
        cosine = torch.cosine_similarity(data.images[pairs.image][:, None], data.texts[pairs.prompts], dim=-1)
        score = (a * cosine + b).sigmoid().masked_fill(pairs.prompts < 0, float("-inf"))
        found["clip"][part] = measure(score[:, 0], pairs.label, score[:, 1:])
    return found


def write_reward(folder: Path, model: RewardModel, measured: dict[str, Any], rewards: Tensor) -> None:
    """What the stage leaves in a run: the model, what was measured, a card, and the rewards (I,) of all images."""
    out = folder / "reward"
    model.save_pretrained(out)
    write_json(out / "held_out.json", measured | {"sha256": checksum(out / MODEL)})
    with atomic(out / "README.md") as temporary:
        temporary.write_text(reward_card(measured), encoding="utf-8")
    if measured["held_out"]:
        plot_calibration(out / "calibration.png", measured["measured"])
    write_tensors(folder / REWARDS, {"reward": rewards})


def read_measured(folder: Path) -> dict[str, Any]:
    """What was measured of the reward model in a folder; InputError where the file is damaged."""
    path = folder / "held_out.json"
    measured = read_json(path)
    if not {"labels", "good_fraction", "held_out", "measured", "settings"} <= measured.keys():
        raise InputError(f"{path}: damaged; accepted: the file as it was, or --fresh")
    return measured


def load_reward(folder: Path, device: torch.device | str = "cpu") -> RewardModel:
    """The reward model of a folder; InputError where its weights are not those that were measured."""
    measured = folder / "held_out.json"
    expected = read_json(measured).get("sha256") if measured.exists() else None
    if expected is not None and checksum(folder / MODEL) != expected:
        raise InputError(f"{folder / MODEL}: damaged: its SHA-256 is not that in held_out.json; learn it again")
    return RewardModel.from_pretrained(folder, device=device)


def labels_digest(folder: Path, soft: bool) -> dict[str, str]:
    """What stands for the images and the labels that a reward model is made from; InputError where there are none."""
    content, _, labels = read_labels(folder, soft)
    if not labels:
        check_labels(folder, labels, 0)
    return {"images": digest(json.dumps(content)), "labels": digest(json.dumps(sorted(labels.items())))}


def outdated_stages(run: Run) -> list[str]:
    """In words, which stages of a run were made from labels or rewards that have changed since."""
    found = {}
    if "reward" in run.stages:
        found["reward"] = run.outdated("reward", **labels_digest(run.folder, run.settings.get("soft", False)))
    if "finetune" in run.stages and (run.folder / REWARDS).exists():
        found["finetune"] = run.outdated("finetune", rewards=file_digest(run.folder / REWARDS))
    return [f"stage {name} is out of date: {why}; {REDO}" for name, why in found.items() if why]


def learn_from_run(run: Run, settings: dict[str, Any], device: torch.device, redo: bool = False) -> None:
    """Stage 2 of a run, unless it is done: RUN/reward and the rewards of all images."""

    @cache
    def clip() -> CLIP:
        return CLIP.from_pretrained(settings["clip"], device=device)

    def inputs() -> dict[str, str]:
        return labels_digest(run.folder, settings["soft"]) | {"clip": digest(clip_digest(clip()))}

    why = "a reward model learns from the labels and scores all images"
    with run.stage("reward", why, settings, inputs, redo=redo) as todo:
        if todo:
            learn(run.folder, clip(), settings, run.log("reward"))
