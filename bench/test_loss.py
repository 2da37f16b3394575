"""The loss, forward and backward, beside the plain tensor expression: pytest bench/test_loss.py"""

import pytest
import torch

from minialign import reward_weighted_loss


def plain(prediction, target, reward, pretrain, beta):
    """The expression that one writes first."""
    error = (prediction.float() - target.float()).pow(2).flatten(1).mean(1)
    model = (reward * error)[~pretrain].mean()
    return model + beta * error[pretrain].mean()


@pytest.mark.parametrize("rows", [64, 512])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_loss(compare, device, kind, rows):
    if device.type == "meta":
        pytest.skip("the plain expression selects rows by content")
    g = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, rows, 4, 64, 64, generator=g).to(device, kind)
    prediction.requires_grad_()
    reward, pretrain = torch.rand(rows, generator=g).to(device), torch.arange(rows, device=device) >= rows // 2

    def step(loss):
        if prediction.grad is not None:
            prediction.grad.zero_()
        loss(prediction, target, reward, pretrain, 1.0).backward()

    calls = (lambda: step(reward_weighted_loss)), (lambda: step(plain))
    work = f"the loss on {rows} x 4 x 64 x 64, {str(kind).removeprefix('torch.')}"
    compare(work, *calls, goal=2, memory_goal=0.5, rounds=21)
