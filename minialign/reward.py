"""Stage 2 of the method: the reward model r(x,z), an MLP on frozen CLIP features, and its training.

L_mse = mean (y - r(x,z))^2                                                      Lee et al. 2023, section 3.2
L_pc  = cross entropy of softmax_i( r(x,z_i) / T ) against the original prompt among contrastive ones
L     = L_mse + lambda L_pc
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .models.clip import CLIP
from .models.pretrained import WEIGHTS, InputError, load_network, save_network
from .training import atomic, generator, progress, write_json, write_tensors

HELD_OUT = 0.15  # of the labelled images judge the reward model; their prompts have other images, as those it scores do
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

    good (B,) is 1 where the pair was labelled good; 0 is returned where none was.
    """
    entropy = -F.log_softmax(rewards / temperature, dim=1)[:, 0]
    return (entropy * good).sum() / good.sum().clamp(min=1)


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
    """A reward model trained on B labelled pairs: image_embeds, text_embeds (B,E), label (B,) in {0,1}.

    contrast (B,N-1,E) are the embeddings of each pair's contrastive prompts.
    """
    torch.manual_seed(seed)
    model = RewardModel(config).to(image_embeds.device)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
    prompts = torch.cat([text_embeds[:, None], contrast], dim=1)
    for step in progress(range(steps), "reward"):
        rows = torch.randint(len(label), (batch_size,), generator=generator(seed, step)).to(label.device)
        images = image_embeds[rows][:, None].expand_as(prompts[rows])
        rewards = model(images, prompts[rows])
        mse = mse_loss(rewards[:, 0], label[rows])
        classification = prompt_classification_loss(rewards, label[rows], temperature)
        loss = mse + weight_of_classification * classification
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 20 == 0:
            log({"step": step + 1, "loss": loss.item(), "mse": mse.item(), "classification": classification.item()})
    return model.eval().requires_grad_(False)


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


def contrast_embeds(clip: CLIP, choices: Sequence[Sequence[str]]) -> Tensor:
    """CLIP embeddings (B,K,E) of each image's contrastive prompts, as many as all have."""
    number = min(len(choice) for choice in choices)
    flat = embed_texts(clip, [text for choice in choices for text in choice[:number]] or [""])
    return flat[: len(choices) * number].reshape(len(choices), number, clip.width)


def learn_reward(
    contrastive: Callable[[str, int, random.Random], list[str]],
    clip: CLIP,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    labels: dict[int, float],
    settings: dict[str, Any],
    folder: Path,
    log: Callable[[dict[str, Any]], None],
) -> None:
    """Train the reward model on `labels` (image number -> 0 or 1), measure it on held-out ones, score all images."""
    if not any(labels.values()):
        raise InputError(f"none of the {len(labels)} labels is good: there is nothing to learn from")
    image, text = embed_images(clip, pictures), embed_texts(clip, prompts)
    rng = random.Random(settings["seed"])
    test = sorted(rng.sample(sorted(labels), round(HELD_OUT * len(labels))))
    train = sorted(labels.keys() - set(test))
    if not any(labels[i] for i in train):  # too few labels to spare any
        train, test = list(labels), []
    choices = [contrastive(prompts[i], CONTRASTIVE, rng) for i in train]
    contrast = contrast_embeds(clip, choices)
    config = {"width": clip.width, "hidden": settings["hidden"], "clip": settings["clip"]}
    label = torch.tensor([labels[i] for i in train], device=image.device)
    model = train_reward(
        image[train], text[train], contrast, label, config,
        steps=settings["reward_steps"], temperature=settings["temperature"], seed=settings["seed"], log=log,
    )  # fmt: skip
    score = model(image, text)
    truth = torch.tensor([labels[i] for i in test], device=image.device)
    cosine = torch.cosine_similarity(image[test], text[test])
    scores = {"reward": score}
    if settings["weighting"] == "textnorm":
        others = contrast_embeds(clip, [contrastive(prompt, CONTRASTIVE, rng) for prompt in prompts])
        if not others.shape[1]:
            raise InputError("--weighting textnorm: a prompt has no other one to be told from")
        scores["contrast"] = torch.stack([model(image, other) for other in others.unbind(1)], dim=1)
    write_tensors(folder / "cache" / "reward.safetensors", scores)
    model.save_pretrained(folder / "reward")
    write_json(
        folder / "reward" / "held_out.json",
        {
            "accuracy": float(((score[test] > 0.5) == (truth > 0.5)).float().mean()) if test else None,
            "auc": area_under_curve(score[test], truth),
            "clip_score_auc": area_under_curve(cosine, truth),
            "labels": len(labels),
            "held_out": len(test),
            "good_fraction": sum(labels.values()) / len(labels),
            "calibration": calibration(score[test], truth),
        },
    )
