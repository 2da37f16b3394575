"""The settings of a run, one row each: parsers, defaults, recipes, the report's command and the docs' table read this.

A run remembers its settings in config.json. The value of a setting is what the command line gives, else what its recipe
stands for, else what the run remembers, else the default: of the bundled model, or of the user's own model.
"""

from __future__ import annotations

import argparse
import glob
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .commands import in_range

STAGES = ("generate", "label", "reward", "finetune", "evaluate")  # in the order of the method
TITLES = {
    "generate": "stage 1, images",
    "label": "stage 1, labels",
    "reward": "stage 2, the reward model",
    "finetune": "stage 3, fine-tuning",
    "evaluate": "evaluation",
    "hardware": "hardware",
}
NOISES = 100_000  # starting noises of a run for feedback, and as many for evaluation
LAST_SEED = 20_000  # of a run: beyond, noise seeds would not fit the 32 bits that a CPU generator uses of them
CLIP_OF_PAPER = "openai/clip-vit-large-patch14"  # Lee et al. 2023, section 3.2
PRECISIONS = ("float32", "bfloat16", "float16")
RENAMED = {"draw_batch": "sampling_batch_size"}  # names of settings in the config.json of older runs
switch = bool  # the kind of a setting that is on or off


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    stages: the stages that use it; the first also decides in which group of --help it stands. kind: what makes a value
    of the flag's text, a tuple of accepted words, or `switch`. source: the value names a file, a folder or a hub id, of
    which the content counts and not the name. free: a run may continue with another value, since it changes rounding,
    memory or what is kept, but not what is computed.
    """

    name: str
    stages: tuple[str, ...]
    bundled: Any
    own: Any
    kind: Callable[[str], Any] | tuple[str, ...]
    about: str
    source: bool = False
    free: bool = False
    group: str = ""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def default(self, bundled: bool) -> Any:
        return self.bundled if bundled else self.own

    @property
    def help(self) -> str:
        """The line of --help: what the setting is, and its defaults that are not None."""
        bundled, own = (_shown(value) for value in (self.bundled, self.own))
        if self.bundled == self.own:
            default = f" (default: {own})" if self.own is not None else ""
        else:
            default = f" (default: {bundled}; with --model: {own})"
        return (self.about + default).replace("%", "%%")


def _shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def reward_terms(text: str) -> str:
    """The value of --reward with its files and folders as absolute paths, for another command elsewhere."""

    def absolute(term: str) -> str:
        match = re.fullmatch(r"(clip-score:)?(.*?)(:\w+)?(=[^/]*)?", term.strip())
        if match is None or match[2] in ("", "learned", "clip-score") or not os.path.exists(match[2]):
            return term.strip()
        return f"{match[1] or ''}{os.path.abspath(match[2])}{match[3] or ''}{match[4] or ''}"

    return ",".join(map(absolute, text.split(",")))


SAMPLING, TUNING = ("generate", "evaluate"), ("finetune",)
positive, number, fraction = in_range(float, 1e-6), in_range(int, 1), in_range(float, 0, 1)
SETTINGS = tuple(
    Setting(*row[:6], **(row[6] if len(row) > 6 else {}))
    for row in (
        # ------------------------------------------------------------------------------------------ of several stages
        ("model", ("generate", "finetune", "evaluate"), None, None, str,
         "folder, hub id or .safetensors file of the text-to-image model (default: the run's, else the bundled one)",
         {"source": True}),
        ("variant", ("generate", "finetune", "evaluate"), None, None, str, "variant of the weight files, such as fp16"),
        ("vae", ("generate", "finetune", "evaluate"), None, None, str,
         "folder or .safetensors file of an autoencoder in place of the model's", {"source": True}),
        ("seed", STAGES, 0, 0, in_range(int, 0, LAST_SEED), "random seed of every stage"),
        ("sampling_steps", SAMPLING, 10, 30, in_range(int, 1, 1000), "steps of the DDIM sampler"),
        ("guidance", SAMPLING, 2.0, 7.5, in_range(float, 0), "scale of classifier-free guidance"),
        ("sampling_dtype", SAMPLING, "float32", "float32", PRECISIONS, "precision of the networks while sampling"),
        # ------------------------------------------------------------------------------------- generate: whose images
        ("prompts", ("generate",), "categories", None, str,
         "file of prompts: a prompt a line, or .csv, .tsv or .jsonl with a column prompt; or categories, the prompts "
         "of the model's grammar that get feedback", {"source": True}),
        ("images", ("generate",), 2560, None, in_range(int, 1, NOISES),
         "number of images, spread evenly over the categories and their prompts"),
        ("images_per_prompt", ("generate",), None, 3, in_range(int, 1, NOISES), "images of each prompt"),
        # ----------------------------------------------------------------------------------------- label: whose labels
        ("labels", ("label",), 1280, None, number, "images that the simulated annotator labels (bundled model only)"),
        # ------------------------------------------------------------------------------------------------------ reward
        ("reward", ("reward",), None, None, reward_terms,
         "reward of the images: learned, clip-score, clip-score:CLIP, a reward model's folder, FILE.py:function, or "
         "several with weights, such as clip-score=0.3,learned=0.7 (default: learned, from the labels)",
         {"source": True}),
        ("clip", ("reward", "evaluate"), None, CLIP_OF_PAPER, str,
         "CLIP model of the features, folder or hub id", {"source": True}),
        ("lambda", ("reward",), 0.5, 0.5, in_range(float, 0), "weight of the auxiliary loss; 0.5 in the paper"),
        ("temperature", ("reward",), 0.5, 2.0, positive, "T of the auxiliary loss; 2 in the paper"),
        ("hidden", ("reward",), 512, 1024, number, "width of the reward model's hidden layers; 1024 in the paper"),
        ("reward_steps", ("reward",), 1000, 1000, number, "training steps of the reward model"),
        ("reward_batch_size", ("reward",), 64, 64, in_range(int, 2), "labelled images in a step of the reward model"),
        ("reward_learning_rate", ("reward",), 3e-4, 3e-4, fraction, "learning rate of the reward model, AdamW"),
        ("comparison_temperature", ("reward",), 0.2, 0.2, positive, "T of the loss on compared images"),
        ("contrastive", ("reward",), None, None, str,
         "JSON file of contrastive prompts, prompt -> [prompts]; for other prompts they are chosen by rule",
         {"source": True}),
        ("balanced", ("reward",), False, False, switch, "sample good and bad images equally often"),
        ("soft", ("reward",), False, False, switch, "learn the mean of an image's labels in place of their majority"),
        # ---------------------------------------------------------------------------------------------------- finetune
        ("pretrain", TUNING, None, None, str,
         "pre-training pairs: folder with metadata.jsonl or captions in .txt files, or tar shards (a glob)",
         {"source": True}),
        ("pretrain_images", TUNING, 512, None, number, "drawings of the toy data set that serve as pre-training pairs"),
        ("steps", TUNING, 300, 2000, number, "fine-tuning steps"),
        ("beta", TUNING, 0.03, 1.0, in_range(float, 0), "weight of the pre-training term"),
        ("batch_size", TUNING, 64, 8, in_range(int, 2), "images in a fine-tuning step"),
        ("pretrain_fraction", TUNING, 0.125, 0.125, fraction,
         "fraction of the images in a step that are pre-training pairs"),
        ("learning_rate", TUNING, 1e-3, 1e-5, fraction, "peak learning rate, AdamW"),
        ("lr_schedule", TUNING, "cosine", "cosine", ("constant", "linear", "cosine"),
         "schedule of the learning rate after the warm-up"),
        ("warmup", TUNING, 20, 20, in_range(int, 0), "steps in which the learning rate rises"),
        ("weighting", TUNING, "reward", "reward", ("reward", "threshold", "exponential"),
         "weight of a model image: its reward r (the paper); 1 where r > tau, else 0; exp((r - 1) / tau)"),
        ("tau", TUNING, None, None, positive, "tau of the weighting (default: 0.5 of threshold, 0.2 of exponential)"),
        ("image_sampling", TUNING, "proportional", "proportional", ("proportional", "uniform"),
         "model images of a step: in proportion to their weights, or uniform and weighted in the loss (the paper)"),
        ("clip_norm", TUNING, 1.0, 1.0, positive, "largest norm of the gradient"),
        ("ema", TUNING, 0.0, 0.0, in_range(float, 0, 0.999999), "decay of a moving average of the weights; 0: none"),
        ("prompt_dropout", TUNING, 0.1, 0.1, fraction,
         "fraction of training prompts that are replaced by the empty prompt, for guidance"),
        ("min_snr", TUNING, 0.0, 0.0, in_range(float, 0), "gamma of the min-SNR weight of timesteps; 0: none"),
        ("noise_offset", TUNING, 0.0, 0.0, fraction, "standard deviation of noise that is constant over a channel"),
        ("lora", TUNING, 0, 0, in_range(int, 0), "rank of LoRA adapters to train in place of the UNet; 0: all weights"),
        # ---------------------------------------------------------------------------------------------------- evaluate
        ("test_images", ("evaluate",), 640, 64, in_range(int, 2, NOISES), "evaluation images of each model"),
        ("test_images_per_prompt", ("evaluate",), None, None, in_range(int, 1, 1000),
         "evaluation images of each prompt (default: spread evenly over the prompts)"),
        ("sets", ("evaluate",), 0, 0, in_range(int, 0, 64),
         "compare sets of N images of a prompt; two thirds of the raters decide; 4 in the paper; 0: no sets"),
        # ---------------------------------------------------------------------------------------------------- hardware
        ("dtype", TUNING, "float32", "float32", PRECISIONS, "precision of fine-tuning", {"group": "hardware"}),
        *(
            (*row, {"free": True, "group": "hardware"})
            for row in (
                ("sampling_batch_size", ("generate", "finetune", "evaluate"), 64, 4, number,
                 "images that are sampled, encoded or evaluated at once"),
                ("accumulate", TUNING, 1, 1, number, "micro-batches of a step, one after the other, to save memory"),
                ("gradient_checkpointing", TUNING, False, False, switch, "compute activations twice, to save memory"),
                ("compile", TUNING, False, False, switch, "compile the UNet by torch.compile"),
                ("parallel", TUNING, "ddp", "ddp", ("ddp", "fsdp"),
                 "under torchrun: each process has a copy (ddp) or a shard (fsdp) of the weights"),
                ("checkpoint_every", TUNING, 100, 100, number, "steps between checkpoints"),
                ("keep", TUNING, 2, 2, number, "checkpoints that are kept"),
                ("validate_every", TUNING, 0, 0, in_range(int, 0), "steps between grids of sampled images; 0: none"),
            )
        ),
    )
)  # fmt: skip
BY_NAME = {setting.name: setting for setting in SETTINGS}
RECIPES: dict[str, dict[str, Any]] = {
    # Lee et al. 2023, sections 3.2, 4.1 and appendix D. Beta and the learning rate are not given there: 1 and 1e-5 are
    # ours, as are prompt dropout, the sampler and the precision. Clipping the gradient at norm 1 is the default of the
    # script that the paper builds on.
    "paper": {
        "steps": 10_000,
        "beta": 1.0,
        "batch_size": 512,
        "pretrain_fraction": 0.5,  # half of each step are pre-training pairs
        "image_sampling": "uniform",  # and the loss of each image is weighted by r
        "learning_rate": 1e-5,
        "lr_schedule": "constant",
        "warmup": 0,
        "guidance": 7.5,
        "hidden": 1024,
        "temperature": 2.0,
        "dtype": "bfloat16",
    }
}


def of_stage(*stages: str) -> list[Setting]:
    """The settings that any of the stages uses, in the table's order."""
    return [setting for setting in SETTINGS if set(setting.stages) & set(stages)]


def defaults(bundled: bool, *stages: str) -> dict[str, Any]:
    """The default of every setting of the stages, of all of them unless named."""
    return {setting.name: setting.default(bundled) for setting in of_stage(*(stages or STAGES))}


def add_flags(
    parser: argparse.ArgumentParser,
    *stages: str,
    without: Iterable[str] = (),
    spellings: Mapping[str, Sequence[str]] | None = None,
    title: str = "",
) -> dict[str, Any]:
    """Add the flags of the stages' settings to a parser; what is not given is None. Returns their groups by title.

    without: settings that get no flag. spellings: more flags that give a numeric setting, by its name. title: of one
    group for all flags, in place of a group for each stage.
    """
    groups: dict[str, Any] = {}
    for setting in of_stage(*stages):
        if setting.name in without:
            continue
        stage = next(stage for stage in setting.stages if stage in stages)
        group = _group(parser, groups, title or TITLES[setting.group or stage])
        if setting.kind is switch:
            group.add_argument(setting.flag, action=argparse.BooleanOptionalAction, default=None, help=setting.help)
        elif isinstance(setting.kind, tuple):
            group.add_argument(setting.flag, choices=setting.kind, help=setting.help)
        else:
            default = setting.bundled if setting.own is None else setting.own
            count = isinstance(default, int) or setting.name.endswith("per_prompt")
            flags = (setting.flag, *(spellings or {}).get(setting.name, ()))
            metavar = "N" if count else setting.name.upper().split("_")[-1]
            action = Once if setting.kind is reward_terms else "store"
            group.add_argument(*flags, type=setting.kind, metavar=metavar, help=setting.help, action=action)
    return groups


def _group(parser: argparse.ArgumentParser, groups: dict[str, Any], title: str) -> Any:
    if title not in groups:
        groups[title] = parser.add_argument_group(title)
    return groups[title]


class Once(argparse.Action):
    """A flag whose second value is an error, since it would not add to the first."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "given twice; accepted: once, with commas between the terms")
        setattr(namespace, self.dest, values)


def add_redo(parser: Any) -> None:
    """Add --redo to a parser or to a group of one."""
    redo = "repeat this stage if it is out of date (finetune: later stages too)"
    parser.add_argument("--redo", action="store_true", help=redo)


def add_run_flags(parser: argparse.ArgumentParser, *stages: str, **how: Any) -> None:
    """Add the flags of a command on a run: --redo, its stages' settings by `add_flags(..., **how)`, --device."""
    add_redo(parser)
    hardware = _group(parser, add_flags(parser, *stages, **how), TITLES["hardware"])
    devices = "cpu, cuda, cuda:1, mps ... (default: cuda where there is one, else cpu)"
    hardware.add_argument("--device", default="auto", help=devices)


def given(arguments: argparse.Namespace, *stages: str) -> dict[str, Any]:
    """The settings of the stages, of all unless named, that a command line gives.

    Files are named by absolute paths, for another command elsewhere.
    """
    names = {setting.name for setting in of_stage(*(stages or STAGES))}
    values = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    for name, value in values.items():
        names_files = BY_NAME[name].source and value != "categories"
        if names_files and (os.path.exists(value) or glob.glob(str(value))):
            values[name] = os.path.abspath(value)
    return values


def command(settings: Mapping[str, Any], bundled: bool, folder: Any = None) -> list[str]:
    """The words of the command of the main job with these settings: flags alone that differ from the defaults."""
    words = ["python", "-m", "minialign.finetune"] + ([str(folder)] if folder is not None else [])
    for setting in SETTINGS:
        value = settings.get(setting.name, setting.default(bundled))
        if value == setting.default(bundled) or value is None:
            continue
        if setting.kind is switch:
            words.append(setting.flag if value else f"--no-{setting.flag[2:]}")
        else:
            words += [setting.flag, str(value)]
    return words


def as_shell(words: Sequence[str]) -> str:
    """The words of a command as a shell reads them."""
    return shlex.join(words)
