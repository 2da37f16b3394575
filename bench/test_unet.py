"""One training step of a mid-size UNet, forward and backward, beside diffusers: pytest bench/test_unet.py"""

import pytest
import torch
from pairs import UNET, compare, compare_memory, kernel_share, matmul_rate, operations, unet

diffusers = pytest.importorskip("diffusers")
GOALS = {"float32": 1.25, "bf16 autocast": 1.5, "float32, both compiled": 1.1}


@pytest.mark.parametrize("how", GOALS)
def test_forward_and_backward(benchmark, how):
    ours, theirs = unet(), diffusers.UNet2DConditionModel(**UNET)
    theirs.load_state_dict(ours.state_dict())
    dtype = torch.bfloat16 if "bf16" in how else torch.float32
    x, t, context = torch.randn(4, 4, 32, 32), torch.tensor([3, 300, 600, 999]), torch.randn(4, 77, 768)
    predict, predict_theirs = ours, lambda *given: theirs(*given, return_dict=False)[0]
    if "compiled" in how:
        predict = torch.compile(ours, fullgraph=True)  # raises at a graph break
        predict_theirs = torch.compile(predict_theirs)

    def step(network, call):
        for p in network.parameters():  # the gradients are there from the start, so that they are not counted
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            prediction = call(x, t, context)
        prediction.float().square().mean().backward()
        return prediction.detach().float()

    def mine():
        return step(ours, predict)

    def peer():
        return step(theirs, predict_theirs)

    rounds = 9 if how == "float32" else 5
    found = compare(benchmark, f"UNet forward + backward, {how}", mine, peer, GOALS[how], rounds)
    if "compiled" not in how:
        work = operations(peer) / matmul_rate(dtype)  # the plain network's, whatever tricks save or do twice
        found["of_matmul_rate"] = [work / found[name] for name in ("ours", "theirs")]
        compare_memory(found, mine, peer, goal=0.7)
        share = kernel_share(peer)
        found["note"] = (
            f"{share:.0%} of diffusers' step are the library's convolutions, products and attentions; with nothing "
            f"else left it would be {1 / share:.2f} times as fast"
        )
