"""Two processes under torchrun (gloo) do what one does: DDP, FSDP2, elastic restarts, checkpoints of another number."""

import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from comparisons import SMALL_UNET
from helpers import own_images
from safetensors.torch import load_file, save_file

from minialign import NoiseSchedule, Pipeline
from minialign.engine.checkpoints import checkpoints
from minialign.engine.commands import run_command
from minialign.engine.processes import gather_weights, is_main_process, process_group
from minialign.files import InputError
from minialign.finetune import FineTuning, Latents, TrainingData, finetune
from minialign.models.pretrained import EMBEDDED
from minialign.models.unet import UNet

SMALL = SMALL_UNET | {"block_out_channels": [8, 16], "norm_num_groups": 4, "sample_size": 4}
STEPS = 20


def fine_tuned(folder: Path, parallel: str = "ddp", dies_at: int | None = None, **how) -> dict[str, torch.Tensor]:
    """The weights of a tiny UNet after 20 steps of 9 rows, 3 of them pairs: two processes cannot share them evenly."""
    torch.manual_seed(0)
    unet, g = UNet(SMALL), torch.Generator().manual_seed(1)
    images, pairs = (
        Latents(torch.randn(n, 4, 4, 4, generator=g), torch.rand(n, 4, 4, 4, generator=g), torch.arange(n) % 3)
        for n in (12, 7)
    )
    context = torch.randn(4, 5, 6, generator=g)
    calls, died = 0, folder / f"died-{parallel}"

    def die(*_):
        nonlocal calls
        calls += 1
        if calls == dies_at and not is_main_process() and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def validate(step):
        with torch.no_grad():
            unet(torch.zeros(1, 4, 4, 4), torch.tensor([5]), torch.zeros(1, 5, 6))

    unet.register_forward_pre_hook(die)
    data = TrainingData([context], images, torch.rand(12, generator=g), pairs)
    settings = FineTuning(
        steps=STEPS, beta=0.5, batch_size=9, pretrain_fraction=0.3, learning_rate=1e-3, checkpoint_every=10,
        parallel=parallel, ema=0.9, validate_every=5, **how,
    )  # fmt: skip
    finetune(unet, NoiseSchedule.from_config({}), data, folder / parallel, settings, validate=validate)
    gather_weights(unet)
    return {name: p.detach() for name, p in unet.named_parameters()}


def launch(*arguments: str) -> None:
    """Run torchrun's arguments in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([(a[name] - b[name]).double().square().sum() for name in a]).sum().sqrt())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launch(__file__, str(folder))
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    torch.manual_seed(0)
    start = {name: p.detach().clone() for name, p in UNet(SMALL).named_parameters()}
    end = fine_tuned(tmp_path_factory.mktemp("one"))
    return end, distance(start, end)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_reach_the_weights_of_one(one, two, parallel):
    end, travelled = one
    assert distance(load_file(two / f"{parallel}.safetensors"), end) < 0.02 * travelled


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_checkpoint_of_two_processes_resumes_on_one(one, two, tmp_path, parallel):
    shutil.copytree(two / parallel / "step-10", tmp_path / "ddp" / "step-10")
    shards = {path.name for path in (tmp_path / "ddp" / "step-10").glob("*.safetensors")}
    assert len(shards) == 2  # each process wrote its own
    end, travelled = one
    assert distance(fine_tuned(tmp_path), end) < 0.02 * travelled
    assert [path.name for path in checkpoints(tmp_path / "ddp")] == ["step-10", "step-20"]


@pytest.mark.slow
def test_a_killed_worker_is_restarted_and_reaches_the_same_weights(two, tmp_path):
    launch("--max-restarts", "2", __file__, str(tmp_path))
    for name in ("ddp", "fsdp"):
        assert (tmp_path / f"died-{name}").exists()
        end, undisturbed = (load_file(folder / f"{name}.safetensors") for folder in (tmp_path, two))
        assert all(torch.equal(end[key], undisturbed[key]) for key in end)


LATE = """
import os, sys, time
import torch
from minialign.engine.processes import is_main_process, process_group
with process_group(torch.device("cpu")):
    if is_main_process():
        time.sleep(3)
        open(sys.argv[1], "w").close()
os.abort() if os.environ["RANK"] == "1" else time.sleep(1)
"""


@pytest.mark.slow
def test_a_process_that_fails_at_its_exit_costs_no_file(tmp_path):
    """torchrun kills all processes where one fails, as some do amid the end of their threads: not before the report."""
    (tmp_path / "late.py").write_text(LATE)
    with pytest.raises(AssertionError, match="SIGABRT"):
        launch(str(tmp_path / "late.py"), str(tmp_path / "report.html"))
    assert (tmp_path / "report.html").exists()


def test_parts_of_a_batch_make_the_same_step(tmp_path):
    """Four parts of six images and three pairs: neither splits evenly. Clipping tells gradients of another size."""
    whole, parts = (fine_tuned(tmp_path / f"{n}", accumulate=n, clip_norm=2.0) for n in (1, 4))
    torch.manual_seed(0)
    start = {name: p.detach() for name, p in UNet(SMALL).named_parameters()}
    assert distance(whole, parts) < 1e-3 * distance(start, whole)


def test_more_parts_than_images_are_refused(tmp_path):
    with pytest.raises(InputError, match="6 rows of model images cannot be split into 7 micro-batches"):
        fine_tuned(tmp_path, accumulate=7)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        ["--gradient-checkpointing", "--dtype", "float16"],
        ["--lora", 2, "--dtype", "bfloat16", "--accumulate", 2, "--ema", 0.5],
    ],
    ids=["full", "lora"],
)
def test_the_command_runs_under_torchrun(tmp_path, how):
    """All stages in two processes with sharded weights; the model loads like any other."""
    labels = own_images(tmp_path / "images")
    run, same = tmp_path / "run", ["--model", EMBEDDED, "--clip", EMBEDDED / "clip", "--feedback", labels]
    more = ["--out", run, "--steps", 4, "--batch-size", 8, "--parallel", "fsdp", "--validate-every", 2]
    more += ["--sampling-steps", 2, "--test-images", 6, *how]
    launch("-m", "minialign.finetune", *map(str, [*same, *more]))
    assert (run / "report.html").exists() and (run / "validation" / "step-4.png").exists()
    before, after = Pipeline.from_pretrained().unet, Pipeline.from_pretrained(run / "model").unet
    changed = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert all(p.isfinite().all() for p in after.parameters())
    attention = {name for name, _ in after.named_parameters() if ".to_" in name and name.endswith("weight")}
    assert changed == attention if "--lora" in how else changed == dict(after.named_parameters()).keys()


def train_both(place: Path) -> None:
    """What each process of a launch of this file does."""
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")):
        dies_at = 14 if os.environ["TORCHELASTIC_MAX_RESTARTS"] == "2" else None
        for how in ("ddp", "fsdp"):
            weights = fine_tuned(place, how, dies_at)
            if is_main_process():
                save_file(weights, place / f"{how}.safetensors")


if __name__ == "__main__":
    run_command(partial(train_both, Path(sys.argv[1])))
