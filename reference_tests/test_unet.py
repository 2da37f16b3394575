"""The UNet of both Stable Diffusion families: values and gradients of the reference, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparisons import SMALL_UNET, check_unet, golden, names

from minialign.models.unet import UNet


@pytest.mark.parametrize("name", names("unet"))
def test_golden(name):
    check_unet(*golden("unet", name))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("act_fn", "gelu"),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("center_input_sample", True),
        ("flip_sin_to_cos", False),
        ("freq_shift", 1),
        ("downsample_padding", 0),
        ("mid_block_scale_factor", 2),
        ("dual_cross_attention", True),
        ("only_cross_attention", [True, False]),
        ("resnet_time_scale_shift", "scale_shift"),
        ("resnet_skip_time_act", True),
        ("resnet_out_scale_factor", 1.4),
        ("time_embedding_type", "fourier"),
        ("conv_in_kernel", 1),
        ("conv_out_kernel", 5),
        ("attention_type", "gated"),
        ("class_embed_type", "timestep"),
        ("num_class_embeds", 10),
        ("addition_embed_type", "text"),
        ("addition_embed_type", "text_time"),  # without its widths
        ("transformer_layers_per_block", [[1], [1, "1"]]),
        ("reverse_transformer_layers_per_block", [[1], 1]),
        ("encoder_hid_dim", 32),
        ("time_cond_proj_dim", 256),
        ("time_embedding_dim", 5),
        ("num_attention_heads", 2),
        ("cross_attention_norm", "layer_norm"),
        ("cross_attention_dim", [6, 8]),
        ("down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
        ("up_block_types", ["UpBlock2D", "ResnetUpsampleBlock2D"]),
    ],
)
def test_refuses_what_is_not_built(key, value):
    with pytest.raises(ValueError, match=rf"UNet2DConditionModel config: {key}\b.*accepted: "):
        UNet(SMALL_UNET | {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("down_block_types", ["DownBlock2D"]),
        ("up_block_types", ["UpBlock2D"] * 3),
        ("layers_per_block", [1]),
        ("attention_head_dim", [2, 2, 2]),
        ("transformer_layers_per_block", [1, 1, 1]),
    ],
)
def test_refuses_a_list_of_another_length(key, value):
    with pytest.raises(ValueError, match=f"{key} has {len(value)} entries for 2 levels"):
        UNet(SMALL_UNET | {key: value})


def test_refuses_a_second_conditioning():
    with pytest.raises(ValueError, match="added"):
        UNet(SMALL_UNET)(torch.zeros(1, 4, 4, 4), torch.zeros(1), torch.zeros(1, 3, 6), added=torch.zeros(1))


def test_ignores_private_and_disabled_keys():
    off = {"_class_name": "UNet2DConditionModel", "class_embed_type": None, "class_embeddings_concat": False}
    assert UNet(SMALL_UNET | off).state_dict().keys() == UNet(SMALL_UNET).state_dict().keys()


@pytest.mark.parametrize(("upcast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_upcast_attention_is_computed_in_float32(upcast, dtype, monkeypatch):
    seen, attend = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: seen.append(qkv[0].dtype) or attend(*qkv))
    unet = UNet(SMALL_UNET | {"upcast_attention": upcast}).bfloat16()
    latents, context = torch.randn(1, 4, 4, 4).bfloat16(), torch.randn(1, 3, 6).bfloat16()
    assert unet(latents, torch.zeros(1), context).dtype == torch.bfloat16
    assert set(seen) == {dtype}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("decay", 0.9999),  # a moving average's, as diffusers' trainers write it into the UNet's config
        ("torch_dtype", "float16"),
        ("model_type", "unet"),
        ("notes", ["of", "one's", "own"]),
        ("dropout", 0.1),
        ("only_cross_attention", [False, False]),  # one a level
        ("cross_attention_dim", [6, 6]),
        ("mid_block_scale_factor", [1.0]),
        ("act_fn", "swish"),
    ],
)
def test_settings_that_change_no_network(key, value):
    shapes = {name: tensor.shape for name, tensor in UNet(SMALL_UNET).state_dict().items()}
    unet = UNet(SMALL_UNET | {key: value})
    assert {name: tensor.shape for name, tensor in unet.state_dict().items()} == shapes and unet.config[key] == value
