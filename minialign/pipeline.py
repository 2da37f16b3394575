"""A text-to-image pipeline: prompts in, images out; read from and written to the diffusers layout.

z -> text encoder -> UNet, guided DDIM (diffusion.py) -> x_0 -> VAE decoder -> image. This is the model p(x|z) that the
method collects feedback on (section 1) and fine-tunes (section 3).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .diffusion import NoiseSchedule, ddim_sample
from .models.clip import TextEncoder
from .models.pretrained import (
    MALFORMED,
    WEIGHTS,
    InputError,
    first_line,
    load_network,
    read_json,
    resolve,
    save_network,
    weights_name,
)
from .models.tokenizer import Tokenizer
from .models.unet import UNet
from .models.vae import VAE

INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


class Pipeline:
    """`unet`, `vae`, `text_encoder`, `tokenizer` and `schedule` of one checkpoint, on one device."""

    def __init__(self, unet: UNet, vae: VAE, text_encoder: TextEncoder, tokenizer: Tokenizer, schedule: NoiseSchedule):
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        self.tokenizer, self.schedule = tokenizer, schedule

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        variant: str | None = None,
        revision: str | None = None,
    ) -> Pipeline:
        """Load a folder in the diffusers layout or a hub id; None is the embedded shapes checkpoint.

        `variant` "fp16" reads model.fp16.safetensors. InputError names the file and what is wrong with it.
        """
        weights = {"unet": WEIGHTS[0], "vae": WEIGHTS[0], "text_encoder": WEIGHTS[1]}
        files = ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/*"]
        for part, name in weights.items():
            files += [f"{part}/config.json", f"{part}/{weights_name(name, variant)}"]
        folder = resolve(source, files, revision)
        index = read_json(folder / "model_index.json")
        for part, (_, kind) in {key: INDEX[key] for key in ("unet", "vae", "text_encoder", "tokenizer")}.items():
            named = index.get(part)
            named = named[-1] if isinstance(named, list) and named else named
            if named not in (kind, kind + "Fast"):
                raise InputError(f"{folder / 'model_index.json'}: {part} is {named!r}; supported: {kind!r}")
        how: dict[str, Any] = {"device": device, "dtype": dtype, "variant": variant}
        config_path = folder / "scheduler" / "scheduler_config.json"
        try:
            schedule = NoiseSchedule.from_config(read_json(config_path))
        except MALFORMED as error:
            raise InputError(f"{config_path}: {first_line(error)}") from error
        unet = load_network(UNet, folder / "unet", **how)
        vae = load_network(VAE, folder / "vae", **how)
        text_encoder = load_network(TextEncoder, folder / "text_encoder", prefix="text_model.", **how)
        tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
        text = text_encoder.text_model.embeddings
        tokens, positions = text.token_embedding, text.position_embedding
        for what, has, least, most in (
            ("unet: in_channels", unet.in_channels, vae.latent_channels, vae.latent_channels),
            ("unet: out_channels", unet.conv_out.out_channels, vae.latent_channels, vae.latent_channels),
            ("unet: cross_attention_dim", unet.context_width, tokens.embedding_dim, tokens.embedding_dim),
            ("tokenizer: number of tokens", max(tokenizer.vocab.values()) + 1, 1, tokens.num_embeddings),
            ("tokenizer: model_max_length", tokenizer.length, 2, positions.num_embeddings),
        ):
            if not least <= has <= most:  # such as inpainting's UNet, which also reads a mask
                accepted = least if least == most else f"{least} to {most}"
                raise InputError(f"{folder}: {what} is {has}; accepted with the other parts: {accepted}")
        return cls(unet, vae, text_encoder, tokenizer, schedule)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the diffusers layout, weights as `dtype` if given; diffusers' StableDiffusionPipeline loads it."""
        folder = Path(folder)
        save_network(self.unet, folder / "unet", dtype=dtype)
        save_network(self.vae, folder / "vae", dtype=dtype)
        save_network(self.text_encoder, folder / "text_encoder", "model", dtype)
        self.tokenizer.save_pretrained(folder / "tokenizer")
        (folder / "scheduler").mkdir(exist_ok=True)
        scheduler = {key: value for key, value in self.schedule.config.items() if not key.startswith("_")}
        texts = {
            "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler"} | scheduler,
            "model_index.json": INDEX,
        }
        for name, value in texts.items():
            (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the checkpoint was trained on."""
        size = self.unet.config.get("sample_size") or 64
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae.factor, width * self.vae.factor

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Text context (B,L,D) of the prompts."""
        ids = self.tokenizer(list(prompts)).to(self.device)
        return torch.cat([self.text_encoder(part) for part in ids.split(256)])

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B,C,h,w) of the scaled latents of images, brought to `image_size` if need be."""
        size = self.image_size[::-1]
        images = [image if image.size == size else image.resize(size, Image.Resampling.LANCZOS) for image in images]
        mean, logvar = self.vae.encode(to_pixels(images).to(self.device, self.dtype))
        return mean * self.vae.scaling_factor, (0.5 * logvar).exp() * self.vae.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Images of scaled latents (B,C,h,w)."""
        return to_images(self.vae.decode(latents / self.vae.scaling_factor))

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Starting latents (B,C,h,w), one a seed, so that an image does not depend on the batch it is drawn in."""
        height, width = (pixels // self.vae.factor for pixels in self.image_size)
        shape = (self.unet.in_channels, height, width)
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows).to(self.device, self.dtype)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str] | str,
        *,
        steps: int = 50,
        guidance: float = 7.5,
        seed: int = 0,
        latents: Tensor | None = None,
        negative_prompt: str = "",
    ) -> list[Image.Image]:
        """One image a prompt by guided DDIM. Image i starts from noise of seed + i, or from latents (B,C,h,w)."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if latents is None:
            latents = self.noise(range(seed, seed + len(prompts)))
        elif len(latents) != len(prompts):
            raise ValueError(f"latents has {len(latents)} rows for {len(prompts)} prompts")
        context = self.encode_prompts(prompts)
        unconditional = self.encode_prompts([negative_prompt]).expand_as(context)
        latents = latents.to(self.device, self.dtype)
        return self.decode(
            ddim_sample(self.unet, self.schedule, latents, context, unconditional, steps=steps, guidance=guidance)
        )


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Images of one size -> (B,3,H,W) float32 in [-1,1]."""
    arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(B,3,H,W) in [-1,1], clamped -> images."""
    values = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return [Image.fromarray(array) for array in values.permute(0, 2, 3, 1).cpu().numpy()]
