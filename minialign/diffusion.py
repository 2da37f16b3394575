"""The noise schedule and the DDIM sampler (method, sections 1 and 3).

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps                       Ho et al. 2020, equation 4
v_t = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0                       Salimans & Ho 2022, appendix D
DDIM step: Song et al. 2021, equation 12. Guidance: Ho & Salimans 2022, equation 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
MOST = 100_000  # training timesteps
DEFAULTS: dict[str, Any] = {  # what is read of a scheduler_config.json; any other key says nothing about betas or DDIM
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "clip_sample": False,
    "clip_sample_range": 1.0,
}
_LATENT_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}
_LINSPACE: dict[str, Any] = {"timestep_spacing": "linspace"}
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {  # where a class of diffusers fills in an absent key with another value
    "DDIMScheduler": {"clip_sample": True},
    "DDPMScheduler": {"clip_sample": True},
    "PNDMScheduler": {"set_alpha_to_one": False},
    "LCMScheduler": _LATENT_BETAS | {"beta_schedule": "scaled_linear"},
    "TCDScheduler": _LATENT_BETAS | {"beta_schedule": "scaled_linear"},
    "HeunDiscreteScheduler": _LATENT_BETAS | _LINSPACE,
    "KDPM2DiscreteScheduler": _LATENT_BETAS | _LINSPACE,
    "KDPM2AncestralDiscreteScheduler": _LATENT_BETAS | _LINSPACE,
    "DPMSolverSDEScheduler": _LATENT_BETAS | _LINSPACE,
    "EulerDiscreteScheduler": _LINSPACE,
    "EulerAncestralDiscreteScheduler": _LINSPACE,
    "LMSDiscreteScheduler": _LINSPACE,
    "DPMSolverMultistepScheduler": _LINSPACE,
    "DPMSolverSinglestepScheduler": _LINSPACE,
    "DEISMultistepScheduler": _LINSPACE,
    "UniPCMultistepScheduler": _LINSPACE,
}


class NoiseSchedule:
    """abar_t for t = 0..T-1 and all that follows from it. Timesteps t are (B,) integer tensors.

    Built from the config of any diffusers scheduler that has betas: they, the prediction type and the spacing are read
    whatever class the config names, and sampling is DDIM. `config` holds the values read, as a DDIMScheduler's, and
    `source` the config as it was given, to be written again.
    """

    def __init__(
        self, alphas_cumprod: Tensor, config: dict[str, Any] | None = None, source: dict[str, Any] | None = None
    ):
        c = self.config = DEFAULTS | (config or {})
        self.source = source if source and source.get("_class_name") else {"_class_name": "DDIMScheduler"} | c
        self.alphas_cumprod = alphas_cumprod  # (T,) float32
        self.prediction_type = _one_of(c, "prediction_type", PREDICTION_TYPES)
        self.spacing = _one_of(c, "timestep_spacing", SPACINGS)
        self.steps_offset: int = c["steps_offset"]
        first = torch.ones(()) if c["set_alpha_to_one"] else alphas_cumprod[0]
        self.final_alpha_cumprod = first.to(alphas_cumprod)  # abar after the last step
        self.clip: float | None = c["clip_sample_range"] if c["clip_sample"] else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NoiseSchedule:
        """Read a scheduler_config.json; ValueError names the key of an unsupported value."""
        name = config.get("_class_name")
        if name and name not in CLASS_DEFAULTS and not {"beta_start", "beta_schedule", "trained_betas"} & config.keys():
            raise ValueError(
                f"scheduler config: _class_name={name!r} without betas is not supported; accepted: any scheduler with "
                f"beta_schedule or trained_betas, and {', '.join(CLASS_DEFAULTS)}"
            )
        for key, value in (("thresholding", True), ("variance_type", "learned"), ("variance_type", "learned_range")):
            if config.get(key) == value:
                raise ValueError(f"scheduler config: {key}={value!r} is not supported; accepted: null")
        c = DEFAULTS | CLASS_DEFAULTS.get(name or "", {})
        c |= {key: value for key, value in config.items() if key in DEFAULTS and value is not None}
        steps, start, end = c["num_train_timesteps"], c["beta_start"], c["beta_end"]
        for key, most in (("num_train_timesteps", MOST), ("steps_offset", steps)):
            if not isinstance(c[key], int) or not 0 <= c[key] <= most:
                raise ValueError(f"scheduler config: {key}={c[key]!r} is out of range; accepted: up to {most}")
        kind = _one_of(c, "beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2"))
        if c["trained_betas"] is not None:
            betas = torch.tensor(c["trained_betas"], dtype=torch.float32)
        elif kind == "linear":
            betas = torch.linspace(start, end, steps, dtype=torch.float32)
        elif kind == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
        else:  # Nichol & Dhariwal 2021, equation 17
            bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
            betas = torch.tensor([min(1 - b / a, 0.999) for a, b in zip(bar, bar[1:])], dtype=torch.float32)
        if c["rescale_betas_zero_snr"]:
            betas = rescale_zero_terminal_snr(betas)
        if not ((betas >= 0) & (betas <= 1)).all():  # not a number fails too
            raise ValueError("scheduler config: betas out of range; accepted: 0 to 1")
        return cls(torch.cumprod(1 - betas, dim=0), c, config)

    def to(self, device: torch.device) -> NoiseSchedule:
        """The schedule with its table on `device`, where training and sampling would else copy it at every step."""
        return NoiseSchedule(self.alphas_cumprod.to(device), self.config, self.source)

    def _signal_and_noise(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), shaped to multiply `like` (B,...)."""
        abar = self.alphas_cumprod.to(like.device, _precise(like.dtype))[t]
        abar = abar.reshape(-1, *[1] * (like.ndim - 1))
        return abar.sqrt().to(like.dtype), (1 - abar).sqrt().to(like.dtype)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t (B,C,h,w) of x_0 and noise of that shape, t (B,)."""
        signal, sigma = self._signal_and_noise(t, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is trained to predict at t: noise, v or x_0, by `prediction_type`."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        signal, sigma = self._signal_and_noise(t, x0)
        return signal * noise - sigma * x0

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio abar_t / (1 - abar_t), (B,)."""
        abar = self.alphas_cumprod.to(t.device)[t]
        return abar / (1 - abar)

    def timesteps(self, steps: int) -> Tensor:
        """The (steps,) timesteps that sampling visits, from most to least noise.

        Spacings as in Lin et al. 2024, table 2; "leading" does not begin at the last training timestep. ValueError for
        more steps than the schedule has, and for a first one that would divide by abar_t = 0.
        """
        total = len(self.alphas_cumprod)
        if not (1 <= steps <= total and self._first(steps) < total):
            most = next((count for count in range(1, total) if self._first(count + 1) >= total), total)
            raise ValueError(f"steps={steps} is out of range; accepted with this schedule: 1 to {most}")
        if self.prediction_type == "epsilon" and self.alphas_cumprod[self._first(steps)] == 0:
            raise ValueError(
                f"steps={steps} begins at timestep {self._first(steps)}, which is pure noise, and there the noise that "
                "prediction_type=epsilon predicts says nothing of the image; accepted with such betas "
                "(rescale_betas_zero_snr): prediction_type=v_prediction"
            )
        if self.spacing == "leading":
            return torch.arange(steps).flip(0) * (total // steps) + self.steps_offset
        if self.spacing == "trailing":
            # numpy's sums, because torch's differ in the last bit, which halves round by; [:steps] drops a stray 0
            return torch.from_numpy(np.arange(total, 0, -total / steps).round()[:steps]).long() - 1
        return torch.from_numpy(np.linspace(0, total - 1, steps).round()).long().flip(0)

    def _first(self, steps: int) -> int:
        """The timestep that sampling in `steps` steps begins at."""
        total = len(self.alphas_cumprod)
        if self.spacing == "leading":
            return (steps - 1) * (total // steps) + self.steps_offset
        return 0 if self.spacing == "linspace" and steps == 1 else total - 1

    def previous(self, timesteps: Tensor) -> Tensor:
        """For each visited timestep the one that its DDIM step leads to, one stride less; -1 means x_0."""
        return (timesteps - len(self.alphas_cumprod) // len(timesteps)).clamp(min=-1)

    def ddim_step(
        self, prediction: Tensor, x: Tensor, t: Tensor, t_prev: Tensor, eta: float = 0, noise: Tensor | None = None
    ) -> Tensor:
        """x at t_prev from x at t (B,C,h,w) and the network's prediction; t, t_prev are (B,) or scalars, -1 is x_0.

        eta in [0,1] scales the fresh noise: 0 is deterministic DDIM, 1 is DDPM; with eta > 0 pass `noise`.
        """
        t, t_prev = (torch.as_tensor(value, device=x.device).reshape(-1) for value in (t, t_prev))
        abars, final = (a.to(x.device, _precise(x.dtype)) for a in (self.alphas_cumprod, self.final_alpha_cumprod))
        shape = (-1, *[1] * (x.ndim - 1))
        abar = abars[t].reshape(shape)
        previous = torch.where(t_prev >= 0, abars[t_prev.clamp(min=0)], final).reshape(shape)
        signal, sigma = abar.sqrt(), (1 - abar).sqrt()
        if self.prediction_type == "epsilon":
            x0, eps = (x - sigma * prediction) / signal, prediction
        elif self.prediction_type == "sample":
            x0, eps = prediction, (x - signal * prediction) / sigma
        else:
            x0, eps = signal * x - sigma * prediction, signal * prediction + sigma * x
        if self.clip is not None:
            x0 = x0.clamp(-self.clip, self.clip)
        spread = eta * ((1 - previous) / (1 - abar) * (1 - abar / previous)).clamp(min=0).sqrt()
        out = previous.sqrt() * x0 + (1 - previous - spread**2).clamp(min=0).sqrt() * eps
        if eta > 0:
            if noise is None:
                raise ValueError("ddim_step: eta > 0 needs noise of the shape of x")
            out = out + spread * noise
        return out.to(x.dtype)


def _precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype that abar is used in: in half precision 1 - abar_t is 0 at the first timesteps."""
    return torch.promote_types(dtype, torch.float32)


def _one_of(config: dict[str, Any], key: str, known: tuple[str, ...]) -> str:
    """config[key], or ValueError naming what is supported."""
    value: str = config[key]
    if value not in known:
        raise ValueError(f"scheduler config: {key}={value!r} is not supported; accepted: {', '.join(known)}")
    return value


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas whose last abar is exactly zero (Lin et al. 2024, algorithm 1)."""
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    abar = root**2
    alphas = torch.cat([abar[:1], abar[1:] / abar[:-1]])
    return 1 - alphas


Predict = Callable[..., Tensor]  # unet(latents, timesteps, *context) -> prediction
Context = tuple[Tensor, ...]  # what a network reads of the prompts: (B,L,D), and SDXL's second conditioning (B,A)


def guided(predict: Predict, x: Tensor, t: Tensor, context: Context, unconditional: Context, guidance: float) -> Tensor:
    """Classifier-free guidance in one call: u + guidance * (c - u), where guidance is above 1.

    Up to 1 it is c alone, as in diffusers, so that 0 turns guidance off, as distilled models need it.
    x (B,C,h,w), t (B,); context and unconditional are alike.
    """
    if guidance <= 1:
        return predict(x, t, *context)
    pairs = [torch.cat(pair) for pair in zip(unconditional, context)]
    both = predict(torch.cat([x, x]), torch.cat([t, t]), *pairs)
    without, with_prompt = both.chunk(2)
    return without + guidance * (with_prompt - without)


def ddim_sample(
    predict: Predict,
    schedule: NoiseSchedule,
    x: Tensor,
    context: Context,
    unconditional: Context,
    *,
    steps: int,
    guidance: float,
    eta: float = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Latents x_0 (B,C,h,w) from Gaussian noise x of that shape by guided DDIM.

    With eta 0 no step copies anything between devices or waits for one; with eta > 0 each draws its noise where the
    generator is, on the CPU where none is given.
    """
    timesteps = schedule.timesteps(steps)
    pairs = torch.stack([timesteps, schedule.previous(timesteps)], dim=1).to(x.device)
    schedule = schedule.to(x.device)
    for t, t_prev in pairs.unbind():
        prediction = guided(predict, x, t.expand(len(x)), context, unconditional, guidance)
        noise = None
        if eta > 0:
            place = generator.device if generator else "cpu"
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=place).to(x.device)
        x = schedule.ddim_step(prediction, x, t, t_prev, eta, noise)
    return x
