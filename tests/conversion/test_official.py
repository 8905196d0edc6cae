"""The official JAX code, on its own weights and inputs, against this package: network, schedule, bound, sampler.

The fixtures hold what the official code returned in float64 (fixtures/README.md). Run in float64 the two must agree to
rounding; in float32 to what two correct float32 programs differ by.
"""

import copy
import math
import tempfile
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from diffusers_vdm import (
    FixedLinearGamma,
    LearnedLinearGamma,
    VariationalBound,
    VDMPipeline,
    VDMScheduler,
    VDMUNet2DModel,
)
from diffusers_vdm.commands import convert
from diffusers_vdm.diffusion import decode, q_sample
from tests.conversion.converted import ExactTimesteps
from tests.conversion.official_files import write_official
from tests.paths import FIXTURES

NAMES = ["tiny_scalar64", "tiny_scalar", "tiny_fixed"]
NATS_PER_BPD = 3 * 32 * 32 * math.log(2)
# blocks, number of channels, Fourier features
SHAPES = {"tiny_scalar64": (1, 64, True), "tiny_scalar": (2, 32, True), "tiny_fixed": (1, 32, False)}


@cache
def load(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / f"official_{name}.npz") as data:
        return dict(data)


RESNET = {
    "GroupNorm_0": "norm1", "conv1": "conv1", "cond_proj": "time_emb_proj", "GroupNorm_1": "norm2", "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}  # fmt: skip
ATTENTION = {"GroupNorm_0": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
TOP = {
    "dense0": "time_embedding.linear_1", "dense1": "time_embedding.linear_2", "conv_in": "conv_in",
    "GroupNorm_0": "conv_norm_out", "conv_out": "conv_out",
}  # fmt: skip


def our_name(path: str) -> str:
    """`score_model/down.block_0/conv1/kernel` → `down_blocks.0.resnets.0.conv1.weight`."""
    *modules, leaf = path.split("/")[1:]
    leaf = "bias" if leaf == "bias" else "weight"
    if len(modules) == 1:
        return f"{TOP[modules[0]]}.{leaf}"
    place, _, number = modules[0].rpartition("_")
    if place == "mid.attn":
        return f"mid_block.attentions.0.{ATTENTION[modules[1]]}.{leaf}"
    index = int(number) - 1 if place == "mid.block" else int(number)  # mid.block_1 and mid.block_2
    parent = {"down.block": "down_blocks.0", "mid.block": "mid_block", "up.block": "up_blocks.0"}[place]
    return f"{parent}.resnets.{index}.{RESNET[modules[1]]}.{leaf}"


def our_layout(path: str, array: np.ndarray) -> torch.Tensor:
    """HWIO convolutions to OIHW, dense kernels transposed, and 1×1 convolutions where we have those."""
    tensor = torch.from_numpy(array.astype(np.float32))
    if not path.endswith("kernel"):
        return tensor
    tensor = tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T
    return tensor[:, :, None, None] if "nin_shortcut" in path else tensor


@cache
def official_weights(name: str, tree: str) -> dict[str, np.ndarray]:
    """The weights of a fixture, by their paths in the official checkpoint; empty if it has no such tree."""
    prefix = f"weights/{tree}/"
    return {key.removeprefix(prefix): value for key, value in load(name).items() if key.startswith(prefix)}


def built(name: str, tree: str) -> tuple[nn.Module, nn.Module]:
    """The network and the schedule of a fixture, with the official weights put in one by one."""
    blocks, channels, fourier = SHAPES[name]
    arguments = {
        "sample_size": 32,
        "block_out_channels": (channels,),
        "layers_per_block": blocks,
        "attention_head_dim": channels,
        "fourier_exponents": (6, 7) if fourier else (),
        "input_residual": True,
        "augmentation_flag": True,
    }
    if channels == 32:
        with pytest.warns(UserWarning, match="cannot see the noise level"):
            unet = VDMUNet2DModel(**arguments)
    else:
        unet = VDMUNet2DModel(**arguments)
    official = official_weights(name, tree)
    state = {our_name(p): our_layout(p, w) for p, w in official.items() if p.startswith("score_model/")}
    missing, unexpected = unet.load_state_dict(state, strict=False)
    # every tensor of ours has an official one, but the biases that the official layers lack
    assert not unexpected
    assert missing and all(key.endswith("time_emb_proj.bias") for key in missing), missing
    for key in missing:
        nn.init.zeros_(unet.get_parameter(key))
    if name == "tiny_fixed":
        return unet, FixedLinearGamma()
    schedule = LearnedLinearGamma()
    with torch.no_grad():  # raw and signed, as stored: |w| is taken at use
        schedule.bias.copy_(torch.from_numpy(official["gamma/b"]))
        schedule.weight.copy_(torch.from_numpy(official["gamma/w"]))
    return unet, schedule


@cache
def converted(name: str, tree: str) -> VDMPipeline:
    """The pipeline that the command `convert official` makes of the weights of a fixture."""
    params, ema = official_weights(name, "params"), official_weights(name, "ema_params")
    params, ema = ({path: array.astype(np.float32) for path, array in each.items()} for each in (params, ema))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "norm_num_groups=32 equals the number of channels", UserWarning)
        source = write_official(Path(folder) / "checkpoints-0", ema or params, params)
        convert.main(["official", str(source), f"{folder}/pipeline", "--weights", tree])
        return VDMPipeline.from_pretrained(f"{folder}/pipeline")


@pytest.fixture(params=["weight by weight", "by the command"])
def build(request):
    """`build(name, tree, dtype, exact)`: the network and the schedule of a fixture, made in two ways."""

    def build(name: str, tree: str = "params", dtype: torch.dtype = torch.float64, exact: bool = True):
        if request.param == "weight by weight":
            unet, schedule = built(name, tree)
        else:
            pipe = converted(name, tree)
            unet, schedule = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.noise_schedule)
        unet = unet.to(dtype).eval()
        if exact:
            unet.time_proj = ExactTimesteps(unet.config.block_out_channels[0])
        return unet, schedule.to(dtype)

    return build


def image_tensor(name: str, key: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """An input or output `(B, H, W, C)` of a fixture as `(B, C, H, W)`."""
    tensor = torch.from_numpy(load(name)[key])
    return tensor.permute(0, 3, 1, 2).to(tensor.dtype if key == "in.images" else dtype).contiguous()


def run_inputs(name: str, run: str, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """What the official code was given in a run: images, t, ε and ε_0."""
    noise = "anti" if run == "anti" else "inj"
    t = torch.from_numpy(load(name)[f"in.{run}.t"])
    return {
        "images": image_tensor(name, "in.images")[: len(t)],
        "t": t.to(dtype),
        "eps": image_tensor(name, f"in.{noise}.eps", dtype),
        "eps_0": image_tensor(name, f"in.{noise}.eps_0", dtype),
    }


def close(actual: torch.Tensor, expected: np.ndarray, rtol: float = 1e-9, atol: float = 0.0) -> None:
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=rtol, atol=atol)


def close_images(actual: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    """Largest error relative to the largest value."""
    difference = np.abs(actual.detach().permute(0, 2, 3, 1).numpy() - expected).max()
    assert difference <= tolerance * np.abs(expected).max(), difference / np.abs(expected).max()


# ---- the network -------------------------------------------------------------------------------------------------


def score(build, name: str, kind: str, dtype: torch.dtype, exact: bool) -> torch.Tensor:
    unet, schedule = build(name, dtype=dtype, exact=exact)
    data = load(name)
    z = image_tensor(name, "in.score.z", dtype)[: len(data[f"params.score.eps_hat_{kind}.f64"])]
    gamma_t = torch.from_numpy(data["in.score.g_t"])[: len(z)].double()
    flags = torch.from_numpy(data[f"in.score.{kind}"])[: len(z)]
    timesteps = schedule.timestep(torch.empty(len(z)), gamma_t)
    with torch.no_grad():
        return unet(z, timesteps.to(dtype), augmentation_flags=flags).sample


@pytest.mark.parametrize("name", NAMES)
def test_network_is_the_official_one_in_float64(build, name):
    close_images(
        score(build, name, "cond_zero", torch.float64, True), load(name)["params.score.eps_hat_cond_zero.f64"], 1e-9
    )


def test_augmentation_flag_is_the_official_conditioning(build):
    flags = load("tiny_scalar64")["in.score.cond_mix"]
    assert sorted(flags) == [0, 1]  # else the flag would not be tested
    expected = load("tiny_scalar64")["params.score.eps_hat_cond_mix.f64"]
    close_images(score(build, "tiny_scalar64", "cond_mix", torch.float64, True), expected, 1e-9)
    without = load("tiny_scalar64")["params.score.eps_hat_cond_zero.f64"][0]
    assert np.abs(expected[0] - without).max() > 1e-3  # and this network does see it


@pytest.mark.parametrize("name", NAMES)
def test_network_is_close_to_the_official_one_in_float32(build, name):
    # two official runs, float32 and float64, differ by up to 6e-5: the Fourier features amplify the rounding of z
    actual = score(build, name, "cond_zero", torch.float32, False)
    assert actual.dtype == torch.float32
    close_images(actual, load(name)["params.score.eps_hat_cond_zero.f64"], 3e-4)


def test_time_embedding_is_the_official_one(build):
    unet, _ = build("tiny_scalar64", exact=False)
    timesteps = torch.tensor([0.0, 0.3, 17.25, 999.5])
    torch.testing.assert_close(
        unet.time_proj(timesteps).double(), ExactTimesteps(64)(timesteps.double()), rtol=0, atol=1e-4
    )


# ---- the schedule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_gamma_and_its_slope_are_the_official_ones(build, name):
    _, schedule = build(name)
    data = load(name)
    t = torch.from_numpy(data["in.t_grid"]).double()
    close(schedule(t), data["params.gamma_grid.f64"], rtol=1e-12)
    close(schedule.slope(t), np.broadcast_to(data["params.dgamma_grid.f64"], t.shape), rtol=1e-12)
    gamma_0, gamma_1 = schedule.ends()
    close(gamma_0, data["params.gamma_0.f64"], rtol=1e-14)
    close(gamma_1, data["params.gamma_1.f64"], rtol=1e-14)
    # the table that a scheduler keeps
    close(VDMScheduler.from_noise_schedule(schedule).noise_schedule()(t), data["params.gamma_grid.f64"], rtol=1e-12)


def test_scheduler_of_a_converted_pipeline_is_the_official_schedule():
    data = load("tiny_scalar64")
    table = converted("tiny_scalar64", "params").scheduler.noise_schedule()
    t = torch.from_numpy(data["in.t_grid"]).double()
    close(table(t), data["params.gamma_grid.f64"], rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_z_t_is_the_official_one(build, name):
    _, schedule = build(name)
    inputs = run_inputs(name, "inj0")
    x = (2 * inputs["images"].double() + 1) / 256 - 1
    z_t = q_sample(x, inputs["eps"], schedule(inputs["t"]))
    close_images(z_t, load(name)["params.inj0.T0.z_t"], 3e-7)  # stored in float32
    # the same through the scheduler: a noise level is a timestep
    scheduler = VDMScheduler.from_noise_schedule(schedule)
    timestep = schedule.timestep(inputs["t"], schedule(inputs["t"]))
    torch.testing.assert_close(scheduler.add_noise(x, inputs["eps"], timestep), z_t, rtol=1e-12, atol=1e-12)


# ---- the bound ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_timesteps", [None, 1000])
@pytest.mark.parametrize("run", ["inj0", "inj1", "anti"])
@pytest.mark.parametrize("name", NAMES)
def test_terms_of_the_bound_are_the_official_ones_in_float64(build, name, run, num_timesteps):
    unet, schedule = build(name)
    bound = VariationalBound(unet, schedule, num_timesteps=num_timesteps)
    with torch.no_grad():
        out = bound(**run_inputs(name, run))
    data, mode = load(name), f"params.{run}.T{num_timesteps or 0}"
    close(out.gamma_t, data[f"{mode}.g_t.f64"], rtol=1e-12)
    close(out.mse, data[f"{mode}.mse.f64"] / 3072)  # theirs is the sum
    close(out.diffusion * NATS_PER_BPD, data[f"{mode}.loss_diff.f64"])
    close(out.prior * NATS_PER_BPD, data[f"params.{run}.loss_klz.f64"])
    close(out.reconstruction * NATS_PER_BPD, data[f"params.{run}.loss_recon.f64"])
    if run == "anti":
        close(out.loss, data[f"{mode}.bpd.f64"])
        close(out.reconstruction.mean(), data[f"{mode}.bpd_recon.f64"])
        close(out.prior.mean(), data[f"{mode}.bpd_latent.f64"])
        close(out.diffusion.mean(), data[f"{mode}.bpd_diff.f64"])


@pytest.mark.parametrize("num_timesteps", [None, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_terms_of_the_bound_are_close_to_the_official_ones_in_float32(build, name, num_timesteps):
    unet, schedule = build(name, dtype=torch.float32, exact=False)
    with torch.no_grad():
        out = VariationalBound(unet, schedule, num_timesteps=num_timesteps)(**run_inputs(name, "anti", torch.float32))
    data, mode = load(name), f"params.anti.T{num_timesteps or 0}"
    assert out.loss.dtype == torch.float32
    # the official float32 code itself is off by 7e-6; by 6e-5 at T = 1000, where it takes γ_t − γ_s in float32
    close(out.diffusion.double() * NATS_PER_BPD, data[f"{mode}.loss_diff.f64"], rtol=3e-5)
    close(out.prior.double() * NATS_PER_BPD, data["params.anti.loss_klz.f64"], rtol=2e-5)
    close(out.reconstruction.double() * NATS_PER_BPD, data["params.anti.loss_recon.f64"], rtol=3e-5, atol=1e-3)
    close(out.loss.double(), data[f"{mode}.bpd.f64"], rtol=2e-5)


def test_bound_of_the_averaged_weights_is_the_official_one(build):
    unet, schedule = build("tiny_scalar64", "ema_params")
    with torch.no_grad():
        out = VariationalBound(unet, schedule)(**run_inputs("tiny_scalar64", "anti"))
    data = load("tiny_scalar64")
    close(schedule.ends()[0], data["ema_params.gamma_0.f64"], rtol=1e-14)
    close(schedule.ends()[1], data["ema_params.gamma_1.f64"], rtol=1e-14)
    close(out.diffusion * NATS_PER_BPD, data["ema_params.anti.T0.loss_diff.f64"])
    close(out.reconstruction * NATS_PER_BPD, data["ema_params.anti.loss_recon.f64"])
    close(out.loss, data["ema_params.anti.T0.bpd.f64"])
    # the two sets differ, so that mixing them up would be seen
    assert abs(data["ema_params.anti.T0.bpd.f64"] / data["params.anti.T0.bpd.f64"] - 1) > 1e-4


@pytest.mark.parametrize("num_timesteps", [None, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_the_bound_are_the_official_ones(build, name, num_timesteps):
    unet, schedule = build(name)
    # the published code takes the bound's own gradient everywhere
    bound = VariationalBound(unet, schedule, num_timesteps=num_timesteps, minimize_variance=False)
    bound(**run_inputs(name, "anti")).loss.backward()
    data, mode = load(name), f"params.anti.T{num_timesteps or 0}"
    if name != "tiny_fixed":
        close(schedule.bias.grad, data[f"{mode}.grad.gamma/b.f64"], rtol=1e-8)
        close(schedule.weight.grad, data[f"{mode}.grad.gamma/w.f64"], rtol=1e-8)
    names = [str(path) for path in data["grad_names"]]
    checked = 0
    largest = data[f"{mode}.grad_norm.f64"].max()
    for row, path in enumerate(names):
        if not path.startswith("score_model/"):
            continue
        gradient = unet.get_parameter(our_name(path)).grad
        # back to the official layout, for its first entries
        if path.endswith("kernel"):
            gradient = gradient.squeeze(-1).squeeze(-1) if "nin_shortcut" in path else gradient
            gradient = gradient.permute(2, 3, 1, 0) if gradient.ndim == 4 else gradient.T
        atol = 1e-10 * largest  # gradients that are zero in exact arithmetic, of key biases for instance
        close(gradient.norm(), data[f"{mode}.grad_norm.f64"][row], rtol=1e-7, atol=atol)
        close(gradient.sum(), data[f"{mode}.grad_sum.f64"][row], rtol=1e-6, atol=10 * atol)
        head = data[f"{mode}.grad_head8.f64"][row][: gradient.numel()]
        close(gradient.reshape(-1)[:8], head, rtol=1e-6, atol=atol)
        checked += 1
    assert checked == sum(key.startswith("weights/params/score_model") for key in data)


def test_continuous_time_with_minimized_variance_is_official_for_the_network(build):
    # a straight γ has no parameters between its ends: minimizing the variance changes none of its gradients
    unet, schedule = build("tiny_scalar64")
    VariationalBound(unet, schedule, minimize_variance=True)(**run_inputs("tiny_scalar64", "anti")).loss.backward()
    data = load("tiny_scalar64")
    close(schedule.bias.grad, data["params.anti.T0.grad.gamma/b.f64"], rtol=1e-8)
    close(schedule.weight.grad, data["params.anti.T0.grad.gamma/w.f64"], rtol=1e-8)


# ---- sampling ----------------------------------------------------------------------------------------------------


def official_step(scheduler, unet, schedule, i: int, num_steps: int, z_t: torch.Tensor, eps: torch.Tensor):
    """z_s with the noise of the official code, through the scheduler's public interface alone.

    The scheduler draws its own noise; of two draws that are known, the standard deviation and the mean follow.
    """
    t = torch.tensor((num_steps - i) / num_steps, dtype=torch.float64)
    with torch.no_grad():  # the network's timestep in float64: `scheduler.timesteps` are float32
        eps_hat = unet(z_t, schedule.timestep(t, schedule(t)), return_dict=False)[0]
    scheduler.set_timesteps(num_steps)
    draws, noises = [], []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        draws.append(scheduler.step(eps_hat, scheduler.timesteps[i], z_t, generator=generator).prev_sample)
        noises.append(torch.randn(z_t.shape, generator=torch.Generator().manual_seed(seed), dtype=z_t.dtype))
    difference = noises[0] - noises[1]
    std = ((draws[0] - draws[1]) * difference).sum() / difference.square().sum()
    mean = draws[0] - std * noises[0]
    torch.testing.assert_close(mean, draws[1] - std * noises[1], rtol=0, atol=1e-12)  # noise enters as std · ε
    return mean + std * eps


@pytest.mark.parametrize(
    ("name", "i"),
    [(name, i) for name in NAMES for i in (0, 613, 999) if name == "tiny_scalar64" or i != 613],
)
def test_one_ancestral_step_is_the_official_one(build, name, i):
    key = f"params.sample.i{i}_T1000.z_s.f64"
    unet, schedule = build(name)
    scheduler = VDMScheduler.from_noise_schedule(schedule)
    eps = image_tensor(name, f"in.sample.i{i}_T1000.eps")
    z_s = official_step(scheduler, unet, schedule, i, 1000, image_tensor(name, "in.sample.z_t"), eps)
    # the official code writes σ_s² as 1 − α_s², but in float64 that costs nothing
    close_images(z_s, load(name)[key], 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_chain_of_three_steps_is_the_official_one(build, name):
    unet, schedule = build(name)
    scheduler = VDMScheduler.from_noise_schedule(schedule)
    z = image_tensor(name, "in.chain.z_init")
    for i in range(3):
        z = official_step(scheduler, unet, schedule, i, 3, z, image_tensor(name, f"in.chain.eps_{i}"))
    # in float32 this would be off by 4e-4: each step passes the Fourier features, which amplify rounding 804 times
    close_images(z, load(name)["params.chain.z_0.f64"], 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_one_step_in_float32_with_the_timestep_of_the_scheduler(build, name):
    unet, schedule = build(name, dtype=torch.float32, exact=False)
    scheduler = VDMScheduler.from_noise_schedule(schedule)
    scheduler.set_timesteps(1000)
    z_t = image_tensor(name, "in.sample.z_t", torch.float32)
    with torch.no_grad():
        eps_hat = unet(z_t, scheduler.timesteps[0], return_dict=False)[0]
    generator = torch.Generator().manual_seed(3)
    out = scheduler.step(eps_hat, scheduler.timesteps[0], z_t, generator=generator).prev_sample
    assert out.dtype == torch.float32
    own_noise = torch.randn(z_t.shape, generator=torch.Generator().manual_seed(3))
    eps = image_tensor(name, "in.sample.i0_T1000.eps", torch.float32)
    gamma_t, gamma_s = schedule(torch.tensor([1.0, 0.999], dtype=torch.float64)).detach()
    std = float((torch.sigmoid(gamma_s) * -torch.expm1(gamma_s - gamma_t)).sqrt())
    z_s = out + std * (eps - own_noise)
    close_images(z_s, load(name)["params.sample.i0_T1000.z_s.f64"], 3e-5)


@pytest.mark.parametrize("name", NAMES)
def test_decoder_is_the_official_one(build, name):
    _, schedule = build(name)
    expected = torch.from_numpy(load(name)["params.gen.x.f64"]).permute(0, 3, 1, 2).long()
    for dtype in (torch.float32, torch.float64):
        levels = decode(image_tensor(name, "in.gen.z_0", dtype), schedule.ends()[0].detach())
        assert torch.equal(levels, expected)
    assert len(expected.unique()) > 100
