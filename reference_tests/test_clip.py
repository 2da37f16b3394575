"""CLIP's towers and image preprocessing: values of the reference, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from comparisons import check_clip, check_preprocess, check_projected_text, check_text, golden, names
from safetensors.torch import save_file
from seeded import image

from minialign import CLIP
from minialign.files import InputError
from minialign.models.clip import CLIPTowers, TextEncoder, preprocess
from minialign.models.pretrained import EMBEDDED


@pytest.mark.parametrize("name", names("text"))
def test_text_golden(name):
    check_text(*golden("text", name))


@pytest.mark.parametrize("name", names("projected_text"))
def test_projected_text_golden(name):
    check_projected_text(*golden("projected_text", name))


@pytest.mark.parametrize("name", names("clip"))
def test_golden(name):
    check_clip(*golden("clip", name))


@pytest.mark.parametrize("name", names("preprocess"))
def test_preprocess_golden(name):
    check_preprocess(*golden("preprocess", name))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_resize", False),
        ("do_center_crop", False),
        ("do_rescale", False),
        ("do_normalize", False),
        ("resample", 2),
        ("rescale_factor", 1.0),
        ("size", {"height": 224, "width": 224}),
    ],
)
def test_preprocess_refuses_what_is_not_built(key, value):
    with pytest.raises(ValueError, match=rf"CLIPImageProcessor config: {key}=.*accepted: "):
        preprocess([image(8, 8, "RGB")], {key: value})


def test_preprocess_refuses_a_crop_larger_than_the_image():
    with pytest.raises(ValueError, match="crop 9x8 is larger"):
        preprocess([image(8, 8, "RGB")], {"size": 8, "crop_size": {"height": 9, "width": 8}})


def test_refuses_other_activations():
    with pytest.raises(ValueError, match="CLIPTextModel config: hidden_act='relu'.*accepted: 'quick_gelu', 'gelu'"):
        TextEncoder({"hidden_act": "relu"})
    for tower in ("text", "vision"):
        with pytest.raises(ValueError, match=f"CLIPModel {tower} config: hidden_act='relu'.*supported"):
            CLIPTowers({f"{tower}_config": {"hidden_act": "relu"}})


def test_refuses_another_network_by_its_model_type():
    with pytest.raises(ValueError, match="CLIPModel config: model_type='siglip' is not supported; accepted: 'clip'"):
        CLIPTowers({"model_type": "siglip"})


def test_processor_config_without_image_processor(tmp_path):
    shutil.copytree(EMBEDDED / "clip", tmp_path, dirs_exist_ok=True)
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert CLIP.from_pretrained(tmp_path).preprocessing == CLIP.from_pretrained().preprocessing
    clip = CLIP.from_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"crop_size": 5, "size": 5}}))
    clip.save_pretrained(tmp_path)  # what is saved is what is read again
    assert CLIP.from_pretrained(tmp_path).preprocessing == clip.preprocessing
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": "CLIPImageProcessor"}))
    with pytest.raises(InputError, match="processor_config.json: image_processor is a str; accepted: an object"):
        CLIP.from_pretrained(tmp_path)


def test_sources_that_are_no_clip(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source in ("no/such/folder", str(tmp_path / "nothing")):
        with pytest.raises(InputError, match="^CLIP .*not found; accepted: a folder that transformers writes, or Open"):
            CLIP.from_pretrained(source)
    with pytest.raises(InputError, match="^CLIP someone/nothing: neither a folder nor a hub id that can be fetched"):
        CLIP.from_pretrained("someone/nothing", cache_dir=tmp_path)


# transformers' names of a tower's parts, and OpenCLIP's
LAYER = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
LAYER |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
ENDS = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}


def openclip_folder(folder: Path, **change: dict) -> Path:
    """The bundled CLIP as OpenCLIP would write it, with changes to the parts of its config."""
    clip = CLIP.from_pretrained()
    weights, out = clip.state_dict(), {}
    for tower, to in (("text", ""), ("vision", "visual.")):
        for i in range(clip.config[f"{tower}_config"]["num_hidden_layers"]):
            here, block = f"{tower}_model.encoder.layers.{i}.", f"{to}transformer.resblocks.{i}."
            for kind in ("weight", "bias"):
                qkv = [weights[f"{here}self_attn.{n}_proj.{kind}"] for n in "qkv"]
                out[f"{block}attn.in_proj_{kind}"] = torch.cat(qkv)
                out |= {f"{block}{old}.{kind}": weights[f"{here}{new}.{kind}"] for new, old in LAYER.items()}
    out |= {old: weights[new] for old, new in ENDS.items()}
    out |= {
        "text_projection": weights["text_projection.weight"].T,
        "visual.proj": weights["visual_projection.weight"].T,
    }
    shutil.copytree(
        EMBEDDED / "clip", folder, dirs_exist_ok=True, ignore=lambda *_: ["config.json", "model.safetensors"]
    )
    (folder / "preprocessor_config.json").unlink()
    save_file({key: tensor.contiguous() for key, tensor in out.items()}, folder / "open_clip_model.safetensors")
    text, vision = clip.config["text_config"], clip.config["vision_config"]

    def cfg(tower: dict) -> dict:
        sizes = {"width": tower["hidden_size"], "layers": tower["num_hidden_layers"]}
        return sizes | {"mlp_ratio": tower["intermediate_size"] / tower["hidden_size"]}

    text_cfg = cfg(text) | {"heads": text["num_attention_heads"], "vocab_size": text["vocab_size"]}
    text_cfg |= {"context_length": text["max_position_embeddings"], "hf_tokenizer_name": "kept/out"}
    vision_cfg = cfg(vision) | {"head_width": vision["hidden_size"] // vision["num_attention_heads"]}
    vision_cfg |= {"image_size": vision["image_size"], "patch_size": vision["patch_size"]}
    model = {"embed_dim": clip.width, "quick_gelu": text.get("hidden_act", "quick_gelu") == "quick_gelu"}
    config = {
        "model_cfg": model | {"text_cfg": text_cfg, "vision_cfg": vision_cfg},
        "preprocess_cfg": {key: clip.preprocessing[f"image_{key}"] for key in ("mean", "std")},
    }
    for part, values in change.items():
        {**config, **config["model_cfg"]}[part].update(values)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def test_openclip_s_layout(tmp_path):
    mine, wanted = CLIP.from_pretrained(openclip_folder(tmp_path / "open")), CLIP.from_pretrained()
    pixels = wanted.preprocess([image(50, 40, "RGB"), image(31, 64, "RGBA")])
    assert torch.equal(mine.preprocess([image(50, 40, "RGB"), image(31, 64, "RGBA")]), pixels)
    ids = wanted.tokenizer(["a red star", "two blue circles"])
    assert torch.equal(mine.tokenizer(["a red star", "two blue circles"]), ids)
    for clip in (mine, mine.save_pretrained(tmp_path / "again") or CLIP.from_pretrained(tmp_path / "again")):
        torch.testing.assert_close(clip.encode_image(pixels), wanted.encode_image(pixels))
        torch.testing.assert_close(clip.encode_text(ids), wanted.encode_text(ids))


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        (
            "vision_cfg",
            {"timm_model_name": "vit"},
            "OpenCLIP vision_cfg config: timm_model_name='vit' is not supported",
        ),
        ("vision_cfg", {"pool_type": "avg"}, "OpenCLIP vision_cfg config: pool_type='avg' is not supported"),
        ("text_cfg", {"no_causal_mask": True}, "OpenCLIP text_cfg config: no_causal_mask=True is not supported"),
        ("model_cfg", {"custom_text": True}, "OpenCLIP model_cfg config: custom_text=True is not supported"),
        (
            "preprocess_cfg",
            {"resize_mode": "squash"},
            "OpenCLIP preprocess_cfg config: resize_mode='squash' is not supported",
        ),
        ("text_cfg", {"layers": "many"}, "open_clip_config.json: "),
    ],
)
def test_openclip_s_settings_that_are_not_built(tmp_path, part, value, message):
    with pytest.raises(InputError, match=message) as error:
        CLIP.from_pretrained(openclip_folder(tmp_path, **{part: value}))
    assert "open_clip_config.json: " in str(error.value)
