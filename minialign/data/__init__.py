"""Pairs of images and captions from disk (pairs.py), and a cache of the frozen networks' outputs for them (cache.py).

cache.py is imported by its own name: who reads images needs no networks.
"""

from .pairs import (
    ACCEPTED,
    ImageFiles,
    Pair,
    Skipped,
    Unusable,
    as_rgb,
    check_source,
    image_files,
    image_pairs,
    open_image,
    read_pairs,
    shuffled,
    source_digest,
)

__all__ = [
    "ACCEPTED",
    "ImageFiles",
    "Pair",
    "Skipped",
    "Unusable",
    "as_rgb",
    "check_source",
    "image_files",
    "image_pairs",
    "open_image",
    "read_pairs",
    "shuffled",
    "source_digest",
]
