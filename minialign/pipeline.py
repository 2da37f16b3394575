"""A text-to-image pipeline: prompts in, images out; read from and written to the diffusers layout.

z -> text encoder -> UNet, guided DDIM (diffusion.py) -> x_0 -> VAE decoder -> image. This is the model p(x|z) that the
method collects feedback on (section 1) and fine-tunes (section 3).
"""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .diffusion import Context, NoiseSchedule, ddim_sample
from .files import MALFORMED, InputError, first_line, read_bytes, read_json, read_weights
from .models import original
from .models.clip import ProjectedTextEncoder, TextEncoder
from .models.lora import adapters
from .models.pretrained import WEIGHTS, build_network, load_network, resolve, save_network, variants, weights_patterns
from .models.tokenizer import Tokenizer
from .models.unet import UNet
from .models.vae import VAE

COMPONENTS: dict[str, tuple[str, str]] = {  # and their library and class in model_index.json
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
}
XL_COMPONENTS = {  # and of XL
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
}
NETWORKS: dict[str, tuple[Any, str]] = {  # each with the name of its weights' file
    "unet": (UNet, WEIGHTS[0]),
    "vae": (VAE, WEIGHTS[0]),
    "text_encoder": (TextEncoder, WEIGHTS[1]),
    "text_encoder_2": (ProjectedTextEncoder, WEIGHTS[1]),
}
WORLD = "_minialign_world"  # the key of model_index.json, which diffusers passes over, that says `Pipeline.world`
TOKENIZER = "openai/clip-vit-large-patch14"  # of a file in the original layout, which carries none
HUB = ("token", "cache_dir", "local_files_only")  # keywords of `resolve`
OTHER_NAMES = {"torch_dtype": "dtype", "use_safetensors": "none is needed: nothing else is read"}  # diffusers' and ours


class Pipeline:
    """`unet`, `vae`, `text_encoder`, `tokenizer` and `schedule` of one checkpoint, on one device.

    Stable Diffusion XL has `text_encoder_2` and `tokenizer_2` besides, and may take zeros in place of an empty negative
    prompt (`zero_unconditional`). `card` is the text of the checkpoint's README.md. `world` is "shapes" for the
    bundled model and all that is fine-tuned from it, else "". `source` says where it was loaded from.
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
        world: str = "",
        source: str = "",
    ):
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        self.tokenizer, self.schedule = tokenizer, schedule
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2
        self.zero_unconditional, self.card, self.world, self.source = zero_unconditional, card, world, source

    def __repr__(self) -> str:
        family = "Stable Diffusion XL" if self.text_encoder_2 is not None else "Stable Diffusion"
        millions = sum(weight.numel() for weight in self.unet.parameters()) / 1e6
        height, width = self.image_size
        return (
            f"Pipeline({self.source or 'not from a file'}: {family}, UNet of {millions:.1f} million parameters, "
            f"{self.schedule.prediction_type},\n         images of {height} x {width}, {self.dtype} on {self.device})"
        )

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
        vae: str | Path | None = None,
        **hub: Any,
    ) -> Pipeline:
        """Load a folder in the diffusers layout, a hub id, or a .safetensors file in the original layout.

        None is the bundled model. `variant` "fp16" reads model.fp16.safetensors of the networks that have
        it. `prediction_type` is for a file in the original layout alone (`original.components`), whose tokenizer is a
        folder tokenizer/ beside it or CLIP's from the hub. `vae` is a folder, a hub id or a .safetensors file of an
        autoencoder that takes the place of the source's. `hub`: token, cache_dir, local_files_only, see `resolve`.
        InputError names the file and what is wrong with it; TypeError a keyword that is none.
        """
        for key in hub.keys() - set(HUB):
            accepted = ", ".join(("device, dtype, variant, revision, prediction_type, vae", *HUB))
            accepted = OTHER_NAMES.get(key, accepted)
            raise TypeError(f"Pipeline.from_pretrained: {key}= is no keyword of it; accepted: {accepted}")
        patterns = ["model_index.json", "README.md", "scheduler/scheduler_config.json"]
        for component, (_, name) in NETWORKS.items():
            patterns += weights_patterns(f"{component}/", name, variant)
        for component in ("tokenizer", "tokenizer_2"):
            patterns += [f"{component}/{file}" for file in Tokenizer.FILES]
        place = resolve(source, patterns, revision=revision, **hub)
        there = [name for name in NETWORKS if (place / name / "config.json").exists()]
        lacking = [name for name in there if variant not in variants(place / name, NETWORKS[name][1])]
        if variant and lacking and lacking == there:
            raise InputError(f"{place}: no network has weights of the variant {variant!r}")
        if lacking:  # of a hub repository fetch what is read in its place, see `weights_files`
            names = [(f"{component}/", NETWORKS[component][1]) for component in lacking]
            more = [weights_patterns(*name) if variant else [f"{''.join(name)}*.safetensors*"] for name in names]
            place = resolve(source, sum(more, []), revision=revision, **hub)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        if place.is_file():
            pipe = _from_file(place, prediction_type, vae, options, hub)
        else:
            pipe = _from_folder(place, variant, vae, options, hub)
        if dtype == torch.float16 and pipe.vae.config.get("force_upcast", True) and pipe.text_encoder_2 is not None:
            pipe.vae.float()  # XL's overflows in half precision, unless its config says otherwise
        pipe.source = "the bundled model" if source is None else str(source)
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
        for component, (_, name) in NETWORKS.items():
            if getattr(self, component) is not None:
                save_network(getattr(self, component), folder / component, name, dtype)
        for component in ("tokenizer", "tokenizer_2"):
            if getattr(self, component) is not None:
                getattr(self, component).save_pretrained(folder / component)
        (folder / "scheduler").mkdir(exist_ok=True)
        scheduler = self.schedule.source
        index: dict[str, Any] = {"_class_name": f"StableDiffusion{'XL' * xl}Pipeline"}
        index |= {"scheduler": ["diffusers", scheduler["_class_name"]], "image_encoder": [None, None]}
        index |= {name: list(kind) for name, kind in (COMPONENTS | XL_COMPONENTS if xl else COMPONENTS).items()}
        index |= {"feature_extractor": [None, None]}
        if xl:
            index["force_zeros_for_empty_prompt"] = self.zero_unconditional
        else:
            index |= {"safety_checker": [None, None], "requires_safety_checker": False}
        if self.world:
            index[WORLD] = self.world
        texts = {"scheduler/scheduler_config.json": scheduler, "model_index.json": index}
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
            stale = [f"{name}/*" for name in NETWORKS]  # weights of other names that diffusers would read first
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
        chunks = [self._encode(list(prompts[i : i + 256]), size) for i in range(0, len(prompts), 256)]
        return tuple(torch.cat(tensors) for tensors in zip(*chunks))

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
        """Mean and standard deviation (B,C,h,w) of the scaled latents of images, `resized` to `image_size`."""
        weight = self.vae.encoder.conv_in.weight
        pixels = to_pixels([resized(image, self.image_size) for image in images])
        moments = self.vae.encode(pixels.to(weight.device, weight.dtype))
        mean, logvar = (moment.to(self.dtype) for moment in moments)
        return mean * self.vae.scaling_factor, (0.5 * logvar).exp() * self.vae.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Images of scaled latents (B,C,h,w), in the precision of the VAE's weights: in float16 XL's overflows.

        InputError for latents or images with numbers that are not finite, which would be black.
        """
        _check_finite(latents, "the latents")
        latents = latents.to(self.vae.decoder.conv_in.weight.dtype) / self.vae.scaling_factor
        with torch.autocast(self.device.type, enabled=False):
            pixels = self.vae.decode(latents)
        _check_finite(pixels, "what the autoencoder makes of the latents")
        return to_images(pixels)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Starting latents (B,C,h,w), one a seed, so that an image does not depend on the batch it is drawn in.

        Seeds are of 64 bits.
        """
        height, width = (pixels // self.vae.factor for pixels in self.image_size)
        shape = (self.unet.in_channels, height, width)
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(_seed_of_32_bits(seed))) for seed in seeds]
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
        """One image a prompt by guided DDIM. Image i starts from noise of seed + i, or from latents (B,C,h,w).

        `negative_prompt` is one text for all images, and guidance up to 1 is none. Warns of prompts that are cut, see
        `cut_prompts`. InputError for more steps than the schedule has, and for numbers that are not finite.
        """
        if not isinstance(negative_prompt, str):
            kind = type(negative_prompt).__name__
            raise TypeError(f"negative_prompt is of type {kind}; accepted: one str for all prompts, '' for none")
        try:
            self.schedule.timesteps(steps)
        except ValueError as error:
            raise InputError(str(error)) from error
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if said := cut_warning(self.tokenizer, [*prompts, negative_prompt]):
            warnings.warn(said, stacklevel=3)  # the caller's line, below no_grad's
        if latents is None:
            latents = self.noise(range(seed, seed + len(prompts)))
        elif len(latents) != len(prompts):
            raise ValueError(f"latents has {len(latents)} rows for {len(prompts)} prompts")
        size = latents.shape[2] * self.vae.factor, latents.shape[3] * self.vae.factor
        context = self.encode_prompts(prompts, size)
        unconditional = tuple(
            empty.expand_as(like) for empty, like in zip(self.encode_unconditional(negative_prompt, size), context)
        )
        latents = latents.to(self.device, self.dtype)
        return self.decode(
            ddim_sample(self.unet, self.schedule, latents, context, unconditional, steps=steps, guidance=guidance)
        )


def cut_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> dict[str, str]:
    """The prompts that are longer than the tokenizer's window (75 tokens of CLIP's), each with what the model loses.

    What is lost is in the tokenizer's spelling: lower case, with a space between words and marks.
    """
    window = tokenizer.length - 2  # beside start and end
    cut = {prompt: lost for prompt in prompts if (lost := tokenizer.encode(prompt)[window:])}
    return {prompt: tokenizer.decode(lost) for prompt, lost in cut.items()}


def cut_warning(tokenizer: Tokenizer, prompts: Sequence[str]) -> str:
    """One line that counts the prompts that are cut and shows what is lost of the first; empty where none is."""
    cut = cut_prompts(tokenizer, prompts)
    if not cut:
        return ""
    prompt, lost = next(iter(cut.items()))
    count, window = "1 prompt is" if len(cut) == 1 else f"{len(cut)} prompts are", tokenizer.length - 2
    return f"{count} cut to {window} tokens: of {prompt[:40] + '...'!r} the model does not see {lost[:80]!r}"


def _seed_of_32_bits(seed: int) -> int:
    """The seed of torch's generator on the CPU, which reads 32 bits: seeds beyond do not repeat those below.

    A multiplicative hash (Knuth 1998, section 6.4) of the upper bits is never 0, and seeds that share them stay apart.
    """
    return seed if seed < 1 << 32 else (seed ^ (seed >> 32) * 0x9E3779B1) % (1 << 32)


def _check_finite(numbers: Tensor, what: str) -> None:
    """InputError where some of `numbers` (B,...) are not finite: they would become black images."""
    bad = int((~numbers.isfinite()).flatten(1).any(1).sum())
    if bad:
        if numbers.dtype == torch.float16:
            helps = "float16 overflows above 65504; what helps: dtype float32 or bfloat16"
        else:
            helps = f"in {str(numbers.dtype).removeprefix('torch.')}; are the checkpoint's weights finite?"
        raise InputError(f"{what} of {bad} of {len(numbers)} images have numbers that are not finite: {helps}")


def _from_folder(
    folder: Path, variant: str | None, vae: str | Path | None, options: dict[str, Any], hub: dict[str, Any]
) -> Pipeline:
    index_path = folder / "model_index.json"
    if not index_path.exists():
        _refuse_a_component(folder)
    index = read_json(index_path)
    xl = "text_encoder_2" in index  # whichever of XL's pipelines saved it
    all_names = COMPONENTS | XL_COMPONENTS if xl else COMPONENTS
    needed = [name for name in all_names if name != "vae" or vae is None]
    for component in needed:
        named, kind = index.get(component), (COMPONENTS | XL_COMPONENTS)[component][1]
        named = named[-1] if isinstance(named, list) and named else named
        if named not in (kind, kind + "Fast"):
            raise InputError(f"{index_path}: {component} is {named!r}; accepted: {kind!r}")
    config_path = folder / "scheduler" / "scheduler_config.json"
    components: dict[str, Any] = {"schedule": _schedule(read_json(config_path), config_path, xl)}
    for component, (build, name) in NETWORKS.items():
        if component in needed:
            components[component] = load_network(build, folder / component, name, variant=variant, **options)
    if vae is not None:
        components["vae"] = _load_vae(vae, xl, options, hub)
    for component in ("tokenizer", "tokenizer_2") if xl else ("tokenizer",):
        components[component] = Tokenizer.from_pretrained(folder / component)
    _correct_sample_size(components["unet"], xl)
    card = folder / "README.md"
    if card.is_file():
        components["card"] = read_bytes(card).decode("utf-8", errors="replace")
    zero_unconditional = xl and bool(index.get("force_zeros_for_empty_prompt", True))
    return Pipeline(**components, zero_unconditional=zero_unconditional, world=str(index.get(WORLD) or ""))


def _correct_sample_size(unet: UNet, xl: bool) -> None:
    """64 for a smaller `sample_size` that diffusers wrote before 0.9, as its pipelines but XL's correct it."""
    version = re.match(r"(\d+)\.(\d+)", str(unet.config.get("_diffusers_version")))
    size = unet.config.get("sample_size")
    if not xl and version and (int(version[1]), int(version[2])) < (0, 9) and isinstance(size, int) and size < 64:
        unet.config = unet.config | {"sample_size": 64}


def _refuse_a_component(folder: Path) -> None:
    """InputError for one network of a pipeline without the rest."""
    kinds = {kind: component for component, (_, kind) in (COMPONENTS | XL_COMPONENTS).items()}
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    component = kinds.get(str(config.get("_class_name")), folder.name)
    if component in NETWORKS and config:
        if (folder.parent / "model_index.json").exists():
            where = f"give the folder above, {folder.parent}"
            raise InputError(f"{folder}: is the {component} of a pipeline alone; {where}")
        where = f"put it as {component}/ into a copy of its pipeline and give that"
        raise InputError(f"{folder}: is a {component} alone; {where}")
    present = [component for component in NETWORKS if (folder / component).is_dir()]
    if present and len(present) < 3:
        has = " and ".join(present)
        raise InputError(f"{folder}: has no model_index.json but {has} alone; copy it into its pipeline and give that")


def _from_file(
    path: Path, prediction_type: str | None, vae: str | Path | None, options: dict[str, Any], hub: dict[str, Any]
) -> Pipeline:
    weights = read_weights(path)
    if not original.is_original(weights):
        raise InputError(f"{path}: not in the original layout of Stable Diffusion (no {original.UNET}input_blocks)")
    try:
        converted = original.components(weights, prediction_type)
    except MALFORMED as error:
        raise InputError(f"{path}: not a Stable Diffusion 1.x, 2.x or XL base checkpoint ({error})") from error
    xl = "text_encoder_2" in converted
    components: dict[str, Any] = {"schedule": _schedule(converted.pop("scheduler")[0], path, xl)}
    if vae is not None:
        converted.pop("vae", None)
        components["vae"] = _load_vae(vae, xl, options, hub)
    elif "vae" not in converted:
        accepted = "a folder in the diffusers layout, a hub id or a .safetensors file"
        raise InputError(f"{path}: has no autoencoder (VAE; no {original.VAE}); give one as vae, accepted: {accepted}")
    for component, (config, tensors) in converted.items():
        components[component] = build_network(NETWORKS[component][0], config, tensors, path, path, **options)
    beside = path.parent / "tokenizer"
    try:
        folder = beside if beside.is_dir() else resolve(TOKENIZER, list(Tokenizer.FILES), **hub)
    except InputError as error:
        raise InputError(f"{path}: has no tokenizer; put a folder tokenizer beside it ({error})") from error
    components["tokenizer"] = Tokenizer.from_pretrained(folder)
    padded_by_0 = {"pad_token": "!"}  # as 2.x and XL's second tower were trained
    if xl:
        components["tokenizer_2"] = Tokenizer.from_pretrained(folder, padded_by_0)
    elif converted["unet"][0]["use_linear_projection"]:
        components["tokenizer"] = Tokenizer.from_pretrained(folder, padded_by_0)
    return Pipeline(**components, zero_unconditional=xl)


def _load_vae(source: str | Path, xl: bool, options: dict[str, Any], hub: dict[str, Any]) -> VAE:
    """An autoencoder from a folder (its own or a pipeline's), a hub id, or a file in either layout."""
    build, name = NETWORKS["vae"]
    place = resolve(source, weights_patterns("", name) + weights_patterns("vae/", name), **hub)
    if place.is_dir():
        vae: VAE = load_network(build, place / "vae" if (place / "vae").is_dir() else place, name, **options)
        return vae
    weights, config_path = read_weights(place), place.parent / "config.json"
    if "encoder.conv_norm_out.weight" in weights:  # diffusers' names
        config = read_json(config_path)
    else:
        try:
            config, weights = original.vae_component(weights, xl)
        except MALFORMED as error:
            raise InputError(f"{place}: not the autoencoder of Stable Diffusion ({first_line(error)})") from error
        config_path = place
    vae = build_network(build, config, weights, config_path, place, **options)
    return vae


def _schedule(config: dict[str, Any], path: Path, xl: bool) -> NoiseSchedule:
    """The schedule of a scheduler's config, corrected as diffusers' pipelines do when they load one.

    Latents are not clipped, since nothing bounds them by 1 (diffusers leaves XL's to the config). `steps_offset` is 1
    but in XL, which was not released with old configs.
    """
    right = {"clip_sample": False} if xl else {"clip_sample": False, "steps_offset": 1}
    try:
        read = NoiseSchedule.from_config(config).config
        return NoiseSchedule.from_config(config | {key: value for key, value in right.items() if read[key] != value})
    except MALFORMED as error:
        raise InputError(f"{path}: {first_line(error)}") from error


def _check_fit(pipe: Pipeline, place: Path) -> None:
    """InputError unless the components belong together."""
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
        ("vae: in_channels", pipe.vae.encoder.conv_in.in_channels, 3, 3),  # LDM3D's also has depth
        ("vae: out_channels", pipe.vae.decoder.conv_out.out_channels, 3, 3),
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
            raise InputError(f"{place}: {what} is {has}; accepted with the other components: {accepted}")


# The version of what `resized`, `to_pixels` and `Pipeline.encode_images` make of an image. The keys of cached latents
# hold it, so that it changes where they do.
PREPROCESSING = "1: the shorter side by Lanczos, then the centre"


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
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
