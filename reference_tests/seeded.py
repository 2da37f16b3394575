"""Numbers that every machine and version makes alike, so that goldens hold outputs and no weights.

They come from numpy's legacy generator, whose stream numpy promises to keep. Used on both sides of a comparison.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


def uniform(shape: tuple[int, ...] | torch.Size, *name: object) -> Tensor:
    """Float32 numbers in [-1,1) that depend on the shape and the name alone."""
    seed = zlib.crc32("/".join(map(str, name)).encode())
    return torch.as_tensor(2 * np.random.RandomState(seed).random_sample(tuple(shape)) - 1, dtype=torch.float32)


def normal(shape: tuple[int, ...], *name: object) -> Tensor:
    """Numbers of zero mean and unit variance, near enough to Gaussian."""
    return sum(uniform(shape, *name, i) for i in range(3))  # type: ignore[return-value]  # sum of tensors


def filled(model: nn.Module, seed: int, gain: float = 1.0) -> Any:
    """The model with weights that let every one of them be felt: norms and biases off their defaults.

    With a small gain the epsilon of the norms is felt too.
    """
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            # transformers names a text tower's weights with and without this prefix
            numbers = uniform(tensor.shape, seed, key.removeprefix("text_model."))
            if tensor.ndim > 1:
                numbers *= gain * (3 / tensor[0].numel()) ** 0.5
            else:
                numbers = 0.2 * numbers + 1 if key.endswith("weight") else 0.2 * gain * numbers
            tensor.copy_(numbers)
    return model.eval()


def image(width: int, height: int, mode: str) -> Image.Image:
    """Coarse blocks with fine noise, so that both the size and the filter of a resize show."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    coarse = uniform((height // 5 + 1, width // 5 + 1, channels), "coarse", mode).repeat_interleave(5, 0)
    values = 0.7 * coarse.repeat_interleave(5, 1)[:height, :width] + 0.3 * uniform((height, width, channels), "fine")
    array = ((values + 1) * 127.5).byte().numpy()
    return Image.fromarray(array if channels > 1 else array[:, :, 0], mode)


def projection(gradient: Tensor, key: str) -> Tensor:
    """The component of a gradient along a fixed direction of its own, one number to know the gradient by."""
    direction = uniform(gradient.shape, "projection", key)
    return (gradient * direction).sum() / direction.norm()
