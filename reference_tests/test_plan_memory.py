"""bench/plan_memory.py: the step on fake tensors takes what the same step on real ones does."""

import sys
from pathlib import Path

import pytest
import torch
from comparisons import SMALL_UNET

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))
plan_memory = pytest.importorskip("plan_memory")

SMALL = SMALL_UNET | {"block_out_channels": [64, 128], "cross_attention_dim": 32, "norm_num_groups": 32}
MODEL = plan_memory.Model("small", SMALL, (4, 32, 32), ((77, 32),), ())


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"checkpointing": True},
        {"dtype": torch.bfloat16},
        {"lora": 2, "dtype": torch.bfloat16, "checkpointing": True},
    ],
)
def test_fake_tensors_count_what_real_ones_do(how):
    how = {"dtype": torch.float32, "checkpointing": False, "lora": 0} | how
    unet = plan_memory.prepared(SMALL, how["dtype"], how["lora"], how["checkpointing"])
    real = plan_memory.measured(unet, MODEL.latents, MODEL.context, 2, how["dtype"])
    fake = plan_memory.plan(MODEL, 2, **how)
    for name in ("weights", "gradients", "moments", "step", "one_more", "root", "block"):
        assert getattr(fake, name) == pytest.approx(getattr(real, name), rel=0.1), name
    assert real.weights == sum(p.nbytes for p in unet.parameters())
