"""Bits/dim on held-out images against the computation that training took, for several ways to train.

    python benchmarks/race.py --cifar10 PATH                    # all entries of both data sets, seeds 0 to 2
    python benchmarks/race.py --datasets digits --names default --seeds 0
    python benchmarks/race.py --cifar10 PATH --names fast --budget 4    # four times the FLOPs
    python benchmarks/race.py --fit                                     # the scaling rule of the rows of --output

Every run is `examples/train.py` with the options of its entry in `ENTRIES`, and as many steps as the FLOPs allow:
`--budget` times those of the network of 337,379 parameters after 1,000 steps of 32 images on CIFAR-10, or those of the
preset `digits` after 2,500 steps of 64 on the digits. FLOPs count matrix products, convolutions and attention, forward
and backward (`diffusers_vdm.training.cost`); processor seconds are those of the training process without evaluations.

Runs are kept in `--runs` and continue where they stopped, so an interrupted race is resumed by repeating the command.
`--output` receives a row for each evaluation of each run, and `--figure` the curves.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusers_vdm.files import write_atomically

ROOT = Path(__file__).parents[1]
# FLOPs of one unit of --budget
UNIT = {"cifar10": 32_000 * 2_042_945_536, "digits": 160_000 * 177_426_432}
EVALUATIONS = 8
_PAPER = {"--model_config_name_or_path": ROOT / "benchmarks/results/cifar10_small/config.json"}
_HALF = {"--mixed_precision": "bf16"}  # for processors with AVX512-BF16 or AMX, and GPUs; slower on others
_MUON = {"--optimizer": "muon", "--muon_learning_rate": 0.03, "--learning_rate": 4e-3, "--gamma_learning_rate": 2e-2}
# the arithmetic of plain PyTorch ports of VDM: fixed log-SNR-linear γ, constant learning rate, no half precision
_PORT = {"--schedule": "fixed_linear", "--lr_scheduler": "constant_with_warmup", "--adam_beta2": 0.99,
         "--ema_max_decay": 0.9999, "--mixed_precision": "no"}  # fmt: skip
_KERNELS_3 = {"conv_in_kernel": 3, "conv_out_kernel": 3}
ENTRIES: dict[str, dict[str, dict[str, Any]]] = {
    "cifar10": {
        "port": {**_PAPER, **_PORT, "--learning_rate": 8e-3, "--train_batch_size": 32},
        # the same at other learning rates: `port` has the best of these
        "port-1e-3": {**_PAPER, **_PORT, "--learning_rate": 1e-3, "--train_batch_size": 32},
        "port-2e-3": {**_PAPER, **_PORT, "--learning_rate": 2e-3, "--train_batch_size": 32},
        "port-4e-3": {**_PAPER, **_PORT, "--learning_rate": 4e-3, "--train_batch_size": 32},
        "port-16e-3": {**_PAPER, **_PORT, "--learning_rate": 16e-3, "--train_batch_size": 32},
        "default": {**_PAPER, **_HALF, "--learning_rate": 2e-3, "--ema_max_decay": 0.999, "--train_batch_size": 32},
        "fast": {"--preset": "cifar10-fast", **_HALF},
        # the same with other numbers of channels, for the scaling rule
        "fast-16": {"--preset": "cifar10-fast", "--width": 16, **_HALF},
        "fast-48": {"--preset": "cifar10-fast", "--width": 48, **_HALF},
        "fast-64": {"--preset": "cifar10-fast", "--width": 64, **_HALF},
        # the same with other learning rates of Muon than 0.6/√steps
        "fast-lr-0.005": {"--preset": "cifar10-fast", "--muon_learning_rate": 0.005, **_HALF},
        "fast-lr-0.01": {"--preset": "cifar10-fast", "--muon_learning_rate": 0.01, **_HALF},
        "fast-lr-0.015": {"--preset": "cifar10-fast", "--muon_learning_rate": 0.015, **_HALF},
        "fast-lr-0.02": {"--preset": "cifar10-fast", "--muon_learning_rate": 0.02, **_HALF},
        "fast-lr-0.03": {"--preset": "cifar10-fast", "--muon_learning_rate": 0.03, **_HALF},
        "fast-lr-0.09": {"--preset": "cifar10-fast", "--muon_learning_rate": 0.09, **_HALF},
        "fast-16-lr-0.01": {"--preset": "cifar10-fast", "--width": 16, "--muon_learning_rate": 0.01, **_HALF},
        "fast-16-lr-0.03": {"--preset": "cifar10-fast", "--width": 16, "--muon_learning_rate": 0.03, **_HALF},
        "fast-16-lr-0.09": {"--preset": "cifar10-fast", "--width": 16, "--muon_learning_rate": 0.09, **_HALF},
        "fast-48-lr-0.01": {"--preset": "cifar10-fast", "--width": 48, "--muon_learning_rate": 0.01, **_HALF},
        "fast-48-lr-0.02": {"--preset": "cifar10-fast", "--width": 48, "--muon_learning_rate": 0.02, **_HALF},
        "fast-48-lr-0.03": {"--preset": "cifar10-fast", "--width": 48, "--muon_learning_rate": 0.03, **_HALF},
        "fast-48-lr-0.09": {"--preset": "cifar10-fast", "--width": 48, "--muon_learning_rate": 0.09, **_HALF},
        "fast-64-lr-0.03": {"--preset": "cifar10-fast", "--width": 64, "--muon_learning_rate": 0.03, **_HALF},
        # the same with larger batches, and with another learning rate of AdamW
        "fast-batch-64": {"--preset": "cifar10-fast", "--train_batch_size": 64, **_HALF},
        "fast-batch-128": {"--preset": "cifar10-fast", "--train_batch_size": 128, **_HALF},
        "fast-adam-lr-0.002": {"--preset": "cifar10-fast", "--learning_rate": 2e-3, **_HALF},
        # each part of fast-lr-0.03 taken away, and Muon alone beside the default
        "fast-adamw": {"--preset": "cifar10-fast", "--optimizer": "adamw", **_HALF},
        "fast-no-differences": {"network": {"num_difference_filters": 0}, "--muon_learning_rate": 0.03, **_HALF},
        "fast-no-levels": {"network": {"predict_levels": False}, "--muon_learning_rate": 0.03, **_HALF},
        "default-muon": {**_PAPER, **_HALF, **_MUON, "--ema_max_decay": 0.999, "--train_batch_size": 16},
    },
    "digits": {
        "default": {"--preset": "digits"},
        "fast": {"--preset": "digits-fast"},
        # p(x) ≥ p(c) p(x | c) with the class c of the image, so its bits are log₂ 10 and those of x given c
        "fast-classes": {"--preset": "digits-fast", "--class_conditional": True},
        # the network of the preset before its first and last kernels had one pixel
        "fast-3x3": {"network": _KERNELS_3},
        "fast-classes-3x3": {"network": _KERNELS_3, "--class_conditional": True},
        "fast-no-logits": {"network": {"level_logits": False}},
        "fast-no-augmentation": {"--preset": "digits-fast", "--augmentation_rate": 0.0},
    },
}  # fmt: skip
# entries for the scaling rule, and their channels: those that only choose width, batch and Muon's learning rate
FITTED = {
    name: entry.get("--width", 32)
    for name, entry in ENTRIES["cifar10"].items()
    if "--preset" in entry and not {"--optimizer", "--learning_rate"} & set(entry)
}
COMMON = {"--eval_batch_size": 200, "--num_images": 36, "--ddpm_num_inference_steps": 100, "--logger": "none",
          "--checkpointing_steps": 500, "--checkpoints_total_limit": 1, "--logging_steps": 20}  # fmt: skip


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", choices=sorted(ENTRIES), default=["digits", "cifar10"])
    parser.add_argument("--cifar10", default="uoft-cs/cifar10", help="data set on the Hub, or a local copy of it")
    parser.add_argument("--names", nargs="+", help="entries to run and to draw, in the data sets that have them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=1.0, help="FLOPs, in units of the reference run")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--num_threads", type=int, default=1)
    parser.add_argument("--num_eval_images", type=int, help="held-out images of the last evaluation; all if not given")
    parser.add_argument("--eval_samples", type=int, help="draws for each image in the last one")
    parser.add_argument("--runs", type=Path, default=Path("runs/race"))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "race.json")
    parser.add_argument("--figure", type=Path, help="PNG file of the curves")
    stored = parser.add_mutually_exclusive_group()
    stored.add_argument("--only_plot", action="store_true", help="train nothing, draw the rows of --output")
    stored.add_argument("--fit", action="store_true", help="train nothing, fit the rule of training/scaling.py")
    args = parser.parse_args(arguments)
    if not (0 < args.budget < math.inf):
        parser.error(f"--budget must be positive and finite, got {args.budget}")
    if min(args.seeds) < 0:
        parser.error(f"--seeds must not be negative, got {min(args.seeds)}")
    if args.figure and (args.figure.suffix.lower() != ".png" or not args.figure.parent.is_dir()):
        parser.error(f"--figure must be a .png file in an existing folder, got {args.figure}")
    known = {name for dataset in args.datasets for name in ENTRIES[dataset]}
    unknown = sorted(set(args.names or ()) - known)
    if unknown:
        parser.error(f"--names must be among {sorted(known)} for --datasets {args.datasets}, got {unknown}")
    return args


def runs_of(args: argparse.Namespace) -> list[tuple[str, str, int]]:
    """The data set, the entry and the seed of each run."""
    return [
        (dataset, name, seed)
        for dataset in args.datasets
        for name in ENTRIES[dataset]
        if args.names is None or name in args.names
        for seed in args.seeds
    ]


def train(args: argparse.Namespace, dataset: str, name: str, seed: int) -> list[dict[str, Any]]:
    """Trains one entry, or continues it, and returns its rows."""
    folder = args.runs / f"{dataset}-{name}-x{args.budget:g}-{seed}"
    options = {**COMMON, **ENTRIES[dataset][name], "--seed": seed, "--num_threads": args.num_threads}
    if "network" in options:
        options = with_network(dataset, options, args.runs / "networks" / f"{dataset}-{name}")
    if dataset == "cifar10":
        options |= {"--dataset_name": args.cifar10, "--eval_split": "test", "--max_eval_images": 1000}
        options |= {"--eval_samples": 2}
        if args.num_eval_images:
            options["--eval_split"] = f"test[:{args.num_eval_images}]"
    if args.eval_samples:
        options["--eval_samples"] = args.eval_samples
    options["--max_train_steps"] = steps_for(args.budget * UNIT[dataset], options)
    options["--eval_steps"] = -(-options["--max_train_steps"] // EVALUATIONS)
    command = [sys.executable, ROOT / "examples" / "train.py", "--output_dir", folder]
    command += ["--resume_from_checkpoint", "latest", *arguments_of(options)]
    environment = os.environ | ({"ACCELERATE_USE_CPU": "1"} if args.device == "cpu" else {})
    print(" ".join(map(str, command)), flush=True)
    subprocess.run([str(part) for part in command], check=True, env=environment)
    return rows_of(folder, dataset, name, seed, args.budget)


def with_network(dataset: str, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The options of the fast preset of a data set, for its network with other arguments."""
    from diffusers_vdm import VDMMultiscale2DModel
    from diffusers_vdm.commands.train_options import PRESETS

    VDMMultiscale2DModel.from_preset(f"{dataset}-fast", **options.pop("network")).save_config(folder)
    preset = {f"--{name}": value for name, value in PRESETS[f"{dataset}-fast"].items()}
    return {**preset, **options, "--model_config_name_or_path": folder}


def arguments_of(options: dict[str, Any]) -> list[str]:
    """The command line of these options; one that is true stands alone."""
    return [str(part) for name, value in options.items() for part in ([name] if value is True else [name, value])]


def steps_for(flops: float, options: dict[str, Any]) -> int:
    """The number of steps that fit into these FLOPs, from the cost that train.py states."""
    from diffusers_vdm.commands.train_data import load_data
    from diffusers_vdm.commands.train_options import build, parse_options
    from diffusers_vdm.training.cost import training_cost

    args = parse_options("", arguments_of(options))
    data, _ = load_data(args, progress_bar=False)
    cost = training_cost(build(args, data)[0], data.shape)
    return max(1, int(flops / (cost.flops_per_image * args.train_batch_size)))


def rows_of(folder: Path, dataset: str, name: str, seed: int, budget: float) -> list[dict[str, Any]]:
    """A row for each evaluation in metrics.jsonl; the last one is of all held-out images."""
    rows, seconds = [], 0.0
    # the bits of a class, if the bits of the image are given its class; both data sets have ten, all as frequent
    of_class = math.log2(10) if "--class_conditional" in ENTRIES[dataset][name] else 0.0
    class_bpd = of_class / {"digits": 64, "cifar10": 3072}[dataset]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        seconds += line.get("process_seconds", 0.0)
        if "eval_bpd" in line:
            rows.append(
                {
                    "name": name, "dataset": dataset, "seed": seed, "budget": budget, "is_last": line is lines[-1],
                    "flops": line["train_flops"], "process_seconds": round(seconds, 1), "steps": line["step"],
                    "bpd": line["eval_bpd"] + class_bpd, "stderr_bpd": line["eval_bpd_stderr"],
                    "num_images": line["eval_num_images"], "num_samples": line["eval_num_samples"],
                    "reconstruction_bpd": line["eval_reconstruction_bpd"],
                    **({"class_bpd": class_bpd} if class_bpd else {}),
                }
            )  # fmt: skip
    return rows


def key(row: dict[str, Any]) -> tuple:
    return row["dataset"], row["name"], row["budget"], row["seed"], row["steps"]


def save(path: Path, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds rows to those in the file, instead of earlier rows of the same runs; returns all."""
    rows = list(rows)
    runs = {key(row)[:4] for row in rows}
    kept = stored_rows(path) if path.is_file() else []
    merged = sorted([row for row in kept if key(row)[:4] not in runs] + rows, key=key)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "[\n" + ",\n".join(json.dumps(row) for row in merged) + "\n]\n")
    return merged


def stored_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of --output; exits if there is no such file, or another one."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        for row in rows:
            key(row), row["is_last"], row["bpd"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SystemExit(f"race.py: --output {path} is no list of rows of the race: {error!r}") from error
    return rows


def fitted_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last rows of `FITTED` whose learning rate is within 10 % of the default for their steps.

    Two with the same width, FLOPs, steps and seed are the same experiment, and only one of them counts.
    """
    from diffusers_vdm.training.optimizer import muon_learning_rate

    found: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        if row["dataset"] != "cifar10" or row["name"] not in FITTED or not row["is_last"]:
            continue
        rate = ENTRIES["cifar10"][row["name"]].get("--muon_learning_rate")
        if rate is None or abs(rate / muon_learning_rate(row["steps"]) - 1) < 0.1:
            found.setdefault((FITTED[row["name"]], row["flops"], row["steps"], row["seed"]), row)
    return list(found.values())


def fit(rows: list[dict[str, Any]]) -> Any:
    """Prints and returns the `ScalingRule` that fits [`fitted_rows`] best."""
    import numpy as np
    from scipy.optimize import least_squares

    from diffusers_vdm import VDMMultiscale2DModel
    from diffusers_vdm.training.cost import training_cost
    from diffusers_vdm.training.scaling import ScalingRule

    points, fitted = [], fitted_rows(rows)
    for name, width in FITTED.items():
        channels = (width, 2 * width, 4 * width)
        cost = training_cost(
            VDMMultiscale2DModel.from_preset("cifar10-fast", block_out_channels=channels), (3, 32, 32)
        )
        runs = [row for row in fitted if row["name"] == name]
        seen = [row["flops"] / cost.flops_per_image for row in runs]
        points += [(cost.num_parameters, n, n / row["steps"], row["bpd"]) for n, row in zip(seen, runs, strict=True)]
    if len(points) < 7:
        raise SystemExit(f"race.py: --fit needs at least seven runs of {sorted(FITTED)} on cifar10, got {len(points)}")
    parameters, images, batch, bpd = np.array(points).T

    def residuals(logarithms: np.ndarray) -> np.ndarray:
        return ScalingRule(*np.exp(logarithms), 0.0).expected_bpd(parameters, images, batch) - bpd

    found = least_squares(residuals, np.log([2.5, 0.2, 0.5, 0.2, 0.5, 100.0]))
    error = math.sqrt(2 * found.cost / max(1, len(points) - 6))
    rule = ScalingRule(*(float(f"{value:.4g}") for value in np.exp(found.x)), round(error, 3))
    print(rule)
    for (count, seen, rows_of_step, measured), residual in zip(points, found.fun, strict=True):
        shape = f"{count:>9,} parameters, {seen:>9,.0f} images in batches of {rows_of_step:3.0f}"
        print(f"  {shape}: {measured:.4f}, expected {measured + residual:.4f}")
    return rule


def table(rows: list[dict[str, Any]]) -> str:
    """The last evaluation of each run as a Markdown table, a line for each entry and budget."""
    lines = [
        "| data | entry | FLOPs | processor seconds | bits/dim of each seed | mean |",
        "|---|---|---|---|---|---|",
    ]
    last = [row for row in rows if row["is_last"]]
    for dataset, name, budget in dict.fromkeys(key(row)[:3] for row in last):
        runs = [row for row in last if key(row)[:3] == (dataset, name, budget)]
        bpds = [row["bpd"] for row in runs]
        mean = sum(bpds) / len(bpds)
        error = ""
        if len(bpds) > 1:
            variance = sum((bpd - mean) ** 2 for bpd in bpds) / (len(bpds) - 1)
            error = f" ± {math.sqrt(variance / len(bpds)):.4f}"
        known = sorted(row["process_seconds"] for row in runs if row["process_seconds"] is not None)
        seconds = f"{known[len(known) // 2]:.0f}" if known else "not recorded"
        each = ", ".join(f"{bpd:.4f}" for bpd in bpds)
        lines.append(f"| {dataset} | {name} | {runs[0]['flops']:.3g} | {seconds} | {each} | {mean:.4f}{error} |")
    return "\n".join(lines)


def exponent(value: float, _: Any = None) -> str:
    """2e+13 as 2e13, for a FuncFormatter of matplotlib."""
    return f"{value:.0e}".replace("e+", "e")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Curves of every run, a color for each entry: against FLOPs on the left, processor seconds on the right."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    figure, axes = plt.subplots(len(datasets), 2, figsize=(10, 4 * len(datasets)), squeeze=False)
    for line, dataset in zip(axes, datasets, strict=True):
        names = list(dict.fromkeys(row["name"] for row in rows if row["dataset"] == dataset))
        bpds = [row["bpd"] for row in rows if row["dataset"] == dataset]
        colors = plt.get_cmap("tab10" if len(names) <= 10 else "tab20")
        bottom, top = min(bpds) - 0.05, min(max(bpds) + 0.05, min(bpds) + 1.6)
        for axis, quantity, unit in zip(
            line, ("flops", "process_seconds"), ("FLOPs", "processor seconds"), strict=True
        ):
            for color, name in enumerate(names):
                runs = dict.fromkeys(key(row)[:4] for row in rows if key(row)[:2] == (dataset, name))
                for i, run in enumerate(runs):
                    own = [row for row in rows if key(row)[:4] == run and row[quantity] is not None]
                    # not joined: evaluations during training are of fewer images or draws than the last one
                    for is_last, style in ((False, {"marker": "."}), (True, {"marker": "*", "markersize": 9})):
                        points = [(row[quantity], row["bpd"]) for row in own if row["is_last"] == is_last]
                        label = name if is_last and i == 0 else None
                        if points:
                            axis.plot(
                                *zip(*points, strict=True), color=colors(color), label=label, linewidth=1, **style
                            )
            axis.set_ylim(bottom, top)
            axis.set(xscale="log", xlabel=f"{unit} of training", ylabel="held-out bits/dim", title=dataset)
            low, high = axis.get_xlim()
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 40 * low else (1,)))
            axis.xaxis.set_major_formatter(
                FuncFormatter(exponent if quantity == "flops" else lambda value, _: f"{value:g}")
            )
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3)
        if len(names) <= 6:
            line[0].legend()
        else:
            line[1].legend(bbox_to_anchor=(1.02, 1.02), loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    args = parse_options()
    rows = stored_rows(args.output) if args.output.exists() or args.only_plot or args.fit else []
    if args.fit:
        fit(rows)
        return
    for run in [] if args.only_plot else runs_of(args):
        rows = save(args.output, train(args, *run))
    asked = {(dataset, name) for dataset, name, _ in runs_of(args)}
    rows = [row for row in rows if key(row)[:2] in asked]
    if not rows:
        raise SystemExit(f"race.py: --output {args.output} has no rows of --datasets and --names")
    print(table(rows))
    if args.figure:
        draw(rows, args.figure)


if __name__ == "__main__":
    main()
