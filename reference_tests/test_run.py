"""The folder of a run: which stage is done, out of date or to be resumed, and what may be removed from it."""

import json
import os
import shutil

import pytest

from minialign.engine import run as engine
from minialign.engine.run import (
    FORMAT,
    Busy,
    Run,
    changes,
    check_folder,
    digest,
    file_digest,
    is_run,
    label_digest,
    locked,
    opened,
    read_metrics,
    remove_run,
)
from minialign.engine.settings import defaults
from minialign.feedback import SIMULATED, FeedbackStore
from minialign.files import InputError

SETTINGS = defaults(bundled=True)


def do(run: Run, stage: str = "reward", redo: bool = False, dies: bool = False, **given) -> bool:
    """Whether a stage's work is to be done, which it then is."""
    inputs = {key: given.pop(key) for key in ("labels", "images") if key in given}
    try:
        with run.stage(stage, "because", SETTINGS | given, lambda: inputs, redo=redo) as todo:
            if dies:
                raise KeyboardInterrupt
            return todo
    except KeyboardInterrupt:
        return True


def written(folder) -> dict:
    return json.loads((folder / "stages.json").read_text())


# ---------------------------------------------------------------------------------------------------- the stages
def test_a_stage_is_done_once_and_resumed_where_it_died(tmp_path, capsys):
    assert do(Run(tmp_path), dies=True)
    assert written(tmp_path)["reward"]["begun"] == 1 and "seconds" not in written(tmp_path)["reward"]
    assert do(Run(tmp_path))
    state = written(tmp_path)["reward"]
    assert state["begun"] == 2 and state["seconds"] >= 0 and capsys.readouterr().out.count("reward: because") == 2
    run = Run(tmp_path)
    assert not do(run) and written(tmp_path)["reward"] == state
    assert "reward: done before (0 s)" in capsys.readouterr().out
    assert run.settings["hidden"] == 512 and "steps" not in run.settings  # those of its stages alone
    assert json.loads((tmp_path / "config.json").read_text())["settings"] == run.settings


def test_what_a_stage_was_made_from_decides_whether_it_is_out_of_date(tmp_path):
    begun = {"labels": digest("a"), "images": digest("b")}
    do(Run(tmp_path), **begun)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for given, told in (
        ({"hidden": 8}, "--hidden was 512, now 8"),
        ({"labels": digest("c")}, "the labels changed"),
        ({"reward_steps": 1, "images": digest("c"), "balanced": True},
         "--reward-steps was 1000, now 1; --balanced was False, now True; the images changed"),
    ):  # fmt: skip
        with pytest.raises(InputError) as error:
            do(Run(tmp_path), **begun | given)
        assert str(error.value) == (
            f"{tmp_path}: stage reward is out of date: {told}; --redo does it again; `finetune RUN --redo` also redoes "
            "the later stages"
        )
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert not do(Run(tmp_path), **begun, clip="renamed")  # its content counts, which `inputs` says
    assert Run(tmp_path).settings["clip"] == "renamed"
    with pytest.raises(InputError, match="out of date"):  # one that died is not continued with other settings
        do(Run(tmp_path), "finetune", dies=True)
        do(Run(tmp_path), "finetune", beta=1.0)
    assert do(Run(tmp_path), "finetune", accumulate=4, keep=9)  # what only rounds otherwise may change
    assert Run(tmp_path).outdated("reward", labels=digest("a")) is None
    assert Run(tmp_path).outdated("reward", labels=digest("c")) == "the labels changed"
    assert Run(tmp_path).outdated("evaluate", labels=digest("c")) is None  # not done yet


def test_redo_removes_what_the_stage_left_and_nothing_else(tmp_path):
    run = Run(tmp_path)
    do(run, hidden=512)
    do(run, "finetune")
    for name in (
        "reward/model.safetensors",
        "reward/thesis.txt",
        "checkpoints/step-3/SHA256SUMS",
        "cache/rewards.safetensors",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for stage in ("reward", "finetune"):
        run.log(stage)({"step": 10, "loss": 1.0})
    assert not do(Run(tmp_path), redo=True)  # of what is up to date nothing is redone
    assert do(Run(tmp_path), redo=True, hidden=8)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file() and "tensorboard" not in path.parts) == [
        "SHA256SUMS", "config.json", "metrics.jsonl", "stages.json", "thesis.txt",
    ]  # fmt: skip
    assert not (tmp_path / "cache").exists()  # empty now
    assert [row["stage"] for row in read_metrics(tmp_path / "metrics.jsonl")] == ["finetune"]
    assert written(tmp_path)["reward"] | {"begun": 1} == written(tmp_path)["reward"]
    assert written(tmp_path)["reward"]["made_from"]["hidden"] == 8 == Run(tmp_path).settings["hidden"]


def test_differences_are_told_in_words():
    assert changes({"a": 1}, {"a": 1}) is None
    assert changes({"batch_size": 8, "x": 1}, {"batch_size": 9, "y": 2}) == (
        "--batch-size was 8, now 9; x was 1, now None; y was None, now 2"
    )
    assert changes({}, {"label_file": digest("a")}) == "the label file changed"
    assert digest("ab", "c") != digest("a", "bc") and digest("\udcff") != digest("") and digest("a") == digest(b"a")


def test_a_file_that_a_stage_needs_and_does_not_find_is_named(tmp_path):
    (tmp_path / "a").write_text("x")
    assert file_digest(tmp_path / "a").startswith("digest:")
    with pytest.raises(InputError, match=r"b: cannot be read \("):
        file_digest(tmp_path / "b")


def test_values_are_given_else_remembered_else_of_the_recipe_or_the_world(tmp_path):
    run = Run(tmp_path)
    assert run.resolve({}, bundled=True) == defaults(True) and run.resolve({}, bundled=False) == defaults(False)
    run.remember({"steps": 7, "beta": 2.0}, world="shapes")
    again = Run(tmp_path)
    assert again.world == "shapes" and again.config["format"] == FORMAT and Run(tmp_path / "new").world == ""
    found = again.resolve({"beta": 3.0}, bundled=True, recipe="paper")
    assert (found["steps"], found["beta"], found["batch_size"], found["images"]) == (10_000, 3.0, 512, 2560)
    assert again.resolve({}, bundled=True)["steps"] == 7
    assert again.source("model", {}) is None and again.source("model", {"model": "x"}) == "x"


# ------------------------------------------------------------------------------------------------------ the logs
def test_of_damaged_metrics_the_whole_rows_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"stage": "reward", "step": 1, "loss": 0.5}, {"stage": "finetune", "step": 2}]
    lines = ["", "[1]", '{"stage": "reward"}', json.dumps(rows[0]), "null", json.dumps(rows[1]), '{"stage": "fine']
    path.write_text("\n".join(lines))
    assert read_metrics(path) == rows
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match="metrics.jsonl: cannot be read as text .*; remove it to continue"):
        read_metrics(path)
    with pytest.raises(InputError, match="cannot be read as text"):
        read_metrics(tmp_path / "none")


def test_a_step_that_is_done_again_takes_its_rows_place(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "open_board", lambda folder, step: False)  # TensorBoard's is slow to import
    run = Run(tmp_path)
    for stage in ("reward", "finetune"):
        log = run.log(stage)
        for step in (10, 20, 30):
            log({"step": step, "loss": 1.0})
    log = run.log("finetune")
    log({"step": 20, "loss": 2.0})
    found = [(row["stage"], row["step"], row["loss"]) for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert found == [*(("reward", step, 1.0) for step in (10, 20, 30)), ("finetune", 10, 1.0), ("finetune", 20, 2.0)]


# ---------------------------------------------------------------------------------------------------- the folder
def test_a_run_is_kept_from_a_second_process(tmp_path):
    with locked(tmp_path / "run"):
        with pytest.raises(Busy, match="run: another process is at work on this run"), locked(tmp_path / "run"):
            pass
        with pytest.raises(Busy), opened(tmp_path / "run"):
            pass
    with locked(tmp_path / "run"), locked(tmp_path / "other"):
        pass


@pytest.mark.parametrize("existing", ["", "a"])
def test_work_that_fails_before_it_writes_leaves_no_folder(tmp_path, existing):
    (tmp_path / existing).mkdir(exist_ok=True)
    with pytest.raises(InputError, match="no such model"), opened(tmp_path / "a" / "b" / "run"):
        raise InputError("no such model")
    assert [path.name for path in tmp_path.rglob("*")] == ([existing] if existing else [])
    with pytest.raises(KeyboardInterrupt), opened(tmp_path / "a" / "run") as run:
        run.remember({"seed": 1})
        raise KeyboardInterrupt
    assert Run(tmp_path / "a" / "run").settings == {"seed": 1}  # what was begun can be continued
    with pytest.raises(InputError), opened(tmp_path / "a"):
        raise InputError("not reached")
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="later"), opened(tmp_path / "mine"):
        raise InputError("later")
    assert (tmp_path / "mine").is_dir()  # it was there before


def test_a_run_of_another_version_is_refused_in_one_line(tmp_path):
    message = f"{tmp_path}: not a run of this version; accepted: another folder, or --fresh in this one"
    for config in (
        {"minialign": "0.0.9", "settings": {}},
        {"minialign": "0.1.0", "format": FORMAT + 1, "settings": {}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert is_run(tmp_path)
        with pytest.raises(InputError) as error, opened(tmp_path):
            pass
        assert str(error.value) == message
    with opened(tmp_path, fresh=True) as run:
        assert run.config == {} and run.stages == {}
    Run(tmp_path).remember({})
    for damaged in ("[]", '{"reward": 7}', '{"reward": {"seconds": 1}}', "{"):
        (tmp_path / "stages.json").write_text(damaged)
        with pytest.raises(InputError) as error:
            Run(tmp_path)
        assert "stages.json" in str(error.value) and "\n" not in str(error.value)


def test_a_run_with_the_old_name_of_a_setting_continues(tmp_path):
    Run(tmp_path).remember({"seed": 3})
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"settings": {"seed": 3, "draw_batch": 16}}))
    with opened(tmp_path) as run:
        assert run.settings == {"seed": 3, "sampling_batch_size": 16}
        run.remember()
    assert json.loads(path.read_text())["settings"] == {"seed": 3, "sampling_batch_size": 16}
    for settings in ({"unknown": 1}, [], None):
        path.write_text(json.dumps(config | {"settings": settings}))
        with pytest.raises(InputError, match="settings are damaged"):
            Run(tmp_path)


def test_folders_that_are_no_run_are_left_alone(tmp_path):
    for name in ("new/below", "hidden", "imported", "run"):
        check_folder(tmp_path / name)
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".git").touch()
    check_folder(tmp_path / "hidden")
    (tmp_path / "imported").mkdir()
    FeedbackStore(tmp_path / "imported").close()
    check_folder(tmp_path / "imported")
    Run(tmp_path / "run").remember({})
    check_folder(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "UNet"}')
    for name in ("other", "other/config.json", "other/config.json/run"):
        with pytest.raises(InputError, match="holds files that are not a run's|not a folder that can be written"):
            check_folder(tmp_path / name)
    with pytest.raises(InputError, match="cannot be used"):
        check_folder(tmp_path / ("long" * 100))


OF_RUN = (
    "config.json", "stages.json", "metrics.jsonl", "images/000001.png", "reward/config.json",
    "reward/model.safetensors", "reward/held_out.json", "cache/rewards.safetensors", "cache/features.safetensors",
    "cache/entries-1.safetensors", "checkpoints/step-100/shard-0-of-1.safetensors", "checkpoints/step-100/SHA256SUMS",
    "model/model_index.json", "model/unet/config.json", "model/unet/diffusion_pytorch_model.safetensors",
    "lora.safetensors", "results.json", "report.html", "best-of-n.png", "compare/base-12345678/config.json",
    "compare/base-12345678/images/000000.png", "tensorboard/finetune/events.out.1", "validation/step-100.png",
    "skipped.jsonl",
)  # fmt: skip
OF_OTHERS = ("notes.txt", "images/000002.png", "images/1.psd", "model/thesis.pdf", "compare/mine/a.png", "reward/a.txt")


def files(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def finished(folder):
    """Every kind of file that a run writes, of which its removal reads two."""
    for name in OF_RUN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    for place, name in ((folder, "images/000001.png"), (folder / "compare" / "base-12345678", "images/000000.png")):
        store = FeedbackStore(place)
        store.add_images([("a fox", name, 0)], {"seed": 0})  # which says that a model sampled it
        store.close()
    return folder


def test_fresh_removes_what_a_run_wrote_and_names_the_rest(tmp_path, capsys):
    run = finished(tmp_path / "run")
    remove_run(run)
    assert list(run.iterdir()) == [] and capsys.readouterr().err == ""
    run = finished(tmp_path / "run")
    for name in OF_OTHERS:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    remove_run(run)
    assert files(run) == set(OF_OTHERS)
    assert (
        capsys.readouterr().err
        == "--fresh leaves what the run did not write: compare, images, model, notes.txt, reward\n"
    )


def test_fresh_follows_links_and_says_what_it_cannot_remove(tmp_path, monkeypatch):
    run, disk = finished(tmp_path / "run"), tmp_path / "disk"
    shutil.move(run / "images", disk)
    (run / "images").symlink_to(disk)
    (disk / "mine.png").touch()
    remove_run(run)
    assert files(disk) == {"mine.png"} and (run / "images").is_symlink()
    run = finished(tmp_path / "second")

    def refused(path, *how):
        if path.name == "lora.safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        os.unlink(path)

    monkeypatch.setattr(engine.Path, "unlink", refused)
    with pytest.raises(InputError, match="--fresh: cannot be removed: .*lora.safetensors"):
        remove_run(run)


def labelled(folder, name: str):
    folder.mkdir(parents=True, exist_ok=True)
    store = FeedbackStore(folder)
    store.add_images([("a fox", "images/000001.png", 0)], {"seed": 0})
    store.add_labels(name, [(1, "good")])
    return store


@pytest.mark.parametrize("place", ["", "compare/base-12345678"])
def test_labels_and_comparisons_of_people_are_not_for_a_flag_to_delete(tmp_path, place):
    run = finished(tmp_path / "run")
    store = labelled(run / place, "Anna")
    (run / place / "config.json").write_text('{"minialign": "0.0.9"}')  # a run of another version can be removed too
    before = files(run)
    with pytest.raises(InputError, match="feedback.sqlite holds labels by Anna; move it away first"):
        remove_run(run)
    assert files(run) == before
    store.remove_labels()
    store.add_comparison("Bob", 1, run / place, run / "images" / "000001.png", "this", "left")
    with pytest.raises(InputError, match="holds 1 comparisons; move it away first .*--export FILE keeps them"):
        remove_run(run)
    store.close()


def test_the_annotators_labels_can_be_made_again(tmp_path):
    run = finished(tmp_path / "run")
    labelled(run, SIMULATED).close()
    remove_run(run)
    assert files(run) == set()


def test_imported_labels_can_be_removed_until_somebody_changes_one(tmp_path):
    folder = finished(tmp_path / "run")
    (folder / "config.json").unlink()  # as of a run that begins
    run, store = Run(folder), labelled(folder, "Anna")
    with run.stage("label", "", SETTINGS, dict) as todo:
        assert todo
        run.stages["label"]["imported"] = label_digest(store)
    with pytest.raises(InputError, match="out of date"):
        do(Run(folder), "label", seed=1)
    store.add_labels("Anna", [(1, "bad")])
    for attempt in (lambda: remove_run(folder), lambda: do(Run(folder), "label", seed=1, redo=True)):
        with pytest.raises(InputError, match="holds labels by Anna"):
            attempt()
    assert store.labels() == {1: 0.0}
    run.stages["label"]["imported"] = label_digest(store)
    run.clear("label")
    assert store.labels() == {} and len(store.images()) == 1 and "label" not in Run(folder).stages
    store.add_labels("Anna", [(1, "good")])
    with run.stage("label", "", SETTINGS, dict):
        run.stages["label"]["imported"] = label_digest(store)
    store.close()
    remove_run(folder)
    assert files(folder) == set()


@pytest.mark.parametrize("damage", ["{", "[]", '{"label": 7}'])
def test_fresh_is_the_way_out_of_a_damaged_run(tmp_path, damage):
    folder = finished(tmp_path / "run")
    for name in ("stages.json", "config.json"):
        (folder / name).write_text(damage)
    labelled(folder, SIMULATED).close()
    remove_run(folder)
    assert files(folder) == set()
