"""Show what a compressed file contains, and with its model where the bits went.

    diffusers-vdm inspect photos.vdm
    diffusers-vdm inspect photos.vdm --model user/vdm-cifar10 --output photos.png

With --model, the file is decoded, and a figure shows the bits of each noise level and of each image, the
rate–distortion curve of the model, and x̂ along it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..console import tolerate_any_encoding
from ..training.options import Option
from .codec_options import CONDITIONS, DEVICE_OPTIONS, load_pipeline, one_line_errors
from .evaluate_options import MODEL
from .options import check_ranges, option_parser

OPTIONS: dict[str, list[Option]] = {
    "model": [MODEL],
    "data": [CONDITIONS],
    "work": [Option("output", str, "figure to write, with --model; defaults to FILE.png"), *DEVICE_OPTIONS],
}


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line; wrong arguments end the program before any work starts."""
    parser = option_parser("%(prog)s FILE [options], see --help", __doc__ or "", OPTIONS)
    parser.add_argument("file", help="file of diffusers-vdm compress")
    args = parser.parse_args(arguments)
    try:
        check_ranges(args, OPTIONS)
        if not Path(args.file).is_file():
            raise ValueError(f"FILE must name a file, got {args.file}")
        if args.output is not None and args.model is None:
            raise ValueError("--output needs --model")
        output = Path(args.output or f"{args.file}.png")
        if args.model is not None and (
            output.is_dir()
            or not output.absolute().parent.is_dir()
            or output.suffix.lower() not in (".png", ".pdf", ".svg", ".jpg", ".webp")
        ):
            raise ValueError(f"--output must name a figure, such as bits.png, in an existing folder, got {output}")
    except ValueError as error:
        parser.error(str(error))
    return args


def run(args: argparse.Namespace) -> None:
    """Prints the header and the sizes, and measures with a model."""
    from ..codec.files import read_headers

    reader, segments = read_headers(args.file)
    header = reader.header
    images = [image for segment in segments for image in segment.images]
    values = header.shape[0] * sum(image.height * image.width for image in images)
    message = 4 * sum(segment.num_words for segment in segments)
    sizes = sorted({(image.height, image.width) for image in images})
    shown = ", ".join(f"{height}×{width}" for height, width in sizes[:4]) + (", …" if len(sizes) > 4 else "")
    plain, coded = sum(s.num_plain for s in segments), sum(sum(s.batches) for s in segments)
    levels = "even" if header.levels is None else "chosen"
    rows = {
        "bytes": f"{reader.size:,}, {8 * reader.size / values:.4f} bits/dim",
        "of which messages": f"{message:,} bytes in {len(segments)} segments",
        "images": f"{len(images):,} of {shown} pixels, {header.shape[0]} channels, {header.num_levels} levels",
        "tiles": f"{plain} in plain code, {coded} by the network of {header.shape[1]}×{header.shape[2]}",
        "steps": f"{header.num_steps}, {levels} levels, {header.variance} variance",
        "lattice": f"spacing {header.spacing / 64:g} standard deviations, network in {header.dtype}",
        "written as": header.layout,
        "conditions": ", ".join(header.conditions) or "none",
        "weights": header.weights.hex(),
        "versions": header.versions + " (torch, diffusers, constriction, diffusers-vdm)",
    }
    for name, value in rows.items():
        print(f"  {name:<18}{value}")
    if args.model is not None:
        measure(args, coded)


def measure(args: argparse.Namespace, coded: int) -> None:
    """Decodes the file, prints where the bits went, and draws it."""
    from ..codec.conditions import read_conditions
    from ..codec.inspection import draw, inspect_bits

    if coded == 0:
        print("  all images have the plain code, so there are no noise levels to show")
        return
    conditions = read_conditions(args.conditions)
    found = inspect_bits(load_pipeline(args), args.file, batch_size=args.batch_size, **conditions)
    per_value = found.num_values
    print(f"\n  bits/dim of the {coded} tiles that the network codes")
    print(f"    decoder         {found.decoder_bits / per_value:.4f}")
    steps = len(found.step_bits)
    for low, high in ((k, min(k + -(-steps // 8), steps)) for k in range(0, steps, -(-steps // 8))):
        bits = found.step_bits[low:high].sum() / per_value
        print(f"    γ {found.gammas[low]:7.2f} … {found.gammas[high]:6.2f}  {bits:.4f}")
    print(f"    prior           {found.prior_bits / per_value:.4f}")
    of_image = found.image_bits * len(found.image_bits) / per_value
    print(f"    an image        {of_image.min():.3f} to {of_image.max():.3f}, mean {of_image.mean():.4f}")
    output = args.output or f"{args.file}.png"
    draw(found, output)
    print(f"  figure: {output}")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command with the command line or with `arguments`; `SystemExit` names an error in one line."""
    tolerate_any_encoding()
    args = parse_options(arguments)
    with one_line_errors("inspect"):
        run(args)


if __name__ == "__main__":
    main()
