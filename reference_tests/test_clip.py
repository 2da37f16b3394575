"""CLIP's towers and image preprocessing: values of the reference, and what is refused."""

from __future__ import annotations

import pytest
from comparisons import check_clip, check_preprocess, check_projected_text, check_text, golden, names
from seeded import image

from minialign.models.clip import CLIPTowers, TextEncoder, preprocess


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
    with pytest.raises(ValueError, match=rf"CLIPImageProcessor config: {key}=.*supported: "):
        preprocess([image(8, 8, "RGB")], {key: value})


def test_preprocess_refuses_a_crop_larger_than_the_image():
    with pytest.raises(ValueError, match="crop 9x8 is larger"):
        preprocess([image(8, 8, "RGB")], {"size": 8, "crop_size": {"height": 9, "width": 8}})


def test_refuses_other_activations():
    with pytest.raises(ValueError, match="CLIPTextModel config: hidden_act='relu'.*supported: 'quick_gelu', 'gelu'"):
        TextEncoder({"hidden_act": "relu"})
    for tower in ("text", "vision"):
        with pytest.raises(ValueError, match=f"CLIPModel {tower} config: hidden_act='relu'.*supported"):
            CLIPTowers({f"{tower}_config": {"hidden_act": "relu"}})
