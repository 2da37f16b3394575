"""Pipelines of random weights made by diffusers and transformers, in every layout that minialign reads.

A test that imports this module is skipped where the two are not installed. The configs are the released ones, narrowed.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from comparisons import GOLDENS
from safetensors.torch import load_file, save_file
from seeded import filled

from minialign import Pipeline
from minialign.models.clip import TextEncoder

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

TOKENS = GOLDENS / "tokenizer"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
DOWN, UP = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
XL_DOWN, XL_UP = ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2, ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"]

# the released UNet configs, where they differ from diffusers' defaults
SD1 = {"cross_attention_dim": 768, "sample_size": 64}
SD2 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SD2_V = SD2 | {"sample_size": 96, "upcast_attention": True}
XL = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": XL_DOWN,
    "up_block_types": XL_UP,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}
SMALL_SD = SD1 | {"layers_per_block": 1, "mid_block_type": None}
TINY_SD = SMALL_SD | {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3,
}
SSD_1B = XL | {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
REAL = {"sd1": SD1, "sd2": SD2, "sd2_v": SD2_V, "xl": XL, "small_sd": SMALL_SD, "tiny_sd": TINY_SD, "ssd_1b": SSD_1B}


def narrowed(name: str) -> dict:
    """A released config with a tenth of the width, on small images, in three levels at most two blocks deep."""
    config = REAL[name]
    widths = [width // 10 for width in config.get("block_out_channels", [320, 640, 1280, 1280])]
    heads = config.get("attention_head_dim", 8)
    small = {"block_out_channels": widths, "norm_num_groups": 8, "sample_size": 8, "cross_attention_dim": 32}
    small["attention_head_dim"] = [max(1, n // 5) for n in heads] if isinstance(heads, list) else heads
    if "addition_embed_type" in config:
        small |= {"cross_attention_dim": 32 + 48, "addition_time_embed_dim": 16}
        small["projection_class_embeddings_input_dim"] = 40 + 6 * 16
    if name == "xl":
        small["transformer_layers_per_block"] = [1, 1, 3]
    return config | small


def text_config(width: int, **more) -> object:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENS)
    return transformers.CLIPTextConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3}
        | {"num_attention_heads": 2, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        | more
    )


def diffusers_pipeline(name: str, scheduler: str = "DDIMScheduler", **schedule) -> object:
    """A pipeline of random weights."""
    schedule = BETAS | {"prediction_type": "v_prediction" if name == "sd2_v" else "epsilon"} | schedule
    scheduler = getattr(diffusers, scheduler).from_config(
        schedule | {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, sample_size=16, layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    parts = {"unet": filled(diffusers.UNet2DConditionModel(**narrowed(name)), 1), "vae": filled(vae, 2)}
    first = text_config(32, hidden_act="gelu" if name.startswith("sd2") else "quick_gelu")
    parts |= {"text_encoder": filled(transformers.CLIPTextModel(first), 3), "scheduler": scheduler}
    pad = "!" if name.startswith("sd2") else "<|endoftext|>"
    parts["tokenizer"] = transformers.CLIPTokenizer.from_pretrained(TOKENS, pad_token=pad)
    if "addition_embed_type" not in narrowed(name):
        return diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    second = text_config(48, hidden_act="gelu", projection_dim=40, eos_token_id=2)
    parts["text_encoder_2"] = filled(transformers.CLIPTextModelWithProjection(second), 4)
    parts["tokenizer_2"] = transformers.CLIPTokenizer.from_pretrained(TOKENS, pad_token="!")
    return diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)


PROMPTS = ["three green dogs in the forest", "a blue car"]


def drawn_by_diffusers(peer: object, latents: torch.Tensor, **more) -> list:
    """Images by DDIM, whatever scheduler the checkpoint names: minialign samples with DDIM alone."""
    peer.scheduler = diffusers.DDIMScheduler.from_config(peer.scheduler.config, clip_sample=False)
    peer.set_progress_bar_config(disable=True)
    size = {"height": latents.shape[2] * 2, "width": latents.shape[3] * 2}
    scaled = latents.to(peer.unet.dtype) * peer.scheduler.init_noise_sigma
    return peer(PROMPTS, num_inference_steps=4, guidance_scale=5.0, latents=scaled, **size, **more).images


def assert_same_images(pipe: Pipeline, peer: object, latents: torch.Tensor | None = None, **more) -> None:
    """Equal to 1/255 from the same latents, and images that are worth comparing."""
    latents = pipe.noise([3, 4]) if latents is None else latents
    mine = pipe.generate(PROMPTS, steps=4, guidance=5.0, latents=latents, **more)
    theirs = drawn_by_diffusers(peer, latents, **more)
    for a, b in zip(mine, theirs, strict=True):
        a, b = np.asarray(a, int), np.asarray(b, int)
        assert a.shape == b.shape and np.abs(a - b).max() <= 1 and a.std() > 5


def peer_of(folder: Path, **how) -> object:
    return diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None, **how)


def to_original(folder: Path, path: Path, more: dict[str, torch.Tensor]) -> None:
    """Rename a pipeline's weights to latent-diffusion's names, the way back of the converters' tables."""
    out = dict(more)
    unet = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    config = json.loads((folder / "unet/config.json").read_text())
    layers = config["layers_per_block"]
    inside = [("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1")]
    inside += [("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection")]
    outside = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    outside |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    outside |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    outside |= {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    outside |= {"mid_block.attentions.0": "middle_block.1"}
    for key, tensor in unet.items():
        for new, old in outside.items():
            key = re.sub(rf"^{re.escape(new)}\.", old + ".", key)
        if match := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key):
            way, level, kind, j, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
            if way == "down":
                block = f"input_blocks.{1 + level * (layers + 1) + (layers if kind == 'downsamplers' else j)}"
                place = {"resnets": "0", "attentions": "1", "downsamplers": "0.op"}[kind]
                rest = rest.removeprefix("conv.") if kind == "downsamplers" else rest
            else:
                block = f"output_blocks.{level * (layers + 1) + (layers if kind == 'upsamplers' else j)}"
                attention = any(k.startswith(f"up_blocks.{level}.attentions") for k in unet)
                place = {"resnets": "0", "attentions": "1", "upsamplers": "2" if attention else "1"}[kind]
            key = f"{block}.{place}.{rest}"
        if "attentions" not in key and "transformer_blocks" not in key:
            for new, old in inside:
                key = re.sub(rf"\.{new}\.", f".{old}.", key)
        out["model.diffusion_model." + key] = tensor
    vae = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    levels = len(json.loads((folder / "vae/config.json").read_text())["block_out_channels"])
    for key, tensor in vae.items():
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        key = key.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm")
        key = key.replace("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out")
        key = re.sub(r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1", key)
        key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
        key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", key)
        key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", key)
        key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        convolved = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", key)
        out["first_stage_model." + key] = tensor[..., None, None].contiguous() if convolved else tensor
    save_file(out, path)


def openclip(folder: Path, prefix: str, added: int = 0) -> dict[str, torch.Tensor]:
    """A text tower in OpenCLIP's names, with `added` more layers at the end."""
    named = {TextEncoder.current_key(k): t for k, t in load_file(folder / "model.safetensors").items()}
    width = named["text_model.final_layer_norm.weight"].shape[0]
    out = {
        "logit_scale": torch.tensor(4.6),
        "positional_embedding": named["text_model.embeddings.position_embedding.weight"],
    }
    out["token_embedding.weight"] = named["text_model.embeddings.token_embedding.weight"]
    out["text_projection"] = named.get("text_projection.weight", torch.zeros(width, width)).T
    layers = len({key.split(".")[3] for key in named if key.startswith("text_model.encoder.layers.")})
    names = [("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2")]
    names += [("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")]
    for kind in ("weight", "bias"):
        out[f"ln_final.{kind}"] = named[f"text_model.final_layer_norm.{kind}"]
        for i in range(layers + added):
            here, block = f"text_model.encoder.layers.{min(i, layers - 1)}.", f"transformer.resblocks.{i}."
            out[f"{block}attn.in_proj_{kind}"] = torch.cat([named[f"{here}self_attn.{n}_proj.{kind}"] for n in "qkv"])
            out |= {f"{block}{old}.{kind}": named[f"{here}{new}.{kind}"] for new, old in names}
    return {prefix + key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in out.items()}


def original_file(tmp_path: Path, name: str) -> tuple[Path, Path]:
    """A pipeline whose widths are multiples of the released ones' groups and heads, as a folder and as one file."""
    wide = {"norm_num_groups": 32, "sample_size": 8}
    if name == "sd1":
        wide |= {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 64}
    elif name == "xl":
        wide |= {"block_out_channels": [64, 128, 128], "cross_attention_dim": 64 + 128, "attention_head_dim": [1, 2, 2]}
        wide |= {"transformer_layers_per_block": [1, 1, 2], "projection_class_embeddings_input_dim": 40 + 6 * 256}
    else:  # 1024 is by what diffusers knows the family
        wide |= {
            "block_out_channels": [64, 64, 128, 128],
            "cross_attention_dim": 1024,
            "attention_head_dim": [1, 1, 2, 2],
        }
    width = 1024 if name.startswith("sd2") else 64
    pipe = diffusers_pipeline(name)
    pipe.unet = filled(diffusers.UNet2DConditionModel(**(REAL[name] | wide)), 1)
    two = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    factor = {"scaling_factor": 0.13025 if name == "xl" else 0.18215, "force_upcast": name == "xl"}
    pipe.vae = filled(diffusers.AutoencoderKL(block_out_channels=(32, 64), layers_per_block=2, **two, **factor), 2)
    gelu = {"hidden_act": "gelu" if name.startswith("sd2") else "quick_gelu", "num_attention_heads": width // 64}
    pipe.text_encoder = filled(transformers.CLIPTextModel(text_config(width, **gelu)), 3)
    more = {"alphas_cumprod": torch.ones(3), "model_ema.decay": torch.ones(())}  # what such files also carry
    if name == "xl":
        deep = {"num_hidden_layers": 10, "num_attention_heads": 2, "eos_token_id": 2}  # by its depth diffusers knows XL
        second = text_config(128, hidden_act="gelu", projection_dim=40, **deep)
        pipe.text_encoder_2 = filled(transformers.CLIPTextModelWithProjection(second), 4)
    folder = tmp_path / "folder"
    pipe.save_pretrained(folder)
    shutil.copytree(TOKENS, tmp_path / "tokenizer")
    if name == "xl":
        more |= openclip(folder / "text_encoder_2", "conditioner.embedders.1.model.")
    if name.startswith("sd2"):
        more |= openclip(folder / "text_encoder", "cond_stage_model.model.")
    else:
        prefix = "conditioner.embedders.0.transformer." if name == "xl" else "cond_stage_model.transformer."
        text = load_file(folder / "text_encoder/model.safetensors")
        more |= {prefix + TextEncoder.current_key(key): tensor for key, tensor in text.items()}
        more[prefix + "text_model.embeddings.position_ids"] = torch.arange(77)[None]
    to_original(folder, tmp_path / "model.safetensors", more)
    return folder, tmp_path / "model.safetensors"
