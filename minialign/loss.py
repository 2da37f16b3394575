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
    beta: weight of the pre-training term; its value is not given in the paper.
    Gradients of every order flow to `prediction` alone: target and reward are data. Works under autocast,
    torch.compile(fullgraph=True), torch.func.grad, vjp and vmap. Raises ValueError for shapes that do not fit.
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
    weight = weight / max(prediction.shape[1:].numel(), 1)
    target = target.detach()
    # one float32 operand makes the difference float32 without a copy of the other
    difference = (prediction - target.to(torch.promote_types(target.dtype, torch.float32))).float()
    return _WeightedSquaredNorm.apply(difference.flatten(1), weight.detach())


class _WeightedSquaredNorm(torch.autograd.Function):
    """sum_i weight_i ||difference_i||^2 of rows (B,N) as one graph node that keeps only the difference.

    The plain expression keeps the squares besides. The backward pass is linear in the difference, which is an input, so
    that autograd and torch.func differentiate it again; vmap's rule is made of it. Not built is forward mode
    (torch.func.jvp): torch.compile(fullgraph=True) refuses a function that has its own.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(difference: Tensor, weight: Tensor) -> Tensor:
        # a norm needs no copy of the squares, and autocast leaves it in float32 where a matrix product would not stay
        return (torch.linalg.vector_norm(difference, dim=1).square() * weight).sum()

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        difference, weight = ctx.saved_tensors
        return difference * (2 * grad * weight)[:, None], None
