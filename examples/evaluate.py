"""The likelihood of held-out images in bits per dimension, of our models and of diffusers' pixel-space checkpoints.

    accelerate launch examples/evaluate.py --model runs/digits                       # bundled digits, continuous time
    accelerate launch examples/evaluate.py --model runs/digits --target_stderr 0.002         # until the error is this
    accelerate launch examples/evaluate.py --model runs/digits --table 10 50 250 1000        # the bound over T
    accelerate launch examples/evaluate.py --model runs/digits --method vlb --num_steps 1000 --best_steps 10 25
    accelerate launch examples/evaluate.py --model runs/digits --method ode
    accelerate launch examples/evaluate.py --model google/ddpm-cifar10-32 --dataset_name uoft-cs/cifar10 --method vlb

--method mc draws (t, ε) for each image, in continuous time or with --num_steps; vlb works out every term of every
image; ode solves the probability-flow ODE of every image. Writes a report with all that the number must be quoted
with, and figures beside it. --resume goes on with what an interrupted run of the same command left.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from evaluate_options import load_data, load_model, parse_options

DECODERS = {"vdm": "softmax over the levels at γ_0", "ddpm": "discretised Gaussian at index 0"}


class Evaluation:
    """A model, its data, and the ways to measure it; every measurement keeps its numbers in a folder until the end."""

    def __init__(self, o: argparse.Namespace, accelerator):
        import torch

        from diffusers_vdm import noise_schedule_of

        self.o, self.accelerator = o, accelerator
        self.unet, self.scheduler, self.num_levels, self.weights = load_model(o.model)
        self.data = load_data(o, self.num_levels, accelerator.is_main_process)
        if self.unet.dtype != torch.float32:
            self.unet.to(torch.float32)
        self.unet.to(accelerator.device).eval()
        if o.method != "vlb" or o.table:
            self.noise_schedule = noise_schedule_of(self.scheduler)
        self.prediction_type = self.scheduler.config.get("prediction_type", "epsilon")
        output = Path(o.output)
        self.partial = output.with_name(f"{output.stem}.partial")
        self.shared = {
            "class_labels": self.data.labels if self.unet.config.get("num_class_embeds") is not None else None,
            "batch_size": o.batch_size,
            "seed": o.seed,
            "accelerator": accelerator,
            "progress_bar": accelerator.is_main_process,
        }

    def mc(self, num_steps: int | None, num_samples: int, folder: str, **more):
        from diffusers_vdm import VariationalBound, evaluate_bound

        bound = VariationalBound(
            self.unet,
            self.noise_schedule,
            num_timesteps=num_steps,
            num_levels=self.num_levels,
            prediction_type=self.prediction_type,
        ).to(self.accelerator.device)
        more |= {"num_samples": num_samples, "resume_dir": self.partial / folder}
        return evaluate_bound(bound, self.data.images, **more, **self.shared)

    def vlb(self):
        from diffusers_vdm import evaluate_bpd

        o = self.o
        return evaluate_bpd(
            self.unet,
            self.scheduler,
            self.data.images,
            num_steps=o.num_steps,
            timesteps=o.timesteps,
            convention=o.convention,
            num_levels=self.num_levels,
            resume_dir=self.partial / "vlb",
            **self.shared,
        )

    def ode(self):
        from diffusers_vdm import evaluate_ode

        names = ("dequantization", "num_samples", "num_importance_samples", "divergence", "num_probes", "rtol", "atol")
        return evaluate_ode(
            self.unet,
            self.noise_schedule,
            self.data.images,
            prediction_type=self.prediction_type,
            num_levels=self.num_levels,
            resume_dir=self.partial / "ode",
            **{name: getattr(self.o, name) for name in names},
            **self.shared,
        )


def measure(e: Evaluation) -> tuple[object, dict]:
    """The result of --method, and what a reader must know of it."""
    from diffusers_vdm import best_timesteps

    o = e.o
    if o.method == "mc":
        more = {"target_stderr_bpd": o.target_stderr, "max_samples": o.max_samples}
        more |= {"importance_sampling": o.importance_sampling}
        result = e.mc(o.num_steps, o.num_samples, "mc", **more)
        return result, {
            "num_steps": result.num_timesteps,
            "stderr_is_of": "the Monte-Carlo estimate for these images",
            "num_samples": result.num_samples,
            "importance_sampling": o.importance_sampling,
            "variance_per_call": result.variance_per_call,
            "plain_variance_per_call": result.plain_variance_per_call,
            "convention": "vdm",
            "decoder": DECODERS["vdm"],
            **curve(result.gamma_t, result.mse),
        }
    if o.method == "ode":
        result = e.ode()
        names = ("num_samples", "num_importance_samples", "dequantization", "divergence", "num_probes", "gamma_start",
                 "gamma_end", "rtol", "atol", "draws_stderr_bpd")  # fmt: skip
        return result, {
            "num_steps": None,
            "stderr_is_of": "the mean over the population of images",
            "convention": "vdm",
            **{name: getattr(result, name) for name in names},
            "mean_num_calls": float(result.num_calls.mean()),
        }
    result = e.vlb()
    rows = zip(result.gammas, result.terms_bpd.mean(0), result.terms_bpd.std(0), strict=True)
    root = math.sqrt(result.num_images)
    best = {}
    if o.best_steps:
        found = {steps: best_timesteps(result, steps) for steps in sorted(o.best_steps)}
        best = {"best": [{"num_steps": n, "bpd": bpd, "timesteps": steps} for n, (steps, bpd) in found.items()]}
    return result, {
        "num_steps": result.num_steps,
        "stderr_is_of": "the mean over the population of images",
        "convention": result.convention,
        "decoder": DECODERS[result.convention],
        "clip_sample": result.clip_sample,
        "variance_type": result.variance_type,
        "terms": [{"gamma": float(g), "bpd": float(m), "stderr_bpd": float(s) / root} for g, m, s in rows],
        **curve(result.gammas.expand_as(result.mse), result.mse),
        **best,
    }


def main(o: argparse.Namespace) -> None:
    import accelerate
    import diffusers
    import torch

    import diffusers_vdm
    from diffusers_vdm.files import write_atomically

    accelerator = accelerate.Accelerator(mixed_precision="no")
    if int(os.environ.get("WORLD_SIZE", 1)) != accelerator.num_processes:
        raise SystemExit("several processes were launched, but each runs alone; set ACCELERATE_USE_CPU=1 on a CPU")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: what is done is saved on the way out
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = o.allow_tf32
    if accelerator.device.type == "cpu":
        torch.set_num_threads(o.num_threads or max(1, os.cpu_count() // accelerator.num_processes))
    try:
        e = Evaluation(o, accelerator)
        if accelerator.is_main_process and not o.resume:
            shutil.rmtree(e.partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        start = time.perf_counter()
        result, how = measure(e)
        seconds = time.perf_counter() - start
        table = []
        for num_steps in [*sorted(o.table), None] if o.table else []:
            row = e.mc(num_steps, o.num_samples if o.method == "mc" else 20, f"table-{num_steps}")
            table.append({"num_steps": num_steps, "bpd": row.bpd, "stderr_bpd": row.stderr_bpd})
    except (ValueError, TypeError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    if not accelerator.is_main_process:
        return

    modules = (torch, diffusers, accelerate, diffusers_vdm)
    parts = [term for term in ("diffusion", "reconstruction", "prior") if hasattr(result, f"{term}_bpd")]
    report = {
        "model": o.model,
        "method": o.method,
        "bpd": result.bpd,
        "stderr_bpd": result.stderr_bpd,
        **{f"{term}_bpd": getattr(result, f"{term}_bpd") for term in parts},
        "num_images": result.num_images,
        "num_levels": e.num_levels,
        "prediction_type": e.prediction_type,
        "scheduler": type(e.scheduler).__name__,
        "weights": e.weights,
        "dtype": "float32" + (", TF32 products" if o.allow_tf32 else ""),
        "seed": o.seed,
        "data": {"name": e.data.name, "images": len(e.data), "fingerprint": e.data.fingerprint},
        "versions": {module.__name__: module.__version__ for module in modules},
        "num_processes": accelerator.num_processes,
        "seconds": seconds,
        "table": table,
        **how,
        "per_image_bpd": result.per_image_bpd.tolist(),
    }
    report = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in report.items()}  # NaN is no JSON
    output = Path(o.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, json.dumps(report, indent=1))
    draw(output, e, result, parts)
    shutil.rmtree(e.partial, ignore_errors=True)
    tell(o, e, report, parts)


def tell(o: argparse.Namespace, e: Evaluation, report: dict, parts: list[str]) -> None:
    """The table in the end."""

    def value(row: dict) -> str:
        error = row.get("stderr_bpd")
        return f"{row['bpd']:.4f}" + ("" if error is None or math.isnan(error) else f" ± {error:.4f}")

    name = {"ode": "probability-flow ODE", "mc": "continuous time"}.get(o.method)
    if report["num_steps"] is not None:
        name = f"T = {report['num_steps']}"
    print(f"\n{o.model} on {e.data.name}: {report['num_images']} images, {report['seconds']:.0f} s")
    rows = [(f"bits/dim, {name}", value(report))]
    rows += [(f"  {term}", f"{report[f'{term}_bpd']:.4f}") for term in parts]
    rows += [(f"bound at T = {row['num_steps'] or '∞'}", value(row)) for row in report["table"]]
    rows += [(f"bound with the best {row['num_steps']} timesteps", value(row)) for row in report.get("best", [])]
    if report.get("variance_per_call") is not None:
        rows.append(("variance per network call", f"{report['variance_per_call']:.3g}"))
        rows.append(("  of plain uniform t", f"{report['plain_variance_per_call']:.3g}"))
    if "mean_num_calls" in report:
        rows.append(("network calls of a solve", f"{report['mean_num_calls']:.0f}"))
    for label, text in rows:
        print(f"  {label:<36}{text:>18}")
    output = Path(o.output)
    print(f"± is the standard error of {report['stderr_is_of']}")
    print(f"report and figures: {output.with_name(output.stem)}*")


def curve(gammas, mse, bins: int = 50) -> dict[str, list[float]]:
    """Means of the squared error over equal shares of the draws, by γ."""
    order = gammas.flatten().argsort()
    parts = min(bins, len(order))
    gamma, error = (values.flatten()[order].tensor_split(parts) for values in (gammas, mse))
    return {"curve_gamma": [float(g.mean()) for g in gamma], "curve_mse": [float(e.mean()) for e in error]}


def draw(output: Path, e: Evaluation, result, parts: list[str]) -> None:
    """The curve over γ, the histogram of bits, and the most and least likely images."""
    from diffusers_vdm import plots

    def path(name: str) -> Path:
        return output.with_name(f"{output.stem}_{name}.png")

    if hasattr(result, "mse"):
        gammas = result.gamma_t if hasattr(result, "gamma_t") else result.gammas.expand_as(result.mse)
        terms = {term: getattr(result, f"{term}_bpd") for term in parts}
        plots.plot_loss_by_gamma(gammas, result.mse, path("by_gamma"), terms_bpd=terms)
    plots.plot_bits_histogram(result.per_image_bpd, path("histogram"))
    images = e.data.images
    if images.shape[1] in (1, 3):
        order = result.per_image_bpd.argsort()
        count = min(16, len(order))
        for name, index in (("most_likely", order[:count]), ("most_unlikely", order.flip(0)[:count])):
            plots.image_grid(images[index].float() / (e.num_levels - 1)).save(path(name))


if __name__ == "__main__":
    main(parse_options(__doc__))
