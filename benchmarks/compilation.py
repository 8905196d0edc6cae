"""Time of a training step with and without torch.compile of the network, as `train.py --compile` does it.

    python benchmarks/compilation.py --mixed_precision bf16 --num_threads 1
    python benchmarks/compilation.py --preset cifar10 --batch_size 128 --mixed_precision bf16 --device cuda

Steps of both alternate in one process, so that they see the same load of the machine. A step is the forward pass of
the bound, the backward pass and AdamW, for fixed images and noise. The first compiled step contains the compilation.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from diffusers_vdm import (
    MULTISCALE_PRESETS,
    UNET_PRESETS,
    MonotoneGammaNetwork,
    VariationalBound,
    VDMMultiscale2DModel,
    VDMUNet2DModel,
)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cifar10-fast", choices=sorted({*MULTISCALE_PRESETS, *UNET_PRESETS}))
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--backend", default="inductor", help="backend of torch.compile")
    parser.add_argument("--mode", help="mode of torch.compile, such as reduce-overhead")
    parser.add_argument("--rounds", type=int, default=15, help="one step of each kind per round")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args(arguments)


def make_step(args: argparse.Namespace, unet: torch.nn.Module):
    """A function that trains a network for one step, and waits for its end."""
    levels = unet.config.get("num_levels", 256)
    schedule = MonotoneGammaNetwork(unet.config.get("gamma_min", -13.3), unet.config.get("gamma_max", 5.0))
    bound = VariationalBound(unet.train(), schedule, num_levels=levels).to(args.device)
    optimizer = torch.optim.AdamW(bound.parameters(), 2e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch_size, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    images = torch.randint(0, levels, shape, generator=generator, dtype=torch.uint8)
    draws = {name: torch.randn(shape, generator=generator) for name in ("eps", "eps_0")}
    draws["t"] = (torch.arange(args.batch_size) + 0.5) / args.batch_size
    images, draws = images.to(args.device), {name: value.to(args.device) for name, value in draws.items()}
    kind = torch.device(args.device).type

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast(kind, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
            loss = bound(images, **draws).loss
        loss.float().backward()
        optimizer.step()
        optimizer.zero_grad()
        if kind == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def main() -> None:
    args = parse_options()
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(0)
    cls = VDMMultiscale2DModel if args.preset in MULTISCALE_PRESETS else VDMUNet2DModel
    plain = cls.from_preset(args.preset)
    compiled = copy.deepcopy(plain)
    compiled.compile(backend=args.backend, mode=args.mode)
    steps = {"plain": make_step(args, plain), "compiled": make_step(args, compiled)}
    first = {name: step() for name, step in steps.items()}
    for step in steps.values():
        step()
    rounds = [{name: step() for name, step in steps.items()} for _ in range(args.rounds)]
    report = {
        "command": " ".join(["python", *sys.argv]),
        "machine": torch.cuda.get_device_name()
        if args.device.startswith("cuda")
        else f"{args.num_threads} CPU threads, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()}",
        "torch": torch.__version__,
        "first_seconds": first,
        "seconds": rounds,
        "speedup": statistics.median(r["plain"] / r["compiled"] for r in rounds),
    }
    for name in steps:
        print(f"{name:<10}{statistics.median(r[name] for r in rounds):8.4f} s a step, the first {first[name]:.1f} s")
    print(f"the compiled network trains {report['speedup']:.2f} times as fast")
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
