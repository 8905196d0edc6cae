"""conversion/official.py and official_checkpoint.py: official JAX checkpoints, read and written; and damaged files.

Nothing here shares code with conversion/: the network and γ(t) are transcribed in float64 from their description.
"""

# ruff: noqa: TID251  addtt's checkpoints are pickles

import math
import pickle
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
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
from diffusers_vdm.conversion.official import load_official, save_official
from diffusers_vdm.conversion.official_checkpoint import (
    checkpoint_file,
    gamma_from_official,
    gamma_to_official,
    read_checkpoint,
)
from tests.conversion.converted import convertible_pipeline, inputs, near, our_eps_hat, samples
from tests.conversion.official_files import extension, packed, write_official
from tests.models import fixed_weights
from tests.paths import contents
from tests.running import run_python

pytestmark = pytest.mark.filterwarnings("ignore:norm_num_groups=32 equals the number of channels:UserWarning")
GENERATOR = np.random.default_rng


# ---- the official network and schedule, transcribed --------------------------------------------------------------


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
    """The official network, transcribed in float64: eps_hat of z `(B, C, H, W)` at gamma_t `(B,)`."""
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


@pytest.mark.parametrize("gamma", ["fixed", "scalar", "network"])
@pytest.mark.parametrize(("attention", "fourier", "colors", "flag"), [(True, True, 3, True), (False, False, 1, False)])
def test_official_networks_of_every_kind_are_converted_and_converted_back(
    tmp_path, gamma, attention, fourier, colors, flag
):
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
    # the timestep is scaled by the configured ends, not by the learned ones
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


def test_biases_that_the_official_network_lacks_are_folded_into_others(tmp_path, generator):
    with fixed_weights():
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


@pytest.fixture
def two_checkpoints(tmp_path):
    """A folder with the checkpoints 9 and 10; its file `checkpoint` names the latter."""
    weights = {"a/b": np.ones(1, np.float32)}
    folder = write_official(tmp_path / "run" / "checkpoints-0", weights, number=9)
    return write_official(folder, weights, number=10)


def test_the_checkpoint_that_the_folder_names_is_read(two_checkpoints):
    pointer = two_checkpoints / "checkpoint"
    assert checkpoint_file(two_checkpoints).name == "ckpt-10.flax" == checkpoint_file(pointer).name
    pointer.write_text('all_model_checkpoint_paths: "x"\nmodel_checkpoint_path: "../../b/ckpt-9"\n')
    assert checkpoint_file(two_checkpoints) == two_checkpoints / "ckpt-9.flax"


def test_without_a_name_the_newest_checkpoint_is_read(two_checkpoints):
    (two_checkpoints / "checkpoint").unlink()
    assert checkpoint_file(two_checkpoints).name == "ckpt-10.flax"
    assert checkpoint_file(two_checkpoints / "ckpt-9.flax").name == "ckpt-9.flax"


def test_the_parent_folder_of_checkpoints_is_refused_with_a_hint(two_checkpoints):
    with pytest.raises(ValueError, match=r"did you mean .*checkpoints-0"):
        checkpoint_file(two_checkpoints.parent)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "names no"),
        ('model_checkpoint_path: "/"', "not a file name"),
        ('model_checkpoint_path: "a/.."', "not a file name"),
        ('model_checkpoint_path: "ckpt-3"', "ckpt-10.flax, "),
    ],
    ids=["no name", "root", "folder", "missing"],
)
def test_a_file_that_names_no_checkpoint_is_refused(two_checkpoints, text, reason):
    (two_checkpoints / "checkpoint").write_text(text)
    with pytest.raises(ValueError, match=reason):
        checkpoint_file(two_checkpoints)


def test_a_folder_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        checkpoint_file(tmp_path / "nothing")


# ---- files that are none -----------------------------------------------------------------------------------------


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
    "tensorflow": (b"\x00\x00\x01model" + bytes(99), "not a msgpack map"),
    "truncated": (GOOD[:-3], "ends too early"),
    "header only": (b"\xdf" + HUGE, "4294967295"),
    "trailing": (GOOD + b"\xc0", "1 bytes follow its end"),
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
    "twice": (b"\x82" + 2 * (packed("step") + b"\x01"), "'step' occurs twice"),
    "twice inside": (
        b"\x81" + packed("ema_params") + b"\x82" + 2 * (packed("a") + packed(np.ones(1))), "'a' occurs twice"),
    "step": (packed({"step": "1", "ema_params": {}}), "not a number of steps"),
    "pieces": (with_leaf(packed({"__msgpack_chunked_array__": True, "shape": {"0": 5}, "chunks": {"0": np.ones(3)}})),
               "have 3 numbers"),
    "lost piece": (
        with_leaf(packed({"__msgpack_chunked_array__": True, "shape": {"0": 3}, "chunks": {"1": np.ones(3)}})),
        "lacks some"),
    "entries": (
        packed({"ema_params": {f"a{i}": {f"b{j}": {} for j in range(300)} for i in range(100)}}), "20000 entries"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_files_that_are_no_checkpoint_are_refused_with_little_memory(kind, tmp_path):
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
    "left over": ({"score_model/encdec/kernel": np.ones((2, 2))}, "encdec/kernel is unexpected"),
    "shape": (
        {"score_model/dense1/kernel": np.ones((3, 128))}, r"dense1/kernel has shape \(3, 128\) and not \(128, 128\)"),
    "rows": ({"score_model/dense0/kernel": np.ones((34, 128))}, r"dense0/kernel has shape \(34, 128\)"),
    "fourier": ({"score_model/conv_in/kernel": np.ones((3, 3, 9, 32))}, "conv_in must take 3 channels, or 15"),
    "no conv": ({"score_model/conv_in/kernel": None}, "no convolution"),
    "partly attention": ({"score_model/down.attn_0/q/bias": np.ones(32)}, "up.attn_1/v/kernel is missing|and .* more"),
    "block": ({"score_model/down.block_99999999/conv1/bias": np.ones(32)}, "is unexpected|and .* more"),
    "gamma": ({"gamma/b": None}, "must have w and b"),
    "flat": ({"gamma/w": np.zeros(1)}, "gamma/w must not be 0"),
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


def test_a_gamma_network_whose_straight_part_is_flat_is_refused(tmp_path):
    weights = official_weights(GENERATOR(2), 32, 1, gamma="network") | {"gamma/l1/kernel": np.zeros((1, 1))}
    with pytest.raises(ValueError, match="gamma/l1/kernel must not be 0"):
        load_official(write_official(tmp_path, weights))


# ---- what does not fit, and the folder ---------------------------------------------------------------------------


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
    "table": ({"scheduler": CURVED}, "a table that is not a straight line"),
    "two": ({"scheduler": CURVED, "noise_schedule": FixedLinearGamma()}, "differs from that of noise_schedule"),
    "betas": ({"noise_schedule": TableGamma([-13.3, 5.0], num_train_timesteps=500)}, "1000 times"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNFIT)
def test_pipelines_that_the_official_code_cannot_hold_are_refused(kind, tmp_path):
    arguments, reason = UNFIT[kind]
    with pytest.raises(ValueError, match=reason):
        save_official(convertible_pipeline(**arguments), tmp_path / "x")
    assert not any(tmp_path.iterdir())


def test_tables_that_are_straight_lines_are_saved_as_linear_schedules(tmp_path):
    for gammas, kind in (([-13.3, -4.15, 5.0], FixedLinearGamma), ([-13.0, -4.0, 5.0], LearnedLinearGamma)):
        save_official(convertible_pipeline(scheduler=VDMScheduler(trained_gammas=gammas)), tmp_path / kind.__name__)
        back = load_official(tmp_path / kind.__name__, sample_size=8).noise_schedule
        assert isinstance(back, kind)
        torch.testing.assert_close(back.table(3), torch.tensor(gammas, dtype=torch.float64), rtol=1e-7, atol=0)


@pytest.mark.parametrize("save", [lambda folder: save_official(convertible_pipeline(), folder),
                                  lambda folder: convert.main(["official", str(folder), str(folder)])],
                         ids=["save", "command"])  # fmt: skip
def test_a_folder_with_files_is_not_written_to(tmp_path, save):
    save_official(convertible_pipeline(), tmp_path)  # a folder may exist if it is empty
    before = contents(tmp_path)
    with pytest.raises((ValueError, SystemExit), match="not an empty folder"):
        save(tmp_path)
    assert contents(tmp_path) == before


def test_an_interrupted_write_leaves_no_folder(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(official_checkpoint.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_official(convertible_pipeline(), tmp_path / "y")
    assert not any(tmp_path.iterdir())


def test_missing_msgpack_is_explained(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(ImportError, match="pip install msgpack"):
        read_checkpoint(*good_file(tmp_path))


# ---- a published size --------------------------------------------------------------------------------------------

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
def test_a_checkpoint_of_a_published_size_takes_seconds_and_little_memory(tmp_path):
    for way in ("write", "read"):
        done = run_python("-c", MEASURED, way, tmp_path / "x")
        seconds, memory = map(float, done.stdout.splitlines()[-1].split())
        size = (tmp_path / "x" / "ckpt-1.flax").stat().st_size
        print(f"{way}: {seconds:.1f} s, {memory / 1e6:.0f} MB for a file of {size / 1e6:.0f} MB")
        assert 4.8e8 < size < 5e8 and seconds < 60 and memory < (0.2 if way == "write" else 1) * size
