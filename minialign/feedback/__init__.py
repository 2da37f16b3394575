"""Feedback of stage 1: the store of images and labels, and label and prompt files, read and written."""

from .label_files import (
    LabelFile,
    check_image,
    export_comparisons,
    export_labels,
    import_into_run,
    merge_into_run,
    new_judgements,
    read_judgements,
    read_prompts,
)
from .rows import USUAL, Reading, add_reading_flags, given_reading
from .store import (
    LONGEST_NAME,
    PREFERENCES,
    SIMULATED,
    VERDICTS,
    FeedbackStore,
    NewLabel,
    Preferred,
    StoredImage,
    StoreError,
    clean_name,
)

__all__ = [
    "LONGEST_NAME",
    "PREFERENCES",
    "SIMULATED",
    "USUAL",
    "VERDICTS",
    "FeedbackStore",
    "LabelFile",
    "NewLabel",
    "Preferred",
    "Reading",
    "StoreError",
    "StoredImage",
    "add_reading_flags",
    "check_image",
    "clean_name",
    "export_comparisons",
    "export_labels",
    "given_reading",
    "import_into_run",
    "merge_into_run",
    "new_judgements",
    "read_judgements",
    "read_prompts",
]
