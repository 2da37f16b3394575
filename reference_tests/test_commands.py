"""Command lines: how flags may be spelled, and that a mistake or an error of the system is one line."""

import errno
import resource
import runpy
import sqlite3
import sys

import pytest
import torch
from safetensors import SafetensorError

from minialign.engine.commands import ELSEWHERE, Parser, in_range, run_command
from minialign.engine.optimising import Terminated
from minialign.feedback import FeedbackStore
from minialign.files import InputError, write_json, write_tensors


def parser() -> Parser:
    made = Parser(prog="command")
    made.add_argument("run", nargs="?")
    made.add_argument("--learning-rate", type=in_range(float, 0, 1))
    made.add_argument("--lr-schedule")
    made.add_argument("--batch-size", type=in_range(int, 1))
    made.add_argument("--prompts")
    return made


def refusal(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(words)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    return err


def test_underscores_are_hyphens():
    for flag in ("--learning-rate", "--learning_rate"):
        assert parser().parse_args([flag, "1e-4"]).learning_rate == 1e-4
        assert parser().parse_args([f"{flag}=1e-4", "a_b"]).run == "a_b"
    args = parser().parse_args(["--prompts", "my_file=x_y", "--batch_size", "3", "--", "--not_a_flag"])
    assert (args.prompts, args.batch_size, args.run) == ("my_file=x_y", 3, "--not_a_flag")


@pytest.mark.parametrize(
    "words, meant",
    [
        (("--lr", "1e-5"), "--lr: no such flag; did you mean --learning-rate?"),  # it was taken for --lr-schedule
        (("--train_batch_size", "8"), "--train_batch_size: no such flag; did you mean --batch-size?"),
        (("--train-batch-size=8",), "--train-batch-size: no such flag; did you mean --batch-size?"),
        (("--batch-sise", "8"), "--batch-sise: no such flag; did you mean --batch-size?"),
        (("-batch-size", "8"), "-batch-size: no such flag; did you mean --batch-size?"),
        (("--learning", "1"), "--learning: no such flag; did you mean --learning-rate?"),
        (("--mixed_precision", "fp16"), "--mixed_precision: no such flag (--help"),  # this command has no --dtype
        (("--learning_rate", "7"), "argument --learning-rate: '7'; accepted: a number from 0 to 1"),
    ],
)
def test_flags_are_not_guessed(capsys, words, meant):
    assert meant in refusal(capsys, *words)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_other_trainers_flags_lead_to_those_of_the_main_job(capsys, monkeypatch):
    for theirs, ours in ELSEWHERE.items():
        monkeypatch.setattr(sys, "argv", ["finetune", f"--{theirs[2:].replace('-', '_')}", "1"])
        with pytest.raises(SystemExit):
            runpy.run_module("minialign.finetune", run_name="__main__", alter_sys=True)
        assert f"did you mean {ours}?" in capsys.readouterr().err


def ended(capsys, main) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    return stop.value.code, capsys.readouterr().err


def raises(error: BaseException):
    def main():
        raise error

    return main


FULL = OSError(errno.ENOSPC, "No space left", "/disk/a.json")
SPACE = "; once there is space, the same command (without --fresh) continues from the last checkpoint\n"


@pytest.mark.parametrize(
    "error, code, line",
    [
        (InputError("--out x: is a file"), 2, "error: --out x: is a file\n"),
        (FULL, 2, f"error: /disk/a.json: cannot be written (No space left){SPACE}"),
        (
            SafetensorError("I/O error: File too large"),
            2,
            f"error: cannot be written (I/O error: File too large){SPACE}",
        ),
        (PermissionError(13, "Permission denied", "/a"), 2, "error: /a: Permission denied\n"),
        (OSError(98, "Address already in use"), 2, "error: Address already in use\n"),
        (sqlite3.OperationalError("disk is full"), 2, f"error: feedback.sqlite: cannot be used (disk is full){SPACE}"),
        (sqlite3.DatabaseError("malformed"), 2, "error: feedback.sqlite: cannot be used (malformed)\n"),
    ],
)
def test_what_ends_a_command_is_one_line(capsys, error, code, line):
    assert ended(capsys, raises(error)) == (code, line)


def test_how_commands_end(capsys):
    assert ended(capsys, lambda: None) == (0, "")
    code, err = ended(capsys, raises(KeyboardInterrupt()))
    assert code == 130 and err.startswith("\ninterrupted: the same command")
    code, err = ended(capsys, raises(Terminated("SIGTERM at step 3")))
    assert code == 143 and err.startswith("\nSIGTERM at step 3: the same command")


@pytest.mark.parametrize("error", [sqlite3.IntegrityError("x"), OSError("cannot write mode F as PNG"), KeyError("x")])
def test_a_mistake_of_the_program_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_command(raises(error))


def test_a_store_that_another_program_holds_is_one_line(tmp_path, capsys, monkeypatch):
    FeedbackStore(tmp_path).close()
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **how: connect(path, **how | {"timeout": 0.01}))
    other = connect(tmp_path / "feedback.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")

    def main():
        FeedbackStore(tmp_path).add_images([("a cat", "0.png", 0)])

    code, err = ended(capsys, main)
    other.close()
    assert code == 2 and "database is locked" in err and err.count("\n") == 1 and "feedback.sqlite: " in err


def test_a_full_disk_names_the_file(tmp_path, capsys):
    """A limit on the size of files stands for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, write in (
        ("a.json", lambda: write_json(tmp_path / "a.json", "x" * 2000)),
        ("a.safetensors", lambda: write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2000)})),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            code, err = ended(capsys, write)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert code == 2 and err.startswith(f"error: {tmp_path / name}: cannot be written (File too large); once")
        assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_under_torchrun_a_finished_command_ends_before_torchs_threads_can_abort_it(monkeypatch, capfd):
    codes = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    monkeypatch.setattr("os._exit", codes.append)
    with pytest.raises(SystemExit):  # which os._exit never comes to
        run_command(lambda: print("done"))
    assert codes == [0] and capfd.readouterr().out == "done\n"
