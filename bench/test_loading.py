"""Loading the whole UNet of Stable Diffusion 1.x (860 million parameters, float32) beside diffusers.

Files are in the page cache. What is mapped costs nothing until it is read, so that the first read of every page and the
peak of resident memory are measured too, in processes of their own, in turn: pytest bench/test_loading.py
"""

import json
import os
import statistics
import subprocess
import sys

import pytest
import torch
from configs import SD1_UNET
from report import against_goal

from minialign.models.pretrained import WEIGHTS, load_network, save_network
from minialign.models.unet import UNet

diffusers = pytest.importorskip("diffusers")
LOADERS = {
    "minialign": "from minialign.models.pretrained import WEIGHTS, load_network\n"
    "from minialign.models.unet import UNet\n"
    "def load(folder): return load_network(UNet, Path(folder), WEIGHTS[0])",
    "diffusers": "from diffusers import UNet2DConditionModel\n"
    "def load(folder): return UNet2DConditionModel.from_pretrained(folder)",
}
WORK = "loading the UNet of Stable Diffusion 1.x, 860 million parameters"
MEASURE = """
import gc, json, sys, time
from pathlib import Path
import torch
gc.collect()  # of what the imports left, which else meets either side by chance
begin = time.perf_counter()
unet = load(sys.argv[1])
with torch.no_grad():
    total = sum(float(p.flatten()[::1024].sum()) for p in unet.parameters())  # a number of every page
read = time.perf_counter() - begin
status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent's memory too
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({"load and read": read, "peak": peak, "sum": total}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The released config with random weights."""
    place = tmp_path_factory.mktemp("sd1")
    with torch.device("meta"):
        unet = UNet({"_class_name": "UNet2DConditionModel"} | SD1_UNET)
    unet.to_empty(device="cpu")
    for i, p in enumerate(unet.parameters()):
        torch.nn.init.uniform_(p, -0.05, 0.05, generator=torch.Generator().manual_seed(i))
    save_network(unet, place)
    return place


def alone(name: str, folder) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", LOADERS[name] + MEASURE, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.usefixtures("host")
def test_loading_the_unet(compare, folder):
    compare(
        WORK,
        lambda: load_network(UNet, folder, WEIGHTS[0]),
        lambda: diffusers.UNet2DConditionModel.from_pretrained(folder),
        goal=2,
        counted=False,
    )


@pytest.mark.usefixtures("host")
def test_reading_every_page(benchmark, folder):
    """A round of pytest-benchmark is a whole process of minialign, with the import of torch."""
    ours, theirs = [], []
    benchmark.pedantic(
        lambda: ours.append(alone("minialign", folder)),
        setup=lambda: theirs.append(alone("diffusers", folder)),
        rounds=5,
    )
    assert len({one["sum"] for one in ours + theirs}) == 1  # the same weights
    size = os.path.getsize(folder / "diffusion_pytorch_model.safetensors")
    seconds = [statistics.median(one["load and read"] for one in side) for side in (ours, theirs)]
    peaks = [statistics.median(one["peak"] for one in side) / size for side in (ours, theirs)]
    benchmark.extra_info |= {
        "work": WORK,
        "note": f"with the first read of every page {seconds[0]:.2f} s, diffusers {seconds[1]:.2f} s; "
        f"peak resident memory {peaks[0]:.3f} of the file (goal {against_goal(peaks[0], 1.15, most=True)}), "
        f"diffusers {peaks[1]:.3f}",
    }
