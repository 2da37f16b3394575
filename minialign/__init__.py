"""Align a text-to-image model with human feedback (Lee et al. 2023, arXiv 2302.12192)."""

from .diffusion import NoiseSchedule
from .loss import reward_weighted_loss
from .models.clip import CLIP
from .models.reward import RewardModel
from .pipeline import Pipeline

__all__ = ["CLIP", "NoiseSchedule", "Pipeline", "RewardModel", "reward_weighted_loss"]
__version__ = "0.1.0"
