"""Intervals, Frechet distance and diversity against closed forms and counts."""

import json
import math

import pytest
import torch

from minialign import CLIP, Pipeline, RewardModel
from minialign.evaluate import compare, diversity, frechet_distance, judge_both, paired_interval, wilson_interval
from minialign.shapes.task import shapes_task


def test_wilson_interval_solves_its_equation():
    for good, total in ((3, 10), (50, 100), (0, 20), (20, 20)):
        low, high = wilson_interval(good, total)
        for p in (low, high):  # the interval's ends are the p whose score test is exactly at z
            if 0 < p < 1:
                assert abs(good / total - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / total), rel=1e-9)
    assert wilson_interval(0, 0) == [0.0, 1.0]


def test_paired_interval_is_the_normal_one():
    before, after = [0, 0, 1, 1.0], [1, 0, 1, 1.0]
    half = 1.96 * math.sqrt(0.25 / 4)  # the gains 1, 0, 0, 0 have variance 1/4
    assert paired_interval(before, after, list("abcd")) == pytest.approx([0.25 - half, 0.25 + half])


def test_repeating_a_prompt_is_no_new_evidence():
    before, after, prompts = [0, 0, 1, 1.0], [1, 0, 1, 1.0], list("abcd")
    once = paired_interval(before, after, prompts)
    assert paired_interval(before * 5, after * 5, prompts * 5) == pytest.approx(once)


def test_compare_counts_by_group():
    table = compare([("count", "seen"), ("color", "seen"), ("count", "unseen")], list("abc"), [1, 0, 0], [1, 1, 0])
    assert table["before"] == {"overall": pytest.approx(1 / 3), "count": 0.5, "seen": 0.5, "color": 0.0, "unseen": 0.0}
    assert table["after"]["overall"] == pytest.approx(2 / 3)
    assert table["ci95"]["after"]["seen"] == wilson_interval(2, 2)


def test_frechet_distance_of_gaussians_with_one_basis():
    """Commuting covariances: |m1 - m2|^2 + sum (s1 - s2)^2 of the standard deviations along the shared axes."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 3, generator=g, dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # exactly white
    s1, s2 = torch.tensor([1.0, 2, 0.5]).double(), torch.tensor([2.0, 1, 0.5]).double()
    shift = torch.tensor([1.0, 0, -2]).double()
    basis = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))[0]
    distance = frechet_distance((x * s1) @ basis, (x * s2 + shift) @ basis)
    assert distance == pytest.approx(5 + 2, rel=1e-6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, x[:1]) is None


def test_a_model_gains_nothing_over_itself(tmp_path):
    """Both sides draw from the same noise, so that the same pipeline's pairs are equal to the last bit."""
    pipe, task = Pipeline.from_pretrained(), shapes_task(8, 4, 16, 4, seed=3)
    reward = RewardModel({"width": 64, "hidden": 8})
    judged = judge_both(pipe, pipe, task, CLIP.from_pretrained(), reward, {"steps": 2, "guidance": 2.0}, tmp_path)
    assert judged["alignment"]["before"] == judged["alignment"]["after"]
    assert judged["alignment"]["ci95"]["gain"]["overall"] == [0.0, 0.0]
    for name in ("fidelity", "readable", "mean_reward"):
        assert judged[name]["before"] == judged[name]["after"]
    samples = json.loads((tmp_path / "samples.json").read_text())["samples"]
    pictures = [[(tmp_path / sample[side]["image"]).read_bytes() for sample in samples] for side in ("before", "after")]
    assert pictures[0] == pictures[1] and len(set(pictures[0])) == len(samples) == 16


def test_diversity_is_the_mean_cosine_distance_within_prompts():
    features = torch.tensor([[1.0, 0], [0, 2], [3, 0], [-1, 0], [5, 5]])
    prompts = ["a", "a", "b", "b", "c"]
    assert diversity(features, prompts) == pytest.approx((1 + 2) / 2)
    assert diversity(features, list("abcde")) is None
