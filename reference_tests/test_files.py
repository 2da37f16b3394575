"""Files written whole or not at all: what is replaced, what is not, and what a killed process leaves."""

import json
import os
import re
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minialign import RewardModel, files
from minialign.files import InputError, atomic, remove_unfinished, temporary_name, write_json, write_tensors


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_folder(path: Path, text: str) -> None:
    with atomic(path, replace_folder="index.json") as temporary:
        (temporary / "index.json").write_text(text)


def test_the_old_content_stays_when_writing_fails(tmp_path):
    file, folder = tmp_path / "a.txt", tmp_path / "b"
    for text in ("old", "new"):
        with atomic(file) as temporary:
            temporary.write_text(text)
        write_folder(folder, text)
    for path, how in ((file, None), (folder, "index.json")):
        with pytest.raises(RuntimeError), atomic(path, replace_folder=how) as temporary:
            (temporary if how is None else temporary / "x").write_text("half")
            raise RuntimeError
    assert file.read_text() == "new" and names(folder) == ["index.json"] and names(tmp_path) == ["a.txt", "b"]


def test_a_file_never_takes_the_place_of_a_folder(tmp_path):
    """What clusters write is a folder named labels.csv."""
    (tmp_path / "labels.csv").mkdir()
    (tmp_path / "labels.csv" / "part-0").write_text("mine")
    (tmp_path / "link.csv").symlink_to(tmp_path / "labels.csv")
    for name in ("labels.csv", "link.csv"):
        with pytest.raises(InputError, match=f"{name}: is a folder; accepted: the name of a file"):
            write_json(tmp_path / name, 1)
    assert names(tmp_path) == ["labels.csv", "link.csv"] and (tmp_path / "labels.csv" / "part-0").exists()


def test_a_folder_is_replaced_only_where_it_is_known(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    write_folder(tmp_path / "empty", "new")
    for name in ("project", "file"):
        with pytest.raises(InputError, match=f"{name}: is there and holds no index.json; accepted: an empty folder"):
            write_folder(tmp_path / name, "new")
    assert names(tmp_path / "project") == ["thesis.tex"] and (tmp_path / "file").read_text() == "mine"
    assert names(tmp_path) == ["empty", "file", "project"]


def test_links_to_folders_are_followed_and_links_to_files_replaced(tmp_path):
    run, disk = tmp_path / "run", tmp_path / "disk"
    for folder in (run, disk / "model"):
        folder.mkdir(parents=True)
    (disk / "mine").write_text("mine")
    (run / "model").symlink_to(disk / "model")
    (run / "stages.json").symlink_to(disk / "mine")
    for text in ("old", "new"):
        write_folder(run / "model", text)
    write_json(run / "stages.json", 1)
    assert (run / "model").is_symlink() and (disk / "model" / "index.json").read_text() == "new"
    assert (disk / "mine").read_text() == "mine" and not (run / "stages.json").is_symlink()
    assert names(run) == ["model", "stages.json"] and names(disk) == ["mine", "model"]


def test_errors_of_the_system_name_the_file(tmp_path):
    """A limit on the size of files stands for the disk; it reaches Python, safetensors and libraries alike."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        for name, write in (
            ("a.json", lambda path: write_json(path, "x" * 2000)),
            ("a.safetensors", lambda path: write_tensors(path, {"a": torch.zeros(2000)})),
            ("folder", lambda path: write_folder(path, "x" * 2000)),
        ):
            with pytest.raises(OSError, match=re.escape(f"File too large: '{tmp_path / name}")):
                write(tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=re.escape(f"directory: '{tmp_path / 'file'}")):
        write_json(tmp_path / "file" / "a.json", 1)


def killed(act) -> None:
    """Call `act` in a process of its own, which kills itself within."""
    process = os.fork()
    if process == 0:
        try:
            act()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_kill_left_is_put_right(tmp_path, monkeypatch):
    """Killed amid writing a file, and between moving an old folder aside and moving the new one to its place."""
    run, disk = tmp_path / "run", tmp_path / "disk"
    run.mkdir()
    write_folder(disk / "model", "old")
    (run / "model").symlink_to(disk / "model")
    mine = [".env.old", ".notes.tmp", ".a.12.tmp", ".model.minialign.tmp", ".x.minialign-1-0123456.tmp"]
    for name in mine:
        (run / name).write_text("mine")
    (run / ".config.old").mkdir()
    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(files, "flush", die)
        killed(lambda: write_json(run / "a.json", 1))
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", lambda *how: replace(*how) or die())
        killed(lambda: write_folder(run / "model", "new"))
    assert len(names(run)) == 8 and len(names(disk)) == 2 and not (disk / "model").exists()
    (run / "below").mkdir()
    deep = temporary_name(run / "below" / "a")
    deep.write_text("mine")
    remove_unfinished(run, run / "model", run / "not there")
    assert names(run) == sorted([*mine, ".config.old", "below", "model"]) and deep.exists()
    assert names(disk) == ["model"] and (disk / "model" / "index.json").read_text() == "old"


def test_files_are_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", 1)
        write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
        write_folder(tmp_path / "model", "new")
    finally:
        os.umask(before)
    modes = {path.relative_to(tmp_path).as_posix(): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"a.json": 0o640, "a.safetensors": 0o640, "model": 0o750, "model/index.json": 0o640}


def test_what_another_process_is_writing_stays(tmp_path, monkeypatch):
    for process in (os.getppid(), os.getpid()):
        monkeypatch.setattr(files.os, "getpid", lambda process=process: process)
        temporary_name(tmp_path / f"of-{process}").touch()
    remove_unfinished(tmp_path)  # this process's number was a killed one's, as in containers that start again
    assert [name.split(".minialign-")[0] for name in names(tmp_path)] == [f".of-{os.getppid()}"]


def test_a_link_under_a_temporary_name_is_not_written_through(tmp_path, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda number: "0" * 2 * number)
    (tmp_path / "mine").mkdir()
    temporary_name(tmp_path / "a.json").symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError):
        write_json(tmp_path / "a.json", 1)
    assert names(tmp_path / "mine") == []


def test_the_reward_model_leaves_what_is_beside_it(tmp_path):
    (tmp_path / "thesis.tex").write_text("three years")
    model = RewardModel({"width": 4, "hidden": 8, "clip": None})
    for _ in range(2):
        model.save_pretrained(tmp_path)
    assert names(tmp_path) == ["config.json", "model.safetensors", "thesis.tex"]
    assert json.loads((tmp_path / "config.json").read_text())["width"] == 4
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
