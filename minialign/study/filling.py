"""How a cell is computed: its reward, its fine-tuning and its evaluation, by the stages called in turn."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import ImageFiles, image_pairs, open_image
from ..data.cache import features
from ..engine.run import Run, digest
from ..evaluate import Judged, TestItem, judge_model, test_items
from ..evaluate.judges import FEATURES, REWARD
from ..files import atomic, read_json, write_json, write_tensors
from ..finetune import finetune_pipeline
from ..finetune.trainer import grid, model_weights, stored_images
from ..generate import noise_seed
from ..measures import cmmd, diversity, frechet_distance, measure
from ..models.clip import CLIP
from ..models.reward import RewardModel, embed_images
from ..pipeline import Pipeline
from ..reward import REWARDS, load_reward, train
from ..reward.labels import Labelled, Split, contrastive_table, read_labelled
from ..shapes.world import annotate, drawings, pretraining_pairs, prompts, shown
from .cells import CELLS, SIZES, Cell, Score, cell_settings

STRIP = 8  # images, spread over the test


@dataclass(frozen=True)
class World:
    """What the cells of a seed share: N images for feedback and their labels, the test, the reward that judges."""

    folder: Path  # of the main job
    settings: dict[str, Any]  # `cell_settings`
    distances: int  # images that distances are computed from
    items: list[TestItem]
    clip: CLIP
    reward: RewardModel  # of the main job; it judges all cells
    paths: list[Path]  # of the N images
    prompts: list[str]
    data: Labelled
    asked: Tensor  # (T,E), features of fresh drawings of what the items ask for
    unseen: tuple[Tensor, Tensor, Tensor]  # the base model's images of unseen prompts, these prompts, and labels

    @property
    def text(self) -> Tensor:
        """The embedding (N,E) of each image's prompt."""
        return self.data.texts[self.data.columns[:, 0]]


@cache
def world(folder: Path, seed: int, size: str) -> World:
    """What the main job of a seed left in `folder`, and the test of the study."""
    run, settings, clip = Run(folder / f"seed-{seed}"), cell_settings(seed, size), CLIP.from_pretrained()
    items = test_items(run, settings)
    paths, texts = stored_images(run.folder)
    return World(
        run.folder,
        settings,
        SIZES[size]["distances"],
        items,
        clip,
        load_reward(run.folder / "reward"),
        paths,
        texts,
        read_labelled(run.folder, clip, settings),
        embed_images(clip, drawings([item.prompt for item in items], seed)),
        of_unseen_prompts(run.folder, clip, seed),
    )


def of_unseen_prompts(job: Path, clip: CLIP, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """What rewards are measured on beside held-out labels: embeddings of images and prompts, both (U,E), labels (U,).

    Images that the base model was judged by in the main job, of prompts without feedback; those that the annotator
    cannot read are left out.
    """
    models = read_json(job / "results.json")["evaluation"]["models"]
    paths, texts = stored_images(job / next(iter(models.values()))["images"])
    unseen = set(prompts(seed)[1])
    pairs = [(path, text) for path, text in zip(paths, texts) if text in unseen]
    verdicts = annotate([open_image(path) for path, _ in pairs], [text for _, text in pairs])
    pairs = [pair for pair, verdict in zip(pairs, verdicts) if verdict != "skip"]
    label = torch.tensor([float(verdict == "good") for verdict in verdicts if verdict != "skip"])
    image, text = features(job / FEATURES, clip, [path for path, _ in pairs], [text for _, text in pairs])
    return image, text, label


# ---------------------------------------------------------------------------------------------------------- the reward
def labels_of(cell: Cell, labels: dict[int, float], seed: int) -> dict[int, float]:
    """The labels that a cell's reward learns from: a fraction of them, as most of its labellers give them.

    A smaller fraction is part of a larger one; who errs with a small probability errs there with a larger one, too.
    """
    rng, known = random.Random(seed), sorted(labels)
    rng.shuffle(known)
    known = known[: max(8, round(cell.fraction * len(known)))]  # so few that --quick keeps should hold a good one
    wrong = {i: [rng.random() < cell.flipped for _ in range(cell.labellers)] for i in known}
    return {i: labels[i] if 2 * sum(wrong[i]) < cell.labellers else 1 - labels[i] for i in known}


def relabelled(cell: Cell, here: World, seed: int) -> Labelled:
    """The labels as the cell has them; those that are held out stay true, and contrast is with prompts that it has."""
    data = here.data
    labels = labels_of(cell, {i: data.labels[i] for i in data.split.learn}, seed)
    learn = [i for i in data.split.learn if i in labels]
    among = list(dict.fromkeys(here.prompts[i] for i in learn))
    texts, columns = contrastive_table(here.prompts, among, {text: text for text in here.prompts}, seed)
    _, embeds = features(here.folder / FEATURES, here.clip, [], texts)
    split = Split(learn, data.split.known, data.split.new)
    return data._replace(texts=embeds, columns=columns, labels=data.labels | labels, split=split)


def scoring(cell: Cell, here: World, settings: dict[str, Any]) -> tuple[Score, list[int]]:
    """What gives rewards in a cell, and the images with the labels that it learned them from."""
    data = relabelled(cell, here, settings["seed"]) if cell.relearns else here.data
    rows = sorted(data.split.learn)
    if cell.score is not None:
        return partial(cell.score, data), rows
    if not cell.relearns:
        return here.reward, rows
    return train(data, settings, settings["lambda"]), rows


@torch.no_grad()
def measured(score: Score, here: World) -> dict[str, Any]:
    """How well a score predicts labels: of held-out images of known prompts, and of images of unseen prompts."""
    rows, (image, text, label) = here.data.split.known, here.unseen
    truth = torch.tensor([here.data.labels[i] for i in rows])
    return {
        "held_out": measure(score(here.data.images[rows], here.text[rows]), truth),
        "unseen": measure(score(image, text), label),
    }


# ------------------------------------------------------------------------------------------------------------ the cell
def fill(name: str, here: World, folder: Path, size: str) -> dict[str, Any]:
    """Fine-tune and judge one cell of a seed; the content of its result.json. `folder` keeps what it continues from."""
    cell = CELLS[name]
    settings = here.settings | cell.settings | {"steps": cell.times * here.settings["steps"]}
    if cell.long:
        settings |= SIZES[size]["long"] | {"lr_schedule": "constant", "validate_every": SIZES[size]["looks"][1]}
    if cell.best_of:
        model = folder.parent.parent / cell.model_of / folder.name / "model" if cell.model_of else None
        return {"points": best_of(here, cell.best_of, Pipeline.from_pretrained(model), folder)}
    score, rows = scoring(cell, here, settings)
    result = measured(score, here)
    with torch.no_grad():
        reward = score(here.data.images, here.text)
    if cell.weight is not None:
        reward = cell.weight(reward)
    if cell.unlabelled:
        rows = list(range(len(reward)))
    seen = folder / "points.json"  # of the long one, in case it is interrupted

    def points() -> dict[str, Any]:
        return read_json(seen) if seen.exists() else {}

    def look(pipe: Pipeline, step: int) -> None:
        if cell.long and step in SIZES[size]["looks"] and str(step) not in points():
            write_json(seen, points() | {str(step): judge_pipeline(pipe, here, folder, folder / f"step-{step}.png")})

    tune(here, reward[rows], rows, settings, folder, look)
    steps = settings["steps"]
    strip = folder / f"step-{steps}.png" if cell.long else None
    last = judge_pipeline(Pipeline.from_pretrained(folder / "model"), here, folder, strip)
    return result | {"points": points() | {str(steps) if cell.long else "": last}}


def tune(
    here: World,
    reward: Tensor,
    rows: Sequence[int],
    settings: dict[str, Any],
    folder: Path,
    look: Callable[[Pipeline, int], None],
) -> None:
    """Fine-tune the pre-trained model on the images `rows`, weighed by their rewards; `look` is called from step 0."""
    write_tensors(folder / REWARDS, {"reward": reward})
    paths, texts = [here.paths[i] for i in rows], [here.prompts[i] for i in rows]
    captions, drawn = zip(*pretraining_pairs(settings["pretrain_images"], settings["seed"]))

    def validation(pipe: Pipeline) -> Callable[[int], None]:
        look(pipe, 0)
        return partial(look, pipe)

    finetune_pipeline(
        Pipeline.from_pretrained, image_pairs(ImageFiles(paths), texts), model_weights(folder, settings),
        image_pairs(drawn, captions), settings, folder, here.folder / "cache", lambda row: None, validation,
        digest(json.dumps([reward.tolist(), list(rows)])),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the test
def best_of(here: World, numbers: Sequence[int], pipe: Pipeline, folder: Path) -> dict[str, Any]:
    """A pipeline judged on the best by the reward of N images a test item, for each N."""
    count, seed = len(here.items), here.settings["seed"]
    items = [
        TestItem(here.items[k % count].prompt, noise_seed(seed, k, test=True), here.items[k % count].groups)
        for k in range(max(numbers) * count)
    ]
    side = judged(pipe, here, folder, items)
    best = {n: torch.tensor(side.values[REWARD]).view(-1, count)[:n].argmax(dim=0) for n in numbers}
    return {
        str(n) if n > 1 else "": point(here, side, [int(k) * count + i for i, k in enumerate(rows)])
        for n, rows in best.items()
    }


def judge_pipeline(pipe: Pipeline, here: World, folder: Path, strip: Path | None = None) -> dict[str, Any]:
    """What is said of a pipeline's images of the test. `strip` is where some of these are kept, side by side."""
    side = judged(pipe, here, folder, here.items)
    if strip is not None:
        with atomic(strip) as temporary:
            shown_paths = side.paths[:: len(side.paths) // STRIP][:STRIP]
            grid([open_image(path) for path in shown_paths], STRIP).save(temporary, format="PNG")
    return point(here, side, range(len(here.items)))


def judged(pipe: Pipeline, here: World, folder: Path, items: Sequence[TestItem]) -> Judged:
    return judge_model(Run(folder), "cell", None, lambda: pipe, items, here.settings, here.clip, here.reward)


def point(here: World, side: Judged, rows: Sequence[int]) -> dict[str, Any]:
    """The numbers of one image of each test item, the images `rows` of a model.

    Fidelity is the Frechet distance of CLIP features of `distances` of the images that can be read, chosen at random,
    from fresh drawings of what these show, CMMD another distance of the same two; None where fewer can be read. The
    distance to what was asked is that of all images from drawings of their prompts.
    """
    seed = here.settings["seed"]
    verdicts = [side.verdicts[i] for i in rows]
    good = [verdict == "good" for verdict in verdicts]
    unseen = [value for value, item in zip(good, here.items) if "seen" not in item.groups]
    readable = [i for i, verdict in zip(rows, verdicts) if verdict != "skip"]
    found: dict[str, Any] = {"fidelity": None, "cmmd": None}
    if len(readable) >= here.distances:
        chosen = random.Random(seed).sample(readable, here.distances)
        again = [image for image in shown([open_image(side.paths[i]) for i in chosen], seed) if image is not None]
        reference = embed_images(here.clip, again)
        found["fidelity"] = frechet_distance(side.features[chosen], reference)
        found["cmmd"] = cmmd(side.features[chosen], reference)
    features_of = side.features[list(rows)]
    rewards = [side.values[REWARD][i] or 0.0 for i in rows]
    found |= {
        "fidelity_images": here.distances,
        "asked": frechet_distance(features_of, here.asked),
        "asked_images": len(rows),
        "diversity": diversity(features_of, [item.prompt for item in here.items]),
        "readable": len(readable) / len(rows),
        "aligned": sum(good) / len(good),
        "unseen": sum(unseen) / len(unseen),
        "mean_reward": sum(rewards) / len(rewards),
    }
    return found | {"gap": found["mean_reward"] - found["aligned"]}
