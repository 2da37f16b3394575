"""The toy data set: drawings, the simulated annotator against the truth, and the checkpoint's parts."""

import random
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from minialign import CLIP, Pipeline
from minialign.models.pretrained import EMBEDDED
from minialign.prompts import ATTRIBUTES, CATEGORIES, SHAPES, Prompt, all_prompts
from minialign.shapes.annotator import annotate, read, shape_numbers
from minialign.shapes.pretrain import Captions, make_tokenizer
from minialign.shapes.scenes import BACKGROUNDS, SIZE, Scene, draw, sample_scene

HELD_OUT_SEED = 987_654  # never used to calibrate the annotator or to train


@cache
def held_out(number: int = 400) -> tuple[list[Scene], list[Image.Image]]:
    rng = random.Random(HELD_OUT_SEED)
    scenes = [sample_scene(None, rng) for _ in range(number)]
    return scenes, [draw(scene, rng) for scene in scenes]


def test_drawings_are_what_the_scene_says():
    scenes, drawings = held_out()
    for scene, drawing in zip(scenes[:40], drawings):
        pixels = np.asarray(drawing, dtype=float)
        assert drawing.size == (SIZE, SIZE)
        frame = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert np.ptp(frame, axis=0).max() == 0  # objects leave the frame free
        assert np.abs(frame[0] - BACKGROUNDS[scene.background]).max() <= 20
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 3  # edges are anti-aliased
    again = random.Random(HELD_OUT_SEED)
    assert [sample_scene(None, again) for _ in range(400)] == scenes


def test_scenes_show_their_prompts():
    rng = random.Random(0)
    for prompt in all_prompts(SHAPES):
        scene = sample_scene(prompt, rng)
        assert scene.shows(prompt)
        assert scene.prompt(prompt.category) == prompt
    scene = Scene(2, "red", "star", "at night")
    assert scene.shows(Prompt("count", "star", count="two")) and not scene.shows(Prompt("count", "star", count="one"))
    assert not scene.shows(Prompt("color", "star", color="red"))  # "a red star" asks for one
    with pytest.raises(ValueError, match="needs a scene of one object"):
        scene.prompt("color")


def judged_right(pictures: list[Image.Image], scenes: list[Scene]) -> float:
    """How often the label is right, on true and on wrong prompts of all categories in equal parts."""
    rng = random.Random(1)
    right = []
    for picture, scene in zip(pictures, scenes):
        fitting = CATEGORIES if scene.count == 1 else ("count", "combination")
        category = rng.choice(fitting)
        wrong = rng.choice([p for p in all_prompts(SHAPES) if p.category == category and not scene.shows(p)])
        right += [v == t for v, t in zip(annotate([picture] * 2, [scene.prompt(category), wrong]), ["good", "bad"])]
    return sum(right) / len(right)


def test_the_annotator_is_right_on_clean_drawings():
    scenes, drawings = held_out()
    assert judged_right(drawings, scenes) >= 0.98
    assert sum(read(drawing) == scene for drawing, scene in zip(drawings, scenes)) / len(scenes) >= 0.98


def test_the_annotator_is_right_on_reconstructions():
    scenes, drawings = held_out()
    pipe = Pipeline.from_pretrained()
    mean, _ = pipe.encode_images(drawings)
    seen = [image for part in mean.split(50) for image in pipe.decode(part)]
    assert judged_right(seen, scenes) >= 0.98
    assert sum(read(image) == scene for image, scene in zip(seen, scenes)) / len(scenes) >= 0.98


def test_a_color_off_the_palette_matters_where_a_color_is_asked_for():
    orange = draw(Scene(1, "red", "star", "at night"), random.Random(0)).convert("RGB")
    pixels = np.asarray(orange).copy()
    pixels[pixels[..., 0] > 150] = (250, 130, 30)
    asked = [Prompt("color", "star", color="red"), Prompt("count", "star", count="one")]
    assert annotate([Image.fromarray(pixels)] * 2, asked) == ["bad", "good"]


def test_the_annotator_skips_what_is_not_a_drawing():
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    empty = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS["on the grass"])
    assert annotate([Image.fromarray(noise), empty], [Prompt("count", "star", count="one")] * 2) == ["skip", "skip"]


def test_shape_numbers_do_not_change_with_place_and_size():
    y, x = np.mgrid[:90, :90]
    disc = ((x - 30) ** 2 + (y - 30) ** 2 <= 20**2).astype(float)
    moved = ((x - 50) ** 2 + (y - 45) ** 2 <= 35**2).astype(float)
    np.testing.assert_allclose(shape_numbers(disc), shape_numbers(moved), atol=0.02)
    np.testing.assert_allclose(shape_numbers(disc)[3], 1, atol=0.01)
    square = ((abs(x - 40) <= 20) & (abs(y - 40) <= 20)).astype(float)
    # of a square of side 2a: sum |z|^2 / area = 2a^2 / 3, so area^2 / (2 pi sum |z|^2) = 3 / pi
    np.testing.assert_allclose(shape_numbers(square)[3], 3 / np.pi, atol=0.01)


def test_the_embedded_checkpoint_is_small_and_whole():
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()) <= 16 << 20
    pipe, clip = Pipeline.from_pretrained(), CLIP.from_pretrained()
    ids = pipe.tokenizer(["two red circles on the sand", ""])
    assert ids.shape == (2, 77) and torch.equal(ids, clip.tokenizer(["two red circles on the sand", ""]))
    assert torch.equal(make_tokenizer()(["a star"]), pipe.tokenizer(["a star"]))
    for (name, a), b in zip(pipe.text_encoder.text_model.named_parameters(), clip.text_model.parameters()):
        assert torch.equal(a, b), name
    assert pipe.image_size == (SIZE, SIZE)


def test_clip_tells_captions_apart():
    """Of all 256 combinations, the likeliest caption names the true count, color and background nine times in ten."""
    scenes, drawings = held_out()
    clip = CLIP.from_pretrained()
    prompts = [prompt for prompt in all_prompts(SHAPES) if prompt.category == "combination"]
    with torch.no_grad():
        images = clip.encode_image(clip.preprocess(drawings))
        texts = clip.encode_text(clip.tokenizer([prompt.text for prompt in prompts]))
    best = (torch.nn.functional.normalize(images, dim=1) @ torch.nn.functional.normalize(texts, dim=1).T).argmax(1)
    said = [sample_scene(prompts[i], random.Random(0)) for i in best.tolist()]
    for attribute in ("count", "color", "background"):
        right = [getattr(a, attribute) == getattr(b, attribute) for a, b in zip(said, scenes)]
        assert sum(right) / len(right) >= 0.9, attribute


def test_captions_are_noisy_as_asked():
    scenes, _ = held_out()
    captions = Captions(scenes, dict.fromkeys(ATTRIBUTES, 0.3), seed=0)
    rows = captions(torch.arange(400), step=0)
    assert torch.equal(rows, captions(torch.arange(400), step=0))
    true = [scene.shows(captions.prompts[row]) for scene, row in zip(scenes, rows.tolist())]
    assert 0.25 < sum(true) / 400 < 0.55  # 0.7^2 of two words, 0.7^4 of four
    captions.noise = {}
    assert all(s.shows(captions.prompts[row]) for s, row in zip(scenes, captions(torch.arange(400), 0).tolist()))
