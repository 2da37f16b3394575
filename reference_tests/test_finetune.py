"""Fine-tuning and the main job: unbiased draws, the right direction, bit-identical resuming, files, clear errors."""

import errno
import json
import math
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from comparisons import GOLDENS, SMALL_UNET
from safetensors import SafetensorError

from minialign import NoiseSchedule, Pipeline, RewardModel, finetune
from minialign.command import run_command
from minialign.evaluate import summary
from minialign.finetune import WEIGHTINGS, Latents, draw_by_weight, stratified_timesteps
from minialign.generate import draw_to_folder
from minialign.models.pretrained import EMBEDDED, InputError
from minialign.models.unet import UNet
from minialign.shapes.task import shapes_task
from minialign.training import Terminated, atomic, checkpoints, remove_unfinished

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
    reward_of_first: float, steps: int, folder, stop_at: int | None = None, number=signal.SIGINT, **how
) -> UNet:
    """A tiny UNet fine-tuned on two kinds of image for one prompt, +1 and -1 everywhere, weighted r and 1 - r."""
    torch.manual_seed(0)
    unet, schedule = UNet(UNET), NoiseSchedule.from_config({"prediction_type": "v_prediction"})
    context = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
    sign = torch.tensor([1.0, -1.0]).repeat(4)[:, None, None, None]
    images = Latents(sign.expand(8, 4, 4, 4), torch.full((8, 4, 4, 4), 0.01), torch.zeros(8, dtype=torch.long))
    reward = torch.where(sign.flatten() > 0, reward_of_first, 1 - reward_of_first)

    def log(row):
        if stop_at is not None and row["step"] >= stop_at:
            signal.raise_signal(number)

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
    toward = leaning(two_kinds(0.9, 150, tmp_path / "a"))
    against = leaning(two_kinds(0.1, 150, tmp_path / "b"))
    held = leaning(two_kinds(0.9, 150, tmp_path / "c", beta=10.0, batch_size=32))
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
    with pytest.raises(InputError, match="step 5: the gradient is not finite"):
        two_kinds(0.8, 10, tmp_path, peak_learning_rate=1e30)
    assert not list(tmp_path.iterdir())


def test_bfloat16_autocast_trains_float32_weights(tmp_path):
    unet = two_kinds(0.8, 4, tmp_path, dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in unet.parameters())


SMALL = finetune.EMBEDDED_DEFAULTS | {
    "seed": 0, "steps": 6, "batch_size": 8, "learning_rate": 1e-4, "sampling_steps": 4, "images": 64, "labels": 48,
    "test_images": 24, "pretrain_images": 8, "hidden": 32,
    "reward_steps": 40, "model": None, "clip": None, "dtype": "float32",
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
    assert len(list((folder / "images").iterdir())) == 64
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


@pytest.mark.parametrize("stage", ["draw_to_folder", "label", "learn_reward", "finetune_pipeline", "judge_both"])
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
from minialign import training
whole, calls = training.save_file, 0
def dies(tensors, path, *more):
    global calls
    calls += 1
    if calls == {call}:
        Path(path).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    whole(tensors, path, *more)
training.save_file = dies
from test_finetune import small_run
small_run(Path({folder!r}))
"""


@pytest.mark.parametrize("call", [1, 3])  # while the rewards are written, and the second checkpoint
def test_a_run_killed_while_it_writes_goes_on_to_the_same_weights(finished, tmp_path, call):
    folder = tmp_path / "run"
    code = KILLED.format(tests=str(Path(__file__).parent), call=call, folder=str(folder))
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


@pytest.mark.parametrize("name", ["textnorm", "advantage"])
def test_other_weightings_go_through_the_main_job(name, tmp_path):
    results = small_run(tmp_path / "run", weighting=name, tau=WEIGHTINGS[name].tau)
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
    assert "recipe" not in seen and seen["sampling_steps"] == finetune.EMBEDDED_DEFAULTS["sampling_steps"]


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
