"""Whole jobs beside their peers: sampling, a fine-tuning step, reward training: pytest bench/test_jobs.py

The UNet is mid-size; VAE, text encoder and CLIP have the released sizes. All weights are random.
"""

import json
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from counts import trainer_step
from pairs import arithmetic, text_encoder, unet, vae
from PIL import Image

from minialign import CLIP, Pipeline, RewardModel
from minialign.diffusion import ddim_sample
from minialign.models.clip import TEXT_SETTINGS, VISION_SETTINGS
from minialign.models.reward import embed_images, embed_texts
from minialign.pipeline import to_pixels
from minialign.reward.trainer import Pairs, train_reward

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
PROMPTS = ["a green colored dog", "three dogs", "a dog in the forest", "two blue dogs in the city"]


@pytest.fixture(scope="module")
def pipes(tmp_path_factory, device):
    """The same pipeline here and in diffusers, in float32: the trainer's weights are."""
    folder = tmp_path_factory.mktemp("pipeline")
    embedded = Pipeline.from_pretrained()
    parts = {"tokenizer": embedded.tokenizer, "schedule": embedded.schedule}
    Pipeline(unet=unet(), vae=vae(), text_encoder=text_encoder(), **parts).save_pretrained(folder)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(device)
    theirs.set_progress_bar_config(disable=True)
    return Pipeline.from_pretrained(folder, device=device), theirs


@pytest.fixture
def sampling(pipes, device, dtype):
    """Both pipelines with their networks in `dtype`."""
    if device.type == "meta":
        pytest.skip("diffusers' scheduler reads timesteps, and an image has content")
    for pipe in pipes:
        for part in ("unet", "vae", "text_encoder"):
            getattr(pipe, part).to(dtype)
    return pipes


def test_sampling(compare, sampling, device, dtype):
    """The loop of DDIM from noise to latents, without text encoder and autoencoder."""
    ours, theirs = sampling
    latents, context = ours.noise(range(1)), torch.randn(1, 77, 768).to(device, dtype)
    unconditional = torch.randn(1, 77, 768).to(device, dtype)

    @torch.no_grad()
    def mine():
        how = {"steps": 5, "guidance": 7.5}
        return ddim_sample(ours.unet, ours.schedule, latents, (context,), (unconditional,), **how)

    def peer():
        how = {"latents": latents, "num_inference_steps": 5, "guidance_scale": 7.5, "output_type": "latent"}
        return theirs(prompt_embeds=context, negative_prompt_embeds=unconditional, **how).images

    compare("5-step guided sampling, latents alone, batch 1, 256 px", mine, peer)


@pytest.mark.slow
def test_sampling_images(compare, sampling, dtype):
    """From prompts to images."""
    ours, theirs = sampling
    latents = ours.noise(range(4))

    def mine():
        return to_pixels(ours.generate(PROMPTS, steps=20, latents=latents)).to(dtype)

    def peer():
        return to_pixels(theirs(PROMPTS, latents=latents, num_inference_steps=20, guidance_scale=7.5).images).to(dtype)

    compare("20-step guided sampling, whole pipeline, batch 4, 256 px", mine, peer, goal=1.15)


@pytest.mark.parametrize("batch", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_finetuning_step(compare, pipes, device, dtype, batch):
    """Ours from cached latents and contexts, as finetune/ runs; theirs encodes, as the text-to-image example does."""
    ours, theirs = (pipe.unet.float().train() for pipe in pipes)
    mine, state = trainer_step(ours, batch, 32, dtype)
    encoders = pipes[1].vae, pipes[1].text_encoder
    for network in encoders:
        network.requires_grad_(False).to(dtype)  # as the example has them
    vae, text_encoder = encoders
    pixels = (torch.rand(batch, 3, 256, 256) * 2 - 1).to(device, dtype)
    ids = pipes[1].tokenizer(PROMPTS[:batch], padding="max_length", truncation=True, return_tensors="pt").input_ids
    ids, t = ids.to(device), torch.linspace(3, 996, batch).long().to(device)
    optimizer = torch.optim.AdamW(theirs.parameters(), 1e-5, weight_decay=1e-2)
    noising = diffusers.DDPMScheduler.from_config(pipes[1].scheduler.config)

    def peer():
        with torch.no_grad():
            x0 = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            states = text_encoder(ids, return_dict=False)[0]
        noise = torch.randn_like(x0)
        with arithmetic(device, dtype):
            prediction = theirs(noising.add_noise(x0, noise, t), t, states, return_dict=False)[0]
        F.mse_loss(prediction.float(), noise.float()).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    compare(f"a fine-tuning step from image and prompt, batch {batch}, 256 px", mine, peer, goal=4)


@pytest.mark.slow
def test_reward_training(compare, device, dtype):
    """10,000 labelled pairs, 1,500 steps of 64: features once and then the MLP, beside CLIP again at every step.

    What is timed is 64 / 10,000 of the work: here 64 images, 17 of 2,700 prompts and 10 steps of the MLP; the peer's
    part has 9.6 of its steps, of which one is timed, since all would take hours. CLIP in `dtype`, the MLP in float32.
    """
    if device.type == "meta":
        pytest.skip("rows are sampled by the content of the labels")
    vision = VISION_SETTINGS | {"hidden_act": "quick_gelu"}
    config = {"text_config": TEXT_SETTINGS, "vision_config": vision, "projection_dim": 512}  # ViT-B/32, the released
    torch.manual_seed(0)
    clip = CLIP(config).eval().requires_grad_(False).to(device)
    clip.tokenizer, clip.preprocessing = Pipeline.from_pretrained().tokenizer, {}
    theirs = transformers.CLIPModel(transformers.CLIPConfig.from_dict(config)).eval().to(device)
    prompts = [f"{i} dogs" for i in range(8 * 64)]
    picture = Image.effect_noise((224, 224), 80).convert("RGB")
    rows = torch.arange(64, device=device)  # seven contrastive prompts each
    train = Pairs(rows, (rows[:, None] + rows[:8]) % 17, rows.float() % 2)
    reward = {"width": 512, "hidden": 1024, "clip": None}
    model = RewardModel(reward).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
    pixels, ids = torch.randn(64, 3, 224, 224).to(device), clip.tokenizer(prompts).to(device)

    def mine():
        with arithmetic(device, dtype):
            images, texts = embed_images(clip, [picture] * 64), embed_texts(clip, prompts[:17])
        train_reward(images.float(), texts.float(), train, reward, steps=10, batch_size=64)

    def peer():
        with torch.no_grad(), arithmetic(device, dtype):
            images = theirs.get_image_features(pixels).pooler_output.float()
            texts = theirs.get_text_features(ids).pooler_output.float().view(64, 8, -1)
        rewards = model(images[:, None].expand_as(texts), texts)
        rewards.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    work = "reward training on 10,000 pairs, 1,500 steps of 64, features included: 64 / 10,000 of it"
    compare(work, mine, peer, goal=50, times=9.6, counted=False)


@pytest.mark.slow
@pytest.mark.usefixtures("host")
def test_main_job(benchmark, tmp_path):
    """The whole default run on the bundled model, in a process of its own: one round, which says nothing of noise."""
    command = [sys.executable, "-m", "minialign.finetune", "--out", str(tmp_path / "run")]
    begin = time.perf_counter()
    benchmark.pedantic(subprocess.run, args=(command,), kwargs={"check": True, "capture_output": True}, rounds=1)
    whole = time.perf_counter() - begin
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    seconds = results["seconds"]
    stages = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items() if name != "total")
    benchmark.extra_info |= {
        "work": "the main job on the bundled model",
        "note": f"{whole:.0f} s, of which {stages}",
    }
