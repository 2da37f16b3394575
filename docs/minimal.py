"""Aligning a text-to-image model with human feedback, the whole method on one page: python docs/minimal.py

Lee et al. 2023 (arXiv 2302.12192): 1. people label generated images, good where they show what the prompt asks for;
2. a reward model r(x,z) learns to predict their labels; 3. the model is fine-tuned on its own images, each weighted by
its reward. Here the model is minialign's bundled one (64 x 64 pixels, five million weights), and a program that reads
the pixels stands for the people. It runs in a few minutes on a laptop. What `python -m minialign.finetune` adds:
people, any Stable Diffusion checkpoint, checkpoints that survive a kill, several GPUs, intervals, a report.
"""

import random

import torch
import torch.nn.functional as F

from minialign import CLIP, Pipeline, RewardModel, reward_weighted_loss
from minialign.shapes import world

SEED = 0
random.seed(SEED)
torch.manual_seed(SEED)
pipe = Pipeline.from_pretrained()  # the pre-trained model p(x|z): text encoder, UNet, autoencoder, noise schedule
clip = CLIP.from_pretrained()
seen, unseen = world.prompts(SEED)  # by count, color, background and all three; prompts with and without feedback


def generate(prompts, first_seed):
    """One image a prompt, by 10 steps of DDIM with guidance (Song et al. 2021; Ho & Salimans 2022)."""
    seeds = range(first_seed, first_seed + len(prompts))
    images = []
    for i in range(0, len(prompts), 64):
        images += pipe.generate(prompts[i : i + 64], latents=pipe.noise(seeds[i : i + 64]), steps=10, guidance=2.0)
    return images


def embed(images):
    """CLIP's embeddings (N,E) of images."""
    with torch.no_grad():
        parts = [clip.encode_image(clip.preprocess(images[i : i + 128])) for i in range(0, len(images), 128)]
    return torch.cat(parts)


def aligned(prompts, images):
    """The fraction of images that show what their prompt asks for."""
    return sum(label == "good" for label in world.annotate(images, prompts)) / len(images)


# ---------------------------------------------------------------------------------- before: what the model does today
test = random.sample(seen, 120) + random.sample(unseen, 60)
before = generate(test, first_seed=1_000_000)
print(f"before: {aligned(test, before):.1%} of {len(test)} images show what their prompt asks for", flush=True)

# ------------------------------------------------------------------------- 1. human feedback (section 3.1 of the paper)
# The model generates images for prompts; people label some of them good (1) or bad (0): here the first half.
prompts = random.choices(seen, k=1536)
images = generate(prompts, first_seed=0)
verdicts = world.annotate(images[:768], prompts[:768])
y = torch.tensor([float(verdict == "good") for verdict in verdicts])  # an image that cannot be read is bad, too
print(f"1. {len(y)} labels, {y.mean():.1%} good", flush=True)

# --------------------------------------------------------------------------- 2. the reward model r(x,z) (section 3.2)
# A small MLP on frozen CLIP embeddings of image x and prompt z. Two losses, L = L_mse + lambda L_pc:
#   L_mse = mean (y - r(x,z))^2
#   L_pc  = cross entropy of softmax_i( r(x,z_i) / T ) for the original prompt among contrastive ones, on good images
texts = sorted(set(prompts))
with torch.no_grad():
    text = clip.encode_text(clip.tokenizer(texts))  # (P,E)
image = embed(images)  # (N,E)
own = torch.tensor([texts.index(prompt) for prompt in prompts])  # (N,) each image's prompt among the texts
labelled_prompts = own[: len(y)].unique()  # the prompts that have labels
reward = RewardModel({"width": clip.width, "hidden": 512})
optimizer = torch.optim.AdamW(reward.parameters(), lr=3e-4, weight_decay=1e-2)
LAMBDA, T, CONTRASTIVE = 0.5, 0.5, 7  # the paper: lambda 0.5, T 2
for _ in range(800):
    rows = torch.randint(len(y), (64,))
    x, label, z = image[rows], y[rows], own[rows][:, None]
    others = 1 + torch.randint(len(labelled_prompts) - 1, (64, CONTRASTIVE))  # that have labels, never the same
    place = (torch.searchsorted(labelled_prompts, z) + others) % len(labelled_prompts)
    z = torch.cat([z, labelled_prompts[place]], dim=1)  # (64,8)
    r = reward(x[:, None].expand(-1, z.shape[1], -1), text[z])  # (64,8)
    l_mse = (label - r[:, 0]).square().mean()
    entropy = -F.log_softmax(r / T, dim=1)[:, 0]
    l_pc = (entropy * label).sum() / label.sum().clamp(min=1)
    (l_mse + LAMBDA * l_pc).backward()
    optimizer.step()
    optimizer.zero_grad()
with torch.no_grad():
    r = reward(image, text[own])  # (N,) of all images, with labels and without
print(f"2. squared error {l_mse.item():.3f}; mean reward {r.mean():.2f} of all {len(r)} images", flush=True)

# ------------------------------------------------------------- 3. reward-weighted fine-tuning of the UNet (section 3.3)
#   L = E_model[ r(x,z) ||eps - eps_theta(x_t,t,z)||^2 ] + beta E_pre[ ||eps - eps_theta(x_t,t,z)||^2 ]
# The text encoder and the autoencoder are frozen, so that contexts and latents are computed once. Model images are
# sampled in proportion to r instead of uniformly with weight r: the same expectation, and no step is spent on images
# of reward 0.
captions, drawings = zip(*world.pretraining_pairs(512, SEED))  # pairs like those that the model was pre-trained on
all_texts = [*texts, *sorted(set(captions)), ""]
(context,) = pipe.encode_prompts(all_texts)  # (Z,L,D), the last row is that of no prompt


def latents(pictures):
    """Mean and standard deviation (N,C,h,w) of the VAE's latents."""
    parts = [pipe.encode_images(pictures[i : i + 64]) for i in range(0, len(pictures), 64)]
    return [torch.cat(part) for part in zip(*parts)]


(model_mean, model_std), (pre_mean, pre_std) = latents(images), latents(drawings)
pre_own = torch.tensor([all_texts.index(caption) for caption in captions])
BETA, STEPS, MODEL, PRE, RATE = 0.03, 240, 56, 8, 1e-3
optimizer = torch.optim.AdamW(pipe.unet.requires_grad_(True).parameters(), lr=RATE, weight_decay=1e-2)
is_pre = torch.arange(MODEL + PRE) >= MODEL
for step in range(STEPS):
    # model images in proportion to their reward, pre-training pairs at random; a latent of each, noise, a timestep
    chosen, pairs = torch.multinomial(r, MODEL, replacement=True), torch.randint(len(pre_own), (PRE,))
    mean, std = torch.cat([model_mean[chosen], pre_mean[pairs]]), torch.cat([model_std[chosen], pre_std[pairs]])
    x0 = mean + std * torch.randn_like(mean)
    noise, t = torch.randn_like(x0), torch.randint(len(pipe.schedule.alphas_cumprod), (len(x0),))
    row = torch.cat([own[chosen], pre_own[pairs]])
    row[torch.rand(len(row)) < 0.1] = len(all_texts) - 1  # without the prompt now and then, which guidance needs
    prediction = pipe.unet(pipe.schedule.add_noise(x0, noise, t), t, context[row])
    weight = torch.where(is_pre, 0.0, r.mean())  # of images that were sampled in proportion to r
    loss = reward_weighted_loss(prediction, pipe.schedule.target(x0, noise, t), weight, is_pre, BETA)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(pipe.unet.parameters(), 1.0)
    for group in optimizer.param_groups:  # a short warm-up, then a cosine to 0
        rise, fall = (step + 1) / 20, 0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * step / STEPS)).item()
        group["lr"] = RATE * min(rise, fall)
    optimizer.step()
    optimizer.zero_grad()
    if (step + 1) % 40 == 0:
        print(f"3. step {step + 1}: loss {loss.item():.4f}", flush=True)
pipe.unet.requires_grad_(False)

# ----------------------------------------------------------------- after: the same prompts and noise again (section 4)
after = generate(test, first_seed=1_000_000)
groups = {"prompts with feedback": slice(120), "prompts without feedback": slice(120, None), "all prompts": slice(None)}
for name, rows in groups.items():
    was, now = aligned(test[rows], before[rows]), aligned(test[rows], after[rows])
    print(f"{name:24} {was:.1%} -> {now:.1%} aligned, {100 * (now - was):+.1f} points")
