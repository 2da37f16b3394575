"""Train the bundled model from scratch: python -m minialign.shapes.pretrain --out FOLDER

Draws captioned scenes, trains a VAE, a CLIP and a UNet on them, and writes a Stable-Diffusion-shaped checkpoint in the
diffusers layout. Captions are deliberately noisy, as web captions are: the UNet first learns the words from clean
captions, then sees captions that often say another count, color or background (CAPTION_NOISE), so that it generates
clean images that follow the prompt less than half of the time. This is the model that feedback repairs.
Every stage resumes from its last checkpoint when the command is run again.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion import NoiseSchedule
from ..engine.checkpoints import MOMENTS, load_checkpoint, save_checkpoint
from ..engine.commands import Parser, in_range, run_command
from ..engine.optimising import EMA, generator, learning_rate, progress
from ..files import InputError, atomic, read_json, read_weights, remove_unfinished, write_json, write_tensors
from ..finetune.loop import step_loss
from ..models.clip import CLIP, TextEncoder
from ..models.tokenizer import END, START, Tokenizer, byte_characters, split_words
from ..models.unet import UNet
from ..models.vae import VAE
from ..pipeline import Pipeline
from ..prompts import ATTRIBUTES, SHAPES, all_prompts, corrupt
from .annotator import calibrate
from .scenes import SIZE, Scene, draw, sample_scene
from .world import CAPTION_NOISE, WORLD

CLIP_NOISE = dict.fromkeys(
    ATTRIBUTES, 0.1
)  # CLIP's captions are cleaner: its features are to see what the pictures show
CONTEXT = 64  # width of the text tower
LENGTH = 16  # text positions; the longest prompt takes eight
CHANNELS = 12  # of the latents
# mean and standard deviation of logit(t / T) of most timesteps, where it is decided how many objects there are and
# where: of drawings with the noise of 0.7 T, sampled from there, 98 of 100 could be read, from 0.9 T 81 (8,400 steps)
LAYOUT = (1.4, 0.8)
POSTERIOR = 0.3  # what is left of the posterior's standard deviation once the encoder is trained
VAE_CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [16, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "latent_channels": CHANNELS,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "act_fn": "silu",
    "sample_size": SIZE,
}
UNET_CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "block_out_channels": [96, 96],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": CONTEXT,
    "attention_head_dim": [3, 3],
    "norm_num_groups": 16,
    "use_linear_projection": True,
}
SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,  # not used with trailing; diffusers warns of another value
    "set_alpha_to_one": True,
    "clip_sample": False,
}
PREPROCESSOR_CONFIG: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": SIZE},
    "crop_size": {"height": SIZE, "width": SIZE},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def clip_config(tokenizer: Tokenizer) -> dict[str, Any]:
    shared: dict[str, Any] = {"num_attention_heads": 2, "hidden_size": CONTEXT, "intermediate_size": 4 * CONTEXT}
    shared |= {"hidden_act": "quick_gelu", "projection_dim": 64}
    special = {"bos_token_id": tokenizer.start, "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.pad}
    text = shared | special | {"vocab_size": len(tokenizer.vocab), "max_position_embeddings": tokenizer.length}
    vision = shared | {"num_hidden_layers": 4, "image_size": SIZE, "patch_size": 8}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": 64,
        "logit_scale_init_value": 2.6592,
        "text_config": text | {"model_type": "clip_text_model", "num_hidden_layers": 2},
        "vision_config": vision | {"model_type": "clip_vision_model"},
    }


def make_tokenizer() -> Tokenizer:
    """A CLIP tokenizer whose merges are learned on the grammar's words, each of which becomes one token."""
    words = Counter(word for prompt in all_prompts(SHAPES) for word in split_words(prompt.text))
    spelled = {word: [*word[:-1], word[-1] + "</w>"] for word in sorted(words)}
    merges: list[tuple[str, str]] = []
    while any(len(parts) > 1 for parts in spelled.values()):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in spelled.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += words[word]
        best = max(sorted(pairs), key=lambda pair: pairs[pair])
        merges.append(best)
        for parts in spelled.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = ["".join(best)]
                i += 1
    letters = byte_characters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    return Tokenizer({token: i for i, token in enumerate(tokens)}, merges, {"model_max_length": LENGTH})


# ---------------------------------------------------------------------------------------------- captioned drawings
def draw_dataset(number: int, seed: int) -> tuple[Tensor, list[Scene]]:
    """`number` drawings as (number,3,64,64) uint8 with their scenes; a third show one object."""
    rng = random.Random(seed)
    images = np.empty((number, SIZE, SIZE, 3), dtype=np.uint8)
    scenes = []
    for i in progress(range(number), "draw"):
        scene = sample_scene(None, rng)
        if rng.random() < 0.15:  # color and background captions speak of one object: draw those more often
            scene = Scene(1, scene.color, scene.object, scene.background)
        images[i] = np.asarray(draw(scene, rng))
        scenes.append(scene)
    return torch.from_numpy(images).permute(0, 3, 1, 2), scenes


class Captions:
    """Captions of the scenes as row numbers of the table of all prompts; the last row is the empty prompt."""

    def __init__(self, scenes: list[Scene], noise: Mapping[str, float], seed: int):
        self.scenes, self.noise, self.seed = scenes, noise, seed
        self.prompts = all_prompts(SHAPES)
        self.texts = [prompt.text for prompt in self.prompts] + [""]
        self.row = {prompt: i for i, prompt in enumerate(self.prompts)}

    def __call__(self, indices: Tensor, step: int) -> Tensor:
        """One caption for each scene, its category at random among those that fit, its words noisy."""
        rng = random.Random(self.seed * 1_000_003 + step)
        rows = []
        for i in indices.tolist():
            scene = self.scenes[i]
            fitting = ("count", "color", "background", "combination") if scene.count == 1 else ("count", "combination")
            prompt = scene.prompt(rng.choices(fitting, [2 if c == "combination" else 1 for c in fitting])[0])
            rows.append(self.row[corrupt(prompt, self.noise, SHAPES, rng)])
        return torch.tensor(rows)


def to_pixels(images: Tensor) -> Tensor:
    """uint8 -> [-1,1]"""
    return images.float() / 127.5 - 1


# ------------------------------------------------------------------------------------------------------ the stages
def start_near_identity(model: nn.Module) -> None:
    """Zero the last layer of every residual branch, which speeds the first steps (Goyal et al. 2017, section 5.1)."""
    for name, module in model.named_modules():
        if name.endswith(("conv2", "proj_out", "to_out.0", "ff.net.2")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonal steps for the matrices inside a network (Jordan et al. 2024), AdamW for all else.

    Of a convolution's kernel the matrix is (outputs, inputs x height x width). Steps are as long as AdamW's, so
    that one learning rate serves both (Liu et al. 2025, section 2.2). Vectors are AdamW's, and parameters with embed,
    conv_in or conv_out in their name: embeddings, first and last convolutions.
    """

    def __init__(self, model: nn.Module, lr: float, momentum: float = 0.95, decay: float = 1e-2):
        ends = ("embed", "conv_in", "conv_out")
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        inner = [p for name, p in named if p.ndim > 1 and not any(end in name for end in ends)]
        rest = [p for name, p in named if p.ndim < 2 or any(end in name for end in ends)]
        super().__init__([{"params": inner, "inner": True}, {"params": rest, "inner": False}], {"lr": lr})
        self.momentum, self.decay, self.betas = momentum, decay, (0.9, 0.99)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:  # both moments for a checkpoint's sake; a matrix has no second one
                    state |= {"step": torch.zeros(())} | {key: torch.zeros_like(p) for key in MOMENTS}
                state["step"] += 1
                update = (self._orthogonal if group["inner"] else self._adam)(p.grad, state)
                p.mul_(1 - group["lr"] * self.decay).sub_(update, alpha=group["lr"])

    def _orthogonal(self, grad: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Nesterov's momentum with all singular values near one, by five Newton-Schulz iterations."""
        state["exp_avg"].lerp_(grad, 1 - self.momentum)
        x = grad.lerp(state["exp_avg"], self.momentum).flatten(1)
        tall = x.shape[0] > x.shape[1]
        x = (x.T if tall else x) / (x.norm() + 1e-12)
        for _ in range(5):
            square = x @ x.T
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        return (x.T if tall else x).reshape(grad.shape) * (0.2 * math.sqrt(max(x.shape)))

    def _adam(self, grad: Tensor, state: dict[str, Tensor]) -> Tensor:
        for key, beta, value in zip(MOMENTS, self.betas, (grad, grad.square())):
            state[key].lerp_(value, 1 - beta)
        first, second = (1 - beta ** state["step"].item() for beta in self.betas)
        return (state["exp_avg"] / first) / ((state["exp_avg_sq"] / second).sqrt() + 1e-8)


def fit(
    model: nn.Module, loss_at, steps: int, folder: Path, *, lr: float, decay: float = 1.0, ema: float = 0.0, every=200
) -> dict[str, Tensor]:
    """Muon on `loss_at(step)` with checkpoints; the weights reached (their moving average where `ema` > 0)."""
    done = folder / "final.safetensors"
    if done.exists():
        return read_weights(done)
    optimizer = Muon(model, lr)
    average = EMA(model, ema) if ema else None
    first = load_checkpoint(folder, model, optimizer, average)
    mean = 0.0
    for step in progress(range(first, steps), folder.name, steps, first):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr, warmup=100, decay=decay)
        loss = loss_at(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average:
            average.update(model, step)
        mean += loss.item()
        if (step + 1) % every == 0:
            print(f"{folder.name} step {step + 1}: loss {mean / every:.4f}", flush=True)
            mean = 0.0
            save_checkpoint(folder, step + 1, model, optimizer, average)
    weights: dict[str, Tensor] = average.weights if average else {n: p for n, p in model.named_parameters()}
    write_tensors(done, weights)
    return {name: weight.detach() for name, weight in weights.items()}


def train_vae(images: Tensor, folder: Path, steps: int, seed: int, batch: int = 16) -> VAE:
    """Reconstruction with a pull of the latents to N(0,1), which keeps them smooth enough for a small UNet.

    Afterwards the standard deviation of the latents is multiplied by POSTERIOR, and the decoder that is trained further
    with this smaller noise becomes sharper.
    """
    torch.manual_seed(seed)
    vae = VAE(VAE_CONFIG)
    start_near_identity(vae)

    def loss_at(step: int) -> Tensor:
        g = generator(seed, 1, step)
        x = to_pixels(images[torch.randint(len(images), (batch,), generator=g)])
        mean, logvar = vae.encode(x)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return reconstruction_loss(vae, x, mean, logvar, g) + 1e-3 * kl

    vae.load_state_dict(fit(vae, loss_at, steps, folder, lr=3e-3))
    vae.requires_grad_(False)
    vae.quant_conv.get_parameter("bias")[CHANNELS:] += 2 * math.log(POSTERIOR)  # the log variances
    return vae.eval()


def reconstruction_loss(vae: VAE, x: Tensor, mean: Tensor, logvar: Tensor, g: torch.Generator) -> Tensor:
    """L1 + L2, and a quarter of the L1 of differences between neighbours, which edges are made of."""
    error = vae.decode(mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=g)) - x
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.square().mean() + error.abs().mean() + 0.25 * edges


def polish_decoder(vae: VAE, images: Tensor, folder: Path, steps: int, seed: int, batch: int = 16) -> None:
    """Train the decoder alone for longer, in place: the latents stay as the UNet knows them."""
    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}).requires_grad_(True)

    def loss_at(step: int) -> Tensor:
        g = generator(seed, 4, step)
        x = to_pixels(images[torch.randint(len(images), (batch,), generator=g)])
        with torch.no_grad():
            mean, logvar = vae.encode(x)
        return reconstruction_loss(vae, x, mean, logvar, g)

    decoder.load_state_dict(fit(decoder, loss_at, steps, folder, lr=2e-3))
    vae.requires_grad_(False)


def train_clip(
    images: Tensor, captions: Captions, tokenizer: Tokenizer, folder: Path, steps: int, seed: int, batch: int = 128
) -> CLIP:
    """The symmetric contrastive loss (Radford et al. 2021, figure 3)."""
    torch.manual_seed(seed)
    clip = CLIP(clip_config(tokenizer))
    for module in clip.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    nn.init.normal_(clip.vision_model.embeddings.class_embedding, std=0.02)
    ids = tokenizer(captions.texts)
    length = int((ids == tokenizer.end).int().argmax(1).max()) + 1  # the causal tower never looks past the end token

    def loss_at(step: int) -> Tensor:
        g = generator(seed, 2, step)
        chosen = torch.randint(len(images), (batch,), generator=g)
        rows = captions(chosen, step)
        image = F.normalize(clip.encode_image(to_pixels(images[chosen])), dim=1)
        text = F.normalize(clip.encode_text(ids[:, :length][rows]), dim=1)
        logits = clip.logit_scale.exp() * image @ text.T
        # equal captions are equally right: share the target among them
        same = (rows[:, None] == rows[None]).float()
        target = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    clip.load_state_dict(fit(clip, loss_at, steps, folder, lr=2e-3))
    return clip.eval().requires_grad_(False)


@torch.no_grad()
def encode_dataset(vae: VAE, images: Tensor, path: Path) -> dict[str, Tensor]:
    """Latent "mean" and "std" of all images, scaled to unit variance by "factor"; kept in the file `path`."""
    if not path.exists():
        parts = [vae.encode(to_pixels(chunk)) for chunk in progress(images.split(256), "encode")]
        mean = torch.cat([mean for mean, _ in parts])
        std = torch.cat([(0.5 * logvar).exp() for _, logvar in parts])
        factor = (mean.var() + std.square().mean()).rsqrt()
        write_tensors(path, {"mean": mean * factor, "std": std * factor, "factor": factor})
    return read_weights(path)


def timesteps(batch: int, step: int, total: int, g: torch.Generator) -> Tensor:
    """Timesteps (B,) of a step, of `total`: three of four logit-normal (Esser et al. 2024, section 3.1), one uniform.

    Each row has an interval of its own, one of B equal ones of the distribution (Kingma et al. 2021, section I.1).
    Which rows are uniform changes from step to step: four steps cover all intervals of both.
    """
    rows = torch.arange(batch)
    u = (rows + torch.rand(batch, generator=g)) / batch
    u = torch.where((rows + step) % 4 == 0, u, (LAYOUT[0] + LAYOUT[1] * torch.special.ndtri(u)).sigmoid())
    return (u * total).long().clamp(max=total - 1)


def train_unet(
    unet: UNet, latents: dict[str, Tensor], context: Tensor, captions: Captions, folder: Path, steps: int, seed: int,
    *, lr: float, decay: float, batch: int = 64,
) -> None:  # fmt: skip
    """The denoising loss, in place, with captions dropped for guidance one time in ten."""
    schedule = NoiseSchedule.from_config(SCHEDULER_CONFIG)
    mean, std = latents["mean"], latents["std"]

    def loss_at(step: int) -> Tensor:
        g = generator(seed, 3, step)
        chosen = torch.randint(len(mean), (batch,), generator=g)
        rows = captions(chosen, step)
        rows[torch.rand(batch, generator=g) < 0.1] = len(captions.texts) - 1
        noise, sample = torch.randn(2, batch, *mean.shape[1:], generator=g)
        x0 = mean[chosen] + std[chosen] * sample
        t = timesteps(batch, step, len(schedule.alphas_cumprod), g)
        return step_loss(unet, schedule, x0, noise, t, [context[rows]], torch.ones(batch))[0]

    unet.requires_grad_(True)
    unet.load_state_dict(fit(unet, loss_at, steps, folder, lr=lr, decay=decay, ema=0.999))
    unet.eval().requires_grad_(False)


def main() -> None:
    parser = Parser(prog="python -m minialign.shapes.pretrain", description=__doc__.split("\n\n")[1])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/pretrain"), help="work folder, with the result")
    whole = in_range(int, 1)
    add("--seed", type=in_range(int, 0), default=0, help="of drawings, captions, weights and noise")
    add("--images", type=whole, default=48_000, help="number of drawings")
    add("--vae-steps", type=whole, default=3_000, help="training steps of the VAE, 16 drawings each")
    add("--decoder-steps", type=whole, default=8_000, help="further steps of the VAE's decoder alone")
    add("--clip-steps", type=whole, default=3_000, help="training steps of CLIP, 128 captioned drawings each")
    add("--unet-steps", type=whole, default=14_000, help="training steps of the UNet, 64 drawings each, clean captions")
    add("--noisy-steps", type=whole, default=7_800, help="training steps of the UNet after these, noisy captions")
    a = parser.parse_args()
    open_folder(a.out, {key: value for key, value in vars(a).items() if key != "out"})
    images, scenes = draw_dataset(a.images, a.seed)
    tokenizer = make_tokenizer()
    vae = train_vae(images, a.out / "vae", a.vae_steps, a.seed)
    captions = Captions(scenes, CLIP_NOISE, a.seed)
    clip = train_clip(images, captions, tokenizer, a.out / "clip", a.clip_steps, a.seed)
    clip.tokenizer, clip.preprocessing = tokenizer, PREPROCESSOR_CONFIG
    text_encoder = TextEncoder(clip.config["text_config"]).eval()
    text_encoder.text_model.load_state_dict(clip.text_model.state_dict())
    clean, noisy = (Captions(scenes, noise, a.seed + 1) for noise in (dict.fromkeys(CAPTION_NOISE, 0.0), CAPTION_NOISE))
    with torch.no_grad():
        context = text_encoder(tokenizer(clean.texts))
    latents = encode_dataset(vae, images, a.out / "latents.safetensors")
    vae.scaling_factor = vae.config["scaling_factor"] = latents["factor"].item()
    torch.manual_seed(a.seed)
    unet = UNet(UNET_CONFIG)
    start_near_identity(unet)
    nn.init.zeros_(unet.conv_out.weight)
    train_unet(unet, latents, context, clean, a.out / "unet", a.unet_steps, a.seed, lr=1e-3, decay=0.0)
    train_unet(unet, latents, context, noisy, a.out / "noisy", a.noisy_steps, a.seed + 1, lr=1e-3, decay=1.0)
    polish_decoder(vae, images, a.out / "decoder", a.decoder_steps, a.seed)
    with atomic(a.out / "checkpoint", replace_folder="model_index.json") as folder:
        schedule = NoiseSchedule.from_config(SCHEDULER_CONFIG)
        pipe = Pipeline(unet, vae, text_encoder, tokenizer, schedule, world=WORLD)
        pipe.save_pretrained(folder, torch.float16)
        clip.save_pretrained(folder / "clip", torch.float16)
        write_json(folder / "annotator.json", annotator_statistics(pipe, a.seed))


def open_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Keep the settings in `folder`; InputError where other ones began it, for finished parts would be theirs."""
    path = folder / "config.json"
    if path.exists() and (begun := read_json(path)) != settings:
        key = next(key for key in settings if begun.get(key) != settings[key])
        raise InputError(f"{folder} was begun with {key}={begun.get(key)!r}, not {settings[key]!r}; use another --out")
    try:
        write_json(path, settings)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error.strerror})") from error
    remove_unfinished(folder)  # of checkpoints: `load_checkpoint`


def annotator_statistics(pipe: Pipeline, seed: int, number: int = 1_500) -> dict[str, Any]:
    """The annotator's shape statistics, on as many drawings as reconstructions of the VAE."""
    rng = random.Random(seed + 2)
    scenes = [sample_scene(None, rng) for _ in range(number)]
    drawings = [draw(scene, rng) for scene in scenes]
    again = [image for part in pipe.encode_images(drawings)[0].split(50) for image in pipe.decode(part)]
    return calibrate(drawings + again, scenes * 2)


if __name__ == "__main__":
    run_command(main)
