"""The noise schedule, DDIM and guidance: values of the reference, and the equations themselves in float64."""

from __future__ import annotations

import pytest
import torch
from comparisons import (
    SMALL_UNET,
    assert_close,
    check_ddim_steps,
    check_schedule,
    check_scheduler_class,
    check_timesteps,
    check_trajectory,
    golden,
    names,
)
from seeded import normal
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minialign.diffusion import PREDICTION_TYPES, SPACINGS, NoiseSchedule, ddim_sample, guided
from minialign.models.unet import UNet

LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
X0, NOISE, FRESH = (normal((3, 2, 4, 4), name).double() for name in ("x0", "noise", "fresh"))


@pytest.mark.parametrize("name", names("schedule"))
def test_schedule_golden(name):
    check_schedule(*golden("schedule", name))


@pytest.mark.parametrize("name", names("timesteps"))
def test_timesteps_golden(name):
    check_timesteps(golden("timesteps", name)[0])


@pytest.mark.parametrize("name", names("class"))
def test_scheduler_class_golden(name):
    check_scheduler_class(*golden("class", name))


@pytest.mark.parametrize("name", names("ddim"))
def test_ddim_golden(name):
    check_ddim_steps(*golden("ddim", name))


@pytest.mark.parametrize("name", names("trajectory"))
def test_trajectory_golden(name):
    check_trajectory(*golden("trajectory", name))


def test_noising_targets_and_snr():
    t = torch.tensor([0, 400, 999])
    for kind in PREDICTION_TYPES:
        schedule = NoiseSchedule.from_config(LATENT | {"prediction_type": kind})
        abar = schedule.alphas_cumprod.double()[t].reshape(3, 1, 1, 1)
        assert_close(schedule.add_noise(X0, NOISE, t), abar**0.5 * X0 + (1 - abar) ** 0.5 * NOISE, 1e-12)
        v = abar**0.5 * NOISE - (1 - abar) ** 0.5 * X0
        assert_close(schedule.target(X0, NOISE, t), {"epsilon": NOISE, "v_prediction": v, "sample": X0}[kind], 1e-12)
        assert_close(schedule.snr(t), (abar / (1 - abar)).flatten(), 1e-4)  # float32: 1 - abar_0 keeps four digits


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_exact_prediction_walks_along_the_forward_process(kind):
    """With the target itself as prediction a step from t lands on add_noise at t_prev, and on x_0 at -1."""
    schedule = NoiseSchedule.from_config(LATENT | {"prediction_type": kind})
    t, t_prev = torch.tensor([40, 500, 999]), torch.tensor([7, 499, 20])
    x, prediction = schedule.add_noise(X0, NOISE, t), schedule.target(X0, NOISE, t)
    assert_close(schedule.ddim_step(prediction, x, t, t_prev), schedule.add_noise(X0, NOISE, t_prev), 1e-9)
    assert_close(schedule.ddim_step(prediction, x, t, torch.tensor(-1)), X0, 1e-9)


def test_eta_one_has_the_variance_of_the_posterior():
    """sigma_t^2 = beta_t (1 - abar_{t-1}) / (1 - abar_t) (Ho et al. 2020, section 3.2) between adjacent timesteps."""
    schedule = NoiseSchedule.from_config(LATENT)
    abar = schedule.alphas_cumprod.double()
    t = torch.tensor([3, 500, 999])
    step = [schedule.ddim_step(NOISE, X0, t, t - 1, 1, noise) for noise in (FRESH, torch.zeros_like(FRESH))]
    variance = (1 - abar[t] / abar[t - 1]) * (1 - abar[t - 1]) / (1 - abar[t])
    assert_close(step[0] - step[1], variance.sqrt().reshape(3, 1, 1, 1) * FRESH, 1e-9)
    with pytest.raises(ValueError, match="noise"):
        schedule.ddim_step(NOISE, X0, t, t - 1, eta=1)


@pytest.mark.parametrize("config", [{}, LATENT, {"num_train_timesteps": 77}, {"beta_schedule": "squaredcos_cap_v2"}])
def test_zero_terminal_snr(config):
    before = NoiseSchedule.from_config(config)
    schedule = NoiseSchedule.from_config(
        config | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    )
    last = len(schedule.alphas_cumprod) - 1
    assert schedule.alphas_cumprod[-1] == 0 and schedule.snr(torch.tensor([last])) == 0
    assert_close(schedule.alphas_cumprod[:1], before.alphas_cumprod[:1], 1e-6)
    assert schedule.timesteps(5)[0] == last
    t = torch.tensor([last])
    assert torch.equal(schedule.add_noise(X0, NOISE, t), NOISE)
    assert_close(schedule.ddim_step(-X0, NOISE, t, torch.tensor([-1])), X0, 1e-12)  # v is -x_0 where abar is 0
    assert schedule.ddim_step(-X0, NOISE, t, t - 9, 1, FRESH).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_first_timesteps(dtype):
    """1 - abar_1 is below what half precision resolves next to 1, but not below what its own exponent does."""
    schedule = NoiseSchedule.from_config(LATENT)
    t, t_prev = torch.tensor([1]), torch.tensor([-1])
    zero = torch.zeros_like(NOISE)
    for call in (lambda x: schedule.add_noise(zero.to(x), x, t), lambda x: schedule.ddim_step(x, x, t, t_prev)):
        actual = call(NOISE.to(dtype))
        assert actual.dtype == dtype
        assert_close(actual, call(NOISE), 0.02)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_descend_inside_the_schedule(spacing):
    schedule = NoiseSchedule.from_config({"timestep_spacing": spacing})
    for steps in (1, 61, 103, 1000):
        visited = schedule.timesteps(steps)
        assert len(visited) == steps and visited.min() >= 0 and visited.max() <= 999
        assert visited.diff().lt(0).all()
    assert spacing != "trailing" or visited[0] == 999
    for steps in (-1, 0, 1001):
        with pytest.raises(ValueError, match=f"steps={steps} is out of range; .*: 1 to 1000"):
            schedule.timesteps(steps)


@pytest.mark.parametrize(("offset", "most"), [(0, 1000), (1, 999), (2, 499), (499, 2), (500, 1)])
def test_the_offset_leaves_fewer_steps(offset, most):
    schedule = NoiseSchedule.from_config({"steps_offset": offset})
    assert schedule.timesteps(most).max() <= 999
    if most < 1000:
        with pytest.raises(ValueError, match=f"steps={most + 1} is out of range; .*: 1 to {most}$"):
            schedule.timesteps(most + 1)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_noise_is_not_predicted_where_there_is_nothing_else(spacing):
    """At abar_t = 0 x_0 = (x_t - sigma eps) / 0; leading timesteps do not begin there."""
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": spacing}
    schedule = NoiseSchedule.from_config(config)
    if spacing == "leading":
        assert ddim_sample(predict, schedule, X0, (CONTEXT,), (CONTEXT,), steps=5, guidance=1).isfinite().all()
    else:
        with pytest.raises(ValueError, match="steps=5 begins at timestep 999, .*: prediction_type=v_prediction$"):
            schedule.timesteps(5)
    assert len(NoiseSchedule.from_config(config | {"prediction_type": "v_prediction"}).timesteps(5)) == 5


class Copies(TorchDispatchMode):
    """Counts the copies of tensors from one device to another."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        devices = {leaf.device.type for leaf in tree_leaves((args, out)) if isinstance(leaf, torch.Tensor)}
        self.count += len(devices) > 1
        return out


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_no_step_of_sampling_copies_between_devices(kind):
    """The meta device stands for a GPU: it has no numbers, so that reading one back would fail too."""
    network = UNet(SMALL_UNET).to("meta")
    x, context = torch.empty(2, 4, 8, 8, device="meta"), torch.empty(2, 5, 6, device="meta")
    schedule = NoiseSchedule.from_config(LATENT | {"prediction_type": kind})
    counts = []
    for steps in (1, 2, 9):
        with torch.no_grad(), Copies() as copies:
            ddim_sample(network, schedule, x, (context,), (context,), steps=steps, guidance=2.0)
        counts.append(copies.count)
    assert counts == [3, 3, 3]  # timesteps, abar_t and abar after the last step, before the first step


def test_rows_may_be_at_different_timesteps():
    schedule = NoiseSchedule.from_config(LATENT)
    t, t_prev = torch.tensor([900, 20, 5]), torch.tensor([880, -1, -1])
    rows = [schedule.ddim_step(NOISE[i], X0[i], t[i], t_prev[i]) for i in range(3)]
    assert_close(schedule.ddim_step(NOISE, X0, t, t_prev), torch.cat(rows).reshape(X0.shape), 1e-12)


def test_reads_any_class_that_has_betas():
    schedule = NoiseSchedule.from_config({"_class_name": "SchedulerOfTheFuture", "trained_betas": [0.1, 0.2]})
    assert_close(schedule.alphas_cumprod, torch.tensor([0.9, 0.72]), 1e-6)
    assert schedule.clip is None and NoiseSchedule.from_config({}).clip is None


@pytest.mark.parametrize(
    "config", [{"_class_name": "DDIMScheduler"}, {"_class_name": "PNDMScheduler"}, {"_class_name": "TCDScheduler"}]
)
def test_config_says_what_was_read(config):
    """Written under DDIM's name, whose defaults differ, it still means the same."""
    schedule = NoiseSchedule.from_config(config)
    again = NoiseSchedule.from_config({"_class_name": "DDIMScheduler"} | schedule.config)
    assert again.config == schedule.config and again.clip == schedule.clip
    assert torch.equal(again.alphas_cumprod, schedule.alphas_cumprod)
    assert torch.equal(again.final_alpha_cumprod, schedule.final_alpha_cumprod)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beta_schedule", "sigmoid"),
        ("prediction_type", "flow_prediction"),
        ("timestep_spacing", "karras"),
        ("thresholding", True),
        ("variance_type", "learned_range"),
        ("_class_name", "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_refuses_what_is_not_built(key, value):
    with pytest.raises(ValueError, match=f"scheduler config: {key}={value!r}.*accepted: "):
        NoiseSchedule.from_config({key: value})


def predict(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    return x * context.mean((1, 2))[:, None, None, None] + t[:, None, None, None]


CONTEXT, UNCONDITIONAL = normal((3, 5, 6), "context").double(), normal((3, 5, 6), "unconditional").double()
T = torch.tensor([1, 20, 300])


def test_guidance_is_one_batched_call():
    calls = []

    def counted(*arguments):
        calls.append(len(arguments[0]))
        return predict(*arguments)

    with_prompt, without = predict(X0, T, CONTEXT), predict(X0, T, UNCONDITIONAL)
    assert_close(
        guided(counted, X0, T, (CONTEXT,), (UNCONDITIONAL,), 7.5), without + 7.5 * (with_prompt - without), 1e-12
    )
    for off in (0, 0.5, 1):
        assert torch.equal(guided(counted, X0, T, (CONTEXT,), (UNCONDITIONAL,), off), with_prompt)
    assert calls == [6, 3, 3, 3]  # without guidance no unconditional half is needed


def test_sampling_with_eta_follows_its_generator():
    schedule = NoiseSchedule.from_config(LATENT)

    def draw(seed, eta=1.0):
        generator = torch.Generator().manual_seed(seed)
        how = {"steps": 4, "guidance": 2.0, "eta": eta, "generator": generator}
        return ddim_sample(predict, schedule, X0, (CONTEXT,), (UNCONDITIONAL,), **how)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1, eta=0), draw(2, eta=0))
