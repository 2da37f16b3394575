"""Each trick of models/blocks.py beside the plain expression: pytest bench/test_tricks.py"""

import pytest
import torch
import torch.nn.functional as F
from pairs import arithmetic

from minialign.models.blocks import Conv2d, FeedForward, GroupNorm, LayerNorm, Upsample, norm_silu_conv

ROUNDS = 15


@pytest.fixture
def backward(device, dtype):
    def run(call, x):
        if x.grad is not None:
            x.grad.zero_()
        with arithmetic(device, dtype):
            result = call(x)
        result.sum().backward()

    return run


@pytest.mark.parametrize(("batch", "channels", "size", "train"), [(4, 320, 16, True), (1, 512, 64, False)])
def test_doubling(compare, backward, device, dtype, batch, channels, size, train):
    torch.manual_seed(0)
    layer = Upsample(channels).to(device)
    x = torch.randn(batch, channels, size, size).to(device)
    if not train:  # the autoencoder's layout and precision
        layer, x = layer.to(dtype), x.to(dtype, memory_format=torch.channels_last)

    def plain(x):
        return layer.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    work = f"doubling and convolving {batch} x {channels} x {size} x {size}, {'training' if train else 'inference'}"
    if train:
        x.requires_grad_()
        compare(work, lambda: backward(layer, x), lambda: backward(plain, x), rounds=ROUNDS)
    else:
        with torch.no_grad():
            compare(work, lambda: layer(x), lambda: plain(x), rounds=ROUNDS)


def test_norm_silu_conv(compare, backward, device):
    torch.manual_seed(0)
    norm, conv = GroupNorm(32, 160).to(device), Conv2d(160, 160, 3, padding=1).to(device)
    x = torch.randn(4, 160, 32, 32).to(device).requires_grad_()

    def mine():
        backward(lambda x: norm_silu_conv(x, norm, conv), x)

    def plain():
        backward(lambda x: conv(F.silu(norm(x))), x)

    compare("norm, SiLU and convolution with only the input kept for the backward pass", mine, plain, rounds=ROUNDS)


def test_feed_forward(compare, backward, device):
    torch.manual_seed(0)
    ff, norm = FeedForward(160).to(device), LayerNorm(160).to(device)
    x = torch.randn(4, 1024, 160).to(device).requires_grad_()

    def plain(x):
        hidden, gate = ff.net[0].proj(norm(x)).chunk(2, dim=-1)
        return ff.net[2](hidden * F.gelu(gate))

    calls = (lambda: backward(lambda x: ff(x, norm), x)), (lambda: backward(plain, x))
    compare("gated feed-forward with only its products' inputs kept for the backward pass", *calls, rounds=ROUNDS)
