"""The options of evaluate.py, and loading of the model and the data that they specify."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..training.options import POSITIVE, Option, train_option
from .condition_data import CONDITION_OF, add_conditions
from .options import check_ranges, image_arguments, option_parser

# options of the conditions of images, those of the training by default
CONDITION_OPTIONS = tuple(CONDITION_OF)
# rows that calibrate, classify and rank share
MODEL = Option("model", str, "folder or Hub repository of a VDMPipeline or of a pixel-space pipeline of diffusers")
DATA_SET_OPTIONS = [
    Option("dataset_name", str, "data set on the Hub, or a local copy; defaults to the bundled digits"),
    train_option("dataset_config_name"),
    Option("data_dir", str, "folder of image files, instead of --dataset_name"),
]
IMAGE_OPTIONS = [
    *(train_option(name) for name in ("image_column", "label_column", "image_mode", "frames")),
    Option("resolution", int, "resize and crop to squares of this size", range=POSITIVE),
    Option("center_crop", False, "crop the center instead of a position drawn for each image"),
    train_option("cache_dir"),
    *(train_option(name) for name in CONDITION_OPTIONS),
]
ALLOW_SHARED = Option(
    "allow_shared", False, "continue even if images of the split are also in another split of the data set"
)
BATCH_SIZE = Option("batch_size", 128, "images per batch; no result depends on it", range=POSITIVE)
MACHINE_OPTIONS = [
    Option("num_threads", int, "CPU threads per process; defaults to an equal share of the cores", range=POSITIVE),
    Option("allow_tf32", False, "use TF32 matrix products on a GPU, which change bits/dim"),
]
OPTIONS: dict[str, list[Option]] = {
    "model": [MODEL],
    "method": [
        Option(
            "method", ("mc", "vlb", "ode"), "Monte Carlo; all terms of T steps; density of the probability-flow ODE"
        ),
        Option(
            "num_steps", int, "T; defaults to continuous time for mc, and to 1000 or all betas for vlb", range=POSITIVE
        ),
        Option("num_samples", int, "draws for each image; defaults to 20 for mc and 1 for ode", range=POSITIVE),
        Option(
            "target_stderr", float, "mc: draw until the standard error is at most this, in bits/dim", range=POSITIVE
        ),
        Option("max_samples", 1000, "mc: largest number of draws for --target_stderr", range=POSITIVE),
        Option("importance_sampling", False, "mc: draw t more often where the loss was large in a first pass"),
        Option(
            "convention",
            (None, "vdm", "ddpm"),
            "vlb: scaling of the data, and decoder; defaults to vdm for our schedulers, else ddpm",
        ),
        Option(
            "variance",
            (None, "posterior", "optimal"),
            "vlb: variance of a step; optimal is the one with the best bound, by the model's calibration",
        ),
        Option("calibration", str, "vlb: JSON file of calibrate, instead of the calibration of the model"),
        Option("dequantization", ("truncated_normal", "uniform", "decoder"), "ode: how integers become real numbers"),
        Option("num_importance_samples", 1, "ode: K of the importance-weighted bound", range=POSITIVE),
        Option(
            "divergence",
            ("hutchinson", "exact"),
            "ode: random probes, fixed during a solve, or a backward pass for each dimension",
        ),
        Option("num_probes", 1, "ode: number of random probes of hutchinson", range=POSITIVE),
        Option("rtol", 1e-05, "ode: relative tolerance of a step", range=POSITIVE),
        Option("atol", 1e-05, "ode: absolute tolerance of a step, for z and for nats per dimension", range=POSITIVE),
        Option(
            "null_conditions", False, "measure images without their conditions, by the nulls that the network knows"
        ),
        train_option("seed"),
    ],
    "data": [
        *DATA_SET_OPTIONS,
        Option("split", "test", "split to measure; slices such as test[:500] are allowed"),
        *IMAGE_OPTIONS,
        ALLOW_SHARED,
    ],
    "work": [
        BATCH_SIZE,
        Option("output", "report.json", "report to write; figures are written next to it"),
        *MACHINE_OPTIONS,
    ],
}
DIGITS_SPLIT = re.compile(r"(train|test)(?:\[(\d*):(\d*)\])?")
# options of a single method
METHOD_OF = {
    "target_stderr": "mc", "max_samples": "mc", "importance_sampling": "mc",
    "convention": "vlb", "best_steps": "vlb", "timesteps": "vlb", "variance": "vlb", "calibration": "vlb",
    "dequantization": "ode", "num_importance_samples": "ode", "divergence": "ode", "num_probes": "ode", "rtol": "ode",
    "atol": "ode",
}  # fmt: skip


def parse_options(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line; exits on invalid arguments before any work starts."""
    parser = option_parser("%(prog)s --model MODEL [options], see --help", description, OPTIONS)
    add = parser.add_argument
    add(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="continue an interrupted run of the same command, or discard its results; an error if not given",
    )
    add("--table", type=int, nargs="+", metavar="T", help="also estimate the bound at each of these T, and at ∞")
    add("--best_steps", type=int, nargs="+", metavar="T", help="vlb: also find the T timesteps with the best bound")
    add(
        "--timesteps",
        type=timestep,
        nargs="+",
        help="vlb: your own decreasing timesteps, instead of --num_steps; or best, the best --num_steps ones by the "
        "calibration",
    )
    args = parser.parse_args(arguments)
    try:
        check_shared_options(args, OPTIONS)
        for name, method in METHOD_OF.items():
            if getattr(args, name) != parser.get_default(name) and args.method != method:
                raise ValueError(f"--{name} needs --method {method}, got --method {args.method}")
        if args.method == "vlb" and args.num_samples is not None:
            raise ValueError("--num_samples needs --method mc or ode; vlb computes all terms")
        if args.method == "ode" and args.num_steps is not None:
            raise ValueError(
                "--num_steps needs --method mc or vlb; the steps of the ODE follow from --rtol and --atol"
            )
        if args.timesteps and "best" in args.timesteps:
            if len(args.timesteps) > 1 or args.num_steps is None:
                raise ValueError("--timesteps best needs --num_steps, and no other timesteps")
        elif args.timesteps and args.num_steps is not None:
            raise ValueError("give --num_steps or --timesteps, not both")
        if args.calibration and not Path(args.calibration).is_file():
            raise ValueError(f"--calibration must name a JSON file of calibrate, got {args.calibration}")
        if args.target_stderr and args.max_samples < (args.num_samples or 20):
            raise ValueError(
                f"--max_samples {args.max_samples} must be at least --num_samples {args.num_samples or 20}"
            )
        for name in ("table", "best_steps"):
            if getattr(args, name) and min(getattr(args, name)) < 1:
                raise ValueError(f"--{name} must be positive numbers of steps, got {getattr(args, name)}")
    except ValueError as error:
        parser.error(str(error))
    args.num_samples = args.num_samples or {"mc": 20, "vlb": 1, "ode": 1}[args.method]
    return args


def parse_checked(
    description: str,
    groups: dict[str, list[Option]],
    arguments: list[str] | None,
    check: Callable[[argparse.Namespace], None] = lambda args: None,
) -> argparse.Namespace:
    """Parses and checks the options of a command on a model and images; exits before any work if one is wrong."""
    parser = option_parser("%(prog)s --model MODEL [options], see --help", description, groups)
    args = parser.parse_args(arguments)
    try:
        check_shared_options(args, groups)
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def timestep(value: str) -> float | str:  # argparse names it in its message
    return value if value == "best" else float(value)


def check_shared_options(args: argparse.Namespace, groups: dict[str, list[Option]]) -> None:
    """Raises `ValueError` for wrong options among those that evaluate and calibrate share."""
    if args.model is None:
        raise ValueError("--model must name a folder or a repository")
    check_ranges(args, groups)
    ignored = ("dataset_config_name", "image_column", "label_column", "image_mode", "resolution", "center_crop",
               "frames")  # fmt: skip
    if not (args.dataset_name or args.data_dir):
        for name in ignored:
            if getattr(args, name):
                raise ValueError(f"--{name} needs a data set; set --dataset_name or --data_dir")
        digits_part(args.split)
    if args.dataset_name and args.data_dir:
        raise ValueError("give --dataset_name or --data_dir, not both")
    if args.data_dir and not Path(args.data_dir).is_dir():
        raise ValueError(f"--data_dir {args.data_dir} is not a folder")
    if args.output is not None and (Path(args.output).suffix != ".json" or Path(args.output).is_dir()):
        raise ValueError(f"--output must name a .json file, got {args.output}")
    if args.output is not None:
        check_writable("output", args.output)


def check_condition_options(args: argparse.Namespace, unet: Any) -> None:
    """Raises `ValueError` for an option of a condition that the model does not take."""
    from ..conditions import conditions_taken

    for name, condition in CONDITION_OF.items():
        if getattr(args, name) and condition not in conditions_taken(unet):
            raise ValueError(f"--{name} needs a model that takes {condition}, and {args.model} does not")


def check_writable(option: str, path: str) -> None:
    """Raises `ValueError` if a file cannot be written because of its folder, which does not need to exist yet."""
    folder = Path(path).absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"--{option} must be in a folder that can be written, got {path}")


def digits_part(split: str, option: str = "split") -> tuple[bool, slice]:
    """Whether a split of the digits is the held-out one, and which of its images; raises `ValueError` for others."""
    found = DIGITS_SPLIT.fullmatch(split)
    if found is None:
        raise ValueError(f"--{option} of the digits must be train, test or a slice such as test[:50], got {split!r}")
    name, start, stop = found.groups()
    return name == "test", slice(int(start) if start else None, int(stop) if stop else None)


def load_model(name: str):
    """Loads a saved pipeline: (network, scheduler, number of levels, description of the weights, class names)."""
    from .. import VDMPipeline
    from ..registration import pipeline_class
    from ..training.description import read_description

    try:
        index = VDMPipeline.load_config(name)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"--model must be a folder with a model_index.json or a readable repository, got {name}: {error}"
        ) from error
    check_works_on_pixels(index, name)
    if "unet" not in index or "scheduler" not in index:
        raise SystemExit(f"--model must have a unet and a scheduler, got {name}, a {index.get('_class_name')}")
    pipe = pipeline_class(index).from_pretrained(name)
    weights, class_names, run = "as saved in the pipeline", None, read_description(name)
    if run is not None:
        averaged: Any = run.options.get("use_ema")
        weights = {True: "average (EMA)", False: "last step"}.get(averaged, weights)
        class_names = run.class_names
    return pipe.unet, pipe.scheduler, pipe.config.get("num_levels", 256), weights, class_names


def bound_of(unet: Any, scheduler: Any, num_levels: int, device: Any) -> Any:
    """The bound in continuous time of a loaded network, in float32 on `device`."""
    import torch

    from .. import VariationalBound, noise_schedule_of

    return VariationalBound(
        unet.to(device, torch.float32),
        noise_schedule_of(scheduler),
        num_levels=num_levels,
        prediction_type=scheduler.config.get("prediction_type", "epsilon"),
    ).to(device)


def check_works_on_pixels(index: Mapping[str, Any], name: str) -> None:
    """Raises `SystemExit` for a pipeline with an autoencoder, by its model_index.json."""
    if any(part in index for part in ("vae", "vqvae", "movq", "prior")):
        raise SystemExit(
            f"--model must work on pixels, got {name}, which works on latents of an autoencoder: these are real "
            "numbers, so they do not give the likelihood of 8-bit pixels in bits/dim"
        )


def load_data(
    args: argparse.Namespace,
    num_levels: int,
    num_classes: int | None,
    class_names: list[str] | None,
    progress_bar: bool,
    with_conditions: bool = True,
    split_option: str = "split",
):
    """Loads the images to measure, with their classes if the model has `num_classes`, named `class_names` if known.

    Without `with_conditions`, other conditions are left out, even if the model was trained with some. For an
    unknown or an empty split, the error names `split_option`.
    """
    from ..data.image_sources import shared_with_other_splits
    from ..data.images import load_images
    from ..training.description import read_description

    run = read_description(args.model)
    recorded = {} if run is None else run.options
    if args.dataset_name is None and args.data_dir is None:
        data = digits_of(args.split)
        if len(data) == 0:
            raise SystemExit(f"--{split_option} {args.split} of the digits has no images; choose another slice")
    else:
        path, shared = (
            args.dataset_name or args.data_dir,
            image_arguments(args, args.data_dir, num_classes is not None),
        )
        try:
            data = load_images(path, args.split, progress_bar=progress_bar, **shared)
            if not args.allow_shared:
                names = ("config_name", "is_folder", "image_column", "label_column", "cache_dir")
                same = {name: shared[name] for name in names}
                found = shared_with_other_splits(path, args.split, progress_bar=progress_bar, **same)
                if found:
                    raise ValueError(
                        f"images of {data.name} are also in other splits of the data set: {found}. If the model was "
                        "trained on those, the result is not held out; set --allow_shared to measure it anyway"
                    )
        except (ValueError, OSError) as error:
            hint = (
                f" Set --{split_option}, slices are allowed: 'train[:1000]'." if "nknown split" in str(error) else ""
            )
            raise SystemExit(f"the data: {error}{hint}") from error
    for name in CONDITION_OPTIONS:
        given, trained = getattr(args, name), recorded.get(name)
        # another data set may have its texts and images in another column, but the numbers must be the same ones
        if name in ("cond_columns", "upscale_factor") and given and trained and given != trained:
            raise SystemExit(f"--{name} must be that of the training, {trained}, or left out, got {given}")
        setattr(args, name, given or trained)
    try:
        if not with_conditions:
            args = argparse.Namespace(**vars(args) | dict.fromkeys(CONDITION_OPTIONS))
        encoder = text_encoder_of(args.model) if args.caption_column else None
        data = add_conditions(args, data, args.data_dir, args.split, 0, encoder, progress_bar)
    except (ValueError, OSError) as error:
        raise SystemExit(f"the conditions: {error}") from error
    if data.num_levels != num_levels:
        raise SystemExit(
            f"the data must have the {num_levels} levels of the model, but {data.name} has {data.num_levels}"
        )
    if num_classes is not None and data.labels is not None:
        check_classes(data, num_classes, class_names)
        if not class_names and data.class_names and progress_bar:
            print("the model has no class names, so classes are compared by index:", ", ".join(data.class_names))
    if num_classes is not None and data.labels is None and progress_bar:
        print(f"{data.name} has no classes: this model with {num_classes} classes is measured without them")
    return data


def text_encoder_of(model: str) -> tuple[Any, Any]:
    """The text encoder and the tokenizer of a pipeline."""
    from .. import VDMPipeline

    pipe = VDMPipeline.from_pretrained(model, unet=None)
    if pipe.text_encoder is None:
        raise ValueError(f"--caption_column needs a model with a text encoder, and {model} has none")
    return pipe.text_encoder, pipe.tokenizer


def digits_of(split: str):
    """The bundled digits of `"train"` or `"test"`, or a slice like `"test[:50]"`."""
    from ..data.images import load_digits_split

    is_test, part = digits_part(split)
    data = load_digits_split()[is_test]
    if part == slice(None):
        return data
    labels = None if data.labels is None else data.labels[part]
    return replace(data, images=data.images[part], labels=labels, name=f"{data.name}, {split}")


def check_classes(data, num_classes: int, class_names: list[str] | None) -> None:
    """Raises `SystemExit` unless labels have the same meaning in the data and in the model."""
    highest = int(data.labels.max())
    if highest >= num_classes:
        raise SystemExit(
            f"the model has {num_classes} classes, and {data.name} has images of class {highest}, which it does not "
            "know. Remove these images, or measure without classes by --label_column ''"
        )
    if class_names and data.class_names and list(class_names) != list(data.class_names):
        raise SystemExit(
            f"the model was trained with the classes {list(class_names)}, and {data.name} has "
            f"{list(data.class_names)}: a label would mean another class. Use the same names, or measure "
            "without classes by --label_column ''"
        )
    names = data.class_names or ()
    numbers = [int(name) for name in names if name.isdecimal()]
    misleading = len(numbers) == len(names) and numbers != list(range(len(names)))
    if not class_names and names and (len(names) != num_classes or misleading):
        raise SystemExit(
            f"the model has {num_classes} classes, and {data.name} has {len(data.class_names)} "
            f"({', '.join(data.class_names[:10])}, …): their indices may have other meanings. Measure without classes "
            "by --label_column ''"
        )
