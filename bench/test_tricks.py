"""Each trick of models/blocks.py beside the plain expression: pytest bench/test_tricks.py"""

import pytest
import torch
import torch.nn.functional as F
from pairs import compare

from minialign.models.blocks import Conv2d, FeedForward, GroupNorm, LayerNorm, Upsample, norm_silu_conv


def backward(call, x):
    if x.grad is not None:
        x.grad.zero_()
    call(x).sum().backward()


@pytest.mark.parametrize(("batch", "channels", "size", "train"), [(4, 320, 16, True), (1, 512, 64, False)])
def test_doubling(benchmark, batch, channels, size, train):
    torch.manual_seed(0)
    layer = Upsample(channels)
    x = torch.randn(batch, channels, size, size, requires_grad=train)
    if not train:  # the autoencoder's layout
        x = x.contiguous(memory_format=torch.channels_last)

    def plain(x):
        return layer.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    work = f"doubling and convolving {batch} x {channels} x {size} x {size}, {'training' if train else 'inference'}"
    if train:
        compare(benchmark, work, lambda: backward(layer, x), lambda: backward(plain, x), None, rounds=31)
    else:
        with torch.no_grad():
            compare(benchmark, work, lambda: layer(x), lambda: plain(x), None, rounds=31)


def test_norm_silu_conv(benchmark):
    torch.manual_seed(0)
    norm, conv = GroupNorm(32, 160), Conv2d(160, 160, 3, padding=1)
    x = torch.randn(4, 160, 32, 32, requires_grad=True)

    def mine():
        backward(lambda x: norm_silu_conv(x, norm, conv), x)

    def plain():
        backward(lambda x: conv(F.silu(norm(x))), x)

    compare(benchmark, "norm, SiLU, convolution that keep their input alone", mine, plain, None, rounds=31)


def test_feed_forward(benchmark):
    torch.manual_seed(0)
    ff, norm = FeedForward(160), LayerNorm(160)
    x = torch.randn(4, 1024, 160, requires_grad=True)

    def plain(x):
        hidden, gate = ff.net[0].proj(norm(x)).chunk(2, dim=-1)
        return ff.net[2](hidden * F.gelu(gate))

    calls = (lambda: backward(lambda x: ff(x, norm), x)), (lambda: backward(plain, x))
    compare(benchmark, "gated feed-forward that keeps its products' inputs alone", *calls, None, rounds=31)
