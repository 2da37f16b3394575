# ruff: noqa
"""Pack the state of a work folder for another machine: pack.py OUT WIP"""

import json, shutil, sys
from pathlib import Path
import torch
from minialign.engine.checkpoints import checkpoints
from minialign.files import read_weights, write_tensors

out, wip = map(Path, sys.argv[1:3])
shutil.rmtree(wip, ignore_errors=True)
wip.mkdir(parents=True)
stages = {}
half = lambda d: {k: v.half() for k, v in d.items()}
for stage in ("vae", "clip", "unet", "noisy", "decoder"):
    final = out / stage / "final.safetensors"
    if final.exists():
        stages[stage] = None
        write_tensors(wip / f"{stage}.safetensors", half(read_weights(final)))
        continue
    places = checkpoints(out / stage) if (out / stage).exists() else []
    if places:
        found = {}
        for part in places[-1].glob("*.safetensors"):
            found |= read_weights(part)
        pick = lambda p: {k[len(p) :]: v for k, v in found.items() if k.startswith(p)}
        stages[stage] = int(places[-1].name[5:])
        write_tensors(wip / f"{stage}.safetensors", half(pick("model.")))
        if pick("ema."):
            write_tensors(wip / f"{stage}-ema.safetensors", half(pick("ema.")))
for stage, step in list(stages.items()):  # a finished UNet's clean weights are not needed once the noisy stage runs
    if stage == "unet" and step is None and "noisy" in stages:
        pass
(wip / "state.json").write_text(
    json.dumps({"config": json.loads((out / "config.json").read_text()), "stages": stages}, indent=2) + "\n"
)
print(stages, sum(p.stat().st_size for p in wip.iterdir()) >> 20, "MiB")
