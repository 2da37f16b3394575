"""Align a text-to-image model with human feedback (Lee et al. 2023, arXiv 2302.12192)."""

from typing import TYPE_CHECKING, Any

from .diffusion import NoiseSchedule
from .loss import reward_weighted_loss
from .models.clip import CLIP
from .pipeline import Pipeline

if TYPE_CHECKING:
    from .reward import RewardModel

__all__ = ["CLIP", "NoiseSchedule", "Pipeline", "RewardModel", "reward_weighted_loss"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "RewardModel":  # on demand, because python -m minialign.reward must not find itself imported already
        from .reward import RewardModel

        return RewardModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
