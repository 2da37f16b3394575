"""The fine-tuning loop: its samples, its loss against closed forms, resuming bit by bit, what each setting changes."""

import contextlib
import itertools
import math
import signal

import pytest
import torch
import torch.nn.functional as F
from comparisons import SMALL_UNET
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from minialign import NoiseSchedule
from minialign.engine.checkpoints import checkpoints
from minialign.engine.optimising import Terminated, learning_rate
from minialign.files import InputError
from minialign.finetune import WEIGHTINGS, FineTuning, Latents, TrainingData, finetune, step_loss
from minialign.finetune.batches import micro_batch, sample_step, stratified_timesteps
from minialign.finetune.weights import SAMPLINGS, min_snr_weight
from minialign.models.unet import UNet

UNET = SMALL_UNET | {"sample_size": 4, "norm_num_groups": 4}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_either_sampling_estimates_the_weighted_mean(name):
    """Without bias, and with the variance that its closed form has."""
    g = torch.Generator().manual_seed(0)
    weight, f = torch.rand(50, generator=g), torch.randn(50, generator=g)
    weight[:10] = 0
    w, number = weight.double(), 400_000
    chosen, factors = SAMPLINGS[name](weight, number, g)
    assert factors.shape == chosen.shape == (number,)
    expected, terms = (w * f).mean(), (factors * f[chosen]).double()
    square = {"proportional": w.mean() * (w * f.square()).mean(), "uniform": (w * f).square().mean()}[name]
    variance = square - expected.square()
    assert abs(terms.mean() - expected) < 4 * (variance / number) ** 0.5
    assert terms.var() == pytest.approx(float(variance), rel=0.02)
    assert abs(f.double().mean() - expected) > 20 * (variance / number) ** 0.5  # no weights would be found out
    assert (chosen.min() >= 10) == (name == "proportional")  # no UNet call is spent on images that weigh nothing


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("total", [1, 3])
def test_the_factors_of_a_step_are_those_of_its_rows(name, total):
    """Micro-batch by micro-batch the loss of a row has its own factor, scaled to the mean over the step."""
    weight = torch.arange(1.0, 6)
    latents = Latents(torch.zeros(5, 1, 2, 2), torch.zeros(5, 1, 2, 2), torch.zeros(5, dtype=torch.long))
    data = TrainingData([torch.zeros(2, 1, 1)], latents, weight, latents)
    sample = sample_step(0, data, (7, 2), 10, image_sampling=name)
    found = torch.zeros(7)
    for number in range(total):
        batch = micro_batch(sample, number, total, data, 0.5, torch.device("cpu"))
        own = batch.factors[~batch.is_pair]
        found[number::total] = own / len(own) / total  # the mean over its rows, and over the micro-batches
    expected = weight[sample.model_images] if name == "uniform" else torch.full((7,), 3.0)
    torch.testing.assert_close(found, expected / 7)


def test_weightings_by_hand():
    reward = torch.tensor([0.2, 0.8, 0.5, 0.5, 0.9])
    expected = {
        "reward": [0.2, 0.8, 0.5, 0.5, 0.9],
        "threshold": [0, 1, 0, 0, 1],  # tau 0.5
        "exponential": [math.exp(2 * (r - 1)) for r in (0.2, 0.8, 0.5, 0.5, 0.9)],
    }
    assert expected.keys() == WEIGHTINGS.keys()
    for name, weighting in WEIGHTINGS.items():
        weight = weighting.weight(reward, 0.5)
        torch.testing.assert_close(weight, torch.tensor(expected[name], dtype=torch.float32), atol=1e-4, rtol=1e-4)


def test_timesteps_cover_the_schedule_evenly_and_in_any_order():
    g = torch.Generator().manual_seed(0)
    samples = torch.stack([stratified_timesteps(1000, 8, g) for _ in range(4000)])
    assert (samples.sort(dim=1).values // 125 == torch.arange(8)).all()  # one in each eighth
    spread = 1000 / 12**0.5 / 4000**0.5  # the standard deviation of the mean of as many uniform samples
    assert (abs(samples.double().mean(0) - 499.5) < 4 * spread).all()  # whichever row, any time is as likely
    assert samples.min() == 0 and samples.max() == 999


def small_data(pairs: bool = True) -> TrainingData:
    """Five model images, three pairs, four prompts and the empty one, of random numbers."""
    g = torch.Generator().manual_seed(0)
    images, others = (
        Latents(torch.randn(n, 2, 3, 3, generator=g), torch.rand(n, 2, 3, 3, generator=g), torch.arange(n) % 4)
        for n in (5, 3)
    )
    weight = torch.rand(5, generator=g)
    return TrainingData([torch.randn(5, 6, 2, generator=g)], images, weight, others if pairs else None)


def test_a_step_is_sampled_from_seed_and_step_alone():
    data, how = small_data(), {"rows": (4, 2), "timesteps": 100, "prompt_dropout": 0.5, "noise_offset": 0.1, "seed": 4}
    samples = [vars(sample_step(step, data, **how)) for step in (0, 1, 2, 1)]
    for name, first in samples[1].items():
        assert torch.equal(first, samples[3][name])
        assert name == "factors" or not torch.equal(first, samples[2][name])
    evenly = vars(sample_step(1, data, **how, image_sampling="uniform"))
    for name in ("latents", "noise", "t", "no_prompt"):  # however rows are sampled
        assert torch.equal(evenly[name], samples[1][name])
    assert not torch.equal(evenly["model_images"], samples[1]["model_images"])
    pairs = torch.cat([sample["pairs"] for sample in samples[:3]])
    assert pairs[:3].sort().values.tolist() == pairs[3:].sort().values.tolist() == [0, 1, 2]  # each once an epoch


class Linear(torch.nn.Module):
    """weight * x_t + the mean of the context, as a UNet; notes what it reads."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.tensor(0.7)), []

    def forward(self, x, t, context):
        self.seen.append((x, t, context))
        return self.weight * x + context.mean((1, 2))[:, None, None, None]


def by_hand(weight, x0, noise, t, context, factors, is_pair, beta, kind, min_snr=0.0):
    """The loss of a step for `Linear`, its gradient by the weight, and each row's error: float64, row by row."""
    schedule, terms, slopes, errors = NoiseSchedule.from_config({"prediction_type": kind}), [[], []], [[], []], []
    for i in range(len(x0)):
        abar = float(schedule.alphas_cumprod[t[i]])
        x, eps, c = x0[i].double(), noise[i].double(), float(context[i].double().mean())
        x_t = abar**0.5 * x + (1 - abar) ** 0.5 * eps
        velocity = abar**0.5 * eps - (1 - abar) ** 0.5 * x
        difference = weight * x_t + c - {"epsilon": eps, "v_prediction": velocity, "sample": x}[kind]
        snr = abar / (1 - abar)
        scale = min(snr, min_snr) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[kind] if min_snr else 1.0
        scale *= 1.0 if is_pair[i] else float(factors[i])
        errors.append(float(difference.square().mean()))
        terms[int(is_pair[i])].append(scale * errors[-1])
        slopes[int(is_pair[i])].append(scale * float(2 * (difference * x_t).mean()))
    loss, slope = (sum(a) / len(a) + beta * sum(b) / max(len(b), 1) for a, b in (terms, slopes))
    return loss, slope, errors


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("min_snr", [0.0, 2.0])
def test_the_loss_of_a_step_is_the_papers(kind, min_snr):
    g, network = torch.Generator().manual_seed(1), Linear()
    x0, noise = torch.randn(2, 7, 2, 3, 3, generator=g)
    t, context, factors = torch.arange(7) * 150, torch.randn(7, 6, 2, generator=g), torch.rand(7, generator=g)
    is_pair = torch.tensor([False, True, False, False, True, False, False])
    schedule = NoiseSchedule.from_config({"prediction_type": kind})
    loss, errors = step_loss(network, schedule, x0, noise, t, [context], factors, is_pair, 0.3, min_snr=min_snr)
    loss.backward()
    expected = by_hand(0.7, x0, noise, t, context, factors, is_pair, 0.3, kind, min_snr)
    assert (loss.item(), network.weight.grad.item()) == pytest.approx(expected[:2], rel=1e-4)
    assert errors.tolist() == pytest.approx(expected[2], rel=1e-4) and not errors.requires_grad
    alike, _ = step_loss(network, schedule, x0, noise, t, [context], torch.ones(7))  # all of them model images
    plain = F.mse_loss(network(schedule.add_noise(x0, noise, t), t, context), schedule.target(x0, noise, t))
    assert alike.item() == pytest.approx(plain.item(), rel=1e-5)  # the usual denoising loss


@pytest.mark.parametrize("total", [1, 2, 3, 4])
def test_micro_batches_make_the_step(total):
    """Their mean loss and gradient are those of all rows, also where the rows do not divide evenly, or have no pair."""
    data, network, schedule = small_data(), Linear(), NoiseSchedule.from_config({})
    sample = sample_step(8, data, (5, 2), 1000, prompt_dropout=0.4)
    batches = [micro_batch(sample, i, total, data, 0.3, torch.device("cpu")) for i in range(total)]
    losses = [step_loss(network, schedule, **vars(batch))[0] for batch in batches]
    (sum(losses) / total).backward()
    rows = [(data.model_images, i) for i in sample.model_images.tolist()] + [(data.pairs, i) for i in sample.pairs]
    latents = zip(rows, sample.latents)
    x0 = torch.stack([images.mean[i] + images.std[i] * latent for (images, i), latent in latents])
    prompts = [4 if dropped else int(images.row[i]) for (images, i), dropped in zip(rows, sample.no_prompt)]
    assert prompts[:5] == [0, 0, 4, 4, 0]  # the last prompt of all is the empty one
    context, factors = data.context[0][prompts], data.weight.mean().expand(7)
    expected = by_hand(0.7, x0, sample.noise, sample.t, context, factors, torch.arange(7) >= 5, 0.3, "epsilon")
    mean = sum(loss.item() for loss in losses) / total
    assert (mean, network.weight.grad.item()) == pytest.approx(expected[:2], rel=1e-4)


def test_the_log_has_the_numbers_of_the_step(tmp_path):
    """The loss, the mean error of each term, and the norm of the gradient as it was before it was clipped."""
    data, rows = small_data(), []
    settings = FineTuning(3, 0.3, 8, 1e-3, pretrain_fraction=0.4, log_every=1, clip_norm=1e-3, warmup=2)
    network, schedule = Linear(), NoiseSchedule.from_config({})
    weights = []
    network.register_forward_pre_hook(lambda network, inputs: weights.append(network.weight.item()))
    finetune(network, schedule, data, tmp_path, settings, log=rows.append)
    for step, row in enumerate(rows):
        batch = micro_batch(
            sample_step(step, data, (5, 3), 1000, prompt_dropout=0.1), 0, 1, data, 0.3, torch.device("cpu")
        )
        loss, slope, errors = by_hand(weights[step], **vars(batch) | {"context": batch.context[0]}, kind="epsilon")
        expected = {"step": step + 1, "loss": loss, "gradient_norm": abs(slope)}
        expected |= {"model_loss": sum(errors[:5]) / 5, "pretrain_loss": sum(errors[5:]) / 3}
        expected |= {"learning_rate": learning_rate(step, 3, 1e-3, 2)}
        assert row == pytest.approx(expected, rel=1e-4)


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
    settings: dict = {"beta": 0.0, "batch_size": 8, "learning_rate": 3e-3, "checkpoint_every": 5} | how
    finetune(
        unet, schedule, TrainingData((context,), images, reward, images), folder, FineTuning(steps, **settings), log=log
    )
    return unet


def leaning(unet: UNet) -> float:
    """The mean of x_0 predicted at the last timestep, from noise alone: positive for the first kind."""
    context = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))[:1].expand(32, 5, 6)
    noise = torch.randn(32, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return float(-unet(noise, torch.full((32,), 999), context).mean())  # v = -x_0 where abar is 0


def test_finetuning_moves_toward_what_is_rewarded(tmp_path):
    how = {"checkpoint_every": 100, "learning_rate": 1e-2}
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
    with pytest.raises(InputError, match="step 2: the loss is not finite .* checkpoint: none; the batch: image "):
        two_kinds(0.8, 10, tmp_path, learning_rate=1e30)
    assert not list(tmp_path.iterdir())


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
    settings = FineTuning(steps=50, beta=0.0, batch_size=16, learning_rate=1e-3)
    finetune(unet, NoiseSchedule.from_config({}), TrainingData((context,), images, torch.ones(4)), tmp_path, settings)
    rows = torch.cat(unet.seen)[:, 0, 0]
    share = [(rows == i).float().mean().item() for i in range(3)]
    assert abs(share[2] - 0.1) < 0.04 and abs(share[0] - 0.45) < 0.06  # three standard deviations, and the rest even


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
    tensors, rows = {}, []
    how = {"rows": rows.append, "log_every": 1, "dtype": torch.float16, "beta": 0.0, "checkpoint_every": 5}
    for steps, stop_at in ((5, 6), (10, None)):
        with pytest.raises(KeyboardInterrupt) if stop_at else contextlib.nullcontext():
            two_kinds(0.8, 10, tmp_path, stop_at=stop_at, reward_scale=1e4, **how)
        (shard,) = (tmp_path / f"step-{steps}").glob("*.safetensors")
        tensors[steps] = load_file(shard)
    scale = [tensors[steps]["scaler"][0].item() for steps in (5, 10)]
    assert scale[0] < 2**16 and scale[1] <= scale[0]
    assert tensors[5]["optimizer.step"] < 5 or tensors[10]["optimizer.step"] < 10
    assert "gradient_norm" not in rows[0] and all(math.isfinite(value) for row in rows for value in row.values())


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
    torch.testing.assert_close(min_snr_weight(schedule, t, 5.0).double(), expected, rtol=1e-4, atol=1e-6)


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
    settings = FineTuning(steps=40, beta=0.0, batch_size=16, learning_rate=1e-9, noise_offset=0.5)
    data = TrainingData((torch.zeros(2, 2, 1),), images, torch.ones(4))
    finetune(unet, NoiseSchedule.from_config({"trained_betas": [1.0]}), data, tmp_path / "offset", settings)
    noise = torch.cat(unet.seen)  # with abar = 0, x_t is the noise alone
    variance = noise.mean((2, 3)).var().item()  # of a channel's mean: 0.5^2 more than of 64 independent values
    assert variance == pytest.approx(0.25 + 1 / 64, rel=0.15)


def test_a_loss_that_is_not_finite_names_learning_rate_and_precision_first(tmp_path):
    with pytest.raises(InputError) as error:
        two_kinds(0.8, 40, tmp_path, names=[f"{i}.png" for i in range(8)], poison_from=23)
    message = str(error.value)
    assert message.startswith("step 24: the loss is not finite at --learning-rate 0.003 --dtype float32; accepted: ")
    assert str(tmp_path / "step-20") in message
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
