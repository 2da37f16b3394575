"""The trainer of the reward model: L_mse + lambda L_pc by AdamW on CLIP features (Lee et al. 2023, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.optimising import generator, progress
from ..models.reward import RewardModel, mse_loss, prompt_classification_loss


@dataclass(frozen=True)
class Pairs:
    """B labelled pairs by their rows in tables of embeddings: image (B,), prompts (B,N), label (B,) in [0,1].

    Column 0 of `prompts` is the pair's own prompt, the others are contrastive; -1 stands for none. Rows repeat,
    embeddings are held once.
    """

    image: Tensor
    prompts: Tensor
    label: Tensor


def train_reward(
    images: Tensor,
    texts: Tensor,
    train: Pairs,
    config: dict[str, Any],
    *,
    steps: int = 1000,
    batch_size: int = 64,
    learning_rate: float = 3e-4,
    weight_decay: float = 1e-2,
    weight_of_classification: float = 0.5,  # the paper's lambda
    temperature: float = 2.0,
    balanced: bool = False,
    seed: int = 0,
    log: Callable[[dict[str, float]], None] = lambda row: None,
    quiet: bool = False,
) -> RewardModel:
    """A reward model trained on pairs of the tables images (I,E) and texts (P,E).

    `balanced`: good (label above 0.5) and bad pairs are sampled equally often, whatever their numbers; r is then the
    probability of good among as many bad ones.
    """
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays
        torch.manual_seed(seed)
        model = RewardModel(config).to(images.device)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay, fused=True)
    known = train.label.cpu()  # rows are sampled and sorted on the CPU: no waiting for a device
    how = weight_of_classification, temperature
    for step in range(steps) if quiet else progress(range(steps), "reward"):
        rows = sample_rows(known, batch_size, balanced, generator(seed, step))
        mse, classification = reward_losses(model, images, texts, train, rows, known, *how)
        (mse + weight_of_classification * classification).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 20 == 0:
            loss = mse.item() + weight_of_classification * classification.item()
            log({"step": step + 1, "loss": loss, "mse": mse.item(), "classification": classification.item()})
    return model.eval().requires_grad_(False)


def sample_rows(known: Tensor, number: int, balanced: bool, g: torch.Generator) -> Tensor:
    """Rows (number,) of labels (B,), those with a label above 0 first: they are in both losses."""
    if balanced:
        kinds = [(known > 0.5).nonzero()[:, 0], (known <= 0.5).nonzero()[:, 0]]
        halves = zip(kinds, (number // 2, number - number // 2))
        rows = torch.cat([kind[torch.randint(len(kind), (many,), generator=g)] for kind, many in halves])
    else:
        rows = torch.randint(len(known), (number,), generator=g)
    return rows[known[rows].argsort(descending=True, stable=True)]


def reward_losses(
    model: RewardModel,
    images: Tensor,
    texts: Tensor,
    train: Pairs,
    rows: Tensor,
    known: Tensor,
    weight_of_classification: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """L_mse and L_pc of a batch of rows (B,), in the order of `sample_rows`, of which `known` are all labels.

    Contrastive prompts are scored for the pairs with a label above 0 alone, all in one call of the model.
    """
    liked = int((known[rows] > 0).sum()) if weight_of_classification else 0
    rows = rows.to(images.device)
    image, prompts, label = train.image[rows], train.prompts[rows], train.label[rows]
    others = prompts[:liked, 1:]
    reward = model(
        images[torch.cat([image, image[:liked].repeat_interleave(others.shape[1])])],
        texts[torch.cat([prompts[:, 0], others.flatten()])],
    )
    own, contrast = reward[: len(rows)], reward[len(rows) :].reshape(others.shape)
    rewards = torch.cat([own[:liked, None], contrast.masked_fill(others < 0, float("-inf"))], dim=1)
    return mse_loss(own, label), prompt_classification_loss(rewards, label[:liked], temperature)


@torch.no_grad()
def rewards_of(model: RewardModel, images: Tensor, texts: Tensor, image: Tensor, prompts: Tensor) -> Tensor:
    """Rewards (B,N) of rows image (B,) of one table of embeddings for rows prompts (B,N) of another; -inf for -1."""
    parts = zip(image.split(1024), prompts.split(1024))
    return torch.cat(
        [model(images[i][:, None].expand_as(texts[z]), texts[z]).masked_fill(z < 0, float("-inf")) for i, z in parts]
    )
