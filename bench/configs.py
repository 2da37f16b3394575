"""The networks that are measured: configs of released networks, and a UNet that fits into a benchmark."""

from __future__ import annotations

from typing import Any

UNET: dict[str, Any] = {  # half the width of Stable Diffusion 1.x and a level less: 80 million parameters
    "block_out_channels": [160, 320, 640],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 32,
}
SD1_UNET: dict[str, Any] = {"cross_attention_dim": 768, "sample_size": 64}  # all else is the default
VAE_CONFIG: dict[str, Any] = {  # the released one
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "sample_size": 256,
}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}  # the released one
