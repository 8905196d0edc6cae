"""How close few steps of each sampler come to 1,000 ancestral steps: energy distances between sets of samples.

    python benchmarks/samplers.py --model runs/digits --output runs/samplers

The energy distance of two sets of images, pixels in [0, 1], is 2 E‖x − y‖ − E‖x − x′‖ − E‖y − y′‖ [Székely & Rizzo
2013]. The noise floor is the distance between two sets of 1,000 ancestral steps each. All samplers start from the same
noise, which is independent of that of both sets. Writes samplers.json, a table in Markdown, and a figure of grids.
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

from diffusers_vdm import VDMPipeline, VDMScheduler, ode
from diffusers_vdm.diffusers_schedulers import EXPORTABLE
from diffusers_vdm.diffusion import decode
from diffusers_vdm.files import write_atomically
from diffusers_vdm.randomness import keyed_generator


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", default="runs/samplers")
    parser.add_argument("--num_images", type=int, default=400)
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--reference_steps", type=int, default=1000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Energy distance of two sets, `(N, ...)` and `(M, ...)`; the means include pairs of an element with itself."""
    x, y = x.flatten(1).double(), y.flatten(1).double()
    between, within_x, within_y = (torch.cdist(a, b).mean() for a, b in ((x, y), (x, x), (y, y)))
    return float(2 * between - within_x - within_y)


def main() -> None:
    args = parse_options()
    # one diffusers scheduler logs for every number of steps that it changes an option; others cause NumPy warnings
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    pipe = VDMPipeline.from_pretrained(args.model).to(args.device)
    pipe.set_progress_bar_config(leave=False)
    ours = pipe.scheduler
    shape = pipe.image_shape

    def noise(seed: int) -> torch.Tensor:
        rows = [torch.randn(shape, generator=keyed_generator(seed, "z_1", i)) for i in range(args.num_images)]
        return torch.stack(rows).to(args.device)

    def draw(scheduler, steps: int, seed: int) -> torch.Tensor:
        pipe.scheduler = scheduler
        generators = [keyed_generator(seed, "steps", i) for i in range(args.num_images)]
        arguments = {"batch_size": args.num_images, "num_inference_steps": steps, "output_type": "pt"}
        return pipe(latents=noise(seed), generator=generators, **arguments).images.cpu()

    reference, again = (draw(ours, args.reference_steps, seed) for seed in (0, 1))
    floor = energy_distance(reference, again)
    samplers = {
        f"ours, {a}": VDMScheduler.from_config(ours.config, algorithm=a) for a in ("ancestral", "ddim", "dpmsolver++")
    }
    samplers |= {name: ours.to_diffusers(getattr(diffusers, name)) for name in EXPORTABLE if "Parallel" not in name}
    rows, grids = [], {}
    for name, scheduler in samplers.items():
        row = {"sampler": name}
        for steps in args.num_inference_steps:
            images = draw(scheduler, steps, seed=2)
            row[str(steps)] = energy_distance(images, reference) / floor
            grids[name, str(steps)] = images[:16]
        rows.append(row)
        print(row, flush=True)
    ode_calls = []
    row = {"sampler": "ours, adaptive ODE"}
    schedule, known = ours.noise_schedule(), {"prediction_type": ours.config.prediction_type}
    for tolerance, column in ((1e-2, "loose"), (1e-3, "tight")):
        solution = ode.sample(pipe.unet, schedule, noise(2), rtol=tolerance, atol=tolerance, **known)
        images = decode(solution.z, schedule.ends()[0], pipe.config.num_levels).float().cpu() / (
            pipe.config.num_levels - 1
        )
        row[column] = energy_distance(images, reference) / floor
        ode_calls.append(
            {"tolerance": tolerance, "mean_num_calls": float(solution.num_calls.double().mean()), "ratio": row[column]}
        )
    report = {
        "model": args.model,
        "num_images": args.num_images,
        "reference_steps": args.reference_steps,
        "noise_floor": floor,
        "distance_over_floor": rows,
        "adaptive_ode": ode_calls,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "samplers.json", json.dumps(report, indent=1))
    columns = [str(steps) for steps in args.num_inference_steps]
    lines = ["| sampler | " + " | ".join(f"{c} steps" for c in columns) + " |", "|---" * (1 + len(columns)) + "|"]
    lines += [f"| {row['sampler']} | " + " | ".join(f"{row[c]:.2f}" for c in columns) + " |" for row in rows]
    table = "\n".join(lines)
    write_atomically(output / "samplers.md", table + "\n")
    print(f"noise floor {floor:.4f}\n{table}\n{ode_calls}")
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
