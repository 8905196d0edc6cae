"""Load the conditions of images that options name: columns of numbers, texts or images, or the images made smaller."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import image_arguments

if TYPE_CHECKING:
    from ..data.conditions import ConditionData

# the options that name columns of the data set
# the condition that each option gives; all but one are columns of the data
CONDITION_OF = {"cond_columns": "cond_vectors", "cond_image_column": "cond_images",
                "caption_column": "encoder_hidden_states", "upscale_factor": "cond_images"}  # fmt: skip
COLUMNS = tuple(name for name in CONDITION_OF if name != "upscale_factor")


def add_conditions(
    args: argparse.Namespace,
    data: Any,
    folder: str | None,
    split: str,
    skip_damaged: int = 0,
    text_encoder: tuple[Any, Any] | None = None,
    progress_bar: bool = False,
) -> Any:
    """`data` with the conditions that the options name.

    Args:
        args: options of a command, with those of its data set.
        data ([`ImageSet`] or [`ImageStream`]): the images.
        folder (`str`, *optional*): the folder of image files that they are from, if they are.
        split (`str`): their split.
        skip_damaged (`int`, defaults to 0): damaged images that may have been left out of `data`.
        text_encoder (`tuple`, *optional*): the text encoder and its tokenizer, for `--caption_column`.
        progress_bar (`bool`, defaults to `False`): show a tqdm bar while captions are embedded.

    Raises: `ValueError` for columns that the data set does not have, and for values or sizes that cannot be used.
    """
    from ..data.conditions import ConditionData

    columns = [name for name in COLUMNS if getattr(args, name)]
    if not columns and not args.upscale_factor:
        return data
    check_condition_options(args, data, args.dataset_name or folder, columns, skip_damaged)
    found = ConditionData(upscale_factor=args.upscale_factor)
    if columns:
        found = read_columns(args, data, folder, split, found, text_encoder, progress_bar)
    if not hasattr(data, "images"):  # a stream
        data.conditions = found
        return data
    result = replace(data, conditions=found)
    if "fingerprint" in vars(data):  # of the images alone, and slow to compute
        vars(result)["fingerprint"] = data.fingerprint
    return result


def check_condition_options(
    args: argparse.Namespace, data: Any, path: str | None, columns: list[str], skip_damaged: int
) -> None:
    """Raises `ValueError` for conditions that exclude each other or the options of the data."""
    if args.upscale_factor and args.cond_image_column:
        raise ValueError("give --cond_image_column or --upscale_factor, not both: each is the image condition")
    if args.upscale_factor and any(size % args.upscale_factor for size in data.shape[1:]):
        raise ValueError(
            f"--upscale_factor must divide the size of the images, {data.shape[1]}×{data.shape[2]}, got "
            f"{args.upscale_factor}; set --resolution"
        )
    if columns and path is None:
        raise ValueError(f"--{columns[0]} needs a data set; set --dataset_name, or a folder of images")
    if len(set(args.cond_columns or ())) < len(args.cond_columns or ()):
        raise ValueError(f"--cond_columns must be different columns, got {args.cond_columns}")
    if args.cond_image_column and args.cond_image_column == getattr(data, "image_column", None):
        raise ValueError(f"--cond_image_column must not be the column of the images, {args.cond_image_column}")
    if columns and (skip_damaged or args.frames == "all"):
        option = "skip_damaged" if skip_damaged else "frames all"
        raise ValueError(
            f"--{columns[0]} cannot be used with --{option}, because its rows must be those of the images"
        )


def read_columns(
    args: argparse.Namespace,
    data: Any,
    folder: str | None,
    split: str,
    found: ConditionData,
    text_encoder: tuple[Any, Any] | None,
    progress_bar: bool,
) -> ConditionData:
    """`found` with the numbers, texts and images of the columns that the options name."""
    import torch
    from datasets.config import HF_DATASETS_CACHE

    from ..data.conditions import read_vectors
    from ..data.image_sources import open_source
    from ..data.images import load_images
    from ..data.text_table import embed_captions, read_captions

    path, shared = str(args.dataset_name or folder), image_arguments(args, folder, False)
    names = ("config_name", "is_folder", "image_column", "label_column", "cache_dir", "allow_shared")
    rows, where = open_source(path, split, **{name: shared[name] for name in names}).data, f"{path!r} ({split})"
    if args.cond_columns:
        vectors, vector_names = read_vectors(rows, args.cond_columns, where)
        found = replace(found, vectors=vectors, vector_names=vector_names)
    if args.caption_column:
        if text_encoder is None:
            raise ValueError("--caption_column needs a text encoder")
        captions = read_captions(rows, args.caption_column, where)
        files = Path(args.cache_dir or HF_DATASETS_CACHE).expanduser() / "embedded_captions"
        texts, chosen = embed_captions(text_encoder[0], text_encoder[1], captions, files, progress_bar)
        first = torch.tensor([each[0] for each in chosen])
        found = replace(found, texts=texts, captions=chosen, text_rows=first)
    if args.cond_image_column:
        other = shared | {"image_column": args.cond_image_column, "image_mode": None}
        try:
            images = load_images(path, split, progress_bar=False, **other).images
        except ValueError as error:
            raise ValueError(f"--cond_image_column {args.cond_image_column}: {error}") from error
        if any(a > b for a, b in zip(images.shape[2:], data.shape[1:], strict=True)):
            raise ValueError(
                f"--cond_image_column must have images of at most the size of the others, {data.shape[1]}×"
                f"{data.shape[2]}, got {images.shape[2]}×{images.shape[3]}; set --resolution"
            )
        found = replace(found, images=images)
    return found
