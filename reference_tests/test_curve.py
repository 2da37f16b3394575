"""How many labels are enough: pairs ranked right, splits by prompts, the curve, and the sentence that it ends in."""

import math
import random

import pytest
import torch

from minialign.engine.settings import defaults
from minialign.files import InputError
from minialign.measures import preferred
from minialign.pages.cards import curve_table, twice_as_many
from minialign.reward import curve as module
from minialign.reward import labels
from minialign.reward.curve import learning_curve, mean_interval, split_prompts
from minialign.reward.labels import Labelled, split_feedback

SETTINGS = defaults(bundled=True) | {"hidden": 32, "reward_batch_size": 32, "reward_learning_rate": 3e-3}


def labelled(number: int, noise: float = 0.0, prompts: int = 40, width: int = 48) -> Labelled:
    """Images that are good along a random direction among noise; labels are flipped with probability `noise`."""
    g, rng = torch.Generator().manual_seed(0), random.Random(0)
    texts, direction = torch.randn(prompts, width, generator=g), torch.randn(width, generator=g)
    of = [i % prompts for i in range(number)]
    good = [rng.random() < 0.5 for _ in of]
    sign = torch.tensor([1.0 if y else -1.0 for y in good])
    images = sign[:, None] * direction / direction.norm() + torch.randn(number, width, generator=g)
    columns = torch.tensor([[p, (p + 1) % prompts, (p + 7) % prompts] for p in of])
    labels = {i: float(y != (rng.random() < noise)) for i, y in enumerate(good)}
    known = {i: (p,) for i, p in enumerate(of)}
    return Labelled(images, texts, columns, labels, split_feedback(known, labels, [], 0)[0], known)


def test_pairs_of_one_prompt_are_counted():
    g = torch.Generator().manual_seed(0)
    reward, label = torch.randint(6, (60,), generator=g) / 6, torch.rand(60, generator=g).round()
    prompts = torch.randint(9, (60,), generator=g).tolist()
    right = [
        (reward[i] > reward[j]).double() + 0.5 * (reward[i] == reward[j]).double()
        for i in range(60)
        for j in range(60)
        if prompts[i] == prompts[j] and label[i] > label[j]
    ]
    assert preferred(reward, label, prompts) == pytest.approx(float(sum(right)) / len(right))
    assert preferred(reward, label, range(60)) is None  # one image a prompt


def test_intervals_are_students():
    mean, (low, high) = mean_interval([0.5, 0.6, 0.7])
    half = 4.302653 * 0.1 / math.sqrt(3)  # t of two degrees of freedom
    assert (mean, low, high) == (pytest.approx(0.6), pytest.approx(0.6 - half), pytest.approx(0.6 + half))
    assert mean_interval([0.0, 1.0], 0.0)[1] == [0.0, 1.0]
    assert mean_interval([0.5]) == (0.5, None) and mean_interval([]) == (None, None)


def test_held_out_prompts_are_never_learned_from(monkeypatch):
    data, seen = labelled(160), []
    texts = torch.cat([data.texts, torch.randn(1, data.texts.shape[1])])  # a contrastive prompt that is no image's
    data = data._replace(texts=texts, columns=torch.cat([data.columns, torch.full((160, 1), 40)], dim=1))

    def train(images, texts, pairs, config, **how):
        seen.append(pairs)
        raise InputError("enough")

    monkeypatch.setattr(labels, "train_reward", train)
    learn, judge = split_prompts(data, 3)
    assert sorted(learn + judge) == list(range(160)) and len({data.prompts[i] for i in judge}) == 8
    assert not {data.prompts[i] for i in learn} & {data.prompts[i] for i in judge}
    with pytest.raises(InputError, match="enough"):
        module.measured(data, learn[:80], judge, SETTINGS)
    prompts = set(seen[0].prompts.flatten().tolist()) - {-1}
    assert (seen[0].prompts[:, 3] == 40).all() and (seen[0].prompts[:, 0] >= 0).all()
    assert len(prompts) > 1 and not prompts & {data.prompts[i][0] for i in judge}  # not as contrastive prompts either


def test_more_labels_predict_better_until_they_do_not(monkeypatch):
    for name, value in (("STEPS", 30), ("SPLITS", 3), ("SIZES", 3)):
        monkeypatch.setattr(module, name, value)
    curve = learning_curve(labelled(400), SETTINGS)
    assert curve["labels"] == [80, 160, 320] and curve["splits"] == 3
    auc = curve["auc"]["value"]
    assert auc[-1] > auc[0] + 0.04
    assert all(low <= value <= high for value, (low, high) in zip(auc, curve["auc"]["ci95"]))
    noise = learning_curve(labelled(120, noise=0.5), SETTINGS)  # which no number of labels explains
    assert abs(noise["auc"]["value"][-1] - 0.5) < 0.2
    table = curve_table(curve)
    assert table.count("\n") == 5 and table.splitlines()[3].split()[0] == "320"


def test_the_sentence_says_what_the_interval_lets_it():
    curve = {"labels": [40, 80, 160], "gain": {"value": 0.021, "ci95": [0.01, 0.032]}}
    said = twice_as_many(curve)
    promised = "Doubling the labels again should raise the AUC by at most about the same amount (extrapolated)"
    assert said.startswith(f"{promised}: the last doubling, ")
    assert "from 80 to 160, changed the AUC by +0.021 (95 % interval +0.010 to +0.032)" in said
    for ends in ([-0.01, 0.032], [-0.05, -0.01]):
        assert "no significant gain expected" in twice_as_many(curve | {"gain": {"value": 0.0, "ci95": ends}})
    assert "cannot be said" in twice_as_many(curve | {"gain": {"value": None, "ci95": None}})


def test_too_few_labels_or_prompts_are_one_line():
    for data in (labelled(30), labelled(200, prompts=4)):
        with pytest.raises(InputError, match="are too few; accepted: at least 40 labels of 5 prompts"):
            learning_curve(data, SETTINGS)
