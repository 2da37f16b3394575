"""CLIP (Radford et al. 2021): the text tower that conditions the UNet, and both towers for the reward's features.

State-dict keys are those of transformers' CLIPModel and CLIPTextModel (with the `text_model.` prefix).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..files import MALFORMED, InputError, first_line, read_json, read_weights
from .blocks import Conv2d, Embedding, LayerNorm, Linear, check_heads, count, read_config
from .original import open_clip
from .pretrained import EMBEDDED, WEIGHTS, build_network, load_network, resolve, save_network, weights_patterns
from .tokenizer import Tokenizer

ACCEPTED = "accepted: a folder that transformers writes, or OpenCLIP, or a hub id such as owner/name"
OPENCLIP = "open_clip_config.json", "open_clip_model.safetensors"
# what is fetched from a hub beside config and weights
FILES = [*Tokenizer.FILES, "preprocessor_config.json", "processor_config.json", OPENCLIP[0]]

TEXT_SETTINGS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
VISION_SETTINGS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "num_channels": 3,
    "layer_norm_eps": 1e-5,
}
CLIP_SETTINGS = {"text_config": {}, "vision_config": {}, "projection_dim": 512, "logit_scale_init_value": 2.6592}
ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
}


def _read(kind: str, config: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    return read_config(kind, config, settings, {"hidden_act": tuple(ACTIVATIONS)})


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = check_heads(width, heads)
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.out_proj = Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """Pre-norm transformer layer: (B,N,D) -> (B,N,D)."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.self_attn = SelfAttention(c["hidden_size"], c["num_attention_heads"])
        self.layer_norm1 = LayerNorm(c["hidden_size"], c["layer_norm_eps"])
        self.mlp = MLP(c["hidden_size"], c["intermediate_size"], c["hidden_act"])
        self.layer_norm2 = LayerNorm(c["hidden_size"], c["layer_norm_eps"])

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class Transformer(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.layers = nn.ModuleList([Layer(c) for _ in range(count(c, "num_hidden_layers"))])


class TextEmbeddings(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.token_embedding = Embedding(c["vocab_size"], c["hidden_size"])
        self.position_embedding = Embedding(c["max_position_embeddings"], c["hidden_size"])

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextTransformer(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.eos_token_id: int = 2 if c["eos_token_id"] is None else c["eos_token_id"]
        if type(self.eos_token_id) is not int:
            raise ValueError(f"CLIP config: eos_token_id={c['eos_token_id']!r} is not supported; accepted: one number")
        self.embeddings = TextEmbeddings(c)
        self.encoder = Transformer(c)
        self.final_layer_norm = LayerNorm(c["hidden_size"], c["layer_norm_eps"])

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B,L) -> last hidden states after the final norm (B,L,D)."""
        return self.states(ids)[1]

    def states(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B,L,D) before the last layer, which SDXL reads, and the last ones after the final norm."""
        before = x = self.embeddings(ids)
        for layer in self.encoder.layers:
            before, x = x, layer(x, causal=True)
        return before, self.final_layer_norm(x)

    def pool(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The hidden state (B,D) at the end-of-text token.

        Configs written before that id was corrected carry eos_token_id 2 and mean the highest id of the row.
        """
        key = ids if self.eos_token_id == 2 else (ids == self.eos_token_id).int()
        return hidden[torch.arange(len(ids), device=ids.device), key.argmax(dim=1)]


class VisionEmbeddings(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        width, patch = c["hidden_size"], c["patch_size"]
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.patch_embedding = Conv2d(c["num_channels"], width, patch, stride=patch, bias=False)
        self.position_embedding = Embedding((c["image_size"] // patch) ** 2 + 1, width)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(images), 1, -1).to(patches.dtype)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionTransformer(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.embeddings = VisionEmbeddings(c)
        self.pre_layrnorm = LayerNorm(c["hidden_size"], c["layer_norm_eps"])  # transformers' spelling
        self.encoder = Transformer(c)
        self.post_layernorm = LayerNorm(c["hidden_size"], c["layer_norm_eps"])

    def forward(self, images: Tensor) -> Tensor:
        """Pixels (B,3,S,S) -> the class token's final state (B,D)."""
        x = self.pre_layrnorm(self.embeddings(images))
        for layer in self.encoder.layers:
            x = layer(x, causal=False)
        return self.post_layernorm(x[:, 0])


class TextEncoder(nn.Module):
    """CLIP's text tower as the UNet reads it: ids (B,L) -> last hidden states after the final norm, (B,L,D)."""

    # the rest of CLIP, which some files have beside their text tower
    unused: tuple[str, ...] = ("vision_model.", "visual_projection.", "logit_scale", "text_projection.")

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(_read("CLIPTextModel", config, TEXT_SETTINGS))

    def forward(self, ids: Tensor) -> Tensor:
        return self.text_model(ids)

    @staticmethod
    def current_key(key: str) -> str:
        """Today's name of a stored weight: transformers writes text towers with and without "text_model."."""
        return key if key.startswith(("text_model.", "text_projection.")) else "text_model." + key


class ProjectedTextEncoder(TextEncoder):
    """SDXL's second text tower, transformers' CLIPTextModelWithProjection."""

    unused = TextEncoder.unused[:-1]

    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        width = _read("CLIPTextModel", config, TEXT_SETTINGS)["hidden_size"]
        self.text_projection = Linear(width, config.get("projection_dim", 512), bias=False)

    def states_and_pooled(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B,L,D) before the last layer, and the projected embedding (B,P) of the whole text."""
        before, last = self.text_model.states(ids)
        return before, self.text_projection(self.text_model.pool(last, ids))


class CLIPTowers(nn.Module):
    """Both towers with their projections; `minialign.CLIP` adds the tokenizer and the image preprocessing."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        c = read_config("CLIPModel", config, CLIP_SETTINGS, {"model_type": ("clip", None)})
        text = _read("CLIPModel text", c["text_config"] or {}, TEXT_SETTINGS)
        vision = _read("CLIPModel vision", c["vision_config"] or {}, VISION_SETTINGS)
        width: int = c["projection_dim"]
        self.image_size: int = vision["image_size"]
        self.text_model = TextTransformer(text)
        self.vision_model = VisionTransformer(vision)
        self.visual_projection = Linear(vision["hidden_size"], width, bias=False)
        self.text_projection = Linear(text["hidden_size"], width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(c["logit_scale_init_value"]))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels (B,3,S,S) -> projected embeddings (B,E), not normalised."""
        return self.visual_projection(self.vision_model(pixels))

    def encode_text(self, ids: Tensor) -> Tensor:
        """Token ids (B,L) -> projected embeddings (B,E), not normalised."""
        return self.text_projection(self.text_model.pool(self.text_model(ids), ids))


PREPROCESSING: dict[str, Any] = {  # the defaults of transformers' CLIPImageProcessor
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
PREPROCESSING_BUILT: dict[str, tuple] = {
    "do_resize": (True,),
    "do_center_crop": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "do_convert_rgb": (True, None),
    "resample": (3,),  # PIL's number for bicubic
    "rescale_factor": (1 / 255,),
}


def preprocess(images: list[Image.Image], config: dict[str, Any]) -> Tensor:
    """Pixels (B,3,S,S) as CLIP was trained on: bicubic resize of the shorter edge, center crop, normalisation.

    `config` is a checkpoint's preprocessor_config.json. Equal to transformers' PIL-based processor, which puts
    transparent images on white. ValueError names the key of an unsupported value.
    """
    c = read_config("CLIPImageProcessor", config, PREPROCESSING, PREPROCESSING_BUILT)
    edge = c["size"] if isinstance(c["size"], int) else c["size"].get("shortest_edge")
    if edge is None:
        raise ValueError(f"CLIPImageProcessor config: size={c['size']!r} is not supported; accepted: shortest_edge")
    crop = c["crop_size"]
    height, width = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
    return torch.stack([_preprocess_one(image, edge, height, width, c) for image in images])


def _preprocess_one(image: Image.Image, edge: int, height: int, width: int, c: dict[str, Any]) -> Tensor:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    w, h = image.size
    size = (edge, int(edge * h / w)) if w <= h else (int(edge * w / h), edge)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32) / 255
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    if top < 0 or left < 0:
        raise ValueError(f"CLIP preprocessing: crop {height}x{width} is larger than the resized image {size}")
    pixels = pixels[top : top + height, left : left + width]
    pixels = (pixels - np.array(c["image_mean"], np.float32)) / np.array(c["image_std"], np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _read_preprocessing(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The image preprocessing of a folder and where it stands, in the order of transformers."""
    path = folder / "processor_config.json"  # what transformers writes since version 5
    config = read_json(path).get("image_processor") if path.exists() else None
    if config is None:
        path = folder / "preprocessor_config.json"
        config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: image_processor is a {type(config).__name__}; accepted: an object")
    return path, config


class CLIP(CLIPTowers):
    """Both towers with their tokenizer and image preprocessing, from a folder that transformers also reads."""

    tokenizer: Tokenizer
    preprocessing: dict[str, Any]

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        **hub: Any,
    ) -> CLIP:
        """Load a CLIPModel folder or hub id (the paper: openai/clip-vit-large-patch14), or one in OpenCLIP's layout.

        None is the bundled one. `hub`: token, cache_dir, local_files_only, see `resolve`.
        """
        patterns, hub = [*FILES, *weights_patterns("", WEIGHTS[1])], {"revision": revision} | hub
        try:
            folder = EMBEDDED / "clip" if source is None else resolve(source, patterns, accepted=ACCEPTED, **hub)
        except InputError as error:
            raise InputError(f"CLIP {error}") from error  # its name may be a default that nobody typed
        if folder.is_file():
            raise InputError(f"{source}: a file; {ACCEPTED}")
        if (folder / OPENCLIP[0]).exists() and not (folder / "config.json").exists():
            folder = resolve(source, [OPENCLIP[1]], **hub)  # not fetched before it is known
            clip, path = cls._from_openclip(folder, device=device, dtype=dtype), folder / OPENCLIP[0]
        else:
            clip = load_network(cls, folder, WEIGHTS[1], device=device, dtype=dtype)
            path, clip.preprocessing = _read_preprocessing(folder)
        clip.tokenizer = Tokenizer.from_pretrained(folder)
        try:
            size = clip.preprocess([Image.new("RGB", (8, 8))]).shape[2:]
            if size != (clip.image_size, clip.image_size):
                raise ValueError(f"crop_size is {tuple(size)}; accepted with config.json: {clip.image_size}")
        except MALFORMED as error:
            raise InputError(f"{path}: {first_line(error)}") from error
        return clip

    @classmethod
    def _from_openclip(cls, folder: Path, **options: Any) -> CLIP:
        path, weights_path = (folder / name for name in OPENCLIP)
        weights = read_weights(weights_path)
        try:
            config, weights, preprocessing = open_clip(read_json(path), weights)
        except InputError:
            raise
        except MALFORMED as error:
            raise InputError(f"{path}: {first_line(error)}") from error
        clip = build_network(cls, config, weights, path, weights_path, **options)
        clip.preprocessing = preprocessing
        return clip

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        folder = Path(folder)
        save_network(self, folder, "model", dtype)
        self.tokenizer.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(self.preprocessing, indent=2) + "\n")
        (folder / "processor_config.json").unlink(missing_ok=True)  # of a CLIP that was here before: read first

    @property
    def width(self) -> int:
        """Width E of the embeddings."""
        return self.visual_projection.out_features

    def preprocess(self, images: list[Image.Image]) -> Tensor:
        """Pixels (B,3,S,S) of images of any size, see `preprocess`."""
        return preprocess(images, self.preprocessing)
