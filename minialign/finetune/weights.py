"""The weights of model images and of timesteps in the reward-weighted loss.

Lee et al. 2023 weigh a model image by its reward r(x,z); other functions of r may take its place (`WEIGHTINGS`). Left
out are weightings that compare an image with others of its prompt, or its prompt with others (advantages, TextNorm):
in the study of this project they did harm or gained nothing (docs/results.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion import NoiseSchedule


@dataclass(frozen=True)
class Weighting:
    """A function of the reward that weighs the model images: weight(r (N,) in [0,1], tau) -> (N,), not negative."""

    tau: float  # unless another one is given
    weight: Callable[[Tensor, float], Tensor]


WEIGHTINGS = {
    "reward": Weighting(1, lambda r, tau: r),  # the paper's; it has no tau
    "threshold": Weighting(0.5, lambda r, tau: (r > tau).float()),  # rejection sampling
    "exponential": Weighting(0.2, lambda r, tau: ((r - 1) / tau).exp()),  # Peters & Schaal 2007
}


def sample_by_weight(weight: Tensor, number: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample `number` row numbers in proportion to weight (N,), and return with them the factors of their losses.

    With the factor, which is the mean weight, a mean over the sampled rows has the expectation of the weighted mean
    over all rows: mean(w) sum_i w_i / sum(w) f_i = mean(w f). No UNet call is spent on an image that weighs nothing.
    Weights are not negative and not all zero, and on the CPU, so that sampling waits for no device.
    """
    chosen = torch.multinomial(weight.double(), number, replacement=True, generator=g)
    return chosen, weight.mean().expand(number)


def sample_evenly(weight: Tensor, number: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample `number` row numbers of weight (N,), all equally often; the factors of their losses are their weights.

    This is how the paper weighs its loss. It estimates the same mean(w f) as `sample_by_weight`, with another variance,
    and spends UNet calls on images that weigh little.
    """
    chosen = torch.randint(len(weight), (number,), generator=g)
    return chosen, weight[chosen]


SAMPLINGS = {"proportional": sample_by_weight, "uniform": sample_evenly}


def min_snr_weight(schedule: NoiseSchedule, t: Tensor, gamma: float) -> Tensor:
    """Weights (B,) of timesteps t (B,) that bound what the error of x_0 counts (Hang et al. 2023, eq. 7).

    The weight is min(SNR, gamma) for a network that predicts x_0, that over SNR for one that predicts the noise, and
    that over SNR + 1 for one that predicts v.
    """
    snr = schedule.snr(t)
    if schedule.prediction_type == "sample":
        return snr.clamp(max=gamma)
    return (gamma / snr).clamp(max=1) if schedule.prediction_type == "epsilon" else snr.clamp(max=gamma) / (snr + 1)
