"""What the codec costs: sizes at several T, the numbers of other machines, and the time beside the network.

    python benchmarks/codec.py --model runs/digits                    # the bundled digits; calibrate the model first

1. The size of the file and of an image in it, and the bound at the same latents, for each T of --num_steps; and what
   the code costs beyond continuous densities at the same latents, which has almost no noise.
2. The means of p(z_k | z_{k+1}) at the same latents in processes with other threads, batch sizes and instructions: how
   far they move in units of their grid, and how many would be rounded differently without the recorded sides.
3. Images per second, the share of the time that is the network's, and the memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from diffusers_vdm import VDMPipeline, denoiser
from diffusers_vdm.codec import compress, decompress
from diffusers_vdm.codec.files import read_headers
from diffusers_vdm.codec.lattice import PHASES, std_of_class
from diffusers_vdm.codec.model import TOLERANCE, model_to_decode
from diffusers_vdm.codec.network import Steps
from diffusers_vdm.codec.stack import Stack
from diffusers_vdm.data.images import load_digits_split
from diffusers_vdm.evaluation.chain import log_variance
from diffusers_vdm.files import write_atomically

ENVIRONMENTS = {
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "batch size 7": {"BATCH": "7"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "no vector instructions": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41",
                               "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}  # fmt: skip
DTYPES = ("float64", "float32")


def print_row(*cells) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--num_steps", type=int, nargs="+", default=[25, 50, 100])
    parser.add_argument("--spacings", type=float, nargs="+", default=[0.25, 0.5, 1.0, 1.5, 2.0])
    parser.add_argument("--repeats", type=int, default=4, help="orders of the images, for the noise of a code")
    parser.add_argument("--output", type=Path, default=Path("codec.json"))
    parser.add_argument("--means", nargs=3, metavar=("FILE", "DTYPE", "OUT"), help=argparse.SUPPRESS)
    return parser.parse_args()


def write_means(pipe, file: str, dtype: str, output: str) -> None:
    """Saves the means of each step at latents that are drawn from the forward process of the digits."""
    header = read_headers(file)[0].header
    header = type(header)(**vars(header) | {"dtype": dtype})
    model = model_to_decode(pipe, header, int(os.environ.get("BATCH", "64")), {})
    images = load_digits_split()[1].images[:64].reshape(64, -1).numpy().astype(np.int64)
    rng, z, means = np.random.default_rng(0), images, []
    for k in range(header.num_steps):
        center = model.levels.mean_of_next(k, z) if k else model.levels.mean_of_z_0(z)
        z = np.rint(center / 128 + rng.standard_normal(z.shape)).astype(np.int64)  # about one lattice step of noise
        means.append(model.steps(k, z)[0])
    np.save(output, np.stack(means))


def moved_means(args: argparse.Namespace, file: Path, folder: Path) -> list[dict]:
    """How far the means of other processes are from those of this kind of process."""

    def means(name: str, dtype: str, environment: dict[str, str]) -> np.ndarray:
        output = folder / f"{name}_{dtype}.npy"
        command = [sys.executable, __file__, "--model", args.model, "--means", file, dtype, output]
        known = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        subprocess.run(list(map(str, command)), env=os.environ | known | environment, check=True, capture_output=True)
        return np.load(output)

    rows = []
    own = {dtype: means("own", dtype, {}) for dtype in DTYPES}
    for name, environment in ENVIRONMENTS.items():
        row: dict = {"environment": name}
        for dtype in DTYPES:
            other = means(name.replace(" ", "_"), dtype, environment)
            row[f"{dtype}_move"] = float(np.abs(other - own[dtype]).max())
            row[f"{dtype}_roundings"] = int((np.floor(other + 0.5) != np.floor(own[dtype] + 0.5)).sum())
        rows.append(row | {"values": own["float64"].size})
    return rows


def excess_bpd(pipe, images: torch.Tensor, num_steps: int, spacing: float, file: Path) -> float:
    """What the code costs beyond the densities of continuous Gaussians at the same latents, with means as computed.

    It has almost no noise, because both sides have the same draws: lattices, rounding, tables and escapes are left.
    """
    sums, exact = {"code": 0.0, "densities": 0.0, "values": 0}, []
    push, pop, step = Stack.push_gaussian, Stack.pop_gaussian, Steps.__call__

    def densities(values, means, std) -> float:
        return float((0.5 * ((values - means / PHASES) / std) ** 2 + np.log(std * math.sqrt(2 * math.pi))).sum())

    def book(stack: Stack, sign: int, values, means, std) -> None:
        stack.measures = False
        sums["code"] += sign * stack.information.sum()
        sums["densities"] += sign * densities(values, means, std) / math.log(2)

    def pushed(stack: Stack, values, means, classes) -> None:
        stack.measures = True
        push(stack, values, means, classes)
        if exact or not np.ndim(classes):  # others are of the coder's fingerprint
            given = exact.pop() if exact else (means, np.full(len(values), std_of_class(int(classes))))
            book(stack, 1, values, *given)

    def popped(stack: Stack, means, classes, escapes: bool = True):
        stack.measures = True
        values = pop(stack, means, classes, escapes)
        book(stack, -1, values, means, np.full(len(values), std_of_class(int(classes))))
        return values

    def stepped(steps: Steps, k: int, z, x=None):
        found = step(steps, k, z, x)
        log_var = log_variance(steps.chain, k, None, torch.zeros(1, *steps.shape, dtype=torch.float64)).double()
        exact.append((found[0], np.tile(np.exp(0.5 * log_var.numpy().flatten()) / steps.levels.spacing[k], len(z))))
        sums["values"] += z.size if k == 0 else 0
        return found

    Stack.push_gaussian, Stack.pop_gaussian, Steps.__call__ = pushed, popped, stepped
    try:
        compress(pipe, images, file, num_steps=num_steps, spacing=spacing, verify=False, progress_bar=False)
    finally:
        Stack.push_gaussian, Stack.pop_gaussian, Steps.__call__ = push, pop, step
    return (sums["code"] - sums["densities"]) / sums["values"]


def main() -> None:
    args = parse_options()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    pipe = VDMPipeline.from_pretrained(args.model)
    if args.means:
        write_means(pipe, *args.means)
        return
    images = load_digits_split()[1].images
    orders = [torch.randperm(len(images), generator=torch.Generator().manual_seed(i)) for i in range(args.repeats)]
    quiet = {"verify": False, "progress_bar": False}
    result: dict = {"tolerance": TOLERANCE, "num_images": len(images)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def sizes(order: torch.Tensor, **arguments) -> dict[str, float]:
            summary = compress(pipe, images[order], folder / "f", **quiet, **arguments).to_json()
            names = ("file_bpd", "marginal_bpd", "bound_bpd", "initial_bits", "num_edge_values", "file_bytes")
            return {key: summary[key] for key in names}

        def table(title: str, values: list, arguments) -> None:
            print_row(title, "whole file", "an image in it", "bound", "image − bound", "initial bits")
            print_row(*["---"] * 6)
            result[title] = []
            for value in values:
                runs = [sizes(order, **arguments(value)) for order in orders]
                mean = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
                gap = np.array([run["marginal_bpd"] - run["bound_bpd"] for run in runs])
                mean |= {"gap_bpd": float(gap.mean()), "gap_stderr_bpd": float(gap.std(ddof=1) / len(gap) ** 0.5)}
                result[title].append({title: value} | mean)
                numbers = (f"{mean[name]:.4f}" for name in ("file_bpd", "marginal_bpd", "bound_bpd"))
                gap_text = f"{mean['gap_bpd']:+.4f} ± {mean['gap_stderr_bpd']:.4f}"
                print_row(value, *numbers, gap_text, f"{mean['initial_bits']:.0f}")

        table("T", args.num_steps, lambda steps: {"num_steps": steps})
        table("spacing", args.spacings, lambda spacing: {"num_steps": args.num_steps[0], "spacing": spacing})

        print_row("T", "spacing", "excess of the code over continuous densities at the same latents, bits/dim")
        print_row(*["---"] * 3)
        result["excess"] = []
        for steps, spacing in [(steps, 1.0) for steps in args.num_steps] + [(args.num_steps[0], 2.0)]:
            excess = excess_bpd(pipe, images[:60], steps, spacing, folder / "f")
            result["excess"].append({"T": steps, "spacing": spacing, "excess_bpd": excess})
            print_row(steps, spacing, f"{excess:+.5f}")

        compress(pipe, images, folder / "f", num_steps=args.num_steps[0], **quiet)
        result["means"] = moved_means(args, folder / "f", folder)
        print_row("machine", *(f"{dtype}: {what}" for dtype in DTYPES for what in ("largest move", "other roundings")))
        print_row(*["---"] * 5)
        for row in result["means"]:
            cells = [row["environment"]]
            for dtype in DTYPES:
                cells += [f"{row[dtype + '_move']:.1e}", f"{row[dtype + '_roundings']} of {row['values']}"]
            print_row(*cells)

        spent, call = [0.0], denoiser.call_network

        def timed(*arguments, **more):
            start = time.perf_counter()
            output = call(*arguments, **more)
            spent[0] += time.perf_counter() - start
            return output

        denoiser.call_network = timed
        result["speed"] = []
        steps = args.num_steps[0]
        for name, run in {
            "compress": lambda: compress(pipe, images, folder / "f", num_steps=steps, **quiet),
            "decompress": lambda: decompress(pipe, folder / "f", progress_bar=False),
        }.items():
            spent[0], start = 0.0, time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            row = {"what": name, "T": steps, "images_per_second": len(images) / seconds, "network": spent[0] / seconds}
            result["speed"].append(row)
            print(f"{name}, T = {steps}: {row['images_per_second']:.1f} images/s, {row['network']:.1%} in the network")
        result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    write_atomically(args.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
