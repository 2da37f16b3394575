"""The original layout of Stable Diffusion: one file with all networks, under the names of CompVis' latent-diffusion.

`parts` renames its keys to diffusers' and transformers' by the rules below, and reads the configs off the shapes, since
such a file carries none. Stable Diffusion 1.x, 2.x and XL base.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from .clip import TextEncoder

Weights = dict[str, Tensor]
Part = tuple[dict[str, Any], Weights]  # config and weights

UNET, VAE = "model.diffusion_model.", "first_stage_model."
# where the text towers are, in transformers' names or in OpenCLIP's: 1.x; 2.x; both of XL
CLIP_TOWER, OPENCLIP_TOWER = "cond_stage_model.transformer.", "cond_stage_model.model."
XL_TOWERS = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."

# Rules apply in order to a key without its prefix; those of blocks that are numbered through are in `_unet`.
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
OPENCLIP_RULES = [
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding", "text_model.embeddings.token_embedding"),
    (r"^ln_final", "text_model.final_layer_norm"),
    (r"^transformer\.resblocks", "text_model.encoder.layers"),
    (r"\.ln_([12])", r".layer_norm\1"),
    (r"\.mlp\.c_fc", ".mlp.fc1"),
    (r"\.mlp\.c_proj", ".mlp.fc2"),
    (r"\.attn\.out_proj", ".self_attn.out_proj"),
]


def is_original(weights: Weights) -> bool:
    return UNET + "input_blocks.0.0.weight" in weights


def parts(weights: Weights, prediction_type: str | None = None) -> dict[str, Part]:
    """Config and weights of "unet", "vae", "text_encoder", for XL "text_encoder_2", and "scheduler" (no weights).

    The file does not say what the network predicts: v is taken for 2.x, whose 768 pixel checkpoints predict it, and for
    XL with the key "v_pred", noise for all others. That is wrong for 2.x base: `prediction_type` says otherwise.
    LookupError or ValueError for a file of another kind.
    """
    if "edm_mean" in weights:
        raise ValueError("the noise of playground-v2.5 is not built")
    found = {"unet": _unet(_under(weights, UNET)), "vae": _vae(_under(weights, VAE))}
    prediction, config = "epsilon", found["unet"][0]
    if any(key.startswith(XL_TOWERS[1]) for key in weights):
        found["text_encoder"] = _clip(_under(weights, XL_TOWERS[0]))
        found["text_encoder_2"] = _openclip(_under(weights, XL_TOWERS[1]), whole=True)
        found["vae"][0].update(scaling_factor=0.13025, force_upcast=True)
        config["sample_size"] = 128
        prediction = "v_prediction" if "v_pred" in weights else "epsilon"
    elif any(key.startswith(OPENCLIP_TOWER) for key in weights):
        found["text_encoder"] = _openclip(_under(weights, OPENCLIP_TOWER), whole=False)
        prediction = prediction_type or "v_prediction"
        config |= {"sample_size": 96 if prediction == "v_prediction" else 64, "upcast_attention": True}
    else:
        found["text_encoder"] = _clip(_under(weights, CLIP_TOWER))
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    schedule |= {"set_alpha_to_one": False, "clip_sample": False, "prediction_type": prediction_type or prediction}
    if "ztsnr" in weights:
        schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    found["scheduler"] = ({"_class_name": "DDIMScheduler", "num_train_timesteps": 1000} | schedule, {})
    return found


def _under(weights: Weights, prefix: str) -> Weights:
    found = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
    if not found:
        raise LookupError(f"no weights under {prefix!r}")
    return found


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


def _unet(weights: Weights) -> Part:
    """Blocks are numbered through: the first convolution, then each level's layers and its change of resolution."""
    down = {int(key.split(".")[1]) for key in weights if key.startswith("input_blocks.") and key.endswith("op.weight")}
    layers, levels = min(down) - 1, len(down) + 1
    if not 0 < layers * levels <= len(weights):
        raise LookupError(f"{layers} layers in each of {levels} levels")
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
    table = [(f"^{re.escape(old)}\\.", new + ".") for old, new in sorted(names.items(), key=lambda pair: -len(pair[0]))]
    renamed = _renamed(weights, table + UNET_RULES)
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


def _vae(weights: Weights) -> Part:
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


def _clip(weights: Weights) -> Part:
    weights = {TextEncoder.current_key(key): tensor for key, tensor in weights.items()}
    return _text_config(weights, "quick_gelu"), weights


def _openclip(weights: Weights, whole: bool) -> Part:
    """`whole` with the last layer and the projection; 2.x reads the layer before, and its 24th is not kept."""
    renamed = {}
    if "text_projection" in weights:  # OpenCLIP multiplies from the other side; diffusers' exports do not
        weights = weights | {"text_projection.weight": weights["text_projection"].T}
    for key, tensor in _renamed(weights, OPENCLIP_RULES).items():
        if match := re.search(r"\.attn\.in_proj_(weight|bias)$", key):
            for name, part in zip("qkv", tensor.chunk(3)):
                renamed[f"{key[: match.start()]}.self_attn.{name}_proj.{match[1]}"] = part
        elif key not in ("logit_scale", "text_projection"):
            renamed[key] = tensor
    config = {"projection_dim": renamed["text_projection.weight"].shape[0]} if whole else {}
    if not whole:
        unused = "text_model.encoder.layers.23.", "text_projection."
        renamed = {key: tensor for key, tensor in renamed.items() if not key.startswith(unused)}
    return _text_config(renamed, "gelu") | config, renamed


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
