"""Stage 1 as a command: what it samples and keeps, that it continues where it was stopped, and its one-line errors."""

import json

import pytest
from helpers import command
from PIL import Image

from minialign import Pipeline
from minialign.engine.settings import defaults
from minialign.evaluate.__main__ import parse_arguments as evaluation
from minialign.feedback import FeedbackStore
from minialign.files import InputError
from minialign.finetune.__main__ import parse_arguments as finetuning
from minialign.generate import grammar_of, main, planned, read_prompts, sample_to_folder
from minialign.models.pretrained import EMBEDDED
from minialign.prompts import PAPER, SHAPES, split


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\ntwo blue stars on the sand\na red circle\n  a fox  \n")
    return path


def small(file, out, *more):
    how = ("--images-per-prompt", 2, "--sampling-steps", 2, "--sampling-batch-size", 4, "--device", "cpu")
    return ("--prompts", file, "--out", out, *how, *more)


def test_images_and_store_belong_together(tmp_path, file, monkeypatch, capsys):
    run = tmp_path / "run"
    code, out, _ = command(main, capsys, *small(file, run, "--seed", 3))
    assert code == 0 and f"{run}: 6 images for 3 prompts" in out
    store = FeedbackStore(run)
    images = store.images()
    store.close()
    assert [image.prompt for image in images] == [
        prompt for prompt in ("a red circle", "two blue stars on the sand", "a fox") for _ in range(2)
    ]
    rows = [image.path.relative_to(run).as_posix() for image in images]
    assert rows == [f"images/{i:06d}.png" for i in range(6)] and len({image.seed for image in images}) == 6
    pipe = Pipeline.from_pretrained()
    for image in images:  # the store's prompt and seed draw it again
        again = pipe.generate(image.prompt, steps=2, guidance=2.0, latents=pipe.noise([image.seed]))[0]
        difference = [abs(a - b) for a, b in zip(again.tobytes(), Image.open(image.path).tobytes())]
        assert max(difference) <= 1  # the batch size may change the last bit
    moved = run.rename(tmp_path / "moved")  # paths are relative to the run
    store = FeedbackStore(moved)
    assert all(image.path.exists() for image in store.images())
    store.close()


def test_a_stopped_run_continues_and_is_the_same(tmp_path, file, monkeypatch, capsys):
    command(main, capsys, *small(file, tmp_path / "whole"))
    drawn, whole = [], Pipeline.generate

    def interrupted(pipe, prompts, **how):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(len(prompts))
        return whole(pipe, prompts, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "generate", interrupted)
        code, _, _ = command(main, capsys, *small(file, tmp_path / "parts"))
    store = FeedbackStore(tmp_path / "parts")
    assert code == 130 and drawn == [4] and len(store.images()) == 4  # what is drawn can be labelled already
    store.close()
    code, _, err = command(main, capsys, *small(file, tmp_path / "parts"))
    assert code == 0, err
    folders = [tmp_path / name / "images" for name in ("whole", "parts")]
    contents = [[path.read_bytes() for path in sorted(folder.iterdir())] for folder in folders]
    assert contents[0] == contents[1] and len(contents[0]) == 6
    stores = [FeedbackStore(folder.parent) for folder in folders]
    kept = [[(i.prompt, i.path.name, i.seed) for i in store.images()] for store in stores]
    assert kept[0] == kept[1]
    monkeypatch.setattr(Pipeline, "generate", None)  # calling it would fail
    code, _, err = command(main, capsys, *small(file, tmp_path / "parts", "--sampling-batch-size", 3))
    assert code == 0 and stores[1].images() == FeedbackStore(tmp_path / "parts").images()


def test_batch_size_is_another_spelling_of_sampling_batch_size(tmp_path, file, capsys):
    code, _, err = command(main, capsys, *small(file, tmp_path / "run", "--batch-size", 5))
    assert code == 0, err
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert settings["sampling_batch_size"] == 5 and "batch_size" not in settings
    code, out, _ = command(main, capsys, "--help")
    assert code == 0 and "--sampling-batch-size N, --batch-size N images that are sampled" in " ".join(out.split())
    code, _, err = command(main, capsys, *small(file, tmp_path / "run", "--batch-size", 0))
    assert code == 2 and "--batch-size: '0'; accepted: a whole number from 1 up" in err and err.count("\n") == 1
    assert finetuning(["--batch-size", "6"]).batch_size == 6  # there it is that of training
    assert finetuning(["--batch-size", "6"]).sampling_batch_size is None
    with pytest.raises(SystemExit):
        evaluation(["run", "--batch-size", "6"])
    assert "did you mean --sampling-batch-size?" in capsys.readouterr().err


def test_categories_are_the_models_own_seen_prompts():
    settings = defaults(bundled=True) | {"seed": 1}
    seen = [prompt.text for prompt in split(SHAPES, 1)[0]]
    many = planned(settings, "shapes")
    assert len(many) == 2560 and set(many) == set(seen)
    three = planned(settings | {"images_per_prompt": 3}, "shapes")
    assert three == [prompt for prompt in seen for _ in range(3)]
    assert planned(defaults(bundled=False) | {"prompts": "categories"}, "")[0] in {p.text for p in split(PAPER, 0)[0]}
    assert grammar_of("shapes") is SHAPES and grammar_of("") is PAPER


def test_a_model_says_itself_that_it_is_of_the_embedded_world(tmp_path, file, capsys):
    for number, model in enumerate(((), ("--model", EMBEDDED))):
        code, _, err = command(main, capsys, *small(file, tmp_path / str(number), *model))
        assert code == 0, err
        config = json.loads((tmp_path / str(number) / "config.json").read_text())
        assert config["world"] == "shapes" and config["settings"]["guidance"] == 2.0
    pipe = Pipeline.from_pretrained()
    pipe.world = ""  # of the same size, but of no world
    pipe.save_pretrained(tmp_path / "model")
    assert command(main, capsys, *small(file, tmp_path / "2", "--model", tmp_path / "model"))[0] == 0
    config = json.loads((tmp_path / "2" / "config.json").read_text())
    assert config["world"] == "" and config["settings"]["guidance"] == 7.5


def test_prompt_files_of_each_kind_are_read(tmp_path):
    texts = ['a "fox",\nat night', "a\u2028dog", "a cat"]
    (tmp_path / "a.txt").write_text("\ufeffa fox\r\n\r\na dog\r\na fox", encoding="utf-8", newline="")
    assert read_prompts(tmp_path / "a.txt") == ["a fox", "a dog"]
    quoted = [text.replace('"', '""') for text in texts]
    (tmp_path / "b.CSV").write_text("label,prompt\n" + "".join(f'1,"{text}"\n' for text in quoted * 2))
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in texts * 2))
    assert read_prompts(tmp_path / "b.CSV") == read_prompts(tmp_path / "c.jsonl") == texts


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, file, monkeypatch, capsys):
    for name, text in {
        "empty.txt": "\n \n", "text.csv": "text\na fox\n", "text.jsonl": '{"text": "a fox"}', "half.csv": "prompt\n\n",
        "broken.jsonl": '{"prompt": "a"}\n{"prompt"', "number.jsonl": "7",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\xff")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thing").write_text("")
    out = tmp_path / "out"
    cases = [
        (small(tmp_path / "none.txt", out), "none.txt: cannot be read"),
        (small(tmp_path / "picture.txt", out), "picture.txt: cannot be read as text"),
        (small(tmp_path / "empty.txt", out), "empty.txt: no prompts; accepted: one per line"),
        (
            small(tmp_path / "text.csv", out),
            "text.csv, line 1: no column 'prompt'; columns needed: prompt; found",
        ),
        (small(tmp_path / "half.csv", out), "half.csv: no prompts"),
        (small(tmp_path / "text.jsonl", out), "text.jsonl, line 1: no 'prompt'"),
        (small(tmp_path / "broken.jsonl", out), "broken.jsonl, line 2: not JSON"),
        (small(tmp_path / "number.jsonl", out), "number.jsonl, line 1: a JSON object is needed"),
        (small(file, out, "--model", "./nowhere"), "./nowhere: not found"),
        (small(file, out, "--device", "abacus"), "--device abacus: cannot be used"),
        (small(file, tmp_path / "folder"), "folder: holds files that are not a run's"),
        (small(file, out, "--images-per-prompt", 0), "--images-per-prompt: '0'; accepted: a whole number from 1 to"),
        (small(file, out, "--images-per-prompt", 40_000), "3 prompts x 40000 images; accepted: 100000 in all"),
        (("--out", out, "--model", EMBEDDED, "--images", 3, "--images-per-prompt", 1), "exclude each other"),
        ((), "RUN: the run's folder is needed"),
    ]
    held = sorted(path.name for path in tmp_path.rglob("*"))
    for arguments, message in cases:
        code, _, err = command(main, capsys, *arguments)
        assert code == 2 and message in err and err.count("\n") == 1 and err.startswith("error: "), (arguments, err)
    assert sorted(path.name for path in tmp_path.rglob("*")) == held


def test_a_run_of_other_settings_is_left_alone(tmp_path, file, capsys):
    run = tmp_path / "run"
    assert command(main, capsys, *small(file, run))[0] == 0

    def times():
        return {path: path.stat().st_mtime_ns for path in run.rglob("*[a-z]") if path.name != ".lock"}

    before = times()
    pipe = Pipeline.from_pretrained()
    pipe.unet.conv_in.weight.data[0] += 1
    pipe.save_pretrained(tmp_path / "other")
    for more, message in (
        (("--seed", 1), "stage generate is out of date: --seed was 0, now 1"),
        (("--guidance", 1), "stage generate is out of date: --guidance was 2.0, now 1.0"),
        (("--model", tmp_path / "other"), "other: not the same as the bundled model, which"),
    ):
        code, _, err = command(main, capsys, *small(file, run, *more))
        assert code == 2 and message in err and err.count("\n") == 1, err
    same = tmp_path / "folder" / "same.txt"
    same.parent.mkdir()
    same.write_text(file.read_text())  # content counts, not names
    assert command(main, capsys, *small(same, run, "--model", EMBEDDED))[0] == 0
    file.write_text("a red circle\na fox\n")
    code, _, err = command(main, capsys, *small(file, run))
    assert code == 2 and "the prompts changed; --redo" in err
    assert before.keys() == times().keys() and (run / "images" / "000005.png").exists()
    code, _, err = command(main, capsys, *small(file, run, "--redo"))
    assert code == 0 and len(list((run / "images").iterdir())) == 4, err


def test_people_s_labels_are_not_removed_to_redo_a_stage(tmp_path, file, capsys):
    run = tmp_path / "run"
    assert command(main, capsys, *small(file, run))[0] == 0
    store = FeedbackStore(run)
    store.add_labels("Anna", [(1, "good")])
    code, _, err = command(main, capsys, *small(file, run, "--seed", 1, "--redo"))
    assert code == 2 and "holds labels by Anna" in err and store.labels() == {1: 1.0}
    assert len(list((run / "images").iterdir())) == 6
    store.close()


def test_a_batch_is_announced_when_it_is_on_disk(tmp_path):
    pipe, seen = Pipeline.from_pretrained(), []
    how = {"steps": 1, "guidance": 1.0, "batch": 2}
    paths = sample_to_folder(pipe, [("a fox", i) for i in range(5)], tmp_path, **how)
    paths[2].unlink()

    def finished(rows):
        seen.append(rows)
        assert all(paths[i].exists() for i in rows)

    sample_to_folder(pipe, [("a fox", i) for i in range(5)], tmp_path, **how, finished=finished)
    assert seen == [range(0, 2), range(4, 5), range(2, 4)]


def test_prompts_are_needed(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(tmp_path)
