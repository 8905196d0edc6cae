"""The likelihood of held-out images in bits per dimension, of our models and of diffusers' pixel-space checkpoints.

    accelerate launch examples/evaluate.py --model runs/digits                       # bundled digits, continuous time
    accelerate launch examples/evaluate.py --model runs/digits --method vlb --num_steps 1000      # all 1,000 terms
    accelerate launch examples/evaluate.py --model runs/digits --table 10 50 250 1000             # the bound over T
    accelerate launch examples/evaluate.py --model google/ddpm-cifar10-32 --dataset_name uoft-cs/cifar10 --method vlb

--method mc draws (t, ε) for each image (--num_samples), in continuous time or with --num_steps; --method vlb works out
every term of every image. Writes a report with all that the number must be quoted with, and figures beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder or Hub repository of a VDMPipeline or a pixel-space diffusers pipeline")
    add("--method", choices=("mc", "vlb"), default="mc", help="Monte Carlo, or all terms of T steps (default: mc)")
    add("--num_steps", type=int, help="T; for mc continuous time if not given, for vlb 1000 or all betas")
    add("--num_samples", type=int, default=20, help="draws for each image, of mc (default: 20)")
    add("--table", type=int, nargs="+", metavar="T", help="also estimate the bound at each of these T, and at ∞")
    add("--convention", choices=("vdm", "ddpm"), help="data and decoder of vlb; vdm for our schedulers, else ddpm")
    add("--dataset_name", help="data set on the Hub, or a local copy; the bundled digits if nothing is given")
    add("--dataset_config_name", help="configuration of the data set")
    add("--data_dir", help="folder of image files, instead of --dataset_name")
    add("--split", default="test", help="slices allowed: test[:500] (default: test)")
    add("--image_column", help="found by its type if not given")
    add("--label_column", help="found by its type if not given")
    add("--image_mode", choices=("RGB", "L"), help="convert images to it")
    add("--resolution", type=int, help="resize and crop to squares of this side")
    add("--center_crop", action="store_true", help="crop the middle instead of a place drawn for each image")
    add("--cache_dir", help="cache of data sets")
    add("--batch_size", type=int, default=128, help="default: 128; no number depends on it")
    add("--seed", type=int, default=0, help="key of all randomness (default: 0)")
    add("--output", default="report.json", help="report to write; figures go beside it (default: report.json)")
    add("--num_threads", type=int, help="CPU threads of a process; all cores, shared, if not given")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on a GPU; they move bits/dim")
    o = parser.parse_args(arguments)
    for name in ("num_steps", "num_samples", "batch_size", "resolution", "num_threads"):
        if getattr(o, name) is not None and getattr(o, name) < 1:
            parser.error(f"--{name} must be positive, got {getattr(o, name)}")
    if o.table and min(o.table) < 1:
        parser.error(f"--table must be positive numbers of steps, got {o.table}")
    if o.dataset_name and o.data_dir:
        parser.error("give --dataset_name or --data_dir, not both")
    if o.method == "mc" and o.convention == "ddpm":
        parser.error("--convention ddpm goes with --method vlb")
    if Path(o.output).suffix != ".json":
        parser.error(f"--output must name a .json file, got {o.output}")
    return o


def load_model(name: str):
    """The network, the scheduler and the number of levels of a pipeline."""
    from diffusers import DiffusionPipeline

    from diffusers_vdm import VDMPipeline

    index = VDMPipeline.load_config(name)
    if any(part in index for part in ("vae", "vqvae", "movq", "prior")):
        raise SystemExit(
            f"{name} works on latents of an autoencoder: they are real numbers, not 8-bit pixels, so that no "
            "likelihood of images in bits/dim can be read off it"
        )
    if "unet" not in index or "scheduler" not in index:
        raise SystemExit(f"{name} is a {index.get('_class_name')}, without a unet and a scheduler")
    cls = VDMPipeline if index["_class_name"] == "VDMPipeline" else DiffusionPipeline
    pipe = cls.from_pretrained(name)
    return pipe.unet, pipe.scheduler, pipe.config.get("num_levels", 256)


def load_data(o: argparse.Namespace, num_levels: int, progress_bar: bool):
    from diffusers_vdm import training

    if o.dataset_name is None and o.data_dir is None:
        data = training.load_digits_split()[1]
    else:
        names = ("resolution", "center_crop", "image_mode", "image_column", "label_column", "cache_dir", "seed")
        data = training.load_images(
            o.dataset_name or o.data_dir,
            o.split,
            config_name=o.dataset_config_name,
            is_folder=bool(o.data_dir),
            progress_bar=progress_bar,
            **{name: getattr(o, name) for name in names},
        )
    if data.num_levels != num_levels:
        raise SystemExit(f"the model is of data with {num_levels} levels, {data.name} has {data.num_levels}")
    return data


def main(o: argparse.Namespace) -> None:
    import accelerate
    import diffusers
    import torch

    import diffusers_vdm
    from diffusers_vdm import VariationalBound, evaluate_bound, evaluate_bpd
    from diffusers_vdm.schedulers import GammaScheduler
    from diffusers_vdm.training import write_atomically

    accelerator = accelerate.Accelerator(mixed_precision="no")
    if int(os.environ.get("WORLD_SIZE", 1)) != accelerator.num_processes:
        raise SystemExit("several processes were launched, but each runs alone; set ACCELERATE_USE_CPU=1 on a CPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = o.allow_tf32
    if accelerator.device.type == "cpu":
        torch.set_num_threads(o.num_threads or max(1, os.cpu_count() // accelerator.num_processes))
    bar = accelerator.is_main_process
    unet, scheduler, num_levels = load_model(o.model)
    data = load_data(o, num_levels, bar)
    unet.to(accelerator.device, torch.float32).eval()
    ours = isinstance(scheduler, GammaScheduler)
    if (o.method == "mc" or o.table) and not ours:
        raise SystemExit(
            f"--method mc and --table need one of our schedulers, not {type(scheduler).__name__}; use vlb"
        )
    classes = unet.config.num_class_embeds
    shared = {
        "class_labels": data.labels if classes is not None else None,
        "batch_size": o.batch_size,
        "seed": o.seed,
        "accelerator": accelerator,
        "progress_bar": bar,
    }

    def monte_carlo(num_steps: int | None):
        bound = VariationalBound(
            unet,
            scheduler.noise_schedule(),
            num_timesteps=num_steps,
            num_levels=num_levels,
            prediction_type=scheduler.config.prediction_type,
        ).to(accelerator.device)
        return evaluate_bound(bound, data.images, num_samples=o.num_samples, **shared)

    start = time.perf_counter()
    if o.method == "mc":
        result = monte_carlo(o.num_steps)
        steps, gammas, mse = result.num_timesteps, result.gamma_t, result.mse
        how = {"num_samples": o.num_samples, "convention": "vdm", "decoder": "softmax over the levels at γ_0"}
        stderr_of = "the Monte-Carlo estimate for these images"
    else:
        result = evaluate_bpd(
            unet,
            scheduler,
            data.images,
            num_steps=o.num_steps,
            convention=o.convention,
            num_levels=num_levels,
            **shared,
        )
        steps, gammas, mse = result.num_steps, result.gammas.expand_as(result.mse), result.mse
        decoders = {"vdm": "softmax over the levels at γ_0", "ddpm": "discretised Gaussian at index 0"}
        how = {"convention": result.convention, "decoder": decoders[result.convention]}
        how |= {"clip_sample": result.clip_sample, "variance_type": result.variance_type}
        stderr_of = "the mean over the population of images"
    seconds = time.perf_counter() - start
    table = []
    if o.table:
        for num_steps in [*sorted(o.table), None]:
            row = monte_carlo(num_steps)
            table.append({"num_steps": num_steps, "bpd": row.bpd, "stderr_bpd": row.stderr_bpd})
    if not accelerator.is_main_process:
        return

    finite = lambda value: None if math.isnan(value) else value  # noqa: E731  NaN is no JSON
    modules = (torch, diffusers, accelerate, diffusers_vdm)
    report = {
        "model": o.model,
        "method": o.method,
        "bpd": result.bpd,
        "stderr_bpd": finite(result.stderr_bpd),
        "stderr_is_of": stderr_of,
        **{f"{term}_bpd": getattr(result, f"{term}_bpd") for term in ("prior", "reconstruction", "diffusion")},
        "num_steps": steps,
        "num_images": result.num_images,
        **how,
        "num_levels": num_levels,
        "prediction_type": scheduler.config.prediction_type,
        "scheduler": type(scheduler).__name__,
        "weights": "as saved in the pipeline; train.py saves the averaged ones",
        "dtype": "float32" + (", TF32 products" if o.allow_tf32 else ""),
        "seed": o.seed,
        "data": {"name": data.name, "images": len(data), "fingerprint": data.fingerprint},
        "versions": {module.__name__: module.__version__ for module in modules},
        "num_processes": accelerator.num_processes,
        "seconds": seconds,
        "table": table,
        **curve(gammas, mse),
        "per_image_bpd": result.per_image_bpd.tolist(),
    }
    output = Path(o.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, json.dumps(report, indent=1))
    draw(output, data.images, num_levels, result, gammas, mse)

    name = "continuous time" if steps is None else f"T = {steps}"
    error = "" if report["stderr_bpd"] is None else f" ± {result.stderr_bpd:.4f}"
    print(f"\n{o.model} on {data.name}: {result.num_images} images, {seconds:.0f} s")
    rows = [(f"bits/dim, {name}", f"{result.bpd:.4f}{error}")]
    rows += [(f"  {term}", f"{report[f'{term}_bpd']:.4f}") for term in ("diffusion", "reconstruction", "prior")]
    for row in table:
        label = "∞" if row["num_steps"] is None else row["num_steps"]
        rows.append((f"bound at T = {label}", f"{row['bpd']:.4f} ± {row['stderr_bpd']:.4f}"))
    for label, value in rows:
        print(f"  {label:<36}{value:>18}")
    print(f"± is the standard error of {stderr_of}\nreport and figures: {output.parent or '.'}/{output.stem}*")


def curve(gammas, mse, bins: int = 50) -> dict[str, list[float]]:
    """Means of the squared error over equal shares of the draws, by γ."""
    order = gammas.flatten().argsort()
    parts = min(bins, len(order))
    gamma, error = (values.flatten()[order].tensor_split(parts) for values in (gammas, mse))
    return {"curve_gamma": [float(g.mean()) for g in gamma], "curve_mse": [float(e.mean()) for e in error]}


def draw(output: Path, images, num_levels: int, result, gammas, mse) -> None:
    """The curve over γ, the histogram of bits, and the most and least likely images."""
    from diffusers_vdm import plots

    terms = {n: getattr(result, f"{n}_bpd") for n in ("diffusion", "reconstruction", "prior")}
    plots.plot_loss_by_gamma(gammas, mse, output.with_name(f"{output.stem}_by_gamma.png"), terms_bpd=terms)
    plots.plot_bits_histogram(result.per_image_bpd, output.with_name(f"{output.stem}_histogram.png"))
    if images.shape[1] in (1, 3):
        order = result.per_image_bpd.argsort()
        count = min(16, len(order))
        for name, index in (("likely", order[:count]), ("unlikely", order.flip(0)[:count])):
            grid = plots.image_grid(images[index].float() / (num_levels - 1))
            grid.save(output.with_name(f"{output.stem}_most_{name}.png"))


if __name__ == "__main__":
    main(parse_options())
