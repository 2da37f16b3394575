# ruff: noqa
"""Unpack the state beside this file into a work folder of the pre-training: python .pretraining/restore.py runs/pretrain

After it, `python -m minialign.shapes.pretrain --out runs/pretrain` (with the same numbers as in config.json) goes on.
Weights come back from half precision and the optimizer's moments start from zero; the numbers of steps are kept.
"""

import json
import sys
from pathlib import Path

import torch

from minialign.engine.checkpoints import save_checkpoint
from minialign.engine.optimising import EMA
from minialign.files import read_weights, write_json, write_tensors
from minialign.models.clip import CLIP
from minialign.models.unet import UNet
from minialign.models.vae import VAE
from minialign.shapes import pretrain

HERE = Path(__file__).parent


def main(out: Path) -> None:
    state = json.loads((HERE / "state.json").read_text())
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", state["config"])
    vae = VAE(pretrain.VAE_CONFIG)
    models = {
        "vae": vae,
        "clip": CLIP(pretrain.clip_config(pretrain.make_tokenizer())),
        "unet": UNet(pretrain.UNET_CONFIG),
        "noisy": UNet(pretrain.UNET_CONFIG),
        "decoder": torch.nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}),
    }
    for stage, step in state["stages"].items():
        weights = {name: weight.float() for name, weight in read_weights(HERE / f"{stage}.safetensors").items()}
        if step is None:
            write_tensors(out / stage / "final.safetensors", weights)
            continue
        model = models[stage]
        model.load_state_dict(weights)
        average = EMA(model, 0.0) if stage in ("unet", "noisy") else None
        (out / stage).mkdir(exist_ok=True)
        save_checkpoint(out / stage, step, model, pretrain.Muon(model, 0.0), average)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
