"""Write the images of a compressed file, with exactly the pixels that they had.

    diffusers-vdm decompress --model user/vdm-cifar10 --input photos.vdm --output_dir photos

Image files come back as PNG under their names, arrays as `images.npz`. No image whose checksum is wrong is written.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..console import tolerate_any_encoding
from ..training.options import Option
from .codec_options import CONDITIONS, DEVICE_OPTIONS, check_required, load_pipeline, one_line_errors
from .evaluate_options import MODEL
from .options import check_ranges, option_parser

OPTIONS: dict[str, list[Option]] = {
    "model": [MODEL],
    "files": [
        Option("input", str, "file of diffusers-vdm compress"),
        Option("output_dir", str, "new or empty folder for the images"),
        CONDITIONS,
        Option("keep", False, "keep the images before a damaged part of the file"),
    ],
    "work": DEVICE_OPTIONS,
}


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line; wrong arguments end the program before any work starts."""
    usage = "%(prog)s --model MODEL --input FILE --output_dir DIR [options], see --help"
    parser = option_parser(usage, __doc__ or "", OPTIONS)
    args = parser.parse_args(arguments)
    try:
        check_required(args, "model", "input", "output_dir")
        check_ranges(args, OPTIONS)
        if not Path(args.input).is_file():
            raise ValueError(f"--input must name a file, got {args.input}")
        folder = Path(args.output_dir)
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise ValueError(f"--output_dir must be a new or empty folder, got {args.output_dir}")
    except ValueError as error:
        parser.error(str(error))
    return args


def run(args: argparse.Namespace) -> None:
    """Decodes the file and writes its images."""
    from ..codec import CodecError, iterate
    from ..codec.conditions import read_conditions
    from ..codec.files import read_header
    from ..codec.sources import file_name, write_array, write_image

    header = read_header(args.input)
    conditions = read_conditions(args.conditions)
    pipe, folder = load_pipeline(args), Path(args.output_dir)
    count, arrays, taken, damage = 0, [], set(), None
    try:
        for entry, image in iterate(pipe, args.input, batch_size=args.batch_size, keep=args.keep, **conditions):
            count += 1
            if header.layout == "files":
                write_image(folder / file_name(entry, taken), image.numpy(), entry)
            else:
                arrays.append(image.numpy())
    except CodecError as error:
        if not args.keep or count == 0:
            raise
        damage = error
    if arrays:
        folder.mkdir(parents=True, exist_ok=True)
        write_array(folder / "images.npz", arrays, header.layout)
    print(f"{count} images in {folder}")
    if damage is not None:
        raise CodecError(f"{damage} The images before the damage are kept.")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command with the command line or with `arguments`; `SystemExit` names an error in one line."""
    tolerate_any_encoding()
    args = parse_options(arguments)
    with one_line_errors("decompress"):
        run(args)


if __name__ == "__main__":
    main()
