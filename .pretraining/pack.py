# ruff: noqa
"""Pack the state of a work folder for another machine: pack.py OUT WIP"""

import json, sys
from pathlib import Path
import torch
from minialign.engine.checkpoints import checkpoints
from minialign.files import read_weights, write_tensors

out, wip = map(Path, sys.argv[1:3])
wip.mkdir(parents=True, exist_ok=True)
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
        write_tensors(wip / f"{stage}.safetensors", half(pick("ema.") or pick("model.")))  # the average is as good a start
(wip / "state.json").write_text(
    json.dumps({"config": json.loads((out / "config.json").read_text()), "stages": stages, "factor": read_weights(out / "latents.safetensors")["factor"].item()}, indent=2) + "\n"
)
print(stages, sum(p.stat().st_size for p in wip.iterdir()) >> 20, "MiB")
