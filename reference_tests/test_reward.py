"""The reward model: its losses against formulas, that it learns and is kept, how labels are held out, its command."""

import json
import math
import random

import pytest
import torch
from helpers import command
from PIL import Image

from minialign import CLIP, RewardModel
from minialign.engine.optimising import generator
from minialign.feedback import FeedbackStore, import_into_run
from minialign.files import InputError, read_weights
from minialign.measures import area_under_curve, ranked_right
from minialign.models.reward import comparison_loss, mse_loss, prompt_classification_loss
from minialign.reward import REWARDS, load_reward
from minialign.reward.__main__ import main
from minialign.reward.labels import (
    FEWEST,
    LEARN,
    SUBSETS,
    read_contrastive,
    read_labelled,
    split_feedback,
    split_labels,
)
from minialign.reward.trainer import Comparisons, Pairs, rewards_of, train_reward


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


@pytest.mark.parametrize("temperature", [0.2, 2.0])
def test_the_loss_of_comparisons_and_its_gradient_equal_their_formulas(temperature):
    g = torch.Generator().manual_seed(0)
    first, second = torch.rand(6, generator=g).requires_grad_(), torch.rand(6, generator=g).requires_grad_()
    preferred = torch.tensor([1.0, 0, 0.5, 1, 0, 0.5])
    loss = comparison_loss(first, second, preferred, temperature)
    loss.backward()
    expected = 0.0
    for i, (a, b, p) in enumerate(zip(first.tolist(), second.tolist(), preferred.tolist())):
        chance = 1 / (1 + math.exp(-(a - b) / temperature))  # that the first one is called better
        expected -= (p * math.log(chance) + (1 - p) * math.log(1 - chance)) / 6
        slope = (chance - p) / (6 * temperature)
        assert float(first.grad[i]) == pytest.approx(slope, rel=1e-4)
        assert float(second.grad[i]) == pytest.approx(-slope, rel=1e-4)
        if p != 0.5:
            assert (float(first.grad[i]) < 0) == (
                p == 1
            )  # a step against the gradient raises the better image's reward
        else:
            assert (float(first.grad[i]) < 0) == (a < b)  # and brings the two of a tie together
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    equal = torch.tensor([0.5])
    assert float(comparison_loss(equal, equal, torch.tensor([0.5]), temperature)) == pytest.approx(math.log(2))


def test_training_finds_a_learnable_rule_and_the_folder_keeps_it(tmp_path):
    g = torch.Generator().manual_seed(0)
    kinds = torch.eye(8)
    image, text = torch.randint(8, (400,), generator=g), torch.randint(8, (400,), generator=g)
    text = torch.where(torch.rand(400, generator=g) < 0.5, image, text)
    label = (image == text).float()
    prompts = torch.stack([text, (text + 1) % 8, (text + 3) % 8], dim=1)
    logged, config = [], {"width": 8, "hidden": 64}
    state = torch.random.get_rng_state()
    model = train_reward(kinds, kinds, Pairs(image, prompts, label), config, steps=300, log=logged.append)
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's random state is left alone
    assert ((model(kinds[image], kinds[text]) > 0.5) == (label > 0.5)).float().mean() > 0.97
    assert logged[-1]["loss"] < logged[0]["loss"]
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "thesis.txt").write_text("not the model's")
    for _ in range(2):
        model.save_pretrained(tmp_path / "reward")
        again = RewardModel.from_pretrained(tmp_path / "reward")
        assert torch.equal(again(kinds[image], kinds[text]), model(kinds[image], kinds[text]))
        assert again.config == model.config
    assert (tmp_path / "reward" / "thesis.txt").exists()


def test_comparisons_alone_teach_which_image_is_better():
    """Of prompts that were not learned from too: on every prompt more of one feature is better."""
    g = torch.Generator().manual_seed(0)
    texts, images = torch.randn(8, 8, generator=g), torch.randn(120, 8, generator=g)
    images = images / images.norm(dim=1, keepdim=True)
    first, second = torch.randint(120, (2, 800), generator=g)
    prompt = torch.randint(8, (800,), generator=g)
    preferred = (images[first, 0] > images[second, 0]).float()
    preferred[first == second] = 0.5
    new = prompt >= 6
    data = Comparisons(first[~new], second[~new], prompt[~new], preferred[~new])
    none = Pairs(torch.zeros(0, dtype=torch.long), torch.zeros(0, 1, dtype=torch.long), torch.zeros(0))
    logged, config = [], {"width": 8, "hidden": 32}
    how = {"steps": 150, "learning_rate": 3e-3, "comparisons": data}
    model = train_reward(images, texts, none, config, **how, log=logged.append)
    right = ranked_right(*(model(images[i[new]], texts[prompt[new]]) for i in (first, second)), preferred[new])
    assert right > 0.9 and logged[-1]["loss"] == logged[-1]["comparison"] < logged[0]["loss"]
    assert logged[-1].keys() == {"step", "loss", "comparison"}


def test_a_step_with_comparisons_is_one_on_the_sum_of_the_losses():
    images, texts, pairs = random_pairs(40)
    g = torch.Generator().manual_seed(1)
    data = Comparisons(*torch.randint(30, (2, 20), generator=g), torch.randint(20, (20,), generator=g),
                       torch.randint(3, (20,), generator=g) / 2)  # fmt: skip
    config, how = {"width": 6, "hidden": 16}, {"batch_size": 12, "learning_rate": 0.1, "seed": 3}
    model = train_reward(images, texts, pairs, config, steps=1, weight_of_classification=0.0,
                         comparisons=data, comparison_temperature=0.4, **how)  # fmt: skip
    torch.manual_seed(3)
    reference, draws = RewardModel(config), generator(3, 0)
    rows, compared = torch.randint(40, (12,), generator=draws), torch.randint(20, (12,), generator=draws)
    error = reference(images[pairs.image[rows]], texts[pairs.prompts[rows, 0]]) - pairs.label[rows]
    r = [reference(images[place[compared]], texts[data.prompt[compared]]) for place in (data.first, data.second)]
    p = torch.exp(r[0] / 0.4) / (torch.exp(r[0] / 0.4) + torch.exp(r[1] / 0.4))
    y = data.preferred[compared]
    (error.square().mean() - (y * p.log() + (1 - y) * (1 - p).log()).mean()).backward()
    for was, learned in zip(reference.parameters(), model.parameters()):
        clear = was.grad.abs() > 1e-6
        expected = was * (1 - 0.1 * 1e-2) - 0.1 * was.grad / (was.grad.abs() + 1e-8)
        torch.testing.assert_close(learned[clear], expected[clear].detach(), rtol=1e-3, atol=1e-3)


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
    model = train_reward(
        images, texts, Pairs(pairs.image, pairs.prompts, label), config,
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


def test_a_missing_contrastive_prompt_counts_for_nothing():
    """A row with fewer contrastive prompts has its own softmax, not the others' number of prompts."""
    images, texts, pairs = random_pairs(12, good=1.0)
    prompts = pairs.prompts.clone()
    prompts[:6, 2:] = -1
    model = RewardModel({"width": 6, "hidden": 16})
    rewards = rewards_of(model, images, texts, pairs.image, prompts)
    found = prompt_classification_loss(rewards, pairs.label, 0.5)
    halves = [
        prompt_classification_loss(rewards_of(model, images, texts, pairs.image[rows], kept), pairs.label[rows], 0.5)
        for rows, kept in ((slice(0, 6), prompts[:6, :2]), (slice(6, 12), prompts[6:]))
    ]
    torch.testing.assert_close(found, (halves[0] + halves[1]) / 2)
    prompts[:, 1:] = -1  # none at all: nothing to tell the prompt from
    assert (
        float(prompt_classification_loss(rewards_of(model, images, texts, pairs.image, prompts), pairs.label, 1)) == 0
    )


def test_balanced_pairs_are_good_as_often_as_bad():
    images, texts, pairs = random_pairs(400, good=0.1)
    ones = torch.ones_like(images), torch.ones_like(texts)  # nothing to tell them by
    config, how = {"width": 6, "hidden": 8}, {"steps": 200, "learning_rate": 1e-2, "weight_of_classification": 0.0}
    for balanced, expected in ((False, float(pairs.label.mean())), (True, 0.5)):
        model = train_reward(*ones, pairs, config, balanced=balanced, batch_size=100, **how)
        assert float(model(ones[0][:1], ones[1][:1])) == pytest.approx(expected, abs=0.05)


def test_some_prompts_are_held_out_whole_and_some_images_of_the_others():
    rng = random.Random(0)
    prompts = [f"prompt {rng.randrange(40)}" for _ in range(300)]
    split = split_labels(prompts, 1)
    assert sorted(i for part in split for i in part) == list(range(300))
    new, rest = {prompts[i] for i in split.new}, {prompts[i] for part in split[:2] for i in part}
    assert len(new) == 4 and not new & rest
    assert len(split.known) == round(0.1 * (300 - len(split.new)))
    assert split_labels(prompts, 1) == split != split_labels(prompts, 2)
    few = split_labels(list("aabbcc"), 0)
    assert len(few.new) == 2 and not few.known
    assert split_labels(list("aabb"), 0).new == []


def test_pairs_ranked_right_are_counted():
    first, second = torch.tensor([0.9, 0.1, 0.5, 0.7, 0.2]), torch.tensor([0.1, 0.9, 0.5, 0.1, 0.9])
    preferred = torch.tensor([1.0, 1.0, 0.0, 0.5, 0.0])  # right, wrong, undecided by the scores, a tie, right
    assert ranked_right(first, second, preferred) == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert ranked_right(first, second, torch.full((5,), 0.5)) is None


def test_no_image_that_judges_is_learned_from_by_a_comparison():
    rng = random.Random(0)
    prompts = {i: f"prompt {i % 20}" for i in range(200)}
    labels = {i: float(rng.random() < 0.5) for i in range(0, 200, 2)}
    pairs = [(i, (i + 20 * rng.randrange(1, 10)) % 200, rng.choice((0, 0.5, 1))) for i in range(200)]
    split, compared = split_feedback(prompts, labels, pairs, 1)
    assert sorted(i for part in split for i in part) == sorted(labels)
    assert sorted(pair for part in compared.values() for pair in part) == sorted(pairs)
    learned = {*split.learn, *(i for pair in compared[LEARN] for i in pair[:2])}
    assert not learned & {*split.known, *split.new}
    new = {prompts[i] for i in split.new} | {prompts[pair[0]] for pair in compared[SUBSETS[1]]}
    assert len(new) == 2 and not new & {prompts[i] for i in learned}
    assert len(compared[SUBSETS[0]]) > 10 < len(compared[SUBSETS[1]])
    expected = split_labels([prompts[i] for i in labels], 1)  # with labels alone it is that of labels
    rows = list(labels)
    assert split_feedback({i: prompts[i] for i in labels}, labels, [], 1)[0] == tuple(
        [rows[i] for i in part] for part in expected
    )


@pytest.fixture
def run(labelled_run, without_matplotlib):
    return labelled_run


SMALL = ("--reward-steps", 100, "--hidden", 32, "--device", "cpu")


def test_the_command_learns_from_the_store(run, capsys, monkeypatch):
    code, out, err = command(main, capsys, run, *SMALL)
    assert code == 0, err
    assert all(
        name in out for name in ("with the auxiliary loss", "squared error alone", "raw CLIP score", "44 labels")
    )
    measured = json.loads((run / "reward" / "held_out.json").read_text())
    assert measured["labels"] == 44 and set(measured["measured"]) == {"auxiliary", "plain", "clip"}
    assert set(measured["held_out"]) == {"known prompts", "new prompts"}
    new = measured["held_out"]["new prompts"]
    assert new["prompts"] == 2 and 0 < new["labels"] < 10
    found = measured["measured"]["auxiliary"]["new prompts"]
    assert {"accuracy", "auc", "ece", "brier", "calibration"} <= set(found)
    assert sum(part["count"] for part in found["calibration"]) == new["labels"]
    card = (run / "reward" / "README.md").read_text()
    assert "| lambda | 0.5 |" in card and "| temperature | 0.5 |" in card
    store = FeedbackStore(run)
    images, labels = store.images(), store.labels()
    store.close()
    score = read_weights(run / REWARDS)["reward"]
    known = [i for i, image in enumerate(images) if image.id in labels]
    assert area_under_curve(score[known], torch.tensor([labels[images[i].id] for i in known])) > 0.75
    model = RewardModel.from_pretrained(run / "reward")
    again = model.score([Image.open(image.path) for image in images], [image.prompt for image in images])
    torch.testing.assert_close(score, again)
    monkeypatch.setattr(CLIP, "encode_image", None)  # calling it would fail
    monkeypatch.setattr(CLIP, "encode_text", None)
    weights = (run / "reward" / "model.safetensors").read_bytes()
    code, out, _ = command(main, capsys, run)  # what is done is not done again, with the settings that are remembered
    assert code == 0 and "reward: done before" in out
    code, _, err = command(main, capsys, run, "--lambda", 0)
    assert code == 2 and "stage reward is out of date: --lambda was 0.5, now 0.0; --redo" in err
    assert (run / "reward" / "model.safetensors").read_bytes() == weights
    code, out, _ = command(main, capsys, run, "--lambda", 0, "--balanced", "--redo")
    assert code == 0 and "squared error alone" in out and "with the auxiliary loss" not in out


def test_labels_that_come_later_are_told(run, capsys, monkeypatch):
    once, real = [], (CLIP.from_pretrained, FeedbackStore.check_images)
    monkeypatch.setattr(CLIP, "from_pretrained", lambda *a, **k: once.append("CLIP") or real[0](*a, **k))
    monkeypatch.setattr(FeedbackStore, "check_images", lambda store: once.append("images") or real[1](store))
    code, out, err = command(main, capsys, run, *SMALL, "--reward-steps", 20, "--curve")
    assert code == 0 and "pairs ranked right" in out and "Twice as many labels" in out, err
    assert sorted(once) == ["CLIP", "images"]  # neither is loaded or checked again for the curve
    curve = json.loads((run / "reward" / "held_out.json").read_text())["curve"]
    assert len(curve["labels"]) == 2 and curve["labels"][-1] // 2 == curve["labels"][0] < 44 * 0.8
    assert {"accuracy", "auc", "pairs", "gain", "splits", "held_out_prompts"} < curve.keys()
    assert load_reward(run / "reward").config["hidden"] == 32  # is still the one that was measured
    store = FeedbackStore(run)
    store.add_labels("Anna", [(1, "good"), (2, "bad")])
    code, _, err = command(main, capsys, run)
    assert code == 2 and "stage reward is out of date: the labels changed; --redo does it again" in err
    code, out, _ = command(main, capsys, run, "--redo")
    assert code == 0 and "46 labels" in out
    store.close()


def test_a_flipped_bit_of_the_reward_model_is_noticed(run, capsys):
    assert command(main, capsys, run, *SMALL)[0] == 0
    file = run / "reward" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="model.safetensors: damaged"):
        load_reward(run / "reward")


def test_no_prompt_without_feedback_is_ever_contrastive(run):
    """Prompts that are met as wrong answers alone would be learned to be wrong for every image."""
    clip = CLIP.from_pretrained()
    store = FeedbackStore(run)
    Image.new("RGB", (64, 64)).save(run / "images" / "100.png")
    store.add_images([("two red stars", "images/100.png", 0), ("A red  circle", "images/99.png", 0)])
    store.add_images([("a red circle ", "images/0.png", 0)])
    Image.new("RGB", (64, 64)).save(run / "images" / "99.png")
    store.close()
    data = read_labelled(run, clip, {"soft": False, "seed": 0})
    store = FeedbackStore(run)
    prompts = [image.prompt for image in store.images()]
    store.close()
    same = {text: tuple(row) for text, row in zip(set(prompts), clip.tokenizer(list(set(prompts))).tolist())}
    taught = {same[prompts[i]] for i in data.split.learn}
    table = {row: text for row, text in zip(data.columns[:, 0].tolist(), prompts)}
    for text, row in zip(prompts, data.columns.tolist()):
        others = [same[table[k]] for k in row[1:] if k >= 0]
        assert others and set(others) <= taught and same[text] not in others


def test_soft_labels_come_from_the_store(run, capsys, monkeypatch):
    hard = FeedbackStore.labels

    def labels(store, soft=False):
        return {i: 0.2 + 0.6 * y if soft else y for i, y in hard(store).items()}

    monkeypatch.setattr(FeedbackStore, "labels", labels)
    spreads = []
    for soft in ((), ("--soft", "--redo")):
        assert command(main, capsys, run, *SMALL, *soft)[0] == 0
        spreads.append(float(read_weights(run / REWARDS)["reward"].std()))
    assert spreads[1] < spreads[0]


def test_a_run_that_cannot_be_learned_from_is_one_line(run, tmp_path, capsys):
    def fails(message, *arguments):
        held = sorted(
            path for path in (tmp_path / "run").rglob("*") if path.suffix in (".json", ".safetensors", ".png")
        )
        code, _, err = command(main, capsys, *arguments)
        assert code == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1, err
        now = sorted(path for path in (tmp_path / "run").rglob("*") if path.suffix in (".json", ".safetensors", ".png"))
        assert now == held

    (tmp_path / "empty").mkdir()
    fails("nowhere: not a run; accepted: a run of generate", tmp_path / "nowhere")
    fails("empty: not a run", tmp_path / "empty")
    fails("--lambda: '-1'; accepted: a number from 0 up", run, "--lambda", -1)
    fails("./nowhere: not found", run, "--clip", "./nowhere")
    store = FeedbackStore(run)
    ids = [image.id for image in store.images()]
    store.add_labels("truth", [(i, "skip") for i in ids])
    fails(f"{run}: no labels; collect them with python -m minialign.label {run}", run)
    store.add_labels("truth", [(i, "good" if i % 2 else "bad") for i in ids])
    (run / "images" / "5.png").write_bytes(b"no image")
    fails("5.png is not the image that was added", run)
    (run / "images" / "5.png").unlink()
    fails("5.png is gone", run)
    store.close()


@pytest.mark.parametrize(("verdict", "code", "message"), [
    ("bad", 2, "none of its 48 labels is good: there is nothing to learn from"),
    ("good", 0, "all labels are good: every reward will be near 1"),
])  # fmt: skip
def test_labels_of_one_kind_are_told_what_follows(verdict, code, message, run, capsys):
    store = FeedbackStore(run)
    store.add_labels("truth", [(image.id, verdict) for image in store.images()])
    store.close()
    found, out, err = command(main, capsys, run, *SMALL)
    assert found == code and message in err
    assert code or "nothing was measured" in out or "held-out labels" in out


def test_few_labels_and_a_single_prompt_are_told_what_follows(run, capsys):
    store = FeedbackStore(run)
    kept = store.images()[20].prompt
    store.add_labels("truth", [(image.id, "skip") for image in store.images() if image.prompt != kept])
    chosen = [image.id for image in store.images() if image.prompt == kept]
    store.add_labels("truth", [(i, "good" if n else "bad") for n, i in enumerate(chosen)])
    store.close()
    code, _, err = command(main, capsys, run, *SMALL)
    measured = json.loads((run / "reward" / "held_out.json").read_text())
    assert code == 0 and len(chosen) < FEWEST and measured["held_out"] == {}
    assert "3 labels are too few" in err and "one prompt only: there are no contrastive prompts" in err


def compare(run, labels=False):
    """Comparisons of the run's drawings, better ones first; without its labels unless `labels`."""
    store = FeedbackStore(run)
    good = store.labels()
    images = [image for image in store.images() if image.id in good]
    rows = [{"prompt": a.prompt, "chosen": str(a.path), "rejected": str(b.path)}
            for a in images for b in images if a.prompt == b.prompt and good[a.id] > good[b.id]]  # fmt: skip
    if not labels:
        store.database.execute("DELETE FROM labels")
    store.close()
    (run / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert import_into_run(run, run / "pairs.jsonl") == (0, len(rows))
    return len(rows)


def test_the_command_learns_from_comparisons_alone_and_says_what_that_is(run, capsys):
    number = compare(run)
    code, out, err = command(main, capsys, run, *SMALL)
    assert code == 0 and f"{number} comparisons and no label: r is only relative" in err, err
    assert "there is no auxiliary loss, for no image is labelled good" in err and err.count("warning") == 1
    measured = json.loads((run / "reward" / "held_out.json").read_text())
    assert measured["labels"] == 0 and measured["good_fraction"] is None and measured["comparisons"] == number
    assert measured["measured"].keys() == {"comparisons", "clip"}
    for part, found in measured["held_out"].items():
        assert found["labels"] == 0 and found["comparisons"] > 0
        assert measured["measured"]["comparisons"][part].keys() == {"pairs_ranked_right"}
    assert "comparisons alone" in out and "pairs ranked right" in out and "held-out comparisons" in out
    code, _, err = command(main, capsys, run)
    assert code == 0
    store = FeedbackStore(run)
    store.database.execute("UPDATE comparisons SET verdict = 'tie' WHERE image = 6 OR image > 30")
    store.close()
    code, _, err = command(main, capsys, run)
    assert code == 2 and "stage reward is out of date: the comparisons changed" in err


def test_comparisons_stand_beside_verdicts(run, capsys):
    number = compare(run, labels=True)
    code, out, err = command(main, capsys, run, *SMALL)
    assert code == 0 and "warning" not in err, err
    measured = json.loads((run / "reward" / "held_out.json").read_text())
    assert measured["labels"] == 44 and measured["comparisons"] == number
    assert measured["measured"].keys() == {"auxiliary", "plain", "clip"}
    assert any("pairs_ranked_right" in found for found in measured["measured"]["auxiliary"].values())
    assert {"accuracy", "auc"} <= measured["measured"]["auxiliary"]["new prompts"].keys()


def test_comparisons_with_another_runs_images_teach_nothing(run, tmp_path):
    store = FeedbackStore(run)
    store.add_comparison("ann", 1, tmp_path / "other", tmp_path / "other" / "images" / "0.png", "this", "left")
    assert store.preferred() == [] and len(store.comparison_rows()) == 1
    store.close()
    assert read_labelled(run, CLIP.from_pretrained(), {"soft": False, "seed": 0}).compared == {}


def test_contrastive_prompts_of_ones_own_take_the_rules_place(run, tmp_path, capsys):
    store = FeedbackStore(run)
    prompts = [image.prompt for image in store.images()]
    store.close()
    file, others = tmp_path / "own.json", ["a red house", "no house", *(f"{i} houses" for i in range(8))]
    file.write_text(json.dumps({prompts[0]: others, prompts[1]: others[:1], "a prompt of nobody": ["x"]}))
    clip, how = CLIP.from_pretrained(), {"soft": False, "seed": 0}
    ruled = read_labelled(run, clip, how)
    data = read_labelled(run, clip, how | {"contrastive": str(file)})
    embeds = {i: clip.encode_text(clip.tokenizer([text]))[0] for i, text in enumerate(others)}
    assert data.columns.shape[1] == 11 and ruled.columns.shape[1] == 8
    for i, number in ((0, 10), (1, 1)):
        row = data.columns[i].tolist()
        assert row[1 + number :] == [-1] * (10 - number)
        for place, k in enumerate(row[1 : 1 + number]):
            torch.testing.assert_close(data.texts[k], embeds[place], rtol=1e-4, atol=1e-5)
    later = [i for i, prompt in enumerate(prompts) if prompt not in prompts[:2]]
    for i in later[:5]:  # the rule's, of prompts with feedback
        assert sum(k >= 0 for k in data.columns[i].tolist()) == sum(k >= 0 for k in ruled.columns[i].tolist())
    assert command(main, capsys, run, *SMALL, "--contrastive", file)[0] == 0
    file.write_text(json.dumps({prompts[0]: others}))
    code, _, err = command(main, capsys, run)
    assert code == 2 and "stage reward is out of date: the contrastive prompts changed" in err


def test_a_prompt_is_left_out_of_its_own_contrastive_prompts(run, tmp_path, capsys):
    """TextNorm's prompt sets list the prompt itself first."""
    store = FeedbackStore(run)
    prompt = store.images()[0].prompt
    store.close()
    (tmp_path / "own.json").write_text(json.dumps({prompt: [prompt.upper(), "a red house"], "b": ["c"]}))
    assert read_contrastive(tmp_path / "own.json", [prompt]) == {prompt: ["a red house"], "b": ["c"]}
    assert "warning" in capsys.readouterr().err
    code, _, err = command(main, capsys, run, *SMALL, "--contrastive", tmp_path / "own.json")
    assert code == 0 and "prompts that stand in their own list of contrastive prompts are left out of it: 1\n" in err
    assert err.count("warning") == 1


@pytest.mark.parametrize(("content", "message"), [
    ("[]", "a JSON object is needed"),
    ("{", "not JSON"),
    ('{"a red circle": "a star"}', '\'a red circle\': "a star"; accepted: a list of other prompts'),
    ('{"a red circle": []}', "'a red circle': []; accepted: a list of other prompts"),
    ('{"a red circle": ["a star", 1]}', "accepted: a list of other prompts"),
    ('{"a red circle": ["A  red circle"]}', "'a red circle' is its own only contrastive prompt; accepted"),
    ('{"a prompt of nobody": ["x"]}', "none of its 1 prompts is one of the run's"),
])  # fmt: skip
def test_contrastive_prompts_that_cannot_be_are_one_line(run, tmp_path, capsys, content, message):
    (tmp_path / "own.json").write_text(content)
    code, _, err = command(main, capsys, run, *SMALL, "--contrastive", tmp_path / "own.json")
    assert code == 2 and message in err and "own.json" in err and err.count("\n") == 1, err
    assert not (run / "reward").exists()
