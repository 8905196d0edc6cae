"""How close few steps of each sampler come to 1,000 ancestral steps: energy distances between sets of samples.

    python benchmarks/samplers.py --model runs/digits --output runs/samplers

The energy distance of two sets of images, pixels in [0, 1], is 2 E‖x − y‖ − E‖x − x′‖ − E‖y − y′‖ [Székely & Rizzo
2013]. It is estimated without the pairs of an image with itself (a U-statistic), so that its mean is 0 for two sets of
one sampler, and single values may be negative. Each set of --num_images is compared with --num_references images of
1,000 ancestral steps with the variance of the posterior. The noise floor is the distance of two halves of these, for
1,000 random ways to halve them. The spread of a U-statistic of equal distributions is proportional to 1/n + 1/m, which
converts it to the sizes that are compared. The table has (distance − floor) / spread, and the value that 95 % of the
halves stay below.

All samplers start from the same noise, which is independent of that of the references. For a model with a calibration,
ancestral steps also take the best variance, and our samplers the best timesteps. Writes samplers.json, a table in
Markdown, and a figure of grids.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path

import diffusers
import torch

from diffusers_vdm import VDMPipeline, ode
from diffusers_vdm.diffusers_schedulers import EXPORTABLE
from diffusers_vdm.diffusion import decode
from diffusers_vdm.files import write_atomically
from diffusers_vdm.randomness import keyed_generator


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", default="runs/samplers")
    parser.add_argument("--num_images", type=int, default=1000, help="images of each sampler (default: 1000)")
    parser.add_argument("--num_references", type=int, default=2000, help="an even number of images (default: 2000)")
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--reference_steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=125, help="images at a time (default: 125)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Unbiased energy distance of two sets, `(N, ...)` and `(M, ...)`."""
    x, y = x.flatten(1).double(), y.flatten(1).double()
    within = [torch.cdist(a, a).sum() / (len(a) * (len(a) - 1)) for a in (x, y)]
    return float(2 * torch.cdist(x, y).mean() - sum(within))


def distances_of_halves(x: torch.Tensor, num_splits: int = 1000) -> torch.Tensor:
    """Unbiased energy distances of the halves of one set `(2H, ...)`, split at random; shape `(num_splits,)`."""
    half = len(x) // 2
    distances = torch.cdist(x.flatten(1).double(), x.flatten(1).double())
    order = torch.rand(num_splits, len(x), generator=keyed_generator("halves")).argsort(1)
    sign = torch.where(order < half, 1.0, -1.0).double()
    # the sum over all pairs within the halves minus that over pairs between them
    difference, total = ((sign @ distances) * sign).sum(1), distances.sum()
    return (total - difference) / (2 * half**2) - (total + difference) / (2 * half * (half - 1))


def samplers_of(pipe: VDMPipeline) -> dict[str, tuple]:
    """A scheduler for each name, and the timesteps to pass to the pipeline."""
    ours = pipe.scheduler

    def changed(algorithm: str, variance: str = "posterior"):
        return type(ours).from_config(ours.config, algorithm=algorithm, variance=variance)

    samplers = {f"ours, {a}": (changed(a), None) for a in ("ancestral", "ddim", "dpmsolver++")}
    if ours.calibration is not None:
        optimal = changed("ancestral", "optimal")
        samplers["ours, ancestral, optimal variance"] = (optimal, None)
        samplers["ours, ancestral, optimal variance, best timesteps"] = (optimal, "best")
        samplers |= {f"ours, {a}, best timesteps": (changed(a), "best") for a in ("ancestral", "ddim", "dpmsolver++")}
    names = [name for name in EXPORTABLE if "Parallel" not in name]
    return samplers | {name: (ours.to_diffusers(getattr(diffusers, name)), None) for name in names}


def main() -> None:
    args = parse_options()
    # one diffusers scheduler logs for every number of steps that it changes an option; others cause NumPy warnings
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    pipe = VDMPipeline.from_pretrained(args.model).to(args.device)
    pipe.set_progress_bar_config(leave=False)
    ours, samplers = pipe.scheduler, samplers_of(pipe)

    def noise(count: int, name: str) -> torch.Tensor:
        return torch.randn(count, *pipe.image_shape, generator=keyed_generator(name, "z_1")).to(args.device)

    def draw(sampler: tuple, steps: int, count: int, name: str) -> torch.Tensor:
        pipe.scheduler, timesteps = sampler
        arguments = {"num_inference_steps": steps, "timesteps": timesteps, "output_type": "pt"}
        parts = []
        for i, z_1 in enumerate(noise(count, name).split(args.batch_size)):
            generator = keyed_generator(name, "steps", i)
            parts.append(pipe(len(z_1), latents=z_1, generator=generator, **arguments).images.cpu())
        return torch.cat(parts)

    reference = draw(samplers["ours, ancestral"], args.reference_steps, args.num_references, "reference")
    halves = distances_of_halves(reference)
    floor, spread = float(halves.mean()), float(halves.std())
    limit = (float(halves.quantile(0.95)) - floor) / spread
    spread *= (1 / args.num_images + 1 / args.num_references) / (4 / args.num_references)
    print(f"floor {floor:.2e}, spread {spread:.2e}, 95 % of the halves are below {limit:.2f}", flush=True)

    def deviation(images: torch.Tensor) -> float:
        return (energy_distance(images, reference) - floor) / spread

    rows, grids = [], {}
    for name, sampler in samplers.items():
        row = {"sampler": name}
        for steps in args.num_inference_steps:
            images = draw(sampler, steps, args.num_images, "sampler")
            row[str(steps)] = round(deviation(images), 3)
            grids[name, str(steps)] = images[:16]
        rows.append(row)
        print(row, flush=True)
    ode_calls = []
    schedule, known = ours.noise_schedule(), {"prediction_type": ours.config.prediction_type}
    for tolerance in (1e-2, 1e-3):
        z_1 = noise(args.num_images, "sampler")
        solution = ode.sample(pipe.unet, schedule, z_1, rtol=tolerance, atol=tolerance, **known)
        images = decode(solution.z, schedule.ends()[0], pipe.config.num_levels).float().cpu()
        row = {"tolerance": tolerance, "mean_num_calls": float(solution.num_calls.double().mean())}
        ode_calls.append(row | {"deviation": round(deviation(images / (pipe.config.num_levels - 1)), 3)})
    report = {
        "model": Path(args.model).name,
        "calibration": None if ours.calibration is None else ours.calibration.detail,
        "num_images": args.num_images,
        "num_references": args.num_references,
        "reference_steps": args.reference_steps,
        "floor": floor,
        "spread": spread,
        "limit_95_percent": limit,
        "deviation": rows,
        "adaptive_ode": ode_calls,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu",
    }
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "samplers.json", json.dumps(report, indent=1) + "\n")
    columns = [str(steps) for steps in args.num_inference_steps]
    lines = ["| sampler | " + " | ".join(f"{c} steps" for c in columns) + " |", "|---" * (1 + len(columns)) + "|"]
    lines += [f"| {row['sampler']} | " + " | ".join(f"{row[c]:.1f}" for c in columns) + " |" for row in rows]
    table = "\n".join(lines)
    write_atomically(output / "samplers.md", table + "\n")
    print(f"{table}\n{ode_calls}")
    draw_grids(grids, list(samplers), columns, reference[:16], output / "samplers.png")


def draw_grids(grids: dict, names: list[str], columns: list[str], reference: torch.Tensor, path: Path) -> None:
    """Saves a figure with a row for each sampler and a column for each number of steps."""
    from matplotlib.figure import Figure

    from diffusers_vdm.plots import image_grid

    figure = Figure(figsize=(2.0 * (len(columns) + 1), 0.55 * len(names) + 0.4), layout="constrained")
    axes = figure.subplots(len(names), len(columns) + 1, squeeze=False)
    for line, name in zip(axes, names, strict=True):
        pictures = [grids[name, column] for column in columns] + [reference]
        for place, picture, column in zip(line, pictures, [*columns, "1000 ancestral"], strict=True):
            place.imshow(image_grid(picture, columns=8, scale=4), cmap="gray")
            place.set(xticks=[], yticks=[])
            if name == names[0]:
                place.set_title(column, fontsize=7)
        line[0].set_ylabel(name.replace("Scheduler", "").replace("Discrete", ""), fontsize=5, rotation=0, ha="right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{time.perf_counter() - start:.0f} s")
