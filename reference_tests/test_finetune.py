"""The main job and the chain of its stages on one folder: equal results, kills, other people's files, clear errors."""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from comparisons import GOLDENS, SMALL_UNET
from helpers import SMALL, command, flags, own_images, pretraining_pairs
from PIL import Image

from minialign import Pipeline, RewardModel
from minialign.engine.checkpoints import checkpoints
from minialign.engine.run import Run, locked, opened
from minialign.engine.settings import BY_NAME, defaults
from minialign.engine.settings import command as repeated
from minialign.evaluate.__main__ import main as evaluate
from minialign.feedback import FeedbackStore, LabelFile, label_files
from minialign.files import InputError, read_weights
from minialign.finetune.__main__ import main, parse_arguments
from minialign.generate import main as generate
from minialign.label.__main__ import main as label
from minialign.label.annotated import import_run
from minialign.models.lora import load_lora, merge_lora
from minialign.models.pretrained import EMBEDDED
from minialign.reward import REWARDS
from minialign.reward.__main__ import main as reward

UNET = SMALL_UNET | {"sample_size": 4, "norm_num_groups": 4}
OWN = {"sampling_steps": 2, "test_images": 6, "hidden": 16, "reward_steps": 20, "steps": 4, "batch_size": 8}
no_figures = pytest.mark.usefixtures("without_matplotlib")  # `finished` and two other jobs draw them


def small_run(folder: Path, *more: object) -> None:
    """The main job at a small size, in this process; the same command again continues it."""
    run_main(main, folder, *(() if (folder / "stages.json").exists() else flags(SMALL)), *more)


def run_main(run, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["minialign", *map(str, arguments)])
        patch.setenv("TQDM_DISABLE", "1")
        run()


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def same_model(one: Path, other: Path) -> bool:
    unets = [Pipeline.from_pretrained(folder / "model").unet for folder in (one, other)]
    return all(torch.equal(a, b) for a, b in zip(unets[0].parameters(), unets[1].parameters()))


def same_results(one: Path, other: Path) -> bool:
    """Everything that was measured, without times and names of folders."""
    found = []
    for folder in (one, other):
        results = results_of(folder)
        evaluation = results["evaluation"]
        found.append([evaluation[key] for key in ("judged", "frechet", "cmmd", "diversity", "readable", "best_of_n")])
        found[-1] += [results["reward"][key] for key in ("measured", "labels", "sha256")]
    return found[0] == found[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "shapes"
    small_run(folder)
    return folder


# --------------------------------------------------------------------------------------------------- one folder
def test_the_main_job_leaves_what_it_promises(finished):
    results = results_of(finished)
    judged = results["evaluation"]["judged"]["simulated annotator"]
    groups = {"overall", "count", "color", "background", "combination", "seen", "new combinations", "new objects"}
    assert set(judged) == {"base", "fine-tuned"} and set(judged["base"]) == set(judged["fine-tuned"]) == groups
    assert all(0 <= entry["value"] <= 1 for entries in judged.values() for entry in entries.values())
    assert results["evaluation"]["frechet"]["base"] >= 0 and results["evaluation"]["judge"] == "simulated annotator"
    assert {"generate", "label", "reward", "finetune", "evaluate", "total"} == set(results["seconds"])
    assert results["counts"] == {"images": 32, "labels": results["counts"]["labels"], "evaluated": 24}
    assert len(list((finished / "images").iterdir())) == 32
    card = (finished / "model" / "README.md").read_text()
    assert card.startswith("---\nlicense: ") and "| steps | 6 |" in card
    assert [path.name for path in checkpoints(finished / "checkpoints")] == ["step-3", "step-6"]
    assert not list(finished.rglob("*.tmp"))
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"reward", "finetune"}
    before, after = Pipeline.from_pretrained(), Pipeline.from_pretrained(finished / "model")
    assert not any(torch.equal(a, b) for a, b in zip(before.unet.parameters(), after.unet.parameters()))
    for part in ("vae", "text_encoder"):  # frozen
        pairs = zip(getattr(before, part).parameters(), getattr(after, part).parameters())
        assert all(torch.equal(a, b) for a, b in pairs)
    assert RewardModel.from_pretrained(finished / "reward").config["width"] == 64
    assert after.world == "shapes"  # what is fine-tuned from the bundled model is of its world
    pytest.importorskip("matplotlib")
    assert (finished / "reward" / "calibration.png").exists() and "<svg" in (finished / "report.html").read_text()


@no_figures
def test_a_finished_run_is_not_done_again(finished, capsys):
    before = results_of(finished)
    times = {path: path.stat().st_mtime_ns for path in finished.rglob("*.png")}
    card = finished / "model" / "README.md"
    card.write_text(card.read_text().replace("license: other", "license: mit"))  # its maker fills it in
    code, out, err = command(main, capsys, finished, "--checkpoint-every", 5)  # does not change the result
    assert code == 0 and out.count("done before") == 5, err
    after = results_of(finished)
    assert after["evaluation"] == before["evaluation"] and "license: mit" in card.read_text()
    assert after["settings"]["checkpoint_every"] == 5
    assert times == {path: path.stat().st_mtime_ns for path in finished.rglob("*.png")}
    code, _, err = command(main, capsys, finished, "--beta", 0.5)
    assert code == 2 and "stage finetune is out of date: --beta was 0.03, now 0.5; --redo" in err
    assert command(main, capsys, finished)[0] == 0  # what was refused is not remembered
    with locked(finished):
        code, _, err = command(main, capsys, finished)
        assert code == 2 and "another process is at work on this run" in err


@no_figures
def test_the_chain_of_commands_is_the_main_job(finished, tmp_path, capsys):
    """generate, label, reward, finetune, evaluate on one folder, and the same labels through --feedback."""
    chain = tmp_path / "chain"
    given = {stage: [key for key in SMALL if stage in BY_NAME[key].stages] for stage in ("generate", "reward", "label")}
    small = {stage: flags(SMALL, *(key for key in keys)) for stage, keys in given.items()}
    assert command(generate, capsys, chain, *small["generate"])[0] == 0
    assert command(label, capsys, chain, "--annotator", *small["label"])[0] == 0
    code, out, err = command(reward, capsys, chain, *small["reward"])
    assert code == 0, err
    code, out, err = command(main, capsys, chain, *flags(SMALL))
    assert code == 0 and all(f"{stage}: done before" in out for stage in ("generate", "label", "reward")), err
    assert same_model(finished, chain) and same_results(finished, chain)
    code, out, _ = command(evaluate, capsys, chain)
    assert code == 0 and "evaluate: done before" in out
    # every image's label in a file, given to a run of its own: the same rewards, weights and results
    whole, file, fed = tmp_path / "whole", tmp_path / "labels.csv", tmp_path / "fed"
    small_run(whole, "--labels", 32)
    assert command(label, capsys, whole, "--export", file)[0] == 0
    rest = {key: value for key, value in SMALL.items() if key != "labels"}
    code, _, err = command(main, capsys, "--out", fed, "--feedback", file, *flags(rest))
    assert code == 0, err
    kept = {image.prompt for image in FeedbackStore(whole).images()}
    if len(FeedbackStore(fed).images()) == len(FeedbackStore(whole).images()):  # nothing was skipped
        assert torch.equal(read_weights(whole / REWARDS)["reward"], read_weights(fed / REWARDS)["reward"]) and kept
        assert same_model(whole, fed) and same_results(whole, fed)


@no_figures
def test_new_labels_and_changed_settings_are_told_and_redone_on_demand(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    store = FeedbackStore(run)
    store.add_labels("Anna", [(image.id, "good" if image.id % 2 else "bad") for image in store.images()])
    store.close()
    code, _, err = command(main, capsys, run)
    assert code == 2 and "stage reward is out of date: the labels changed; --redo does it again" in err
    code, out, _ = command(evaluate, capsys, run)
    assert code == 0 and "note: stage reward is out of date: the labels changed" in out
    code, out, err = command(main, capsys, run, "--redo")
    assert code == 0 and "generate: done before" in out and "evaluate: before and after" in out, err
    assert not same_model(run, finished) and results_of(run)["counts"]["labels"] == 32
    code, out, _ = command(main, capsys, run)
    assert code == 0 and out.count("done before") == 5
    assert command(evaluate, capsys, run, "--test-images-per-prompt", 2)[0] == 0  # one more comparison, kept beside
    assert len(results_of(run)["comparisons"]) == 1 and len(results_of(run)["evaluation"]["samples"]) > 4


@pytest.mark.parametrize("bundled", [True, False])
def test_the_reports_command_gives_the_settings_back(bundled):
    """Each flag alone and all at once, with values that are not the defaults."""
    usual = defaults(bundled)
    other = {}
    for name, setting in BY_NAME.items():
        if isinstance(setting.kind, tuple):
            other[name] = next(word for word in setting.kind if word != usual[name])
        elif setting.kind is bool:
            other[name] = not usual[name]
        elif setting.kind is str:
            other[name] = f"a {name} with 'quotes'"
        else:
            other[name] = next(value for value in _taken(setting.kind, "0.25", "7") if value != usual[name])
    for settings in [usual | {name: value} for name, value in other.items()] + [usual | other]:
        words = repeated(settings, bundled, "runs/my run")
        read = parse_arguments(words[3:])
        back = usual | {key: value for key, value in vars(read).items() if key in BY_NAME and value is not None}
        assert back == settings and str(read.run) == "runs/my run"


def _taken(kind, *texts: str) -> list:
    values = []
    for text in texts:
        with contextlib.suppress(argparse.ArgumentTypeError):
            values.append(kind(text))
    return values


# ------------------------------------------------------------------------------------------------------- kills
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import safetensors.torch
from minialign import files
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


@no_figures
@pytest.mark.parametrize(
    "place, name, call",
    [
        ("files", "save_file", 1),
        ("safetensors.torch", "save", 2),
        pytest.param("files", "write_json", 3, marks=pytest.mark.slow),
        pytest.param("files", "write_json", 6, marks=pytest.mark.slow),
        pytest.param("files", "save_file", 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_while_it_writes_continues_to_the_same_result(finished, tmp_path, place, name, call):
    folder = tmp_path / "run"
    tests = str(Path(__file__).parent)
    code = KILLED.format(tests=tests, place=place, name=name, call=call, folder=str(folder))
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as the tests have, for sums in one order
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, env=one_thread)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    small_run(folder)
    assert not list(folder.rglob(".*.tmp"))
    assert same_model(finished, folder) and same_results(finished, folder)
    logs = [(path / "metrics.jsonl").read_text() for path in (finished, folder)]
    assert logs[0] == logs[1]


STAGES = ("generate.sample_to_folder", "finetune.trainer.finetune_pipeline", "reward.learn", "evaluate.evaluate")


@no_figures
@pytest.mark.parametrize("stage", [STAGES[1], *(pytest.param(name, marks=pytest.mark.slow) for name in STAGES)])
def test_a_run_that_died_at_the_end_of_a_stage_continues_to_the_same_result(finished, tmp_path, monkeypatch, stage):
    module, _, name = f"minialign.{stage}".rpartition(".")
    whole = getattr(sys.modules[module], name)

    def dies(*args, **kwargs):
        whole(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sys.modules[module], name, dies)
        small_run(tmp_path / "run")
    small_run(tmp_path / "run", *flags(SMALL))
    assert same_model(finished, tmp_path / "run") and same_results(finished, tmp_path / "run")


# ------------------------------------------------------------------------------------------------------ mistakes
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    none_good = own_images(tmp_path / "none_good", good=False)
    unreadable = own_images(tmp_path / "unreadable")
    (tmp_path / "unreadable" / "3.png").write_bytes(b"no image")
    (tmp_path / "file").write_text("")
    fine = own_images(tmp_path / "fine")
    others = tmp_path / "fine" / "others.csv"
    others.write_text("prompt,image,label\na fox,0.png,good\n")
    no_tokenizer = shutil.copytree(EMBEDDED, tmp_path / "no_tokenizer")
    shutil.rmtree(no_tokenizer / "tokenizer")
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
        (("--device", "meta"), "--device meta: cannot be used"),
        (("--wings",), "--wings: no such flag"),
        (("--out", "file"), "file: not a folder that can be written"),
        (("--out", "file/run"), "file/run: not a folder that can be written"),
        (("run", "--out", "run"), "RUN and --out are the same thing"),
        (("--out", "long" * 100), "cannot be used (File name too long)"),
        (("--steps", "9" * 400), "accepted: a whole number from 1 up"),
        (("--accumulate", 99), "batch size 64: 56 rows of model images cannot be split"),
        (("--model", "./nowhere"), "./nowhere: not found"),
        (("--model", no_tokenizer, "--out", "run"), "tokenizer/vocab.json: cannot be read"),
        (("--model", EMBEDDED / "unet"), "is the unet of a pipeline alone; give the folder above"),
        (("--feedback", others), "--model: needed with --feedback"),
        (("--feedback", "fine"), "--feedback fine: a folder; to continue a run: python -m minialign.finetune fine"),
        (("--model", EMBEDDED, "--feedback", unreadable.parent / "none.csv", *clip), "none.csv: cannot be read"),
        (("--model", EMBEDDED, "--feedback", unreadable, *clip), "3.png: not an image"),
        (("--model", "someone/nothing", "--feedback", fine, *clip), "someone/nothing: neither a folder nor a hub id"),
        (("--model", no_tokenizer, "--feedback", fine, *clip), "vocab.json: cannot be read"),
        (("--model", EMBEDDED, "--feedback", fine, "--pretrain", "none", *clip), "none: not found"),
        (("--fresh", "--out", "fine"), "fine: holds files that are not a run's"),
        (("--out", EMBEDDED / "clip"), "holds files that are not a run's"),  # which has a config.json
    ]
    held = sorted(path.name for path in tmp_path.rglob("*"))
    for arguments, message in cases:
        code, _, err = command(main, capsys, *arguments)
        assert code == 2 and message in err and err.count("\n") == 1, (arguments, err)
        assert err.startswith("error: ")
        assert sorted(path.name for path in tmp_path.rglob("*")) == held, arguments
    code, _, err = command(main, capsys, "--model", EMBEDDED, "--feedback", none_good, *clip)
    assert code == 2 and "is labelled good" in err or "labels is good" in err


@no_figures
def test_what_is_refused_is_not_remembered_and_advice_can_be_followed(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    config = (run / "config.json").read_text()
    for arguments, message in (
        (("--prompts", tmp_path / "none.txt"), "none.txt: cannot be read"),
        (("--guidance", 3), "stage generate is out of date: --guidance was 2.0, now 3.0"),
    ):
        code, _, err = command(main, capsys, run, *arguments)
        assert code == 2 and message in err and json.loads(config) == json.loads((run / "config.json").read_text())
    code, _, err = command(reward, capsys, run, "--seed", 3, "--redo")
    assert code == 2 and "stage generate was made with another value: --seed was 0, now 3" in err
    card = run / "model" / "README.md"
    card.write_text("my words")
    code, _, err = command(main, capsys, run, "--guidance", 3, "--redo")
    assert code == 0 and not same_model(run, finished), err
    assert (run / "model-card.old.md").read_text() == "my words" and "Fine-tuned with" in card.read_text()


def test_a_stage_that_died_while_it_was_removed_is_not_taken_for_done(finished, tmp_path, capsys, monkeypatch):
    """Images of the old seed must not stand for those of the new one."""
    run, clean = shutil.copytree(finished, tmp_path / "run"), tmp_path / "clean"
    with monkeypatch.context() as patch:
        patch.setattr("minialign.engine.run.remove_sampled", lambda folder: sys.exit(9))
        assert command(generate, capsys, run, "--seed", 9, "--images", 8, "--redo")[0] == 9
    assert command(generate, capsys, run, "--seed", 9, "--images", 8)[0] == 2  # neither done nor continued
    for folder, redo in ((run, ["--redo"]), (clean, [])):
        code, _, err = command(generate, capsys, folder, *flags({**SMALL, "images": 8, "seed": 9}, "images", "seed",
                               "sampling_steps"), *redo)  # fmt: skip
        assert code == 0, err
    pictures = [[path.read_bytes() for path in sorted((folder / "images").iterdir())] for folder in (run, clean)]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 8


@no_figures
def test_an_import_does_not_turn_people_s_labels_into_removable_ones(tmp_path, capsys):
    run, labels = tmp_path / "run", own_images(tmp_path / "images")
    assert command(generate, capsys, run, *flags(SMALL, "images", "sampling_steps"))[0] == 0
    store = FeedbackStore(run)
    store.add_labels("Anna", [(image.id, "good" if image.id % 2 else "bad") for image in store.images()])
    store.close()
    small = flags({key: value for key, value in SMALL.items() if key not in ("images", "labels")})
    code, _, err = command(main, capsys, run, "--feedback", labels, *small)
    assert code == 0, err
    for more in (("--fresh",), ("--feedback", own_images(tmp_path / "others", good=True), "--redo")):
        if more[0] == "--feedback":
            with open(more[1], "a") as file:
                file.write("\n")
        code, _, err = command(main, capsys, run, *small, *more)
        assert code == 2 and "holds labels by Anna" in err, err
    assert "Anna" in FeedbackStore(run).labellers()


def test_files_of_people_in_images_stay(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "images" / "000099.png").write_bytes(b"a holiday")
    code, _, err = command(generate, capsys, run, "--seed", 4, "--images", 8, "--redo")
    assert code == 0 and (run / "images" / "000099.png").read_bytes() == b"a holiday", err
    assert len(list((run / "images").iterdir())) == 9


def test_imported_prompts_of_people_are_not_fine_tuned_on_the_bundled_model(tmp_path, capsys):
    own_images(tmp_path / "images")
    (tmp_path / "images" / "cats.csv").write_text("prompt,image,label\nmy cat on a sofa,0.png,good\n")
    assert command(label, capsys, tmp_path / "run", "--import", tmp_path / "images" / "cats.csv")[0] == 0
    code, _, err = command(main, capsys, tmp_path / "run", *flags(OWN))
    assert code == 2 and "--model: needed for" in err


@no_figures
def test_weights_that_are_all_zero_are_refused(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    code, _, err = command(main, capsys, run, "--weighting", "threshold", "--tau", 2, "--redo")
    assert code == 2 and "--weighting threshold --tau 2.0: no image weighs anything; accepted: another" in err


def test_a_recipe_stands_for_flags(tmp_path):
    settings = Run(tmp_path).resolve({"steps": 7, "weighting": "exponential"}, bundled=True, recipe="paper")
    kept = [settings[key] for key in ("batch_size", "pretrain_fraction", "learning_rate", "beta", "steps", "dtype")]
    assert kept == [512, 0.5, 1e-5, 1.0, 7, "bfloat16"] and settings["weighting"] == "exponential"
    assert settings["sampling_steps"] == defaults(True)["sampling_steps"]


# --------------------------------------------------------------------------------------------------- own models
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
def test_own_images_go_through_the_same_code(source, tmp_path, capsys, request):
    if source != "diffusers":
        request.getfixturevalue("without_matplotlib")
    model, clip = (EMBEDDED, EMBEDDED / "clip") if source != "diffusers" else diffusers_pipeline(tmp_path)
    if source == "xl":
        model = tmp_path / "xl"
        pytest.importorskip("peers").diffusers_pipeline("xl").save_pretrained(model)
    labels, run = own_images(tmp_path / "images"), tmp_path / "run"
    arguments = ["--model", model, "--clip", clip, "--feedback", labels, "--out", run]
    small = flags(OWN | {"steps": 3, "batch_size": 4})
    code, _, err = command(main, capsys, *arguments, *small)
    assert code == 0, err
    results = results_of(run)
    judge = "simulated annotator" if source == "embedded" else "reward"
    assert results["evaluation"]["judge"] == judge and results["counts"]["labels"] == 12
    groups = set(results["evaluation"]["judged"][judge]["base"])
    assert groups >= {"overall", "seen"} and (run / "report.html").exists()
    if source == "xl":
        learned, base = (Pipeline.from_pretrained(place).unet.state_dict() for place in (run / "model", model))
        assert not torch.equal(learned["add_embedding.linear_1.weight"], base["add_embedding.linear_1.weight"])
    elif source == "diffusers":  # and it samples the same with the weights that come out
        import diffusers

        peer = diffusers.StableDiffusionPipeline.from_pretrained(run / "model", safety_checker=None)
        peer.scheduler = diffusers.DDIMScheduler.from_config(peer.scheduler.config, clip_sample=False)
        pipe = Pipeline.from_pretrained(run / "model")
        latents = pipe.noise([1])
        how = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
        theirs = peer("a red circle", latents=latents, **how).images[0] * 255
        mine = pipe.generate("a red circle", steps=4, guidance=3.0, latents=latents)[0]
        assert np.abs(theirs - np.asarray(mine, float)).max() <= 1
        code, _, err = command(evaluate, capsys, run, "--models", model, model, run / "model", "--test-images", 4)
        assert code == 0 and len(results_of(run)["comparisons"]) == 1, err
    else:
        _own_run_again(run, labels, arguments, small, capsys)


def test_comparisons_alone_go_through_the_same_code_and_another_file_takes_their_place(tmp_path, capsys, monkeypatch):
    labels, run, pairs = own_images(tmp_path / "images"), tmp_path / "run", tmp_path / "images" / "ranks.json"
    prompts = [json.loads(line)["prompt"] for line in labels.read_text().splitlines()]
    files = {prompt: [f"{i}.png" for i in range(12) if prompts[i] == prompt] for prompt in prompts}
    rows = [{"caption": prompt, "images": files[prompt], "ranks": [1, 2, 4, 2]} for prompt in files]
    pairs.write_text(json.dumps(rows))
    arguments = ["--model", EMBEDDED, "--clip", EMBEDDED / "clip", "--out", run, *flags(OWN)]
    code, _, err = command(main, capsys, *arguments, "--columns", "generations=images,ranking=ranks")
    assert code == 2 and "--columns, --skip, --good-from, --scale: say how --feedback FILE is read, and need it" in err
    columns = ("--columns", "generations=images,ranking=ranks")
    opened_once, check = [], label_files.check_image
    monkeypatch.setattr(label_files, "check_image", lambda *of: opened_once.append(of[0].name) or check(*of))
    code, out, err = command(main, capsys, *arguments, "--feedback", pairs, *columns)
    assert code == 0 and "18 comparisons and no label: r is only relative" in err, err
    assert sorted(opened_once) == sorted(f"{i}.png" for i in range(12))
    results = results_of(run)
    assert results["counts"]["labels"] == 0 and results["reward"]["comparisons"] == 18
    assert (run / "report.html").exists() and "comparisons alone" in (run / "reward" / "README.md").read_text()
    code, _, err = command(main, capsys, *arguments, "--feedback", pairs)
    assert code == 2 and "ranks.json, row 1: no column 'image'" in err
    with opened(run) as state, pytest.raises(InputError, match="stage label is out of date: the label file changed"):
        import_run(state, LabelFile(labels))
    with opened(run) as state:
        import_run(state, LabelFile(labels), redo=True)
    store = FeedbackStore(run)
    assert store.comparison_rows() == [] and len(store.labels()) == 12
    store.close()


def _own_run_again(run: Path, labels: Path, arguments: list, small: list, capsys) -> None:
    """The same run continued, refused, and begun anew."""
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code, _, _ = command(main, capsys, "--model", "./nowhere", *arguments[2:], *small, "--fresh")
    assert code == 2 and before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code, out, _ = command(main, capsys, run)  # the model and the labels are remembered
    assert code == 0 and out.count("done before") == 4
    with open(labels, "a") as file:
        file.write("\n" + labels.read_text().splitlines()[0].replace("good", "bad"))
    code, _, err = command(main, capsys, *arguments, *small)
    assert code == 2 and "stage label is out of date: the label file changed; --redo" in err
    code, _, err = command(main, capsys, "--model", run / "model", *arguments[2:], "--fresh")
    assert code == 2 and "which this run writes" in err and (run / "model" / "unet").exists()
    (run / "thesis.txt").write_text("not the run's")
    (run / "images").mkdir(exist_ok=True)
    (run / "images" / "holiday.jpg").write_text("not the run's either")
    code, _, err = command(main, capsys, *arguments, *small, "--steps", 4, "--fresh")
    assert code == 0 and results_of(run)["settings"]["steps"] == 4, err
    assert "--fresh leaves what the run did not write: images, thesis.txt" in err
    assert (run / "thesis.txt").exists() and (run / "images" / "holiday.jpg").exists()
    store = FeedbackStore(run)
    store.add_labels("Ada", [(1, "bad")])
    store.close()
    code, _, err = command(main, capsys, *arguments, *small, "--fresh")
    assert code == 2 and "feedback.sqlite holds labels by Ada" in err and (run / "model").exists()


@no_figures
def test_pairs_from_a_folder_adapters_and_everything_switched_on(tmp_path, monkeypatch, capsys):
    labels, pairs = own_images(tmp_path / "images"), pretraining_pairs(tmp_path / "pairs")
    base = ["--model", EMBEDDED, "--clip", EMBEDDED / "clip", "--feedback", labels, "--pretrain", pairs, *flags(OWN)]
    more = ["--lora", 2, "--dtype", "bfloat16", "--accumulate", 2, "--gradient-checkpointing", "--ema", 0.9]
    more += ["--min-snr", 5, "--noise-offset", 0.1, "--lr-schedule", "linear", "--warmup", 0, "--validate-every", 2]
    out, cache = tmp_path / "run", tmp_path / "cache"
    code, _, err = command(main, capsys, *base, *more, "--out", out, "--cache", cache)
    assert code == 0, err
    page = re.sub("</?span>", "", (out / "report.html").read_text())  # around a flag and its value
    assert all(flag in page for flag in ("--lora 2", "--warmup 0", "--gradient-checkpointing", "--min-snr 5"))
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
    code, _, err = command(main, capsys, *again)
    assert code == 0, err
    assert same_results(out, tmp_path / "again")
    code, _, err = command(main, capsys, *again, "--min-snr", 4)
    assert code == 2 and "--min-snr was 5.0, now 4.0" in err
    code, _, err = command(main, capsys, *again, "--accumulate", 1, "--keep", 5)  # these may change
    assert code == 0, err


@no_figures
def test_another_training_s_checkpoints_are_neither_kept_nor_continued(finished, tmp_path, capsys):
    """With checkpoints/ a link, too: no seed's model is passed off as another's."""
    run, kept = shutil.copytree(finished, tmp_path / "run"), tmp_path / "kept"
    shutil.move(run / "checkpoints", kept)
    (run / "checkpoints").symlink_to(kept)
    code, _, err = command(main, capsys, run, *flags(SMALL), "--seed", 3, "--fresh")
    assert code == 0 and not same_model(finished, run), err
    other = shutil.copytree(run, tmp_path / "other", symlinks=True)
    (other / "checkpoints").unlink(missing_ok=True)
    stages = json.loads((other / "stages.json").read_text())
    (other / "stages.json").write_text(json.dumps({name: stages[name] for name in ("generate", "label", "reward")}))
    shutil.copytree(finished / "checkpoints", other / "checkpoints")
    code, _, err = command(main, capsys, other)
    assert code == 2 and "was saved with other settings" in err


@no_figures
def test_bad_pairs_are_one_line(tmp_path, capsys):
    labels, pairs = own_images(tmp_path / "images"), pretraining_pairs(tmp_path / "pairs")
    for i in range(2):
        (pairs / f"{i}.jpg").write_bytes(b"no image")
    base = ["--model", EMBEDDED, "--clip", EMBEDDED / "clip", "--out", tmp_path / "run", *flags(OWN)]
    for arguments, message in (
        ([*base, "--feedback", labels, "--pretrain", pairs], "2 of 6 images or captions cannot be used"),
        ([*base, "--feedback", labels, "--pretrain", tmp_path / "*.tar"], "*.tar: not found; accepted: a folder with"),
    ):
        code, _, err = command(main, capsys, *arguments)
        line = err.splitlines()[-1]
        assert code == 2 and message in line and line.startswith("error: "), err


def test_tensorboard_gets_what_the_metrics_get(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Run(tmp_path).log("finetune")
    for step in (10, 20):
        log({"step": step, "loss": step / 7})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "finetune"))
    events.Reload()
    scalars = events.Scalars("loss")
    assert [event.step for event in scalars] == [10, 20]
    assert [event.value for event in scalars] == pytest.approx([10 / 7, 20 / 7])
