"""One training step of a mid-size UNet, forward and backward, beside diffusers: pytest bench/test_unet.py"""

import pytest
import torch
from pairs import compare, matmul_rate
from torch.utils.flop_counter import FlopCounterMode

from minialign.models.unet import UNet

diffusers = pytest.importorskip("diffusers")
CONFIG = {
    "block_out_channels": [128, 256, 384, 384],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 32,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward(benchmark, dtype):
    torch.manual_seed(0)
    ours, theirs = UNet(CONFIG), diffusers.UNet2DConditionModel(**CONFIG)
    theirs.load_state_dict(ours.state_dict())
    x, t, context = torch.randn(4, 4, 32, 32), torch.tensor([3, 300, 600, 999]), torch.randn(4, 77, 768)

    def step(predict):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            prediction = predict()
        prediction.float().square().mean().backward()

    def mine():
        ours.zero_grad()
        step(lambda: ours(x, t, context))

    def peer():
        theirs.zero_grad()
        step(lambda: theirs(x, t, context).sample)

    with FlopCounterMode(display=False) as counter:
        mine()
    compare(benchmark, mine, peer)
    rate = counter.get_total_flops() / benchmark.extra_info["ours_s"]
    benchmark.extra_info["of_matmul_rate"] = round(rate / matmul_rate(dtype), 3)
    benchmark.extra_info["parameters"] = sum(p.numel() for p in ours.parameters())
