"""Stage 1 as a command: what it draws and keeps, that it goes on where it was stopped, and its one-line errors."""

import json
import sys

import pytest
from PIL import Image

from minialign import Pipeline, generate
from minialign.command import run_command
from minialign.feedback import FeedbackStore
from minialign.generate import draw_to_folder, grammar_of, read_prompts
from minialign.models.pretrained import EMBEDDED, InputError
from minialign.prompts import PAPER, SHAPES, split


def command(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        run_command(generate.main)
    return stop.value.code, capsys.readouterr().err


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\ntwo blue stars on the sand\na red circle\n  a fox  \n")
    return path


def small(file, out, *more):
    how = ("--images-per-prompt", 2, "--sampling-steps", 2, "--batch-size", 4, "--device", "cpu")
    return ("--prompts", file, "--out", out, *how, *more)


def test_images_and_store_belong_together(tmp_path, file, monkeypatch, capsys):
    run = tmp_path / "run"
    code, err = command(monkeypatch, capsys, *small(file, run, "--seed", 3))
    assert code == 0 and "6/6" in err
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
        again = pipe.generate(image.prompt, steps=2, guidance=3.0, latents=pipe.noise([image.seed]))[0]
        difference = [abs(a - b) for a, b in zip(again.tobytes(), Image.open(image.path).tobytes())]
        assert max(difference) <= 1  # the batch size may change the last bit
    moved = run.rename(tmp_path / "moved")  # paths are relative to the run
    store = FeedbackStore(moved)
    assert all(image.path.exists() for image in store.images())
    store.close()


def test_a_stopped_run_goes_on_and_is_the_same(tmp_path, file, monkeypatch, capsys):
    command(monkeypatch, capsys, *small(file, tmp_path / "whole"))
    drawn, whole = [], Pipeline.generate

    def interrupted(pipe, prompts, **how):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(len(prompts))
        return whole(pipe, prompts, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "generate", interrupted)
        code, _ = command(patch, capsys, *small(file, tmp_path / "parts"))
    store = FeedbackStore(tmp_path / "parts")
    assert code == 130 and drawn == [4] and len(store.images()) == 4  # what is drawn can be labelled already
    store.close()
    code, err = command(monkeypatch, capsys, *small(file, tmp_path / "parts"))
    assert code == 0 and "2/2" in err
    folders = [tmp_path / name / "images" for name in ("whole", "parts")]
    contents = [[path.read_bytes() for path in sorted(folder.iterdir())] for folder in folders]
    assert contents[0] == contents[1] and len(contents[0]) == 6
    stores = [FeedbackStore(folder.parent) for folder in folders]
    kept = [[(i.prompt, i.path.name, i.seed) for i in store.images()] for store in stores]
    assert kept[0] == kept[1]
    monkeypatch.setattr(Pipeline, "generate", None)  # calling it would fail
    code, err = command(monkeypatch, capsys, *small(file, tmp_path / "parts", "--batch-size", 3))
    assert code == 0 and stores[1].images() == FeedbackStore(tmp_path / "parts").images()


def test_categories_are_the_models_own_seen_prompts(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(generate, "generate", lambda pipe, prompts, *rest: drawn.append(prompts) or 0)
    for number, model in enumerate(((), ("--model", EMBEDDED))):
        code, err = command(monkeypatch, capsys, *small("categories", tmp_path / str(number), *model, "--seed", 1))
        assert code == 0, err
    assert drawn[0] == drawn[1] == [prompt.text for prompt in split(SHAPES, 1)[0]]
    settings = json.loads((tmp_path / "0" / "config.json").read_text())["settings"]
    assert settings["prompts"] == "categories" and settings["sampling_steps"] == 2 and settings["guidance"] == 3.0
    assert json.loads((tmp_path / "1" / "config.json").read_text())["settings"]["guidance"] == 7.5
    pipe = Pipeline.from_pretrained()
    assert grammar_of(pipe) is SHAPES
    pipe.unet.config = pipe.unet.config | {"sample_size": 64}
    assert grammar_of(pipe) is PAPER


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
        (small(tmp_path / "empty.txt", out), "empty.txt: no prompts; accepted: a prompt a line"),
        (small(tmp_path / "text.csv", out), "text.csv, line 2: no 'prompt'; column needed: prompt"),
        (small(tmp_path / "half.csv", out), "half.csv: no prompts"),
        (small(tmp_path / "text.jsonl", out), "text.jsonl, line 1: no 'prompt'"),
        (small(tmp_path / "broken.jsonl", out), "broken.jsonl, line 2: not JSON"),
        (small(tmp_path / "number.jsonl", out), "number.jsonl, line 1: a JSON object is needed"),
        (small(file, out, "--model", "./nowhere"), "./nowhere: not found"),
        (small(file, out, "--device", "abacus"), "--device abacus: cannot be used"),
        (small(file, tmp_path / "folder"), "folder: holds files that are not a run's"),
        (small(file, out, "--images-per-prompt", 0), "--images-per-prompt: '0'; accepted: a whole number from 1 to"),
        (small(file, out, "--images-per-prompt", 40_000), "3 prompts x 40000 images are more than 100000"),
        (("--out", out), "the following arguments are required: --prompts"),
    ]
    held = sorted(path.name for path in tmp_path.rglob("*"))
    for arguments, message in cases:
        code, err = command(monkeypatch, capsys, *arguments)
        assert code == 2 and message in err and err.count("\n") == 1 and err.startswith("error: "), (arguments, err)
    assert sorted(path.name for path in tmp_path.rglob("*")) == held


def test_a_run_of_other_settings_is_left_alone(tmp_path, file, monkeypatch, capsys):
    assert command(monkeypatch, capsys, *small(file, tmp_path / "run"))[0] == 0

    def times():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*[a-z]") if path.name != ".lock"}

    before = times()
    for more, message in (
        (("--seed", 1), "was begun with seed=0, not 1; use another --out"),
        (("--guidance", 1), "was begun with guidance=3.0, not 1.0"),
        (("--model", EMBEDDED, "--guidance", 3), "was begun with model=None"),
    ):
        code, err = command(monkeypatch, capsys, *small(file, tmp_path / "run", *more))
        assert code == 2 and message in err and err.count("\n") == 1
    file.write_text("a red circle\na fox\n")
    code, err = command(monkeypatch, capsys, *small(file, tmp_path / "run"))
    assert code == 2 and "was begun with prompts_crc32=" in err
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*[a-z]") if path.name != ".lock"
    }


def test_a_batch_is_announced_when_it_is_on_disk(tmp_path):
    pipe, seen = Pipeline.from_pretrained(), []
    how = {"steps": 1, "guidance": 1.0, "batch": 2, "title": "draw"}
    paths = draw_to_folder(pipe, [("a fox", i) for i in range(5)], tmp_path, **how)
    paths[2].unlink()

    def finished(rows):
        seen.append(rows)
        assert all(paths[i].exists() for i in rows)

    draw_to_folder(pipe, [("a fox", i) for i in range(5)], tmp_path, **how, finished=finished)
    assert seen == [range(0, 2), range(4, 5), range(2, 4)]


def test_prompts_are_needed(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(tmp_path)
