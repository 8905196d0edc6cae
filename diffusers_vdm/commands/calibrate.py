"""Measure a network's mse_ε(γ) on training images: the table behind the best variance and the best timesteps.

    diffusers-vdm calibrate --model runs/digits                           # the bundled digits' training images
    diffusers-vdm calibrate --model runs/digits --detail pixel --variance optimal
    diffusers-vdm calibrate --model runs/x --dataset_name uoft-cs/cifar10 --split train --num_images 2000
    diffusers-vdm calibrate --model google/ddpm-cifar10-32 --dataset_name uoft-cs/cifar10 --output calibration.json

The table goes into the scheduler of the model, a folder that VDMPipeline saved, or with --output into a JSON file for
`evaluate --calibration`. With it, `sample` and `evaluate` take `--variance optimal` and the best timesteps for any
number of steps. Calibrate on training images only: on those of an evaluation, the variance would be fitted to them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..console import errors_in_one_line, tolerate_any_encoding
from ..training.options import POSITIVE, Option, train_option
from .evaluate_options import (
    BATCH_SIZE,
    DATA_SET_OPTIONS,
    IMAGE_OPTIONS,
    MACHINE_OPTIONS,
    MODEL,
    check_condition_options,
    load_data,
    load_model,
    parse_checked,
)
from .processes import evaluation_accelerator

OPTIONS: dict[str, list[Option]] = {
    "model": [MODEL],
    "measurement": [
        Option(
            "detail", ("level", "channel", "pixel"), "one error at each noise level, or one for each channel or pixel"
        ),
        Option("num_gammas", 65, "noise levels of the table", range=(9, 4096)),
        Option("num_draws", 1, "draws of the noise for each image at every level", range=POSITIVE),
        Option("num_images", 1024, "at most this many images, drawn from the split", range=POSITIVE),
        Option(
            "variance", (None, "posterior", "optimal"), "also set the variance that the scheduler uses from now on"
        ),
        train_option("seed"),
    ],
    "data": [
        *DATA_SET_OPTIONS,
        Option("split", "train", "split with the training images, slices allowed: train[:5000]"),
        *IMAGE_OPTIONS,
    ],
    "work": [
        BATCH_SIZE,
        Option("output", str, "JSON file to write instead of the scheduler of the model"),
        *MACHINE_OPTIONS,
    ],
}


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line; wrong arguments end the program before any work starts."""
    args = parse_checked(__doc__ or "", OPTIONS, arguments, check_output)
    args.allow_shared = True  # training images may be in any split
    return args


def check_output(args: argparse.Namespace) -> None:
    """Raises `ValueError` unless the table has a place: the scheduler of the model, or a file."""
    if args.output is None and not Path(args.model, "scheduler", "scheduler_config.json").is_file():
        raise ValueError(
            f"--model must be a folder that VDMPipeline saved, whose scheduler will hold the table, got "
            f"{args.model}; or write a file by --output calibration.json"
        )
    if args.output is not None and args.variance is not None:
        raise ValueError("--variance changes the scheduler of the model, which --output leaves as it is")


def calibrate_model(args: argparse.Namespace) -> None:
    """Measures the table on all processes and writes it."""
    with evaluation_accelerator(args) as accelerator:
        run_calibration(args, accelerator)


def run_calibration(args: argparse.Namespace, accelerator) -> None:
    import torch

    from ..calibration import Calibration
    from ..conditions import rows_of_conditions
    from ..data.conditions import conditions_of
    from ..evaluation.calibrate import calibrate
    from ..files import write_atomically
    from ..gamma_scheduler import GammaScheduler
    from ..randomness import keyed_generator

    unet, scheduler, num_levels, _, class_names = load_model(args.model)
    if args.output is None and not isinstance(scheduler, GammaScheduler):
        raise ValueError(
            f"{args.model} has a {type(scheduler).__name__}, which cannot hold the table; write a file by --output "
            "calibration.json, or convert the model first"
        )
    check_condition_options(args, unet)
    num_classes = unet.config.get("num_class_embeds")
    data = load_data(args, num_levels, num_classes, class_names, accelerator.is_main_process)
    images = data.images
    conditions = conditions_of(unet, images, num_levels, data.labels, data.conditions)
    if args.num_images < len(images):
        chosen = torch.randperm(len(images), generator=keyed_generator(args.seed, "calibration images"))
        chosen = chosen[: args.num_images].sort().values
        images, conditions = images[chosen], rows_of_conditions(conditions, chosen)
    if unet.dtype != torch.float32:
        unet.to(torch.float32)
    table: Calibration = calibrate(
        unet.to(accelerator.device),
        scheduler,
        images,
        num_gammas=args.num_gammas,
        detail=args.detail,
        num_draws=args.num_draws,
        num_levels=num_levels,
        **conditions,
        data=data.name,
        batch_size=args.batch_size,
        seed=args.seed,
        accelerator=accelerator,
        progress_bar=accelerator.is_main_process,
    )
    if not accelerator.is_main_process:
        return
    if args.output is not None:
        path = Path(args.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(table.to_json()) + "\n")
    else:
        path = Path(args.model, "scheduler", "scheduler_config.json")
        changed: dict[str, Any] = {"calibration": table}
        if args.variance is not None:
            changed["variance"] = args.variance
        calibrated: Any = type(scheduler).from_config(scheduler.config, **changed)
        write_atomically(path, calibrated.to_json_string())
    print_table(table, len(images), path)
    given = f" --calibration {args.output}" if args.output is not None else ""
    if args.variance != "optimal":
        uses = "compress uses it; " if args.output is None else ""
        print(f"{uses}evaluate --method vlb --variance optimal{given} measures what it gains")


def print_table(table, num_images: int, path: Path) -> None:
    """Prints some rows of the table, and what it was measured on."""
    what = f"{table.num_draws} draws at each of {len(table.gammas)} levels"
    print(f"\nmse_eps of {num_images} images of {table.data}, {what}")
    level = table.reduced("level")
    for k in range(0, len(level.gammas), max(1, (len(level.gammas) - 1) // 8)):
        print(f"  γ = {float(level.gammas[k]):8.3f}    {float(level.mse[k]):.5f}")
    print(f"written to {path}")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command with the command line or with `arguments`; `SystemExit` names an error in one line."""
    tolerate_any_encoding()
    args = parse_options(arguments)
    with errors_in_one_line("diffusers-vdm calibrate"):
        calibrate_model(args)


if __name__ == "__main__":
    main()
