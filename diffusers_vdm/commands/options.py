"""Shared by the command lines of train.py and evaluate.py: option tables, checks, and arguments for images."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Iterable

from ..training.options import POSITIVE, Option

# aliases: train.py and evaluate.py each accept the other's name for a folder of images
ALIASES = {"train_data_dir": "data_dir", "data_dir": "train_data_dir"}


def add_options(parser: argparse.ArgumentParser, groups: dict[str, list[Option]]) -> None:
    """Adds one argument for each row."""
    for group, rows in groups.items():
        section = parser.add_argument_group(group)
        for row in rows:
            name, default, text = row.name, row.default, row.help
            flags = [f"--{name}", *(f"--{alias}" for alias in [ALIASES.get(name)] if alias)]
            if isinstance(default, bool):
                section.add_argument(
                    *flags,
                    action=argparse.BooleanOptionalAction,
                    default=default,
                    help=f"{text} (default: {default})",
                )
            elif isinstance(default, list):
                section.add_argument(*flags, type=default[0], nargs="+", help=text)
            elif isinstance(default, tuple):
                section.add_argument(*flags, choices=[c for c in default if c], default=default[0], help=text)
            elif isinstance(default, type):
                section.add_argument(*flags, type=default, help=text)
            else:
                section.add_argument(*flags, type=type(default), default=default, help=f"{text} (default: {default})")


def option_parser(usage: str, description: str, groups: dict[str, list[Option]]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage=usage, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, groups)
    return parser


def image_arguments(args: argparse.Namespace, folder: str | None, classes: bool) -> dict:
    """The arguments of `load_images` and `ImageStream`; `folder` is the folder of image files, if any.

    Without `classes`, no label column is searched for, because a data set may have several.
    """
    names = ("resolution", "center_crop", "image_mode", "image_column", "frames", "allow_shared", "cache_dir", "seed")
    return {name: getattr(args, name) for name in names} | {
        "config_name": args.dataset_config_name,
        "is_folder": bool(folder),
        "label_column": "" if args.label_column is None and not classes else args.label_column,
    }


def check_choice(name: str, value: str | None, known: Iterable[str]) -> None:
    if value is not None and value not in known:
        close = difflib.get_close_matches(value, list(known), n=1)
        raise ValueError(
            f"--{name} {value!r} is unknown; "
            + (f"did you mean {close[0]!r}?" if close else f"choose from {sorted(known)}")
        )


def check_ranges(args: argparse.Namespace, groups: dict[str, list[Option]]) -> None:
    """Raises `ValueError` for an option outside its range."""
    for row in (row for rows in groups.values() for row in rows):
        if row.range is None:
            continue
        value, (low, high) = getattr(args, row.name), row.range
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            rule = "positive" if row.range == POSITIVE else f"within [{low}, {high:.4g}]"
            rule += "" if math.isfinite(value) else " and finite"
            raise ValueError(f"--{row.name} must be {rule}, got {value}")
