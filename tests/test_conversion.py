"""Conversion in and out: official JAX checkpoints, addtt's, diffusers'; and files that are none of them.

Nothing here shares code with conversion/: the official files are written by a msgpack writer of a few lines below,
and the two foreign networks are transcribed in float64 from their description.
"""

# ruff: noqa: TID251  addtt's checkpoints are pickles

import copy
import json
import math
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import tracemalloc
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import test_official as official
import torch
from torch import nn
from torch.nn import functional as F

from diffusers_vdm import (
    FixedLinearGamma,
    LearnedLinearGamma,
    LinearBetaScheduler,
    MonotoneGammaNetwork,
    TableGamma,
    VDMPipeline,
    VDMScheduler,
    VDMUNet2DModel,
)
from diffusers_vdm.commands import convert
from diffusers_vdm.conversion import official_checkpoint
from diffusers_vdm.conversion.addtt import _addtt_config, load_addtt, save_addtt
from diffusers_vdm.conversion.diffusers import load_diffusers
from diffusers_vdm.conversion.official import load_official, save_official
from diffusers_vdm.conversion.official_checkpoint import (
    checkpoint_file,
    gamma_from_official,
    gamma_to_official,
    read_checkpoint,
)

pytestmark = pytest.mark.filterwarnings("ignore:norm_num_groups=32 on as many channels:UserWarning")
GENERATOR = np.random.default_rng


# ---- an official file, written without the package ----------------------------------------------------------------


def packed(value) -> bytes:
    """msgpack of maps, strings, integers, booleans and arrays, as flax lays them out."""
    if isinstance(value, dict):
        body = b"".join(packed(key) + packed(item) for key, item in value.items())
        return b"\xdf" + struct.pack(">I", len(value)) + body
    if isinstance(value, str):
        return b"\xda" + struct.pack(">H", len(value.encode())) + value.encode()
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return b"\xd3" + struct.pack(">q", value)
    if isinstance(value, bytes):
        return b"\xc6" + struct.pack(">I", len(value)) + value
    if isinstance(value, list):
        return b"\xdd" + struct.pack(">I", len(value)) + b"".join(map(packed, value))
    if isinstance(value, np.ndarray):
        return extension(1, packed([list(value.shape), value.dtype.name, value.tobytes()]))
    raise TypeError(type(value))


def extension(code: int, content: bytes) -> bytes:
    return b"\xc9" + struct.pack(">Ib", len(content), code) + content


def nested(flat: dict[str, np.ndarray]) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def write_official(folder: Path, ema: dict, params: dict | None = None, number: int = 7, **more) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    params = ema if params is None else params
    moments = {"count": np.array(3, np.int32), "mu": nested(params), "nu": nested(params)}
    tree = {
        "step": np.array(3, np.int32), "params": nested(params), "opt_state": {"0": moments, "1": {}},
        "ema_params": nested(ema), **more,
    }  # fmt: skip
    (folder / f"ckpt-{number}.flax").write_bytes(packed(tree))
    (folder / "checkpoint").write_text(f'model_checkpoint_path: "/other/machine/ckpt-{number}"\n')
    return folder


@cache
def fixture_weights(name: str, tree: str) -> dict[str, np.ndarray]:
    prefix = f"weights/{tree}/"
    data = official.load(name)
    return {k.removeprefix(prefix): v.astype(np.float32) for k, v in data.items() if k.startswith(prefix)}


@cache
def converted(name: str, tree: str = "params") -> VDMPipeline:
    with tempfile.TemporaryDirectory() as folder:
        params = fixture_weights(name, "params")
        ema = fixture_weights(name, "ema_params") or params
        source = write_official(Path(folder) / "checkpoints-0", ema, params)
        out = Path(folder) / "pipeline"
        convert.main(["official", str(source), str(out), "--weights", tree])
        return VDMPipeline.from_pretrained(out)


@pytest.fixture
def as_converted(monkeypatch):
    """The tests of test_official.py, with networks and schedules from `converted` instead of its own mapping."""

    def build(name, tree="params", dtype=torch.float64, exact=True):
        pipe = converted(name, tree)
        unet, schedule = copy.deepcopy(pipe.unet).to(dtype).eval(), copy.deepcopy(pipe.noise_schedule).to(dtype)
        if exact:
            unet.time_proj = official.ExactTimesteps(unet.config.block_out_channels[0])
        return unet, schedule

    monkeypatch.setattr(official, "build", build)


@pytest.mark.parametrize("name", official.NAMES)
def test_official_fixtures_through_the_command(name, as_converted):
    official.test_network_is_the_official_one_in_float64(name)
    official.test_network_in_float32(name)
    official.test_gamma_and_its_slope(name)
    for num_timesteps in (None, 1000):
        official.test_terms_of_the_bound_in_float64(name, "anti", num_timesteps)
        official.test_terms_of_the_bound_in_float32(name, num_timesteps)
    official.test_one_ancestral_step(name, 0)
    official.test_decoder(name)


def test_augmentation_column_and_the_averaged_weights(as_converted):
    official.test_augmentation_flag_is_the_official_conditioning()
    official.test_another_set_of_weights()


def test_scheduler_of_a_converted_pipeline_is_the_official_schedule():
    data = official.load("tiny_scalar64")
    table = converted("tiny_scalar64").scheduler.noise_schedule()
    t = torch.from_numpy(data["in.t_grid"]).double()
    official.close(table(t), data["params.gamma_grid.f64"], rtol=1e-12)


# ---- the official network and schedule, transcribed ---------------------------------------------------------------


def official_weights(rng, n=64, blocks=2, colors=3, fourier=True, attention=False, gamma="scalar", flag=True):
    shapes = {}

    def norm(name, channels):
        shapes[f"{name}/scale"] = shapes[f"{name}/bias"] = (channels,)

    def layer(name, *shape, bias=True):
        shapes[f"{name}/kernel"] = shape
        if bias:
            shapes[f"{name}/bias"] = shape[-1:]

    def resnet(name, inputs):
        norm(f"{name}/GroupNorm_0", inputs)
        layer(f"{name}/conv1", 3, 3, inputs, n)
        layer(f"{name}/cond_proj", 4 * n, n, bias=False)
        norm(f"{name}/GroupNorm_1", n)
        layer(f"{name}/conv2", 3, 3, n, n)
        if inputs != n:
            layer(f"{name}/nin_shortcut", inputs, n)

    def attend(name):
        norm(f"{name}/GroupNorm_0", n)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}/{part}", n, n)

    layer("dense0", n + flag, 4 * n)
    layer("dense1", 4 * n, 4 * n)
    layer("conv_in", 3, 3, colors * (5 if fourier else 1), n)
    norm("GroupNorm_0", n)
    layer("conv_out", 3, 3, n, colors)
    resnet("mid.block_1", n)
    attend("mid.attn_1")
    resnet("mid.block_2", n)
    for way, count in (("down", blocks), ("up", blocks + 1)):
        for k in range(count):
            resnet(f"{way}.block_{k}", n if way == "down" else 2 * n)
            if attention:
                attend(f"{way}.attn_{k}")
    weights = {}
    for name, shape in shapes.items():
        scale = 1 / math.sqrt(math.prod(shape[:-1])) if name.endswith("kernel") else 0.3
        weights[f"score_model/{name}"] = (rng.normal(size=shape) * scale + name.endswith("scale")).astype(np.float32)
    if gamma == "scalar":
        weights["gamma/w"], weights["gamma/b"] = np.array([-18.1], np.float32), np.array([-13.2], np.float32)
    elif gamma == "network":
        weights |= {"gamma/l1/kernel": np.array([[-17.0]]), "gamma/l1/bias": np.array([-13.1])}
        weights |= {"gamma/l2/kernel": 6 * rng.normal(size=(1, 40)), "gamma/l2/bias": 3 * rng.normal(size=40)}
        weights["gamma/l3/kernel"] = 9 * rng.normal(size=(40, 1))
    return {name: np.asarray(array, np.float32) for name, array in weights.items()}


def official_eps_hat(weights, z, gamma_t, flags, ends=(-13.3, 5.0)):
    """NOTES of the official code, in float64: ε̂ of z `(B, C, H, W)` at γ_t `(B,)`."""
    w = {name.removeprefix("score_model/"): torch.from_numpy(array).double() for name, array in weights.items()}
    n, colors = w["conv_in/kernel"].shape[3], z.shape[1]

    def dense(name, x):  # over the last axis
        return x @ w[f"{name}/kernel"] + w.get(f"{name}/bias", 0)

    def conv(name, x):
        return F.conv2d(x, w[f"{name}/kernel"].permute(3, 2, 0, 1), w[f"{name}/bias"], padding=1)

    def norm(name, x):
        groups = x.unflatten(1, (32, -1))
        mean = groups.mean((2, 3, 4), keepdim=True)
        variance = (groups - mean).square().mean((2, 3, 4), keepdim=True)
        x = ((groups - mean) / (variance + 1e-6).sqrt()).flatten(1, 2)
        return x * w[f"{name}/scale"].reshape(1, -1, 1, 1) + w[f"{name}/bias"].reshape(1, -1, 1, 1)

    def swish(x):
        return x * torch.sigmoid(x)

    def resnet(name, x):
        h = conv(f"{name}/conv1", swish(norm(f"{name}/GroupNorm_0", x)))
        h = h + dense(f"{name}/cond_proj", cond)[:, :, None, None]
        h = conv(f"{name}/conv2", swish(norm(f"{name}/GroupNorm_1", h)))
        if f"{name}/nin_shortcut/kernel" in w:
            x = dense(f"{name}/nin_shortcut", x.movedim(1, -1)).movedim(-1, 1)
        return x + h

    def attend(name, x):
        if f"{name}/q/kernel" not in w:
            return x
        h = norm(f"{name}/GroupNorm_0", x).flatten(2).transpose(1, 2)
        q, k, v = (dense(f"{name}/{part}", h) for part in "qkv")
        h = torch.softmax(q / math.sqrt(n) @ k.transpose(1, 2), dim=-1) @ v
        return x + dense(f"{name}/proj_out", h).transpose(1, 2).reshape(x.shape)

    frequencies = torch.exp(-torch.arange(n // 2, dtype=torch.float64) * math.log(10000) / (n // 2 - 1))
    angles = 1000 * ((gamma_t - ends[0]) / (ends[1] - ends[0]))[:, None] * frequencies
    cond = torch.cat([angles.sin(), angles.cos(), flags[:, None]], dim=1)[:, : w["dense0/kernel"].shape[0]]
    cond = swish(dense("dense1", swish(dense("dense0", cond))))
    features = z
    if w["conv_in/kernel"].shape[2] != colors:
        angles = torch.stack([z[:, c] * 2 * math.pi * 2**f for c in range(colors) for f in (6, 7)], dim=1)
        features = torch.cat([z, angles.sin(), angles.cos()], dim=1)
    h = conv("conv_in", features)
    skips, k = [h], 0
    while f"down.block_{k}/conv1/kernel" in w:
        h = attend(f"down.attn_{k}", resnet(f"down.block_{k}", h))
        skips.append(h)
        k += 1
    h = resnet("mid.block_2", attend("mid.attn_1", resnet("mid.block_1", h)))
    for k in range(len(skips)):
        h = attend(f"up.attn_{k}", resnet(f"up.block_{k}", torch.cat([h, skips.pop()], dim=1)))
    return conv("conv_out", swish(norm("GroupNorm_0", h))) + z


def official_network_gamma(weights, t):
    l1, b1, l2, b2, l3 = (
        weights[f"gamma/{name}"].astype(np.float64).reshape(-1)
        for name in ("l1/kernel", "l1/bias", "l2/kernel", "l2/bias", "l3/kernel")
    )
    hidden = np.abs(l3) * (2 / (1 + np.exp(-(np.abs(l2) * (2 * t[:, None] - 1) + b2))) - 1)
    return b1 + np.abs(l1) * t + hidden.mean(-1)


def inputs(rng, colors, size=8):
    z = torch.from_numpy(rng.normal(size=(3, colors, size, size)))
    return z, torch.tensor([-12.0, -3.3, 4.1], dtype=torch.float64), torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)


def our_eps_hat(pipe, z, gamma_t, flags=None):
    unet = pipe.unet.double()
    unet.time_proj = official.ExactTimesteps(unet.config.block_out_channels[0])
    timesteps = pipe.noise_schedule.timestep(None, gamma_t)
    with torch.no_grad():
        return unet(z, timesteps, augmentation_flags=flags if unet.config.augmentation_flag else None).sample


def near(actual, expected, tolerance=1e-9):
    assert float((actual - expected).abs().max()) <= tolerance * float(expected.abs().max())


def samples(pipe: VDMPipeline, folder: Path) -> None:
    """A converted pipeline draws images, as it is and loaded, moved and cast."""
    pipe.save_pretrained(folder)
    for each in (
        pipe,
        VDMPipeline.from_pretrained(folder),
        VDMPipeline.from_pretrained(folder).to("cpu", torch.bfloat16),
    ):
        each.set_progress_bar_config(disable=True)
        size, channels = each.unet.config.sample_size, each.unet.config.in_channels
        images = each(2, 2, torch.Generator().manual_seed(0), output_type="pt").images
        assert images.shape == (2, channels, size, size) and images.isfinite().all()


@pytest.mark.parametrize("gamma", ["fixed", "scalar", "network"])
@pytest.mark.parametrize(("attention", "fourier", "colors", "flag"), [(True, True, 3, True), (False, False, 1, False)])
def test_official_networks_of_every_kind_there_and_back(tmp_path, gamma, attention, fourier, colors, flag):
    rng = GENERATOR(5)
    weights = official_weights(rng, 64, 2, colors, fourier, attention, gamma, flag)
    pipe = load_official(write_official(tmp_path / "a", weights), gamma_min=-13.0, gamma_max=6.0, sample_size=8)
    assert pipe.unet.config.down_block_types[0].startswith("Attn") == attention
    assert tuple(pipe.unet.config.fourier_exponents) == ((6, 7) if fourier else ())
    assert pipe.unet.config.augmentation_flag == flag and pipe.unet.config.in_channels == colors
    save_official(pipe, tmp_path / "b", step=12)
    assert read_checkpoint(tmp_path / "b", "params")[1] == 12
    again = load_official(tmp_path / "b", gamma_min=-13.0, gamma_max=6.0, sample_size=8)
    z, gamma_t, flags = inputs(rng, colors)
    expected = official_eps_hat(weights, z, gamma_t, flags, (-13.0, 6.0))
    assert near(our_eps_hat(pipe, z, gamma_t, flags), expected) is None
    near(our_eps_hat(again, z, gamma_t, flags if flag else torch.zeros(3)), expected)
    # the configured ends scale the timestep, whatever was learned
    assert (pipe.noise_schedule.config.gamma_min, pipe.scheduler.config.gamma_max) == (-13.0, 6.0)
    t = torch.linspace(0, 1, 41, dtype=torch.float64)
    if gamma == "network":
        expected = torch.from_numpy(official_network_gamma(weights, t.numpy()))
        exact = gamma_from_official(
            {name.removeprefix("gamma/"): a for name, a in weights.items() if name.startswith("gamma/")}, -13.0, 6.0
        )
        assert isinstance(exact, MonotoneGammaNetwork)
        near(exact(t).detach(), expected, 1e-13)
        back = {f"gamma/{name}": array for name, array in gamma_to_official(exact).items()}
        near(torch.from_numpy(official_network_gamma(back, t.numpy())), expected, 1e-13)
        assert exact.slope(t).min() > 0
        near(pipe.noise_schedule(t).detach(), expected, 1e-6)  # parameters rounded to float32
    else:
        expected = (
            -13.0 + 19.0 * t if gamma == "fixed" else np.float64(np.float32(-13.2)) + t * float(np.float32(18.1))
        )
    near(again.noise_schedule(t).detach(), expected, 1e-6 if gamma == "network" else 1e-14)
    samples(again, tmp_path / "pipeline")


def test_what_our_pipelines_have_and_the_official_ones_do_not_is_folded(tmp_path, generator):
    with torch.random.fork_rng():
        unet = VDMUNet2DModel.from_preset("cifar10", block_out_channels=(64,), layers_per_block=1,
                                          attention_head_dim=64,
                                          sample_size=8, augmentation_flag=False, zero_init=False)  # fmt: skip
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=generator)
    schedule = FixedLinearGamma()
    pipe = VDMPipeline(unet.eval(), VDMScheduler.from_noise_schedule(schedule), noise_schedule=schedule)
    pipe.save_pretrained(tmp_path / "ours")
    convert.main(["to-official", str(tmp_path / "ours"), str(tmp_path / "official"), "--step", "5"])
    again = load_official(tmp_path / "official", sample_size=8)
    assert isinstance(again.noise_schedule, FixedLinearGamma) and again.unet.config.augmentation_flag
    assert not again.unet.down_blocks[0].resnets[0].time_emb_proj.bias.any()
    z, gamma_t, _ = inputs(GENERATOR(0), 3)
    near(our_eps_hat(again, z, gamma_t, torch.zeros(3)), our_eps_hat(pipe, z, gamma_t), 1e-6)


def test_old_layouts_chunks_and_plain_numbers_are_read(tmp_path):
    weights = official_weights(GENERATOR(1), 32, 1)
    expected = load_official(write_official(tmp_path / "new", weights)).unet.state_dict()
    old = {k: v[None, None, None] if "GroupNorm" in k else v for k, v in weights.items()}
    old["gamma/w"], old["gamma/b"] = old["gamma/w"][0], old["gamma/b"][0]
    kernel = old["score_model/conv_in/kernel"]
    pieces = np.array_split(kernel.reshape(-1), 12)
    old["score_model/conv_in/kernel"] = {
        "__msgpack_chunked_array__": True, "shape": {str(i): n for i, n in enumerate(kernel.shape)},
        "chunks": {str(i): piece for i, piece in enumerate(pieces)},
    }  # fmt: skip
    old = {name: np.asarray(value) if isinstance(value, np.floating) else value for name, value in old.items()}
    pipe = load_official(write_official(tmp_path / "old", old, step=41))
    assert all(torch.equal(value, expected[key]) for key, value in pipe.unet.state_dict().items())
    assert float(pipe.noise_schedule.ends()[0].detach()) == np.float32(-13.2)
    assert read_checkpoint(tmp_path / "old")[1] == 41


def test_where_the_file_is_looked_for(tmp_path):
    weights = {"a/b": np.ones(1, np.float32)}
    folder = write_official(tmp_path / "run" / "checkpoints-0", weights, number=9)
    write_official(folder, weights, number=10)
    assert checkpoint_file(folder).name == "ckpt-10.flax" == checkpoint_file(folder / "checkpoint").name
    (folder / "checkpoint").write_text('all_model_checkpoint_paths: "x"\nmodel_checkpoint_path: "../../b/ckpt-9"\n')
    assert checkpoint_file(folder) == folder / "ckpt-9.flax"
    (folder / "checkpoint").unlink()
    assert checkpoint_file(folder).name == "ckpt-10.flax"
    assert checkpoint_file(folder / "ckpt-9.flax").name == "ckpt-9.flax"
    with pytest.raises(ValueError, match=r"did you mean .*checkpoints-0"):
        checkpoint_file(tmp_path / "run")
    for text, reason in (("{}", "names no"), ('model_checkpoint_path: "/"', "no file name"),
                         ('model_checkpoint_path: "a/.."', "no file name"),
                         ('model_checkpoint_path: "ckpt-3"', "ckpt-10.flax, ")):  # fmt: skip
        (folder / "checkpoint").write_text(text)
        with pytest.raises(ValueError, match=reason):
            checkpoint_file(folder)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        checkpoint_file(tmp_path / "nothing")


# ---- files that are none ------------------------------------------------------------------------------------------


def array_of(shape, dtype, content) -> bytes:
    return extension(1, packed([shape, dtype, content]))


def with_leaf(content: bytes) -> bytes:
    head = b"\x81" + packed("ema_params") + b"\x81" + packed("gamma") + b"\x81" + packed("w")
    return head + content


GOOD = packed({"step": 1, "ema_params": {"gamma": {"w": np.ones(1, np.float32)}}})
HUGE = b"\xff\xff\xff\xff"
BAD = {
    "empty": (b"", "it is empty"),
    "zip": (b"PK\x03\x04" + bytes(50), "zip archive"),
    "json": (b'{"a": 1}', "a JSON file"),
    "pickle": (pickle.dumps({"a": 1}, protocol=4), "a pickle"),
    "tensorflow": (b"\x00\x00\x01model" + bytes(99), "no msgpack map"),
    "truncated": (GOOD[:-3], "ends too early"),
    "header only": (b"\xdf" + HUGE, "4294967295"),
    "trailing": (GOOD + b"\xc0", "1 bytes follow"),
    "no weights": (packed({"step": 1, "model": {}}), r"no map 'ema_params', but \['step', 'model'\]"),
    "deep maps": (b"\x81" + packed("ema_params") + (b"\x81" + packed("a")) * 900 + b"\x80", "deeper|nested|Stack"),
    "deeper maps": (b"\x81" + packed("ema_params") + (b"\x81" + packed("a")) * 90_000 + b"\x80", "not a checkpoint"),
    "deep skipped lists": (b"\x81" + packed("opt") + b"\x91" * 100_000, "not a (whole )?checkpoint"),
    "many lists": (
        b"\x81" + packed("ema_params") + (b"\xdd" + b"\x00\x0f\xff\xff") * 900 + bytes(2**20), "max_array_len"),
    "huge list": (with_leaf(b"\xdd" + HUGE), "max_array_len"),
    "huge map": (with_leaf(b"\xdf" + HUGE), "max_map_len"),
    "huge string": (with_leaf(b"\xdb" + HUGE), "too early|max_str_len"),
    "huge array": (with_leaf(b"\xc9" + HUGE + b"\x01"), "max_ext_len"),
    "huge skipped array": (b"\x81" + packed("opt") + b"\xc9" + HUGE + b"\x01" + bytes(99), "not a .*checkpoint"),
    "negative shape": (with_leaf(array_of([-1, -1], "float32", bytes(4))), "lengths must be positive"),
    "gigantic shape": (with_leaf(array_of([2**40, 2**40], "float32", bytes(4))), "has 4 bytes"),
    "shape of floats": (with_leaf(array_of([True], "float32", bytes(4))), "lengths must be positive"),
    "no numbers": (with_leaf(array_of([0], "float32", b"")), "lengths must be positive"),
    "short array": (with_leaf(array_of([3], "float32", bytes(8))), "has 8 bytes"),
    "objects": (with_leaf(array_of([1], "object", bytes(8))), "type 'object'"),
    "bfloat16": (with_leaf(array_of([1], "bfloat16", bytes(2))), "type 'bfloat16'"),
    "not an array": (with_leaf(extension(1, packed("x"))), r"not \[shape, dtype, bytes\]"),
    "unknown extension": (with_leaf(extension(9, b"x")), "extension 9"),
    "complex": (with_leaf(extension(2, packed([1, 2]))), "extension 2"),
    "a number": (with_leaf(b"\x01"), "gamma/w is a int"),
    "a path": (packed({"ema_params": {"../../etc": {}}}), "not the name"),
    "an absolute path": (packed({"ema_params": {"a": {"/etc/passwd": 1}}}), "not the name"),
    "key of bytes": (b"\x81" + b"\xc4\x01a" + b"\xc0", "not a checkpoint"),
    "no utf-8": (b"\x81" + b"\xa2\xff\xfe" + b"\xc0", "not a checkpoint"),
    "twice": (b"\x82" + 2 * (packed("step") + b"\x01"), "'step' is there twice"),
    "twice inside": (
        b"\x81" + packed("ema_params") + b"\x82" + 2 * (packed("a") + packed(np.ones(1))), "'a' is there twice"),
    "step": (packed({"step": "1", "ema_params": {}}), "not a number of steps"),
    "pieces": (with_leaf(packed({"__msgpack_chunked_array__": True, "shape": {"0": 5}, "chunks": {"0": np.ones(3)}})),
               "has 3 numbers"),
    "lost piece": (
        with_leaf(packed({"__msgpack_chunked_array__": True, "shape": {"0": 3}, "chunks": {"1": np.ones(3)}})),
        "lacks some"),
    "entries": (
        packed({"ema_params": {f"a{i}": {f"b{j}": {} for j in range(300)} for i in range(100)}}), "20000 entries"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_files_that_are_no_checkpoint_say_so_and_cost_little(kind, tmp_path):
    content, reason = BAD[kind]
    file = tmp_path / "ckpt-1.flax"
    file.write_bytes(content)
    read_checkpoint(*good_file(tmp_path))  # imports are not counted
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=reason) as caught:
            read_checkpoint(file)
        assert tracemalloc.get_traced_memory()[1] < 12 * 2**20 + 4 * len(content)
    finally:
        tracemalloc.stop()
    assert str(file) in str(caught.value) and len(str(caught.value)) < 600
    with pytest.raises(SystemExit, match="conversion official: "):
        convert.main(["official", str(file), str(tmp_path / "out" / "x")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt-1.flax", "good"]  # nothing was begun


def good_file(folder):
    (folder / "good").write_bytes(GOOD)
    return (folder / "good",)


def test_every_truncation_is_refused(tmp_path):
    content = packed({"params": {"a": np.ones(3)}, "ema_params": {"gamma": {"w": np.ones(2)}}, "step": 2})
    for length in range(len(content)):
        (tmp_path / "f.flax").write_bytes(content[:length])
        with pytest.raises(ValueError, match="f.flax is not a"):
            read_checkpoint(tmp_path / "f.flax")


CHANGES = {
    "missing": ({"score_model/mid.attn_1/k/bias": None}, "mid.attn_1/k/bias is missing"),
    "left over": ({"score_model/encdec/kernel": np.ones((2, 2))}, "encdec/kernel has no place"),
    "shape": (
        {"score_model/dense1/kernel": np.ones((3, 128))}, r"dense1/kernel has shape \(3, 128\) and not \(128, 128\)"),
    "rows": ({"score_model/dense0/kernel": np.ones((34, 128))}, r"dense0/kernel has shape \(34, 128\)"),
    "fourier": ({"score_model/conv_in/kernel": np.ones((3, 3, 9, 32))}, "conv_in must take 3 channels, or 15"),
    "no conv": ({"score_model/conv_in/kernel": None}, "no convolution"),
    "partly attention": ({"score_model/down.attn_0/q/bias": np.ones(32)}, "up.attn_1/v/kernel is missing|and .* more"),
    "block": ({"score_model/down.block_99999999/conv1/bias": np.ones(32)}, "has no place|and .* more"),
    "gamma": ({"gamma/b": None}, "known are w and b"),
    "flat": ({"gamma/w": np.zeros(1)}, "gamma/w is 0"),
    "nan": ({"gamma/w": np.array([np.nan])}, "not finite"),
    "integers": ({"gamma/w": np.array([3])}, "weights must be numbers"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_tensors_that_do_not_fit_are_named(kind, tmp_path):
    change, reason = CHANGES[kind]
    weights = official_weights(GENERATOR(2), 32, 1) | change
    weights = {name: array for name, array in weights.items() if array is not None}
    with pytest.raises(ValueError, match=reason):
        load_official(write_official(tmp_path, weights))


def test_flat_straight_part_of_the_network_is_refused(tmp_path):
    weights = official_weights(GENERATOR(2), 32, 1, gamma="network") | {"gamma/l1/kernel": np.zeros((1, 1))}
    with pytest.raises(ValueError, match="gamma/l1/kernel is 0"):
        load_official(write_official(tmp_path, weights))


# ---- what does not fit, and the folder ----------------------------------------------------------------------------


def small(exponents=(6, 7), scheduler=None, noise_schedule=None, num_levels=256, **more) -> VDMPipeline:
    arguments = {"sample_size": 8, "block_out_channels": (64,), "layers_per_block": 1, "input_residual": True}
    arguments |= {"fourier_exponents": exponents, "attention_head_dim": 64} | more
    with torch.random.fork_rng():
        unet = VDMUNet2DModel(**arguments).eval()
    scheduler = scheduler or VDMScheduler.from_noise_schedule(noise_schedule or FixedLinearGamma())
    return VDMPipeline(unet, scheduler, noise_schedule=noise_schedule, num_levels=num_levels)


CURVED = VDMScheduler(trained_gammas=[-13.0, -9.0, 5.0])
UNFIT = {
    "levels": ({"block_out_channels": (32, 64), "down_block_types": ("DownBlock2D",) * 2, "norm_num_groups": 16,
                "up_block_types": ("UpBlock2D",) * 2}, "block_out_channels is .*the blocks are"),
    "groups": ({"norm_num_groups": 16}, "norm_num_groups is 16 and not 32"),
    "eps": ({"norm_eps": 1e-5}, "norm_eps is 1e-05 and not 1e-06"),
    "heads": ({"attention_head_dim": 32}, r"attention has \[2\] heads and not 1"),
    "exponents": ({"exponents": (5, 6)}, r"fourier_exponents is \(5, 6\)"),
    "residual": ({"input_residual": False}, "input_residual is False"),
    "classes": ({"num_class_embeds": 3}, "num_class_embeds is 3"),
    "time": ({"flip_sin_to_cos": True, "freq_shift": 0}, "flip_sin_to_cos is True and not False; freq_shift is 0"),
    "attention": ({"down_block_types": ("AttnDownBlock2D",)}, "the blocks are"),
    "levels of data": ({"num_levels": 17}, "num_levels is 17"),
    "v": ({"scheduler": VDMScheduler(prediction_type="v_prediction")}, "prediction_type is 'v_prediction'"),
    "ddpm": ({"scheduler": LinearBetaScheduler()}, "scheduler is a LinearBetaScheduler"),
    "table": ({"scheduler": CURVED}, "a table that is no straight line"),
    "two": ({"scheduler": CURVED, "noise_schedule": FixedLinearGamma()}, "not that of noise_schedule"),
    "betas": ({"noise_schedule": TableGamma([-13.3, 5.0], num_train_timesteps=500)}, "1000 times"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNFIT)
def test_pipelines_that_the_official_code_cannot_hold_are_refused(kind, tmp_path):
    arguments, reason = UNFIT[kind]
    with pytest.raises(ValueError, match=reason):
        save_official(small(**arguments), tmp_path / "x")
    assert not any(tmp_path.iterdir())


def test_straight_tables_are_straight_lines(tmp_path):
    for gammas, kind in (([-13.3, -4.15, 5.0], FixedLinearGamma), ([-13.0, -4.0, 5.0], LearnedLinearGamma)):
        save_official(small(scheduler=VDMScheduler(trained_gammas=gammas)), tmp_path / kind.__name__)
        back = load_official(tmp_path / kind.__name__, sample_size=8).noise_schedule
        assert isinstance(back, kind)
        torch.testing.assert_close(back.table(3), torch.tensor(gammas, dtype=torch.float64), rtol=1e-7, atol=0)


def test_outputs_appear_whole_and_replace_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "x"
    folder.mkdir()
    save_official(small(), folder)  # an empty folder will do
    before = (folder / "ckpt-1.flax").read_bytes()
    with pytest.raises(ValueError, match="not an empty folder"):
        save_official(small(), folder)
    with pytest.raises(SystemExit, match="not an empty folder"):
        convert.main(["official", str(folder), str(folder)])
    assert (folder / "ckpt-1.flax").read_bytes() == before

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(official_checkpoint.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_official(small(), tmp_path / "y")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_missing_msgpack_is_explained(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(ImportError, match="pip install msgpack"):
        read_checkpoint(*good_file(tmp_path))


def test_help_of_every_command(capsys):
    for arguments in ([], ["official"], ["addtt"], ["diffusers"], ["to-official"], ["to-addtt"]):
        with pytest.raises(SystemExit) as caught:
            convert.main([*arguments, "--help"])
        assert caught.value.code == 0
        assert "OUTPUT_FOLDER" in capsys.readouterr().out
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, root / "examples" / "convert.py", "official", "no/such", "folder"],
                          capture_output=True, text=True, timeout=120, check=False, cwd=root)  # fmt: skip
    assert done.returncode == 1 and "conversion official: no/such does not exist" in done.stderr


# ---- addtt's code, transcribed ------------------------------------------------------------------------------------


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
    with torch.random.fork_rng():
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
def test_addtt_there_and_back(tmp_path, generator, weights, changes):
    file, nets = addtt_file(tmp_path / "a", generator, **changes)
    settings = SETTINGS | changes
    convert.main(["addtt", str(file), str(tmp_path / "ours"), "--weights", weights, "--sample_size", "8"])
    pipe = VDMPipeline.from_pretrained(tmp_path / "ours")
    assert pipe.unet.config.dropout == settings["dropout_prob"]
    convert.main(["to-addtt", str(tmp_path / "ours"), str(tmp_path / "b")])
    again = load_addtt(tmp_path / "b" / "model.pt", sample_size=8)
    z, gamma_t, _ = inputs(GENERATOR(3), settings["input_channels"])
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


def test_addtt_without_its_config_says_what_it_assumes(tmp_path, generator, capsys):
    file, nets = addtt_file(tmp_path / "a", generator, config=False, n_attention_heads=2, gamma_min=-9.0)
    pipe = load_addtt(file, gamma_min=-9.0, num_heads=2, norm_num_groups=8)
    said = capsys.readouterr().out
    assert "gamma_max 5.0" in said and "dropout_prob 0.0" in said and "n_attention_heads" not in said
    z, gamma_t, _ = inputs(GENERATOR(3), 3)
    with torch.no_grad():
        near(our_eps_hat(pipe, z, gamma_t), nets["ema"](z, gamma_t))
    with pytest.raises(ValueError, match="must divide the 32 channels, got 3 and 8"):
        load_addtt(file, num_heads=3, norm_num_groups=8)


def test_addtt_files_that_do_not_fit(tmp_path, generator):
    file, _ = addtt_file(tmp_path, generator)
    text = (tmp_path / "config.yaml").read_text()
    for change, reason in (
        (("n_blocks: 2", "n_blocks: 3"), "n_blocks is 3 there, 2 here"),
        (("norm_groups: 8", "norm_groups: many"), "norm_groups must be a number, got 'many'"),
        ((text, "[1]"), "no list of settings"),
        ((text, "a: [1"), "no YAML file"),
    ):
        (tmp_path / "config.yaml").write_text(text.replace(*change))
        with pytest.raises(ValueError, match=reason):
            load_addtt(file)
    (tmp_path / "config.yaml").write_text(text)
    content = torch.load(file, weights_only=True)
    del content["ema"]["ema_model.model.conv_in.bias"]
    content["ema"]["ema_model.model.extra"] = torch.zeros(1)
    content["model"]["model.mid_attn_block.layers.1.weight"] = torch.zeros(95, 32, 1, 1)
    torch.save(content, file)
    with pytest.raises(ValueError, match=r"model.conv_in.bias is missing; model.extra has no place"):
        load_addtt(file)
    with pytest.raises(ValueError, match=r"mid_attn_block.layers.1.q.weight is missing"):
        load_addtt(file, "model")
    torch.save({"net": 1}, file)
    with pytest.raises(ValueError, match=r"no state dict 'ema', but \['net'\]"):
        load_addtt(file)
    for content in (pickle.dumps({"a": print}), pickle.dumps(os.system), b"PK\x03\x04junk", b""):
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
        save_addtt(small(**arguments), tmp_path / "x")
    assert not any(tmp_path.iterdir())


# ---- diffusers ----------------------------------------------------------------------------------------------------


def ddpm(**scheduler):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    with torch.random.fork_rng():
        unet = UNet2DModel(sample_size=8, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1,
                           down_block_types=("DownBlock2D", "AttnDownBlock2D"), attention_head_dim=8,
                           up_block_types=("AttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    return DDPMPipeline(unet.eval(), DDPMScheduler(**scheduler))


def test_diffusers_pipeline_and_network_alone(tmp_path, generator, capsys):
    theirs = ddpm(num_train_timesteps=50, beta_end=0.03, prediction_type="v_prediction", variance_type="fixed_large")
    theirs.save_pretrained(tmp_path / "ddpm")
    convert.main(["diffusers", str(tmp_path / "ddpm"), str(tmp_path / "ours")])
    assert "fixed_large" in capsys.readouterr().out
    arguments = ["diffusers", str(tmp_path / "ddpm" / "unet"), str(tmp_path / "two")]
    with pytest.raises(SystemExit, match="network alone"):
        convert.main(arguments)
    convert.main([*arguments, "--scheduler", str(tmp_path / "ddpm" / "scheduler")])
    z = torch.randn(2, 3, 8, 8, generator=generator)
    for folder in ("ours", "two"):
        pipe = VDMPipeline.from_pretrained(tmp_path / folder)
        assert isinstance(pipe.unet, VDMUNet2DModel) and isinstance(pipe.scheduler, LinearBetaScheduler)
        with torch.no_grad():
            assert torch.equal(pipe.unet(z, 17).sample, theirs.unet(z, 17).sample)
        assert pipe.scheduler.config.prediction_type == "v_prediction" and pipe.scheduler.config.clip_sample
        torch.testing.assert_close(pipe.scheduler.betas.float(), theirs.scheduler.betas, rtol=1e-5, atol=0)
        samples(pipe, tmp_path / "again")


@pytest.mark.parametrize("path", ["runs/my model", "./missing", "a/b/c"])
def test_a_pipeline_that_is_not_there(path, tmp_path):
    ddpm().save_pretrained(tmp_path / "ddpm")
    message = "neither a folder here nor a name that the Hub allows"
    for arguments in ([path], [str(tmp_path / "ddpm"), "--scheduler", path]):
        with pytest.raises(SystemExit, match=message):
            convert.main(["diffusers", arguments[0], str(tmp_path / "out"), *arguments[1:]])
    with pytest.raises(SystemExit, match=message):
        convert.main(["to-official", path, str(tmp_path / "out")])


def test_other_betas_become_a_table_of_levels(tmp_path):
    ddpm(beta_schedule="squaredcos_cap_v2").save_pretrained(tmp_path / "cosine")
    pipe = load_diffusers(tmp_path / "cosine")
    pipe.save_pretrained(tmp_path / "ours")
    pipe = VDMPipeline.from_pretrained(tmp_path / "ours")
    theirs = ddpm(beta_schedule="squaredcos_cap_v2").scheduler
    assert isinstance(pipe.scheduler, VDMScheduler) and pipe.scheduler.config.timestep_type == "index"
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=2e-5, atol=1e-7)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=3, output_type="np").images.shape == (1, 8, 8, 3)


def test_diffusers_models_that_are_not_converted(tmp_path):
    for betas, message in (({"rescale_betas_zero_snr": True}, "no signal"), ({"thresholding": True}, "thresholding")):
        ddpm(**betas).save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match=message):
            load_diffusers(tmp_path / "other")
    index = tmp_path / "other" / "model_index.json"
    content = json.loads(index.read_text()) | {"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="LDMPipeline of .*latent models"):
        load_diffusers(tmp_path / "other")
    (tmp_path / "other" / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="UNet2DModel, and not one of diffusers' SchedulerMixin"):
        load_diffusers(tmp_path / "other" / "unet", scheduler=tmp_path / "other" / "scheduler")
    config = tmp_path / "other" / "unet" / "config.json"
    config.write_text(config.read_text().replace("UNet2DModel", "UNet2DConditionModel"))
    with pytest.raises(ValueError, match="UNet2DConditionModel"):
        load_diffusers(tmp_path / "other" / "unet")


# ---- a published size ---------------------------------------------------------------------------------------------

MEASURED = """
import re, sys, time
import torch
from diffusers_vdm import VDMPipeline, VDMScheduler, VDMUNet2DModel, LearnedLinearGamma, conversion
def peak():  # not ru_maxrss: a child begins with its parent's
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s*(\\d+)", status.read())[1]) * 1024
folder = sys.argv[2]
if sys.argv[1] == "write":
    schedule = LearnedLinearGamma()
    unet = VDMUNet2DModel.from_preset("cifar10", zero_init=False)
    pipe = VDMPipeline(unet, VDMScheduler.from_noise_schedule(schedule), noise_schedule=schedule)
    before, start = peak(), time.perf_counter()
    conversion.save_official(pipe, folder)
else:
    import msgpack
    before, start = peak(), time.perf_counter()
    conversion.load_official(folder)
print(time.perf_counter() - start, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read off /proc")
def test_a_published_size_in_seconds_and_little_memory(tmp_path):
    for way in ("write", "read"):
        done = subprocess.run([sys.executable, "-c", MEASURED, way, str(tmp_path / "x")],
                              capture_output=True, text=True, timeout=200, check=True)  # fmt: skip
        seconds, memory = map(float, done.stdout.splitlines()[-1].split())
        size = (tmp_path / "x" / "ckpt-1.flax").stat().st_size
        print(f"{way}: {seconds:.1f} s, {memory / 1e6:.0f} MB for a file of {size / 1e6:.0f} MB")
        assert 4.8e8 < size < 5e8 and seconds < 60 and memory < (0.2 if way == "write" else 1) * size
