"""bench/plan_memory.py: the step on fake tensors takes what the trainer itself takes on real ones."""

import sys
from pathlib import Path

import pytest
import torch
from comparisons import SMALL_UNET

sys.path.append(str(Path(__file__).parent.parent / "bench"))
from counts import Memory
from plan_memory import Model, as_on_cuda, plans, prepared, size

from minialign import NoiseSchedule
from minialign.finetune import FineTuning, Latents, TrainingData, finetune

SMALL = SMALL_UNET | {"block_out_channels": [32, 64], "cross_attention_dim": 32, "norm_num_groups": 32}
MODEL = Model("small", SMALL, (4, 16, 16), ((77, 32),), ())
ADAPTERS = {"dtype": torch.bfloat16, "lora": 2, "checkpointing": True}
SLOW = [
    ({}, 1),
    ({"checkpointing": True}, 1),
    ({"checkpointing": True}, 2),
    ({"dtype": torch.bfloat16}, 1),
    (ADAPTERS, 2),
]


def taken(unet, rows, folder, dtype, accumulate):
    """The most bytes that live at once in two steps of the trainer, before its checkpoint."""
    images, pairs = (Latents(torch.randn(9, 4, 16, 16), torch.rand(9, 4, 16, 16), torch.arange(9)) for _ in range(2))
    context, peaks = [torch.randn(10, 77, 32)], []
    with as_on_cuda(), Memory() as memory:
        settings = FineTuning(
            steps=3, beta=1.0, batch_size=rows * accumulate, learning_rate=1e-4, dtype=dtype,
            pretrain_fraction=0.5, accumulate=accumulate, log_every=2,
        )  # fmt: skip
        data = TrainingData(context, images, torch.ones(9), pairs)
        finetune(unet, NoiseSchedule.from_config({}), data, folder, settings, log=lambda row: peaks.append(memory.peak))
    return peaks[0]


@pytest.mark.parametrize(
    ("how", "accumulate"),
    [({}, 2), (ADAPTERS, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_the_plan_is_what_the_trainer_takes(how, accumulate, tmp_path):
    how = {"dtype": torch.float32, "checkpointing": False, "lora": 0} | how
    unet = prepared(SMALL, **how)
    real = size(unet) + taken(unet, 4, tmp_path, how["dtype"], accumulate)
    plan = plans(MODEL, [4], **how)[4]
    assert plan.peak(accumulate > 1) == pytest.approx(real, rel=0.02)
    assert plan.weights == size(unet)


def test_shards_divide_what_is_at_rest():
    plan = plans(MODEL, [4], torch.float32)[4]
    at_rest = 16 * sum(p.numel() for p in prepared(SMALL, torch.float32, 0, False).parameters())
    assert plan.weights + plan.gradients + plan.moments == at_rest
    assert plan.fsdp(2) - plan.fsdp(4) == pytest.approx(at_rest / 4, abs=1)
    assert plan.ddp() - plan.peak() == plan.fsdp(2, accumulate=True) - plan.fsdp(2) == at_rest / 4
