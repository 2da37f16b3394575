"""Fine-tuning and the main job: unbiased draws, the right direction, bit-identical resuming, files, clear errors."""

import errno
import itertools
import json
import math
import shutil
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from comparisons import GOLDENS, SMALL_UNET
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from minialign import NoiseSchedule, Pipeline, RewardModel, finetune
from minialign.command import run_command
from minialign.evaluate import summary
from minialign.feedback import FeedbackStore
from minialign.finetune import WEIGHTINGS, Latents, draw_by_weight, stratified_timesteps
from minialign.generate import draw_to_folder
from minialign.models.lora import load_lora, merge_lora
from minialign.models.pretrained import EMBEDDED, InputError
from minialign.models.unet import UNet
from minialign.runs import remove_run
from minialign.shapes.task import shapes_task
from minialign.task import next_round
from minialign.training import Terminated, atomic, checkpoints, remove_unfinished, write_json

UNET = SMALL_UNET | {"sample_size": 4, "norm_num_groups": 4}


@pytest.mark.parametrize("signed", [False, True])
def test_drawing_by_weight_has_the_expectation_of_weighting_by_it(signed):
    g = torch.Generator().manual_seed(0)
    weight, f = torch.rand(50, generator=g) - 0.3 * signed, torch.randn(50, generator=g)
    weight[:10] = 0
    chosen, factor = draw_by_weight(weight, 400_000, g)
    expected, terms = (weight.double() * f).mean(), (factor * f[chosen]).double()
    spread = terms.std() / len(chosen) ** 0.5
    assert abs(terms.mean() - expected) < 4 * spread
    assert abs(f.double().mean() - expected) > 20 * spread  # uniform draws would be found out
    assert chosen.min() >= 10  # no UNet call is spent on images that weigh nothing
    assert torch.equal(factor, weight.abs().mean() * weight[chosen].sign())


def test_weightings_by_hand():
    reward = torch.tensor([0.2, 0.8, 0.5, 0.5, 0.9])
    contrast = torch.tensor([[0.1, 0.3], [0.8, 0.2], [0.5, 0.5], [0.0, 0.0], [0.9, 0.1]])
    prompts = ["a", "a", "b", "b", "c"]
    expected = {
        "reward": [0.2, 0.8, 0.5, 0.5, 0.9],
        "threshold": [0, 1, 0, 0, 1],  # tau 0.5
        "exponential": [math.exp(2 * (r - 1)) for r in (0.2, 0.8, 0.5, 0.5, 0.9)],
        "textnorm": [
            math.exp(2 * r) / (math.exp(2 * r) + sum(math.exp(2 * c) for c in row))
            for r, row in zip((0.2, 0.8, 0.5, 0.5, 0.9), contrast.tolist())
        ],
        "advantage": [-0.5, 0.5, 0, 0, 0],  # (r - mean) / std within a prompt is -1, 1: clipped to tau
    }
    assert expected.keys() == WEIGHTINGS.keys()
    for name, weighting in WEIGHTINGS.items():
        weight = weighting.weight(reward, contrast, prompts, 0.5)
        torch.testing.assert_close(weight, torch.tensor(expected[name], dtype=torch.float32), atol=1e-4, rtol=1e-4)


def test_timesteps_cover_the_schedule_evenly_and_in_any_order():
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([stratified_timesteps(1000, 8, g) for _ in range(4000)])
    assert (draws.sort(dim=1).values // 125 == torch.arange(8)).all()  # one in each eighth
    spread = 1000 / 12**0.5 / 4000**0.5  # the standard deviation of the mean of as many uniform draws
    assert (abs(draws.double().mean(0) - 499.5) < 4 * spread).all()  # whichever row, any time is as likely
    assert draws.min() == 0 and draws.max() == 999


def two_kinds(
    reward_of_first: float,
    steps: int,
    folder,
    stop_at: int | None = None,
    number=signal.SIGINT,
    *,
    prediction_type="v_prediction",
    reward_scale=1.0,
    checkpointing=False,
    compiled=False,
    names=(),
    poison_from: int | None = None,
    each=lambda unet: None,
    rows=lambda row: None,
    **how,
) -> UNet:
    """A tiny UNet fine-tuned on two kinds of image for one prompt, +1 and -1 everywhere, weighted r and 1 - r.

    `each` is called with it before every step, `rows` with what is logged; from step `poison_from` on it says nan.
    """
    torch.manual_seed(0)
    unet, schedule = UNet(UNET), NoiseSchedule.from_config({"prediction_type": prediction_type})
    unet.checkpointing = checkpointing
    if compiled:
        unet.compile(backend="aot_eager")
    context = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
    sign = torch.tensor([1.0, -1.0]).repeat(4)[:, None, None, None]
    images = Latents(sign.expand(8, 4, 4, 4), torch.full((8, 4, 4, 4), 0.01), torch.zeros(8, dtype=torch.long), names)
    reward = torch.where(sign.flatten() > 0, reward_of_first, 1 - reward_of_first) * reward_scale
    calls = itertools.count()

    def log(row):
        rows(row)
        if stop_at is not None and row["step"] >= stop_at:
            if number == signal.SIGINT:  # which a shell's background jobs ignore
                raise KeyboardInterrupt
            signal.raise_signal(number)

    unet.register_forward_pre_hook(lambda unet, inputs: each(unet))
    unet.register_forward_hook(
        lambda unet, inputs, out: out * torch.nan if next(calls) >= (poison_from or math.inf) else out
    )
    settings = {"beta": 0.0, "batch_size": 8, "peak_learning_rate": 3e-3, "checkpoint_every": 5} | how
    finetune.finetune(unet, schedule, (context,), images, reward, images, folder, steps=steps, log=log, **settings)
    return unet


def leaning(unet: UNet) -> float:
    """The mean of x_0 predicted at the last timestep, from noise alone: positive for the first kind."""
    context = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))[:1].expand(32, 5, 6)
    noise = torch.randn(32, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return float(-unet(noise, torch.full((32,), 999), context).mean())  # v = -x_0 where abar is 0


def test_finetuning_moves_toward_what_is_rewarded(tmp_path):
    how = {"checkpoint_every": 100, "peak_learning_rate": 1e-2}
    toward = leaning(two_kinds(0.9, 60, tmp_path / "a", **how))
    against = leaning(two_kinds(0.1, 60, tmp_path / "b", **how))
    held = leaning(two_kinds(0.9, 60, tmp_path / "c", beta=10.0, batch_size=32, **how))
    # the optimum's mean is r - (1 - r): 0.8 and -0.8; the pre-training term pulls to an even mixture
    assert toward > 0.5 and against < -0.5 and abs(held) < 0.4


def test_a_resumed_finetuning_is_bit_identical(tmp_path):
    whole = two_kinds(0.8, 20, tmp_path / "whole", beta=0.5)
    with pytest.raises(KeyboardInterrupt):
        two_kinds(0.8, 20, tmp_path / "parts", stop_at=10, beta=0.5)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["step-5"]
    resumed = two_kinds(0.8, 20, tmp_path / "parts", beta=0.5)
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)


def test_sigterm_saves_and_ends(tmp_path):
    whole = two_kinds(0.8, 20, tmp_path / "whole", beta=0.5)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated, match="step 11"):  # asked while the tenth was logged
        two_kinds(0.8, 20, tmp_path / "parts", stop_at=10, number=signal.SIGTERM, beta=0.5, checkpoint_every=15)
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in checkpoints(tmp_path / "parts")] == ["step-11"]
    resumed = two_kinds(0.8, 20, tmp_path / "parts", beta=0.5)
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)
    with pytest.raises(Terminated, match="step 10, which is saved"):  # at the last step it is not forgotten
        two_kinds(0.8, 10, tmp_path / "last", stop_at=10, number=signal.SIGTERM)


def test_weights_that_are_not_finite_are_not_kept(tmp_path):
    with pytest.raises(InputError, match="step 2: the loss is not finite; .* checkpoint: none; the batch: image "):
        two_kinds(0.8, 10, tmp_path, peak_learning_rate=1e30)
    assert not list(tmp_path.iterdir())


SMALL = finetune.EMBEDDED_DEFAULTS | {
    "seed": 0, "steps": 6, "batch_size": 8, "learning_rate": 1e-4, "sampling_steps": 2, "images": 32, "labels": 24,
    "test_images": 24, "pretrain_images": 8, "hidden": 32,
    "reward_steps": 20, "model": None, "clip": None, "dtype": "float32",
    "checkpoint_every": 3, "weighting": "reward", "tau": 1,
}  # fmt: skip


def small_run(folder, **changes):
    settings = SMALL | changes
    numbers = ("images", "labels", "test_images", "pretrain_images", "seed")
    task = shapes_task(*(settings[key] for key in numbers))
    return finetune.run(settings, task, folder, torch.device("cpu"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "shapes"
    return folder, small_run(folder)


def test_the_main_job_leaves_what_it_promises(finished):
    folder, results = finished
    assert json.loads((folder / "results.json").read_text()) == results
    groups = {"overall", "count", "color", "background", "combination", "seen", "unseen"}
    for side in ("before", "after"):
        assert set(results["alignment"][side]) == set(results["alignment"]["ci95"][side]) == groups
        assert all(0 <= value <= 1 for value in results["alignment"][side].values())
        assert results["fidelity"][side] >= 0 and "diversity" in results  # no prompt is drawn twice in so few
    assert {"accuracy", "auc", "clip_score_auc"} <= set(results["reward"])
    assert {"generate", "label", "reward", "finetune", "evaluate", "total"} == set(results["seconds"])
    assert len(list((folder / "images").iterdir())) == 32
    card = (folder / "model" / "README.md").read_text()
    assert card.startswith("---\nlicense: ") and f"{results['alignment']['after']['overall']:8.1%}" in card
    assert "| steps | 6 |" in card and "minialign's embedded shapes checkpoint" in card
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["step-3", "step-6"]
    assert not list(folder.rglob("*.tmp"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"reward", "finetune"}
    before, after = Pipeline.from_pretrained(), Pipeline.from_pretrained(folder / "model")
    same = [torch.equal(a, b) for a, b in zip(before.unet.parameters(), after.unet.parameters())]
    assert not any(same)
    for part in ("vae", "text_encoder"):  # frozen
        pairs = zip(getattr(before, part).parameters(), getattr(after, part).parameters())
        assert all(torch.equal(a, b) for a, b in pairs)
    assert RewardModel.from_pretrained(folder / "reward").config["width"] == 64
    assert "simulated annotator" in summary(results)


def test_a_finished_run_is_not_done_again(finished, monkeypatch):
    folder, results = finished
    for name in ("draw_to_folder", "label", "learn_reward", "finetune_pipeline", "judge_both"):
        monkeypatch.setattr(finetune, name, None)  # calling it would fail
    card = folder / "model" / "README.md"
    card.write_text(card.read_text().replace("license: other", "license: mit"))  # its maker fills it in
    assert small_run(folder) == results and "license: mit" in card.read_text()
    with pytest.raises(InputError, match="was begun with beta=0.03, not 0.5"):
        small_run(folder, beta=0.5)
    assert small_run(folder, checkpoint_every=5)["alignment"] == results["alignment"]  # does not change the result
    assert small_run(folder) == results
    with finetune.locked(folder), pytest.raises(InputError, match="another process is at work on this run"):
        small_run(folder)


def test_a_half_drawn_batch_is_drawn_again_whole(tmp_path, monkeypatch):
    pipe, sizes = Pipeline.from_pretrained(), []
    items, how = [("a red circle", i) for i in range(6)], {"steps": 2, "guidance": 2.0, "batch": 4, "title": "draw"}
    paths = draw_to_folder(pipe, items, tmp_path, **how)
    content = [path.read_bytes() for path in paths]
    paths[2].unlink()
    whole = pipe.generate
    monkeypatch.setattr(pipe, "generate", lambda prompts, **how: sizes.append(len(prompts)) or whole(prompts, **how))
    draw_to_folder(pipe, items, tmp_path, **how)
    assert sizes == [4] and content == [path.read_bytes() for path in paths]


def test_what_a_kill_left_is_put_right(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "part") as temporary:
        temporary.mkdir()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    for name in (".model.12.old", ".gone.12.tmp", ".there.12.old", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "there"]
    assert (tmp_path / "there" / "file").read_text() == "there"


class Recorder(torch.nn.Module):
    """Notes the contexts it is called with."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.ones(())), []

    def forward(self, x, t, context):
        self.seen.append(context)
        return self.weight * x


def test_a_tenth_of_the_prompts_is_left_out(tmp_path):
    unet, images = Recorder(), Latents(torch.zeros(4, 1, 2, 2), torch.ones(4, 1, 2, 2), torch.tensor([0, 1, 0, 1]))
    context = torch.arange(3.0)[:, None, None].expand(3, 2, 1)
    finetune.finetune(
        unet, NoiseSchedule.from_config({}), (context,), images, torch.ones(4), None, tmp_path,
        steps=50, beta=0.0, batch_size=16, peak_learning_rate=1e-3,
    )  # fmt: skip
    rows = torch.cat(unet.seen)[:, 0, 0]
    share = [(rows == i).float().mean().item() for i in range(3)]
    assert abs(share[2] - 0.1) < 0.04 and abs(share[0] - 0.45) < 0.06  # three standard deviations, and the rest even


@pytest.mark.parametrize(
    "stage",
    [
        "draw_to_folder",
        "finetune_pipeline",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("label", "learn_reward", "judge_both")),
    ],
)
def test_a_run_that_died_in_a_stage_goes_on_to_the_same_weights(finished, tmp_path, monkeypatch, stage):
    whole = getattr(finetune, stage)

    def dies(*args, **kwargs):
        whole(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune, stage, dies)
        small_run(tmp_path / "run")
    results = small_run(tmp_path / "run")
    for key in ("alignment", "fidelity", "diversity", "reward"):
        assert results[key] == finished[1][key]
    unets = [Pipeline.from_pretrained(folder / "model").unet for folder in (finished[0], tmp_path / "run")]
    assert all(torch.equal(a, b) for a, b in zip(unets[0].parameters(), unets[1].parameters()))


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import safetensors.torch
from minialign import training
place = {place}
whole, calls = place.{name}, 0
def dies(*args, **kwargs):
    global calls
    calls += 1
    written = whole(*args, **kwargs)
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return written
place.{name} = dies
from test_finetune import small_run
small_run(Path({folder!r}))
"""


@pytest.mark.parametrize(
    "place, name, call",
    [("training", "save_file", 1), ("safetensors.torch", "save", 2)],
    ids=["rewards", "second checkpoint"],
)
def test_a_run_killed_while_it_writes_goes_on_to_the_same_weights(finished, tmp_path, place, name, call):
    folder = tmp_path / "run"
    tests = str(Path(__file__).parent)
    code = KILLED.format(tests=tests, place=place, name=name, call=call, folder=str(folder))
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert killed.returncode == -signal.SIGKILL and list(folder.rglob(".*.tmp"))
    results = small_run(folder)
    assert not list(folder.rglob(".*.tmp")) and results["interruptions"] == 1
    assert results["alignment"] == finished[1]["alignment"]
    unets = [Pipeline.from_pretrained(path / "model").unet for path in (finished[0], folder)]
    assert all(torch.equal(a, b) for a, b in zip(unets[0].parameters(), unets[1].parameters()))
    logs = [(path / "metrics.jsonl").read_text() for path in (finished[0], folder)]
    assert logs[0] == logs[1]


def command(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["finetune", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        run_command(finetune.main)
    return stop.value.code, capsys.readouterr().err


def own_images(folder, good: bool = True):
    """A label file beside a few images drawn by the embedded pipeline."""
    folder.mkdir(exist_ok=True)
    prompts = ["a red circle", "two blue stars on the sand", "a square at night"] * 4
    lines = []
    for i, image in enumerate(Pipeline.from_pretrained().generate(prompts, steps=2, guidance=2.0)):
        image.save(folder / f"{i}.png")
        label = "good" if good and i % 3 == i % 2 else "bad"
        lines.append(json.dumps({"prompt": prompts[i], "image": f"{i}.png", "label": label}))
    (folder / "labels.jsonl").write_text("\n".join(lines))
    return folder / "labels.jsonl"


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    none_good = own_images(tmp_path / "none_good", good=False)
    unreadable = own_images(tmp_path / "unreadable")
    (tmp_path / "unreadable" / "3.png").write_bytes(b"no image")
    (tmp_path / "file").write_text("")
    clip = ("--clip", EMBEDDED / "clip", "--out", "run")
    cases = [
        (("--steps", 0), "--steps: '0'; accepted: a whole number from 1 up"),
        (("--beta", -1), "--beta: '-1'; accepted: a number from 0 up"),
        (("--beta", "nan"), "--beta: 'nan'; accepted"),
        (("--batch-size", "many"), "--batch-size: 'many'; accepted: a whole number from 2 up"),
        (("--learning-rate", 2), "--learning-rate: '2'; accepted: a number from 0 to 1"),
        (("--weighting", "best"), "--weighting: invalid choice: 'best'"),
        (("--tau", 0), "--tau: '0'; accepted: a number from 1e-06 up"),
        (("--tau", 1), "--tau: --weighting reward has none"),
        (("--recipe", "mine"), "--recipe: invalid choice: 'mine'"),
        (("--dtype", "float8"), "--dtype: invalid choice: 'float8'"),
        (("--device", "abacus"), "--device abacus: cannot be used"),
        (("--wings",), "unrecognized arguments: --wings"),
        (("--out", "file"), "--out file: not a folder that can be written"),
        (("--out", "file/run"), "--out file/run: not a folder that can be written"),
        (("--model", "x"), "--model and --feedback go together"),
        (("--model", "no/such", "--feedback", unreadable.parent / "none.csv", *clip), "none.csv: cannot be read"),
        (("--model", "./nowhere", "--feedback", none_good, *clip), "is labelled good"),
        (("--model", EMBEDDED, "--feedback", unreadable, *clip), "3.png cannot be read"),
    ]
    fine = own_images(tmp_path / "fine")
    no_tokenizer = shutil.copytree(EMBEDDED, tmp_path / "no_tokenizer")
    shutil.rmtree(no_tokenizer / "tokenizer")
    cases += [
        (("--model", "./nowhere", "--feedback", fine, *clip), "./nowhere: not found"),
        (("--model", "someone/nothing", "--feedback", fine, *clip), "someone/nothing: neither a folder nor a hub id"),
        (("--model", EMBEDDED, "--feedback", fine, "--clip", "./c", "--out", "run"), "./c: not found"),
        (("--fresh", "--out", "fine"), "--out fine: holds files that are not a run's"),
        (("--out", EMBEDDED / "clip"), "holds files that are not a run's"),  # which has a config.json
        (("--out", "long" * 100), "cannot be used (File name too long)"),
        (("--device", "meta"), "--device meta: cannot be used"),
        (("--steps", "9" * 400), "accepted: a whole number from 1 up"),
        (("--model", no_tokenizer, "--feedback", fine, *clip), "tokenizer.json: cannot be read"),
    ]
    held = sorted(path.name for path in tmp_path.rglob("*"))
    for arguments, message in cases:
        code, err = command(monkeypatch, capsys, *arguments)
        assert code == 2 and message in err and err.count("\n") == 1, (arguments, err)
        assert err.startswith("error: ")
    assert sorted(path.name for path in tmp_path.rglob("*")) == held


@pytest.mark.slow
@pytest.mark.parametrize("name", ["textnorm", "advantage"])
def test_other_weightings_go_through_the_main_job(name, tmp_path):
    results = small_run(tmp_path / "run", weighting=name, tau=WEIGHTINGS[name].tau, images=64)
    assert results["settings"]["weighting"] == name


def test_weights_that_are_all_zero_are_refused(tmp_path):
    with pytest.raises(InputError, match="--weighting threshold --tau 2: no image weighs anything"):
        small_run(tmp_path / "run", weighting="threshold", tau=2)


def test_the_recipe_stands_behind_what_is_given(monkeypatch):
    seen = {}
    monkeypatch.setattr(finetune, "run", lambda settings, *rest: seen.update(settings) or {"seconds": {"total": 0}})
    monkeypatch.setattr(finetune, "summary", lambda results: "")
    monkeypatch.setattr("minialign.report.write_report", lambda folder: folder)
    monkeypatch.setattr(sys, "argv", ["finetune", "--recipe", "paper", "--steps", "7", "--weighting", "exponential"])
    finetune.main()
    assert (seen["batch_size"], seen["pretrain_share"], seen["learning_rate"], seen["beta"]) == (512, 0.5, 1e-5, 1.0)
    assert (seen["steps"], seen["weighting"], seen["tau"], seen["dtype"]) == (7, "exponential", 0.2, "bfloat16")
    assert seen["recipe"] == "paper" and seen["sampling_steps"] == finetune.EMBEDDED_DEFAULTS["sampling_steps"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "a.png"),
        SafetensorError("I/O error: File too large"),
        sqlite3.OperationalError("database or disk is full"),
    ],
)
def test_a_full_disk_is_one_line(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.startswith("error: cannot be written: ") and line.count("\n") == 1


@pytest.mark.parametrize(
    "error", [OSError(errno.EACCES, "Permission denied"), sqlite3.OperationalError("no such table")]
)
def test_other_failures_are_not_taken_for_a_full_disk(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        run_command(main)


def test_sigterm_ends_the_command_as_shells_expect(capsys):
    def main():
        raise Terminated("SIGTERM at step 3, which is saved")

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 143 and "step 3" in capsys.readouterr().err


def diffusers_pipeline(folder):
    """A tiny pipeline and CLIP on random weights, saved by diffusers and transformers themselves."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(GOLDENS / "tokenizer")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tower = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tower | ends | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    vae = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(**UNET | {"cross_attention_dim": 12, "sample_size": 16}),
        vae=diffusers.AutoencoderKL(**vae, block_out_channels=[8, 8], norm_num_groups=4, sample_size=32),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)),
        tokenizer=tokenizer,
        scheduler=diffusers.PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "model")
    vision = tower | {"image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder / "clip")
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder / "clip")
    return folder / "model", folder / "clip"


@pytest.mark.parametrize("source", ["embedded", "diffusers", "xl"])
def test_own_images_go_through_the_same_code(source, tmp_path, monkeypatch, capsys):
    model, clip = (EMBEDDED, EMBEDDED / "clip") if source != "diffusers" else diffusers_pipeline(tmp_path)
    if source == "xl":
        model = tmp_path / "xl"
        pytest.importorskip("test_checkpoints").diffusers_pipeline("xl").save_pretrained(model)
    labels = own_images(tmp_path / "images")
    small = {"sampling_steps": 2, "test_images": 6, "hidden": 16, "reward_steps": 20}
    monkeypatch.setattr(finetune, "OWN_DEFAULTS", finetune.OWN_DEFAULTS | small)
    arguments = ["--model", model, "--clip", clip, "--feedback", labels, "--out", tmp_path / "run"]
    code, err = command(monkeypatch, capsys, *arguments, "--steps", 3, "--batch-size", 4)
    assert code == 0, err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["judge"] == "reward model" and results["counts"]["labels"] == 12
    assert set(results["alignment"]["before"]) == {"overall", "seen"}
    assert (tmp_path / "run" / "report.html").exists()
    if source == "xl":
        learned, base = (Pipeline.from_pretrained(place).unet.state_dict() for place in (tmp_path / "run/model", model))
        assert not torch.equal(learned["add_embedding.linear_1.weight"], base["add_embedding.linear_1.weight"])
    elif source == "diffusers":  # and it draws the same with the weights that come out
        import diffusers

        peer = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "model", safety_checker=None)
        pipe = Pipeline.from_pretrained(tmp_path / "run" / "model")
        latents = pipe.noise([1])
        how = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
        theirs = peer("a red circle", latents=latents, **how).images[0] * 255
        mine = pipe.generate("a red circle", steps=4, guidance=3.0, latents=latents)[0]
        assert np.abs(theirs - np.asarray(mine, float)).max() <= 1
    else:
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
        bad = ["--model", "./nowhere", *arguments[2:]]
        code, _ = command(monkeypatch, capsys, *bad, "--steps", 4, "--batch-size", 4, "--fresh")
        assert code == 2 and before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
        with open(labels, "a") as file:
            file.write("\n" + labels.read_text().splitlines()[0])
        code, err = command(monkeypatch, capsys, *arguments, "--steps", 3, "--batch-size", 4)
        assert code == 2 and "was begun with feedback_crc32=" in err
        inside = ["--model", tmp_path / "run" / "model", *arguments[2:]]  # a second round, into the first one's folder
        code, err = command(monkeypatch, capsys, *inside, "--fresh")
        assert code == 2 and "model, which this run reads" in err and (tmp_path / "run" / "model" / "unet").exists()
        code, _ = command(monkeypatch, capsys, *arguments, "--steps", 4, "--batch-size", 4, "--fresh")
        assert code == 0 and json.loads((tmp_path / "run" / "results.json").read_text())["settings"]["steps"] == 4


# ------------------------------------------------------------------------------------------- what the settings change
def weights(unet: UNet) -> list[torch.Tensor]:
    return [p.detach().clone() for p in unet.parameters()]


def apart(a: UNet, b: UNet) -> float:
    """How far two networks' weights are apart, beside how far the first is from its beginning."""
    torch.manual_seed(0)
    start = UNet(UNET)

    def distance(a: UNet, b: UNet) -> float:
        pairs = zip(a.parameters(), b.parameters())
        return math.sqrt(sum(float((p - q).detach().double().square().sum()) for p, q in pairs))

    return distance(a, b) / distance(a, start)


SHORT: dict = {"steps": 10, "beta": 0.5, "checkpoint_every": 10}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return two_kinds(0.8, folder=tmp_path_factory.mktemp("plain"), **SHORT)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.2), (torch.float16, 0.1)])
def test_half_precision_trains_float32_weights_to_the_same_place(plain, tmp_path, dtype, tolerance):
    unet = two_kinds(0.8, folder=tmp_path, dtype=dtype, **SHORT)
    assert all(p.dtype == torch.float32 for p in unet.parameters())
    assert 0 < apart(plain, unet) < tolerance


def test_float16_leaves_out_steps_that_overflow_and_scales_less(tmp_path):
    """A loss times 2^16 overflows: the first steps change nothing but the scale, which resuming keeps."""
    tensors = {}
    for steps in (5, 10):
        two_kinds(0.8, steps, tmp_path, dtype=torch.float16, beta=0.0, checkpoint_every=5, reward_scale=1e4)
        (shard,) = (tmp_path / f"step-{steps}").glob("*.safetensors")
        tensors[steps] = load_file(shard)
    scale = [tensors[steps]["scaler"][0].item() for steps in (5, 10)]
    assert scale[0] < 2**16 and scale[1] <= scale[0]
    assert tensors[5]["optimizer.step"] < 5 or tensors[10]["optimizer.step"] < 10


def test_block_wise_recomputation_changes_rounding_alone(plain, tmp_path):
    assert apart(plain, two_kinds(0.8, folder=tmp_path, checkpointing=True, **SHORT)) < 1e-3


@pytest.mark.slow
def test_compilation_changes_rounding_alone(plain, tmp_path):
    torch.compiler.reset()
    assert apart(plain, two_kinds(0.8, folder=tmp_path, compiled=True, **SHORT)) < 1e-2


def test_the_average_of_the_weights_is_left_in_the_end(plain, tmp_path):
    seen: list[list[torch.Tensor]] = []
    unet = two_kinds(0.8, folder=tmp_path, ema=0.5, each=lambda unet: seen.append(weights(unet)), **SHORT)
    average = seen[0]  # before the first step
    for step, after in enumerate([*seen[1:], weights(plain)]):
        decay = min(0.5, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * b for a, b in zip(average, after)]
    for a, b in zip(average, unet.parameters()):
        torch.testing.assert_close(a, b.detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_are_those_of_the_paper(prediction_type):
    schedule = NoiseSchedule.from_config({"prediction_type": prediction_type})
    t = torch.arange(1000)
    abar = schedule.alphas_cumprod.double()
    snr = abar / (1 - abar)
    expected = snr.clamp(max=5) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
    torch.testing.assert_close(finetune.min_snr_weight(schedule, t, 5.0).double(), expected, rtol=1e-4, atol=1e-6)


def test_min_snr_and_noise_offset_reach_the_loss(plain, tmp_path):
    """Where one weight serves every timestep, the loss is that many times the plain one; the noise has its offset."""
    rows: dict[str, list] = {}
    for name, how in {"plain": {}, "none": {"min_snr": 1e9}, "some": {"min_snr": 1e-9}}.items():
        log = rows.setdefault(name, []).append
        two_kinds(0.8, folder=tmp_path / name, rows=log, prediction_type="epsilon", **SHORT | how)
    assert rows["plain"][0]["loss"] == pytest.approx(rows["none"][0]["loss"], rel=1e-5)
    assert rows["some"][0]["loss"] < 1e-4 * rows["plain"][0]["loss"]

    class Keeps(Recorder):
        def forward(self, x, t, context):
            self.seen.append(x)
            return self.weight * x

    unet, images = Keeps(), Latents(torch.zeros(4, 2, 8, 8), torch.zeros(4, 2, 8, 8), torch.zeros(4).long())
    finetune.finetune(
        unet, NoiseSchedule.from_config({"trained_betas": [1.0]}), (torch.zeros(2, 2, 1),), images, torch.ones(4), None,
        tmp_path / "offset", steps=40, beta=0.0, batch_size=16, peak_learning_rate=1e-9, noise_offset=0.5,
    )  # fmt: skip
    noise = torch.cat(unet.seen)  # with abar = 0, x_t is the noise alone
    variance = noise.mean((2, 3)).var().item()  # of a channel's mean: 0.5^2 more than of 64 independent values
    assert variance == pytest.approx(0.25 + 1 / 64, rel=0.15)


def test_a_loss_that_is_not_finite_names_the_batch_and_the_last_good_checkpoint(tmp_path):
    with pytest.raises(InputError) as error:
        two_kinds(0.8, 40, tmp_path, names=[f"{i}.png" for i in range(8)], poison_from=23)
    message = str(error.value)
    assert message.startswith("step 24: the loss is not finite") and str(tmp_path / "step-20") in message
    names = message.split("the batch: ")[1].split(", ")
    assert names and set(names) <= {f"{i}.png" for i in range(8)}
    assert [path.name for path in checkpoints(tmp_path)] == ["step-15", "step-20"]


READING = ("item", "cpu", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_is_read_from_the_device_between_logged_steps(tmp_path, monkeypatch, dtype):
    """Each reading makes the host wait for a GPU. Counted by name and by the operation that copies a scalar."""
    counts: list[int] = []

    class Scalars(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if counts and function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                counts[-1] += 1
            return function(*arguments, **keywords or {})

    def counting(whole):
        def call(self, *arguments, **keywords):
            rows = self.dtype == torch.int64 and whole.__name__ in ("cpu", "numpy")  # which are drawn on the host
            if counts and not rows:
                counts[-1] += 1
            return whole(self, *arguments, **keywords)

        return call

    for name in READING:
        monkeypatch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name)))
    with Scalars():
        how = {"each": lambda unet: counts.append(0), "checkpoint_every": 100, "ema": 0.9, "min_snr": 5.0}
        two_kinds(0.8, 25, tmp_path, beta=0.5, dtype=dtype, validate_every=0, **how)
    assert len(counts) == 25 and counts[9] > 0 and counts[19] > 0
    assert sum(counts[:9]) + sum(counts[10:19]) + sum(counts[20:24]) == 0, counts


# --------------------------------------------------------------------------------------- the command at a larger scale
def pretraining_pairs(folder, number=6):
    """A folder in the hub's imagefolder convention."""
    folder.mkdir()
    rows = []
    for i in range(number):
        drawn = np.random.default_rng(i).integers(0, 255, (80, 100, 3), dtype=np.uint8)
        Image.fromarray(drawn).save(folder / f"{i}.jpg")
        rows.append(json.dumps({"file_name": f"{i}.jpg", "text": f"noise number {i % 3}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def small_own(monkeypatch):
    small = {"sampling_steps": 2, "test_images": 6, "hidden": 16, "reward_steps": 20, "steps": 4, "batch_size": 8}
    monkeypatch.setattr(finetune, "OWN_DEFAULTS", finetune.OWN_DEFAULTS | small)


def test_rounds_with_pairs_from_a_folder_adapters_and_everything_switched_on(tmp_path, monkeypatch, capsys, small_own):
    labels, pairs = own_images(tmp_path / "images"), pretraining_pairs(tmp_path / "pairs")
    base = ["--model", EMBEDDED, "--clip", EMBEDDED / "clip", "--feedback", labels, "--pretrain", pairs]
    more = ["--lora", 2, "--dtype", "bfloat16", "--accumulate", 2, "--gradient-checkpointing", "--ema", 0.9]
    more += ["--min-snr", 5, "--noise-offset", 0.1, "--lr-schedule", "linear", "--warmup", 0, "--validate-every", 2]
    out, cache = tmp_path / "run", tmp_path / "cache"
    code, err = command(monkeypatch, capsys, *base, *more, "--out", out, "--cache", cache, "--rounds", 2)
    assert code == 0, err
    results = json.loads((out / "results.json").read_text())
    second = json.loads((out / "round-2" / "results.json").read_text())
    assert [one["alignment"] for one in results["rounds"]] == [results["alignment"], second["alignment"]]
    assert second["alignment"]["before"] == results["alignment"]["after"]  # the same model, prompts and noise
    assert second["counts"] == {"images": 12, "labels": 0, "evaluated": 6}
    rewards = [load_file(place / "reward" / "model.safetensors") for place in (out, out / "round-2")]
    assert all(torch.equal(rewards[0][key], rewards[1][key]) for key in rewards[0])  # nobody labelled anew
    page = (out / "report.html").read_text()
    assert (
        "<h2>Rounds</h2>" in page
        and "round-2/report.html" in page
        and all(flag in page for flag in ("--lora 2", "--rounds 2", "--warmup 0"))
    )
    assert (out / "round-2" / "report.html").exists()
    assert [path.name for path in sorted((out / "validation").iterdir())] == ["step-2.png", "step-4.png"]
    assert Image.open(out / "validation" / "step-2.png").size == (4 * 64, 2 * 64)
    # the adapters on the base model are the model that was judged
    merged, model = Pipeline.from_pretrained().unet, Pipeline.from_pretrained(out / "model").unet
    load_lora(merged, out / "lora.safetensors")
    merge_lora(merged)
    for (name, a), b in zip(merged.named_parameters(), model.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)
    assert (out / "skipped.jsonl").read_text() == ""
    # a run with the same cache encodes no image, and begun with other settings says so
    monkeypatch.setattr(Pipeline, "encode_images", None)
    again = [*base, *more, "--out", tmp_path / "again", "--cache", cache]
    code, err = command(monkeypatch, capsys, *again)
    assert code == 0, err
    assert json.loads((tmp_path / "again" / "results.json").read_text())["alignment"] == results["alignment"]
    code, err = command(monkeypatch, capsys, *again, "--min-snr", 4)
    assert code == 2 and "was begun with min_snr=5.0, not 4.0" in err
    code, err = command(monkeypatch, capsys, *again, "--accumulate", 1, "--keep", 5)  # these may change
    assert code == 0, err


def test_feedback_of_a_run_is_taken_with_its_unlabelled_images(finished, tmp_path, monkeypatch, capsys, small_own):
    run = finished[0]
    arguments = ["--model", EMBEDDED, "--clip", EMBEDDED / "clip", "--feedback", run, "--out", tmp_path / "run"]
    code, err = command(monkeypatch, capsys, *arguments)
    assert code == 0, err
    counts = json.loads((tmp_path / "run" / "results.json").read_text())["counts"]
    assert counts["images"] == 32 and counts["labels"] == finished[1]["counts"]["labels"]


def test_labels_of_people_are_not_deleted(tmp_path):
    store = FeedbackStore(tmp_path)
    store.add_images([("a red circle", "images/0.png", 1)])
    store.add_labels("simulated annotator", [(1, "good")])
    store.add_labels("Ada", [(1, "bad")])
    store.close()
    write_json(tmp_path / "config.json", {"minialign": "0", "settings": {}})
    with pytest.raises(InputError, match="--fresh: .*feedback.sqlite holds labels by Ada; move it away first"):
        remove_run(tmp_path)
    assert (tmp_path / "feedback.sqlite").exists() and (tmp_path / "config.json").exists()
    (tmp_path / "feedback.sqlite").unlink()
    remove_run(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_bad_pairs_and_stores_are_one_line(tmp_path, monkeypatch, capsys, small_own):
    labels, pairs = own_images(tmp_path / "images"), pretraining_pairs(tmp_path / "pairs")
    for i in range(2):
        (pairs / f"{i}.jpg").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    base = ["--model", EMBEDDED, "--clip", EMBEDDED / "clip", "--out", tmp_path / "run", "--batch-size", 8]
    cases = [
        (["--pretrain", pairs], "--pretrain: the embedded world draws its own pairs"),
        (
            [*base, "--feedback", tmp_path / "empty"],
            "has no feedback.sqlite; accepted: a run's folder, or a label file",
        ),
        ([*base, "--feedback", labels, "--pretrain", tmp_path / "none"], "none: not found"),
        ([*base, "--feedback", labels, "--pretrain", pairs], "2 of 6 images or captions cannot be used"),
        ([*base, "--feedback", labels, "--pretrain", tmp_path / "*.tar"], "*.tar: not found; accepted: a folder with"),
        ([*base, "--feedback", labels, "--rounds", 9000], "--rounds: 9000 rounds of 12 images; accepted: 100000"),
        ([*base, "--feedback", labels, "--accumulate", 9], "batch size 8: 7 rows of model images cannot be split"),
    ]
    for arguments, message in cases:
        code, err = command(monkeypatch, capsys, *arguments, *(["--fresh"] if "--out" in arguments else []))
        line = err.splitlines()[-1]
        assert code == 2 and message in line and line.startswith("error: "), err


def test_rounds_with_a_labeller_label_again(tmp_path):
    settings = SMALL | {"images": 16, "labels": 16, "steps": 2}
    task = shapes_task(*(settings[key] for key in ("images", "labels", "test_images", "pretrain_images", "seed")))
    results = finetune.run(settings, task, tmp_path / "run", torch.device("cpu"), rounds=2)
    second = json.loads((tmp_path / "run" / "round-2" / "results.json").read_text())
    assert len(results["rounds"]) == 2 and second["counts"]["labels"] > 0
    stores = [sqlite3.connect(tmp_path / "run" / place / "feedback.sqlite") for place in (".", "round-2")]
    seeds = [{seed for (seed,) in store.execute("SELECT seed FROM images")} for store in stores]
    assert len(seeds[0]) == len(seeds[1]) == 16 and not seeds[0] & seeds[1]
    again = finetune.run(settings, task, tmp_path / "run", torch.device("cpu"), rounds=2)
    assert again == results
    task = replace(task, draw=task.draw * 4000)
    with pytest.raises(InputError, match="--rounds: 2 rounds of 64000 images; accepted: 100000"):
        next_round(task, 2, 0)


def test_tensorboard_gets_what_the_metrics_get(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = finetune.Run(tmp_path).log("finetune")
    for step in (10, 20):
        log({"step": step, "loss": step / 7})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "finetune"))
    events.Reload()
    scalars = events.Scalars("loss")
    assert [event.step for event in scalars] == [10, 20]
    assert [event.value for event in scalars] == pytest.approx([10 / 7, 20 / 7])
