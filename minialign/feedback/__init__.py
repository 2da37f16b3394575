"""Feedback of stage 1: the store of images and labels, and label and prompt files, read and written."""

from .label_files import (
    check_image,
    count_votes,
    export_comparisons,
    export_labels,
    import_into_run,
    import_labels,
    read_feedback,
    read_labels,
    read_prompts,
)
from .store import (
    LONGEST_NAME,
    PREFERENCES,
    SIMULATED,
    VERDICTS,
    FeedbackStore,
    StoredImage,
    StoreError,
    clean_name,
)

__all__ = [
    "LONGEST_NAME",
    "PREFERENCES",
    "SIMULATED",
    "VERDICTS",
    "FeedbackStore",
    "StoreError",
    "StoredImage",
    "check_image",
    "clean_name",
    "count_votes",
    "export_comparisons",
    "export_labels",
    "import_into_run",
    "import_labels",
    "read_feedback",
    "read_labels",
    "read_prompts",
]
