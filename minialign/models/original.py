"""The original layout of Stable Diffusion: one file with all networks, under the names of CompVis' latent-diffusion.

`components` renames its keys to diffusers' and transformers' by the rules below, and reads the configs off the shapes,
since such a file carries none. Stable Diffusion 1.x, 2.x and XL base. `open_clip` does the same for OpenCLIP's own
files.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from .blocks import OFF, read_config

Weights = dict[str, Tensor]
Component = tuple[dict[str, Any], Weights]  # config and weights

UNET, VAE = "model.diffusion_model.", "first_stage_model."
VAE_PARTS = "encoder.", "decoder.", "quant_conv.", "post_quant_conv."
# where the text towers are, in transformers' names or in OpenCLIP's: 1.x; 2.x; both of XL
CLIP_TOWER, OPENCLIP_TOWER = "cond_stage_model.transformer.", "cond_stage_model.model."
XL_TOWERS = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
XL_VAE = {"scaling_factor": 0.13025, "force_upcast": True}  # what the shapes of XL's autoencoder do not tell

# Rules apply in order to a key without its prefix; `unet_rules` has those of blocks that are numbered through.
UNET_RULES = [
    (r"^time_embed\.0", "time_embedding.linear_1"),
    (r"^time_embed\.2", "time_embedding.linear_2"),
    (r"^label_emb\.0\.0", "add_embedding.linear_1"),
    (r"^label_emb\.0\.2", "add_embedding.linear_2"),
    (r"^input_blocks\.0\.0", "conv_in"),
    (r"^middle_block\.0", "mid_block.resnets.0"),
    (r"^middle_block\.1", "mid_block.attentions.0"),
    (r"^middle_block\.2", "mid_block.resnets.1"),
    (r"^out\.0", "conv_norm_out"),
    (r"^out\.2", "conv_out"),
    (r"in_layers\.0", "norm1"),
    (r"in_layers\.2", "conv1"),
    (r"emb_layers\.1", "time_emb_proj"),
    (r"out_layers\.0", "norm2"),
    (r"out_layers\.3", "conv2"),
    (r"skip_connection", "conv_shortcut"),
]
VAE_RULES = [
    (r"^encoder\.down\.(\d+)\.block", r"encoder.down_blocks.\1.resnets"),
    (r"^encoder\.down\.(\d+)\.downsample", r"encoder.down_blocks.\1.downsamplers.0"),
    (r"^decoder\.up\.(\d+)\.block", r"decoder.up_blocks.\1.resnets"),  # counted from the other end, see `_vae`
    (r"^decoder\.up\.(\d+)\.upsample", r"decoder.up_blocks.\1.upsamplers.0"),
    (r"mid\.block_1", "mid_block.resnets.0"),
    (r"mid\.block_2", "mid_block.resnets.1"),
    (r"mid\.attn_1\.norm", "mid_block.attentions.0.group_norm"),
    (r"mid\.attn_1\.([qkv])\.", r"mid_block.attentions.0.to_\1."),
    (r"mid\.attn_1\.proj_out", "mid_block.attentions.0.to_out.0"),
    (r"nin_shortcut", "conv_shortcut"),
    (r"norm_out", "conv_norm_out"),
]
CLIP_RULES = [(r"^(?!text_model\.|vision_model\.|visual_projection\.|text_projection\.|logit_scale)", "text_model.")]
OPENCLIP_RULES = [
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1", "vision_model.embeddings.patch_embedding"),
    (r"^visual\.ln_pre", "vision_model.pre_layrnorm"),
    (r"^visual\.ln_post", "vision_model.post_layernorm"),
    (r"^visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding", "text_model.embeddings.token_embedding"),
    (r"^ln_final", "text_model.final_layer_norm"),
    (r"^transformer\.resblocks", "text_model.encoder.layers"),
    (r"\.ln_([12])", r".layer_norm\1"),
    (r"\.mlp\.c_fc", ".mlp.fc1"),
    (r"\.mlp\.c_proj", ".mlp.fc2"),
    (r"\.attn\.out_proj", ".self_attn.out_proj"),
]

# what is read of open_clip_config.json, and what is built of the rest, see `read_config`
OPENCLIP_TEXT = {"width": 512, "layers": 12, "heads": 8, "mlp_ratio": 4.0, "context_length": 77, "vocab_size": 49408}
OPENCLIP_VISION = {"width": 768, "layers": 12, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
LAYERS_BUILT: dict[str, tuple] = {
    "ls_init_value": OFF,
    "final_ln_after_pool": OFF,
    "act_kwargs": OFF,
    "norm_kwargs": OFF,
}
TEXT_BUILT = LAYERS_BUILT | {"pool_type": ("argmax",), "proj_type": ("linear",), "proj_bias": OFF}
TEXT_BUILT |= {"hf_model_name": OFF, "embed_cls": OFF, "no_causal_mask": OFF}
VISION_BUILT = LAYERS_BUILT | {"pool_type": ("tok",), "pos_embed_type": ("learnable",), "global_average_pool": OFF}
VISION_BUILT |= {"timm_model_name": OFF, "attentional_pool": OFF, "no_ln_pre": OFF}
MODEL_BUILT: dict[str, tuple] = {"custom_text": OFF, "multimodal_cfg": OFF, "init_logit_bias": OFF}
PREPROCESS_BUILT = {"mode": ("RGB",), "interpolation": ("bicubic", None), "resize_mode": ("shortest", None)}


def is_original(weights: Weights) -> bool:
    return UNET + "input_blocks.0.0.weight" in weights


def components(weights: Weights, prediction_type: str | None = None) -> dict[str, Component]:
    """Config and weights of "unet", "vae", "text_encoder", for XL "text_encoder_2", and "scheduler" (no weights).

    The file does not say what the network predicts: v is taken for 2.x, whose 768 pixel checkpoints predict it, and for
    XL with the key "v_pred", noise for all others. That is wrong for 2.x base: `prediction_type` says otherwise.
    There is no "vae" where the file lacks its autoencoder. LookupError or ValueError for a file of another kind.
    """
    if "edm_mean" in weights:
        raise ValueError("the noise of playground-v2.5 is not supported")
    result = {"unet": _unet(_under(weights, UNET))}
    if any(key.startswith(VAE) for key in weights):
        result["vae"] = _vae(_under(weights, VAE))
    prediction, config = "epsilon", result["unet"][0]
    if any(key.startswith(XL_TOWERS[1]) for key in weights):
        result["text_encoder"] = _clip(_under(weights, XL_TOWERS[0]))
        result["text_encoder_2"] = _openclip(_under(weights, XL_TOWERS[1]), xl=True)
        if "vae" in result:
            result["vae"][0].update(XL_VAE)
        config["sample_size"] = 128
        prediction = "v_prediction" if "v_pred" in weights else "epsilon"
    elif any(key.startswith(OPENCLIP_TOWER) for key in weights):
        result["text_encoder"] = _openclip(_under(weights, OPENCLIP_TOWER), xl=False)
        prediction = prediction_type or "v_prediction"
        config |= {"sample_size": 96 if prediction == "v_prediction" else 64, "upcast_attention": True}
    else:
        result["text_encoder"] = _clip(_under(weights, CLIP_TOWER))
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    schedule |= {"set_alpha_to_one": False, "clip_sample": False, "prediction_type": prediction_type or prediction}
    if "ztsnr" in weights:
        schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    result["scheduler"] = ({"_class_name": "DDIMScheduler", "num_train_timesteps": 1000} | schedule, {})
    return result


def vae_component(weights: Weights, xl: bool) -> Component:
    """Config and weights of an autoencoder in a file of its own, whose keys may have the prefix of a full checkpoint.

    Its scale is that of XL's latents or of the others'. LookupError for a file of another kind.
    """
    own = {key.removeprefix(VAE): tensor for key, tensor in weights.items()}
    own = {key: tensor for key, tensor in own.items() if key.startswith(VAE_PARTS)}
    config, own = _vae(own)
    return config | (XL_VAE if xl else {}), own


def _under(weights: Weights, prefix: str) -> Weights:
    own = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
    if not own:
        raise LookupError(f"no weights under {prefix!r}")
    return own


def _renamed(weights: Weights, rules: list[tuple[str, str]]) -> Weights:
    renamed = {}
    for key, tensor in weights.items():
        for pattern, name in rules:
            key = re.sub(pattern, name, key)
        renamed[key] = tensor
    return renamed


def _count(weights: Weights, pattern: str) -> int:
    """How many numbers follow `pattern`, as in blocks.0, blocks.1, ..."""
    return len({match[1] for key in weights if (match := re.match(pattern + r"(\d+)\.", key))})


def unet_rules(layers: int, levels: int) -> list[tuple[str, str]]:
    """All rules of a UNet: its blocks are numbered through, each level's layers and then its change of resolution."""
    names = {}
    for i in range(levels):
        for j in range(layers):
            names[f"input_blocks.{1 + i * (layers + 1) + j}.0"] = f"down_blocks.{i}.resnets.{j}"
            names[f"input_blocks.{1 + i * (layers + 1) + j}.1"] = f"down_blocks.{i}.attentions.{j}"
        names[f"input_blocks.{(i + 1) * (layers + 1)}.0.op"] = f"down_blocks.{i}.downsamplers.0.conv"
        for j in range(layers + 1):
            block = f"output_blocks.{i * (layers + 1) + j}"
            names[f"{block}.0"] = f"up_blocks.{i}.resnets.{j}"
            names[f"{block}.1"] = f"up_blocks.{i}.attentions.{j}"
            for place in "12":  # the enlargement comes after the attention, if there is one
                names[f"{block}.{place}.conv"] = f"up_blocks.{i}.upsamplers.0.conv"
    # the longest first: 1.conv is not a part of the attention 1
    longest = sorted(names.items(), key=lambda pair: -len(pair[0]))
    return [(f"^{re.escape(old)}\\.", new + ".") for old, new in longest] + UNET_RULES


def _unet(weights: Weights) -> Component:
    down = {int(key.split(".")[1]) for key in weights if key.startswith("input_blocks.") and key.endswith("op.weight")}
    layers, levels = min(down) - 1, len(down) + 1
    if not 0 < layers * levels <= len(weights):
        raise LookupError(f"{layers} layers in each of {levels} levels")
    renamed = _renamed(weights, unet_rules(layers, levels))
    widths = [renamed[f"down_blocks.{i}.resnets.0.conv2.weight"].shape[0] for i in range(levels)]
    blocks = [_count(renamed, rf"down_blocks\.{i}\.attentions\.0\.transformer_blocks\.") for i in range(levels)]
    middle = _count(renamed, r"mid_block\.attentions\.0\.transformer_blocks\.")
    attention = next(i for i in range(levels) if blocks[i])
    first = f"down_blocks.{attention}.attentions.0."
    linear = renamed[first + "proj_in.weight"].ndim == 2
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": renamed["conv_in.weight"].shape[1],
        "out_channels": renamed["conv_out.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if n else "DownBlock2D" for n in blocks],
        "up_block_types": ["CrossAttnUpBlock2D" if n else "UpBlock2D" for n in blocks[::-1]],
        # the last level's number is also the middle block's
        "transformer_layers_per_block": [*(n or 1 for n in blocks[:-1]), middle],
        "cross_attention_dim": renamed[first + "transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "use_linear_projection": linear,
        "attention_head_dim": [max(1, width // 64) for width in widths] if linear else 8,  # heads, in 2.x of 64
        "sample_size": 64,
    }
    if "add_embedding.linear_1.weight" in renamed:
        added = renamed["add_embedding.linear_1.weight"].shape[1]
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        config["projection_class_embeddings_input_dim"] = added
    return config, renamed


def _vae(weights: Weights) -> Component:
    renamed = _renamed(weights, VAE_RULES)
    levels = _count(renamed, r"encoder\.down_blocks\.")
    reverse = {}
    for key, tensor in renamed.items():
        if match := re.match(r"decoder\.up_blocks\.(\d+)\.", key):
            key = f"decoder.up_blocks.{levels - 1 - int(match[1])}." + key[match.end() :]
        reverse[key] = tensor
    config = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [
            renamed[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)
        ],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": _count(renamed, r"encoder\.down_blocks\.0\.resnets\."),
        "latent_channels": renamed["decoder.conv_in.weight"].shape[1],
        "scaling_factor": 0.18215,
    }
    return config, reverse


def _clip(weights: Weights) -> Component:
    weights = _renamed(weights, CLIP_RULES)
    return _text_config(weights, "quick_gelu"), weights


def _openclip(weights: Weights, xl: bool) -> Component:
    """XL's tower has its last layer and a projection; 2.x reads the layer before, and its 24th is not kept."""
    renamed = _openclip_renamed(weights)
    config = {"projection_dim": renamed["text_projection.weight"].shape[0]} if xl else {}
    if not xl:
        renamed = {key: t for key, t in renamed.items() if not key.startswith("text_model.encoder.layers.23.")}
    return _text_config(renamed, "gelu") | config, renamed


def _openclip_renamed(weights: Weights) -> Weights:
    renamed = {}
    for key, tensor in _renamed(weights, OPENCLIP_RULES).items():
        if match := re.search(r"\.attn\.in_proj_(weight|bias)$", key):
            for name, third in zip("qkv", tensor.chunk(3)):
                renamed[f"{key[: match.start()]}.self_attn.{name}_proj.{match[1]}"] = third
        elif key in ("text_projection", "visual.proj"):  # OpenCLIP multiplies from the other side
            renamed["text_projection.weight" if key == "text_projection" else "visual_projection.weight"] = tensor.T
        else:
            renamed[key] = tensor
    return renamed


def open_clip(config: dict[str, Any], weights: Weights) -> tuple[dict[str, Any], Weights, dict[str, Any]]:
    """Config, weights and preprocessing, as transformers has them, of OpenCLIP's open_clip_config.json and weights.

    ValueError names the key of an unsupported value, such as a vision tower from another library.
    """
    model, preprocess = config["model_cfg"], config.get("preprocess_cfg") or {}
    read_config("OpenCLIP model_cfg", model, {}, MODEL_BUILT)
    read_config("OpenCLIP preprocess_cfg", preprocess, {}, PREPROCESS_BUILT)
    text = read_config("OpenCLIP text_cfg", model["text_cfg"], OPENCLIP_TEXT, TEXT_BUILT)
    vision = read_config("OpenCLIP vision_cfg", model["vision_cfg"], OPENCLIP_VISION, VISION_BUILT)

    def tower(c: dict[str, Any], heads: int) -> dict[str, Any]:
        size = {"hidden_size": c["width"], "intermediate_size": int(c["width"] * c["mlp_ratio"])}
        size |= {"num_hidden_layers": c["layers"], "num_attention_heads": heads}
        return size | {"hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu"}

    size = vision["image_size"]
    towers = {
        "model_type": "clip",
        "projection_dim": model["embed_dim"],
        "text_config": tower(text, text["heads"])
        | {"vocab_size": text["vocab_size"], "max_position_embeddings": text["context_length"]}
        | {"eos_token_id": 2},  # pooling at the highest id, which ends the text
        "vision_config": tower(vision, vision["width"] // vision["head_width"])
        | {"image_size": size, "patch_size": vision["patch_size"]},
    }
    preprocessing = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    preprocessing |= {f"image_{key}": preprocess[key] for key in ("mean", "std") if preprocess.get(key)}
    return towers, _openclip_renamed(weights), preprocessing


def _text_config(weights: Weights, activation: str) -> dict[str, Any]:
    tokens = weights["text_model.embeddings.token_embedding.weight"]
    return {
        "model_type": "clip_text_model",
        "vocab_size": tokens.shape[0],
        "hidden_size": tokens.shape[1],
        "intermediate_size": weights["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _count(weights, r"text_model\.encoder\.layers\."),
        "num_attention_heads": max(1, tokens.shape[1] // 64),
        "max_position_embeddings": weights["text_model.embeddings.position_embedding.weight"].shape[0],
        "hidden_act": activation,
        "eos_token_id": 2,  # pooling at the highest id, which ends the text
    }
