"""Loading the whole UNet of Stable Diffusion 1.x (860 million parameters, float32) beside diffusers.

Each load is a process of its own, the two in turn, from the page cache. What is mapped costs nothing until it is read,
so the time until every weight has been read is measured too. Resident memory is the whole process's, torch included.
"""

import json
import os
import statistics
import subprocess
import sys

import pytest
import torch

from minialign.models.pretrained import save_network
from minialign.models.unet import UNet

PAIRS = 5
LOADERS = {
    "minialign": "from minialign.models.pretrained import WEIGHTS, load_network\n"
    "from minialign.models.unet import UNet\n"
    "def load(folder): return load_network(UNet, folder, WEIGHTS[0])",
    "diffusers": "from diffusers import UNet2DConditionModel\n"
    "def load(folder): return UNet2DConditionModel.from_pretrained(folder)",
}
MEASURE = """
import gc, json, sys, time
from pathlib import Path
import torch
gc.collect()  # of what the imports left, which else meets either side by chance
before = time.perf_counter()
unet = load(Path(sys.argv[1]))
loaded = time.perf_counter()
with torch.no_grad():
    total = sum(float(p.flatten()[::1024].sum()) for p in unet.parameters())  # a number of every page
read = time.perf_counter()
status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent's memory too
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({"load": loaded - before, "load and read": read - before, "peak": peak, "sum": total}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The released config with random weights."""
    place = tmp_path_factory.mktemp("sd1")
    config = {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768, "sample_size": 64}
    with torch.device("meta"):
        unet = UNet(config)
    unet.to_empty(device="cpu")
    for i, p in enumerate(unet.parameters()):
        torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(i))
    save_network(unet, place)
    return place


def measured(name: str, folder) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", LOADERS[name] + MEASURE, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_loading_the_unet(benchmark, folder):
    pytest.importorskip("diffusers")
    size = os.path.getsize(folder / "diffusion_pytorch_model.safetensors")
    pairs = [{name: measured(name, folder) for name in list(LOADERS)[:: 1 if i % 2 else -1]} for i in range(PAIRS)]
    found = {"work": "loading the UNet of Stable Diffusion 1.x, 860 million parameters", "goal": 2, "rounds": PAIRS}
    ratios = {what: [p["diffusers"][what] / p["minialign"][what] for p in pairs] for what in ("load", "load and read")}
    low, found["ratio"], high = statistics.quantiles(ratios["load"], n=4)
    found["quartiles"] = [low, high]
    for name, side in (("minialign", "ours"), ("diffusers", "theirs")):
        found[side] = statistics.median(pair[name]["load"] for pair in pairs)
    peaks = [statistics.median(pair[name]["peak"] for pair in pairs) / size for name in LOADERS]
    found["note"] = (
        f"{statistics.median(ratios['load and read']):.2f} times as fast with the first read of every page; peak "
        f"resident memory {peaks[0]:.3f} of the file (goal 1.15), diffusers {peaks[1]:.3f}"
    )
    benchmark.extra_info |= found
    assert len({pair[name]["sum"] for pair in pairs for name in LOADERS}) == 1  # the same weights
    benchmark.pedantic(measured, args=("minialign", folder), rounds=1)
