"""The trainer of the reward model: L_mse + lambda L_pc by AdamW on CLIP features (Lee et al. 2023, section 3.2).

Where people compared images, L_bt is added (Christiano et al. 2017), or is the only loss where nobody gave a verdict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.optimising import generator, progress
from ..models.reward import RewardModel, comparison_loss, mse_loss, prompt_classification_loss


@dataclass(frozen=True)
class Pairs:
    """B labelled pairs by their rows in tables of embeddings: image (B,), prompts (B,N), label (B,) in [0,1].

    Column 0 of `prompts` is the pair's own prompt, the others are contrastive; -1 stands for none. Rows repeat,
    embeddings are held once.
    """

    image: Tensor
    prompts: Tensor
    label: Tensor


@dataclass(frozen=True)
class Comparisons:
    """C judgements of two images of a prompt, by their rows in tables of embeddings: first, second, prompt (C,).

    preferred (C,): 1 where the first image is better, 0 where the second one is, 1/2 for a tie.
    """

    first: Tensor
    second: Tensor
    prompt: Tensor
    preferred: Tensor


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
    comparisons: Comparisons | None = None,
    comparison_temperature: float = 0.2,
    seed: int = 0,
    log: Callable[[dict[str, float]], None] = lambda row: None,
    quiet: bool = False,
) -> RewardModel:
    """A reward model trained on pairs of the tables images (I,E) and texts (P,E), and on comparisons; one may be empty.

    `balanced`: good (label above 0.5) and bad pairs are sampled equally often, whatever their numbers; r is then the
    probability of good among as many bad ones.
    """
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays
        torch.manual_seed(seed)
        model = RewardModel(config).to(images.device)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay, fused=True)
    known = train.label.cpu()  # rows are sampled and sorted on the CPU: no waiting for a device
    options = weight_of_classification, temperature
    weights = {"mse": 1.0, "classification": weight_of_classification, "comparison": 1.0}
    for step in range(steps) if quiet else progress(range(steps), "reward"):
        g, losses = generator(seed, step), {}
        if len(known):
            rows = sample_rows(known, batch_size, balanced, g)
            losses = dict(zip(weights, reward_losses(model, images, texts, train, rows, known, *options)))
        if comparisons is not None:
            losses["comparison"] = compared(model, images, texts, comparisons, batch_size, comparison_temperature, g)
        torch.stack([weights[name] * loss for name, loss in losses.items()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 20 == 0:
            values = {name: loss.item() for name, loss in losses.items()}
            log({"step": step + 1, "loss": sum(weights[name] * loss for name, loss in values.items())} | values)
    return model.eval().requires_grad_(False)


def sample_rows(known: Tensor, number: int, balanced: bool, g: torch.Generator) -> Tensor:
    """Rows (number,) of labels (B,), those with a label above 0 first: they are in both losses."""
    if balanced and len((known > 0.5).unique()) == 2:
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


def compared(
    model: RewardModel,
    images: Tensor,
    texts: Tensor,
    data: Comparisons,
    number: int,
    temperature: float,
    g: torch.Generator,
) -> Tensor:
    """L_bt of `number` comparisons, sampled with replacement."""
    rows = torch.randint(len(data.preferred), (number,), generator=g).to(images.device)
    prompts = texts[data.prompt[rows]]
    first, second = (model(images[place[rows]], prompts) for place in (data.first, data.second))
    return comparison_loss(first, second, data.preferred[rows], temperature)


@torch.no_grad()
def rewards_of(model: RewardModel, images: Tensor, texts: Tensor, image: Tensor, prompts: Tensor) -> Tensor:
    """Rewards (B,N) of rows image (B,) of one table of embeddings for rows prompts (B,N) of another; -inf for -1."""
    chunks = zip(image.split(1024), prompts.split(1024))
    return torch.cat(
        [model(images[i][:, None].expand_as(texts[z]), texts[z]).masked_fill(z < 0, float("-inf")) for i, z in chunks]
    )
