"""Intervals, distances, diversity and best of N against closed forms and counts; the command that compares."""

import itertools
import json
import math
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from minialign import CLIP, Pipeline, RewardModel, evaluate
from minialign.command import run_command
from minialign.evaluate import (
    Drawn,
    best_of,
    best_of_curves,
    by_group,
    chosen_prompts,
    cmmd,
    compare,
    diversity,
    frechet_distance,
    judge_both,
    paired_interval,
    wilson_interval,
)
from minialign.feedback import FeedbackStore
from minialign.generate import generate
from minialign.models.pretrained import EMBEDDED
from minialign.prompts import SHAPES, split
from minialign.runs import open_run
from minialign.shapes.task import shapes_task
from minialign.task import noise_seed


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
    how = {"steps": 2, "guidance": 2.0}
    reward = RewardModel({"width": 64, "hidden": 8})
    judged = judge_both(lambda: pipe, lambda: pipe, task, CLIP.from_pretrained(), reward, how, tmp_path)
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


def test_cmmd_is_the_papers_double_loop():
    """1 / m(m-1) sum k(x,x') + 1 / n(n-1) sum k(y,y') - 2 / mn sum k(x,y), times 1000, on unit vectors."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(7, 5, generator=g, dtype=torch.float64), torch.randn(4, 5, generator=g, dtype=torch.float64) + 1
    unit = [[[float(v) / math.sqrt(sum(float(w) ** 2 for w in row)) for v in row] for row in part] for part in (x, y)]

    def kernel(a, b):
        return math.exp(-sum((p - q) ** 2 for p, q in zip(a, b)) / (2 * 10.0**2))

    same = [
        sum(kernel(a, b) for i, a in enumerate(part) for j, b in enumerate(part) if i != j)
        / (len(part) * (len(part) - 1))
        for part in unit
    ]
    across = sum(kernel(a, b) for a in unit[0] for b in unit[1]) / 28
    assert cmmd(x, y) == pytest.approx(1000 * (same[0] + same[1] - 2 * across), rel=1e-9)
    assert cmmd(3 * x, y) == pytest.approx(cmmd(x, y)) == pytest.approx(cmmd(y, x))
    assert cmmd(x, x[:1]) is None
    many = torch.randn(2100, 5, generator=g)  # more rows than are taken at once; the same distribution
    assert abs(cmmd(many[:1050], many[1050:])) < 0.05


@pytest.mark.parametrize("ties", [False, True])
def test_best_of_equals_all_sets(ties):
    rng = random.Random(0)
    scores = [rng.choice((0.1, 0.5, 0.9)) if ties else rng.random() for _ in range(7)]
    outcomes = [rng.random() for _ in range(7)]
    for number, value in enumerate(best_of(scores, outcomes), 1):
        found = []
        for chosen in itertools.combinations(range(7), number):
            top = [outcomes[i] for i in chosen if scores[i] == max(scores[j] for j in chosen)]
            found.append(sum(top) / len(top))  # among equals one at random
        assert value == pytest.approx(sum(found) / len(found), rel=1e-12)
    assert best_of(scores, outcomes)[0] == pytest.approx(sum(outcomes) / 7) and len(best_of([1.0], [0.0])) == 1


def side(name, **judged):
    return Drawn(name, name, Path(), torch.zeros(0), {key.replace("_", " "): value for key, value in judged.items()}, 1)


def test_groups_count_what_was_judged():
    prompts, groups = list("aabb"), [("count", "seen")] * 2 + [("color", "seen")] * 2
    sides = [
        side("A", people=[1.0, None, 0.0, 0.0]),
        side("B", people=[1.0, 1.0, 1.0, None]),
        side("C", reward=[0.5] * 4),
    ]
    table = by_group(sides, "people", prompts, groups)
    assert set(table) == {"A", "B"} and set(table["A"]) == {"overall", "count", "seen", "color"}
    assert table["A"]["overall"] == {"value": pytest.approx(1 / 3), "n": 3, "ci95": wilson_interval(1, 3)}
    assert table["B"]["overall"]["gain"] == 0.5  # of the two that have both: 1 to 1, 0 to 1
    assert table["B"]["overall"]["gain_ci95"] == paired_interval([1, 0], [1, 1], ["a", "b"])
    assert table["B"]["color"]["value"] == 1.0 and table["B"]["color"]["n"] == 1
    numbers = by_group(sides, "reward", prompts, groups)["C"]["count"]
    assert numbers["ci95"] == paired_interval([0, 0], [0.5, 0.5], ["a", "a"]) and "gain" not in numbers


def test_curves_are_means_over_prompts_that_are_judged_whole():
    sides = [side("A", reward=[0.1, 0.9, 0.3, 0.2], people=[0.0, 1.0, 0.0, None], CLIP_score=[0.2, 0.1, 0.1, 0.2])]
    curves = best_of_curves(sides, list("aabb"))
    assert curves["reward"]["reward"]["A"]["value"] == pytest.approx([(0.5 + 0.25) / 2, (0.9 + 0.3) / 2])
    assert curves["reward"]["people"]["A"]["value"] == [0.5, 1.0]  # of a alone: of b one was not judged
    assert curves["CLIP score"]["people"]["A"]["value"] == [0.5, 0.0] and "CLIP score" not in curves["CLIP score"]
    means, names = [0.9, 0.3], ["0", "1"]
    assert curves["reward"]["reward"]["A"]["ci95"][1] == paired_interval([0, 0], means, names)
    alone = best_of_curves([side("A", CLIP_score=[0.2, 0.1])], list("aa"))
    assert alone["CLIP score"]["CLIP score"]["A"]["value"] == pytest.approx([0.15, 0.2])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A run that drew for two prompts of the embedded world, with a reward model of random weights."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    pipe = Pipeline.from_pretrained()
    settings = {"images_per_prompt": 1, "model": None, "seed": 0, "sampling_steps": 1, "guidance": 1.0}
    open_run(folder, settings)
    generate(pipe, ["a red circle", "two blue stars on the sand"], settings, folder, 8)
    torch.manual_seed(0)
    RewardModel({"width": 64, "hidden": 8, "clip": None}).save_pretrained(folder / "reward")
    return folder


def test_prompts_are_the_runs_and_those_it_holds_out(drawn, tmp_path):
    prompts, groups = chosen_prompts(drawn, None, 12, 0)
    assert len(prompts) == len(set(prompts)) == len(groups) == 12
    known = {name: [text for text, names in zip(prompts, groups) if names[1] == name] for name in ("seen", "unseen")}
    assert sorted(known["seen"]) == ["a red circle", "two blue stars on the sand"]
    assert set(known["unseen"]) <= {prompt.text for prompt in split(SHAPES, 0)[1]}
    counts = Counter(names for names in groups if names[1] == "unseen")
    assert max(counts.values()) - min(counts.values()) <= 1 and len(counts) == 4  # evenly over the categories
    (tmp_path / "mine.txt").write_text("a fox\na red circle\nthree dogs\n")
    found = dict(zip(*chosen_prompts(drawn, tmp_path / "mine.txt", 9, 0)))
    assert found == {"a fox": ("unseen",), "a red circle": ("color", "seen"), "three dogs": ("count", "unseen")}


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        run_command(evaluate.main)
    return stop.value.code, *capsys.readouterr()


SMALL = ("--max-prompts", 6, "--images-per-prompt", 3, "--sampling-steps", 2, "--device", "cpu")


def test_the_command_compares_pipelines(drawn, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(drawn, tmp_path / "run")
    pipe = Pipeline.from_pretrained()
    with torch.no_grad():
        pipe.unet.conv_out.bias += 0.3
    pipe.save_pretrained(run / "model")
    code, out, err = command(monkeypatch, capsys, run, *SMALL)
    assert code == 0, err
    found = json.loads((run / "evaluation-compare.json").read_text())
    assert list(found["models"]) == ["base", "fine-tuned"] and found["reference"] == "drawings of the prompts"
    assert set(found["judged"]) == {"simulated annotator", "reward", "CLIP score"}
    assert found["judged"]["reward"]["base"]["overall"]["n"] == 18
    assert all(value is not None for key in ("frechet", "cmmd", "diversity") for value in found[key].values())
    assert "fine-tuned over base: " in out and "N = 3" in out and "CMMD (lower)" in out
    pytest.importorskip("matplotlib")
    assert Image.open(run / "best-of-n.png").size[1] > 300
    places = [run / one["images"] for one in found["models"].values()]
    stores = [FeedbackStore(place) for place in places]
    pairs = [[(image.prompt, image.seed) for image in store.images()] for store in stores]
    assert pairs[0] == pairs[1] and min(seed for _, seed in pairs[0]) == noise_seed(0, 0, test=True)
    images = stores[0].images()
    score = RewardModel.from_pretrained(run / "reward").score(
        [Image.open(image.path) for image in images], [image.prompt for image in images]
    )
    assert found["judged"]["reward"]["base"]["overall"]["value"] == pytest.approx(float(score.mean()), abs=1e-5)
    for store, verdict in zip(stores, ("bad", "good")):
        store.add_labels("ann", [(image.id, verdict) for image in store.images()[:6]])
        store.close()
    monkeypatch.setattr(Pipeline, "generate", None)  # calling it would fail: all is drawn
    code, out, err = command(monkeypatch, capsys, run, *SMALL)
    assert code == 0, err
    again = json.loads((run / "evaluation-compare.json").read_text())
    assert (
        again["judged"]["people"]["fine-tuned"]["overall"] | {"value": 1.0, "n": 6, "gain": 1.0}
        == (again["judged"]["people"]["fine-tuned"]["overall"])
    )
    assert again["judged"]["reward"] == found["judged"]["reward"] and "aligned, by people" in out


def test_models_are_told_apart_by_all_their_weights(drawn, tmp_path, monkeypatch, capsys):
    pipe = Pipeline.from_pretrained()
    with torch.no_grad():
        pipe.unet.conv_out.bias += 0.3
    pipe.save_pretrained(tmp_path / "checkpoint")
    places = (EMBEDDED, tmp_path / "checkpoint")  # of one name, with equal first layers
    monkeypatch.setattr(evaluate, "plot_best_of", lambda *how: None)
    small = ("--max-prompts", 2, "--images-per-prompt", 1, "--sampling-steps", 1, "--device", "cpu")
    run = shutil.copytree(drawn, tmp_path / "run")
    code, out, err = command(monkeypatch, capsys, run, *small, "--models", *places, "embedded")
    assert code == 0, err
    found = json.loads((run / "evaluation-compare.json").read_text())
    reward = {name: groups["overall"]["value"] for name, groups in found["judged"]["reward"].items()}
    assert reward[str(EMBEDDED)] == reward["embedded"] != reward[str(places[1])]
    assert found["judged"]["reward"]["embedded"]["overall"]["gain_ci95"] == [0.0, 0.0]


def test_what_cannot_be_compared_is_one_line(drawn, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    cases = [
        ((tmp_path / "nowhere",), "nowhere: no such folder; accepted: a run"),
        ((drawn,), "run: no model/ to compare; accepted: a finished run of finetune, or --models A B"),
        ((tmp_path / "empty", "--models", "embedded"), "empty: no feedback.sqlite with prompts; accepted: such a run"),
        ((drawn, "--models", "./nowhere", "embedded"), "./nowhere: not found"),
        ((drawn, "--models", "embedded", "--prompts", tmp_path / "none.txt"), "none.txt: cannot be read"),
        ((drawn, "--models", "embedded", "--reward", tmp_path / "empty"), "config.json: cannot be read"),
        ((drawn, "--models", "embedded", "--images-per-prompt", 0), "--images-per-prompt: '0'; accepted:"),
    ]
    held = sorted(path for path in tmp_path.rglob("*"))
    for arguments, message in cases:
        code, _, err = command(monkeypatch, capsys, *arguments)
        assert code == 2 and message in err and err.count("\n") == 1 and err.startswith("error: "), (arguments, err)
    assert sorted(path for path in tmp_path.rglob("*")) == held
    small = ("--max-prompts", 1, "--images-per-prompt", 1, "--sampling-steps", 1, "--device", "cpu")
    code, _, err = command(
        monkeypatch, capsys, drawn, "--models", "embedded", *small, "--reference", tmp_path / "empty"
    )
    assert code == 2 and "empty: fewer than two images; accepted: a folder of .png" in err
