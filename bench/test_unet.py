"""One training step of a mid-size UNet, forward and backward, beside diffusers: pytest bench/test_unet.py"""

import pytest
import torch
from configs import UNET
from pairs import arithmetic, unet

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module", params=["eager", "both compiled"])
def steps(request, device, dtype):
    """How, and a step of each side, which returns the prediction."""
    ours, theirs = unet(), diffusers.UNet2DConditionModel(**UNET)
    theirs.load_state_dict(ours.state_dict())
    ours, theirs = ours.to(device), theirs.to(device)
    x, t, context = torch.randn(4, 4, 32, 32), torch.tensor([3, 300, 600, 999]), torch.randn(4, 77, 768)
    given = [tensor.to(device) for tensor in (x, t, context)]
    predict, predict_theirs = ours, lambda *given: theirs(*given, return_dict=False)[0]
    if "compiled" in request.param:
        if device.type == "meta":
            pytest.skip("nothing is compiled for the meta device")
        predict = torch.compile(ours, fullgraph=True)  # raises at a graph break
        predict_theirs = torch.compile(predict_theirs)

    def step(network, call):
        for p in network.parameters():  # the gradients are there from the start, so that they are not counted
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
        with arithmetic(device, dtype):
            prediction = call(*given)
        prediction.float().square().mean().backward()
        return prediction.detach()

    return request.param, lambda: step(ours, predict), lambda: step(theirs, predict_theirs)


def test_forward_and_backward(compare, steps):
    how, mine, peer = steps
    if how == "eager":
        compare("UNet forward + backward", mine, peer, memory_goal=0.65)
    else:
        compare("UNet forward + backward, both compiled", mine, peer, goal=1.2, counted=False)
