"""Adapters: what they compute, that they alone are trained, exact merging, files shared with diffusers."""

import copy
import json

import pytest
import torch
from comparisons import SMALL_UNET
from safetensors.torch import load_file, save_file

from minialign.files import InputError
from minialign.models.lora import adapters, add_lora, load_lora, merge_lora, save_lora, unmerge_lora
from minialign.models.unet import UNet

CONFIG = SMALL_UNET | {"block_out_channels": [8, 16]}
X, T, CONTEXT = torch.randn(2, 4, 5, 6), torch.tensor([3, 700]), torch.randn(2, 4, 6)


@torch.enable_grad()
def trained(rank=3, alpha=None) -> UNet:
    """A UNet whose adapters have made a few steps."""
    torch.manual_seed(0)
    unet = UNet(CONFIG)
    optimizer = torch.optim.SGD(add_lora(unet, rank, alpha), lr=30.0)
    for _ in range(2):
        unet(X, T, CONTEXT).square().mean().backward()
        optimizer.step()
    return unet.eval()


@torch.no_grad()
def test_an_adapter_adds_scale_b_a_and_nothing_at_first():
    torch.manual_seed(0)
    unet = UNet(CONFIG)
    before = unet(X, T, CONTEXT)
    add_lora(unet, 3, alpha=6)
    assert torch.equal(unet(X, T, CONTEXT), before)
    layers = adapters(unet)
    attentions = 1 + 1 + 2  # of the level on the way down, the middle, and the level on the way up
    assert len(layers) == attentions * 2 * 4  # to itself and to the text; q, k, v, out
    layer = layers["mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"]
    layer.lora_B.normal_()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    weight = layer.weight.double() + 2 * layer.lora_B.double() @ layer.lora_A.double()
    torch.testing.assert_close(layer(x.float()).double(), x @ weight.T + layer.bias, rtol=1e-5, atol=1e-5)


def test_only_the_adapters_are_trained():
    torch.manual_seed(0)
    untouched, unet = UNet(CONFIG).state_dict(), trained()
    state = unet.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in untouched.items())
    learned = [p for p in unet.parameters() if p.requires_grad]
    assert len(learned) == 2 * len(adapters(unet)) and all(p.abs().max() > 0 for p in learned)
    with pytest.raises(ValueError, match="on a UNet without adapters"):
        add_lora(unet, 2)
    with pytest.raises(ValueError, match="rank=0"):
        add_lora(UNet(CONFIG), 0)


@torch.no_grad()
def test_merged_is_the_same_function_and_unmerged_the_same_bits():
    unet = trained(alpha=5)
    before, state = unet(X, T, CONTEXT), copy.deepcopy(unet.state_dict())
    merge_lora(unet)
    assert unet.state_dict().keys() == UNet(CONFIG).state_dict().keys()
    torch.testing.assert_close(unet(X, T, CONTEXT), before, rtol=1e-4, atol=1e-4)
    unmerge_lora(unet)
    after = unet.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[key], state[key]) for key in state)
    assert torch.equal(unet(X, T, CONTEXT), before)
    merge_lora(unet)
    unet.double()
    unmerge_lora(unet)
    assert {p.dtype for p in unet.parameters()} == {torch.float64}


@torch.no_grad()
def test_a_saved_adapter_is_read_again(tmp_path):
    unet = trained(alpha=5)
    save_lora(unet, tmp_path / "lora.safetensors")
    torch.manual_seed(0)
    again = UNet(CONFIG)
    load_lora(again, tmp_path / "lora.safetensors")
    torch.testing.assert_close(again(X, T, CONTEXT), unet(X, T, CONTEXT))
    with pytest.raises(ValueError, match="has adapters already"):
        load_lora(again, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="no adapters"):
        save_lora(UNet(CONFIG), tmp_path / "none.safetensors")


LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1"
A, B = torch.randn(3, 16), torch.randn(16, 3)


def write(weights, path, metadata=None) -> None:
    """A file of copies, since a tensor may stand in it under many names."""
    save_file({key: tensor.clone() for key, tensor in weights.items()}, path, metadata)


@pytest.mark.parametrize(
    ("names", "scale"),
    [
        ((f"unet.{LAYER}.to_out.0.lora_A.weight", f"unet.{LAYER}.to_out.0.lora_B.weight"), 1),
        ((f"{LAYER}.to_out.0.lora.down.weight", f"{LAYER}.to_out.0.lora.up.weight"), 1),
        ((f"unet.{LAYER}.processor.to_out_lora.down.weight", f"unet.{LAYER}.processor.to_out_lora.up.weight"), 1),
        ((f"unet.{LAYER}.to_out.0.lora_A.weight", f"unet.{LAYER}.to_out.0.lora_B.weight", "alpha"), 2),
    ],
)
def test_names_of_every_time(tmp_path, names, scale):
    weights = {names[0]: A, names[1]: B}
    if len(names) > 2:
        weights[f"unet.{LAYER}.to_out.0.alpha"] = torch.tensor(6.0)
    write(weights, tmp_path / "lora.safetensors")
    unet = UNet(CONFIG)
    load_lora(unet, tmp_path / "lora.safetensors")
    assert list(adapters(unet)) == [f"{LAYER}.to_out.0"]
    layer = adapters(unet)[f"{LAYER}.to_out.0"]
    assert torch.equal(layer.lora_A, A) and torch.equal(layer.lora_B, B) and layer.scale == scale


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"lora_unet_mid_block_attentions_0.lora_down.weight": A}, "has no such linear layer or convolution"),
        ({"unet.up_blocks.9.attentions.0.to_q.alpha": A[0, 0]}, "to_q.alpha: this UNet has no such linear layer"),
        ({"text_encoder.layers.0.q_proj.lora_A.weight": A}, "has no adapters of a UNet"),
        ({"unet.conv_in.weight": A}, "unet.conv_in.weight is no adapter; accepted: LoRA"),
        ({"unet.conv_in.lora_A.weight": A, "unet.conv_in.lora_B.weight": B}, "conv_in has A (3, 16) and B (16, 3)"),
        ({f"unet.{LAYER}.to_q.lora_A.weight": A}, "to_q has one half of an adapter only"),
        ({f"unet.{LAYER}.to_q.alpha": A[0, 0]}, "to_q has one half of an adapter only"),
        ({f"unet.{LAYER}.to_q.lora_A.weight": A, f"{LAYER}.to_q.lora.down.weight": A}, "is there twice"),
        ({f"unet.{LAYER}.to_q.lora_magnitude_vector": A[0]}, "to_q.lora_magnitude_vector is DoRA; accepted: LoRA"),
        ({"lora_unet_mid_block.dora_scale": A[0]}, "is DoRA; accepted: LoRA"),
        ({"lora_unet_conv_in.hada_w1_a": A}, "is LoHa; accepted: LoRA"),
        ({"lora_unet_conv_in.lokr_w1": A}, "is LoKr; accepted: LoRA"),
        ({"lora_unet_conv_in.lora_mid.weight": A}, "is LoCon with a core between A and B; accepted: LoRA"),
        ({f"unet.{LAYER}.to_q.lora_B.bias": A[0]}, "is an adapter of a bias; accepted: LoRA"),
        (
            {f"unet.{LAYER}.to_q.lora_A.weight": A, f"unet.{LAYER}.to_q.lora_B.weight": B[:5]},
            r"to_q has A (3, 16) and B (5, 3), expected (r,16) and (16,r)",
        ),
        (
            {f"base_model.model.{LAYER}.to_q.lora_A.weight": A},
            "adapter_config.json: is needed beside adapters in peft's",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(tmp_path, weights, message):
    write(weights, tmp_path / "lora.safetensors")
    unet = UNet(CONFIG)
    with pytest.raises(InputError) as error:
        load_lora(unet, tmp_path / "lora.safetensors")
    assert message in str(error.value) and "\n" not in str(error.value) and not adapters(unet)


def test_settings_in_the_metadata_that_cannot_be_read(tmp_path):
    weights = {f"unet.{LAYER}.to_q.lora_A.weight": A, f"unet.{LAYER}.to_q.lora_B.weight": B}
    for settings in ("{", "[]", json.dumps({"unet.lora_alpha": "x"})):
        write(weights, tmp_path / "lora.safetensors", {"lora_adapter_metadata": settings})
        with pytest.raises(InputError, match="lora_adapter_metadata cannot be read|alpha of .*to_q cannot be read"):
            load_lora(UNet(CONFIG), tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "has no adapters"),
        (
            {f"unet.{LAYER}.to_q.lora_A.weight": A[:0], f"unet.{LAYER}.to_q.lora_B.weight": B[:, :0]},
            "to_q has A (0, 16)",
        ),
        ({f"unet.{LAYER}.to_q.lora_A.weight": A[0, 0], f"unet.{LAYER}.to_q.lora_B.weight": B}, "to_q has A () and B"),
    ],
)
def test_adapters_of_no_rank(tmp_path, weights, message):
    write(weights, tmp_path / "lora.safetensors")
    with pytest.raises(InputError) as error:
        load_lora(UNet(CONFIG), tmp_path / "lora.safetensors")
    assert message in str(error.value)


@pytest.mark.parametrize("alpha", [torch.ones(2), torch.tensor(float("nan"))])
def test_alphas_that_are_none_and_pickles(tmp_path, alpha):
    weights = {f"unet.{LAYER}.to_q.lora_A.weight": A, f"unet.{LAYER}.to_q.lora_B.weight": B}
    write(weights | {f"unet.{LAYER}.to_q.alpha": alpha}, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match="alpha of .*to_q cannot be read"):
        load_lora(UNet(CONFIG), tmp_path / "lora.safetensors")
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="pytorch_lora_weights.bin: pickled weights can run code"):
        load_lora(UNet(CONFIG), tmp_path / "pytorch_lora_weights.bin")


XL = {  # three levels with two layers each, as the original layout numbers XL's blocks
    **SMALL_UNET,
    "block_out_channels": [8, 8, 8],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 2,
    "projection_class_embeddings_input_dim": 5 + 12,
}
ORIGINAL = {  # names of kohya's trainer for XL, and what they stand for (diffusers' own table of the layout)
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": None,  # of equal widths there is none
    "input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks_8_1_transformer_blocks_0_ff_net_2": "down_blocks.2.attentions.1.transformer_blocks.0.ff.net.2",
    "middle_block_0_emb_layers_1": "mid_block.resnets.0.time_emb_proj",
    "middle_block_1_transformer_blocks_0_ff_net_0_proj": "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_1_1_transformer_blocks_0_attn1_to_q": "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_3_0_skip_connection": "up_blocks.1.resnets.0.conv_shortcut",
    "output_blocks_8_0_in_layers_2": "up_blocks.2.resnets.2.conv1",
    "time_embed_0": "time_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    "out_2": "conv_out",
}


def halves(layer, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B for a linear layer or convolution."""
    torch.manual_seed(seed)
    a = torch.randn(rank, *layer.weight.shape[1:])
    return a, torch.randn(len(layer.weight), rank, *[1] * (layer.weight.ndim - 2))


def kohya(unet: UNet, names: dict[str, str], alpha: float = 1.0) -> dict[str, torch.Tensor]:
    """An adapter file under kohya's names, of ranks that differ."""
    weights = {}
    for i, (name, layer) in enumerate(names.items()):
        a, b = halves(unet.get_submodule(layer), 1 + i % 3, seed=i)
        weights |= {f"lora_unet_{name}.lora_down.weight": a, f"lora_unet_{name}.lora_up.weight": b}
        weights[f"lora_unet_{name}.alpha"] = torch.tensor(alpha)
    return weights


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_kohya_s_names(tmp_path, layout):
    unet = UNet(XL)
    names = {name: layer for name, layer in ORIGINAL.items() if layer}
    if layout == "diffusers":
        names = {layer.replace(".", "_"): layer for layer in names.values()}
    weights = kohya(unet, names)
    write(weights, tmp_path / "lora.safetensors")
    load_lora(unet, tmp_path / "lora.safetensors")
    found = adapters(unet)
    assert found.keys() == set(names.values())
    for name, layer in names.items():
        a, b = found[layer].lora_A, found[layer].lora_B
        assert torch.equal(a, weights[f"lora_unet_{name}.lora_down.weight"])
        assert torch.equal(b, weights[f"lora_unet_{name}.lora_up.weight"]) and found[layer].scale == 1 / len(a)
    if layout == "original":
        wrong = {f"lora_unet_{name}.alpha": torch.tensor(1.0) for name, layer in ORIGINAL.items() if layer is None}
        write(weights | wrong, tmp_path / "lora.safetensors")
        with pytest.raises(InputError, match="input_blocks_4_0_skip_connection.alpha: this UNet has no such"):
            load_lora(UNet(XL), tmp_path / "lora.safetensors")


CONVOLUTIONS = ["conv_in", "down_blocks.0.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv", "conv_out"]
CONVOLUTIONS += ["mid_block.resnets.0.conv1", "up_blocks.0.resnets.0.conv_shortcut", "mid_block.attentions.0.proj_in"]


@torch.no_grad()
def test_adapters_of_convolutions_change_the_kernels(tmp_path):
    """Merged or not, the network is the one whose kernels are W + scale B A, each tap a matrix product of its own."""
    torch.manual_seed(0)
    plain = UNet(CONFIG)
    unet, weights = copy.deepcopy(plain), {}
    for name in CONVOLUTIONS:
        layer = plain.get_submodule(name)
        a, b = halves(layer, 2)
        weights |= {f"unet.{name}.lora_A.weight": a, f"unet.{name}.lora_B.weight": b}
        weights[f"unet.{name}.alpha"] = torch.tensor(0.5)
        layer.weight += 0.25 * torch.einsum("mr,rcij->mcij", b[:, :, 0, 0], a)
    write(weights, tmp_path / "lora.safetensors")
    load_lora(unet, tmp_path / "lora.safetensors")
    assert set(adapters(unet)) == set(CONVOLUTIONS)
    x = torch.randn(2, 4, 6, 6)  # even, so that the enlargement is the transposed convolution
    wanted = plain(x, T, CONTEXT)
    torch.testing.assert_close(unet(x, T, CONTEXT), wanted, rtol=1e-4, atol=1e-4)
    save_lora(unet, tmp_path / "again.safetensors")
    merge_lora(unet)
    torch.testing.assert_close(unet(x, T, CONTEXT), wanted, rtol=1e-4, atol=1e-4)
    again = copy.deepcopy(plain)
    again.load_state_dict(UNet(CONFIG).state_dict())
    load_lora(again, tmp_path / "again.safetensors")
    assert {layer.scale for layer in adapters(again).values()} == {1.0}


def test_a_1x1_kernel_may_be_stored_as_a_matrix(tmp_path):
    name, flat = "mid_block.attentions.0.proj_in", f"{LAYER}.to_q"
    unet = UNet(CONFIG)
    weights = {f"unet.{name}.lora_A.weight": A, f"unet.{name}.lora_B.weight": B}
    weights |= {f"unet.{flat}.lora_A.weight": A[..., None, None], f"unet.{flat}.lora_B.weight": B[..., None, None]}
    write(weights, tmp_path / "lora.safetensors")
    load_lora(unet, tmp_path / "lora.safetensors")
    assert adapters(unet)[name].lora_A.shape == (3, 16, 1, 1) and torch.equal(adapters(unet)[flat].lora_B, B)


def peft_folder(folder, **settings):
    weights = {f"base_model.model.{LAYER}.{p}.lora_A.weight": A for p in ("to_q", "to_k", "to_v")}
    weights |= {key.replace("lora_A", "lora_B"): B for key in weights}
    write(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 3, "target_modules": ["to_q"], "lora_dropout": 0.1} | settings
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_the_folder_that_peft_writes(tmp_path):
    scales = {}
    patterns = {r"^down_blocks\..*": 100, r"attn\d\.to_k": 6, "to_v": 1}
    for rslora in (False, True):
        how = {"lora_alpha": 12, "alpha_pattern": patterns, "use_rslora": rslora, "init_lora_weights": "gaussian"}
        unet = UNet(CONFIG)
        load_lora(unet, peft_folder(tmp_path, **how))
        scales[rslora] = {name[-4:]: layer.scale for name, layer in adapters(unet).items()}
    assert scales[False] == {"to_q": 4, "to_k": 2, "to_v": 1 / 3}
    assert scales[True] == pytest.approx({name: scale * 3**0.5 for name, scale in scales[False].items()})
    unet = UNet(CONFIG)
    load_lora(unet, peft_folder(tmp_path) / "adapter_model.safetensors")
    assert {layer.scale for layer in adapters(unet).values()} == {8 / 3}  # peft's default


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not supported; accepted: 'LORA'"),
        ({"bias": "all"}, "bias='all' is not supported; accepted: 'none'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' is not supported"),
        ({"modules_to_save": ["conv_in"]}, r"modules_to_save=\['conv_in'\] is not supported"),
        ({"alpha_pattern": {"(": 1}}, "alpha of .*attn1.to_[qkv] cannot be read"),
        ({"lora_alpha": None}, "alpha of .*attn1.to_[qkv] cannot be read"),
    ],
)
def test_peft_s_settings_that_are_not_built(tmp_path, settings, message):
    with pytest.raises(InputError, match=message) as error:
        load_lora(UNet(CONFIG), peft_folder(tmp_path, **settings))
    assert "\n" not in str(error.value)


def test_the_half_for_the_text_encoder_is_left_out_and_said_so(tmp_path):
    weights = {f"unet.{LAYER}.to_q.lora_A.weight": A, f"unet.{LAYER}.to_q.lora_B.weight": B}
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    text = {f"text_encoder.{layer}.lora_A.weight": A, f"lora_te2_{layer.replace('.', '_')}.alpha": torch.ones(())}
    write(weights | text, tmp_path / "lora.safetensors")
    unet = UNet(CONFIG)
    with pytest.warns(UserWarning, match=r"those of text encoders \(2 keys\) are not"):
        load_lora(unet, tmp_path / "lora.safetensors")
    assert list(adapters(unet)) == [f"{LAYER}.to_q"]


@torch.no_grad()
def assert_same_unet(unet: UNet, peer) -> None:
    """Equal in double precision, for latents and contexts of any kind."""
    unet.double()
    peer.double()
    torch.manual_seed(0)
    added, more = None, {}
    if unet.added_width:
        pooled, ids = torch.randn(2, unet.added_width - 6 * unet.time_id_width).double(), torch.rand(2, 6)
        added, more = unet.second_conditioning(pooled, ids), {"text_embeds": pooled, "time_ids": ids}
    x, context = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 7, unet.context_width).double()
    wanted = peer(x, T, context, added_cond_kwargs=more).sample
    torch.testing.assert_close(unet(x, T, context, added), wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("family", ["sd1", "xl"])
@pytest.mark.parametrize("convolutions", [False, True])
def test_peft_s_folder_and_diffusers_file_of_it_beside_peft(tmp_path, family, convolutions):
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    from peers import narrowed
    from seeded import filled

    base = filled(diffusers.UNet2DConditionModel(**narrowed(family)), 1)
    base.save_pretrained(tmp_path / "base")
    names = ["to_q", "to_k", "to_out.0", "ff.net.0.proj", "time_emb_proj"]
    names += ["proj_in", "conv1", "conv_shortcut", "conv_in", "conv"] * convolutions
    alphas = {r"down_blocks\..*\.to_q": 5, "time_emb_proj": 1}
    how = {"rank_pattern": {"to_k": 3}, "alpha_pattern": alphas, "use_rslora": True}
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=names, init_lora_weights=False, **how)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    for i, (key, p) in enumerate(model.named_parameters()):
        if "lora_" in key:
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(i))
    model.save_pretrained(tmp_path / "peft")
    unet = UNet(dict(base.config))
    unet.load_state_dict(base.state_dict())
    with pytest.raises(AssertionError):  # the adapters are felt
        assert_same_unet(unet, model)
    load_lora(unet, tmp_path / "peft")
    assert_same_unet(unet, model)
    merge_lora(unet)
    assert_same_unet(unet, model)


@pytest.mark.parametrize(("family", "layout"), [("sd1", "diffusers"), ("xl", "diffusers"), ("xl", "original")])
def test_kohya_s_file_beside_diffusers(tmp_path, family, layout):
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from peers import diffusers_pipeline

    peer = diffusers_pipeline(family)
    unet = UNet(dict(peer.unet.config))
    unet.load_state_dict(peer.unet.state_dict())
    linear = [name for name, layer in unet.named_modules() if isinstance(layer, torch.nn.Linear)]
    linear = [name for name in linear if "attentions" in name]
    names = {name.replace(".", "_"): name for name in linear}
    if layout == "original":
        blocks = {f"down_blocks.{i}.attentions.{j}": f"input_blocks.{1 + 3 * i + j}.1" for i in (1, 2) for j in (0, 1)}
        blocks |= {f"up_blocks.{i}.attentions.{j}": f"output_blocks.{3 * i + j}.1" for i in (0, 1) for j in (0, 1, 2)}
        blocks["mid_block.attentions.0"] = "middle_block.1"
        names = {}
        for name in linear:
            new = next(block for block in blocks if name.startswith(block + "."))
            names[name.replace(new, blocks[new]).replace(".", "_")] = name
    weights = {key: 0.3 * tensor if "lora" in key[-20:] else tensor for key, tensor in kohya(unet, names, 0.7).items()}
    write(weights, tmp_path / "kohya.safetensors")
    load_lora(unet, tmp_path / "kohya.safetensors")
    peer.load_lora_weights(tmp_path / "kohya.safetensors")
    assert_same_unet(unet, peer.unet)


def test_diffusers_reads_ours_and_we_read_diffusers(tmp_path):
    pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    from peers import assert_same_images, diffusers_pipeline, peer_of

    from minialign import Pipeline

    diffusers_pipeline("sd1").save_pretrained(tmp_path / "model")
    pipe, peer = Pipeline.from_pretrained(tmp_path / "model"), peer_of(tmp_path / "model")
    plain = pipe.generate("a dog", steps=2)[0].tobytes()
    add_lora(pipe.unet, 4, alpha=8)
    for i, layer in enumerate(adapters(pipe.unet).values()):
        torch.nn.init.normal_(layer.lora_B, std=0.5, generator=torch.Generator().manual_seed(i))
    with pytest.raises(ValueError, match="merge_lora"):
        pipe.save_pretrained(tmp_path / "not")
    save_lora(pipe.unet, tmp_path / "pytorch_lora_weights.safetensors")
    peer.load_lora_weights(tmp_path)
    assert pipe.generate("a dog", steps=2)[0].tobytes() != plain
    assert_same_images(pipe, peer)
    merge_lora(pipe.unet)
    assert_same_images(pipe, peer)

    theirs = peer_of(tmp_path / "model")
    projections = ["to_q", "to_k", "to_v", "to_out.0"]
    how = {"alpha_pattern": {"attn1.to_q": 32}, "use_rslora": True}
    theirs.unet.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=3, target_modules=projections, init_lora_weights=False, **how)
    )
    theirs.unet.save_lora_adapter(tmp_path / "theirs")
    assert len(load_file(tmp_path / "theirs/pytorch_lora_weights.safetensors")) == 2 * 4 * 2 * 16
    unet = Pipeline.from_pretrained(tmp_path / "model").unet
    frozen = [p for p in unet.parameters()]
    load_lora(unet, tmp_path / "theirs/pytorch_lora_weights.safetensors")
    assert not any(p.requires_grad for p in frozen)
    scales = {layer.scale for name, layer in adapters(unet).items() if name.endswith("attn1.to_q")}
    assert scales == {16.0} and adapters(unet)[f"{LAYER}.to_k"].scale == 1.5
    pipe.unet = unet
    assert_same_images(pipe, theirs)
