"""Cost of a training step against a plain PyTorch port: time, memory and a profile.

    python benchmarks/train_step.py --output benchmarks/results/train_step_cpu.json
    python benchmarks/train_step.py --preset cifar10 --batch_size 128 --device cuda

The variants alternate in one process, so that all see the same load of the machine:

    port    a plain implementation of the network: one op after another, attention by einsum with its whole matrix of
            weights, the decoder as a log-softmax over an axis of 256 levels times a one-hot tensor; fp32, AdamW with
            a loop over the parameters
    fp32    `VariationalBound` of `VDMUNet2DModel`, fused AdamW
    bf16    the same under bf16 autocast, as in `accelerate launch --mixed_precision bf16 examples/train.py`

All train the same objective, the continuous-time bound with learned ends of γ, from the same weights. Before the
timing, the loss and every gradient of `port` and `fp32` are compared for the same noise.

Peak memory is the increase during one step over the memory before it (weights, optimizer state, batch), measured in a
separate process for each variant. On a CPU it is resident memory, where every block above 64 KiB is returned to the
system when it is freed; on a GPU it is `torch.cuda.max_memory_allocated`. FLOPs count the matrix products and
convolutions of forward and backward without recomputation. Utilization is their rate divided by that of a square
matrix product.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from diffusers_vdm import LearnedLinearGamma, VariationalBound, VDMUNet2DModel
from diffusers_vdm.training.cost import matmul_flops_per_second, training_cost
from diffusers_vdm.unet import UNET_PRESETS

VARIANTS = ("port", "fp32", "bf16")
NUM_LEVELS = 256


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cifar10", choices=sorted(UNET_PRESETS))
    parser.add_argument("--channels", type=int, help="replaces the preset's value; 64 unless --preset is given")
    parser.add_argument(
        "--blocks", type=int, help="replaces the preset's layers_per_block; 4 unless --preset is given"
    )
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9, help="rounds; each variant makes one step per round")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the network of our variants, not of the port")
    parser.add_argument(
        "--force_layout",
        action="store_true",
        help="--compile with channels-last convolutions, which Inductor leaves out if one of them halves its channels",
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--no_profile", action="store_true")
    parser.add_argument("--no_memory", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--peak_of", choices=VARIANTS, help="only measure this variant's peak memory")
    args = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    if not any(argument.split("=")[0] == "--preset" for argument in given):
        args.channels, args.blocks = args.channels or 64, args.blocks or 4
    return args


# ---- the port ----------------------------------------------------------------------------------------------------


class PlainNetwork(nn.Module):
    """Computes a one-level [`VDMUNet2DModel`] from its weights, one plain operation after another.

    Raises: `ValueError` for a network with several levels, or with attention outside the mid block.
    """

    def __init__(self, unet: VDMUNet2DModel):
        super().__init__()
        config = unet.config
        plain = config.down_block_types == ("DownBlock2D",) and config.up_block_types == ("UpBlock2D",)
        if not plain or config.mid_block_type != "UNetMidBlock2D" or not config.fourier_exponents:
            raise ValueError(
                "the port needs a network with one level, attention only in the middle and Fourier features, got "
                f"{config.down_block_types} and {config.up_block_types}; use --preset cifar10, or leave out the "
                "variant port with --variants fp32 bf16."
            )
        self.unet = unet

    def forward(self, z: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        unet = self.unet
        half = unet.config.block_out_channels[0] // 2
        rates = torch.exp(-torch.linspace(0, 1, half, device=z.device) * torch.log(torch.tensor(10000.0)).to(z.device))
        angles = timesteps[:, None] * rates[None]
        emb = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
        if unet.config.augmentation_flag:
            emb = torch.cat([emb, torch.zeros_like(emb[:, :1])], dim=1)
        emb = unet.time_embedding.linear_2(F.silu(unet.time_embedding.linear_1(emb)))

        waves = [z]
        for wave in (torch.sin, torch.cos):
            for channel in range(z.shape[1]):
                for exponent in unet.config.fourier_exponents:
                    waves.append(wave(z[:, channel : channel + 1] * (2.0**exponent * 2 * torch.pi)))
        hidden = unet.conv_in(torch.cat(waves, dim=1))

        kept = [hidden]
        for block in unet.down_blocks[0].resnets:
            hidden = self.block(block, hidden, emb)
            kept.append(hidden)
        hidden = self.block(unet.mid_block.resnets[0], hidden, emb)
        hidden = self.attention(unet.mid_block.attentions[0], hidden)
        hidden = self.block(unet.mid_block.resnets[1], hidden, emb)
        for block in unet.up_blocks[0].resnets:
            hidden = self.block(block, torch.cat([hidden, kept.pop()], dim=1), emb)
        out = unet.conv_out(F.silu(unet.conv_norm_out(hidden)))
        return out + z if unet.config.input_residual else out

    def block(self, block: nn.Module, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        hidden = block.conv1(F.silu(block.norm1(x)))
        hidden = hidden + block.time_emb_proj(F.silu(emb))[:, :, None, None]
        hidden = block.conv2(block.dropout(F.silu(block.norm2(hidden))))
        return hidden + (x if block.conv_shortcut is None else block.conv_shortcut(x))

    def attention(self, attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        tokens = attention.group_norm(x).reshape(b, c, h * w).transpose(1, 2)
        split = (b, h * w, attention.heads, c // attention.heads)
        query, key, value = (to(tokens).reshape(split) for to in (attention.to_q, attention.to_k, attention.to_v))
        weights = torch.einsum("bqhd,bkhd->bhqk", query, key) * split[-1] ** -0.5
        out = torch.einsum("bhqk,bkhd->bqhd", torch.softmax(weights, dim=-1), value).reshape(b, h * w, c)
        return x + attention.to_out[0](out).transpose(1, 2).reshape(b, c, h, w)


class PlainBound(nn.Module):
    """The continuous-time bound written directly from its equations, in float32, with all decoder levels at once.

    −log₂ p(x) ≤ KL(q(z_1|x) ‖ N(0, I)) − E[log p(x|z_0)] + ½ E[γ′ ‖ε − ε̂‖²], γ(t) = b + |w| t   [VDM eq. 11, §5]
    """

    def __init__(self, unet: VDMUNet2DModel, schedule: LearnedLinearGamma):
        super().__init__()
        self.network, self.noise_schedule = PlainNetwork(unet), schedule
        self.gamma_min, self.gamma_max = schedule.config.gamma_min, schedule.config.gamma_max

    def forward(
        self, images: torch.Tensor, t: torch.Tensor, eps: torch.Tensor, eps_0: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss in bits per dimension, and the bound of each image; arguments as in `VariationalBound.forward`."""
        levels = images.long()
        x = 2 * ((levels.float() + 0.5) / NUM_LEVELS) - 1
        gamma_0 = self.noise_schedule.bias
        slope = self.noise_schedule.weight.abs()
        gamma_1, gamma_t = gamma_0 + slope, gamma_0 + slope * t

        shape = (-1, 1, 1, 1)
        z_t = (
            torch.sqrt(torch.sigmoid(-gamma_t)).view(shape) * x + torch.sqrt(torch.sigmoid(gamma_t)).view(shape) * eps
        )
        timesteps = 1000 * (gamma_t - self.gamma_min) / (self.gamma_max - self.gamma_min)
        squared_error = ((eps - self.network(z_t, timesteps)) ** 2).sum((1, 2, 3))
        diffusion = 0.5 * slope * squared_error

        variance_1 = torch.sigmoid(gamma_1)
        prior = 0.5 * ((1 - variance_1) * x**2 + variance_1 - torch.log(variance_1) - 1).sum((1, 2, 3))

        y = x + torch.exp(0.5 * gamma_0) * eps_0
        values = 2 * ((torch.arange(NUM_LEVELS, device=x.device) + 0.5) / NUM_LEVELS) - 1
        logits = -0.5 * torch.exp(-gamma_0) * (y[..., None] - values) ** 2
        one_hot = F.one_hot(levels, NUM_LEVELS).float()
        reconstruction = -(one_hot * F.log_softmax(logits, dim=-1)).sum((1, 2, 3, 4))

        total = (prior + reconstruction + diffusion) / (x[0].numel() * torch.log(torch.tensor(2.0)).to(x.device))
        return total.mean(), total


# ---- a step of each variant --------------------------------------------------------------------------------------


def build(args: argparse.Namespace) -> tuple[VDMUNet2DModel, LearnedLinearGamma]:
    """The network and γ(t), perturbed away from the zero initialization so that no gradient vanishes."""
    overrides = {"dropout": 0.0}
    if args.channels:
        overrides |= {"block_out_channels": (args.channels,), "attention_head_dim": args.channels}
    if args.blocks:
        overrides |= {"layers_per_block": args.blocks}
    torch.manual_seed(0)
    unet = VDMUNet2DModel.from_preset(args.preset, **overrides)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return unet.train().to(args.device), LearnedLinearGamma().to(args.device)


def draw(args: argparse.Namespace, unet: VDMUNet2DModel, batch_size: int | None = None) -> dict[str, torch.Tensor]:
    """Images and all noise of a step; the images are smooth, because noise images are untypical for the decoder."""
    n, size = batch_size or args.batch_size, unet.config.sample_size
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand((n, unet.config.in_channels, 4, 4), generator=generator)
    images = F.interpolate(coarse, size=(size, size), mode="bilinear").mul(255).round().to(torch.uint8)
    batch = {"images": images, "t": (torch.arange(n) + 0.5) / n}
    batch |= {name: torch.randn(images.shape, generator=generator) for name in ("eps", "eps_0")}
    return {name: value.to(args.device) for name, value in batch.items()}


def make_step(
    variant: str,
    unet: VDMUNet2DModel,
    schedule: LearnedLinearGamma,
    device: str,
    compiled: bool = False,
    force_layout: bool = False,
) -> tuple[Callable, Callable]:
    """Two functions `(gradients, step)` of one of `VARIANTS`, each called with the batch of [`draw`].

    Both return the loss. `gradients` runs forward and backward, `step` also the optimizer, on the weights given here.
    """
    parameters = [*unet.parameters(), *schedule.parameters()]
    if variant == "port":
        bound = PlainBound(unet, schedule)
        optimizer = torch.optim.AdamW(parameters, 2e-4, foreach=False, fused=False)
    else:
        bound = VariationalBound(unet, schedule, num_levels=NUM_LEVELS)
        optimizer = torch.optim.AdamW(parameters, 2e-4, fused=True)
        if compiled:
            unet.compile(**({"options": {"force_layout_optimization": True}} if force_layout else {}))
    kind = torch.device(device).type

    def gradients(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        # as in accelerate: the module under autocast, which keeps losses in float32, and backward outside of it
        with torch.autocast(kind, torch.bfloat16, enabled=variant == "bf16"):
            loss = bound(**batch)[0]
        loss.float().backward()
        return loss.detach()

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = gradients(batch)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return gradients, step


# ---- measurements ------------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> dict[str, dict]:
    """Compares loss and gradients with the port: |Δ loss| in bits/dim, |Δg|/|g| of all gradients, and the largest.

    Raises: `ValueError` if fp32 differs by more than rounding.
    """
    unet, schedule = build(args)
    batch, found = draw(args, unet, min(args.batch_size, 8)), {}
    for variant in VARIANTS:
        own_unet, own_schedule = copy.deepcopy(unet), copy.deepcopy(schedule)
        loss = float(make_step(variant, own_unet, own_schedule, args.device)[0](batch))
        named = [*own_unet.named_parameters(), *own_schedule.named_parameters()]
        found[variant] = (loss, {name: p.grad.double() for name, p in named})
    loss, expected = found.pop("port")
    results = {}
    for variant, (own_loss, grads) in found.items():
        whole = torch.cat([g.flatten() for g in expected.values()]).norm()
        overall = float(torch.cat([(grads[name] - g).flatten() for name, g in expected.items()]).norm() / whole)
        # the exact gradient of the attention's to_k.bias is zero
        floor = 1e-6 * whole
        error = {name: float((grads[name] - g).norm() / g.norm().clamp(min=floor)) for name, g in expected.items()}
        worst = max(error, key=error.get)
        results[variant] = {"loss": own_loss, "loss_difference": abs(own_loss - loss), "gradient_error": overall}
        results[variant] |= {"worst_gradient_error": error[worst], "worst_gradient": worst}
    same = results["fp32"]
    if not (same["loss_difference"] < 1e-4 * abs(loss) and same["gradient_error"] < 1e-3):
        raise ValueError(f"port and ours must agree for the same weights and noise, got {same}; one of them is wrong.")
    return results


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(work: Callable, device: str) -> float:
    """Wall-clock time of `work()`, including the queue of the device."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def alternate(works: dict[str, Callable], repeats: int, device: str, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each of `works` in each round; a round calls each of them once, in the given order."""
    for work in works.values():
        for _ in range(warm_up):
            work()
    rounds = [{name: seconds(work, device) for name, work in works.items()} for _ in range(repeats)]
    return {name: [times[name] for times in rounds] for name in works}


def ratio(base: list[float], other: list[float]) -> dict[str, float]:
    """Speedup of `other` over `base`: ratio of the medians, of the fastest steps, and the extremes over the rounds."""
    rounds = [first / second for first, second in zip(base, other, strict=True)]
    value = statistics.median(base) / statistics.median(other)
    results = {"of_medians": value, "of_fastest": min(base) / min(other)}
    return results | {"smallest_round": min(rounds), "largest_round": max(rounds)}


def profile(step: Callable, device: str, top: int = 14) -> list[dict]:
    """Profile of a step: the operations with the largest self time, and their share."""
    on_gpu = device.startswith("cuda")
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            step()
        wait(device)
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, name))
    total = sum(getattr(event, name) for event in events)
    return [
        {"op": e.key, "share": round(getattr(e, name) / total, 4), "calls_per_step": e.count / 3} for e in events[:top]
    ]


def peak_mebibytes(args: argparse.Namespace) -> float:
    """Increase of memory to its peak during one step of `--peak_of`; must be called in a new process."""
    unet, schedule = build(args)
    step = make_step(args.peak_of, unet, schedule, args.device, args.compile, args.force_layout)[1]
    step(draw(args, unet, 1))  # threads, kernels and the optimizer's state
    batch = draw(args, unet)
    if args.device.startswith("cuda"):
        wait(args.device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(batch)
        wait(args.device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts from here
    before = resident("VmRSS")
    step(batch)
    return resident("VmHWM") - before


def resident(which: str) -> float:
    """An entry of this process's /proc status, in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.startswith(which))
    return int(line.split()[1]) / 1024


def peaks(args: argparse.Namespace) -> dict[str, float]:
    """Peak memory of each variant, in MiB."""
    # otherwise the amount of freed memory that malloc keeps depends on the order in which it was freed
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = {}
    for variant in args.variants:
        results = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--peak_of", variant],
            capture_output=True, text=True, check=True, env=environment,
        )  # fmt: skip
        found[variant] = round(float(results.stdout.split()[-1]), 1)
    return found


def report(results: dict) -> str:
    """The printed table of results."""
    rows = [f"{'':<6}{'s/step':>9}{'images/s':>10}{'speed':>8}{'peak MiB':>10}{'memory':>8}{'utilisation':>13}"]
    for name, row in results["variants"].items():
        cells = [f"{name:<6}{row['seconds']:>9.3f}{row['images_per_second']:>10.1f}"]
        cells.append(f"{row['speed_over_port']['of_medians']:>7.2f}×" if "speed_over_port" in row else f"{'':>8}")
        cells.append(f"{row['peak_mebibytes']:>10.1f}" if "peak_mebibytes" in row else f"{'':>10}")
        cells.append(f"{row['memory_over_port']:>7.2f}×" if "memory_over_port" in row else f"{'':>8}")
        cells.append(f"{row['utilisation']:>13.1%}" if "utilisation" in row else "")
        rows.append("".join(cells))
    for name, row in results["variants"].items():
        for line in row.get("profile", []):
            rows.append(f"{name:<6}{line['share']:>7.1%}  {line['op'][:70]} × {line['calls_per_step']:g}")
    return "\n".join(rows)


def main() -> None:
    args = parse_options()
    if args.peak_of:
        print(peak_mebibytes(args))
        return
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    results = {"command": " ".join(["python", *sys.argv]), "machine": f"{name}, {platform.machine()}"}
    results |= {
        "torch": torch.__version__,
        "options": {k: v for k, v in vars(args).items() if k not in ("output", "peak_of")},
    }
    results["load_average_before"] = os.getloadavg()[0]
    has_port = "port" in args.variants
    unet, schedule = build(args)
    results["parameters"] = sum(p.numel() for p in unet.parameters())
    if has_port:
        results["against_port"] = compare(args)
        shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        results["model_flops_per_step"] = args.batch_size * training_cost(unet, shape).flops_per_image
    batch = draw(args, unet)
    steps = {
        v: make_step(v, *copy.deepcopy((unet, schedule)), args.device, args.compile, args.force_layout)[1]
        for v in args.variants
    }
    works = {v: (lambda step=step: step(batch)) for v, step in steps.items()}
    times = alternate(works, args.repeats, args.device)
    memory = {} if args.no_memory else peaks(args)
    results["variants"] = {}
    for v in args.variants:
        middle = statistics.median(times[v])
        row = {"seconds": middle, "images_per_second": args.batch_size / middle, "seconds_of_rounds": times[v]}
        if v in memory:
            row["peak_mebibytes"] = memory[v]
        if has_port:
            # PyTorch multiplies by default in TF32 within convolutions, but not in matrix products
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
            rate = matmul_flops_per_second(args.device, torch.bfloat16 if v == "bf16" else torch.float32)
            torch.backends.cuda.matmul.allow_tf32 = False
            row |= {"matmul_flops_per_second": rate, "utilisation": results["model_flops_per_step"] / middle / rate}
        if has_port and v != "port":
            row["speed_over_port"] = ratio(times["port"], times[v])
            if v in memory:
                row["memory_over_port"] = memory[v] / memory["port"]
        if not args.no_profile:
            row["profile"] = profile(works[v], args.device)
        results["variants"][v] = row
    print(report(results))
    if has_port:
        print(json.dumps(results["against_port"], indent=1))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
