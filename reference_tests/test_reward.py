"""The reward model: its losses against formulas, its measures against counts, and that it learns and is kept."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from minialign import CLIP, RewardModel
from minialign.models.pretrained import read_weights
from minialign.prompts import SHAPES, all_prompts
from minialign.reward import (
    area_under_curve,
    calibration,
    learn_reward,
    mse_loss,
    prompt_classification_loss,
    train_reward,
)


def test_the_model_is_the_papers_mlp():
    torch.manual_seed(0)
    model = RewardModel({"width": 6})
    image, text = torch.randn(4, 6), torch.randn(4, 6)
    x = torch.cat([image / image.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)], 1) * math.sqrt(6)
    weights = list(model.parameters())
    assert [tuple(w.shape) for w in weights[::2]] == [(1024, 12), (1024, 1024), (1, 1024)]
    for w, b in zip(weights[::2], weights[1::2]):
        x = x @ w.T + b
        x = x.relu() if len(w) > 1 else x
    reward = model(image, text)
    torch.testing.assert_close(reward, 1 / (1 + torch.exp(-x[:, 0])))
    assert reward.shape == (4,) and (reward >= 0).all() and (reward <= 1).all()


def test_losses_equal_their_formulas():
    g = torch.Generator().manual_seed(0)
    rewards, label = torch.rand(5, 4, generator=g), torch.tensor([1.0, 0, 1, 0, 1])
    expected = sum((float(y) - float(r)) ** 2 for y, r in zip(label, rewards[:, 0])) / 5
    assert float(mse_loss(rewards[:, 0], label)) == pytest.approx(expected, rel=1e-6)
    for temperature in (0.1, 2.0):
        entropies = []
        for row, y in zip(rewards.double(), label):
            if y == 1:
                powers = [math.exp(float(r) / temperature) for r in row]
                entropies.append(-math.log(powers[0] / sum(powers)))
        value = prompt_classification_loss(rewards, label, temperature)
        assert float(value) == pytest.approx(sum(entropies) / 3, rel=1e-5)
    assert float(prompt_classification_loss(rewards, torch.zeros(5), 1.0)) == 0


def test_area_under_curve_counts_pairs():
    score, label = torch.tensor([0.9, 0.5, 0.5, 0.1, 0.7]), torch.tensor([1.0, 1, 0, 0, 0])
    pairs = [(g > b) + 0.5 * (g == b) for g in (0.9, 0.5) for b in (0.5, 0.1, 0.7)]
    assert area_under_curve(score, label) == pytest.approx(sum(pairs) / 6)
    assert area_under_curve(score, torch.ones(5)) is None


def test_calibration_bins_hold_every_pair():
    reward, label = torch.tensor([0.02, 0.04, 0.55, 1.0]), torch.tensor([0.0, 1.0, 1.0, 1.0])
    bins = calibration(reward, label)
    assert [b["count"] for b in bins] == [2, 1, 1]
    assert bins[0]["predicted"] == pytest.approx(0.03) and bins[0]["observed"] == 0.5 and bins[-1]["observed"] == 1


def test_training_finds_a_learnable_rule_and_the_folder_keeps_it(tmp_path):
    g = torch.Generator().manual_seed(0)
    kinds = torch.eye(8)
    image, text = torch.randint(8, (400,), generator=g), torch.randint(8, (400,), generator=g)
    text = torch.where(torch.rand(400, generator=g) < 0.5, image, text)
    label = (image == text).float()
    contrast = torch.stack([torch.stack([kinds[(t + k) % 8] for k in (1, 3)]) for t in text.tolist()])
    logged = []
    model = train_reward(
        kinds[image], kinds[text], contrast, label, {"width": 8, "hidden": 64}, steps=300, log=logged.append
    )
    assert ((model(kinds[image], kinds[text]) > 0.5) == (label > 0.5)).float().mean() > 0.97
    assert logged[-1]["loss"] < logged[0]["loss"]
    model.save_pretrained(tmp_path / "reward")
    again = RewardModel.from_pretrained(tmp_path / "reward")
    assert torch.equal(again(kinds[image], kinds[text]), model(kinds[image], kinds[text]))
    assert again.config == model.config


def test_held_out_labels_are_not_learned(tmp_path):
    """Labels by the toss of a coin: those that were learned are known by heart, held-out ones not at all."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(160)]
    prompts = [prompt.text for prompt in all_prompts(SHAPES)[-160:]]
    labels = {i: float(rng.random() < 0.5) for i in range(20, 160)}
    settings = {"hidden": 256, "clip": None, "reward_steps": 600, "temperature": 2.0, "seed": 0, "weighting": "reward"}
    clip = CLIP.from_pretrained()

    def other(text, number, rng):
        return [prompts[rng.randrange(160)] for _ in range(number)]

    learn_reward(other, clip, pictures, prompts, labels, settings, tmp_path, lambda row: None)
    held_out = json.loads((tmp_path / "reward" / "held_out.json").read_text())
    assert held_out["labels"] == 140 and held_out["held_out"] == 21 and 0.2 < held_out["auc"] < 0.8
    score = read_weights(tmp_path / "cache" / "reward.safetensors")["reward"]
    assert score.shape == (160,)
    known = torch.tensor([labels[i] for i in labels])
    assert area_under_curve(score[20:], known) > 0.85  # in the order of the images
    torch.testing.assert_close(score, RewardModel.from_pretrained(tmp_path / "reward").score(pictures, prompts))


def test_score_takes_images_and_prompts():
    model = RewardModel({"width": 64, "hidden": 16, "clip": None})
    score = model.score([Image.new("RGB", (80, 64), c) for c in ("red", "blue")], ["a red circle", "a blue star"])
    assert score.shape == (2,) and "clip" not in "".join(model.state_dict())
