"""Variance of the bound's diffusion loss under four noise schedules with the same ends, for one network.

    python benchmarks/variance.py --model runs/digits
    python benchmarks/variance.py --model runs/cifar10 --dataset_name uoft-cs/cifar10 --image_column img --device cuda

In continuous time the bound is the same for every γ(t) with the same ends, but the variance of its estimate is not
[VDM app. H and I, table of Var(BPD)]. The network is conditioned on γ, so it works with the model's γ(t) and with
three others: log-SNR-linear, β-linear (Ho et al. 2020) and α-cosine (Nichol & Dhariwal 2021). Writes JSON and a
figure.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from diffusers_vdm import VariationalBound, VDMPipeline, evaluate_mc, noise_schedule_of
from diffusers_vdm.data.images import ImageSet, load_digits_split, load_images
from diffusers_vdm.files import write_atomically
from diffusers_vdm.noise_schedules import NoiseSchedule
from diffusers_vdm.randomness import key_to_seed, keyed_generator


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub repository of a VDMPipeline")
    parser.add_argument("--dataset_name", help="name on the Hub or local copy; defaults to the bundled digits")
    parser.add_argument("--split", default="test", help="split of the data set; slices allowed: test[:500]")
    parser.add_argument("--image_column", help="defaults to the column of images")
    parser.add_argument("--max_images", type=int, help="use only the first images")
    parser.add_argument("--num_samples", type=int, default=50, help="draws of (t, ε) for each image and schedule")
    parser.add_argument("--batch_size", type=int, default=128, help="images per batch and per lattice of t")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="variance.json")
    parser.add_argument("--figure", default="variance.png")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.num_samples < 2 or args.batch_size < 1 or (args.max_images or 1) < 1:
        parser.error(f"num_samples must be ≥ 2, and batch_size and max_images ≥ 1, got {vars(args)}")
    if not args.dataset_name and (args.split != "test" or args.image_column):
        parser.error("--split and --image_column need a data set; set --dataset_name")
    return args


class LogSNRLinear(NoiseSchedule):
    """γ(s) = s. In this class and its subclasses, s is linear in t between the s of the model's ends."""

    def __init__(self, of_model: NoiseSchedule):
        super().__init__()
        self.of_model = of_model
        self.gammas = torch.stack([end.detach().double().cpu() for end in of_model.ends()])
        self.interval = self.place(self.gammas)

    def place(self, gamma):
        return gamma

    def formula(self, s):
        return s, torch.ones_like(s)

    def ends(self):
        return tuple(self.gammas)

    def gamma_and_slope(self, t, scale_shape_grad=None):
        first, last = self.interval.to(t)
        gamma, slope = self.formula(torch.lerp(first, last, t))
        return gamma.clamp(*self.gammas.to(t)), (last - first) * slope  # rounding must not leave the model's range

    def timestep(self, t, gamma_t):
        return self.of_model.timestep(None, gamma_t)


class BetaLinear(LogSNRLinear):
    """γ(s) = log expm1(B), B = ∫ β ds = β_min s + ½ (β_max − β_min) s²: DDPM in continuous time."""

    low, rise = 0.1, 20 - 0.1

    def place(self, gamma):
        integral = gamma.exp().log1p()
        return 2 * integral / (self.low + (self.low**2 + 2 * self.rise * integral).sqrt())

    def formula(self, s):
        integral = self.low * s + 0.5 * self.rise * s**2
        return integral.expm1().log(), (self.low + self.rise * s) / -(-integral).expm1()


class AlphaCosine(LogSNRLinear):
    """ᾱ = cos² θ, θ = ½π (s + 0.008)/1.008: γ(s) = 2 log tan θ."""

    offset, rate = 0.008, 0.5 * math.pi / 1.008

    def place(self, gamma):
        return (gamma / 2).exp().atan() / self.rate - self.offset

    def formula(self, s):
        angle = self.rate * (s + self.offset)
        return 2 * angle.tan().log(), 4 * self.rate / (2 * angle).sin()


def mean_and_error(values: torch.Tensor) -> list[float]:
    return [float(values.mean()), float(values.std()) / math.sqrt(len(values))]


@torch.no_grad()
def batch_losses(bound: VariationalBound, data: ImageSet, labels, args: argparse.Namespace, seed: int, num: int):
    """The mean diffusion loss of `num` batches as in training: random images, and t on a stratified lattice."""
    bound.eval()
    losses = torch.empty(num, dtype=torch.float64)
    for i in tqdm(range(num), desc="batches", leave=False):
        source = keyed_generator(seed, "batch", i)
        index = torch.randint(len(data), (args.batch_size,), generator=source)
        its = None if labels is None else labels[index].to(args.device)
        losses[i] = bound(data.images[index].to(args.device), class_labels=its, generator=source).diffusion.mean()
    return losses


def measure(bound: VariationalBound, data: ImageSet, labels, args: argparse.Namespace, key: str) -> dict:
    """The results of one schedule, with its own random numbers so that the bounds are independent estimates."""
    seed = key_to_seed(args.seed, key)
    settings = {"num_samples": args.num_samples, "batch_size": args.batch_size, "seed": seed, "device": args.device}
    result = evaluate_mc(bound, data.images, class_labels=labels, **settings)
    loss = result.diffusion_terms_bpd  # the times of one image, over the repeats, are independent and uniform
    batches = batch_losses(bound, data, labels, args, seed, max(2, loss.numel() // args.batch_size))
    # equal shares of the draws sorted by γ are equal shares of t
    shares = loss.flatten()[result.gamma_t.flatten().argsort()].tensor_split(50)
    rms = torch.stack([share.square().mean().sqrt() for share in shares])
    return {
        "bpd": [result.bpd, result.stderr_bpd],
        "diffusion_bpd": result.diffusion_bpd,
        "variance": mean_and_error((loss - loss.mean()).square().mean(1)),
        "variance_of_an_image": mean_and_error(loss.var(0)),
        "batch_variance": mean_and_error((batches - batches.mean()).square() * len(batches) / (len(batches) - 1)),
        "num_batches": len(batches),
        "least_variance": float(rms.mean() ** 2 - loss.mean() ** 2),
        "rms_loss_over_t": rms.tolist(),
        "part_of_its_formula": getattr(bound.noise_schedule, "interval", torch.arange(2.0)).tolist(),
    }


def draw(rows: dict[str, dict], schedules: dict[str, NoiseSchedule], path: str, title: str) -> None:
    """Plots γ(t), and the root mean square of the loss over t, which is constant if the variance is smallest."""
    left, right = (figure := Figure(figsize=(10, 4), layout="constrained")).subplots(1, 2)
    t, middles = torch.linspace(0, 1, 1001, dtype=torch.float64), torch.linspace(0.01, 0.99, 50)  # of the shares
    for (name, row), style in zip(rows.items(), ("-", "--", "-.", ":"), strict=True):
        left.plot(t, schedules[name](t), style, label=name)
        right.plot(middles, row["rms_loss_over_t"], style, label=f"{name}: variance {row['variance'][0]:.3g}")
    right.axhline(rows["model"]["diffusion_bpd"], color="gray", linewidth=0.8, label="mean over t, of all of them")
    left.set(xlabel="t", ylabel="γ = −log SNR", title="four schedules, the same ends")
    right.set(xlabel="t", ylabel="bits/dim", yscale="log", title="√E[L²], L the diffusion loss of an image at t")
    for axes in (left, right):
        axes.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main() -> None:
    args = parse_options()
    for path in (args.output, args.figure):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    pipe = VDMPipeline.from_pretrained(args.model)
    named = args.dataset_name and load_images(args.dataset_name, args.split, image_column=args.image_column)
    data = named or load_digits_split()[1]
    if data.num_levels != pipe.config.num_levels:
        rule = f"num_levels must be the model's {pipe.config.num_levels}, got {data.num_levels} ({data.name})"
        raise ValueError(f"{rule}; choose other data with --dataset_name.")
    data = replace(data, images=data.images[: args.max_images])
    labels = data.labels[: args.max_images] if pipe.unet.config.get("num_class_embeds") is not None else None
    unet, of_model = pipe.unet.to(args.device), noise_schedule_of(pipe.scheduler)
    others = {"log-SNR-linear": LogSNRLinear, "β-linear": BetaLinear, "α-cosine": AlphaCosine}
    schedules = {"model": of_model} | {name: cls(of_model) for name, cls in others.items()}
    options = {"num_levels": data.num_levels, "prediction_type": pipe.scheduler.config.prediction_type}
    bounds = {name: VariationalBound(unet, schedule, **options) for name, schedule in schedules.items()}
    rows = {name: measure(bound, data, labels, args, name) for name, bound in bounds.items()}
    pairs = itertools.combinations([row["bpd"] for row in rows.values()], 2)
    z = max(abs(a - b) / math.hypot(error_a, error_b) for (a, error_a), (b, error_b) in pairs)
    report = {
        **vars(args), "images": data.name, "num_images": len(data.images), "ends": [float(g) for g in of_model.ends()],
        "torch": torch.__version__,
        "units": "bits/dim, variances bits²/dim²; each as [value, standard error]", "largest_z": z, "schedules": rows,
    }  # fmt: skip
    write_atomically(args.output, json.dumps(report, indent=1, ensure_ascii=False))
    draw(rows, schedules, args.figure, f"{data.name}: variance of the bound's diffusion loss (bits²/dim²)")
    print(f"| γ(t) | bits/dim | Var | of a given image | mean of {args.batch_size} |" + "\n|---|---|---|---|---|")
    for name, row in rows.items():
        cells = [f"{row['bpd'][0]:.4f} ± {row['bpd'][1]:.4f}"]
        cells += ["{:.3g} ± {:.1g}".format(*row[key]) for key in row if "variance" in key and key != "least_variance"]
        print("| " + " | ".join([name, *cells]) + " |")
    print(f"least variance that any γ(t) has: {rows['model']['least_variance']:.3g}; largest z of two bounds: {z:.1f}")


if __name__ == "__main__":
    main()
