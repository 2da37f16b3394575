"""Checkpoints in every form that people have, made by diffusers and transformers on random weights: each must draw what
diffusers draws from the same files, and what minialign writes must draw the same in diffusers.

The configs are the released ones, narrowed; test_real_configs_have_the_released_keys compares the whole ones.
"""

# mypy: disable-error-code="attr-defined, arg-type, index, operator"

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from comparisons import GOLDENS
from peers import (
    PROMPTS,
    REAL,
    TOKENS,
    assert_same_images,
    diffusers,
    diffusers_pipeline,
    openclip,
    original_file,
    peer_of,
    text_config,
    transformers,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from seeded import filled, image

from minialign import CLIP, Pipeline
from minialign.files import InputError
from minialign.models import original
from minialign.models.clip import ProjectedTextEncoder, TextEncoder
from minialign.models.tokenizer import Tokenizer
from minialign.models.unet import UNet
from minialign.models.vae import VAE

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of diffusers' pipelines by family, each made once."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            diffusers_pipeline(name).save_pretrained(folders[name])
        return folders[name]

    return get


# -------------------------------------------------------------------------------------------------- the families
@pytest.mark.parametrize("name", REAL)
def test_real_configs_have_the_released_keys(name):
    with torch.device("meta"):
        mine, theirs = UNet(REAL[name]), diffusers.UNet2DConditionModel(**REAL[name])
    shapes = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    assert {key: tensor.shape for key, tensor in mine.state_dict().items()} == shapes


def test_real_text_towers_and_autoencoder_have_the_released_keys():
    big_g = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    huge = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
    large = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    four = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2} | four
    peers = transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection
    with torch.device("meta"):
        for config, build, peer in (
            (large, TextEncoder, peers[0]),
            (huge, TextEncoder, peers[0]),
            (big_g | {"projection_dim": 1280}, ProjectedTextEncoder, peers[1]),
        ):
            theirs = peer(transformers.CLIPTextConfig(**config)).state_dict()
            named = {TextEncoder.current_key(k): t.shape for k, t in theirs.items() if "position_ids" not in k}
            assert {key: tensor.shape for key, tensor in build(config).state_dict().items()} == named
        theirs = diffusers.AutoencoderKL(**vae).state_dict()
        assert {key: t.shape for key, t in VAE(vae).state_dict().items()} == {k: t.shape for k, t in theirs.items()}


@pytest.mark.parametrize("name", REAL)
def test_each_family_there_and_back(saved, tmp_path, name):
    pipe = Pipeline.from_pretrained(saved(name))
    assert_same_images(pipe, peer_of(saved(name)))
    pipe.save_pretrained(tmp_path)
    assert_same_images(pipe, peer_of(tmp_path))


@pytest.mark.parametrize("zeros", [True, False])
def test_xl_without_and_with_a_negative_prompt(saved, tmp_path, zeros):
    folder = Path(shutil.copytree(saved("xl"), tmp_path / "xl"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": zeros}))
    pipe = Pipeline.from_pretrained(folder)
    assert_same_images(pipe, peer_of(folder))
    assert_same_images(pipe, peer_of(folder), negative_prompt="red" if zeros else "")
    assert_same_images(pipe, peer_of(folder), latents=torch.randn(2, 4, 4, 12))  # another size is another conditioning
    pipe.save_pretrained(tmp_path / "again")
    assert Pipeline.from_pretrained(tmp_path / "again").zero_unconditional == zeros


@pytest.mark.parametrize("scheduler", ["PNDM", "DDPM", "EulerDiscrete", "DPMSolverMultistep"])
def test_other_schedulers_are_read(tmp_path, scheduler):
    peer = diffusers_pipeline("tiny_sd", scheduler + "Scheduler")
    peer.save_pretrained(tmp_path)
    assert_same_images(Pipeline.from_pretrained(tmp_path), peer_of(tmp_path))


# --------------------------------------------------------------------------------------------------- the layouts
@pytest.mark.parametrize("name", ["sd1", "xl"])
def test_shards_and_variants(saved, tmp_path, name):
    whole = peer_of(saved(name))
    whole.save_pretrained(tmp_path, max_shard_size="300KB", variant="fp16")
    assert list(tmp_path.glob("unet/*.index.fp16.json")) and len(list(tmp_path.glob("unet/*.safetensors"))) > 2
    assert_same_images(Pipeline.from_pretrained(tmp_path, variant="fp16"), whole)
    assert_same_images(Pipeline.from_pretrained(tmp_path), whole)  # the one variant that is there


def test_a_variant_of_the_unet_alone_beside_diffusers(saved, tmp_path):
    folder = Path(shutil.copytree(saved("tiny_sd"), tmp_path / "model"))
    weights = {
        key: 1.1 * tensor for key, tensor in load_file(folder / "unet/diffusion_pytorch_model.safetensors").items()
    }
    save_file(weights, folder / "unet/diffusion_pytorch_model.non_ema.safetensors", {"format": "pt"})
    pipe = Pipeline.from_pretrained(folder, variant="non_ema")
    assert_same_images(pipe, peer_of(folder, variant="non_ema"))


def test_the_settings_of_a_moving_average_beside_diffusers(saved, tmp_path):
    folder = Path(shutil.copytree(saved("tiny_sd"), tmp_path / "model"))
    shutil.rmtree(folder / "unet")
    unet = peer_of(saved("tiny_sd")).unet
    from diffusers.training_utils import EMAModel

    kind = diffusers.UNet2DConditionModel
    EMAModel(unet.parameters(), model_cls=kind, model_config=unet.config).save_pretrained(folder / "unet")
    assert {"decay", "power"} <= json.loads((folder / "unet/config.json").read_text()).keys()
    assert_same_images(Pipeline.from_pretrained(folder), peer_of(folder))


def test_xl_saved_by_another_pipeline(saved, tmp_path):
    peer = peer_of(saved("xl"))
    diffusers.StableDiffusionXLImg2ImgPipeline(**peer.components).save_pretrained(tmp_path)
    assert_same_images(Pipeline.from_pretrained(tmp_path), peer)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_any_stored_precision_into_any(saved, tmp_path, stored, wanted):
    peer = peer_of(saved("tiny_sd"), torch_dtype=stored)
    peer.save_pretrained(tmp_path)
    pipe = Pipeline.from_pretrained(tmp_path, dtype=wanted)
    theirs = peer.unet.to(wanted).state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in pipe.unet.state_dict().items())
    assert {p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()} == {wanted}
    assert len(pipe.generate("a dog", steps=1)) == 1


def test_weights_are_mapped_and_a_pipeline_saved_over_itself_is_whole(saved, tmp_path):
    folder = Path(shutil.copytree(saved("tiny_sd"), tmp_path / "model"))
    pipe = Pipeline.from_pretrained(folder)
    before = pipe.generate("a dog", steps=2)[0].tobytes()
    pipe.save_pretrained(folder)
    assert pipe.generate("a dog", steps=2)[0].tobytes() == before
    assert Pipeline.from_pretrained(folder).generate("a dog", steps=2)[0].tobytes() == before


def test_a_pipeline_saved_over_shards_is_what_diffusers_reads(saved, tmp_path):
    peer_of(saved("tiny_sd")).save_pretrained(tmp_path, max_shard_size="300KB")
    pipe = Pipeline.from_pretrained(tmp_path)
    torch.nn.init.normal_(pipe.unet.conv_in.weight)
    pipe.save_pretrained(tmp_path)
    assert sorted(p.name for p in (tmp_path / "unet").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert_same_images(pipe, peer_of(tmp_path))


def test_the_autoencoder_of_xl_stays_out_of_half_precision(saved):
    pipe = Pipeline.from_pretrained(saved("xl"), dtype=torch.float16)
    assert pipe.dtype == torch.float16 and pipe.vae.decoder.conv_in.weight.dtype == torch.float32
    assert pipe.generate("a dog", steps=1)[0].size == (16, 16)
    assert pipe.encode_images(pipe.generate("a dog", steps=1))[0].dtype == torch.float16


def test_push_to_hub_uploads_what_is_saved(saved, monkeypatch):
    import huggingface_hub

    calls: list = []

    class Api:
        def __init__(self, token):
            calls.append(("token", token))

        def create_repo(self, repo_id, **how):
            calls.append((repo_id, how))

        def upload_folder(self, *, repo_id, folder_path, delete_patterns):
            assert "unet/*" in delete_patterns  # or shards of an earlier upload would stay
            calls.append((repo_id, sorted(p.name for p in Path(folder_path).iterdir())))
            calls.append(Path(folder_path, "README.md").read_text())
            return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    pipe = Pipeline.from_pretrained(saved("tiny_sd"))
    pipe.card = "---\nlicense: mit\n---\n"
    assert pipe.push_to_hub("me/mine", private=True, token="hf_x") == "https://huggingface.co/me/mine"
    parts = ["README.md", "model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"]
    asked = ("me/mine", {"private": True, "exist_ok": True})
    assert calls == [("token", "hf_x"), asked, ("me/mine", parts), pipe.card]


def test_metadata_and_card_are_kept(saved, tmp_path):
    folder = Path(shutil.copytree(saved("tiny_sd"), tmp_path / "model"))
    (folder / "README.md").write_text("a model card")
    Pipeline.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/README.md").read_text() == "a model card"
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        with safe_open(tmp_path / f"again/{part}/{name}.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}  # the peers ask for it


# ------------------------------------------------------------------------- one file in the original layout
@pytest.mark.parametrize("name", ["sd1", "sd2", "sd2_v", "xl"])
def test_one_file_in_the_original_layout(tmp_path, name):
    folder, path = original_file(tmp_path, name)
    if name == "sd1":  # more of CLIP than its text tower
        more = {"vision_model.post_layernorm.bias": torch.ones(5), "text_projection.weight": torch.eye(64)}
        more |= {"logit_scale": torch.ones(()), "visual_projection.weight": torch.ones(5, 5)}
        whole = load_file(path) | {f"cond_stage_model.transformer.{key}": tensor for key, tensor in more.items()}
        path.unlink()
        save_file(whole, path)
    kind = diffusers.StableDiffusionXLPipeline if name == "xl" else diffusers.StableDiffusionPipeline
    peer = kind.from_single_file(path, config=str(folder), local_files_only=True, safety_checker=None)
    prediction = {"sd2": "epsilon"}.get(name)  # v is the rule for 2.x
    pipe = Pipeline.from_pretrained(path, prediction_type=prediction)
    pipe.unet.config["sample_size"] = 8  # the file does not say; smaller than the released ones
    for part in ("unet", "vae", "text_encoder"):
        theirs = getattr(peer, part).state_dict()
        theirs = {getattr(getattr(pipe, part), "current_key", str)(key): tensor for key, tensor in theirs.items()}
        mine = getattr(pipe, part).state_dict()
        assert mine.keys() == {key for key in theirs if not key.endswith("position_ids")}
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items())
    assert_same_images(pipe, peer)
    pipe.save_pretrained(tmp_path / "again")
    assert_same_images(pipe, peer_of(tmp_path / "again"))


def test_the_last_layer_of_2_x_is_its_24th(tmp_path):
    """OpenCLIP-H has 24 layers, of which 2.x reads 23; what diffusers converts back has no more than these."""
    tower = transformers.CLIPTextModel(text_config(8, num_hidden_layers=23))
    tower.save_pretrained(tmp_path)
    for added in (0, 1):
        weights = openclip(tmp_path, "", added)
        config, found = original._openclip(weights, xl=False)
        assert config["num_hidden_layers"] == 23 and not any("layers.23" in key for key in found)


def test_the_projection_of_xl_in_both_layouts(tmp_path):
    second = transformers.CLIPTextModelWithProjection(text_config(8, projection_dim=5))
    second.save_pretrained(tmp_path)
    weights = openclip(tmp_path, "")
    _, found = original._openclip(weights, xl=True)
    exported = {key: t for key, t in weights.items() if key != "text_projection"}
    _, again = original._openclip(exported | {"text_projection.weight": weights["text_projection"].T}, xl=True)
    for tensors in (found, again):
        assert torch.equal(tensors["text_projection.weight"], second.text_projection.weight)


@pytest.mark.parametrize("kind", ["edm_mean", "huge"])
def test_files_that_are_like_sd(tmp_path, kind):
    _, path = original_file(tmp_path, "sd1")
    weights = load_file(path)
    if kind == "huge":  # a block's number that would be counted up to
        prefix = "model.diffusion_model.input_blocks."
        weights = {f"{prefix}0.0.weight": torch.zeros(1), f"{prefix}1000000000.0.op.weight": torch.zeros(1)}
    path.unlink()
    save_file(weights | {kind: torch.zeros(1)}, path)
    with pytest.raises(InputError, match="model.safetensors: not a Stable Diffusion 1.x, 2.x or XL base checkpoint"):
        Pipeline.from_pretrained(path)


def test_a_single_file_without_a_tokenizer_says_where_one_goes(tmp_path, monkeypatch):
    _, path = original_file(tmp_path, "sd1")
    shutil.rmtree(tmp_path / "tokenizer")
    with pytest.raises(InputError, match="model.safetensors: has no tokenizer; put a folder tokenizer beside it"):
        Pipeline.from_pretrained(path, local_files_only=True, cache_dir=tmp_path / "cache")


def test_tokens_that_were_added_and_padding_of_the_special_tokens_map(tmp_path):
    folder = Path(shutil.copytree(TOKENS, tmp_path / "t"))
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps({"<sks>": len(vocab)}))
    mine, theirs = Tokenizer.from_pretrained(folder), transformers.CLIPTokenizer.from_pretrained(folder)
    texts = ["a <sks> dog", "three dogs", "<sks>"]
    ids = theirs(texts, padding="max_length", truncation=True, max_length=77)["input_ids"]
    assert mine(texts).tolist() == ids and len(vocab) in ids[0] and ids[1][-1] == vocab["!"]
    mine.save_pretrained(tmp_path / "again")
    assert Tokenizer.from_pretrained(tmp_path / "again")(texts).tolist() == ids
    again = transformers.CLIPTokenizer.from_pretrained(tmp_path / "again")
    assert again(texts, padding="max_length", truncation=True, max_length=77)["input_ids"] == ids


def test_a_file_of_another_kind_is_refused(saved, tmp_path):
    with pytest.raises(InputError, match="not in the original layout of Stable Diffusion"):
        Pipeline.from_pretrained(saved("sd1") / "unet/diffusion_pytorch_model.safetensors")
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, tmp_path / "half.safetensors")
    with pytest.raises(InputError, match="half.safetensors: not a Stable Diffusion 1.x, 2.x or XL base checkpoint"):
        Pipeline.from_pretrained(tmp_path / "half.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(InputError, match="model.ckpt: pickled weights can run code and are refused; convert them"):
        Pipeline.from_pretrained(tmp_path / "model.ckpt")


# -------------------------------------------------------------------------------------------- historic exports
def changed(path: Path, change) -> None:
    save_file({k: t for key, tensor in load_file(path).items() for k, t in change(key, tensor)}, path, {"format": "pt"})


@pytest.mark.parametrize("convolved", [False, True])
def test_historic_names_of_the_autoencoder_s_attention(saved, tmp_path, convolved):
    folder = Path(shutil.copytree(saved("sd1"), tmp_path / "old"))

    def old(key, tensor):
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        new = next((name for name in names if f"attentions.0.{name}." in key), None)
        if new:
            key = key.replace(new, names[new])
            tensor = tensor[..., None, None].contiguous() if convolved and tensor.ndim == 2 else tensor
        yield key, tensor

    changed(folder / "vae/diffusion_pytorch_model.safetensors", old)
    assert any(".query." in key for key in load_file(folder / "vae/diffusion_pytorch_model.safetensors"))
    # diffusers itself reads the linear form alone
    assert_same_images(Pipeline.from_pretrained(folder), peer_of(saved("sd1") if convolved else folder))


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_towers_with_and_without_prefix_and_position_ids(saved, tmp_path, prefix):
    folder = Path(shutil.copytree(saved("sd1"), tmp_path / "old"))
    path = folder / "text_encoder/model.safetensors"
    changed(path, lambda key, tensor: [(prefix + key.removeprefix("text_model."), tensor)])
    positions = {prefix + "embeddings.position_ids": torch.arange(77)[None]}
    save_file(load_file(path) | positions, path, {"format": "pt"})
    assert_same_images(Pipeline.from_pretrained(folder), peer_of(saved("sd1")))


def test_tokenizer_json_alone(saved, tmp_path):
    folder = Path(shutil.copytree(saved("sd2"), tmp_path / "new"))
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(GOLDENS / "tokenizer_json", folder / "tokenizer")
    assert not (folder / "tokenizer/vocab.json").exists()
    assert_same_images(Pipeline.from_pretrained(folder), peer_of(folder))


LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
CLIPS = {  # openai/clip-vit-large-patch14, and LAION's export of OpenCLIP's ViT-H
    "openai": {
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "eos_token_id": 2},
        "vision_config": LARGE | {"patch_size": 14},
        "projection_dim": 768,
    },
    "laion": {
        "text_config": LARGE | {"hidden_act": "gelu"},
        "vision_config": LARGE
        | {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "patch_size": 14,
            "hidden_act": "gelu",
        },
        "projection_dim": 1024,
    },
}


@pytest.mark.parametrize("name", CLIPS)
def test_clip_for_the_reward(tmp_path, name):
    with torch.device("meta"):
        released = transformers.CLIPModel(transformers.CLIPConfig(**CLIPS[name])).state_dict()
        mine = CLIP(CLIPS[name]).state_dict()
    assert {k: t.shape for k, t in mine.items()} == {k: t.shape for k, t in released.items() if "position_ids" not in k}
    config = {tower: CLIPS[name][tower] | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2} for tower in ("text_config", "vision_config")}  # fmt: skip
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENS)
    config["text_config"] |= {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
    config["text_config"] |= {"eos_token_id": 2 if name == "openai" else tokenizer.eos_token_id}
    config["vision_config"] |= {"image_size": 28}
    peer = filled(transformers.CLIPModel(transformers.CLIPConfig(**config, projection_dim=24)), 5)
    peer.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    slow = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor = slow(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")  # older exports carry these buffers
    stored |= {f"{tower}_model.embeddings.position_ids": torch.arange(5)[None] for tower in ("text", "vision")}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    clip = CLIP.from_pretrained(tmp_path)
    images = [image(50, 40, "RGB"), image(31, 64, "RGBA")]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(clip.preprocess(images), pixels, rtol=0, atol=1e-6)
    ids = clip.tokenizer(PROMPTS)
    assert ids.tolist() == tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=77)["input_ids"]
    with torch.no_grad():
        theirs = peer(input_ids=ids, pixel_values=pixels)
        for embeds, expected in (
            (clip.encode_image(pixels), theirs.image_embeds),
            (clip.encode_text(ids), theirs.text_embeds),
        ):
            torch.testing.assert_close(torch.nn.functional.normalize(embeds, dim=1), expected, rtol=1e-4, atol=1e-5)
