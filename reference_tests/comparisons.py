"""minialign against the reference: each function takes what make_goldens.py returns for a case, stored or live."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from seeded import filled, image, projection
from torch import Tensor, nn

from minialign.diffusion import DEFAULTS, NoiseSchedule, ddim_sample
from minialign.models.clip import CLIPTowers, ProjectedTextEncoder, TextEncoder, preprocess
from minialign.models.tokenizer import Tokenizer
from minialign.models.unet import UNet
from minialign.models.vae import VAE

GOLDENS = Path(__file__).parent / "goldens"
FORWARD, GRADIENT, TRAJECTORY = 1e-5, 1e-4, 1e-4  # relative, in float32
SMALL_UNET = {  # with and without attention, for tests that need no golden
    "block_out_channels": [8, 8],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 6,
    "norm_num_groups": 2,
}
Json = dict[str, Any]
Tensors = dict[str, Tensor]


@cache
def _golden(kind: str) -> tuple[Json, Tensors]:
    path = GOLDENS / f"{kind}.safetensors"
    return json.loads((GOLDENS / f"{kind}.json").read_text(encoding="utf-8")), load_file(path) if path.exists() else {}


def names(kind: str) -> list[str]:
    """The stored cases of a kind; never none, so that no test passes by having nothing to do."""
    found = list(_golden(kind)[0])
    assert found
    return found


def golden(kind: str, name: str) -> tuple[Json, Tensors]:
    metas, tensors = _golden(kind)
    return metas[name], {key[len(name) + 1 :]: t for key, t in tensors.items() if key.startswith(name + "/")}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = FORWARD) -> None:
    """Everywhere within the tolerance, relative to the largest number that is expected."""
    assert actual.shape == expected.shape
    error = ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance}"  # not finite fails too


def _network(kind: type[nn.Module], meta: Json) -> Any:
    network = kind(meta["config"])
    assert {key: list(tensor.shape) for key, tensor in network.state_dict().items()} == meta["weights"]
    return filled(network, meta["seed"], meta.get("gain", 1.0))


def check_unet(meta: Json, tensors: Tensors) -> None:
    network = _network(UNet, meta)
    added = network.second_conditioning(tensors["text_embeds"], tensors["time_ids"]) if "time_ids" in tensors else None
    prediction = network(tensors["latents"], tensors["timesteps"], tensors["context"], added)
    assert_close(prediction, tensors["prediction"])
    (prediction - tensors["target"]).square().mean().backward()
    gradients = {key: weight.grad for key, weight in sorted(network.named_parameters())}
    for (key, gradient), norm, along in zip(gradients.items(), tensors["norms"], tensors["projections"], strict=True):
        for actual, expected in ((gradient.norm(), norm), (projection(gradient, key), along)):
            assert (actual - expected).abs() <= GRADIENT * norm, key
    whole = [key for key in tensors if key.startswith("gradient/")]
    assert whole
    for key in whole:
        assert_close(gradients[key.removeprefix("gradient/")], tensors[key], GRADIENT)


@torch.no_grad()
def check_vae(meta: Json, tensors: Tensors) -> None:
    network = _network(VAE, meta)
    mean, logvar = network.encode(tensors["images"])
    assert_close(mean, tensors["mean"])
    assert_close(logvar, tensors["logvar"])
    assert_close(network.decode(tensors["latents"]), tensors["decoded"])
    assert network.scaling_factor == meta["config"]["scaling_factor"]


@torch.no_grad()
def check_text(meta: Json, tensors: Tensors) -> None:
    assert_close(_network(TextEncoder, meta)(tensors["ids"]), tensors["hidden"])


@torch.no_grad()
def check_projected_text(meta: Json, tensors: Tensors) -> None:
    before, pooled = _network(ProjectedTextEncoder, meta).states_and_pooled(tensors["ids"])
    assert_close(before, tensors["before"])
    assert_close(pooled, tensors["pooled"])


@torch.no_grad()
def check_clip(meta: Json, tensors: Tensors) -> None:
    network = _network(CLIPTowers, meta)
    assert_close(network.encode_text(tensors["ids"]), tensors["text"])
    assert_close(network.encode_image(tensors["pixels"]), tensors["image"])


def check_preprocess(meta: Json, tensors: Tensors) -> None:
    assert_close(preprocess([image(*spec) for spec in meta["images"]], meta["config"]), tensors["pixels"], 1e-6)


def check_tokens(meta: Json, folder: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(folder)
    for text, expected in zip(meta["texts"], meta["ids"], strict=True):
        assert tokenizer([text])[0].tolist() == expected, text
    assert tokenizer(meta["texts"]).tolist() == meta["ids"]


def check_schedule(meta: Json, tensors: Tensors) -> None:
    schedule = NoiseSchedule.from_config(meta["config"] | {"prediction_type": "v_prediction"})
    assert_close(schedule.alphas_cumprod, tensors["alphas_cumprod"], 1e-6)
    x0, noise, t = tensors["x0"], tensors["noise"], tensors["t"]
    assert_close(schedule.add_noise(x0, noise, t), tensors["noised"], 1e-6)
    assert_close(schedule.target(x0, noise, t), tensors["velocity"], 1e-6)


def check_timesteps(meta: Json) -> None:
    schedule = NoiseSchedule.from_config(meta["config"])
    for count, expected in meta["timesteps"].items():
        steps, spare = schedule.timesteps(int(count)).tolist(), expected[int(count) :]
        assert steps == expected[: int(count)]
        assert spare in ([], [-1])  # where 1000 / steps is rounded down the reference visits -1, which is no timestep


def check_scheduler_class(meta: Json, tensors: Tensors) -> None:
    named = NoiseSchedule.from_config({"_class_name": meta["named"]["_class_name"]})
    full = NoiseSchedule.from_config(meta["full"])
    for schedule, which in ((named, "named"), (full, "full")):
        assert_close(schedule.alphas_cumprod, tensors[which], 1e-6)
        for key in DEFAULTS.keys() & meta[which].keys():
            assert schedule.config[key] == meta[which][key], key
        # a class that does not know these two goes to x_0 and does not clip
        assert schedule.config["set_alpha_to_one"] is meta[which].get("set_alpha_to_one", True)
        assert (schedule.clip is not None) is meta[which].get("clip_sample", False)


def check_ddim_steps(meta: Json, tensors: Tensors) -> None:
    schedule = NoiseSchedule.from_config(meta["config"])
    timesteps = schedule.timesteps(meta["steps"])
    x, prediction, noise = (tensors[key].expand(len(timesteps), -1, -1, -1) for key in ("x", "prediction", "noise"))
    previous = schedule.previous(timesteps)
    assert_close(schedule.ddim_step(prediction, x, timesteps, previous), tensors["still"])
    assert_close(schedule.ddim_step(prediction, x, timesteps, previous, meta["eta"], noise), tensors["noisy"])


@torch.no_grad()
def check_trajectory(meta: Json, tensors: Tensors) -> None:
    network = filled(UNet(meta["config"]), meta["seed"])
    schedule = NoiseSchedule.from_config(meta["schedule"])
    unconditional, context = tensors["context"].chunk(2)
    visited = []

    def predict(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        visited.append(x[: len(x) // 2])
        return network(x, t, context)

    steps = len(tensors["visited"]) - 1
    x = ddim_sample(
        predict, schedule, tensors["visited"][0], (context,), (unconditional,), steps=steps, guidance=meta["guidance"]
    )
    for actual, expected in zip([*visited, x], tensors["visited"], strict=True):
        assert_close(actual, expected, TRAJECTORY)
