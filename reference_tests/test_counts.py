"""bench/counts.py: what is counted, against numbers counted by hand, and the committed table of counts."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from comparisons import SMALL_UNET

sys.path.append(str(Path(__file__).parent.parent / "bench"))
import counts
from counts import count, peak_memory

from minialign.models.unet import UNet


def test_peak_memory():
    x = torch.zeros(1000)  # 4,000 bytes that were there before

    def call():
        y = x + 1
        y.mul_(2)  # in place
        z = torch.cat([y, y])  # 12,000 with y
        del y
        return z.view(2, 1000)[0] + 1  # 8,000 + 4,000

    assert peak_memory(call) == 12_000
    assert peak_memory(lambda: x.add_(1)) == 0
    w = torch.zeros(1000, requires_grad=True)
    w.grad = torch.zeros(1000)
    # the graph keeps exp's result; the backward pass adds a cosine and their product; two scalars
    assert peak_memory(lambda: w.exp().sin().sum().backward()) == 12_008


def test_floating_point_operations():
    a, b = torch.randn(4, 5, requires_grad=True), torch.randn(5, 6)
    assert count(lambda: a @ b).flops == 2 * 4 * 5 * 6
    q = torch.randn(2, 3, 16, 8, requires_grad=True)
    forward = 2 * 2 * 2 * 3 * 16 * 16 * 8  # two products
    assert count(lambda: F.scaled_dot_product_attention(q, q, q)).flops == forward
    with_backward = count(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward()).flops
    assert with_backward == forward + forward * 5 // 2


def test_operations_and_what_they_move():
    x, y = torch.zeros(10), torch.zeros(10, dtype=torch.float64)

    def call():
        z = x + 1  # 40 bytes read, 40 written
        z.view(2, 5).t()  # nothing
        torch.empty(100)
        return z.mul_(y)  # 40 and 80 read, 40 written

    assert count(call)[1:3] == (240, 2)


def test_copies():
    """To a device, and to a number of Python; what stays on the device is none."""
    x = torch.zeros(10)
    assert count(lambda: (x.to("meta") + 1).sum()).copies == 1
    assert count(lambda: int(x.sum())).copies == 1
    assert count(lambda: torch.zeros(10, device="meta") + 2.0).copies == 0


def test_the_meta_device_counts_what_the_cpu_does():
    def step(device):
        with torch.device(device):
            network = UNet(SMALL_UNET)
            x, t, context = torch.randn(2, 4, 16, 16), torch.full((2,), 500), torch.randn(2, 7, 6)
        return count(lambda: network(x, t, context).square().mean().backward())

    with counts.on_meta():
        found = step("meta")
    assert found == step("cpu") and found.flops > 10**7


SLOW = [work for work in counts.WORKS if "Stable Diffusion" in work]  # eight times the weights, the same code


@pytest.mark.parametrize("work", [pytest.param(w, marks=pytest.mark.slow if w in SLOW else ()) for w in counts.WORKS])
def test_counts_are_those_of_the_page(work):
    """Another count is other code: `python bench/counts.py` writes them."""
    text = counts.PAGE.read_text().split(counts.BEGIN)[1].split(counts.END)[0]
    version = re.search(r"^Counted with torch ([\d.]+):$", text, re.M)[1]
    if torch.__version__.split("+")[0] != version:
        pytest.skip(
            f"the table was counted with torch {version}, whose operations another version may compose otherwise"
        )
    (expected,) = (line for line in text.splitlines() if line.startswith(f"| {work} |"))
    assert counts.row(work) == expected


def test_the_page_has_all_works():
    lines = counts.PAGE.read_text().split(counts.BEGIN)[1].split(counts.END)[0].splitlines()
    rows = [line.split(" | ")[0].lstrip("| ") for line in lines if line.startswith("| ")]
    assert rows == ["work", "---", *counts.WORKS]
