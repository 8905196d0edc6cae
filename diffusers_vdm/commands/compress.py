"""Compress images into one file, losslessly; each image adds the bound of the model to it.

    diffusers-vdm compress --model runs/digits --output digits.vdm                       # the bundled digits
    diffusers-vdm compress --model user/vdm-cifar10 --data_dir photos --output photos.vdm
    diffusers-vdm compress --model user/vdm-cifar10 --data_dir images.npz --output images.vdm --num_steps 250
    diffusers-vdm decompress --model user/vdm-cifar10 --input photos.vdm --output_dir photos_again

A decoder needs the file and the model. Images of any size are cut into tiles of the model's size. Prints bits/dim of
the file, of an image in it, of the bound, and of other lossless formats. Run `diffusers-vdm calibrate` on the model
first: the file is then smaller, above all with few steps.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..console import tolerate_any_encoding
from ..training.options import Option, train_option
from .codec_options import CONDITIONS, DEVICE_OPTIONS, check_required, load_pipeline, one_line_errors
from .evaluate_options import DATA_SET_OPTIONS, MODEL, digits_of, digits_part
from .options import check_ranges, option_parser

OPTIONS: dict[str, list[Option]] = {
    "model": [MODEL],
    "data": [
        *DATA_SET_OPTIONS[:2],
        Option("data_dir", str, "folder of image files of any size, or an .npz file, instead of --dataset_name"),
        Option("split", "test", "split of the data set; slices such as test[:500] are allowed"),
        train_option("image_column"),
        train_option("cache_dir"),
        CONDITIONS,
    ],
    "code": [
        Option("num_steps", 100, "T, network calls for each image; more give a smaller file", range=(1, 1 << 20)),
        Option("timesteps", (None, "best", "uniform"), "best ones by the model's calibration, or even ones"),
        Option("variance", (None, "posterior", "optimal"), "of a step; defaults to optimal with a calibration"),
        Option("spacing", 1.0, "distance of latents in standard deviations", range=(1 / 64, 4)),
        Option(
            "dtype", ("float64", "float32"), "float32 is faster, and only this machine can decode the file",
        ),
        Option("verify", True, "decode the file in another process before it is written"),
        Option("compare", True, "also compress the images with PNG, WebP and, with imagecodecs, JPEG XL"),
    ],
    "work": [Option("output", str, "file to write"), *DEVICE_OPTIONS],
}  # fmt: skip


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line; wrong arguments end the program before any work starts."""
    parser = option_parser("%(prog)s --model MODEL --output FILE [options], see --help", __doc__ or "", OPTIONS)
    args = parser.parse_args(arguments)
    try:
        check_required(args, "model", "output")
        check_ranges(args, OPTIONS)
        if Path(args.output).is_dir() or not Path(args.output).absolute().parent.is_dir():
            raise ValueError(f"--output must name a file in an existing folder, got {args.output}")
        if args.dataset_name and args.data_dir:
            raise ValueError("give --dataset_name or --data_dir, not both")
        is_array = bool(args.data_dir) and os.path.isfile(args.data_dir) and args.data_dir.endswith(".npz")
        if args.data_dir and not os.path.isdir(args.data_dir) and not is_array:
            raise ValueError(f"--data_dir must be a folder or an .npz file, got {args.data_dir}")
        if args.data_dir and args.split != parser.get_default("split"):
            raise ValueError("--split needs --dataset_name, or the bundled digits")
        if not (args.dataset_name or args.data_dir):
            digits_part(args.split)
    except ValueError as error:
        parser.error(str(error))
    return args


def images_to_compress(args: argparse.Namespace, channels: int) -> Any:
    """The images that the options name."""
    from ..codec import sources

    if args.dataset_name:
        return sources.images_of_dataset(
            args.dataset_name, args.split, channels, config_name=args.dataset_config_name,
            image_column=args.image_column, cache_dir=args.cache_dir,
        )  # fmt: skip
    if args.data_dir is None:
        digits = digits_of(args.split)
        return sources.images_of(digits.images, digits.num_levels)
    if os.path.isdir(args.data_dir):
        return sources.images_of_folder(args.data_dir, channels)
    return sources.images_of_npz(args.data_dir, channels)


def run(args: argparse.Namespace) -> None:
    """Compresses, and prints the summary."""
    from ..codec import compress
    from ..codec.comparison import OtherFormats
    from ..codec.conditions import read_conditions
    from ..codec.model import num_levels_of
    from ..conditions import conditions_needed

    conditions = read_conditions(args.conditions)
    pipe = load_pipeline(args)
    for name in conditions_needed(pipe.unet):
        if name not in conditions:
            raise ValueError(f"--conditions must name a safetensors file with {name}, which this model needs")
    images = images_to_compress(args, pipe.unet.config["in_channels"])
    others = OtherFormats(num_levels_of(pipe))
    if args.compare:
        images = replace(images, pairs=others.watch(images.pairs))
    names = ("num_steps", "timesteps", "variance", "spacing", "dtype", "batch_size", "verify")
    summary = compress(pipe, images, args.output, **{name: getattr(args, name) for name in names}, **conditions)
    print_summary(summary, args.output, others.bpd() if args.compare else {}, others.note, args.conditions)


def print_summary(
    summary: Any, path: str, others: dict[str, float], note: str | None, conditions: str | None = None
) -> None:
    images = f"{summary.num_images} images, {summary.num_values:,} values"
    print(f"{path}: {images}, {summary.file_bytes:,} bytes, encoded in {summary.seconds:.0f} s")
    rows = [("whole file", summary.file_bpd)]
    if summary.is_plain:
        print("  all images have the plain code: it is smaller than the model's code with its initial bits")
    else:
        rows += [
            ("an image in it", summary.marginal_bpd),
            (f"bound, T = {summary.num_steps}", summary.bound_bpd),
        ]
    rows += [*others.items()]
    print("  bits/dim")
    for name, bpd in rows:
        print(f"    {name:<18}{bpd:.4f}{f'  {note}' if note and name in others else ''}")
    missing = [name for name in ("PNG", "WebP", "JPEG XL") if others and name not in others]
    if missing:
        hint = ": pip install imagecodecs" if missing == ["JPEG XL"] else ", or not able to hold these images"
        print(f"    {', '.join(missing)} not measured{hint}")
    if not summary.is_plain:
        plain = f"{summary.num_plain_images} tiles in plain code"
        print(f"  initial bits {summary.initial_bits:,} ({plain}); values near an edge {summary.num_edge_values}")
    and_conditions = "" if conditions is None else f", and {conditions}"
    print(f"  a decoder needs the model: {summary.model_bytes:,} bytes in float32{and_conditions}")
    print("  " + ("another process has decoded it" if summary.verified else "not verified"))


def main(arguments: list[str] | None = None) -> None:
    """Runs the command with the command line or with `arguments`; `SystemExit` names an error in one line."""
    tolerate_any_encoding()
    args = parse_options(arguments)
    with one_line_errors("compress"):
        run(args)


if __name__ == "__main__":
    main()
