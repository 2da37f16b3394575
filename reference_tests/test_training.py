"""Learning rates, moving averages, stateless randomness, atomic files and checkpoints."""

import math
import resource

import pytest
import torch

from minialign.models.pretrained import InputError
from minialign.training import (
    EMA,
    atomic,
    checkpoints,
    generator,
    learning_rate,
    load_checkpoint,
    save_checkpoint,
)


def test_learning_rate_warms_up_holds_and_decays():
    rates = [learning_rate(step, 100, 2.0, warmup=10, decay=0.5) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * k for k in range(1, 11)])
    assert rates[10:51] == [2.0] * 41
    assert rates[75] == pytest.approx(1.0) and rates[99] == pytest.approx(1 - math.cos(math.pi / 50), rel=1e-6)


def test_random_generators_depend_on_the_key_alone():
    draws = {key: torch.rand(4, generator=generator(*key)).tolist() for key in [(0, 1), (1, 0), (0, 1, 0), (0, 2)]}
    assert len({tuple(draw) for draw in draws.values()}) == 4
    assert draws[0, 1] == torch.rand(4, generator=generator(0, 1)).tolist()


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


def test_atomic_leaves_the_old_content_when_writing_fails(tmp_path):
    file, folder = tmp_path / "a.txt", tmp_path / "b"
    for text in ("old", "new"):
        with atomic(file) as temporary:
            temporary.write_text(text)
        with atomic(folder) as temporary:
            temporary.mkdir()
            (temporary / text).write_text(text)
    for path in (file, folder):
        with pytest.raises(RuntimeError), atomic(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError
    assert file.read_text() == "new" and [p.name for p in folder.iterdir()] == ["new"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b"]


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
