"""Stage 3 of the method: fine-tune the UNet by reward-weighted likelihood plus a pre-training term."""

from .batches import Latents as Latents
from .batches import TrainingData as TrainingData
from .loop import FineTuning as FineTuning
from .loop import finetune as finetune
from .loop import step_loss as step_loss
from .trainer import finetune_pipeline as finetune_pipeline
from .trainer import finetune_run as finetune_run
from .weights import WEIGHTINGS as WEIGHTINGS
