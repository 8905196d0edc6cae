"""Cost of evaluation: its speed relative to the bare network, and its memory for several T and numbers of levels.

    python benchmarks/evaluation.py                                            # digits network, CPU
    python benchmarks/evaluation.py --preset cifar10 --batch_size 128 --device cuda

The bare forward pass and `evaluate_vlb` alternate in one process, so that both see the same load of the machine.
Peak memory is measured in a separate process for each setting (resident memory on a CPU, allocated memory on a GPU).
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch

from diffusers_vdm import VDMScheduler, VDMUNet2DModel, evaluate_vlb


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--num_steps", type=int, default=20, help="terms of a timed evaluation")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no_memory", action="store_true", help="do not measure the peak memory")
    parser.add_argument("--memory", nargs=2, type=int, metavar=("T", "LEVELS"), help="only measure the peak memory")
    return parser.parse_args()


def setup(args: argparse.Namespace, num_levels: int = 256):
    torch.manual_seed(0)
    unet = VDMUNet2DModel.from_preset(args.preset).eval().to(args.device)
    size = (unet.config.in_channels, *[unet.config.sample_size] * 2)
    images = torch.randint(0, num_levels, (args.batch_size, *size)).to(
        torch.int32 if num_levels > 256 else torch.uint8
    )
    return unet, VDMScheduler(), images


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(work, device: str) -> float:
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def speed(args: argparse.Namespace) -> dict:
    unet, scheduler, images = setup(args)
    z = torch.randn(images.shape, device=args.device)
    t = torch.tensor(500.0, device=args.device)

    @torch.no_grad()
    def bare():
        for _ in range(args.num_steps):
            unet(z, t, return_dict=False)

    def evaluation():
        evaluate_vlb(unet, scheduler, images, num_steps=args.num_steps, batch_size=args.batch_size, progress_bar=False)

    bare(), evaluation()
    pairs = [(seconds(bare, args.device), seconds(evaluation, args.device)) for _ in range(args.rounds)]
    calls = args.num_steps * args.batch_size
    ratios = sorted(b / e for b, e in pairs)
    return {
        "bare_images_per_second": calls / statistics.median(b for b, _ in pairs),
        "evaluation_images_per_second": calls / statistics.median(e for _, e in pairs),
        "ratio_median": statistics.median(ratios),
        "ratio_smallest_largest": [ratios[0], ratios[-1]],
    }


def peak_mebibytes(args: argparse.Namespace) -> float:
    steps, levels = args.memory
    unet, scheduler, images = setup(args, levels)
    evaluate_vlb(
        unet, scheduler, images, num_steps=steps, num_levels=levels, batch_size=args.batch_size, progress_bar=False
    )
    if args.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    args = parse_options()
    if args.memory:
        print(peak_mebibytes(args))
        return
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    report = {"command": " ".join(sys.argv), "machine": f"{name}, {platform.machine()}", "torch": torch.__version__}
    report |= {"preset": args.preset, "batch_size": args.batch_size, **speed(args), "peak_mebibytes": {}}
    settings = ((5, 256), (50, 256), (200, 256), (5, 2), (5, 4096), (5, 65536))
    for steps, levels in () if args.no_memory else settings:
        flags = [
            "--preset",
            args.preset,
            "--batch_size",
            args.batch_size,
            "--device",
            args.device,
            "--memory",
            steps,
            levels,
        ]
        done = subprocess.run([sys.executable, __file__, *map(str, flags)], capture_output=True, text=True, check=True)
        report["peak_mebibytes"][f"T={steps}, levels={levels}"] = round(float(done.stdout), 1)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
