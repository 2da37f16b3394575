"""A large cache: time to open it, to find all keys, to read a batch, and resident memory: pytest bench/test_cache.py

A million small entries, and fewer of the size of Stable Diffusion's latents in float16. Measured in a process of its
own, torch included; the files are in the system's cache.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from minialign.data import cache

SIZES = {  # entries, shape of a tensor, type, shards
    "a million entries of 2 x 8 floats": (1_000_000, (8,), torch.float32, 250),
    "8,192 entries of 2 x 4 x 64 x 64 half floats": (8_192, (4, 64, 64), torch.float16, 2),
}
MEASURE = """
import json, statistics, sys, time
from pathlib import Path
import numpy as np
import torch
from minialign.data.cache import KEY, Cache

def resident():
    status = Path("/proc/self/status").read_text()
    return {key: int(status.split(key + ":")[1].split()[0]) * 1024 for key in ("RssAnon", "VmRSS")}

measured = {"resident before": resident()}
begin = time.perf_counter()
cache = Cache(Path(sys.argv[1]))
measured["open"] = time.perf_counter() - begin
measured["resident after opening"] = resident()
keys = np.fromfile(sys.argv[2], KEY)
begin = time.perf_counter()
rows = cache.rows("mean", keys)
measured["rows"] = time.perf_counter() - begin
measured["resident with rows"] = resident()
times = []
for _ in range(min(2000, 2 * len(rows) // 64)):  # most of the entries, some several times
    index = torch.randint(len(rows), (64,))
    begin = time.perf_counter()
    rows[index]
    times.append(time.perf_counter() - begin)
measured["gather 64"] = statistics.median(times)
measured["resident after gathering"] = resident()
print(json.dumps(measured))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("work", SIZES)
def test_cache(benchmark, tmp_path, work):
    entries, shape, dtype, shards = SIZES[work]
    rng, keys, number = np.random.default_rng(0), [], entries // shards
    g = torch.Generator().manual_seed(0)
    with cache._Writer(tmp_path, dtype) as writer:
        for _ in range(shards):
            some = [rng.bytes(16) for _ in range(number)]
            writer.add(some, mean=torch.randn(number, *shape, generator=g), std=torch.rand(number, *shape, generator=g))
            if writer.keys:
                writer.write()
            keys += some
    (tmp_path / "keys").write_bytes(b"".join(keys[i] for i in rng.permutation(entries)))
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(tmp_path / "keys")]
    measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    sizes = "; ".join(
        f"{key[9:]} {value['VmRSS'] / 2**20:.0f} MiB, {value['RssAnon'] / 2**20:.0f} MiB private"
        for key, value in measured.items()
        if key.startswith("resident")
    )
    benchmark.extra_info |= measured | {
        "work": f"the cache of latents and contexts, {work} in {shards} shards",
        "note": f"opened in {measured['open']:.2f} s, all keys found in {measured['rows']:.2f} s, 64 rows of one "
        f"read in {1000 * measured['gather 64']:.1f} ms; resident: {sizes}",
    }
    benchmark.pedantic(cache.Cache, args=(tmp_path,), rounds=5)
