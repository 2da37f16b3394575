"""Stage 2 of the method: the reward model r(x,z), an MLP on frozen CLIP features: python -m minialign.reward RUN

Trains the reward model on the labels of a run (RUN/feedback.sqlite), with and without the auxiliary loss, measures both
on held-out prompts beside the raw CLIP score, and keeps the one with it in RUN/reward.

L_mse = mean (y - r(x,z))^2                                                      Lee et al. 2023, section 3.2
L_pc  = cross entropy of softmax_i( r(x,z_i) / T ) against the original prompt among contrastive ones
L     = L_mse + lambda L_pc
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from . import __version__
from .command import Parser, in_range, run_command
from .feedback import FeedbackStore, StoredImage
from .models.clip import CLIP
from .models.pretrained import WEIGHTS, InputError, load_network, read_bytes, read_json, read_weights, save_network
from .prompts import contrastive_texts
from .runs import EMBEDDED_DEFAULTS, OWN_CLIP, OWN_DEFAULTS, locked, pick_device
from .training import atomic, generator, progress, remove_unfinished, write_json, write_tensors

HELD_OUT = 0.15  # of the labelled images judge the reward model; their prompts have other images, as those it scores do
STOPPING = 0.1  # of the prompts say when training on a run stops, and HELD_OUT of them judge
CHECK, PATIENCE = 50, 4  # steps between looks at those prompts, and looks without a gain until it stops
BATCH = 128  # images and prompts that CLIP embeds at once
CONTRASTIVE = 7  # prompts of other semantics for each pair, the paper's N - 1


class RewardModel(nn.Module):
    """r(x,z) in [0,1] from CLIP embeddings: two hidden layers (paper: of 1024), ReLU, sigmoid."""

    def __init__(self, config: dict[str, Any]):
        """`config`: "width" E of the embeddings, "hidden" width of the layers, "clip" source of the CLIP model."""
        super().__init__()
        self.config = config
        width, hidden = config["width"], config.get("hidden", 1024)
        self.layers = nn.Sequential(
            nn.Linear(2 * width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> RewardModel:
        """Read a folder that `save_pretrained` wrote."""
        return load_network(cls, Path(folder), WEIGHTS[1], device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        with atomic(Path(folder)) as temporary:
            save_network(self, temporary, WEIGHTS[1])

    @cached_property
    def clip(self) -> CLIP:
        """The CLIP model of the features, loaded when first needed; not part of this model's weights."""
        return CLIP.from_pretrained(self.config.get("clip"), device=next(self.parameters()).device)

    def forward(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Rewards (B,) in [0,1] of CLIP embeddings (B,E) of images and prompts, of any norm."""
        # unit vectors of E elements, brought to unit variance, which the layers' initialisation expects
        pair = torch.cat([F.normalize(image_embeds, dim=-1), F.normalize(text_embeds, dim=-1)], dim=-1)
        return self.layers(pair * image_embeds.shape[-1] ** 0.5).squeeze(-1).sigmoid()

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Rewards (B,) of images for their prompts."""
        return self(embed_images(self.clip, images), embed_texts(self.clip, prompts))


@torch.no_grad()
def embed_images(clip: CLIP, images: Sequence[Image.Image], batch: int = 128) -> Tensor:
    """CLIP embeddings (B,E) of images."""
    device = clip.logit_scale.device
    starts = progress(range(0, len(images), batch), "CLIP")
    return torch.cat([clip.encode_image(clip.preprocess(list(images[i : i + batch])).to(device)) for i in starts])


@torch.no_grad()
def embed_texts(clip: CLIP, prompts: Sequence[str], batch: int = 256) -> Tensor:
    """CLIP embeddings (B,E) of prompts, each different one encoded once."""
    unique = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    ids = clip.tokenizer(list(unique)).to(clip.logit_scale.device)
    embeds = torch.cat([clip.encode_text(part) for part in ids.split(batch)])
    return embeds[[unique[prompt] for prompt in prompts]]


def mse_loss(reward: Tensor, label: Tensor) -> Tensor:
    """L_mse of rewards (B,) and labels (B,) in [0,1]."""
    return (label - reward).square().mean()


def prompt_classification_loss(rewards: Tensor, good: Tensor, temperature: float) -> Tensor:
    """L_pc of rewards (B,N) for the original prompt (column 0) and N-1 contrastive ones, over the rows labelled good.

    good (B,) is 1 where the pair was labelled good, and a row's weight where labels are between 0 and 1; 0 is returned
    where none was.
    """
    entropy = -F.log_softmax(rewards / temperature, dim=1)[:, 0]
    return (entropy * good).sum() / good.sum().clamp(min=1e-6)


def train_reward(
    image_embeds: Tensor,
    text_embeds: Tensor,
    contrast: Tensor,
    label: Tensor,
    config: dict[str, Any],
    *,
    steps: int = 1000,
    batch_size: int = 64,
    learning_rate: float = 3e-4,
    weight_decay: float = 1e-2,
    weight_of_classification: float = 0.5,  # the paper's lambda
    temperature: float = 2.0,
    seed: int = 0,
    log: Callable[[dict[str, float]], None] = lambda row: None,
) -> RewardModel:
    """A reward model trained on B labelled pairs: image_embeds, text_embeds (B,E), label (B,) in [0,1].

    contrast (B,N-1,E) are the embeddings of each pair's contrastive prompts.
    """
    torch.manual_seed(seed)
    model = RewardModel(config).to(image_embeds.device)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
    prompts = torch.cat([text_embeds[:, None], contrast], dim=1)

    def losses(step: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(label), (batch_size,), generator=generator(seed, step)).to(label.device)
        images = image_embeds[rows][:, None].expand_as(prompts[rows])
        rewards = model(images, prompts[rows])
        return mse_loss(rewards[:, 0], label[rows]), prompt_classification_loss(rewards, label[rows], temperature)

    _optimise(optimizer, losses, steps, weight_of_classification, log, lambda step: False)
    return model.eval().requires_grad_(False)


def _optimise(
    optimizer: torch.optim.Optimizer,
    losses: Callable[[int], tuple[Tensor, Tensor]],
    steps: int,
    weight_of_classification: float,
    log: Callable[[dict[str, float]], None],
    stop: Callable[[int], bool],
) -> None:
    """`steps` updates on losses(step) -> (L_mse, L_pc) of one batch, fewer where stop(finished steps) says so."""
    for step in progress(range(steps), "reward"):
        mse, classification = losses(step)
        loss = mse + weight_of_classification * classification
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 20 == 0:
            log({"step": step + 1, "loss": loss.item(), "mse": mse.item(), "classification": classification.item()})
        if stop(step + 1):
            return


@dataclass(frozen=True)
class Pairs:
    """B labelled pairs by their rows in tables of embeddings: image (B,), prompts (B,N), label (B,) in [0,1].

    Column 0 of `prompts` is the pair's own, the others are contrastive. Rows repeat, embeddings are held once.
    """

    image: Tensor
    prompts: Tensor
    label: Tensor


def fit(
    images: Tensor,
    texts: Tensor,
    train: Pairs,
    held_out: Pairs | None,
    config: dict[str, Any],
    *,
    steps: int = 1000,
    batch_size: int = 64,
    learning_rate: float = 3e-4,
    weight_decay: float = 1e-2,
    weight_of_classification: float = 0.5,
    temperature: float = 2.0,
    balanced: bool = False,
    seed: int = 0,
    log: Callable[[dict[str, float]], None] = lambda row: None,
) -> tuple[RewardModel, list[tuple[int, float]]]:
    """A reward model trained on pairs of the tables images (I,E) and texts (P,E), as it was when L_mse on `held_out`
    was least, and that course: (finished steps, L_mse on `held_out`). Without `held_out` all steps are made.

    The loss is `train_reward`'s; L_pc is over pairs with a label above 0, and contrastive prompts are scored for these
    alone. `balanced`: good (label above 0.5) and bad pairs are drawn equally often, whatever their numbers; r is then
    the chance of good among as many bad ones.
    """
    torch.manual_seed(seed)
    model = RewardModel(config).to(images.device)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay, fused=True)
    known = train.label.cpu()  # rows are drawn and sorted on the CPU: no waiting for a device
    kinds = [(known > 0.5).nonzero()[:, 0], (known <= 0.5).nonzero()[:, 0]]
    course: list[tuple[int, float]] = []
    best: dict[str, Tensor] = {}

    def losses(step: int) -> tuple[Tensor, Tensor]:
        g = generator(seed, step)
        if balanced:
            parts = zip(kinds, (batch_size // 2, batch_size - batch_size // 2))
            rows = torch.cat([kind[torch.randint(len(kind), (number,), generator=g)] for kind, number in parts])
        else:
            rows = torch.randint(len(known), (batch_size,), generator=g)
        rows = rows[known[rows].argsort(descending=True, stable=True)]  # those in both losses first
        liked = int((known[rows] > 0).sum()) if weight_of_classification else 0
        rows = rows.to(images.device)
        image, prompts, label = train.image[rows], train.prompts[rows], train.label[rows]
        others = prompts[:liked, 1:]
        reward = model(
            images[torch.cat([image, image[:liked].repeat_interleave(others.shape[1])])],
            texts[torch.cat([prompts[:, 0], others.flatten()])],
        )
        own, contrast = reward[:batch_size], reward[batch_size:].reshape(others.shape)
        rewards = torch.cat([own[:liked, None], contrast], dim=1)
        return mse_loss(own, label), prompt_classification_loss(rewards, label[:liked], temperature)

    @torch.no_grad()
    def stop(step: int) -> bool:
        if held_out is None or (step % CHECK and step != steps):
            return False
        reward = rewards_of(model, images, texts, held_out.image, held_out.prompts[:, :1])[:, 0]
        error = float(mse_loss(reward, held_out.label))
        course.append((step, error))
        errors = [value for _, value in course]
        if errors.index(min(errors)) == len(errors) - 1:
            best.update({name: weight.detach().clone() for name, weight in model.state_dict().items()})
        return errors.index(min(errors)) < len(errors) - PATIENCE

    _optimise(optimizer, losses, steps, weight_of_classification, log, stop)
    if best:
        model.load_state_dict(best)
    return model.eval().requires_grad_(False), course


@torch.no_grad()
def rewards_of(model: RewardModel, images: Tensor, texts: Tensor, image: Tensor, prompts: Tensor) -> Tensor:
    """Rewards (B,N) of rows image (B,) of one table of embeddings for rows prompts (B,N) of another, in parts."""
    parts = zip(image.split(1024), prompts.split(1024))
    return torch.cat([model(images[i][:, None].expand_as(texts[z]), texts[z]) for i, z in parts])


def area_under_curve(score: Tensor, label: Tensor) -> float | None:
    """Probability that a good pair scores above a bad one, ties counting half; None where one kind is missing."""
    good, bad = score[label > 0.5].cpu().double(), score[label <= 0.5].cpu().double()
    if not len(good) or not len(bad):
        return None
    difference = good[:, None] - bad[None]
    return float(((difference > 0).double() + 0.5 * (difference == 0)).mean())


def calibration(reward: Tensor, label: Tensor, bins: int = 10) -> list[dict[str, float]]:
    """Mean reward and fraction labelled good in each tenth of [0,1] that holds any pair (a reliability diagram)."""
    place = (reward * bins).long().clamp(0, bins - 1)
    return [
        {
            "predicted": float(reward[place == i].mean()),
            "observed": float(label[place == i].mean()),
            "count": int((place == i).sum()),
        }
        for i in range(bins)
        if (place == i).any()
    ]


def expected_calibration_error(bins: Sequence[dict[str, float]]) -> float:
    """Mean |observed - predicted| over the pairs of `calibration`'s bins (Naeini et al. 2015; Guo et al. 2017)."""
    total = sum(part["count"] for part in bins)
    return sum(part["count"] * abs(part["observed"] - part["predicted"]) for part in bins) / total


def platt(score: Tensor, label: Tensor) -> tuple[float, float]:
    """(a, b) of the logistic regression sigmoid(a score + b) of labels (B,) in [0,1] on scores (B,) (Platt 1999).

    By Newton's method in float64, with a ridge of 1e-6 that keeps it finite where a threshold parts good from bad.
    """
    s, y = score.cpu().double(), label.cpu().double()
    middle, spread = s.mean(), s.std().clamp(min=1e-12) if len(s) > 1 else torch.tensor(1.0).double()
    x = torch.stack([(s - middle) / spread, torch.ones_like(s)], dim=1)
    w, ridge = torch.zeros(2).double(), 1e-6 * torch.eye(2).double()
    for _ in range(50):
        p = (x @ w).sigmoid()
        hessian = x.T @ (x * (p * (1 - p))[:, None]) / len(s) + ridge
        w = w + torch.linalg.solve(hessian, x.T @ (y - p) / len(s) - ridge @ w)
    return float(w[0] / spread), float(w[1] - w[0] * middle / spread)


def measure(reward: Tensor, label: Tensor, others: Tensor | None = None) -> dict[str, Any]:
    """How well rewards (B,) foretell labels (B,) in [0,1]; a label above 0.5 counts as good.

    `others` (B,N-1): each image's rewards for contrastive prompts. "prompt_found" is then the part of the good images
    that have a higher reward for their own prompt than for any of these.
    """
    good = label > 0.5
    bins = calibration(reward, label)
    return {
        "accuracy": float(((reward > 0.5) == good).float().mean()),
        "auc": area_under_curve(reward, label),
        "ece": expected_calibration_error(bins),
        "brier": float(mse_loss(reward, label)),
        "prompt_found": (
            float((reward[:, None] > others)[good].all(dim=1).float().mean())
            if others is not None and others.shape[1] and good.any()
            else None
        ),
        "calibration": bins,
    }


def contrast_embeds(clip: CLIP, choices: Sequence[Sequence[str]]) -> Tensor:
    """CLIP embeddings (B,K,E) of each image's contrastive prompts, as many as all have."""
    number = min(len(choice) for choice in choices)
    flat = embed_texts(clip, [text for choice in choices for text in choice[:number]] or [""])
    return flat[: len(choices) * number].reshape(len(choices), number, clip.width)


def learn_reward(
    contrastive: Callable[[str, int, random.Random], list[str]],
    clip: CLIP,
    image: Tensor,
    text: Tensor,
    prompts: Sequence[str],
    labels: dict[int, float],
    settings: dict[str, Any],
    folder: Path,
    log: Callable[[dict[str, Any]], None],
    learned: Path | None = None,
    held_out: dict[int, float] | None = None,
) -> None:
    """Train the reward model on `labels` (image number -> 0 or 1), measure it on held-out ones, score all images.

    image, text (B,E): CLIP's embeddings of all images and of their prompts. `held_out` are labels to measure it on; a
    part of `labels` unless given. Where `learned` is given, the folder of a reward model, that one scores them and
    nothing is trained.
    """
    if learned is None and not any(labels.values()):
        raise InputError(f"none of the {len(labels)} labels is good: there is nothing to learn from")
    rng = random.Random(settings["seed"])
    if learned is not None:
        model = RewardModel.from_pretrained(learned, device=image.device)
        _score(model, contrastive, clip, image, text, prompts, settings, folder, rng)
        model.save_pretrained(folder / "reward")
        write_json(folder / "reward" / "held_out.json", read_json(learned / "held_out.json"))
        return
    if held_out is None:
        held_out = {i: labels[i] for i in held_out_labels(labels, rng)}
    train, test = sorted(labels.keys() - held_out.keys()), sorted(held_out)
    if not any(labels[i] for i in train):  # too few labels to spare any
        train, test = list(labels), []
    choices = [contrastive(prompts[i], CONTRASTIVE, rng) for i in train]
    contrast = contrast_embeds(clip, choices)
    config = {"width": clip.width, "hidden": settings["hidden"], "clip": settings["clip"]}
    label = torch.tensor([labels[i] for i in train], device=image.device)
    model = train_reward(
        image[train], text[train], contrast, label, config,
        steps=settings["reward_steps"], weight_of_classification=settings["lambda"],
        temperature=settings["temperature"], seed=settings["seed"], log=log,
    )  # fmt: skip
    score = _score(model, contrastive, clip, image, text, prompts, settings, folder, rng)
    truth = torch.tensor([held_out[i] for i in test], device=image.device)
    cosine = torch.cosine_similarity(image[test], text[test])
    model.save_pretrained(folder / "reward")
    write_json(
        folder / "reward" / "held_out.json",
        {
            **(measure(score[test], truth) if test else dict.fromkeys(("accuracy", "auc"))),
            "clip_score_auc": area_under_curve(cosine, truth),
            "labels": len(labels),
            "held_out": len(test),
            "good_fraction": sum(labels.values()) / len(labels),
        },
    )


def held_out_labels(labels: dict[int, float], rng: random.Random) -> list[int]:
    """The images whose labels judge the reward model in place of teaching it: HELD_OUT of them, drawn at random."""
    return sorted(rng.sample(sorted(labels), round(HELD_OUT * len(labels))))


def _score(
    model: RewardModel,
    contrastive: Callable[[str, int, random.Random], list[str]],
    clip: CLIP,
    image: Tensor,
    text: Tensor,
    prompts: Sequence[str],
    settings: dict[str, Any],
    folder: Path,
    rng: random.Random,
) -> Tensor:
    """Rewards (B,) of embedded images and prompts (B,E); they, and what textnorm contrasts, are kept in `folder`."""
    scores = {"reward": model(image, text)}
    if settings["weighting"] == "textnorm":
        others = contrast_embeds(clip, [contrastive(prompt, CONTRASTIVE, rng) for prompt in prompts])
        if not others.shape[1]:
            raise InputError("--weighting textnorm: a prompt has no other one to be told from")
        scores["contrast"] = torch.stack([model(image, other) for other in others.unbind(1)], dim=1)
    write_tensors(folder / "cache" / "reward.safetensors", scores)
    return scores["reward"]


# -------------------------------------------------------------------------------------------- from the labels of a run
def held_out_split(prompts: Sequence[str], seed: int) -> tuple[list[int], list[int], list[int]]:
    """Rows to learn from, to stop by and to judge by: the rows of a prompt are in one of them, HELD_OUT of the prompts
    judge and STOPPING of them stop, at least one each. With fewer than three prompts, all rows are learned from.
    """
    order = sorted(set(prompts))
    random.Random(seed).shuffle(order)
    if len(order) < 3:
        return list(range(len(prompts))), [], []
    judge, stop = max(1, round(HELD_OUT * len(order))), max(1, round(STOPPING * len(order)))
    part = {prompt: 2 if i < judge else 1 if i < judge + stop else 0 for i, prompt in enumerate(order)}
    learn, stopping, judging = ([i for i, prompt in enumerate(prompts) if part[prompt] == k] for k in range(3))
    return learn, stopping, judging


def features(path: Path, clip: CLIP, images: Sequence[Path], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """CLIP embeddings (I,E) of image files and (P,E) of texts, on the CPU; what the file `path` holds is kept.

    The file holds a SHA-256 of each row's image or text, and one of CLIP's projections and preprocessing: an image that
    has changed is embedded again, and with another CLIP everything is. A killed process loses a minute's work at most.
    """
    made_by = clip_digest(clip)
    known: dict[bytes, Tensor] = {}
    with suppress(InputError, KeyError):  # of a damaged file nothing is taken
        saved = read_weights(path) if path.exists() else {"clip": torch.empty(0)}
        if saved["clip"].numpy().tobytes() == made_by:
            known = dict(zip((key.tobytes() for key in saved["keys"].numpy()), saved["features"]))

    def save() -> None:
        keys = torch.tensor([list(key) for key in known], dtype=torch.uint8)
        clip_key = torch.tensor(list(made_by), dtype=torch.uint8)
        write_tensors(path, {"clip": clip_key, "keys": keys, "features": torch.stack(list(known.values()))})

    def embed(keys: list[bytes], items: Sequence[Any], what: str, call: Callable[[list[Any]], Tensor]) -> Tensor:
        missing = {key: item for key, item in zip(keys, items) if key not in known}
        last = time.monotonic()
        for start in progress(range(0, len(missing), BATCH), f"CLIP, {what}") if missing else ():
            part = dict(itertools.islice(missing.items(), start, start + BATCH))
            known.update(zip(part, call(list(part.values())).float().cpu()))
            if time.monotonic() - last > 60 or start + BATCH >= len(missing):
                save()
                last = time.monotonic()
        return torch.stack([known[key] for key in keys]) if keys else torch.empty(0, clip.width)

    image_keys = [_digest(b"image", read_bytes(image)) for image in images]
    text_keys = [_digest(b"text", text.encode()) for text in texts]
    return (
        embed(image_keys, images, "images", lambda part: _embed_files(clip, part)),
        embed(text_keys, texts, "prompts", lambda part: embed_texts(clip, part)),
    )


def clip_digest(clip: CLIP) -> bytes:
    """What stands for a CLIP model: a SHA-256 of its projections and preprocessing."""
    weights = [clip.visual_projection.weight, clip.text_projection.weight]
    content = b"".join(weight.detach().float().cpu().numpy().tobytes() for weight in weights)
    return _digest(content, json.dumps(clip.preprocessing, sort_keys=True).encode())


def _digest(*parts: bytes) -> bytes:
    return hashlib.sha256(b"\0".join(parts)).digest()


@torch.no_grad()
def _embed_files(clip: CLIP, paths: Sequence[Path]) -> Tensor:
    pictures = []
    for path in paths:
        try:
            with Image.open(path) as image:
                pictures.append(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"image {path} cannot be read ({error})") from error
    return clip.encode_image(clip.preprocess(pictures).to(clip.logit_scale.device))


def read_store(folder: Path, soft: bool = False) -> tuple[list[StoredImage], dict[int, float]]:
    """The images of a run's store, and by their number the labels there are, in [0,1].

    `soft`: the mean of an image's labels in place of their majority. InputError names a folder without a store.
    """
    if not (folder / "feedback.sqlite").is_file():
        raise InputError(f"{folder}: no feedback.sqlite; accepted: a run of generate or finetune")
    store = FeedbackStore(folder)
    try:
        images, labels = store.images(), store.labels(soft=True) if soft else store.labels()
    finally:
        store.close()
    return images, {i: labels[image.id] for i, image in enumerate(images) if image.id in labels}


def learn(folder: Path, out: Path, clip: CLIP, settings: dict[str, Any]) -> dict[str, Any]:
    """Train on the labels of the run `folder`, with and without the auxiliary loss; the content of held_out.json.

    `out` gets the model with it, what was measured, a reliability diagram and a card; `folder`/cache the features and,
    where the run's own model is trained, the rewards of all images in the store's order. InputError where there is
    nothing to learn from.
    """
    stored, labels = read_store(folder, settings["soft"])
    if not labels:
        raise InputError(f"{folder}: no labels; python -m minialign.label {folder} takes them")
    good = sum(label > 0.5 for label in labels.values())
    if good in (0, len(labels)):
        kind = "good" if good else "bad"
        raise InputError(f"{folder}: all of its {len(labels)} labels are {kind}; both kinds are needed")
    prompts = [image.prompt for image in stored]
    texts, columns = _with_contrastive(prompts, settings["seed"])
    paths = [Path(image.path) for image in stored]
    device = clip.logit_scale.device
    images, embeds = (
        part.to(device) for part in features(folder / "cache" / "features.safetensors", clip, paths, texts)
    )

    def pairs(rows: Sequence[int]) -> Pairs:
        label = torch.tensor([labels.get(i, 0.0) for i in rows])
        return Pairs(torch.tensor(rows).to(device), columns[rows].to(device), label.to(device))

    labelled = sorted(labels)
    parts = held_out_split([prompts[i] for i in labelled], settings["seed"])
    learned, stopping, judging = ([labelled[i] for i in part] for part in parts)
    if {labels[i] > 0.5 for i in learned} != {True, False}:  # too few labels to spare any
        learned, stopping, judging = labelled, [], []
    train, judge = pairs(learned), pairs(judging)
    config = {"width": clip.width, "hidden": settings["hidden"], "clip": settings["clip"]}
    found: dict[str, Any] = {}
    models = {}
    for name, weight in (("auxiliary", settings["lambda"]), ("plain", 0.0)):
        if name == "plain" and not settings["lambda"]:
            continue
        models[name], course = fit(
            images, embeds, train, pairs(stopping) if stopping else None, config,
            steps=settings["steps"], batch_size=settings["batch_size"], learning_rate=settings["learning_rate"],
            weight_of_classification=weight, temperature=settings["temperature"], balanced=settings["balanced"],
            seed=settings["seed"],
        )  # fmt: skip
        found[name] = {"steps": min(course, key=lambda look: look[1])[0] if course else settings["steps"]}
        if judging:
            rewards = rewards_of(models[name], images, embeds, judge.image, judge.prompts)
            found[name] |= measure(rewards[:, 0], judge.label, rewards[:, 1:])
    if judging:
        cosine = torch.cosine_similarity(images[judge.image][:, None], embeds[judge.prompts], dim=-1)
        known = pairs(learned + stopping)
        a, b = platt(torch.cosine_similarity(images[known.image], embeds[known.prompts[:, 0]]), known.label)
        score = (a * cosine + b).sigmoid()
        found["clip"] = measure(score[:, 0], judge.label, score[:, 1:])
    best = found["auxiliary"]
    measured = {
        **{key: best.get(key) for key in ("accuracy", "auc", "ece", "brier")},
        "clip_score_auc": found["clip"]["auc"] if judging else None,
        "labels": len(labels),
        "held_out": len(judging),
        "held_out_prompts": len({prompts[i] for i in judging}),
        "good_fraction": good / len(labels),
        "held_out_good_fraction": sum(labels[i] > 0.5 for i in judging) / len(judging) if judging else None,
        "calibration": best.get("calibration", []),
        "compared": found,
        "settings": settings,
    }
    model = models["auxiliary"]
    with atomic(out) as temporary:
        save_network(model, temporary, WEIGHTS[1])
        write_json(temporary / "held_out.json", measured)
        (temporary / "README.md").write_text(card(measured), encoding="utf-8")
        if judging:
            plot_calibration(temporary / "calibration.png", found)
    if out == folder / "reward":
        scores = rewards_of(model, images, embeds, torch.arange(len(stored)).to(device), columns[:, :1].to(device))
        write_tensors(folder / "cache" / "reward.safetensors", {"reward": scores[:, 0]})
    return measured


def _with_contrastive(prompts: Sequence[str], seed: int) -> tuple[list[str], Tensor]:
    """A table of texts, and for each of the prompts (B,) the rows (B,N) of itself and of its contrastive prompts."""
    rng, unique = random.Random(seed), list(dict.fromkeys(prompts))
    choices = {prompt: contrastive_texts(prompt, CONTRASTIVE, unique, rng) for prompt in unique}
    number = min(len(choice) for choice in choices.values())  # as many as all have
    columns = {prompt: [prompt, *choice[:number]] for prompt, choice in choices.items()}
    row = {text: i for i, text in enumerate(dict.fromkeys(text for texts in columns.values() for text in texts))}
    return list(row), torch.tensor([[row[text] for text in columns[prompt]] for prompt in prompts])


NAMES = {"auxiliary": "with the auxiliary loss", "plain": "without it", "clip": "raw CLIP score"}


def table(measured: dict[str, Any]) -> str:
    """What `learn` measured, as lines of text."""
    found, part = measured["compared"], measured["held_out_good_fraction"]
    head = f"{measured['labels']} labels, {measured['good_fraction']:.1%} good"
    if part is None:
        return f"{head}; too few prompts, or labels of one kind, to hold any out: nothing was measured"
    lines = [
        f"{head}. Held out: {measured['held_out']} labels of {measured['held_out_prompts']} prompts; always saying "
        f"{'good' if part > 0.5 else 'bad'} is right for {max(part, 1 - part):.1%}.",
        "",
        f"{'':26}{'accuracy':>9}{'AUC':>8}{'ECE':>8}{'Brier':>8}{'prompt found':>14}{'steps':>7}",
    ]
    for name, row in found.items():
        auc = "-" if row["auc"] is None else f"{row['auc']:.3f}"
        prompt_found = "-" if row["prompt_found"] is None else f"{row['prompt_found']:.1%}"
        name = NAMES[name] if measured["settings"]["lambda"] or name == "clip" else "reward model (lambda 0)"
        lines.append(
            f"{name:26}{row['accuracy']:9.1%}{auc:>8}{row['ece']:8.3f}{row['brier']:8.3f}{prompt_found:>14}"
            f"{row.get('steps', '-'):>7}"
        )
    return "\n".join(lines)


def card(measured: dict[str, Any]) -> str:
    """The README.md of a reward model: what it is, how it was made, what was measured."""
    settings = measured["settings"]
    clip = settings["clip"] or "minialign's embedded CLIP"
    return f"""# A reward model r(x,z) of images and prompts

Made by minialign {__version__} after Lee et al. 2023 (arXiv 2302.12192), section 3.2: an MLP on the embeddings of
{clip}, frozen.
It says, from 0 to 1, how likely its labellers were to call an image good for its prompt. It was measured on images like
those that it learned from, of prompts that were held out; of other images and prompts nothing is known.

    from minialign import RewardModel
    reward = RewardModel.from_pretrained("this folder")
    reward.score(images, prompts)  # PIL images, strings

## Measured on held-out prompts

```
{table(measured)}
```

ECE is the expected calibration error in tenths of [0,1], Brier the squared error; "prompt found" is the part of the
good images that score higher for their own prompt than for contrastive ones. The raw CLIP score is brought to [0,1]
by a logistic regression on the labels that were learned from. Training stops by prompts of its own.

## Settings

| setting | value |
| --- | --- |
""" + "".join(f"| {key} | {value} |\n" for key, value in settings.items() if value is not None)


def plot_calibration(path: Path, found: dict[str, Any]) -> None:
    """A reliability diagram, PNG, of `measure`'s results by name; nothing without matplotlib (the extra `report`)."""
    try:
        from matplotlib.figure import Figure  # slow to import
    except ImportError:
        return
    figure = Figure(figsize=(3.4 * len(found), 4.4), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (name, row) in zip(panels, found.items()):
        x, y, count = zip(*((part["predicted"], part["observed"], part["count"]) for part in row["calibration"]))
        axes.plot([0, 1], [0, 1], color="0.75", linewidth=1, zorder=1)
        sizes = [20 + 500 * number / sum(count) for number in count]
        axes.scatter(x, y, sizes, color="#777777" if name == "clip" else "#0072b2", alpha=0.75, linewidths=0, zorder=2)
        axes.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), xlabel="reward", aspect="equal")
        axes.set_title(f"{NAMES[name]}\nECE {row['ece']:.3f}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("part labelled good")
    about = f"{sum(count)} images of held-out prompts by tenths of the reward; a point's area is its part of them"
    figure.suptitle(about, fontsize=10)
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m minialign.reward", description=__doc__.split("\n\n")[1])
    add = parser.add_argument

    def tuned(flag: str, kind: Callable[[str], Any], key: str, what: str) -> None:
        others = f"on the embedded model's images: {EMBEDDED_DEFAULTS[key]}"
        add(flag, type=kind, help=f"{what} (default: {OWN_DEFAULTS[key]}; {others})")

    add("run", type=Path, help="folder of a run with labels in its feedback.sqlite")
    add("--out", type=Path, help="the reward model's folder (default: RUN/reward)")
    add(
        "--lambda",
        type=in_range(float, 0),
        default=0.5,
        help="weight of the auxiliary loss (default: 0.5, the paper's)",
    )
    tuned("--temperature", in_range(float, 1e-6), "temperature", "T of the auxiliary loss")
    tuned("--hidden", in_range(int, 1), "hidden", "width of the two hidden layers")
    add("--steps", type=in_range(int, 1), default=2000, help="at most; held-out prompts stop it before (default: 2000)")
    add("--batch-size", type=in_range(int, 2), default=64, help="labelled pairs in a step (default: 64)")
    add("--learning-rate", type=in_range(float, 0, 1), default=3e-4, help="AdamW's (default: 3e-4)")
    add("--balanced", action="store_true", help="draw good and bad pairs equally often, whatever their numbers")
    add("--soft", action="store_true", help="learn the mean of an image's labels in place of their majority")
    add("--clip", help="CLIP of the features, folder or hub id (default: the run's)")
    add("--seed", type=in_range(int, 0, 2**31), default=0, help="of everything random (default: 0)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps ... (default: cuda where there is one, else cpu)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    device = pick_device(args.device)
    read_store(args.run)
    config, stages = (
        read_json(path) if path.exists() else {} for path in (args.run / "config.json", args.run / "stages.json")
    )
    made_with = config.get("settings", {})
    embedded = "model" in made_with and made_with["model"] is None
    settings = {key: value for key, value in vars(args).items() if key not in ("run", "out", "device")}
    for key, value in (EMBEDDED_DEFAULTS if embedded else OWN_DEFAULTS).items():
        if key in settings and settings[key] is None:
            settings[key] = value
    if args.clip is None:
        settings["clip"] = made_with.get("clip", None if embedded else OWN_CLIP)
    out = args.out or args.run / "reward"
    if args.out is None and "reward" in stages:
        raise InputError(f"{args.run}: its results rest on the reward model that is there; accepted: another --out")
    if out.exists() and not (out / "held_out.json").exists():  # what is there will be replaced
        raise InputError(f"--out {out}: holds no reward model; accepted: a reward model's folder, or a new one")
    clip = CLIP.from_pretrained(settings["clip"], device=device)
    with locked(args.run):
        remove_unfinished(args.run)
        measured = learn(args.run, out, clip, settings)
    print(f"\n{table(measured)}\n\n{out}")


if __name__ == "__main__":
    run_command(main)
