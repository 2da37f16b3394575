"""The tricks of blocks.py beside the plain expressions, in float64: the same numbers for less work or memory."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from comparisons import SMALL_UNET
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from minialign.models import vae
from minialign.models.blocks import Conv2d, GroupNorm, TransformerBlock, Upsample, norm_silu_conv
from minialign.models.unet import UNet
from minialign.models.vae import VAE


class Calls(TorchDispatchMode):
    """Counts the operations that run."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("size", [None, (10, 14), (9, 14), (9, 13)])
def test_upsample_is_enlarged_and_then_convolved(size):
    torch.manual_seed(0)
    layer, x = Upsample(3).double(), torch.randn(2, 3, 5, 7, dtype=torch.double, requires_grad=True)
    out = layer(x, None if size is None else torch.Size(size))
    expected = layer.conv(F.interpolate(x, size=size or (10, 14), mode="nearest"))
    assert_close(out, expected)
    weights = [x, *layer.parameters()]
    upstream = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, weights, upstream), torch.autograd.grad(expected, weights, upstream)):
        assert_close(a, b)


def test_doubling_makes_no_enlarged_image():
    with Calls() as calls:
        Upsample(3)(torch.randn(1, 3, 4, 4))
    assert calls.count["convolution"] == 1 and not any("upsample" in name for name in calls.count)


def norm_and_conv():
    torch.manual_seed(0)
    norm, conv = GroupNorm(2, 4).double(), Conv2d(4, 6, 3, padding=1).double()
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    return norm, conv, torch.randn(2, 4, 5, 5, dtype=torch.double, requires_grad=True)


def test_norm_silu_conv_computes_again_what_it_did_not_keep():
    norm, conv, x = norm_and_conv()
    expected = conv(F.silu(norm(x)))
    weights = [x, *norm.parameters(), *conv.parameters()]
    upstream = torch.randn_like(expected)
    with Calls() as calls:
        out = norm_silu_conv(x, norm, conv)
        gradients = torch.autograd.grad(out, weights, upstream)
    assert torch.equal(out, expected)
    for a, b in zip(gradients, torch.autograd.grad(expected, weights, upstream)):
        assert torch.equal(a, b)
    assert (calls.count["native_group_norm"], calls.count["silu"], calls.count["convolution"]) == (2, 2, 1)


def test_attention_and_feed_forward_compute_their_norms_again():
    torch.manual_seed(0)
    block = TransformerBlock(8, 2, 6, upcast=False)
    x, context = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 3, 6)
    with Calls() as calls:
        block(x, context).sum().backward()
    assert (calls.count["native_layer_norm"], calls.count["gelu"]) == (6, 2)
    assert calls.count["_scaled_dot_product_flash_attention_for_cpu"] == 2


@pytest.mark.parametrize("what", ["norm, SiLU, convolution", "doubling"])
def test_autocast_computes_again_what_it_computed(what):
    torch.manual_seed(0)
    norm, conv, layer = GroupNorm(2, 4), Conv2d(4, 4, 3, padding=1), Upsample(4)
    x, upstream = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(2, 4, 10, 10)
    with torch.autocast("cpu", torch.bfloat16):
        if what == "doubling":
            out, plain = layer(x), layer.conv(F.interpolate(x, scale_factor=2.0))
            weights = [x, *layer.parameters()]
        else:
            out, plain = norm_silu_conv(x, norm, conv), conv(F.silu(norm(x)))
            weights = [x, *norm.parameters(), *conv.parameters()]
    upstream = upstream[:, :, : out.shape[2], : out.shape[3]].bfloat16()
    assert out.dtype == plain.dtype == torch.bfloat16
    assert_close(out, plain, atol=0.03, rtol=0.03)
    for a, b in zip(torch.autograd.grad(out, weights, upstream), torch.autograd.grad(plain, weights, upstream)):
        assert a.dtype == torch.float32
        assert_close(a, b, atol=0.03 * float(b.abs().max()), rtol=0.03)


def test_norm_silu_conv_without_gradients_works_in_place():
    norm, conv, x = norm_and_conv()
    before = x.detach().clone()
    with torch.no_grad(), Calls() as calls:
        out = norm_silu_conv(x, norm, conv)
    assert calls.count["silu_"] == 1 and torch.equal(x, before)
    assert torch.equal(out, conv(F.silu(norm(x))))


@pytest.mark.slow
def test_the_unet_is_one_graph():
    torch.manual_seed(0)
    unet = UNet(SMALL_UNET)
    given = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, 6)
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    for network in (compiled, unet):
        network(*given).square().mean().backward()
        if network is compiled:
            gradients = [p.grad for p in unet.parameters()]
            unet.zero_grad()
    for gradient, p in zip(gradients, unet.parameters()):
        assert_close(gradient, p.grad)


def test_the_autoencoder_in_slices(monkeypatch):
    torch.manual_seed(0)
    network = VAE({"block_out_channels": [8, 8], "norm_num_groups": 2})
    images, latents = torch.randn(5, 3, 8, 8), torch.randn(5, 4, 4, 4)
    seen = []
    network.encoder.conv_in.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    network.decoder.conv_in.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    whole = *network.encode(images), network.decode(latents)
    monkeypatch.setattr(vae, "SLICE", 2 * 8 * 8)
    parts = *network.encode(images), network.decode(latents)
    assert seen == [5, 5, 2, 2, 1, 2, 2, 1]
    for a, b in zip(whole, parts):
        assert_close(a, b)
