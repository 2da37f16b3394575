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
from minialign.shapes.pretrain import LAYOUT, LENGTH, Captions, Muon, make_tokenizer, reconstruction_loss, timesteps
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


def read_right(pictures: list[Image.Image], scenes: list[Scene]) -> dict[str, float]:
    """How often all that a picture shows is read right, by its object."""
    right: dict[str, list[bool]] = {thing: [] for thing in SHAPES.objects}
    for picture, scene in zip(pictures, scenes):
        right[scene.object].append(read(picture) == scene)
    return {thing: sum(values) / len(values) for thing, values in right.items()}


def test_the_annotator_is_right_on_clean_drawings():
    scenes, drawings = held_out()
    assert judged_right(drawings, scenes) >= 0.98
    assert min(read_right(drawings, scenes).values()) >= 0.98


def test_the_annotator_is_right_on_reconstructions():
    scenes, drawings = held_out()
    pipe = Pipeline.from_pretrained()
    mean, _ = pipe.encode_images(drawings)
    seen = [image for part in mean.split(50) for image in pipe.decode(part)]
    assert judged_right(seen, scenes) >= 0.98
    assert min(read_right(seen, scenes).values()) >= 0.98


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


def test_an_object_that_crosses_the_edge_is_read():
    pixels = np.asarray(Image.new("RGB", (SIZE, SIZE), BACKGROUNDS["on the grass"])).copy()
    pixels[20:34, :14] = 200, 30, 30
    assert read(Image.fromarray(pixels)) == Scene(1, "red", "square", "on the grass")


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
    assert ids.shape == (2, LENGTH) and torch.equal(ids, clip.tokenizer(["two red circles on the sand", ""]))
    assert torch.equal(make_tokenizer()(["a star"]), pipe.tokenizer(["a star"]))
    for (name, a), b in zip(pipe.text_encoder.text_model.named_parameters(), clip.text_model.parameters()):
        assert torch.equal(a, b), name
    assert pipe.image_size == (SIZE, SIZE)


def test_clip_tells_captions_apart():
    """Of all 384 combinations, the likeliest caption names the true word of each attribute nine times in ten."""
    scenes, drawings = held_out()
    clip = CLIP.from_pretrained()
    prompts = [prompt for prompt in all_prompts(SHAPES) if prompt.category == "combination"]
    with torch.no_grad():
        images = clip.encode_image(clip.preprocess(drawings))
        texts = clip.encode_text(clip.tokenizer([prompt.text for prompt in prompts]))
    best = (torch.nn.functional.normalize(images, dim=1) @ torch.nn.functional.normalize(texts, dim=1).T).argmax(1)
    said = [sample_scene(prompts[i], random.Random(0)) for i in best.tolist()]
    for attribute in ATTRIBUTES:
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


def test_muon_takes_the_steps_of_pytorchs_on_matrices_and_of_adamw_on_all_else():
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 8))
    theirs = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 8))
    theirs.load_state_dict(ours.state_dict())
    weights, biases = ([p for p in theirs.parameters() if p.ndim == n] for n in (2, 1))
    steps = [
        torch.optim.Muon(weights, 1e-2, weight_decay=1e-2, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(biases, 1e-2, betas=(0.9, 0.99), weight_decay=1e-2),
    ]
    mine, before = Muon(ours, 1e-2), [p.detach().clone() for p in ours.parameters()]
    for _ in range(3):
        for a, b in zip(ours.parameters(), theirs.parameters()):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in (mine, *steps):
            optimizer.step()
    for old, a, b in zip(before, ours.parameters(), theirs.parameters()):
        assert (a - b).norm() < (0.02 if a.ndim == 2 else 1e-4) * (b - old).norm()  # PyTorch iterates in bfloat16


def test_steps_of_a_convolution_are_orthogonal():
    conv = torch.nn.Conv2d(6, 8, 3, bias=False)
    before = conv.weight.detach().clone()
    optimizer = Muon(torch.nn.ModuleDict({"inner": conv}), 1.0, decay=0.0)
    conv(torch.randn(4, 6, 8, 8)).square().sum().backward()
    optimizer.step()
    change = (before - conv.weight.detach()).flatten(1) / (0.2 * np.sqrt(54))  # (8,54)
    values = torch.linalg.svdvals(change)
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(conv.weight.grad.flatten(1), full_matrices=False)
    assert torch.nn.functional.cosine_similarity(change.flatten(), (u @ v).flatten(), dim=0) > 0.97


def test_muon_leaves_vectors_embeddings_and_first_and_last_convolutions_to_adamw():
    names = ("conv_in", "inner", "conv_out", "time_embedding")
    network = torch.nn.ModuleDict({name: torch.nn.Conv2d(2, 2, 1) for name in names})
    matrices, others = (group["params"] for group in Muon(network, 1.0).param_groups)
    assert [p is network["inner"].weight for p in matrices] == [True] and len(others) == 7


def test_four_steps_of_timesteps_cover_both_distributions():
    g, t, uniform = torch.Generator().manual_seed(0), [], []
    for step in range(400):
        t.append(timesteps(64, step, 6400, g))
        uniform.append((torch.arange(64) + step) % 4 == 0)
    some, rest = (torch.stack(t)[torch.stack(uniform) == kind] for kind in (True, False))
    assert torch.equal((some[:64] // 100).sort().values, torch.arange(64))  # the sampler begins at the last of them
    logit = ((rest + 0.5) / 6400).double().logit()
    assert abs(logit.mean() - LAYOUT[0]) < 0.01 and abs(logit.std() - LAYOUT[1]) < 0.01


def test_the_reconstruction_loss_has_its_three_terms():
    class Identity(torch.nn.Module):
        def decode(self, z):
            return z

    x = torch.rand(2, 3, 4, 4)
    e = torch.rand(2, 3, 4, 4)
    found = reconstruction_loss(Identity(), x, x + e, torch.full_like(x, -100.0), torch.Generator())
    edges = np.abs(np.diff(e.numpy(), axis=2)).mean() + np.abs(np.diff(e.numpy(), axis=3)).mean()
    assert found.item() == pytest.approx((e**2).mean().item() + e.mean().item() + 0.25 * edges, rel=1e-5)
