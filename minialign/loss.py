"""Stage 3 of the method: the reward-weighted denoising loss. This file imports torch alone, so it can be copied.

    L = E_model[ r(x,z) ||target - prediction||^2 ] + beta E_pre[ ||target - prediction||^2 ]

Lee et al. 2023, section 3.3, with the squared norm averaged over the elements of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reward_weighted_loss(
    prediction: Tensor, target: Tensor, reward: Tensor, pretrain: Tensor | None = None, beta: float = 1.0
) -> Tensor:
    """The loss of one batch as a float32 scalar; each term is the mean over its own rows, and 0 where it has none.

    prediction, target: (B, ...) of one shape, any floating dtype; accumulated in float32.
    reward: (B,) weights of the model's own images, r in [0,1] in the paper; ignored in rows of the pre-training batch.
    pretrain: (B,) bool, True for rows of the pre-training batch; None means that all rows are the model's own.
    beta: weight of the pre-training term (paper: 1).
    Gradients flow to `prediction` alone: target and reward are data. Raises ValueError for shapes that do not fit.
    """
    if prediction.shape != target.shape or prediction.ndim < 2:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must both be (B, ...)")
    rows = (len(prediction),)
    if reward.shape != rows:
        raise ValueError(f"reward must have shape {rows}, one weight a row, not {tuple(reward.shape)}")
    if pretrain is None:
        weight = reward.float() / max(rows[0], 1)
    elif pretrain.shape != rows or pretrain.dtype != torch.bool:
        raise ValueError(f"pretrain must be bool of shape {rows}, not {pretrain.dtype} of {tuple(pretrain.shape)}")
    else:
        count = pretrain.sum()  # stays on the device: no synchronisation
        model_weight = reward.float() / (rows[0] - count).clamp(min=1)
        weight = torch.where(pretrain, beta / count.clamp(min=1), model_weight)
    return _WeightedSquaredError.apply(prediction, target, weight / prediction.shape[1:].numel())


class _WeightedSquaredError(torch.autograd.Function):
    """sum_i weight_i * sum_elements (prediction_i - target_i)^2 as one graph node that keeps only the difference.

    The plain expression keeps the difference, its square and two float32 copies under autocast.
    """

    @staticmethod
    def forward(ctx, prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        single = prediction.dtype in (torch.float32, torch.float64)  # whose float() is no copy to work in
        difference = ((prediction - target).float() if single else prediction.float().sub_(target)).flatten(1)
        ctx.save_for_backward(difference, weight)
        ctx.like = prediction.shape, prediction.dtype
        # a norm needs no copy of the squares, and autocast leaves it in float32 where a matrix product would not stay
        return (torch.linalg.vector_norm(difference, dim=1).square() * weight).sum()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        difference, weight = ctx.saved_tensors
        shape, dtype = ctx.like
        out = torch.empty_like(difference, dtype=dtype)
        torch.mul(difference, (2 * grad * weight)[:, None], out=out)
        return out.reshape(shape), None, None
