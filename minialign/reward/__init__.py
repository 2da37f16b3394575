"""Stage 2 of the method: learn the reward model r(x,z) from the labels of a run, measure it, score all images."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.cache import clip_digest
from ..engine.run import REDO, Run, digest, file_digest
from ..engine.settings import of_stage
from ..feedback import FeedbackStore
from ..files import InputError, atomic, checksum, read_bytes, read_json, write_json, write_tensors
from ..measures import measure, platt, ranked_right
from ..models.clip import CLIP
from ..models.reward import RewardModel
from ..pages.cards import reward_card
from ..pages.figures import plot_calibration
from .curve import learning_curve
from .given import LEARNED, MODEL, Rewards, check_terms, load_reward, read_terms, score_images, scorer
from .labels import (
    SUBSETS,
    Compared,
    Labelled,
    Split,
    check_labels,
    read_comparisons,
    read_contrastive,
    read_labelled,
    read_labels,
    split_feedback,
    train,
    with_feedback,
)
from .trainer import rewards_of

__all__ = [
    "LEARNED",
    "MODEL",
    "REWARDS",
    "RewardModel",
    "check_terms",
    "learn",
    "learn_from_run",
    "load_reward",
    "outdated_stages",
    "read_measured",
    "read_terms",
    "scorer",
    "train",
]
REWARDS = Path("cache") / "rewards.safetensors"  # of all images of a run, in the store's order


def learn(folder: Path, clip: CLIP, settings: dict[str, Any], log: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Train on the labels of the run `folder`, with and without the auxiliary loss; the content of held_out.json.

    `folder`/reward gets the model with it, what was measured, a reliability diagram and a card; `folder`/cache the
    features and the rewards of all images in the store's order. InputError where there is nothing to learn from.
    """
    data = read_labelled(folder, clip, settings)
    weights = {"auxiliary": settings["lambda"], "plain": 0.0} if settings["lambda"] else {"plain": 0.0}
    weights = weights if data.labels else {"comparisons": 0.0}
    models: dict[str, RewardModel] = {}
    for name, weight in weights.items():
        models[name] = train(data, settings, weight, log if not models else lambda row: None)
    model = next(iter(models.values()))
    measured = count_labels(data.labels, data.prompts, data.split, settings, data.compared)
    measured["measured"] = measure_rewards(data, models)
    everything = torch.arange(len(data.images)), data.columns[:, :1]
    rewards = rewards_of(model, data.images, data.texts, *(rows.to(data.images.device) for rows in everything))
    write_reward(folder, model, measured, rewards[:, 0])
    return measured


def count_labels(
    labels: Mapping[int, float],
    prompts: Mapping[int, object],
    split: Split,
    settings: dict[str, Any],
    compared: Mapping[str, list[Compared]] = {},
) -> dict[str, Any]:
    """Numbers of labels and comparisons, and of those held out; prompts: what tells the prompts of rows apart."""
    good = [label > 0.5 for label in labels.values()]
    held_out: dict[str, dict[str, Any]] = {}
    for subset, rows in zip(SUBSETS, split[1:]):
        pairs = compared.get(subset, [])
        if rows or pairs:
            held_out[subset] = {
                "labels": len(rows),
                "prompts": len({prompts[i] for i in {*rows, *(i for pair in pairs for i in pair[:2])}}),
                "good_fraction": sum(labels[i] > 0.5 for i in rows) / len(rows) if rows else None,
            } | ({"comparisons": len(pairs)} if pairs else {})
    counts = {
        "labels": len(good),
        "good_fraction": sum(good) / len(good) if good else None,
        "held_out": held_out,
        "settings": {setting.name: settings[setting.name] for setting in of_stage("reward")},
    }
    return counts | ({"comparisons": sum(map(len, compared.values()))} if compared else {})


def measure_rewards(data: Labelled, models: dict[str, RewardModel]) -> dict[str, dict[str, Any]]:
    """`measure` of each model, and of the raw CLIP score, on the held-out labels by SUBSETS; `ranked_right` of pairs.

    A logistic regression on the labels that were not held out brings the CLIP score to [0,1].
    """
    measured: dict[str, dict[str, Any]] = {name: {} for name in (*models, "clip")}
    fitted = data.pairs(data.split.learn)
    cosine = torch.cosine_similarity(data.images[fitted.image], data.texts[fitted.prompts[:, 0]])
    a, b = platt(cosine, fitted.label) if data.split.held_out else (1.0, 0.0)
    for subset, rows in data.split.held_out.items():
        pairs = data.pairs(rows)
        for name, model in models.items():
            rewards = rewards_of(model, data.images, data.texts, pairs.image, pairs.prompts)
            measured[name][subset] = measure(rewards[:, 0], pairs.label, rewards[:, 1:])
        cosine = torch.cosine_similarity(data.images[pairs.image][:, None], data.texts[pairs.prompts], dim=-1)
        score = (a * cosine + b).sigmoid().masked_fill(pairs.prompts < 0, float("-inf"))
        measured["clip"][subset] = measure(score[:, 0], pairs.label, score[:, 1:])
    for subset in SUBSETS:
        if (compared := data.comparisons(subset)) is not None:
            text, first, second = data.texts[compared.prompt], data.images[compared.first], data.images[compared.second]
            scores: dict[str, Callable[[Tensor, Tensor], Tensor]] = {**models, "clip": torch.cosine_similarity}
            for name, scored in scores.items():
                right = ranked_right(scored(first, text), scored(second, text), compared.preferred)
                measured[name].setdefault(subset, {})["pairs_ranked_right"] = right
    return measured


def write_reward(folder: Path, model: RewardModel, measured: dict[str, Any], rewards: Tensor) -> None:
    """What the stage leaves in a run: the model, what was measured, a card, and the rewards (I,) of all images."""
    out = folder / "reward"
    model.save_pretrained(out)
    write_json(out / "held_out.json", measured | {"sha256": checksum(out / MODEL)})
    with atomic(out / "README.md") as temporary:
        temporary.write_text(reward_card(measured), encoding="utf-8")
    if any(counts["labels"] for counts in measured["held_out"].values()):
        plot_calibration(out / "calibration.png", measured["measured"])
    write_tensors(folder / REWARDS, {"reward": rewards})


def read_measured(folder: Path) -> dict[str, Any]:
    """What was measured of the reward model in a folder; InputError where the file is damaged."""
    path = folder / "held_out.json"
    measured = read_json(path)
    if not {"labels", "good_fraction", "held_out", "measured", "settings"} <= measured.keys():
        raise InputError(f"{path}: damaged; accepted: the file as it was, or --fresh")
    return measured


def labels_digest(folder: Path, soft: bool, needed: bool = True) -> dict[str, str]:
    """What stands for the images and the feedback of a run; InputError where feedback is `needed` and there is none.

    Also where an image is missing or not the one that was labelled.
    """
    content, _, labels = read_labels(folder, soft)
    with closing(FeedbackStore(folder, read_only=True)) as store:
        store.check_images()
    comparisons = read_comparisons(folder)
    if needed and not labels and not comparisons:
        check_labels(folder, labels, 0)
    digests = {"images": digest(json.dumps(content)), "labels": digest(json.dumps(sorted(labels.items())))}
    return digests | ({"comparisons": digest(json.dumps(comparisons))} if comparisons else {})


def outdated_stages(run: Run) -> list[str]:
    """In words, which stages of a run were made from labels or rewards that have changed since."""
    reasons = {}
    if "reward" in run.stages:
        reasons["reward"] = run.outdated("reward", **labels_digest(run.folder, run.settings.get("soft", False), False))
    if "finetune" in run.stages and (run.folder / REWARDS).exists():
        reasons["finetune"] = run.outdated("finetune", rewards=file_digest(run.folder / REWARDS))
    return [f"stage {name} is out of date: {why}; {REDO}" for name, why in reasons.items() if why]


def learn_from_run(
    run: Run, settings: dict[str, Any], device: torch.device, redo: bool = False, curve: bool = False
) -> None:
    """Stage 2 of a run, unless it is done: the rewards of all images, and RUN/reward, which --reward may do without.

    curve: add `learning_curve` on the labels of the run to reward/held_out.json.
    """
    rewards = Rewards(run.folder, settings, device)

    def inputs() -> dict[str, str]:
        made_from = labels_digest(run.folder, settings["soft"], rewards.learned)
        if rewards.learned:
            made_from["clip"] = digest(clip_digest(rewards.clip(settings["clip"])))
            if settings["contrastive"] is not None:  # a mistake in it is reported before an earlier result is removed
                with closing(FeedbackStore(run.folder, read_only=True)) as store:
                    read_contrastive(Path(settings["contrastive"]), [image.prompt for image in store.images()])
                made_from["contrastive prompts"] = digest(read_bytes(Path(settings["contrastive"])))
        if redo and rewards.functions:  # one that fails is reported before an earlier result is removed
            stored = read_labels(run.folder)[1]
            for term in rewards.functions:
                rewards.raw(term, [image.path for image in stored], [image.prompt for image in stored])
        return made_from if rewards.only_learned else made_from | {"reward": rewards.digest()}

    why = "a reward model learns from the labels and scores all images"
    if not rewards.only_learned:
        why = f"all images are scored by --reward {settings['reward']}"
    with run.stage("reward", why, settings, inputs, redo=redo) as todo:
        try:
            if todo and rewards.learned:
                learn(run.folder, rewards.clip(settings["clip"]), settings, run.log("reward"))
            if todo and not rewards.only_learned:
                score(run.folder, rewards, settings)
        except InputError:  # such as a function that fails: its author corrects it, and the stage begins anew
            run.forget("reward")
            raise
    if curve:
        data = read_labelled(run.folder, rewards.clip(settings["clip"]), settings)
        measured = read_measured(run.folder / "reward") | {"curve": learning_curve(data, settings)}
        write_json(run.folder / "reward" / "held_out.json", measured)


def score(folder: Path, rewards: Rewards, settings: dict[str, Any]) -> None:
    """Stage 2 with --reward: the rewards of all images; reward/held_out.json says how they came about.

    What `learn` measured of the model that is one of several terms stays there.
    """
    _, stored, labels = read_labels(folder, settings["soft"])
    prompts = [image.prompt for image in stored]
    if rewards.learned:  # the same labels are held out from this fitting as from the model
        data = read_labelled(folder, rewards.clip(settings["clip"]), settings)
        split, compared, measured = data.split, data.compared, read_measured(folder / "reward")
    else:
        comparisons = read_comparisons(folder)
        known = {i: prompts[i] for i in with_feedback(labels, comparisons)}
        split, compared = split_feedback(known, labels, comparisons, settings["seed"])
        measured = count_labels(labels, known, split, settings, compared) | {"measured": {}}
    reward, terms, quality = score_images(rewards, [image.path for image in stored], prompts, labels, split, compared)
    measured["measured"]["given"] = quality
    write_json(folder / "reward" / "held_out.json", measured | {"terms": terms})
    if split.held_out:
        plot_calibration(folder / "reward" / "calibration.png", measured["measured"])
    write_tensors(folder / REWARDS, {"reward": reward})
