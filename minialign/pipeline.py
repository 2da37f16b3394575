"""A text-to-image pipeline: prompts in, images out; read from and written to the diffusers layout.

z -> text encoder -> UNet, guided DDIM (diffusion.py) -> x_0 -> VAE decoder -> image. This is the model p(x|z) that the
method collects feedback on (section 1) and fine-tunes (section 3).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .diffusion import Context, NoiseSchedule, ddim_sample
from .models import original
from .models.clip import ProjectedTextEncoder, TextEncoder
from .models.lora import adapters
from .models.pretrained import (
    MALFORMED,
    WEIGHTS,
    InputError,
    build_network,
    first_line,
    load_network,
    read_bytes,
    read_json,
    read_weights,
    resolve,
    save_network,
    weights_patterns,
)
from .models.tokenizer import Tokenizer
from .models.unet import UNet
from .models.vae import VAE

PARTS: dict[str, tuple[str, str]] = {  # and their library and class in model_index.json
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
}
XL_PARTS = {  # and of XL
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
}
NETWORKS: dict[str, tuple[Any, str]] = {  # each with the name of its weights' file
    "unet": (UNet, WEIGHTS[0]),
    "vae": (VAE, WEIGHTS[0]),
    "text_encoder": (TextEncoder, WEIGHTS[1]),
    "text_encoder_2": (ProjectedTextEncoder, WEIGHTS[1]),
}
TOKENIZER = "openai/clip-vit-large-patch14"  # of a file in the original layout, which carries none


class Pipeline:
    """`unet`, `vae`, `text_encoder`, `tokenizer` and `schedule` of one checkpoint, on one device.

    Stable Diffusion XL has `text_encoder_2` and `tokenizer_2` besides, and may take zeros in place of an empty negative
    prompt (`zero_unconditional`). `card` is the text of the checkpoint's README.md.
    """

    def __init__(
        self,
        unet: UNet,
        vae: VAE,
        text_encoder: TextEncoder,
        tokenizer: Tokenizer,
        schedule: NoiseSchedule,
        text_encoder_2: ProjectedTextEncoder | None = None,
        tokenizer_2: Tokenizer | None = None,
        *,
        zero_unconditional: bool = False,
        card: str = "",
    ):
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        self.tokenizer, self.schedule = tokenizer, schedule
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2
        self.zero_unconditional, self.card = zero_unconditional, card

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        variant: str | None = None,
        revision: str | None = None,
        prediction_type: str | None = None,
        **hub: Any,
    ) -> Pipeline:
        """Load a folder in the diffusers layout, a hub id, or a .safetensors file in the original layout.

        None is the embedded shapes checkpoint. `variant` "fp16" reads model.fp16.safetensors. `prediction_type` is for
        a file in the original layout alone (`original.parts`), whose tokenizer is a folder tokenizer/ beside it or
        CLIP's from the hub. `hub`: token, cache_dir, local_files_only, see `resolve`. InputError names the
        file and what is wrong with it.
        """
        patterns = ["model_index.json", "README.md", "scheduler/scheduler_config.json"]
        for part, (_, name) in NETWORKS.items():
            patterns += weights_patterns(f"{part}/", name, variant)
        for part in ("tokenizer", "tokenizer_2"):
            patterns += [f"{part}/{file}" for file in Tokenizer.FILES]
        place = resolve(source, patterns, revision=revision, **hub)
        how: dict[str, Any] = {"device": device, "dtype": dtype}
        pipe = _from_file(place, prediction_type, how, hub) if place.is_file() else _from_folder(place, variant, how)
        if dtype == torch.float16 and pipe.vae.config.get("force_upcast", True) and pipe.text_encoder_2 is not None:
            pipe.vae.float()  # XL's overflows in half precision, unless its config says otherwise
        try:
            _check_fit(pipe, place)
        except InputError:
            raise
        except MALFORMED as error:
            raise InputError(f"{place}: {first_line(error)}") from error
        return pipe

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the diffusers layout, weights as `dtype` if given; diffusers' pipelines of this family load it."""
        if adapters(self.unet):
            raise ValueError("the UNet has adapters: merge_lora it first, or save_lora them alone")
        folder = Path(folder)
        xl = self.text_encoder_2 is not None
        for part, (_, name) in NETWORKS.items():
            if getattr(self, part) is not None:
                save_network(getattr(self, part), folder / part, name, dtype)
        for part in ("tokenizer", "tokenizer_2"):
            if getattr(self, part) is not None:
                getattr(self, part).save_pretrained(folder / part)
        (folder / "scheduler").mkdir(exist_ok=True)
        scheduler = {key: value for key, value in self.schedule.config.items() if not key.startswith("_")}
        index: dict[str, Any] = {"_class_name": f"StableDiffusion{'XL' * xl}Pipeline"}
        index |= {"scheduler": ["diffusers", "DDIMScheduler"], "image_encoder": [None, None]}
        index |= {part: list(kind) for part, kind in (PARTS | XL_PARTS if xl else PARTS).items()}
        index |= {"feature_extractor": [None, None]}
        if xl:
            index["force_zeros_for_empty_prompt"] = self.zero_unconditional
        else:
            index |= {"safety_checker": [None, None], "requires_safety_checker": False}
        texts = {
            "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler"} | scheduler,
            "model_index.json": index,
        }
        for file, value in texts.items():
            (folder / file).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        if self.card:
            (folder / "README.md").write_text(self.card, encoding="utf-8")

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload what `save_pretrained` writes to a model repository of the hub, made if need be; its address."""
        from huggingface_hub import HfApi  # slow to import

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            stale = [f"{part}/*" for part in NETWORKS]  # weights of other names that diffusers would read first
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, delete_patterns=stale))

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
    def encode_prompts(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> Context:
        """What the UNet reads of the prompts: text context (B,L,D), and XL's second conditioning (B,A).

        `size` is the height and width of the images in pixels, `image_size` unless given.
        """
        parts = [self._encode(list(prompts[i : i + 256]), size) for i in range(0, len(prompts), 256)]
        return tuple(torch.cat(part) for part in zip(*parts))

    def _encode(self, prompts: list[str], size: tuple[int, int] | None) -> Context:
        ids = self.tokenizer(prompts).to(self.device)
        if self.text_encoder_2 is None or self.tokenizer_2 is None:
            return (self.text_encoder(ids),)
        first, _ = self.text_encoder.text_model.states(ids)
        second, pooled = self.text_encoder_2.states_and_pooled(self.tokenizer_2(prompts).to(self.device))
        return torch.cat([first, second], dim=-1), self._second_conditioning(pooled, size or self.image_size)

    def _second_conditioning(self, pooled: Tensor, size: tuple[int, int]) -> Tensor:
        """XL's: the pooled text beside the size of images that are neither enlarged nor cropped."""
        time_ids = torch.tensor([*size, 0, 0, *size], device=self.device)
        return self.unet.second_conditioning(pooled, time_ids.expand(len(pooled), -1))

    @torch.no_grad()
    def encode_unconditional(self, negative_prompt: str = "", size: tuple[int, int] | None = None) -> Context:
        """What stands in place of a prompt for guidance, as `encode_prompts` of one prompt."""
        context, *added = self._encode([negative_prompt], size)
        if added and self.zero_unconditional and not negative_prompt:
            pooled = context.new_zeros(1, self.unet.added_width - 6 * self.unet.time_id_width)
            return torch.zeros_like(context), self._second_conditioning(pooled, size or self.image_size)
        return context, *added

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B,C,h,w) of the scaled latents of images, brought to `image_size` by `fit`."""
        weight = self.vae.encoder.conv_in.weight
        pixels = to_pixels([fit(image, self.image_size) for image in images])
        moments = self.vae.encode(pixels.to(weight.device, weight.dtype))
        mean, logvar = (moment.to(self.dtype) for moment in moments)
        return mean * self.vae.scaling_factor, (0.5 * logvar).exp() * self.vae.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Images of scaled latents (B,C,h,w), in the precision of the VAE's weights: in float16 XL's overflows."""
        latents = latents.to(self.vae.decoder.conv_in.weight.dtype) / self.vae.scaling_factor
        with torch.autocast(self.device.type, enabled=False):
            return to_images(self.vae.decode(latents))

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
        size = latents.shape[2] * self.vae.factor, latents.shape[3] * self.vae.factor
        context = self.encode_prompts(prompts, size)
        unconditional = tuple(
            part.expand_as(like) for part, like in zip(self.encode_unconditional(negative_prompt, size), context)
        )
        latents = latents.to(self.device, self.dtype)
        return self.decode(
            ddim_sample(self.unet, self.schedule, latents, context, unconditional, steps=steps, guidance=guidance)
        )


def _from_folder(folder: Path, variant: str | None, how: dict[str, Any]) -> Pipeline:
    index_path = folder / "model_index.json"
    index = read_json(index_path)
    xl = index.get("_class_name") == "StableDiffusionXLPipeline"
    for part, (_, kind) in (PARTS | XL_PARTS if xl else PARTS).items():
        named = index.get(part)
        named = named[-1] if isinstance(named, list) and named else named
        if named not in (kind, kind + "Fast"):
            raise InputError(f"{index_path}: {part} is {named!r}; supported: {kind!r}")
    config_path = folder / "scheduler" / "scheduler_config.json"
    parts: dict[str, Any] = {"schedule": _schedule(read_json(config_path), config_path)}
    for part, (build, name) in NETWORKS.items():
        if part in PARTS or xl:
            parts[part] = load_network(build, folder / part, name, variant=variant, **how)
    for part in ("tokenizer", "tokenizer_2") if xl else ("tokenizer",):
        parts[part] = Tokenizer.from_pretrained(folder / part)
    card = folder / "README.md"
    if card.is_file():
        parts["card"] = read_bytes(card).decode("utf-8", errors="replace")
    return Pipeline(**parts, zero_unconditional=xl and bool(index.get("force_zeros_for_empty_prompt", True)))


def _from_file(path: Path, prediction_type: str | None, how: dict[str, Any], hub: dict[str, Any]) -> Pipeline:
    weights = read_weights(path)
    if not original.is_original(weights):
        raise InputError(f"{path}: not in the original layout of Stable Diffusion (no {original.UNET}input_blocks)")
    try:
        found = original.parts(weights, prediction_type)
    except MALFORMED as error:
        raise InputError(f"{path}: not a Stable Diffusion 1.x, 2.x or XL base checkpoint ({error})") from error
    parts: dict[str, Any] = {"schedule": _schedule(found.pop("scheduler")[0], path)}
    for part, (config, tensors) in found.items():
        parts[part] = build_network(NETWORKS[part][0], config, tensors, path, path, **how)
    beside = path.parent / "tokenizer"
    try:
        folder = beside if beside.is_dir() else resolve(TOKENIZER, list(Tokenizer.FILES), **hub)
    except InputError as error:
        raise InputError(f"{path}: has no tokenizer; put a folder tokenizer beside it ({error})") from error
    parts["tokenizer"] = Tokenizer.from_pretrained(folder)
    xl = "text_encoder_2" in found
    padded_by_0 = {"pad_token": "!"}  # as 2.x and XL's second tower were trained
    if xl:
        parts["tokenizer_2"] = Tokenizer.from_pretrained(folder, padded_by_0)
    elif found["unet"][0]["use_linear_projection"]:
        parts["tokenizer"] = Tokenizer.from_pretrained(folder, padded_by_0)
    return Pipeline(**parts, zero_unconditional=xl)


def _schedule(config: dict[str, Any], path: Path) -> NoiseSchedule:
    try:
        return NoiseSchedule.from_config(config)
    except MALFORMED as error:
        raise InputError(f"{path}: {first_line(error)}") from error


def _check_fit(pipe: Pipeline, place: Path) -> None:
    """InputError unless the parts fit together."""
    channels, width = pipe.vae.latent_channels, 0
    rows = []
    for suffix, encoder, tokenizer in (
        ("", pipe.text_encoder, pipe.tokenizer),
        ("_2", pipe.text_encoder_2, pipe.tokenizer_2),
    ):
        if encoder is not None and tokenizer is not None:
            text = encoder.text_model.embeddings
            tokens, positions = text.token_embedding, text.position_embedding
            width += tokens.embedding_dim
            most = max(tokenizer.vocab.values()) + 1
            rows.append((f"tokenizer{suffix}: number of tokens", most, 1, tokens.num_embeddings))
            rows.append((f"tokenizer{suffix}: model_max_length", tokenizer.length, 2, positions.num_embeddings))
    rows += [
        ("unet: in_channels", pipe.unet.in_channels, channels, channels),  # inpainting's also reads a mask
        ("unet: out_channels", pipe.unet.conv_out.out_channels, channels, channels),
        ("unet: cross_attention_dim", pipe.unet.context_width, width, width),
    ]
    if pipe.text_encoder_2 is not None:
        added = pipe.text_encoder_2.text_projection.out_features + 6 * pipe.unet.time_id_width
    else:
        added = 0
    rows.append(("unet: projection_class_embeddings_input_dim", pipe.unet.added_width, added, added))
    for what, has, least, most in rows:
        if not least <= has <= most:
            accepted = least if least == most else f"{least} to {most}"
            raise InputError(f"{place}: {what} is {has}; accepted with the other parts: {accepted}")


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image at height and width `size`, not distorted: resized by the shorter side, cropped to the centre."""
    height, width = size
    return image if image.size == (width, height) else ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Images of one size -> (B,3,H,W) float32 in [-1,1]."""
    arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(B,3,H,W) in [-1,1], clamped -> images."""
    values = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return [Image.fromarray(array) for array in values.permute(0, 2, 3, 1).cpu().numpy()]
