"""Learning rates, moving averages, stateless randomness and checkpoints."""

import io
import math
import os
import random
import re
import resource

import pytest
import torch
import tqdm.std

from minialign.engine.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from minialign.engine.optimising import EMA, generator, learning_rate, progress
from minialign.files import InputError, temporary_name


def test_learning_rate_warms_up_holds_and_decays():
    rates = [learning_rate(step, 100, 2.0, warmup=10, decay=0.5) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * k for k in range(1, 11)])
    assert rates[10:51] == [2.0] * 41
    assert rates[75] == pytest.approx(1.0) and rates[99] == pytest.approx(1 - math.cos(math.pi / 50), rel=1e-6)


# of get_{cosine,linear}_schedule_with_warmup with 40 of 100 steps of warm-up, in diffusers 0.42.1, at these steps
STEPS = (40, 41, 55, 70, 85, 99)
RECORDED = {
    "cosine": (1.0, 0.9993147673772869, 0.8535533905932737, 0.5, 0.14644660940672627, 0.0006852326227130834),
    "linear": (1.0, 0.9833333333333333, 0.75, 0.5, 0.25, 0.016666666666666666),
}


@pytest.mark.parametrize("schedule", RECORDED)
def test_the_learning_rate_falls_after_the_warm_up_as_in_diffusers(schedule):
    rates = [learning_rate(step, 100, 2.0, 40, schedule) for step in range(100)]
    assert [rates[step] / 2 for step in STEPS] == pytest.approx(RECORDED[schedule], rel=1e-12)
    assert max(abs(b - a) for a, b in zip(rates[38:], rates[39:])) < 0.06  # no jump where the warm-up ends
    module = pytest.importorskip("diffusers.optimization")
    optimizer = torch.optim.SGD([torch.zeros(1)], 2.0)
    theirs = getattr(module, f"get_{schedule}_schedule_with_warmup")(optimizer, 40, 100)
    assert rates[40:] == pytest.approx([2 * theirs.lr_lambdas[0](step) for step in range(40, 100)], rel=1e-12)


def test_a_late_fall_waits_for_the_warm_up():
    rates = [learning_rate(step, 100, 1.0, warmup=80, decay=0.5) for step in range(100)]
    assert rates[79] == rates[80] == 1 and rates[90] == pytest.approx(0.5)
    assert [learning_rate(step, 100, 1.0, warmup=80, decay=0.0) for step in (80, 99)] == [1, 1]


class Clock:
    """Seconds that pass only when a test says so, and a stream that says whether it is a terminal."""

    def __init__(self, monkeypatch, terminal):
        self.now, self.stream = 1000.0, io.StringIO()
        self.stream.isatty = lambda: terminal
        monkeypatch.setattr(tqdm.std, "time", lambda: self.now)
        monkeypatch.setattr("sys.stderr", self.stream)
        monkeypatch.delenv("TQDM_DISABLE", raising=False)

    def work(self, title, items, seconds, within=lambda i: None):
        bar = progress(range(items), title)
        for i in bar:
            self.now += seconds
            bar.set_postfix_str(f"loss {i / 100:.3g}", refresh=False)
            within(i)
        return self.stream.getvalue()


def screen(written):
    """The lines that a terminal shows after what was written."""
    rows, row, column = [""], 0, 0
    for mark in re.findall(r"\x1b\[A|.|\n", written.replace("\r", "\x00")):
        if mark in ("\n", "\x1b[A"):
            row, column = row + (1 if mark == "\n" else -1), 0
            rows += [""] * (row + 1 - len(rows))
        elif mark == "\x00":
            column = 0
        else:
            rows[row] = rows[row][:column].ljust(column) + mark + rows[row][column + 1 :]
            column += 1
    return rows


def test_a_file_gets_a_line_of_progress_a_minute_and_nothing_is_redrawn(monkeypatch):
    clock = Clock(monkeypatch, terminal=False)
    lines = clock.work("fine-tune", 20, 10).split("\n")
    assert lines == [
        "fine-tune: 6 of 20 in 01:00, 02:20 left, loss 0.05",
        "fine-tune: 12 of 20 in 02:00, 01:20 left, loss 0.11",
        "fine-tune: 18 of 20 in 03:00, 00:20 left, loss 0.17",
        "",
    ]
    assert clock.work("short", 5, 11) == "\n".join(lines)  # ends within a minute


def test_a_terminal_keeps_one_line_of_a_finished_bar_and_none_of_an_inner_or_quick_one(monkeypatch):
    clock = Clock(monkeypatch, terminal=True)
    assert clock.work("validate", 12, 0.01) == ""  # ran in no time
    written = clock.work("fine-tune", 4, 10, lambda i: clock.work("inner", 3, 1))
    assert "inner: " in written and "fine-tune: 100%" in written
    (line,) = [line for line in screen(written) if line.strip()]
    assert line.strip().endswith("4/4 [00:52<00:00, loss 0.03]")


def test_random_generators_depend_on_the_key_alone():
    draws = {key: torch.rand(4, generator=generator(*key)).tolist() for key in [(0, 1), (1, 0), (0, 1, 0), (0, 2)]}
    assert len({tuple(draw) for draw in draws.values()}) == 4
    assert draws[0, 1] == torch.rand(4, generator=generator(0, 1)).tolist()


def test_keys_beyond_32_bits_have_generators_of_their_own_and_the_others_stay():
    def first(*key):
        return torch.randint(2**31, (2,), generator=generator(*key)).tolist()

    keys = [(seed, *rest) for seed in (5, 2**32 + 5, 2**33 + 5, 2**63 + 5, 2**80 + 5, -1) for rest in ((), (0,), (1,))]
    keys += [(0, 2**32), (2**32, 0), (2**32, 2**32)]
    assert len({tuple(first(*key)) for key in keys}) == len(keys)
    assert first(21, 5, 399) == [850560399, 1354161479]  # as before: the numbers of all runs
    assert first(2**32 - 1, 7) == [805919886, 102774719]


def test_the_callers_random_state_is_left_alone(tmp_path):
    parts = make(False)
    before = torch.get_rng_state(), random.getstate()
    generator(1, 2)
    train(*parts, 0, 2)
    save_checkpoint(tmp_path, 2, *parts)
    load_checkpoint(tmp_path, *parts)
    with parts[2].in_place(parts[0]):
        pass
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


def test_moving_average_follows_its_recursion():
    model = torch.nn.Linear(2, 2)
    ema, expected = EMA(model, 0.5), model.weight.detach().clone()
    for step in range(20):
        with torch.no_grad():
            model.weight += 1
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.weights["weight"], expected)


def make(channels_last: bool):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 2))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model, torch.optim.AdamW(model.parameters(), 1e-2, fused=True), EMA(model, 0.9)


def train(model, optimizer, ema, first, last):
    for step in range(first, last):
        x = torch.randn(5, 3, 4, 4, generator=generator(7, step))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, step)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_resumed_run_is_bit_identical(tmp_path, channels_last):
    whole = make(channels_last)
    train(*whole, 0, 6)
    first = make(channels_last)
    train(*first, 0, 3)
    save_checkpoint(tmp_path, 2, *first)
    save_checkpoint(tmp_path, 3, *first)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-2", "step-3"]
    second = make(channels_last)
    assert load_checkpoint(tmp_path, *second) == 3
    train(*second, 3, 6)
    for a, b in zip(whole[0].parameters(), second[0].parameters()):
        assert torch.equal(a, b)
    for name, weight in whole[2].weights.items():
        assert torch.equal(weight, second[2].weights[name])


def test_no_checkpoint_is_step_zero(tmp_path):
    assert load_checkpoint(tmp_path / "none", *make(False)) == 0


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    """As with a linked folder of checkpoints that a new run finds: an older model must not pass for the new one's."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "disk")
    save_checkpoint(tmp_path / "checkpoints", 3, *make(False), digest="seed 0")
    assert (tmp_path / "disk" / "step-3").is_dir()
    assert load_checkpoint(tmp_path / "checkpoints", *make(False), digest="seed 0") == 3
    for digest in ("seed 3", ""):
        with pytest.raises(InputError, match="step-3: was saved with other settings or by an older version"):
            load_checkpoint(tmp_path / "checkpoints", *make(False), digest=digest)
    sums = tmp_path / "disk" / "step-3" / "SHA256SUMS"
    sums.write_text("".join(line for line in sums.read_text().splitlines(True) if not line.startswith("#")))
    with pytest.raises(InputError, match="or by an older version; accepted: --fresh"):
        load_checkpoint(tmp_path / "checkpoints", *make(False), digest="seed 0")


def test_what_is_no_checkpoint_stays(tmp_path):
    """A user's names, a link to a checkpoint elsewhere; what a killed process was writing goes."""
    mine = ["step-final", "step-", "step-1-best", "step-²", "mystep-7"]
    for name in mine:
        (tmp_path / name).mkdir()
    (tmp_path / "step-8.txt").write_text("mine")
    left = temporary_name(tmp_path / "step-9").name.replace(str(os.getpid()), str(2**22 + 1))  # no such process
    (tmp_path / left).mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "step-0").symlink_to(tmp_path / "elsewhere")
    assert load_checkpoint(tmp_path, *make(False)) == 0  # it has no checksums: set aside
    (tmp_path / "damaged-step-0").rename(tmp_path / "step-0")
    for step in (1, 2):
        save_checkpoint(tmp_path, step, *make(False))
    assert [path.name for path in checkpoints(tmp_path)] == ["step-1", "step-2"]
    assert {path.name for path in tmp_path.iterdir()} == {*mine, "step-8.txt", "elsewhere", "step-1", "step-2"}


def test_the_last_checkpoints_are_kept(tmp_path):
    for step in range(5):
        save_checkpoint(tmp_path, step, *make(False))
    assert [path.name for path in checkpoints(tmp_path)] == ["step-3", "step-4"]


def state_file(place):
    (path,) = place.glob("*.safetensors")
    return path


def flip_a_bit(place):
    content = bytearray(state_file(place).read_bytes())
    content[-1] ^= 1
    state_file(place).write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        lambda place: state_file(place).write_bytes(b"short"),
        lambda place: state_file(place).unlink(),
        lambda place: (place / "SHA256SUMS").unlink(),
        lambda place: (place / "SHA256SUMS").write_bytes(b"\xff"),
        lambda place: (place / "SHA256SUMS").write_bytes(b""),
    ],
    ids=["bit", "short", "missing", "no checksum", "not text", "nothing"],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, damage):
    parts = make(False)
    train(*parts, 0, 2)
    save_checkpoint(tmp_path, 2, *parts)
    good = [p.detach().clone() for p in parts[0].parameters()]
    train(*parts, 2, 4)
    save_checkpoint(tmp_path, 4, *parts)
    damage(tmp_path / "step-4")
    resumed = make(False)
    assert load_checkpoint(tmp_path, *resumed) == 2
    assert "step-4 is damaged" in capsys.readouterr().err
    for a, b in zip(good, resumed[0].parameters()):
        assert torch.equal(a, b)
    assert (tmp_path / "damaged-step-4").is_dir()
    damage(tmp_path / "step-2")
    assert load_checkpoint(tmp_path, *resumed) == 0


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """A limit on the size of files stands for the disk."""
    parts = make(False)
    train(*parts, 0, 1)
    save_checkpoint(tmp_path, 1, *parts)
    train(*parts, 1, 2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(InputError, match="step-2: cannot be written .*the last checkpoint: .*step-1"):
            save_checkpoint(tmp_path, 2, *parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert load_checkpoint(tmp_path, *make(False)) == 1
