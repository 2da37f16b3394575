"""Rewards that a run does not learn: what --reward takes, how numbers come to [0,1], several with weights, the job."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers import SMALL, command, flags
from PIL import Image

from minialign import CLIP
from minialign.engine.settings import reward_terms
from minialign.evaluate.__main__ import main as evaluate
from minialign.feedback import FeedbackStore, import_into_run
from minialign.files import InputError, read_weights
from minialign.finetune.__main__ import main as finetune
from minialign.measures import area_under_curve
from minialign.models.pretrained import EMBEDDED
from minialign.models.reward import embed_images, embed_texts
from minialign.reward import REWARDS
from minialign.reward.__main__ import main
from minialign.reward.functions import call_function, load_function
from minialign.reward.given import Term, rank_within, read_terms, scale_of, to_unit, weighted
from minialign.reward.labels import split_feedback

REDNESS = """
def redness(images, prompts):
    assert len(images) == len(prompts) <= 32
    return [sum(image.resize((1, 1)).getpixel((0, 0))[:1]) / 255 for image in images]

def large(images, prompts):
    return [100 * value for value in redness(images, prompts)]
"""


@pytest.fixture
def run(labelled_run, without_matplotlib, tmp_path):
    """A run of labelled drawings beside a file of functions."""
    (tmp_path / "mine.py").write_text(REDNESS)
    return labelled_run


def cosines(run: Path) -> tuple[torch.Tensor, list[str]]:
    """CLIP's cosine of each image of a run and its prompt, not by way of a cache."""
    store, clip = FeedbackStore(run), CLIP.from_pretrained()
    images = store.images()
    store.close()
    prompts = [image.prompt for image in images]
    with torch.no_grad():
        embeds = embed_images(clip, [Image.open(image.path) for image in images]), embed_texts(clip, prompts)
    return torch.cosine_similarity(*embeds), prompts


# --------------------------------------------------------------------------------------------------------- the pieces
def test_terms_are_read_with_their_weights(tmp_path, monkeypatch):
    (tmp_path / "run" / "reward").mkdir(parents=True)
    (tmp_path / "beta=1" / "other").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = reward_terms(
        "clip-score=0.3, run/reward=2,clip-score:some/clip=.5,beta=1/other,beta=1/other=4,package.m:f=1e-2"
    )
    other = str(tmp_path / "beta=1" / "other")
    assert read_terms(text, tmp_path / "run") == [
        ("clip-score", 0.3), ("learned", 2), ("clip-score:some/clip", 0.5), (other, 1), (other, 4),
        ("package.m:f", 0.01),
    ]  # fmt: skip
    assert read_terms(None, tmp_path) == [("learned", 1)]
    assert [term.is_function for term in read_terms(text, tmp_path)] == [False] * 5 + [True]
    for wrong, message in (
        ("clip-score=0", "weight '0'; accepted: a number above 0"),
        ("clip-score=-1", "weight '-1'"),
        ("clip-score=nan", "weight 'nan'"),
        ("clip-score=much", "weight 'much'"),
        ("nowhere", "--reward nowhere: not found; accepted: learned, clip-score"),
        ("clip-score,,learned", "not found; accepted"),
        ("module:", "not found"),
    ):
        with pytest.raises(InputError, match=message):
            read_terms(wrong, tmp_path)


def test_ranks_within_a_prompt_are_counted():
    g = torch.Generator().manual_seed(0)
    score = torch.randint(5, (40,), generator=g).float()
    prompts = [f"prompt {int(i)}" for i in torch.randint(6, (40,), generator=g)]
    expected = []
    for own, prompt in zip(score.tolist(), prompts):
        same = [float(other) for other, text in zip(score, prompts) if text == prompt]
        expected.append((sum(other < own for other in same) + sum(other == own for other in same) / 2) / len(same))
    rank = rank_within(score, prompts)
    assert rank.tolist() == pytest.approx(expected)
    for prompt in set(prompts):
        rows = [i for i, text in enumerate(prompts) if text == prompt]
        assert float(rank[rows].mean()) == pytest.approx(0.5)
    assert rank_within(torch.tensor([7.0]), ["alone"]).tolist() == [0.5]


def test_numbers_come_to_the_unit_interval_in_their_own_order():
    raw, prompts = torch.linspace(-3, 5, 40).double(), ["a", "b"] * 20
    function, clip = Term("mine.py:f", 1.0), Term("clip-score", 1.0)
    labels = {i: float(i % 7 > 3 or i > 30) for i in range(0, 40)}
    for term in (function, clip):
        scale = scale_of(term, raw, prompts, labels)
        assert scale["how"] == "fitted to the labels"
        expected = [1 / (1 + math.exp(-scale["a"] * x - scale["b"])) for x in raw.tolist()]
        found = to_unit(raw, prompts, scale)
        assert found.tolist() == pytest.approx(expected, abs=1e-6) and (found.diff() > 0).all()
        residual = sum(labels[i] - expected[i] for i in labels), sum((labels[i] - expected[i]) * raw[i] for i in labels)
        assert [float(value) for value in residual] == pytest.approx([0, 0], abs=1e-3)  # what a logistic fit solves
        few = {i: labels[i] for i in range(19)}
        assert scale_of(term, raw, prompts, few) == {"how": "rank within its prompt"}
        with pytest.raises(InputError, match="need labels to be fitted to .20 of both kinds., or several images"):
            scale_of(term, raw, [str(i) for i in range(40)], {i: 1.0 for i in range(40)})
        with pytest.raises(InputError, match="by 40 labels of the run a higher number is no better"):
            scale_of(term, -raw, prompts, labels)
    unit = (raw + 3) / 8
    assert scale_of(function, unit, prompts, labels) == {"how": "as it is"}
    assert torch.equal(to_unit(unit, prompts, {"how": "as it is"}), unit.float())
    assert scale_of(clip, unit, prompts, labels)["how"] == "fitted to the labels"  # whatever its numbers are


def test_several_rewards_are_averaged_by_their_weights():
    parts = [torch.tensor([0.0, 1.0, 0.5]), torch.tensor([1.0, 1.0, 0.1])]
    found = weighted([Term("a", 3.0), Term("b", 1.0)], parts)
    assert found.tolist() == pytest.approx([0.25, 1.0, (3 * 0.5 + 0.1) / 4])


@pytest.mark.parametrize(("body", "message"), [
    ("return [0.5]", "1 numbers for 2 images"),
    ("return [0.1, float('nan')]", "nan for .*b.png; accepted: finite numbers"),
    ("return 1 / 0", "failed on .*ZeroDivisionError: division by zero, .*bad.py:2"),
    ("return ['x', 'y']", r"failed on .*too many dimensions 'str'\)$"),
    ("raise SystemExit('no key')", "failed on .*SystemExit: no key, .*bad.py:2"),
])  # fmt: skip
def test_a_function_that_fails_is_one_line(tmp_path, body, message):
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "bad.py").write_text(f"def f(images, prompts):\n    {body}\n")
    with pytest.raises(InputError, match=message) as error:
        call_function(f"{tmp_path / 'bad.py'}:f", [tmp_path / "a.png", tmp_path / "b.png"], ["x", "y"], tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("scores-*"))


def test_a_function_is_asked_once_of_each_image_and_prompt(tmp_path):
    for i in range(40):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    code = "calls = []\ndef f(images, prompts):\n    calls.append(len(images))\n"
    code += "    assert len(calls) != 2\n    return [image.getpixel((0, 0))[0] for image in images]\n"
    (tmp_path / "mine.py").write_text(code)
    what, paths = f"{tmp_path / 'mine.py'}:f", [tmp_path / f"{i}.png" for i in range(40)]
    first = call_function(what, paths[:32] + paths[:3], ["x"] * 35, tmp_path)
    assert first.tolist() == [*range(32), 0, 1, 2]
    with pytest.raises(InputError, match="AssertionError"):  # its second call
        call_function(what, paths, ["x"] * 40, tmp_path)
    assert call_function(what, paths, ["x"] * 40, tmp_path).tolist() == list(range(40))
    assert call_function(what, paths[::-1], ["x"] * 40, tmp_path).tolist() == list(range(40))[::-1]
    module = load_function(what)[0].__globals__
    assert module["calls"] == [32, 8, 8]
    call_function(what, paths[:1], ["another prompt"], tmp_path)
    assert module["calls"] == [32, 8, 8, 1]
    file = next(tmp_path.glob("scores-*"))
    file.write_bytes(file.read_bytes()[:50])  # of a damaged file nothing is taken
    assert call_function(what, paths[:1], ["x"], tmp_path).tolist() == [0] and module["calls"][-1] == 1


# --------------------------------------------------------------------------------------------------------- the command
def test_the_clip_score_is_fitted_to_the_labels_that_are_not_held_out(run, capsys):
    code, out, err = command(main, capsys, run, "--reward", "clip-score")
    assert code == 0 and "The reward of the images is 1 x clip-score (fitted to the labels)" in out, err
    said = json.loads((run / "reward" / "held_out.json").read_text())
    (term,) = said["terms"]
    score, _ = cosines(run)
    torch.testing.assert_close(read_weights(run / REWARDS)["reward"], (term["a"] * score + term["b"]).sigmoid())
    assert set(said["measured"]) == {"given"} and not (run / "reward" / "model.safetensors").exists()
    assert said["labels"] == 44 and set(said["held_out"]) == {"known prompts", "new prompts"}
    assert said["measured"]["given"]["new prompts"].keys() >= {"auc", "accuracy", "calibration"}
    assert "reward: done before" in command(main, capsys, run)[1]  # which is remembered
    code, _, err = command(main, capsys, run, "--reward", f"clip-score:{EMBEDDED / 'clip'}=5")
    assert code == 2 and "stage reward is out of date: the reward changed; --redo" in err  # the weight did
    store = FeedbackStore(run)
    store.remove_labels()
    store.close()
    assert command(main, capsys, run, "--redo")[0] == 0
    ranks = read_weights(run / REWARDS)["reward"]
    torch.testing.assert_close(ranks, rank_within(*cosines(run)))
    assert command(main, capsys, run, "--reward", f"clip-score:{EMBEDDED / 'clip'}=2", "--redo")[0] == 0
    assert torch.equal(read_weights(run / REWARDS)["reward"], ranks)  # by another CLIP, which here is the same
    assert len(list((run / "cache").glob("features-*.safetensors"))) == 1
    code, _, err = command(main, capsys, run, "--reward", "learned")
    assert code == 2 and "no labels; collect them with python -m minialign.label" in err


def test_a_given_reward_is_measured_on_held_out_comparisons(run, capsys):
    store = FeedbackStore(run)
    good, images = store.labels(), store.images()
    pairs = [(a, b) for a in images for b in images if a.prompt == b.prompt and good.get(a.id, 0) > good.get(b.id, 1)]
    store.remove_labels()
    store.close()
    rows = [{"prompt": a.prompt, "chosen": str(a.path), "rejected": str(b.path)} for a, b in pairs]
    (run / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    import_into_run(run, run / "pairs.jsonl")
    code, out, err = command(main, capsys, run, "--reward", "clip-score")
    said = json.loads((run / "reward" / "held_out.json").read_text())
    assert code == 0 and "pairs ranked right" in out and said["comparisons"] == len(pairs), err
    compared = [(a.id - 1, b.id - 1, 1.0) for a, b in pairs]  # none of them a tie
    known = {i: images[i].prompt for i in sorted({i for pair in compared for i in pair[:2]})}
    _, split = split_feedback(known, {}, compared, 0)
    reward, subsets = read_weights(run / REWARDS)["reward"], split.keys() - {"learn"}
    assert said["held_out"].keys() == said["measured"]["given"].keys() == subsets and subsets
    for subset in subsets:
        right = [(1 + float((reward[a] - reward[b]).sign())) / 2 for a, b, _ in split[subset]]
        assert said["measured"]["given"][subset] == {"pairs_ranked_right": pytest.approx(sum(right) / len(right))}
        assert said["held_out"][subset]["comparisons"] == len(right)


def test_a_learned_reward_is_one_of_several_and_another_run_s_model_too(run, tmp_path, capsys):
    small = ("--reward-steps", 20, "--hidden", 32)
    other = Path(shutil.copytree(run, tmp_path / "other"))
    assert command(main, capsys, other, *small)[0] == 0
    learned = read_weights(other / REWARDS)["reward"].clone()
    code, _, err = command(main, capsys, run, *small, "--reward", f"learned=3,clip-score,{other / 'reward'}=4")
    assert code == 0, err
    said = json.loads((run / "reward" / "held_out.json").read_text())
    assert set(said["measured"]) == {"auxiliary", "plain", "clip", "given"} and "sha256" in said
    assert [term["how"] for term in said["terms"]] == ["as it is", "fitted to the labels", "as it is"]
    clip = (said["terms"][1]["a"] * cosines(run)[0] + said["terms"][1]["b"]).sigmoid()
    torch.testing.assert_close(read_weights(run / REWARDS)["reward"], (7 * learned + clip) / 8)
    assert command(main, capsys, other, *small, "--seed", 1, "--redo")[0] == 0
    code, _, err = command(main, capsys, run)
    assert code == 2 and "the reward changed" in err
    (other / "reward" / "model.safetensors").unlink()
    assert "model.safetensors" in command(main, capsys, run)[2]


def test_a_function_counts_by_its_content_and_runs_only_where_it_is_named(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(main, capsys, run, "--reward", "mine.py:redness")
    assert code == 0, err
    red = [Image.open(run / "images" / f"{i}.png").convert("RGB").resize((1, 1)).getpixel((0, 0))[0] for i in range(48)]
    assert (read_weights(run / REWARDS)["reward"] * 255).tolist() == pytest.approx(red, abs=1e-3)
    monkeypatch.chdir("/")
    code, _, err = command(main, capsys, run)
    assert code == 2 and "it is code, which runs only where the command names it" in err and err.count("\n") == 1
    named = ("--reward", f"{tmp_path / 'mine.py'}:redness")
    assert "done before" in command(main, capsys, run, *named)[1]
    (tmp_path / "mine.py").write_text(REDNESS + "# another content\n")
    assert "the reward changed" in command(main, capsys, run, *named)[2]
    large = f"{tmp_path / 'mine.py'}:large"  # not in [0,1], and the labels do not fit it
    code, _, err = command(main, capsys, run, "--reward", large, "--redo")
    found = json.loads((run / "reward" / "held_out.json").read_text())["terms"][0]["how"] if not code else err
    assert "fitted to the labels" in found or "a higher number is no better" in found
    (tmp_path / "ends.py").write_text("import sys\nsys.exit(0)\n")  # a script, not a module
    for wrong, message in (
        (f"{tmp_path / 'mine.py'}:none", f"no function 'none' in {tmp_path / 'mine.py'}; accepted: one of (images, "),
        ("no.such.module:f", "cannot be loaded (ModuleNotFoundError: No module named 'no'); accepted: module:function"),
        (f"{tmp_path / 'ends.py'}:f", f"cannot be loaded (SystemExit: 0, {tmp_path / 'ends.py'}:2); accepted"),
    ):
        code, _, err = command(main, capsys, run, "--reward", wrong, "--redo")
        assert code == 2 and message in err and err.count("\n") == 1


def test_after_a_mistake_the_run_is_as_usable_as_before(run, tmp_path, capsys):
    """A function that fails leaves no stage behind, and a file that cannot be read removes no result."""
    (tmp_path / "mine.py").write_text("def f(images, prompts):\n    return [0.5]\n")
    named = ("--reward", f"{tmp_path / 'mine.py'}:f")
    assert "1 numbers for 32 images" in command(main, capsys, run, *named)[2]
    (tmp_path / "mine.py").write_text("def f(images, prompts):\n    return [0.5] * len(images)\n")
    code, _, err = command(main, capsys, run, *named)  # without --redo, for nothing was done
    assert code == 0, err
    small = ("--reward-steps", 2, "--hidden", 32, "--reward", "learned", "--redo")
    assert command(main, capsys, run, *small)[0] == 0
    before = {path: path.read_bytes() for path in (run / "reward").iterdir()}
    (tmp_path / "own.json").write_text('["a red circle"]')
    code, _, err = command(main, capsys, run, *small, "--contrastive", tmp_path / "own.json")
    assert code == 2 and "own.json: a JSON object is needed, not list" in err
    assert {path: path.read_bytes() for path in (run / "reward").iterdir()} == before
    (tmp_path / "mine.py").write_text("def f(images, prompts):\n    return [0.5]\n")
    code, _, err = command(main, capsys, run, *named, "--redo")
    assert code == 2 and "1 numbers for 32 images" in err
    assert {path: path.read_bytes() for path in (run / "reward").iterdir()} == before and (run / REWARDS).is_file()
    assert "done before" in command(main, capsys, run, *small[:-1])[1]
    code, _, err = command(main, capsys, run, "--reward", shutil.copytree(run, tmp_path / "other"), "--redo")
    assert code == 2 and f"other: a run, not a reward model; accepted: {tmp_path / 'other' / 'reward'}\n" in err


def test_the_main_job_runs_by_a_function_without_a_label(without_matplotlib, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(REDNESS)
    reward = ("--reward", f"{tmp_path / 'mine.py'}:redness")
    fewer = SMALL | {"images": 16, "steps": 2, "test_images": 8}
    small = flags({key: value for key, value in fewer.items() if key != "labels"})
    code, out, err = command(finetune, capsys, tmp_path / "run", *small, *reward)
    assert code == 0 and "label: no labels; the reward of --reward needs none" in out, err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["counts"]["labels"] == 0 and results["settings"]["reward"] == reward[1]
    assert results["reward"]["terms"][0]["how"] == "as it is"
    found = results["evaluation"]["judged"]["reward"]["base"]["overall"]["value"]
    place = tmp_path / "run" / results["evaluation"]["models"]["base"]["images"] / "images"
    red = [Image.open(path).convert("RGB").resize((1, 1)).getpixel((0, 0))[0] / 255 for path in place.iterdir()]
    assert found == pytest.approx(sum(red) / len(red), abs=1e-6)
    assert "fine-tuned by a given reward" in (tmp_path / "run" / "report.html").read_text()
    assert "done before" in command(evaluate, capsys, tmp_path / "run")[1]
    code, out, _ = command(finetune, capsys, tmp_path / "run", *reward)
    assert code == 0 and out.count("done before") == 4
    code, _, err = command(finetune, capsys, tmp_path / "run", "--reward", "clip-score")
    assert code == 2 and "the reward changed" in err


def test_the_clip_score_orders_images_as_the_labels_do(run, capsys):
    code, out, err = command(main, capsys, run, "--reward", "clip-score", "--export", run.parent / "weights.csv")
    assert code == 0 and f"{run.parent / 'weights.csv'}: 48 images" in out, err
    code, _, err = command(main, capsys, run, "--export", run.parent / "weights.csv")
    assert code == 2 and "weights.csv: is there; accepted" in err
    store = FeedbackStore(run)
    labels = store.labels()
    rows = [i for i, image in enumerate(store.images()) if image.id in labels]
    truth = torch.tensor([labels[store.images()[i].id] for i in rows])
    store.close()
    assert area_under_curve(read_weights(run / REWARDS)["reward"][rows], truth) > 0.7
