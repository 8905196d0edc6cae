"""Bits/dim at few steps: even and best timesteps, with the posterior's variance and with the best one.

    python benchmarks/few_steps.py --model runs/digits                      # the bundled digits
    python benchmarks/few_steps.py --model runs/x --dataset_name uoft-cs/cifar10 --num_images 500

mse_ε(γ) is measured on training images of the split --train_split, the bound on images of --split. One row for each
number of steps T; the last row is the limit of many steps, by Monte Carlo in continuous time.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from diffusers_vdm import VariationalBound, VDMPipeline, calibrate, evaluate_mc, evaluate_vlb
from diffusers_vdm.data.images import load_digits_split, load_images
from diffusers_vdm.files import write_atomically


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="folder or repository of a VDMPipeline with one of our schedulers"
    )
    parser.add_argument("--dataset_name", help="default: the bundled digits")
    parser.add_argument("--train_split", default="train", help="default: train")
    parser.add_argument("--split", default="test", help="default: test")
    parser.add_argument("--num_images", type=int, default=297, help="images to measure (default: 297)")
    parser.add_argument("--num_calibration_images", type=int, default=600, help="training images (default: 600)")
    parser.add_argument("--num_gammas", type=int, default=65, help="levels of the calibration (default: 65)")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25, 50, 100], metavar="T")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("few_steps.json"))
    return parser.parse_args()


def main() -> None:
    args = parse_options()
    pipe = VDMPipeline.from_pretrained(args.model).to(args.device)
    scheduler, levels = pipe.scheduler, {"num_levels": pipe.config.num_levels}
    if args.dataset_name is None:
        train, test = load_digits_split()
    else:
        train, test = (load_images(args.dataset_name, split) for split in (args.train_split, args.split))
    images, known = test.images[: args.num_images], {"batch_size": 128, **levels}
    start = time.perf_counter()
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: args.num_calibration_images]
    pixels = calibrate(
        pipe.unet,
        scheduler,
        train.images[chosen],
        num_gammas=args.num_gammas,
        detail="pixel",
        data=train.name,
        **known,
    )
    seconds = time.perf_counter() - start

    def with_table(variance: str, detail: str):
        return type(scheduler).from_config(scheduler.config, variance=variance, calibration=pixels.reduced(detail))

    chains = {
        "uniform": with_table("posterior", "level"),
        "uniform_optimal_level": with_table("optimal", "level"),
        "best": with_table("posterior", "level"),
        "best_optimal_level": with_table("optimal", "level"),
        "best_optimal_pixel": with_table("optimal", "pixel"),
    }
    rows = []
    for num_steps in args.steps:
        row: dict[str, float] = {"num_steps": num_steps}
        for name, chain in chains.items():
            best = name.startswith("best")
            how = {"timesteps": chain.best_timesteps(num_steps)} if best else {"num_steps": num_steps}
            result = evaluate_vlb(pipe.unet, chain, images, **how, **known)
            row |= {f"{name}_bpd": result.bpd, f"{name}_stderr_bpd": result.stderr_bpd}
        rows.append(row)
        print(f"T = {num_steps:<5}", *(f"{name} {row[f'{name}_bpd']:.3f}" for name in chains), flush=True)
    bound = VariationalBound(pipe.unet, scheduler.noise_schedule(), **levels).to(args.device)
    limit = evaluate_mc(bound, images, num_samples=20, batch_size=128)
    print(f"T = ∞     {limit.bpd:.3f} ± {limit.stderr_bpd:.3f} (of the draws)")
    report = {
        "model": Path(args.model).name, "data": test.name, "num_images": len(images),
        "calibration_images": len(chosen), "num_gammas": args.num_gammas, "calibration_seconds": seconds,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu", "rows": rows,
        "limit_bpd": limit.bpd, "limit_stderr_bpd": limit.stderr_bpd,
    }  # fmt: skip
    write_atomically(args.output, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
