"""The comparisons of the goldens, live on random cases, so that a change in diffusers or transformers is seen."""

from __future__ import annotations

import inspect
import random
import shutil
import unicodedata

import pytest
from comparisons import (
    GOLDENS,
    check_clip,
    check_ddim_steps,
    check_preprocess,
    check_schedule,
    check_scheduler_class,
    check_text,
    check_timesteps,
    check_tokens,
    check_trajectory,
    check_unet,
    check_vae,
)

from minialign.models import unet, vae
from minialign.models.tokenizer import Tokenizer

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import make_goldens as reference  # noqa: E402  # needs both

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the peers' own


def random_unet(seed: int) -> dict:
    """An SD 1.x config for even seeds, an SD 2.x one for odd."""
    pick = random.Random(seed)
    levels = pick.choice([2, 3])
    attention = [pick.random() < 0.6 for _ in range(levels)]
    heads = [pick.choice([1, 2, 3]) for _ in range(levels)]
    config = {
        "block_out_channels": [6 * pick.choice([1, 2, 3]) for _ in range(levels)],
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]],
        "layers_per_block": pick.choice([1, 2]),
        "attention_head_dim": heads[0],
        "cross_attention_dim": pick.choice([5, 8]),
        "norm_num_groups": 3,
    }
    later = {
        "attention_head_dim": heads,
        "use_linear_projection": True,
        "upcast_attention": pick.random() < 0.5,
        "transformer_layers_per_block": [pick.choice([1, 2]) for _ in range(levels)],
    }
    return config | (later if seed % 2 else {})


@pytest.mark.parametrize("network", [unet, vae])
def test_no_setting_of_diffusers_networks_is_passed_over(network):
    """What is in neither table is ignored in a config, so that the tables must know all that changes a network."""
    kind = {unet: reference.diffusers.UNet2DConditionModel, vae: reference.diffusers.AutoencoderKL}[network]
    settings = set(inspect.signature(kind.__init__).parameters) - {"self", "dropout", "addition_embed_type_num_heads"}
    assert settings == network.SETTINGS.keys() | network.BUILT.keys()


@pytest.mark.parametrize("seed", range(1, 7))
def test_unet(seed):
    check_unet(*reference.unet(random_unet(seed), size=(4 + seed, 11 - seed), seed=seed))


@pytest.mark.parametrize("seed", range(4))
def test_vae(seed):
    pick = random.Random(seed)
    config = {
        "block_out_channels": [4 * pick.choice([1, 2, 3]) for _ in range(pick.choice([1, 2, 3]))],
        "layers_per_block": pick.choice([1, 2]),
        "latent_channels": pick.choice([4, 8, 16]),
        "norm_num_groups": 2,
        "mid_block_add_attention": pick.random() < 0.5,
        "use_quant_conv": pick.random() < 0.5,
        "use_post_quant_conv": pick.random() < 0.5,
    }
    check_vae(*reference.vae(config, size=(17 + seed, 20 - seed), seed=seed))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("end", [2, 40])
def test_clip(activation, end):
    config = reference.CLIPS["gelu"]
    config = {tower: config[tower] | {"hidden_act": activation} for tower in ("text_config", "vision_config")}
    config["text_config"] |= {"eos_token_id": end}
    check_text(*reference.text(config["text_config"], seed=end))
    check_clip(*reference.clip(config | {"projection_dim": 5}, seed=end))


def test_preprocess_at_full_size():
    pick = random.Random(0)
    sizes = [[pick.randrange(100, 400), pick.randrange(100, 400), mode] for mode in ("RGB", "RGBA", "L", "RGB")]
    check_preprocess(*reference.preprocess({}, [*sizes, [224, 224, "RGB"], [512, 512, "RGB"]]))


def random_text(pick: random.Random) -> str:
    ranges = [(32, 127), (32, 127), (9, 33), (0xA1, 0x600), (0x300, 0x370), (0x4E00, 0x4F00), (0x1F300, 0x1F700)]
    text = "".join(chr(pick.randrange(*pick.choice(ranges))) for _ in range(pick.randrange(1, 40)))
    return "".join(c for c in text if unicodedata.category(c) != "Cn")  # the two know different versions of Unicode


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_json"])
def test_tokens_of_random_text(name, tmp_path):
    pick = random.Random(0)
    texts = [random_text(pick) for _ in range(200)]
    check_tokens(reference.tokens(GOLDENS / name, texts)[0], GOLDENS / name)
    Tokenizer.from_pretrained(GOLDENS / name).save_pretrained(tmp_path)  # what we write the peer reads
    check_tokens(reference.tokens(tmp_path, texts)[0], GOLDENS / name)


def test_tokens_that_transformers_added_to_an_older_folder(tmp_path):
    shutil.copytree(GOLDENS / "tokenizer", tmp_path, dirs_exist_ok=True)  # whose vocab.json stays as it was
    peer = reference.transformers.CLIPTokenizer.from_pretrained(tmp_path)
    peer.add_tokens(["<sks>", reference.transformers.AddedToken("<Big>", normalized=False)])
    peer.save_pretrained(tmp_path)
    assert {"vocab.json", "tokenizer.json"} <= {path.name for path in tmp_path.iterdir()}
    texts = ["a <sks> dog", "a <SKS> dog", "<Big> dogs", "a <big> dog", "<sks>,<sks>dog"]
    check_tokens(reference.tokens(tmp_path, texts)[0], tmp_path)
    Tokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    check_tokens(reference.tokens(tmp_path, texts)[0], tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_schedule_and_ddim(seed):
    pick = random.Random(seed)
    for beta_schedule in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        config = {
            "num_train_timesteps": pick.randrange(50, 1100),
            "beta_start": pick.uniform(1e-4, 1e-3),
            "beta_end": pick.uniform(0.01, 0.03),
            "beta_schedule": beta_schedule,
            "rescale_betas_zero_snr": pick.random() < 0.5,
            "timestep_spacing": pick.choice(["leading", "trailing", "linspace"]),
            "set_alpha_to_one": pick.random() < 0.5,
            "clip_sample": pick.random() < 0.5,
            "prediction_type": "v_prediction",  # the only one that zero terminal SNR allows everywhere
        }
        check_schedule(*reference.schedule(config, seed))
        check_ddim_steps(*reference.ddim_steps(config, pick.randrange(2, 40), seed))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("total", [1000, 333])
def test_timesteps_of_every_count(spacing, total):
    config = {"timestep_spacing": spacing, "num_train_timesteps": total}
    check_timesteps(reference.timesteps(config, list(range(1, total + 1)))[0])


@pytest.mark.parametrize("name", reference.CLASSES)
def test_scheduler_class(name):
    check_scheduler_class(*reference.scheduler_class(name, reference.CLASSES[name]))


@pytest.mark.parametrize("seed", range(1, 3))
def test_trajectory(seed):
    prediction = {"prediction_type": ["epsilon", "v_prediction"][seed % 2]}
    config = reference.DDIM_STEPS["epsilon_offset"] | prediction
    check_trajectory(*reference.trajectory(random_unet(seed), config, guidance=3.0, seed=seed))
