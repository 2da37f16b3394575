"""How a cell is computed: its reward, its fine-tuning and its evaluation, by the stages called in turn.

A result is one level of numbers by metric, "aligned", and by metric and group of prompts, "aligned, seen".
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import ImageFiles, image_pairs, open_image
from ..data.cache import features
from ..engine.run import Run, digest
from ..evaluate import Judged, TestItem, evaluate_model, test_items
from ..evaluate.judges import FEATURES, REWARD, judge_images
from ..evaluate.sets import clean, outcome_fractions, rated
from ..feedback import SIMULATED
from ..files import write_tensors
from ..finetune import finetune_pipeline
from ..finetune.trainer import model_weights, stored_images
from ..measures import diversity, frechet_distance, measure, preferred
from ..models.clip import CLIP
from ..models.reward import RewardModel, embed_images
from ..pipeline import Pipeline
from ..prompts import CATEGORIES
from ..reward import REWARDS, load_reward, train
from ..reward.labels import Labelled, Split, contrastive_table, read_labelled
from ..shapes.world import pretraining_pairs, shown
from .cells import CELLS, POOL, SET, SIZES, Cell, Score, cell_settings, training_calls

Result = dict[str, Any]


@dataclass(frozen=True)
class World:
    """What the cells of a seed share: N images for feedback and their labels, the tests, the reward that judges."""

    folder: Path  # of the main job
    seed: int
    size: str
    items: list[TestItem]
    clip: CLIP
    reward: RewardModel  # of the main job; it judges all cells
    paths: list[Path]  # of the N images
    prompts: list[str]
    data: Labelled
    pool_items: list[TestItem]  # POOL of each prompt, one prompt after the other
    pool: Judged  # the base model's images of these

    @property
    def settings(self) -> dict[str, Any]:
        return cell_settings("default", self.seed, self.size)

    @property
    def text(self) -> Tensor:
        """The embedding (N,E) of each image's prompt."""
        return self.data.texts[self.data.columns[:, 0]]


@cache
def world(folder: Path, seed: int, size: str) -> World:
    """What the main job of a seed left in `folder`, the test of the study, and the pool of images, sampled once."""
    run, settings, clip = Run(folder / f"seed-{seed}"), cell_settings("default", seed, size), CLIP.from_pretrained()
    several = {"test_images": SIZES[size]["set_prompts"] * POOL, "test_images_per_prompt": POOL}
    pool_items, reward = test_items(run, settings | several), load_reward(run.folder / "reward")
    pool = evaluate_model(run, "pool", None, Pipeline.from_pretrained, pool_items, settings, clip, reward)
    paths, texts = stored_images(run.folder)
    data = read_labelled(run.folder, clip, settings)
    return World(
        run.folder, seed, size, test_items(run, settings), clip, reward, paths, texts, data, pool_items, pool
    )  # fmt: skip


def by_group(items: Sequence[TestItem]) -> Iterator[tuple[str, list[int]]]:
    """The groups of prompts, seen ones and kinds of others, and the rows of each; categories are left out."""
    for group in dict.fromkeys(name for item in items for name in item.groups if name not in CATEGORIES):
        yield group, [i for i, item in enumerate(items) if group in item.groups]


# ---------------------------------------------------------------------------------------------------------- the reward
def labels_of(cell: Cell, labels: dict[int, float], prompts: Sequence[str], seed: int) -> dict[int, float]:
    """The labels that a cell's reward learns from: a fraction of each prompt's, as most of its labellers give them.

    A smaller fraction is within a larger one; who errs with a small probability errs there with a larger one, too. One
    labeller is the first of three.
    """
    rng, known = random.Random(seed), sorted(labels)
    rng.shuffle(known)
    of_prompt: dict[str, list[int]] = {}
    for i in known:
        of_prompt.setdefault(prompts[i], []).append(i)
    place = {i: (k + rng.random()) / len(same) for same in of_prompt.values() for k, i in enumerate(same)}
    wrong = {i: [rng.random() < cell.flipped for _ in range(3)][: cell.labellers] for i in known}
    known.sort(key=lambda i: place[i])
    known = known[: max(8, round(cell.fraction * len(known)))]  # so few that --quick keeps should hold a good one
    return {i: labels[i] if 2 * sum(wrong[i]) < cell.labellers else 1 - labels[i] for i in known}


def relabelled(cell: Cell, here: World) -> Labelled:
    """The labels as the cell has them; those that are held out stay true, and contrast is with prompts that it has."""
    data = here.data
    labels = labels_of(cell, {i: data.labels[i] for i in data.split.learn}, here.prompts, here.seed)
    learn = [i for i in data.split.learn if i in labels]
    among = list(dict.fromkeys(here.prompts[i] for i in learn))
    texts, columns = contrastive_table(here.prompts, among, {text: text for text in here.prompts}, here.seed)
    _, embeds = features(here.folder / FEATURES, here.clip, [], texts)
    split = Split(learn, data.split.known, data.split.new)
    return data._replace(texts=embeds, columns=columns, labels=data.labels | labels, split=split)


def scoring(cell: Cell, here: World, settings: dict[str, Any]) -> tuple[Score, list[int]]:
    """What gives rewards in a cell, and the images with the labels that it learned them from."""
    data = relabelled(cell, here) if cell.relearns else here.data
    rows = sorted(data.split.learn)
    if cell.score is not None:
        return partial(cell.score, data), rows
    if not cell.relearns:
        return here.reward, rows
    return train(data, settings, settings["lambda"]), rows


@torch.no_grad()
def measured(score: Score, here: World) -> Result:
    """How well a score predicts the annotator on the pool's readable images, which nobody learned from, by group.

    "pairs": how often it prefers which of two images of a prompt the annotator prefers, where a prompt that the pool
    has twice counts as two. No numbers of a group without a readable image.
    """
    texts = [item.prompt for item in here.pool_items]
    unique = list(dict.fromkeys(texts))
    _, table = features(here.folder / FEATURES, here.clip, [], unique)
    result: Result = {}
    for group, rows in by_group(here.pool_items):
        rows = [i for i in rows if here.pool.verdicts[i] != "skip"]
        if not rows:
            continue
        reward = score(here.pool.features[rows], table[[unique.index(texts[i]) for i in rows]])
        label = torch.tensor([float(here.pool.verdicts[i] == "good") for i in rows])
        quality = measure(reward, label)
        result[f"pairs, {group}"] = preferred(reward, label, [i // POOL for i in rows])
        result[f"auc, {group}"] = quality["auc"]
        result[f"ece, {group}"] = quality["ece"]
    return result


# ------------------------------------------------------------------------------------------------------------ the cell
def fill(name: str, here: World, folder: Path) -> Result:
    """Compute one cell of a seed; the content of its result.json. `folder` keeps what it continues from.

    Images of the test that are all there are measured again, without fine-tuning.
    """
    cell = CELLS[name]
    settings = cell_settings(name, here.seed, here.size)
    if cell.kind == "sets":
        return sets(here, folder)
    if cell.kind == "base":
        return evaluated(Pipeline.from_pretrained, here, folder)
    score, rows = scoring(cell, here, settings)
    result = measured(score, here)
    if cell.kind == "reward":
        return result
    with torch.no_grad():
        reward = score(here.data.images, here.text)
    if cell.weight is not None:
        reward = cell.weight(reward)
    if cell.unlabelled:
        rows = list(range(len(reward)))
    load = partial(tuned, here, reward[rows], rows, settings, folder, cell.clean)
    return result | evaluated(load, here, folder) | {"calls": training_calls(settings)}


def tuned(
    here: World, reward: Tensor, rows: Sequence[int], settings: dict[str, Any], folder: Path, clean: bool
) -> Pipeline:
    """The pre-trained model fine-tuned on the images `rows`, weighed by their rewards."""
    write_tensors(folder / REWARDS, {"reward": reward})
    paths, texts = [here.paths[i] for i in rows], [here.prompts[i] for i in rows]
    captions, drawn = zip(*pretraining_pairs(settings["pretrain_images"], settings["seed"], clean=clean))
    finetune_pipeline(
        Pipeline.from_pretrained, image_pairs(ImageFiles(paths), texts), model_weights(folder, settings),
        image_pairs(drawn, captions), settings, folder, here.folder / "cache", lambda row: None,
        lambda pipe: lambda step: None, digest(json.dumps([reward.tolist(), list(rows)])),
    )  # fmt: skip
    return Pipeline.from_pretrained(folder / "model")


# ----------------------------------------------------------------------------------------------------------- the tests
def evaluated(load: Callable[[], Pipeline], here: World, folder: Path) -> Result:
    """The numbers of a pipeline's images of the test; it is loaded only if not all of these are in `folder`."""
    run = Run(folder)
    for place in folder.glob("compare/cell-*"):
        if len(list(place.glob("images/*.png"))) == len(here.items):
            return point(here, judge_images(run, "cell", None, place, here.items, here.clip, here.reward))
    return point(here, evaluate_model(run, "cell", None, load, here.items, here.settings, here.clip, here.reward))


def point(here: World, side: Judged) -> Result:
    """The numbers of one image of each test item.

    Fidelity is the Frechet distance of CLIP features of so many of the images that can be read, chosen at random, from
    fresh drawings of what these show; None where fewer can be read.
    """
    number = SIZES[here.size]["distances"]
    good = torch.tensor([float(verdict == "good") for verdict in side.verdicts])
    reward = torch.tensor([value or 0.0 for value in side.values[REWARD]])
    readable = [i for i, verdict in enumerate(side.verdicts) if verdict != "skip"]
    fidelity = None
    if len(readable) >= number:
        chosen = random.Random(here.seed).sample(readable, number)
        again = [image for image in shown([open_image(side.paths[i]) for i in chosen], here.seed) if image is not None]
        fidelity = frechet_distance(side.features[chosen], embed_images(here.clip, again))
    result = {
        "aligned": float(good.mean()),
        "readable": len(readable) / len(good),
        "fidelity": fidelity,
        "fidelity images": number,
        "diversity": diversity(side.features, [item.prompt for item in here.items]),
        "reward": float(reward.mean()),
    }
    for group, rows in by_group(here.items):
        result |= {f"aligned, {group}": float(good[rows].mean()), f"reward, {group}": float(reward[rows].mean())}
    return result


def sets(here: World, folder: Path) -> Result:
    """Sets of SET images of a prompt, compared: of the main job's model, of the base model at random, and its best.

    The fine-tuned model's start from the noise of the base model's random ones; the best are those of POOL that have
    the highest reward. A key is "match; alignment or fidelity; rater; outcome", and ", group" where it is of a group.
    """
    number, count = len(here.pool_items) // POOL, torch.arange(len(here.pool_items) // POOL)[:, None]
    random_rows = POOL * count + torch.arange(SET)
    items = [here.pool_items[i] for i in random_rows.flatten()]
    load = partial(Pipeline.from_pretrained, here.folder / "model")
    after = evaluate_model(Run(folder), "tuned", None, load, items, here.settings, here.clip, here.reward)
    rewards = torch.tensor(here.pool.values[REWARD]).view(number, POOL)
    best_rows = POOL * count + rewards.topk(SET, dim=1).indices.sort(dim=1).values
    sides = {
        "tuned": (after, torch.arange(len(items)).view(number, SET)),
        "random": (here.pool, random_rows),
        f"best {SET} of {POOL}": (here.pool, best_rows),
    }
    places = {side.paths[i]: side.features[i] for side, rows in sides.values() for i in rows.flatten().tolist()}
    are_clean = dict(zip(places, clean(list(places), torch.stack(list(places.values())), here.clip, here.seed)))
    values: dict[str, dict[str, Tensor]] = {"alignment": {}, "fidelity": {}}
    for name, (side, rows) in sides.items():
        values["alignment"][name] = torch.tensor(side.values[SIMULATED])[rows]
        flat = [are_clean[side.paths[i]] for i in rows.flatten().tolist()]
        values["fidelity"][name] = torch.tensor(flat).view_as(rows)
    tuned_, random_, best = sides
    groups: dict[str, Any] = {"": slice(None)} | {f", {group}": rows for group, rows in by_group(items[::SET])}
    result: Result = {"set prompts": number, "distinct prompts": len({item.prompt for item in items})}
    for ours, theirs in ((tuned_, random_), (best, random_), (tuned_, best)):
        for kind, of in values.items():
            for rater, outcome in rated(of[ours], of[theirs], here.seed).items():
                for group, rows in groups.items():
                    for name, fraction in outcome_fractions(outcome[rows]).items():
                        result[f"{ours} against {theirs}; {kind}; {rater}; {name}{group}"] = fraction
    return result
