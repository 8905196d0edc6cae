"""conversion/addtt.py: checkpoints of addtt's PyTorch code, against its network transcribed in float64."""

# ruff: noqa: TID251  addtt's checkpoints are pickles

import json
import math
import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from diffusers_vdm import (
    MonotoneGammaNetwork,
    VDMPipeline,
)
from diffusers_vdm.commands import convert
from diffusers_vdm.conversion.addtt import _addtt_config, load_addtt, save_addtt
from tests.conversion.converted import convertible_pipeline, inputs, near, our_eps_hat, samples
from tests.models import fixed_weights


class Sines(nn.Module):
    def forward(self, z):
        angles = torch.cat([2 * math.pi * 2.0**f * z for f in (5, 6)], dim=1)  # by frequency, then color
        return torch.cat([z, torch.sin(angles), torch.cos(angles)], dim=1)


class Mixing(nn.Module):
    """q, k, v of the pixels to what each head looks up."""

    def __init__(self, heads):
        super().__init__()
        self.heads = heads

    def forward(self, qkv):
        q, k, v = (
            part.flatten(2).unflatten(1, (self.heads, -1)) for part in qkv.chunk(3, dim=1)
        )  # B, heads, c, pixels
        scores = torch.softmax(q.transpose(2, 3) @ k / math.sqrt(q.shape[2]), dim=-1)
        return (v @ scores.transpose(2, 3)).flatten(1, 2).unflatten(2, qkv.shape[2:])


class Looking(nn.Module):
    def __init__(self, n, heads, groups):
        super().__init__()
        self.layers = nn.Sequential(nn.GroupNorm(groups, n), nn.Conv2d(n, 3 * n, 1), Mixing(heads), nn.Conv2d(n, n, 1))

    def forward(self, x):
        return x + self.layers(x)


class Residual(nn.Module):
    def __init__(self, inputs, n, groups, dropout):
        super().__init__()
        self.net1 = nn.Sequential(nn.GroupNorm(groups, inputs), nn.SiLU(), nn.Conv2d(inputs, n, 3, padding=1))
        self.cond_proj = nn.Linear(4 * n, n, bias=False)
        drop = [nn.Dropout(dropout)] if dropout else []
        self.net2 = nn.Sequential(nn.GroupNorm(groups, n), nn.SiLU(), *drop, nn.Conv2d(n, n, 3, padding=1))
        if inputs != n:
            self.skip_conv = nn.Conv2d(inputs, n, 1)

    def forward(self, x, cond):
        h = self.net2(self.net1(x) + self.cond_proj(cond)[:, :, None, None])
        return h + (self.skip_conv(x) if hasattr(self, "skip_conv") else x)


class Place(nn.Module):
    def __init__(self, resnet, attention):
        super().__init__()
        self.resnet_block = resnet
        if attention:
            self.attention_block = attention

    def forward(self, x, cond):
        x = self.resnet_block(x, cond)
        return self.attention_block(x) if hasattr(self, "attention_block") else x


class Addtt(nn.Module):
    def __init__(self, config):
        super().__init__()
        n, blocks, groups = config["embedding_dim"], config["n_blocks"], config["norm_groups"]
        colors, self.config = config["input_channels"], config
        self.features = Sines() if config["use_fourier_features"] else nn.Identity()

        def attention(always=False):
            wanted = always or config["attention_everywhere"]
            return Looking(n, config["n_attention_heads"], groups) if wanted else None

        def resnet(inputs):
            return Residual(inputs, n, groups, config["dropout_prob"])

        self.embed_conditioning = nn.Sequential(nn.Linear(n, 4 * n), nn.SiLU(), nn.Linear(4 * n, 4 * n), nn.SiLU())
        self.conv_in = nn.Conv2d(colors * (5 if config["use_fourier_features"] else 1), n, 3, padding=1)
        self.down_blocks = nn.ModuleList([Place(resnet(n), attention()) for _ in range(blocks)])
        self.mid_resnet_block_1, self.mid_attn_block, self.mid_resnet_block_2 = resnet(n), attention(True), resnet(n)
        self.up_blocks = nn.ModuleList([Place(resnet(2 * n), attention()) for _ in range(blocks + 1)])
        self.conv_out = nn.Sequential(nn.GroupNorm(groups, n), nn.SiLU(), nn.Conv2d(n, colors, 3, padding=1))

    def forward(self, z, gamma):
        low, high, half = self.config["gamma_min"], self.config["gamma_max"], self.config["embedding_dim"] // 2
        frequencies = 10 ** (-4 * torch.arange(half, dtype=torch.float64) / (half - 1))
        angles = 1000 * ((gamma - low) / (high - low))[:, None] * frequencies
        cond = self.embed_conditioning(torch.cat([angles.sin(), angles.cos()], dim=1))
        h = self.conv_in(self.features(z))
        skips = [h]
        for block in self.down_blocks:
            h = block(h, cond)
            skips.append(h)
        h = self.mid_resnet_block_2(self.mid_attn_block(self.mid_resnet_block_1(h, cond)), cond)
        for block in self.up_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), cond)
        return z + self.conv_out(h)


SETTINGS = {
    "embedding_dim": 32, "n_blocks": 2, "n_attention_heads": 1, "dropout_prob": 0.1, "norm_groups": 8,
    "input_channels": 3, "use_fourier_features": True, "attention_everywhere": False, "batch_size": 16,
    "noise_schedule": "learned_linear", "gamma_min": -13.3, "gamma_max": 5.0, "antithetic_time_sampling": True,
    "lr": 2e-4, "weight_decay": 0.01, "clip_grad_norm": True,
}  # fmt: skip


def addtt_file(folder, generator, prefix="", config=True, **changes):
    settings = SETTINGS | changes
    with fixed_weights():
        nets = {"model": Addtt(settings), "ema": Addtt(settings)}
    states = {}
    for which, net in nets.items():
        with torch.no_grad():
            for parameter in net.parameters():
                size = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
        states[which] = {f"model.{name}": tensor for name, tensor in net.state_dict().items()}
        if settings["noise_schedule"] == "learned_linear":
            shift = 0.1 * (which == "ema")
            states[which] |= {"gamma.b": torch.tensor(-13.25 + shift), "gamma.w": torch.tensor(-18.5)}
    average = {"initted": torch.tensor(True), "step": torch.tensor(5)}
    average |= {f"online_model.{prefix}{name}": tensor for name, tensor in states["model"].items()}
    average |= {f"ema_model.{prefix}{name}": tensor for name, tensor in states["ema"].items()}
    moments = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 2e-4, "betas": (0.9, 0.99)}]}
    model = {f"{prefix}{name}": tensor for name, tensor in states["model"].items()}
    folder.mkdir(exist_ok=True)
    torch.save({"step": 5, "model": model, "opt": moments, "ema": average}, folder / "model.pt")
    if config:
        (folder / "config.yaml").write_text("\n".join(f"{key}: {json.dumps(v)}" for key, v in settings.items()))
    return folder / "model.pt", {which: net.double().eval() for which, net in nets.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"n_attention_heads": 2, "attention_everywhere": True},
        {"n_attention_heads": 2, "use_fourier_features": False, "input_channels": 1, "dropout_prob": 0.0},
        {"attention_everywhere": True, "use_fourier_features": False, "noise_schedule": "fixed_linear"},
        {
            "embedding_dim": 64,
            "n_blocks": 1,
            "norm_groups": 32,
            "gamma_min": -10.5,
            "gamma_max": 4.0,
            "prefix": "module.",
        },
    ],
    ids=["two heads everywhere", "two heads, grey", "fixed", "one head"],
)
@pytest.mark.parametrize("weights", ["ema", "model"])
def test_an_addtt_checkpoint_is_converted_and_converted_back(tmp_path, generator, weights, changes):
    file, nets = addtt_file(tmp_path / "a", generator, **changes)
    settings = SETTINGS | changes
    convert.main(["addtt", str(file), str(tmp_path / "ours"), "--weights", weights, "--sample_size", "8"])
    pipe = VDMPipeline.from_pretrained(tmp_path / "ours")
    assert pipe.unet.config.dropout == settings["dropout_prob"]
    convert.main(["to-addtt", str(tmp_path / "ours"), str(tmp_path / "b")])
    again = load_addtt(tmp_path / "b" / "model.pt", sample_size=8)
    z, gamma_t, _ = inputs(np.random.default_rng(3), settings["input_channels"])
    with torch.no_grad():
        expected = nets[weights](z, gamma_t)
    near(our_eps_hat(pipe, z, gamma_t), expected)
    near(our_eps_hat(again, z, gamma_t), expected)
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    if settings["noise_schedule"] == "fixed_linear":
        gamma = settings["gamma_min"] + (settings["gamma_max"] - settings["gamma_min"]) * t
    else:
        gamma = float(torch.tensor(-13.25 + 0.1 * (weights == "ema"))) + 18.5 * t
    for one in (pipe, again):
        near(one.noise_schedule(t).detach(), gamma, 1e-14)
        near(one.scheduler.noise_schedule()(t), gamma, 1e-14)
    samples(again, tmp_path / "pipeline")
    # their code can load what was written: the same names, shapes and types
    theirs, written = (torch.load(f, weights_only=True) for f in (file, tmp_path / "b" / "model.pt"))
    clean = {key.replace("module.", ""): value for key, value in theirs["ema"].items()}
    assert set(written) == set(theirs) and set(written["ema"]) == set(clean)
    for key, value in written["ema"].items():
        assert value.shape == clean[key].shape or key in ("initted", "step")
        if key.startswith("ema_model.") and weights == "ema":
            assert value.dtype == clean[key].dtype and torch.equal(value, clean[key]), key
    recorded = _addtt_config(tmp_path / "b" / "config.yaml")
    assert set(recorded) == set(SETTINGS)
    assert all(recorded[key] == settings[key] for key in set(SETTINGS) - {"batch_size"})


def test_the_settings_assumed_without_config_yaml_are_printed(tmp_path, generator, capsys):
    file, nets = addtt_file(tmp_path / "a", generator, config=False, n_attention_heads=2, gamma_min=-9.0)
    pipe = load_addtt(file, gamma_min=-9.0, num_heads=2, norm_num_groups=8)
    said = capsys.readouterr().out
    assert "gamma_max 5.0" in said and "dropout_prob 0.0" in said and "n_attention_heads" not in said
    z, gamma_t, _ = inputs(np.random.default_rng(3), 3)
    with torch.no_grad():
        near(our_eps_hat(pipe, z, gamma_t), nets["ema"](z, gamma_t))
    with pytest.raises(ValueError, match="must divide the 32 channels, got 3 and 8"):
        load_addtt(file, num_heads=3, norm_num_groups=8)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("n_blocks: 2", "n_blocks: 3", "n_blocks is 3, not 2"),
        ("norm_groups: 8", "norm_groups: many", "norm_groups must be a number, got 'many'"),
        (None, "[1]", "must be a mapping of settings, got a list"),
        (None, "a: [1", "not a YAML file"),
    ],
    ids=["blocks", "text", "list", "no YAML"],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, generator, old, new, reason):
    file, _ = addtt_file(tmp_path, generator)
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(new if old is None else text.replace(old, new))
    with pytest.raises(ValueError, match=reason):
        load_addtt(file)


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ("ema", r"model.conv_in.bias is missing; model.extra is unexpected"),
        ("model", r"mid_attn_block.layers.1.q.weight is missing"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, generator, weights, reason):
    file, _ = addtt_file(tmp_path, generator)
    content = torch.load(file, weights_only=True)
    del content["ema"]["ema_model.model.conv_in.bias"]
    content["ema"]["ema_model.model.extra"] = torch.zeros(1)
    content["model"]["model.mid_attn_block.layers.1.weight"] = torch.zeros(95, 32, 1, 1)
    torch.save(content, file)
    with pytest.raises(ValueError, match=reason):
        load_addtt(file, weights)


def test_a_file_without_averaged_weights_is_refused(tmp_path, generator):
    file, _ = addtt_file(tmp_path, generator)
    torch.save({"net": 1}, file)
    with pytest.raises(ValueError, match=r"no state dict 'ema', but \['net'\]"):
        load_addtt(file)


@pytest.mark.parametrize(
    "content",
    [pickle.dumps({"a": print}), pickle.dumps(os.system), b"PK\x03\x04junk", b""],
    ids=["function", "command", "zip", "empty"],
)
def test_files_that_hold_more_than_tensors_are_not_read(tmp_path, generator, content):
    file, _ = addtt_file(tmp_path, generator)
    file.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read safely|can be read safely"):
        load_addtt(file)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"exponents": (6, 7), "norm_eps": 1e-5}, r"fourier_exponents is \(6, 7\)"),
        ({"exponents": (5, 6)}, "norm_eps is 1e-06"),
        ({"exponents": (), "norm_eps": 1e-5, "augmentation_flag": True}, "augmentation_flag is True"),
        ({"exponents": (), "norm_eps": 1e-5, "noise_schedule": MonotoneGammaNetwork(hidden_dim=4)}, "is a network"),
    ],
)
def test_pipelines_that_addtt_cannot_hold_are_refused(arguments, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        save_addtt(convertible_pipeline(**arguments), tmp_path / "x")
    assert not any(tmp_path.iterdir())
