"""Evaluation of one model: sample its images for the test items, then label or score each image by every judge.

The judges are the simulated annotator, people, the reward model and CLIP.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import image_files, open_image
from ..data.cache import features, pipeline_digest
from ..engine.optimising import progress
from ..engine.processes import say
from ..engine.run import Run, digest
from ..feedback import SIMULATED, FeedbackStore
from ..files import InputError
from ..generate import sample_to_folder, sampling
from ..measures import cmmd, diversity, frechet_distance
from ..models.clip import CLIP
from ..models.reward import RewardModel, embed_images
from ..pipeline import Pipeline
from ..shapes.world import WORLD, annotate, knows, shown

PEOPLE, REWARD, CLIP_SCORE = "people", "reward", "CLIP score"  # who judges, beside the simulated annotator
LABELLERS = (SIMULATED, PEOPLE)  # they label images; the others give a number
Score = Callable[[Sequence[Path], Sequence[str]], Tensor]  # of image files and their prompts: rewards (B,)
FEATURES = Path("cache") / "features.safetensors"
BUNDLED = "bundled"  # the source of the bundled model
DISTANCES = 384  # images that distances to drawings are computed from, or all that can be read where they are fewer


@dataclass(frozen=True)
class TestItem:
    """One image of the evaluation: sampled from `seed` by every model; `groups` such as ("count", "seen")."""

    prompt: str
    seed: int
    groups: tuple[str, ...]


@dataclass(frozen=True)
class Judged:
    """What one model made of I items: its images, their CLIP features (I,E), and each judge's labels or scores.

    values: judge -> I numbers, 1 for aligned and 0 for not by people or the annotator; None where nobody said so.
    """

    name: str
    source: str
    folder: Path
    paths: list[Path]
    features: Tensor
    values: dict[str, list[float | None]]
    verdicts: list[str | None]
    readable: float | None


def evaluate_model(
    run: Run,
    name: str,
    source: str | None,
    load: Callable[[], Pipeline],
    items: Sequence[TestItem],
    settings: dict[str, Any],
    clip: CLIP,
    reward: RewardModel | None,
    score: Score | None = None,
) -> Judged:
    """Sample a model's images of the items into a folder of their own in `run`/compare, and judge them.

    score: what --reward says of image files and their prompts, in the reward model's place. The folder is named by all
    that the images depend on: images that are there are kept, and labels in its feedback.sqlite count.
    """
    pipe = load()
    decides = {key: settings[key] for key in ("sampling_steps", "guidance", "sampling_dtype")}
    content = json.dumps([decides, [(item.prompt, item.seed) for item in items]], sort_keys=True)
    number = digest(content, pipeline_digest(pipe)).partition(":")[2][:8]
    stem = re.sub(r"[^\w.-]+", "-", name)
    place = run.folder / "compare" / f"{stem}-{number}"
    Run(place).remember(decides, world=pipe.world)
    pairs = [(item.prompt, item.seed) for item in items]
    paths = sample_to_folder(pipe, pairs, place / "images", **sampling(settings), title=f"sample, {name}")
    del pipe  # the next one takes its memory
    store = FeedbackStore(place)
    try:
        rows = [(prompt, f"images/{path.name}", seed) for (prompt, seed), path in zip(pairs, paths)]
        store.add_images(rows, decides)
    finally:
        store.close()
    return judge_images(run, name, source, place, items, clip, reward, score)


def judge_images(
    run: Run,
    name: str,
    source: str | None,
    place: Path,
    items: Sequence[TestItem],
    clip: CLIP,
    reward: RewardModel | None,
    score: Score | None = None,
) -> Judged:
    """Judge the images of the items that `evaluate_model` has sampled into the folder `place`."""
    store = FeedbackStore(place)
    try:
        known = {image.path.name: image.id for image in store.images()}
        labels = store.labels()
    finally:
        store.close()
    paths = sorted((place / "images").glob("*.png"))
    own = Run(place).world == WORLD
    texts = [item.prompt for item in items]
    unique = list(dict.fromkeys(texts))
    image, table = features(run.folder / FEATURES, clip, paths, unique)
    text = table[[unique.index(prompt) for prompt in texts]]
    values: dict[str, list[float | None]] = {}
    verdicts: list[str | None] = [None] * len(items)
    readable = None
    if own and knows(texts):
        verdicts = [
            annotate([open_image(path)], [prompt])[0] for path, prompt in progress(list(zip(paths, texts)), SIMULATED)
        ]
        values[SIMULATED] = [float(verdict == "good") for verdict in verdicts]
        readable = sum(verdict != "skip" for verdict in verdicts) / len(verdicts)
    if labels:
        values[PEOPLE] = [labels.get(known[path.name]) for path in paths]
    if reward is not None:
        device = clip.logit_scale.device
        with torch.no_grad():
            values[REWARD] = reward(image.to(device), text.to(device)).tolist()
    elif score is not None:
        values[REWARD] = score(paths, texts).tolist()
    values[CLIP_SCORE] = torch.cosine_similarity(image, text).tolist()
    return Judged(name, source or BUNDLED, place, paths, image, values, verdicts, readable)


def reference_images(folder: Path) -> list[Path]:
    """The image files of --reference; InputError where they are fewer than two."""
    paths, left_out = image_files(folder) if folder.is_dir() else ([], [])
    if len(paths) < 2:
        raise InputError(f"--reference {folder}: fewer than two images; accepted: a folder of images")
    if left_out:
        say(f"{folder}: {len(paths)} images are read, {len(left_out)} are of other kinds, such as {left_out[0]}")
    return paths


def distances(
    run: Run, images: Sequence[Path] | None, sides: Sequence[Judged], items: Sequence[TestItem], clip: CLIP, seed: int
) -> dict[str, Any]:
    """Frechet distance and CMMD of each model's images to good ones, their diversity and their readable fraction.

    Good ones are the image files `images`; else, with the bundled model, a fresh drawing of what each readable
    image shows, of DISTANCES images of every model; else the images of the run that are labelled good. "reference" says
    which.
    """
    result: dict[str, Any] = {"reference": None, "frechet": {}, "cmmd": {}, "diversity": {}, "readable": {}}
    drawn = images is None and all(SIMULATED in side.values for side in sides)
    number = min(DISTANCES, *(sum(verdict != "skip" for verdict in side.verdicts) for side in sides))
    target = None
    if drawn and number > 1:
        result["reference"] = f"fresh drawings of what the images show, {number} of each model"
    elif not drawn:
        target, result["reference"] = reference_features(run, images, clip)
    for side in sides:
        mine = side.features
        if drawn and number > 1:
            readable = [i for i, verdict in enumerate(side.verdicts) if verdict != "skip"]
            chosen = sorted(random.Random(seed).sample(readable, number))
            again = shown([open_image(side.paths[i]) for i in chosen], seed)
            mine, target = mine[chosen], embed_images(clip, [image for image in again if image is not None]).cpu()
        result["frechet"][side.name] = None if target is None else frechet_distance(mine, target)
        result["cmmd"][side.name] = None if target is None else cmmd(mine, target)
        result["diversity"][side.name] = diversity(side.features, [item.prompt for item in items])
        result["readable"][side.name] = side.readable
    return result


def reference_features(run: Run, images: Sequence[Path] | None, clip: CLIP) -> tuple[Tensor | None, str | None]:
    """CLIP features (M,E) of the image files, else of the run's images labelled good, and what they are."""
    if images is not None:
        return features(run.folder / FEATURES, clip, images, [])[0], f"the {len(images)} images of --reference"
    paths = []
    if (run.folder / "feedback.sqlite").is_file():
        store = FeedbackStore(run.folder, read_only=True)
        labels = store.labels()
        paths = [image.path for image in store.images() if labels.get(image.id)]
        store.close()
    if len(paths) < 2:
        return None, None
    return features(run.folder / FEATURES, clip, paths, [])[0], f"the {len(paths)} images labelled good"
