"""The reward model r(x,z) of the method's stage 2: an MLP on frozen CLIP features, and the terms of its loss.

L_mse = mean (y - r(x,z))^2                                                      Lee et al. 2023, section 3.2
L_pc  = cross entropy of softmax_i( r(x,z_i) / T ) against the original prompt among contrastive ones
L     = L_mse + lambda L_pc
L_bt  = cross entropy of sigmoid( (r(x_i,z) - r(x_j,z)) / T ) against which of two images is better, added to L where
        people compared images                                                   Christiano et al. 2017, section 2.2.3
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .clip import CLIP
from .pretrained import WEIGHTS, load_network, save_network


class RewardModel(nn.Module):
    """r(x,z) in [0,1] from CLIP embeddings of image and prompt: two hidden layers, ReLU, sigmoid.

    The paper has two layers with 1,024 hidden units; its activation and exact layers are not known to us.
    """

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
        """Read a folder that `save_pretrained` wrote; InputError names the file that cannot be read."""
        return load_network(cls, Path(folder), WEIGHTS[1], device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into a folder; other files in it stay."""
        save_network(self, Path(folder), WEIGHTS[1])

    @cached_property
    def clip(self) -> CLIP:
        """The CLIP model of the features, loaded when first needed; not part of this model's weights."""
        return CLIP.from_pretrained(self.config.get("clip"), device=next(self.parameters()).device)

    def forward(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Rewards (...) in [0,1] of CLIP embeddings (...,E) of images and prompts, of any norm."""
        # unit vectors of E elements, brought to unit variance, which the layers' initialisation expects
        pair = torch.cat([F.normalize(image_embeds, dim=-1), F.normalize(text_embeds, dim=-1)], dim=-1)
        return self.layers(pair * image_embeds.shape[-1] ** 0.5).squeeze(-1).sigmoid()

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Rewards (B,) of images for their prompts."""
        return self(embed_images(self.clip, images), embed_texts(self.clip, prompts))


@torch.no_grad()
def embed_images(clip: CLIP, images: Sequence[Image.Image], batch: int = 128) -> Tensor:
    """CLIP embeddings (B,E) of images, `batch` at a time."""
    device = clip.logit_scale.device
    starts = range(0, len(images), batch)
    return torch.cat([clip.encode_image(clip.preprocess(list(images[i : i + batch])).to(device)) for i in starts])


@torch.no_grad()
def embed_texts(clip: CLIP, prompts: Sequence[str], batch: int = 256) -> Tensor:
    """CLIP embeddings (B,E) of prompts, each different one encoded once."""
    unique = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    ids = clip.tokenizer(list(unique)).to(clip.logit_scale.device)
    embeds = torch.cat([clip.encode_text(chunk) for chunk in ids.split(batch)])
    return embeds[[unique[prompt] for prompt in prompts]]


def mse_loss(reward: Tensor, label: Tensor) -> Tensor:
    """L_mse of rewards (B,) and labels (B,) in [0,1]."""
    return (label - reward).square().mean()


def prompt_classification_loss(rewards: Tensor, good: Tensor, temperature: float) -> Tensor:
    """L_pc of rewards (B,N) for the original prompt (column 0) and N-1 contrastive ones, over the rows labelled good.

    good (B,) is 1 where the pair was labelled good, and a row's weight where labels are between 0 and 1; 0 is returned
    where none was. A reward of -inf stands for a contrastive prompt that a row does not have.
    """
    entropy = -F.log_softmax(rewards / temperature, dim=1)[:, 0]
    return (entropy * good).sum() / good.sum().clamp(min=1e-6)


def comparison_loss(first: Tensor, second: Tensor, preferred: Tensor, temperature: float) -> Tensor:
    """L_bt of rewards (C,) and (C,) of two images of a prompt, the model of Bradley & Terry (1952).

    preferred (C,) is 1 where the first image is better, 0 where the second one is, and 1/2 for a tie.
    """
    return F.binary_cross_entropy_with_logits((first - second) / temperature, preferred)
