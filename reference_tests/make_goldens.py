"""Make reference_tests/goldens/ with diffusers and transformers; run it to bring the goldens up to a new version.

    python reference_tests/make_goldens.py

Each function runs one part of the reference on seeded weights and inputs and returns what it was given (JSON) and what
came out (tensors). The goldens are these results on the cases below; test_live_peers.py calls the same functions.
"""

# mypy: disable-error-code="attr-defined, arg-type, index, operator"
# because diffusers and transformers import lazily, in ways that hide their types

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from seeded import filled, image, normal, projection
from torch import Tensor

GOLDENS = Path(__file__).parent / "goldens"
SEED = 0
Json = dict[str, Any]
Reference = tuple[Json, dict[str, Tensor]]

UNETS: dict[str, Json] = {
    "sd1": {
        "block_out_channels": [12, 24, 24],  # widths whose half is no power of two show the order of float operations
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": 3,
        "cross_attention_dim": 10,
        "norm_num_groups": 4,
    },
    "sd1_two_layers": {
        "block_out_channels": [8, 12, 16, 16],
        "layers_per_block": 2,
        "attention_head_dim": 4,
        "cross_attention_dim": 6,
        "norm_num_groups": 2,
        "norm_eps": 1e-3,
        "sample_size": 9,
    },
    "sd2": {
        "block_out_channels": [12, 24, 32],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": [2, 1, 1],
        "attention_head_dim": [2, 3, 4],
        "transformer_layers_per_block": [1, 2, 3],
        "use_linear_projection": True,
        "upcast_attention": True,
        "cross_attention_dim": 14,
        "norm_num_groups": 4,
        "in_channels": 5,
        "out_channels": 3,
    },
    "xl": {
        "block_out_channels": [6, 12, 12],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": [1, 2, 3],
        "transformer_layers_per_block": [1, 1, 2],
        "use_linear_projection": True,
        "cross_attention_dim": 8,
        "norm_num_groups": 3,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 29,  # 5 of the pooled text and 4 of each time id
    },
    "distilled_xl": {  # as SSD-1B: other depths on the way up, one residual block in the middle
        "block_out_channels": [6, 12],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "mid_block_type": "UNetMidBlock2D",
        "layers_per_block": 2,
        "attention_head_dim": [1, 2],
        "transformer_layers_per_block": [1, [2, 1]],
        "reverse_transformer_layers_per_block": [[1, 1, 3], 1],
        "use_linear_projection": True,
        "cross_attention_dim": 8,
        "norm_num_groups": 3,
    },
    "distilled": {  # as small-sd and tiny-sd: one layer a block, no middle
        "block_out_channels": [6, 12],
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "mid_block_type": None,
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 8,
        "norm_num_groups": 3,
    },
}
VAES: dict[str, Json] = {
    "sd": {"block_out_channels": [8, 16, 16], "layers_per_block": 2, "norm_num_groups": 4},
    "plain": {
        "block_out_channels": [8, 12],
        "norm_num_groups": 2,
        "latent_channels": 8,
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.5,
    },
}
TEXTS: Json = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
CLIPS: dict[str, Json] = {
    "quick_gelu": {  # end-of-text id 2: the pooled token is the one of highest id
        "text_config": TEXTS | {"vocab_size": 50, "eos_token_id": 2, "bos_token_id": 0},
        "vision_config": TEXTS | {"image_size": 24, "patch_size": 8},
        "projection_dim": 7,
    },
    "gelu": {  # ids above the end-of-text id exist, and the image is no multiple of the patch
        "text_config": TEXTS
        | {"vocab_size": 50, "eos_token_id": 40, "bos_token_id": 0, "hidden_act": "gelu", "layer_norm_eps": 1e-2},
        "vision_config": TEXTS | {"image_size": 20, "patch_size": 6, "hidden_act": "gelu", "layer_norm_eps": 1e-2},
        "projection_dim": 9,
    },
}
IDS = [[0, 7, 49, 3, 40, 12, 40, 40, 5], [0, 40, 9, 8, 49, 49, 1, 2, 6]]
IMAGES = [
    [37, 23, "RGB"],
    [23, 37, "RGB"],
    [20, 20, "RGB"],
    [20, 31, "RGB"],
    [5, 3, "RGB"],
    [64, 21, "RGB"],
    [29, 40, "L"],
    [33, 26, "RGBA"],
    [26, 33, "LA"],
]
PREPROCESSINGS: dict[str, Json] = {
    "square": {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}},
    "legacy": {"size": 20, "crop_size": 15, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
    "oblong": {"size": {"shortest_edge": 19}, "crop_size": {"height": 12, "width": 18}},
}

LATENT: Json = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's betas
SCHEDULES: dict[str, Json] = {
    "linear": {"clip_sample": False},
    "scaled_linear": LATENT | {"clip_sample": False},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100, "clip_sample": False},
    "zero_snr": LATENT | {"rescale_betas_zero_snr": True, "clip_sample": False},
    "zero_snr_linear": {"rescale_betas_zero_snr": True, "num_train_timesteps": 77, "clip_sample": False},
    "trained": {"trained_betas": [0.01, 0.02, 0.3, 0.04], "num_train_timesteps": 4, "clip_sample": False},
}
STEP_COUNTS = [1, 2, 3, 7, 20, 27, 30, 48, 50, 61, 96, 999]
CLASSES: dict[str, Json] = {  # and what a checkpoint would say beside the betas
    "DDIMScheduler": {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False},
    "DDPMScheduler": {"variance_type": "fixed_small", "prediction_type": "v_prediction"},
    "PNDMScheduler": {"skip_prk_steps": True, "steps_offset": 1},
    "EulerDiscreteScheduler": {"use_karras_sigmas": False, "timestep_spacing": "trailing"},
    "EulerAncestralDiscreteScheduler": {"prediction_type": "v_prediction"},
    "HeunDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True, "thresholding": False},
    "DPMSolverSinglestepScheduler": {},
    "DEISMultistepScheduler": {},
    "UniPCMultistepScheduler": {"solver_order": 3, "timestep_spacing": "leading"},
    "LCMScheduler": {"original_inference_steps": 40},
    "TCDScheduler": {},
}
DDIM_STEPS: dict[str, Json] = {
    f"{prediction}_{name}": LATENT | {"prediction_type": prediction} | config
    for prediction in ("epsilon", "v_prediction", "sample")
    for name, config in {
        "plain": {"clip_sample": False, "set_alpha_to_one": True},
        "offset": {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
        "clipped": {"clip_sample": True, "clip_sample_range": 0.8, "timestep_spacing": "trailing"},
    }.items()
}
TRAJECTORIES: dict[str, tuple[str, Json]] = {
    "sd1": ("sd1", DDIM_STEPS["epsilon_offset"]),
    "zero_snr": (
        "sd1_two_layers",
        SCHEDULES["zero_snr"] | {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    ),
}

AWKWARD = [
    "",
    " ",
    "a photo of three dogs",
    "A Photo OF Three DOGS",
    "it's we're I'VE they'LL don't 'sup '' rock'n'roll !'s",
    "12 1234 3.14 \u00bd \u2167 \u0663 x2y",
    "caf\u00e9 na\u00efve cafe\u0301 \u00c5ngstr\u00f6m \u212b",
    "a\u0301\u0302\u0323b \u0915\u094d\u0937 z\u0335\u0336",
    "\u65e5\u672c\u8a9e\u306e\u732b \u6f22\u5b57, \ud55c\uad6d\uc5b4 \u4e00\u4e8c",
    "\U0001f600\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
    "line\none\r\n\ttab\x0b\x0c  two   spaces\u00a0\u3000\u2028end ",
    "null\x00 bell\x07 \x1cfile\x1f unit \u200bzero\u200d\ufeff",
    "\u039f\u0394\u039f\u03a3 \u03a3 \u0130stanbul \u1e9e \ufb01 \u01c5",  # final sigma, dotted I, ligature, title case
    "<|startoftext|>dog<|endoftext|>",
    "!<|endoftext|>?dog<|startoftext|>s <|endoftext",
    "<|STARTOFTEXT|> <|EndOfText|>dog",
    "!!! ... ??? --- #@$% ;-) <3 a_b-c [x] {y} ~`^",
    "." * 200,
    "dog " * 90,
    "supercalifragilistic" * 9,
    "dogs!cats?dogs\u2026cats\u2014dogs",
]
CORPUS = (
    "a photo of a dog and two cats in the forest; three green dogs, it's the city! we're here, they've gone, I'll go. "
    "the red car, the blue cars and four yellow birds on a white background: caf\u00e9 \u732b \U0001f600 1 2 ... !!! "
)


def plain(config: Any) -> Json:
    """What is written to a checkpoint's JSON, of a diffusers object or a transformers config."""
    return json.loads(config.to_json_string())


def shapes(model: torch.nn.Module, prefix: str = "") -> Json:
    keys = {key if key.startswith(prefix) else prefix + key: list(t.shape) for key, t in model.state_dict().items()}
    return {key: shape for key, shape in sorted(keys.items()) if not key.endswith("position_ids")}


def unet(config: Json, size: tuple[int, int] = (9, 13), seed: int = SEED, gain: float = 1.0) -> Reference:
    """Prediction, and of the gradients of a squared error: norms, projections, and the small ones whole."""
    model = filled(diffusers.UNet2DConditionModel(**config), seed, gain)
    channels, width = model.config["in_channels"], model.config["cross_attention_dim"]
    given = {
        "latents": normal((3, channels, *size), seed, "latents"),
        "timesteps": torch.tensor([0, 500, 999]),
        "context": normal((3, 4, width), seed, "context"),
    }
    added = {}
    if model.config["addition_embed_type"] == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        added = {"text_embeds": normal((3, pooled), seed, "pooled")}
        added["time_ids"] = torch.tensor([[1024, 768, 0, 0, 1024, 768], [5, 6, 7, 8, 9, 10], [512, 512, 3, 0, 64, 64]])
    prediction = model(*given.values(), added_cond_kwargs=added).sample
    given |= added | {"target": normal((3, model.config["out_channels"], *size), seed, "target")}
    (prediction - given["target"]).square().mean().backward()
    gradients = {key: weight.grad for key, weight in sorted(model.named_parameters())}
    result = {
        "prediction": prediction.detach(),
        "norms": torch.stack([gradient.norm() for gradient in gradients.values()]),
        "projections": torch.stack([projection(gradient, key) for key, gradient in gradients.items()]),
    }
    small = {f"gradient/{key}": gradient for key, gradient in gradients.items() if gradient.numel() <= 64}
    meta = {"config": plain(model), "seed": seed, "gain": gain, "weights": shapes(model)}
    return meta, given | result | small


@torch.no_grad()
def vae(config: Json, size: tuple[int, int] = (21, 27), seed: int = SEED) -> Reference:
    levels = len(config["block_out_channels"])
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    model = filled(diffusers.AutoencoderKL(**blocks, **config), seed)
    images = normal((2, 3, *size), seed, "images")
    latents = normal((2, model.config["latent_channels"], 5, 6), seed, "latents")
    posterior = model.encode(images).latent_dist
    tensors = {"images": images, "mean": posterior.mean, "logvar": posterior.logvar}
    tensors |= {"latents": latents, "decoded": model.decode(latents).sample}
    return {"config": plain(model), "seed": seed, "weights": shapes(model)}, tensors


@torch.no_grad()
def text(config: Json, seed: int = SEED) -> Reference:
    model = filled(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)), seed)
    ids = torch.tensor(IDS)
    # the prefix is that of released checkpoints, whatever the installed version keeps in memory
    meta = {"config": plain(model.config), "seed": seed, "weights": shapes(model, "text_model.")}
    return meta, {"ids": ids, "hidden": model(ids).last_hidden_state}


@torch.no_grad()
def projected_text(config: Json, seed: int = SEED) -> Reference:
    """SDXL's second tower: the hidden states before the last layer, and the projected text."""
    model = filled(transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config)), seed)
    ids = torch.tensor(IDS)
    output = model(ids, output_hidden_states=True)
    meta = {"config": plain(model.config), "seed": seed, "weights": shapes(model)}
    return meta, {"ids": ids, "before": output.hidden_states[-2], "pooled": output.text_embeds}


@torch.no_grad()
def clip(config: Json, seed: int = SEED) -> Reference:
    model = filled(transformers.CLIPModel(transformers.CLIPConfig(**config)), seed)
    side = config["vision_config"]["image_size"]
    ids, pixels = torch.tensor(IDS), normal((2, 3, side, side), seed, "pixels")
    output = {"text": model.get_text_features(ids), "image": model.get_image_features(pixels)}
    # older versions return the embeddings themselves
    output = {key: value if isinstance(value, Tensor) else value.pooler_output for key, value in output.items()}
    meta = {"config": plain(model.config), "seed": seed, "weights": shapes(model)}
    return meta, {"ids": ids, "pixels": pixels} | output


def preprocess(config: Json, images: list = IMAGES) -> Reference:
    # newer versions keep the exact PIL resize under another name; the default one resizes tensors
    processor = (getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor)(**config)
    pixels = processor([image(*spec) for spec in images], return_tensors="pt")["pixel_values"]
    # what was asked for, not the rewritten form, because checkpoints carry both
    return {"config": config, "images": images}, {"pixels": pixels}


def learn_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt as CLIP lays them out: bytes, bytes that end a word, merges, special tokens."""
    clip = transformers.CLIPTokenizer().backend_tokenizer
    words = [word for word, _ in clip.pre_tokenizer.pre_tokenize_str(clip.normalizer.normalize_str(CORPUS))]
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    for _ in range(70):
        pairs = Counter(pair for word in split for pair in zip(word, word[1:]))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))  # ties by the alphabet
        merges.append(best)
        for word in split:
            for i in range(len(word) - 2, -1, -1):
                if tuple(word[i : i + 2]) == best:
                    word[i : i + 2] = ["".join(best)]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [byte + "</w>" for byte in alphabet] + [a + b for a, b in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n", encoding="utf-8")


def tokens(folder: Path, texts: list[str]) -> Reference:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=77)["input_ids"]
    return {"texts": texts, "ids": ids}, {}


def schedule(config: Json, seed: int = SEED) -> Reference:
    """abar, and noising and v at the ends and between."""
    scheduler = diffusers.DDIMScheduler(**config)
    x0, noise = normal((4, 2, 3), seed, "x0"), normal((4, 2, 3), seed, "noise")
    last = len(scheduler.alphas_cumprod) - 1
    t = torch.tensor([0, 1, last // 2, last])
    tensors = {"alphas_cumprod": scheduler.alphas_cumprod, "x0": x0, "noise": noise, "t": t}
    tensors |= {"noised": scheduler.add_noise(x0, noise, t), "velocity": scheduler.get_velocity(x0, noise, t)}
    return {"config": plain(scheduler)}, tensors


def timesteps(config: Json, counts: list[int]) -> Reference:
    scheduler = diffusers.DDIMScheduler(**config)
    visited = {}
    for count in counts:
        scheduler.set_timesteps(count)
        visited[str(count)] = scheduler.timesteps.tolist()
    return {"config": plain(scheduler), "timesteps": visited}, {}


def scheduler_class(name: str, settings: Json) -> Reference:
    """What a class makes of its own name alone, and of Stable Diffusion's betas with its own settings."""
    named, full = getattr(diffusers, name)(), getattr(diffusers, name)(**LATENT, **settings)
    meta = {"named": plain(named), "full": plain(full)}
    return meta, {"named": named.alphas_cumprod, "full": full.alphas_cumprod}


def ddim_steps(config: Json, steps: int = 9, seed: int = SEED) -> Reference:
    """One step from every visited timestep, without and with fresh noise; 9 steps do not divide 1000."""
    scheduler = diffusers.DDIMScheduler(**config)
    scheduler.set_timesteps(steps)
    x, prediction, noise = (normal((1, 2, 3, 2), seed, name) for name in ("x", "prediction", "noise"))
    tensors = {"x": x, "prediction": prediction, "noise": noise}
    for name, how in {"still": {}, "noisy": {"eta": 0.7, "variance_noise": noise}}.items():
        tensors[name] = torch.cat(
            [scheduler.step(prediction, int(t), x, **how).prev_sample for t in scheduler.timesteps]
        )
    return {"config": plain(scheduler), "steps": steps, "eta": 0.7}, tensors


@torch.no_grad()
def trajectory(
    config: Json, scheduler_config: Json, size: tuple[int, int] = (7, 5), guidance: float = 7.5, seed: int = SEED
) -> Reference:
    """The latents of 10 guided steps, from the noise to x_0."""
    model = filled(diffusers.UNet2DConditionModel(**config), seed)
    scheduler = diffusers.DDIMScheduler(**scheduler_config)
    scheduler.set_timesteps(10)
    x = normal((2, model.config["in_channels"], *size), seed, "start")
    context = normal((4, 4, model.config["cross_attention_dim"]), seed, "context")  # unconditional rows first
    visited = [x]
    for t in scheduler.timesteps:
        without, with_prompt = model(torch.cat([x, x]), t, context).sample.chunk(2)
        x = scheduler.step(without + guidance * (with_prompt - without), t, x).prev_sample
        visited.append(x)
    meta = {"config": plain(model), "schedule": plain(scheduler), "guidance": guidance, "seed": seed}
    return meta, {"context": context, "visited": torch.stack(visited)}


def references(folder: Path) -> dict[str, dict[str, Reference]]:
    """All cases by kind and name; the vocabularies that the tokens are made with go to two folders of `folder`."""
    spacings = [(spacing, offset) for spacing in ("leading", "trailing", "linspace") for offset in (0, 1)]
    learn_tokenizer(folder / "tokenizer")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer", pad_token="!")  # SD 2.x pads with "!"
    tokenizer.save_pretrained(folder / "tokenizer_json")  # which newer versions write as tokenizer.json alone
    return {
        "unet": {name: unet(config) for name, config in UNETS.items()} | {"faint": unet(UNETS["sd1"], gain=0.1)},
        "vae": {name: vae(config) for name, config in VAES.items()},
        "text": {name: text(config["text_config"]) for name, config in CLIPS.items()},
        "projected_text": {
            name: projected_text(config["text_config"] | {"projection_dim": 7}) for name, config in CLIPS.items()
        },
        "clip": {name: clip(config) for name, config in CLIPS.items()},
        "preprocess": {name: preprocess(config) for name, config in PREPROCESSINGS.items()},
        "tokens": {name: tokens(folder / name, AWKWARD) for name in ("tokenizer", "tokenizer_json")},
        "schedule": {name: schedule(config) for name, config in SCHEDULES.items()},
        "timesteps": {
            f"{spacing}_{offset}": timesteps({"timestep_spacing": spacing, "steps_offset": offset}, STEP_COUNTS)
            for spacing, offset in spacings
        },
        "class": {name: scheduler_class(name, settings) for name, settings in CLASSES.items()},
        "ddim": {name: ddim_steps(config) for name, config in DDIM_STEPS.items()},
        "trajectory": {name: trajectory(UNETS[unet], config) for name, (unet, config) in TRAJECTORIES.items()},
    }


def main() -> None:
    torch.set_num_threads(1)  # sums in one order
    GOLDENS.mkdir(exist_ok=True)
    for kind, cases in references(GOLDENS).items():
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(meta)}" for name, (meta, _) in cases.items())
        (GOLDENS / f"{kind}.json").write_text("{\n" + lines + "\n}\n", encoding="utf-8")
        weights = {f"{name}/{key}": tensor for name, (_, tensors) in cases.items() for key, tensor in tensors.items()}
        if weights:
            save_file({key: tensor.contiguous() for key, tensor in weights.items()}, GOLDENS / f"{kind}.safetensors")
    files = [path for path in sorted(GOLDENS.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    manifest = {
        "seed": SEED,
        "versions": {m.__name__: m.__version__ for m in (diffusers, transformers, tokenizers, torch, np, PIL)},
        "sha256": {str(f.relative_to(GOLDENS)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files},
    }
    (GOLDENS / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in files:
        print(f"{path.stat().st_size:8} {path.relative_to(GOLDENS)}")


if __name__ == "__main__":
    main()
