"""Overhead of the training loop of examples/train.py over a bare forward, backward and optimizer step, in one run.

    python benchmarks/train_loop.py --output benchmarks/results/train_loop_cpu.json
    python benchmarks/train_loop.py --preset cifar10 --train_batch_size 128 --mixed_precision bf16

A step of the loop also assembles the keyed batch (on threads), clips the gradients, skips non-finite steps,
accumulates the losses, and updates the averaged weights. Both alternate on the same network; the overhead is the
median over the rounds of the ratio of their times, minus one.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", help="preset of the network; defaults to 64 channels × 4 blocks at 32×32")
    parser.add_argument("--train_batch_size", type=int, default=32)
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--steps", type=int, default=4, help="steps of each kind per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--num_threads", type=int)
    parser.add_argument("--output", help="JSON file to write")
    return parser.parse_args()


def main() -> None:
    args = parse_options()
    from diffusers_vdm import MonotoneGammaNetwork, VDMUNet2DModel
    from diffusers_vdm.commands.train_loop import set_up
    from diffusers_vdm.commands.train_options import parse_options as parse_training
    from diffusers_vdm.data.images import ImageSet
    from diffusers_vdm.training.run import Run
    from diffusers_vdm.unet import unet_preset

    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--output_dir", folder, "--train_batch_size", args.train_batch_size, "--logger", "none",
                     "--max_train_steps", 10**6, "--mixed_precision", args.mixed_precision]  # fmt: skip
        options = parse_training("", [str(a) for a in arguments])
        options.num_threads = args.num_threads
        accelerator, _ = set_up(options)
        small = {"block_out_channels": (64,), "layers_per_block": 4, "attention_head_dim": 64}
        unet = VDMUNet2DModel(**(unet_preset(args.preset) if args.preset else unet_preset("cifar10", **small)))
        shape = (2000, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        run = Run(
            options, accelerator, ImageSet(images, None, 256, "noise"), unet, MonotoneGammaNetwork(learn_ends=True)
        )
        run.objective.train()
        batches = run.batches()
        fixed = {name: tensor.to(accelerator.device) for name, tensor in next(batches)[1].items()}

        def bare() -> None:
            accelerator.backward(run.wrapped(**fixed).loss)
            run.optimizer.step()
            run.optimizer.zero_grad()

        def loop() -> None:
            run.fetch(batches)
            run.train_step()

        def seconds(work) -> float:
            clock = time.perf_counter()
            for _ in range(args.steps):
                work()
            if accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            return (time.perf_counter() - clock) / args.steps

        works = {"bare": bare, "loop": loop}
        for work in works.values():
            seconds(work)
        rounds = [{name: seconds(work) for name, work in works.items()} for _ in range(args.rounds)]
    report = {
        "command": " ".join(["python", *sys.argv]),
        "machine": torch.cuda.get_device_name()
        if accelerator.device.type == "cuda"
        else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": rounds,
        "overhead": statistics.median(r["loop"] / r["bare"] for r in rounds) - 1,
    }
    for name in works:
        print(f"{name:<6}{statistics.median(r[name] for r in rounds):8.4f} s a step")
    print(f"the loop adds {100 * report['overhead']:.1f} %")
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
