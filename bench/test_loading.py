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
import gc, json, resource, sys, time
from pathlib import Path
import torch
gc.collect()  # of what the imports left, which else meets either side by chance
before = time.perf_counter()
unet = load(Path(sys.argv[1]))
loaded = time.perf_counter()
with torch.no_grad():
    total = sum(float(p.flatten()[::1024].sum()) for p in unet.parameters())  # a number of every page
read = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
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
    pairs = [{name: measured(name, folder) for name in LOADERS} for _ in range(PAIRS)]
    for what in ("load", "load and read"):
        ratios = [pair["diffusers"][what] / pair["minialign"][what] for pair in pairs]
        benchmark.extra_info[f"{what}: diffusers / minialign"] = round(statistics.median(ratios), 2)
    for name in LOADERS:
        peak = statistics.median(pair[name]["peak"] for pair in pairs)
        benchmark.extra_info[f"peak memory / file, {name}"] = round(peak / size, 3)
        for what in ("load", "load and read"):
            benchmark.extra_info[f"{what}, {name}, s"] = round(statistics.median(p[name][what] for p in pairs), 3)
    assert len({pair[name]["sum"] for pair in pairs for name in LOADERS}) == 1  # the same weights
    benchmark.pedantic(measured, args=("minialign", folder), rounds=1)
    print(json.dumps(benchmark.extra_info, indent=2))
