"""unet.py: `VDMUNet2DModel` is diffusers' `UNet2DModel` where it says so, and has additions that work."""

import math

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

from diffusers_vdm import UNET_PRESETS, VDMUNet2DModel
from diffusers_vdm.unet import fourier_features
from tests.tensors import normal

# two levels, so that there are down- and upsamplers, and an attention at each level's kind
SMALL = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
# one level, as the official network, with all additions
OFFICIAL = {
    "sample_size": 8,
    "block_out_channels": (16,),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "attention_head_dim": 16,
    "fourier_exponents": (6, 7),
    "input_residual": True,
    "augmentation_flag": True,
}
# what UNet2DModel has where our defaults are those of the VDM network
STOCK = {"freq_shift": 0, "flip_sin_to_cos": True, "norm_eps": 1e-5}


def latents(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return normal(*shape, seed=seed, dtype=dtype)


def perturbed(net: nn.Module, seed: int = 0, scale: float = 0.1) -> nn.Module:
    """Out of its zero initialization, where many mistakes cannot be seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def output(net: nn.Module, *args, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return net(*args, **kwargs).sample


# ---- it is diffusers' network ------------------------------------------------------------------------------------


def check_parity(arguments: dict, sample: torch.Tensor, timesteps: list, class_labels: torch.Tensor | None = None):
    stock = UNet2DModel(**{**STOCK, **arguments}).eval()
    ours = VDMUNet2DModel(**{**STOCK, **arguments}, zero_init=False).eval()
    ours.load_state_dict(stock.state_dict(), strict=True)
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in stock.named_modules()]
    for timestep in timesteps:
        expected = output(stock, sample, timestep, class_labels=class_labels)
        assert expected.abs().max() > 1e-3
        assert torch.equal(output(ours, sample, timestep, class_labels=class_labels), expected), timestep


TIMESTEPS = [torch.tensor([0, 998]), torch.tensor(31), torch.tensor([0.75, 998.5]), 31]


def test_parity_with_the_five_levels_of_ddpm():
    # 128·(1, 2, 2, 4, 8) in small: down to 2×2, attention at 16×16 and in the middle, two blocks down and three up
    attention_at = 1
    check_parity(
        {
            "sample_size": 32,
            "block_out_channels": (8, 16, 16, 32, 64),
            "down_block_types": tuple("AttnDownBlock2D" if i == attention_at else "DownBlock2D" for i in range(5)),
            "up_block_types": tuple("AttnUpBlock2D" if i == 4 - attention_at else "UpBlock2D" for i in range(5)),
            "layers_per_block": 2,
            "norm_num_groups": 4,
            "attention_head_dim": None,
            "downsample_padding": 0,
            "freq_shift": 1,
            "flip_sin_to_cos": False,
            "norm_eps": 1e-6,
        },
        latents(2, 3, 32, 32),
        TIMESTEPS,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"center_input_sample": True},
        {"resnet_time_scale_shift": "scale_shift", "time_embedding_dim": 24},
        {"downsample_type": "resnet", "upsample_type": "resnet"},
        {"mid_block_type": None},
        {"add_attention": False, "mid_block_scale_factor": 2**0.5, "act_fn": "gelu", "attn_norm_num_groups": 2},
        {"in_channels": 4, "out_channels": 2},
        {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")},
    ],
    ids=lambda arguments: "-".join(arguments) or "plain",
)
def test_parity_with_unet2d(arguments):
    check_parity({**SMALL, **arguments}, latents(2, arguments.get("in_channels", 3), 8, 12), TIMESTEPS)


@pytest.mark.filterwarnings("ignore:To copy construct")  # raised by these blocks of older diffusers
@pytest.mark.parametrize("center_input_sample", [False, True])
def test_parity_with_skip_blocks(center_input_sample):
    blocks = {
        "block_out_channels": (32, 64),  # these blocks choose their own number of groups
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "center_input_sample": center_input_sample,
    }
    check_parity({**SMALL, **blocks}, latents(2, 3, 8, 8), TIMESTEPS)


@pytest.mark.parametrize(
    ("arguments", "class_labels"),
    [
        ({"num_class_embeds": 5}, torch.tensor([4, 0])),
        ({"class_embed_type": "timestep"}, torch.tensor([4, 0])),
        ({"class_embed_type": "identity"}, latents(2, 64)),
    ],
    ids=["embedding", "timestep", "identity"],
)
def test_parity_with_classes(arguments, class_labels):
    check_parity({**SMALL, **arguments}, latents(2, 3, 8, 8), TIMESTEPS, class_labels)


def test_parity_with_fourier_time_embedding():
    # t = 0 has no logarithm
    times = [torch.tensor([1, 998]), torch.tensor(31), torch.tensor([0.75, 998.5]), 31]
    check_parity({**SMALL, "time_embedding_type": "fourier"}, latents(2, 3, 8, 8), times)


@pytest.mark.parametrize("timestep", [torch.tensor([0, 9]), torch.tensor(3), 3], ids=["batch", "scalar", "int"])
def test_parity_with_learned_time_embedding(timestep):
    arguments = {**SMALL, "time_embedding_type": "learned", "num_train_timesteps": 10}
    check_parity(arguments, latents(2, 3, 8, 8), [timestep])


def test_weights_of_a_saved_stock_network_load(tmp_path):
    stock = UNet2DModel(**SMALL).eval()
    stock.save_pretrained(tmp_path)
    ours = VDMUNet2DModel.from_pretrained(tmp_path)
    z = latents(2, 3, 8, 8)
    assert not ours.training
    assert torch.equal(output(ours, z, 7), output(stock, z, 7))


def test_config_of_a_stock_network_builds_the_same_network():
    # SMALL leaves freq_shift, flip_sin_to_cos and norm_eps at UNet2DModel's defaults, which are not ours
    stock = UNet2DModel(**SMALL).eval()
    ours = VDMUNet2DModel.from_config(stock.config).eval()
    different = {k: (v, ours.config[k]) for k, v in stock.config.items() if k[0] != "_" and ours.config[k] != v}
    assert not different
    ours.load_state_dict(stock.state_dict())
    z = latents(2, 3, 8, 8)
    assert torch.equal(output(ours, z, 7), output(stock, z, 7))


# ---- presets -----------------------------------------------------------------------------------------------------


def on_meta(preset: str, **overrides) -> VDMUNet2DModel:
    with torch.device("meta"):
        return VDMUNet2DModel.from_preset(preset, **overrides)


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize(
    ("preset", "n", "blocks", "official", "of_gamma"),
    [
        ("cifar10", 128, 32, 30_578_181, 2),
        ("cifar10-aug", 256, 32, 122_140_677, 1 + 1 + 1024 + 1024 + 1024),
        ("imagenet32", 256, 32, 122_137_605, 2),
        ("imagenet64", 256, 64, 237_603_845, 2),
    ],
)
def test_parameters_of_the_official_networks(preset, n, blocks, official, of_gamma):
    # ours has a bias where each of the blocks takes the time embedding, and γ is another module
    time_biases = (blocks + 2 + blocks + 1) * n
    assert count(on_meta(preset)) == official - of_gamma + time_biases


def test_parameters_of_ddpm():
    # of google/ddpm-cifar10-32, the network of the paper ("35.7 million parameters")
    assert count(on_meta("ddpm-cifar10")) == 35_746_307


def levels_with_attention(blocks) -> list[int]:
    return [i for i, block in enumerate(blocks) if hasattr(block, "attentions")]


def test_structure_of_the_five_level_ddpm_network():
    net = on_meta("ddpm-ffhq128")
    assert net.config.sample_size == 128
    assert [len(block.resnets) for block in net.down_blocks] == [2] * 5
    assert [len(block.resnets) for block in net.up_blocks] == [3] * 5
    assert [block.resnets[-1].out_channels for block in net.down_blocks] == [128 * m for m in (1, 2, 2, 4, 8)]
    assert [block.resnets[-1].out_channels for block in net.up_blocks] == [128 * m for m in (8, 4, 2, 2, 1)]
    assert not any((net.config.fourier_exponents, net.config.input_residual, net.config.augmentation_flag))


def test_attention_of_the_five_level_ddpm_network_is_at_16_pixels_and_in_the_middle():
    net = on_meta("ddpm-ffhq128")
    # 128 → 64 → 32 → 16 → 8: the fourth level of five, and the second from the bottom
    assert levels_with_attention(net.down_blocks) == [3]
    assert levels_with_attention(net.up_blocks) == [1]
    assert len(net.mid_block.attentions) == 1 and len(net.mid_block.resnets) == 2
    assert all(attention.heads == 1 for attention in net.mid_block.attentions)


def test_structure_of_the_official_network():
    net = on_meta("cifar10")
    assert net.conv_in.weight.shape == (128, 15, 3, 3)
    assert net.time_embedding.linear_1.weight.shape == (512, 129)
    assert [len(block.resnets) for block in (*net.down_blocks, *net.up_blocks)] == [32, 33]
    assert not hasattr(net.down_blocks[0], "attentions") and len(net.mid_block.attentions) == 1
    assert net.down_blocks[0].downsamplers is None and net.up_blocks[0].upsamplers is None
    assert net.conv_norm_out.eps == net.down_blocks[0].resnets[0].norm1.eps == 1e-6


@pytest.mark.parametrize("preset", UNET_PRESETS)
def test_preset_names_every_argument_rightly(preset):
    net = on_meta(preset)
    for name, value in UNET_PRESETS[preset].items():
        assert net.config[name] == value


def test_a_preset_with_other_arguments_leaves_the_preset_as_it_is():
    assert on_meta("digits", dropout=0.25).config.dropout == 0.25
    assert UNET_PRESETS["digits"]["dropout"] != 0.25


@pytest.mark.parametrize(
    ("name", "message"),
    [("cifar-10", "Did you mean 'cifar10'"), ("cifar10-fast", "not exist in VDMUNet2DModel, which has .'cifar10', ")],
)
def test_unknown_presets_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        VDMUNet2DModel.from_preset(name)


def test_heads_that_are_wider_than_a_level_with_attention_are_refused():
    """diffusers fails with an IndexError, because there are no heads then."""
    with pytest.raises(ValueError, match=r"attention_head_dim must be within \[1, 64\], the fewest .* got 128"):
        VDMUNet2DModel.from_preset("cifar10", layers_per_block=1, block_out_channels=(64,))
    attended = {"block_out_channels": (64, 128), "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "AttnUpBlock2D")}  # fmt: skip
    with pytest.raises(ValueError, match=r"within \[1, 64\]"):
        VDMUNet2DModel(**attended, attention_head_dim=128)
    with pytest.raises(ValueError, match=r"within \[1, 64\]"):
        VDMUNet2DModel(**attended | {"down_block_types": ("DownBlock2D",) * 2}, attention_head_dim=128)
    plain = attended | {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    with torch.device("meta"):
        VDMUNet2DModel(**plain, attention_head_dim=128)
        VDMUNet2DModel(**plain, attention_head_dim=256, add_attention=False)
        VDMUNet2DModel(**plain, attention_head_dim=256, mid_block_type=None)


def test_misspelled_arguments_of_a_preset_are_refused():
    with pytest.raises(TypeError, match="layer_per_block"):
        on_meta("digits", layer_per_block=2)


# ---- initialization ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [SMALL, OFFICIAL], ids=["levels", "official"])
@pytest.mark.parametrize("residual", [False, True])
def test_fresh_network_returns_its_input_or_nothing(arguments, residual):
    net = VDMUNet2DModel(**{**arguments, "input_residual": residual})
    z = latents(2, 3, 8, 8)
    out = output(net, z, torch.tensor([3.5, 900.0]))
    assert torch.equal(out, z if residual else torch.zeros_like(z))


def test_kernels_start_as_in_the_official_network():
    net = VDMUNet2DModel(**{**OFFICIAL, "block_out_channels": (64,)})
    seen = 0
    for name, module in net.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        assert module.bias is None or not module.bias.any(), name
        if name == "conv_out" or name.endswith(("conv2", "time_emb_proj", "to_out.0")):
            assert not module.weight.any(), name
            continue
        fan_in = module.weight[0].numel()
        std = math.sqrt(1 / fan_in)
        assert float(module.weight.detach().abs().max()) <= 2 * std / 0.87962566 + 1e-7, (
            name
        )  # truncated at two of its own
        if module.weight.numel() > 5000:
            assert float(module.weight.detach().std()) == pytest.approx(std, rel=0.05), name
            seen += 1
    assert seen > 5


def test_zero_init_can_be_left_out():
    net = VDMUNet2DModel(**SMALL, zero_init=False)
    assert output(net, latents(1, 3, 8, 8), 3.0).abs().max() > 1e-3
    assert net.conv_in.bias.any()


# ---- time --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [SMALL, OFFICIAL, UNET_PRESETS["digits"]], ids=["levels", "official", "digits"])
def test_network_sees_the_noise_level(arguments):
    net = perturbed(VDMUNet2DModel(**arguments))
    z = latents(1, net.config.in_channels, 8, 8).expand(3, -1, -1, -1)
    out = output(net, z, torch.tensor([10.0, 500.0, 990.0]))
    assert (out[0] - out[1]).abs().max() > 1e-2 and (out[1] - out[2]).abs().max() > 1e-2
    timestep = torch.tensor([500.0], requires_grad=True)
    net(z[:1], timestep).sample.square().sum().backward()
    assert timestep.grad.abs() > 1e-5  # the ends of γ learn through this as well


def test_blind_group_norm_warns_at_the_caller():
    with pytest.warns(UserWarning, match="cannot see the noise level") as record:
        net = VDMUNet2DModel(**{**OFFICIAL, "norm_num_groups": 16})
    assert [w.filename for w in record] == [__file__]
    # and the warning is right
    net = perturbed(net.double())
    out = output(net, latents(1, 3, 8, 8, dtype=torch.float64).expand(2, -1, -1, -1), torch.tensor([10.0, 990.0]))
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("arguments", [SMALL, OFFICIAL], ids=["levels", "official"])
def test_fractional_timesteps_are_kept(arguments):
    net = perturbed(VDMUNet2DModel(**arguments))
    z = latents(2, 3, 8, 8)
    out = output(net, z, 10.7)
    assert not torch.equal(out, output(net, z, 10))
    for timestep in (torch.tensor(10.7), torch.tensor([10.7]), torch.tensor([10.7, 10.7])):
        assert torch.equal(out, output(net, z, timestep))
    assert torch.equal(output(net, z, 10), output(net, z, torch.tensor(10)))


# ---- Fourier features --------------------------------------------------------------------------------------------


def features_by_hand(z: np.ndarray, exponents: tuple[int, ...]) -> np.ndarray:
    """[sin of c0f6, c0f7, c1f6, …, then the cosines], one at a time in float64."""
    planes = []
    for function in (np.sin, np.cos):
        for channel in range(z.shape[1]):
            for f in exponents:
                planes.append(function(2.0**f * 2 * np.pi * z[:, channel]))
    return np.stack(planes, axis=1)


def test_order_of_the_fourier_features():
    z = latents(2, 3, 4, 5, dtype=torch.float64)
    actual = fourier_features(z, (6, 7))
    assert actual.dtype == torch.float64
    np.testing.assert_allclose(actual.numpy(), features_by_hand(z.numpy(), (6, 7)), rtol=0, atol=1e-10)
    lowest = fourier_features(z, (0,))
    np.testing.assert_allclose(lowest.numpy(), features_by_hand(z.numpy(), (0,)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fourier_features_are_float32_whatever_the_input(dtype):
    z = latents(2, 3, 4, 5).to(dtype)
    actual = fourier_features(z, (6, 7))
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.numpy(), features_by_hand(z.double().numpy(), (6, 7)), rtol=0, atol=5e-4)


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_network_in_half_precision_gets_exact_fourier_features(how):
    net = VDMUNet2DModel(**OFFICIAL)
    z = latents(2, 3, 8, 8)
    seen = []
    handle = net.conv_in.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    if how == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output(net, z, 500.0)
        assert seen[0].dtype == torch.float32
        tolerance = 2e-4
    else:
        output(net.to(torch.bfloat16), z, 500.0)
        tolerance = 2**-8  # rounded once, after sin and cos; before them, the error would be 0.5
    handle.remove()
    expected = np.concatenate([z.double().numpy(), features_by_hand(z.double().numpy(), (6, 7))], axis=1)
    np.testing.assert_allclose(seen[0][:, 3:].double().numpy(), expected[:, 3:], rtol=0, atol=tolerance)


# ---- precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_network_with_float32_latents(dtype):
    z = latents(2, 3, 8, 8)
    fresh = VDMUNet2DModel(**OFFICIAL).to(dtype)
    assert torch.equal(output(fresh, z, 300.0), z)  # the residual is added in float32
    full = perturbed(VDMUNet2DModel(**OFFICIAL), scale=0.02)
    expected = output(full, z, 300.3)
    out = output(full.to(dtype), z, 300.3)
    assert out.dtype == torch.float32
    assert (out - expected).abs().max() < 0.05 * (expected - z).abs().max()


def test_autocast_returns_the_type_of_the_latents():
    net = perturbed(VDMUNet2DModel(**SMALL), scale=0.02)
    z = latents(2, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = output(net, z, 300.3)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, output(net, z, 300.3), rtol=0.05, atol=0.05)


def test_layerwise_casting():
    net = perturbed(VDMUNet2DModel(**OFFICIAL), scale=0.02)
    z = latents(2, 3, 8, 8)
    expected = output(net, z, 300.3)
    net.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert net.down_blocks[0].resnets[0].conv1.weight.dtype == torch.float8_e4m3fn
    assert net.conv_in.weight.dtype == torch.float32
    out = output(net, z, 300.3)
    assert (out - expected).abs().max() < 0.2 * (expected - z).abs().max()


# ---- what training and speed need --------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [SMALL, OFFICIAL], ids=["levels", "official"])
def test_gradient_checkpointing_changes_no_gradient(arguments):
    net = perturbed(VDMUNet2DModel(**arguments)).train()
    z = latents(2, 3, 8, 8)
    gradients, calls = [], []
    handle = net.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for enable in (False, True):
        if enable:
            net.enable_gradient_checkpointing()
        net.zero_grad()
        calls.clear()
        net(z, torch.tensor([3.0, 700.0])).sample.square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
        assert len(calls) == 1 + enable  # done again in the backward pass: it is really on
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def check_compile(backend: str, tolerance: float) -> None:
    torch.compiler.reset()
    net = perturbed(VDMUNet2DModel(**OFFICIAL))
    z = latents(2, 3, 8, 8)
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    with torch.no_grad():
        compiled(z, torch.tensor(3.5))
        # the scheduler's loop passes another tensor in each step
        with torch.compiler.set_stance("fail_on_recompile"):
            for timestep in (torch.tensor(3.5), torch.tensor(700.25), torch.tensor(0.0)):
                out = compiled(z, timestep).sample
                torch.testing.assert_close(out, net(z, timestep).sample, rtol=tolerance, atol=tolerance)


def test_compiles_to_one_graph_without_recompilation():
    check_compile("aot_eager", 1e-6)


# inductor itself uses what torch 2.13 deprecates
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
def test_compiles_with_inductor():
    check_compile("inductor", 1e-4)


def test_attention_processors_can_be_set():
    net = perturbed(VDMUNet2DModel(**SMALL))
    z = latents(2, 3, 8, 8)
    expected = output(net, z, 3.0)
    names = list(net.attn_processors)
    assert len(names) == 1 + 1 + 2  # down, middle, two up
    assert all(name.endswith(".processor") for name in names)
    net.set_attn_processor(AttnProcessor())
    assert all(type(p) is AttnProcessor for p in net.attn_processors.values())
    torch.testing.assert_close(output(net, z, 3.0), expected, rtol=1e-4, atol=1e-5)
    net.set_attn_processor({name: AttnProcessor2_0() for name in names})
    assert torch.equal(output(net, z, 3.0), expected)
    with pytest.raises(ValueError, match="number of"):
        net.set_attn_processor({names[0]: AttnProcessor()})


def test_attention_backend_can_be_set():
    net = perturbed(VDMUNet2DModel(**SMALL))
    z = latents(2, 3, 8, 8)
    expected = output(net, z, 3.0)
    net.set_attention_backend("native")
    torch.testing.assert_close(output(net, z, 3.0), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="backend"):
        net.set_attention_backend("no such backend")


# ---- saving ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [SMALL, {**OFFICIAL, "num_class_embeds": 3, "null_class": True, "zero_init": False, "sample_size": (8, 16)}],
    ids=["levels", "official"],
)
def test_save_and_load(arguments, tmp_path):
    net = perturbed(VDMUNet2DModel(**arguments))
    net.save_pretrained(tmp_path)
    loaded = VDMUNet2DModel.from_pretrained(tmp_path)
    z = latents(2, 3, 8, 16)
    assert torch.equal(output(loaded, z, 41.5), output(net, z, 41.5))

    def plain(config):  # JSON has lists only
        return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if not k.startswith("_")}

    assert plain(loaded.config) == plain(net.config)
    assert plain(VDMUNet2DModel.from_config(loaded.config).config) == plain(net.config)


# ---- classes and the flag ----------------------------------------------------------------------------------------


def test_class_labels_change_the_output():
    net = perturbed(VDMUNet2DModel(**SMALL, num_class_embeds=3))
    assert net.class_embedding.num_embeddings == 3
    z = latents(1, 3, 8, 8).expand(3, -1, -1, -1)
    out = output(net, z, 3.0, class_labels=torch.arange(3))
    assert min((out[i] - out[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3
    torch.testing.assert_close(out[1:2], output(net, z[:1], 3.0, class_labels=torch.tensor([1])))


def test_null_class_stands_for_no_label():
    net = perturbed(VDMUNet2DModel(**SMALL, num_class_embeds=3, null_class=True))
    assert net.class_embedding.num_embeddings == 4
    z = latents(2, 3, 8, 8)
    without = output(net, z, 3.0)
    assert torch.equal(without, output(net, z, 3.0, class_labels=torch.tensor([3, 3])))
    assert not torch.equal(without, output(net, z, 3.0, class_labels=torch.tensor([2, 2])))


@pytest.mark.parametrize("class_embed_type", ["timestep", "identity"])
def test_null_class_goes_with_embedded_classes_only(class_embed_type):
    # there is no index of "no label" for labels that are not indices of an embedding
    with pytest.raises(ValueError, match="null_class"):
        VDMUNet2DModel(**SMALL, class_embed_type=class_embed_type, num_class_embeds=3, null_class=True)


def test_augmentation_flag_changes_the_output():
    net = perturbed(VDMUNet2DModel(**OFFICIAL))
    z = latents(2, 3, 8, 8)
    out = output(net, z, 3.0, augmentation_flags=torch.tensor([1.0, 0.0]))
    plain = output(net, z, 3.0)
    assert (out[0] - plain[0]).abs().max() > 1e-3
    torch.testing.assert_close(out[1], plain[1], rtol=0, atol=1e-6)
    for dtype in (torch.bool, torch.long):
        assert torch.equal(out, output(net, z, 3.0, augmentation_flags=torch.tensor([1, 0], dtype=dtype)))


# ---- shapes and errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("arguments", [SMALL, OFFICIAL], ids=["levels", "official"])
@pytest.mark.parametrize("size", [(8, 8), (4, 10), (16, 6)], ids=str)
def test_channels_and_sizes(arguments, channels, size):
    net = perturbed(VDMUNet2DModel(**{**arguments, "in_channels": channels, "out_channels": channels}))
    z = latents(2, channels, *size)
    out = net(z, 3.0)
    assert out.sample.shape == z.shape
    assert torch.equal(net(z, 3.0, return_dict=False)[0], out.sample)
    torch.testing.assert_close(output(net, z[:1], 3.0), out.sample[:1].detach(), rtol=1e-4, atol=1e-4)


def test_input_is_left_alone():
    net = perturbed(VDMUNet2DModel(**{**SMALL, "center_input_sample": True, "input_residual": True}))
    z, timestep = latents(2, 3, 8, 8), torch.tensor([3.0, 4.0])
    before = z.clone()
    output(net, z, timestep)
    assert torch.equal(z, before) and timestep.tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_residual": True, "out_channels": 6}, "in_channels == out_channels"),
        ({"null_class": True}, "num_class_embeds"),
        ({"time_embedding_type": "sinusoidal"}, "'positional', 'fourier' or 'learned'"),
        ({"norm_num_groups": 5}, "norm_num_groups must divide"),
        ({"norm_num_groups": 32}, "norm_num_groups must divide"),
        ({"sample_size": 9}, "divisible by 2"),
        ({"sample_size": (8, 7)}, "divisible by 2"),
        ({"down_block_types": ("DownBlock2D",)}, "same number"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        VDMUNet2DModel(**{**SMALL, **arguments})


@pytest.mark.parametrize(
    ("arguments", "shape", "kwargs", "message"),
    [
        ({}, (2, 1, 8, 8), {}, r"sample must have shape \(B, 3, H, W\), got \(2, 1, 8, 8\)"),
        ({}, (3, 8, 8), {}, r"sample must have shape"),
        ({}, (2, 3, 8, 9), {}, r"height and a width divisible by 2 .* got \(8, 9\)"),
        ({}, (2, 3, 7, 8), {}, r"height and a width divisible by 2"),
        ({}, (2, 3, 8, 8), {"class_labels": torch.zeros(2, dtype=torch.long)}, "network without classes"),
        ({"num_class_embeds": 3}, (2, 3, 8, 8), {}, "class_labels must be given"),
        ({}, (2, 3, 8, 8), {"augmentation_flags": torch.zeros(2)}, "augmentation_flags were given"),
    ],
    ids=["channels", "rank", "width", "height", "labels", "no labels", "flags"],
)
def test_wrong_inputs(arguments, shape, kwargs, message):
    net = VDMUNet2DModel(**SMALL, **arguments)
    with pytest.raises(ValueError, match=message):
        net(latents(*shape), 3.0, **kwargs)


def test_the_attention_backend_is_the_one_that_runs():
    """diffusers' own processor for these blocks accepts `set_attention_backend` and ignores it."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    net = VDMUNet2DModel.from_preset("digits").eval()
    z = latents(2, 1, 8, 8)
    called = []
    original = _AttentionBackendRegistry._backends
    before = net(z, 500.0).sample
    try:
        net.set_attention_backend("_native_math")
        spied = {
            name: lambda *args, _name=name, _function=function, **kwargs: (
                called.append(_name) or _function(*args, **kwargs)
            )
            for name, function in original.items()
        }
        _AttentionBackendRegistry._backends = spied
        after = net(z, 500.0).sample
    finally:
        _AttentionBackendRegistry._backends = original
        net.set_attention_backend("native")
    assert {name.value for name in called} == {"_native_math"}
    torch.testing.assert_close(before, after)
