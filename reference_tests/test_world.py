"""The toy data set as others see it: its prompts, its pairs, its annotator, and what it draws."""

import numpy as np
import pytest
from PIL import Image

from minialign.feedback import FeedbackStore
from minialign.label.annotated import annotate_images
from minialign.measures import frechet_distance
from minialign.models.clip import CLIP
from minialign.models.reward import embed_images
from minialign.prompts import PAPER, SHAPES, all_prompts, split
from minialign.shapes.annotator import read
from minialign.shapes.scenes import SIZE
from minialign.shapes.world import annotate, drawings, knows, pretraining_pairs, prompts, shown


def test_prompts_for_feedback_for_tests_and_of_pairs_are_apart():
    seen, held_out = prompts(3)
    texts = [[prompt.text for prompt in part] for part in split(SHAPES, 3)]
    others = set(texts[3])
    assert [seen, held_out] == [texts[0], texts[1] + texts[2]]
    assert not any(word in text for word in ("heart", "cross") for text in seen)
    pairs = pretraining_pairs(200, 3)
    assert len(pairs) == 200 and {text for text, _ in pairs} <= others and not others & {*seen, *held_out}
    assert all(image.size == (SIZE, SIZE) for _, image in pairs)
    again = pretraining_pairs(200, 3)
    assert [(text, image.tobytes()) for text, image in pairs] == [(text, image.tobytes()) for text, image in again]
    right = annotate([image for _, image in pairs], [text for text, _ in pairs]).count("good") / 200
    clean = pretraining_pairs(200, 3, clean=True)
    assert [text for text, _ in clean] == [text for text, _ in pairs]  # the same captions, with nothing wrong
    verdicts = annotate([image for _, image in pairs], [text for text, _ in pairs])
    alike = [image.tobytes() == other.tobytes() for (_, image), (_, other) in zip(pairs, clean)]
    assert all(one for one, verdict in zip(alike, verdicts) if verdict == "good") and not all(alike)
    assert annotate([image for _, image in clean], [text for text, _ in clean]).count("good") / 200 > 0.95
    assert 0.15 < right < 0.5  # 0.45 of the counts, 0.6, 0.35, and 0.09 of the combinations


def test_the_world_knows_its_own_prompts_alone():
    texts = [prompt.text for prompt in all_prompts(SHAPES)]
    assert knows(texts) and not knows([*texts, "a cat"]) and not knows([prompt.text for prompt in all_prompts(PAPER)])
    image = drawings(["a red star"], seed=0)[0]
    assert annotate([image, image], ["a red star", "a blue star"]) == ["good", "bad"]
    for call in (lambda: annotate([image], ["a cat"]), lambda: drawings(["a cat"], 0)):
        with pytest.raises(ValueError, match="'a cat' is not a prompt of the toy data set, such as"):
            call()


def test_an_image_that_cannot_be_read_is_labelled_bad(tmp_path):
    star, plain = drawings(["a red star"], seed=0)[0], Image.new("RGB", (SIZE, SIZE), "white")
    store = FeedbackStore(tmp_path)
    for i, image in enumerate((star, star, plain)):
        image.save(tmp_path / f"{i}.png")
    store.add_images([(text, f"{i}.png", i) for i, text in enumerate(["a red star", "a blue star", "a red star"])])
    annotate_images(tmp_path, 3, seed=0)
    assert annotate([plain], ["a red star"]) == ["skip"] and store.labels() == {1: 1.0, 2: 0.0, 3: 0.0}
    store.close()


def test_what_images_show_is_drawn_again_whatever_they_were_made_for():
    texts = prompts(0)[0][:40]
    images = drawings(texts, seed=0)
    again = shown(images, seed=0)
    assert [read(image) for image in again if image] == [read(image) for image in images]
    assert annotate([image for image in again if image], texts) == ["good"] * len(texts)
    assert all(a.tobytes() != b.tobytes() for a, b in zip(images, again) if b)  # in another place and size
    assert [image.tobytes() for image in again if image] == [image.tobytes() for image in shown(images, 0) if image]


def test_what_cannot_be_read_is_not_drawn_and_strange_colors_are_drawn_in_one_of_the_palette(monkeypatch):
    plain = Image.new("RGB", (64, 64), "white")
    circle = drawings(["one red circle in the snow"], seed=0)[0]
    pixels = np.array(circle)
    pixels[pixels[..., 1] < 120] = 20, 150, 20  # green, which is none of the palette's
    mixed = Image.fromarray(pixels)
    found = read(mixed)
    assert found is not None and found.color == "other"
    none, drawn = shown([plain, mixed], seed=0)
    scene = read(drawn) if drawn else None
    assert none is None and scene is not None
    assert (scene.count, scene.object, scene.background) == (1, "circle", "in the snow") and scene.color != "other"


def test_the_distance_to_what_images_show_does_not_rise_where_they_show_something_else_than_was_asked():
    """Good drawings of other prompts: far from drawings of what was asked, as near as any to what they show."""
    texts = prompts(0)[0]
    asked, made = ["a red circle"] * 64, texts[:64]
    images = drawings(made, seed=0)
    features = [
        embed_images(CLIP.from_pretrained(), part)
        for part in (
            images,
            drawings(asked, seed=0),
            [image for image in shown(images, seed=0) if image],
            drawings(made, seed=1),
        )
    ]
    to_asked, to_shown, floor = (frechet_distance(features[0], other) or 0.0 for other in features[1:])
    assert to_shown < 1.2 * floor < 0.2 * to_asked
