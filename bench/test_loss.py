"""The loss, forward and backward, beside the plain tensor expression: pytest bench/test_loss.py"""

import pytest
import torch
from pairs import compare, compare_memory

from minialign import reward_weighted_loss


def plain(prediction, target, reward, pretrain, beta):
    """The expression that one writes first."""
    error = (prediction.float() - target.float()).pow(2).flatten(1).mean(1)
    model = (reward * error)[~pretrain].mean()
    return model + beta * error[pretrain].mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss(benchmark, dtype):
    g = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 64, 4, 64, 64, generator=g).to(dtype)
    prediction.requires_grad_()
    reward, pretrain = torch.rand(64, generator=g), torch.arange(64) >= 32

    def step(loss):
        if prediction.grad is not None:
            prediction.grad.zero_()
        loss(prediction, target, reward, pretrain, 1.0).backward()

    calls = (lambda: step(reward_weighted_loss)), (lambda: step(plain))
    work = f"the loss on 64 x 4 x 64 x 64, {str(dtype).removeprefix('torch.')}"
    found = compare(benchmark, work, *calls, goal=2, rounds=41)
    compare_memory(found, *calls, goal=0.5)
