"""The reward model: its losses against formulas, its measures against counts, and that it learns and is kept."""

import json
import math
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from minialign import CLIP, RewardModel, reward
from minialign.command import run_command
from minialign.feedback import FeedbackStore
from minialign.models.pretrained import EMBEDDED, read_weights
from minialign.prompts import SHAPES, all_prompts
from minialign.reward import (
    CHECK,
    PATIENCE,
    Pairs,
    area_under_curve,
    calibration,
    embed_images,
    embed_texts,
    expected_calibration_error,
    features,
    fit,
    held_out_split,
    learn_reward,
    measure,
    mse_loss,
    platt,
    prompt_classification_loss,
    rewards_of,
    train_reward,
)
from minialign.shapes.scenes import draw, sample_scene
from minialign.training import generator


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
    settings = {"hidden": 256, "clip": None, "reward_steps": 600, "lambda": 0.5, "temperature": 2.0, "seed": 0}
    settings["weighting"] = "reward"
    clip = CLIP.from_pretrained()
    image, text = embed_images(clip, pictures), embed_texts(clip, prompts)

    def other(text, number, rng):
        return [prompts[rng.randrange(160)] for _ in range(number)]

    learn_reward(other, clip, image, text, prompts, labels, settings, tmp_path, lambda row: None)
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


def test_soft_labels_weigh_the_classification():
    g = torch.Generator().manual_seed(0)
    rewards, label = torch.rand(3, 4, generator=g), torch.tensor([0.25, 0.0, 0.5])
    entropies = [-math.log(math.exp(row[0]) / sum(map(math.exp, row))) for row in rewards.tolist()]
    expected = (0.25 * entropies[0] + 0.5 * entropies[2]) / 0.75
    assert float(prompt_classification_loss(rewards, label, 1.0)) == pytest.approx(expected, rel=1e-5)
    expected = sum((y - r) ** 2 for y, r in zip(label.tolist(), rewards[:, 0].tolist())) / 3
    assert float(mse_loss(rewards[:, 0], label)) == pytest.approx(expected, rel=1e-5)


def random_pairs(number: int, good: float = 0.5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Pairs]:
    """Tables of 30 images and 20 texts of width 6, and pairs of them with labels that nothing explains."""
    g = torch.Generator().manual_seed(seed)
    image = torch.randint(30, (number,), generator=g)
    prompts = torch.stack([torch.randperm(20, generator=g)[:4] for _ in range(number)])
    label = (torch.rand(number, generator=g) < good).float()
    return torch.randn(30, 6, generator=g), torch.randn(20, 6, generator=g), Pairs(image, prompts, label)


def test_rewards_of_rows_are_those_of_pairs():
    images, texts, pairs = random_pairs(2000)  # more than are computed at once
    model = RewardModel({"width": 6, "hidden": 32})
    several = rewards_of(model, images, texts, pairs.image, pairs.prompts)
    for k in range(4):
        torch.testing.assert_close(several[:, k], model(images[pairs.image], texts[pairs.prompts[:, k]]))


@pytest.mark.parametrize("weight", [0.5, 0.0])
@pytest.mark.parametrize("soft", [False, True])
def test_a_step_of_fitting_is_one_on_the_papers_loss(soft, weight):
    images, texts, pairs = random_pairs(40)
    label = pairs.label * 0.7 if soft else pairs.label
    config, how = {"width": 6, "hidden": 16}, {"batch_size": 12, "learning_rate": 0.1, "seed": 3}
    model, _ = fit(
        images, texts, Pairs(pairs.image, pairs.prompts, label), None, config,
        steps=1, temperature=0.5, weight_of_classification=weight, **how,
    )  # fmt: skip
    torch.manual_seed(3)
    reference = RewardModel(config)
    rows = torch.randint(40, (12,), generator=generator(3, 0))
    y = label[rows]
    rewards = torch.stack([reference(images[pairs.image[rows]], texts[pairs.prompts[rows, k]]) for k in range(4)], 1)
    entropy = -torch.log(torch.exp(rewards[:, 0] / 0.5) / torch.exp(rewards / 0.5).sum(1))
    loss = ((y - rewards[:, 0]) ** 2).mean() + weight * (entropy * y).sum() / y.sum()
    before = [p.detach().clone() for p in reference.parameters()]
    optimizer = torch.optim.SGD(reference.parameters(), 1.0)
    loss.backward()
    optimizer.step()
    for p, was, learned in zip(reference.parameters(), before, model.parameters()):
        gradient = was - p.detach()  # AdamW's first step is lr * sign(gradient), after the weights' decay
        clear = gradient.abs() > 1e-6
        expected = was * (1 - 0.1 * 1e-2) - 0.1 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(learned[clear], expected[clear], rtol=1e-3, atol=1e-3)


def test_fitting_stops_where_held_out_labels_say_so():
    images, texts, train = random_pairs(60)
    _, _, held_out = random_pairs(60, seed=1)
    config, logged = {"width": 6, "hidden": 64}, []
    model, course = fit(images, texts, train, held_out, config, steps=5000, learning_rate=1e-2, log=logged.append)
    errors = [error for _, error in course]
    best = errors.index(min(errors))
    assert [step for step, _ in course] == [CHECK * (i + 1) for i in range(len(course))]
    assert len(course) == best + 1 + PATIENCE and course[-1][0] < 5000  # noise: learning it by heart does not pay
    error = float(mse_loss(rewards_of(model, images, texts, held_out.image, held_out.prompts)[:, 0], held_out.label))
    assert error == pytest.approx(errors[best], rel=1e-6)
    assert logged[-1]["mse"] < logged[0]["mse"]
    _, course = fit(images, texts, train, held_out, config, steps=70)
    assert [step for step, _ in course] == [50, 70]


def test_balanced_pairs_are_good_as_often_as_bad():
    images, texts, pairs = random_pairs(400, good=0.1)
    ones = torch.ones_like(images), torch.ones_like(texts)  # nothing to tell them by
    config, how = {"width": 6, "hidden": 8}, {"steps": 200, "learning_rate": 1e-2, "weight_of_classification": 0.0}
    for balanced, expected in ((False, float(pairs.label.mean())), (True, 0.5)):
        model, _ = fit(*ones, pairs, None, config, balanced=balanced, batch_size=100, **how)
        assert float(model(ones[0][:1], ones[1][:1])) == pytest.approx(expected, abs=0.05)


def test_expected_calibration_error_by_hand():
    reward, label = torch.tensor([0.02, 0.04, 0.55, 1.0, 0.97]), torch.tensor([0.0, 1.0, 1.0, 1.0, 0.5])
    # bins: {0.02, 0.04} -> 0.5, {0.55} -> 1, {1, 0.97} -> 0.75
    expected = (2 * abs(0.03 - 0.5) + abs(0.55 - 1) + 2 * abs(0.985 - 0.75)) / 5
    assert expected_calibration_error(calibration(reward, label)) == pytest.approx(expected, rel=1e-6)


def test_platt_gives_the_frequencies_of_two_kinds():
    """Of a score with two values the logistic regression is exact: it says how often each kind was good."""
    score, label = torch.tensor([0.21] * 10 + [0.25] * 5), torch.tensor([1.0] * 3 + [0.0] * 7 + [1.0] * 3 + [0.0, 0.5])
    a, b = platt(score, label)
    for value, frequency in ((0.21, 0.3), (0.25, 0.7)):
        assert 1 / (1 + math.exp(-(a * value + b))) == pytest.approx(frequency, rel=1e-3)
    a, b = platt(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.0, 0, 1, 1]))  # no finite optimum without a ridge
    assert 10 < a < 1e4 and -b / a == pytest.approx(0.25, rel=1e-3)
    assert platt(torch.ones(4), torch.tensor([0.0, 1, 1, 1])) == (0, pytest.approx(math.log(3), rel=1e-3))


def test_measures_by_hand():
    reward, label = torch.tensor([0.9, 0.6, 0.3, 0.2]), torch.tensor([1.0, 0.0, 1.0, 0.4])
    others = torch.tensor([[0.1, 0.8], [0.9, 0.9], [0.1, 0.3], [0.9, 0.9]])
    found = measure(reward, label, others)
    assert found["accuracy"] == 0.5 and found["auc"] == 0.75
    assert found["brier"] == pytest.approx((0.01 + 0.36 + 0.49 + 0.04) / 4)
    assert found["prompt_found"] == 0.5  # of two good ones: 0.9 is above both, 0.3 not above 0.3
    assert measure(reward, torch.zeros(4), others)["prompt_found"] is None
    assert measure(reward, label, others[:, :0])["prompt_found"] is measure(reward, label)["prompt_found"] is None


def test_prompts_are_held_out_whole():
    rng = random.Random(0)
    prompts = [f"prompt {rng.randrange(40)}" for _ in range(300)]
    parts = held_out_split(prompts, 1)
    assert sorted(i for part in parts for i in part) == list(range(300))
    names = [{prompts[i] for i in part} for part in parts]
    assert [len(name) for name in names] == [30, 4, 6] and not names[0] & names[1] | names[0] & names[2]
    assert held_out_split(prompts, 1) == parts != held_out_split(prompts, 2)
    assert [len(part) for part in held_out_split(list("aabbcc"), 0)] == [2, 2, 2]
    assert held_out_split(list("aabb"), 0) == ([0, 1, 2, 3], [], [])


@pytest.fixture
def run(tmp_path):
    """A run of 48 drawings that show their prompt or another one, labelled as they are."""
    folder = tmp_path / "run"
    (folder / "images").mkdir(parents=True)
    rng = random.Random(0)
    prompts = [prompt for prompt in all_prompts(SHAPES) if prompt.category == "color"]
    rows, verdicts = [], []
    for i in range(48):
        shown = rng.choice((prompts[i % 16], rng.choice(prompts)))
        scene = sample_scene(shown, rng)
        draw(scene, rng).save(folder / "images" / f"{i}.png")
        rows.append((prompts[i % 16].text, f"images/{i}.png", i))
        verdicts.append("good" if scene.shows(prompts[i % 16]) else "bad")
    store = FeedbackStore(folder)
    store.add_images(rows)
    store.add_labels("truth", [(image.id, verdict) for image, verdict in zip(store.images(), verdicts) if image.id > 4])
    store.close()
    (folder / "config.json").write_text(json.dumps({"minialign": "0", "settings": {"model": None}}))
    return folder


def test_features_are_kept_and_told_apart(run, tmp_path, monkeypatch):
    clip, calls = CLIP.from_pretrained(), {"image": [], "text": []}
    for kind in calls:
        whole = getattr(clip, f"encode_{kind}")
        monkeypatch.setattr(
            clip, f"encode_{kind}", lambda x, whole=whole, kind=kind: calls[kind].append(len(x)) or whole(x)
        )
    paths = [run / "images" / f"{i}.png" for i in (3, 1, 3, 2)]
    texts = ["a red circle", "a blue star", "a red circle"]
    pictures = [Image.open(path) for path in paths]
    expected = embed_images(clip, pictures), embed_texts(clip, texts)
    calls["image"].clear(), calls["text"].clear()
    cache = tmp_path / "cache" / "features.safetensors"
    for times in range(2):
        image, text = features(cache, clip, paths, texts)
        torch.testing.assert_close(image, expected[0])
        torch.testing.assert_close(text, expected[1])
        assert calls == {"image": [3], "text": [2]}, times  # each different one once, and never again
    pictures[1].save(paths[0])  # another image under the name of two rows; one that is known by its content
    image, _ = features(cache, clip, paths, ["a red circle", "a blue circle"])
    torch.testing.assert_close(image, expected[0][[1, 1, 1, 3]])
    assert calls == {"image": [3], "text": [2, 1]}
    Image.new("RGB", (64, 64), "red").save(paths[3])
    assert not torch.equal(features(cache, clip, paths, texts)[0][3], expected[0][3]) and calls["image"] == [3, 1]
    with torch.no_grad():
        clip.visual_projection.weight[0, 0] += 1e-3  # another CLIP
    features(cache, clip, paths, texts)
    assert calls["image"] == [3, 1, 2] and calls["text"] == [2, 1, 2]
    cache.write_bytes(cache.read_bytes()[:-7])
    features(cache, clip, paths, texts)
    assert calls["image"] == [3, 1, 2, 2]


def command(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["reward", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        run_command(reward.main)
    return stop.value.code, *capsys.readouterr()


SMALL = ("--steps", 100, "--hidden", 32, "--device", "cpu")


def test_the_command_learns_from_the_store(run, monkeypatch, capsys):
    code, out, err = command(monkeypatch, capsys, run, *SMALL)
    assert code == 0, err
    assert all(name in out for name in ("with the auxiliary loss", "without it", "raw CLIP score", "44 labels"))
    measured = json.loads((run / "reward" / "held_out.json").read_text())
    assert measured["labels"] == 44 and set(measured["compared"]) == {"auxiliary", "plain", "clip"}
    assert 0 < measured["held_out"] < 16 and measured["held_out_prompts"] == 2
    assert {"accuracy", "auc", "clip_score_auc", "ece", "calibration", "good_fraction"} <= set(measured)
    assert sum(part["count"] for part in measured["calibration"]) == measured["held_out"]
    card = (run / "reward" / "README.md").read_text()
    assert "| lambda | 0.5 |" in card and "without it" in card and "| temperature | 0.5 |" in card
    pytest.importorskip("matplotlib")
    assert Image.open(run / "reward" / "calibration.png").size[0] > 600
    store = FeedbackStore(run)
    images, labels = store.images(), store.labels()
    store.close()
    score = read_weights(run / "cache" / "reward.safetensors")["reward"]
    known = [i for i, image in enumerate(images) if image.id in labels]
    assert area_under_curve(score[known], torch.tensor([labels[images[i].id] for i in known])) > 0.75
    model = RewardModel.from_pretrained(run / "reward")
    again = model.score([Image.open(image.path) for image in images], [image.prompt for image in images])
    torch.testing.assert_close(score, again)
    monkeypatch.setattr(CLIP, "encode_image", None)  # calling it would fail
    monkeypatch.setattr(CLIP, "encode_text", None)
    assert command(monkeypatch, capsys, run, *SMALL)[0] == 0
    assert torch.equal(read_weights(run / "cache" / "reward.safetensors")["reward"], score)
    weights = (run / "reward" / "model.safetensors").read_bytes()
    code, out, _ = command(monkeypatch, capsys, run, *SMALL, "--out", run / "other", "--lambda", 0, "--balanced")
    assert code == 0 and "reward model (lambda 0)" in out and "without it" not in out
    assert (run / "reward" / "model.safetensors").read_bytes() == weights
    assert torch.equal(read_weights(run / "cache" / "reward.safetensors")["reward"], score)


def test_soft_labels_come_from_the_store(run, monkeypatch, capsys):
    hard = FeedbackStore.labels

    def labels(store, soft=False):
        return {i: 0.2 + 0.6 * y if soft else y for i, y in hard(store).items()}

    monkeypatch.setattr(FeedbackStore, "labels", labels)
    monkeypatch.setattr(reward, "plot_calibration", lambda *how: None)
    briers = []
    for soft in ((), ("--soft",)):
        assert command(monkeypatch, capsys, run, *SMALL, *soft)[0] == 0
        scores = read_weights(run / "cache" / "reward.safetensors")["reward"]
        briers.append(float(scores.std()))
    assert briers[1] < briers[0]


def test_a_run_that_cannot_be_learned_from_is_one_line(run, tmp_path, monkeypatch, capsys):
    def fails(message, *arguments):
        held = sorted(path for path in tmp_path.rglob("*") if path.name != ".lock" and "sqlite" not in path.name)
        code, _, err = command(monkeypatch, capsys, *arguments)
        assert code == 2 and message in err and err.split("\n")[-2].startswith("error: "), err
        assert err.count("\n") == 1 or "CLIP" in err  # where the work had begun
        held_now = sorted(path for path in tmp_path.rglob("*") if path.name != ".lock" and "sqlite" not in path.name)
        assert held_now == held

    (tmp_path / "empty").mkdir()
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "mine.txt").write_text("")
    fails("no feedback.sqlite; accepted: a run of generate or finetune", tmp_path / "nowhere")
    fails("no feedback.sqlite", tmp_path / "empty")
    fails("--lambda: '-1'; accepted: a number from 0 up", run, "--lambda", -1)
    fails("./nowhere: not found", run, "--clip", "./nowhere")
    fails("thing: holds no reward model; accepted:", run, "--out", tmp_path / "thing")
    (run / "stages.json").write_text(json.dumps({"reward": {"begun": 1}}))
    fails("its results rest on the reward model that is there; accepted: another --out", run)
    (run / "stages.json").unlink()
    store = FeedbackStore(run)
    ids = [image.id for image in store.images()]
    store.add_labels("truth", [(i, "bad") for i in ids])
    fails("all of its 48 labels are bad; both kinds are needed", run)
    store.add_labels("truth", [(i, "good") for i in ids])
    fails("all of its 48 labels are good; both kinds are needed", run)
    store.add_labels("truth", [(i, "skip") for i in ids])
    fails(f"{run}: no labels; python -m minialign.label {run} takes them", run)
    store.add_labels("truth", [(i, "good" if i % 2 else "bad") for i in ids])
    store.close()
    (run / "images" / "5.png").write_bytes(b"no image")
    fails("5.png cannot be read", run)
    (run / "images" / "5.png").unlink()
    fails("5.png: cannot be read", run)


def test_few_prompts_hold_out_none(run, monkeypatch, capsys):
    store = FeedbackStore(run)
    kept = sorted({image.prompt for image in store.images()})[:2]
    store.add_labels("truth", [(image.id, "skip") for image in store.images() if image.prompt not in kept])
    number = len(store.labels())
    store.close()
    code, out, _ = command(monkeypatch, capsys, run, *SMALL, "--clip", EMBEDDED / "clip")
    assert code == 0 and "too few prompts" in out
    measured = json.loads((run / "reward" / "held_out.json").read_text())
    assert measured["labels"] == number and measured["held_out"] == 0 and measured["auc"] is None
    assert not (run / "reward" / "calibration.png").exists() and "nothing was measured" in out
