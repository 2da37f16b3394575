"""How cost grows with batch, latent size, images in the store and processes: pytest bench/test_scaling.py"""

import os
import socket
import statistics
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from configs import UNET
from pairs import arithmetic, timed, unet

from minialign.feedback import FeedbackStore

pytestmark = pytest.mark.slow


def seconds(call, clock=time.perf_counter):
    """The median of five calls after a first one."""
    return statistics.median([timed(call, clock) for _ in range(6)][1:])


def step(dtype, network, latents, *given):
    with arithmetic(latents.device, dtype):
        out = network(latents, *given)
    getattr(out, "sample", out).float().square().mean().backward()


def keep(benchmark, title, unit, points):
    """points: x -> {line: seconds}, for report.py; what pytest-benchmark tracks is a single point, at the end."""
    lines = {name: [point[name] for point in points.values()] for name in next(iter(points.values()))}
    benchmark.extra_info |= {"sweep": title, "unit": unit, "x": list(points), "lines": lines}


@pytest.mark.parametrize("what", ["batch", "latent size"])
def test_unet_step(benchmark, device, dtype, clock, what):
    diffusers = pytest.importorskip("diffusers")
    ours, theirs = unet().to(device), diffusers.UNet2DConditionModel(**UNET).to(device)
    points = {}
    for x in (1, 2, 4, 8) if what == "batch" else (16, 32, 48, 64):
        batch, size = (x, 32) if what == "batch" else (1, x)
        tensors = torch.randn(batch, 4, size, size), torch.full((batch,), 500), torch.randn(batch, 77, 768)
        given = [tensor.to(device) for tensor in tensors]
        points[x if what == "batch" else x * x] = {
            "minialign": seconds(partial(step, dtype, ours, *given), clock),
            "diffusers": seconds(partial(step, dtype, theirs, *given), clock),
        }
    unit = "images in the batch" if what == "batch" else "pixels of the latents, one image"
    keep(benchmark, f"UNet forward + backward by {what}", unit, points)
    benchmark.pedantic(step, (dtype, ours, *given), rounds=5)


@pytest.mark.usefixtures("host")
def test_store(benchmark, tmp_path):
    points = {}
    for number in (1_000, 10_000, 100_000):
        folder = tmp_path / str(number)
        folder.mkdir()
        store = FeedbackStore(folder)
        begin = time.perf_counter()
        store.add_images((f"prompt {i // 3}", f"images/{i:06d}.png", i) for i in range(number))
        added = time.perf_counter() - begin
        begin = time.perf_counter()
        store.add_labels("somebody", ((i + 1, ("good", "bad", "skip")[i % 3]) for i in range(number)))
        labelled = time.perf_counter() - begin
        opened = seconds(lambda store=store: (store.images(), store.labels()))
        points[number] = {"add all images": added, "add a label each": labelled, "open images and labels": opened}
    keep(benchmark, "the feedback store by images", "images in the store", points)
    benchmark.pedantic(store.images, rounds=5)
    store.close()


WORKER = """
import os, time, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from pairs import unet
from minialign import NoiseSchedule
from minialign.finetune import step_loss
torch.set_num_threads(1)
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo")
network = DistributedDataParallel(unet())
optimizer = torch.optim.AdamW(network.parameters(), 1e-5, fused=True)
batch = 4 // size
latents, noise = torch.randn(2, batch, 4, 32, 32)
context, t, schedule = torch.randn(batch, 77, 768), torch.full((batch,), 500), NoiseSchedule.from_config({})
times = []
for _ in range(5):
    dist.barrier()
    begin = time.perf_counter()
    step_loss(network, schedule, latents, noise, t, [context], torch.ones(batch))[0].backward()
    optimizer.step()
    optimizer.zero_grad()
    dist.barrier()
    times.append(time.perf_counter() - begin)
if rank == 0:
    print(sorted(times[1:])[2])
dist.destroy_process_group()
"""


def run_workers(processes):
    """Seconds of a step in `processes` processes, the median of four."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    how = {"cwd": os.path.dirname(__file__), "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", WORKER]
    workers = [subprocess.Popen(command, env=common | {"RANK": str(rank)}, **how) for rank in range(processes)]
    printed = [worker.communicate(timeout=300)[0] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers)
    return float(printed[0])


@pytest.mark.usefixtures("host")
def test_processes(benchmark):
    """A whole step of a global batch of 4, one thread a process, gradients averaged by gloo; one and two in turn."""
    measured = {1: [], 2: []}
    benchmark.pedantic(
        lambda: measured[2].append(run_workers(2)), setup=lambda: measured[1].append(run_workers(1)), rounds=5
    )
    points = {processes: {"minialign": statistics.median(times)} for processes, times in measured.items()}
    keep(benchmark, "a fine-tuning step by processes", "processes, one thread each", points)
