"""Load the conditions of images that options name: numbers in columns, other images, or the images made smaller."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from .options import image_arguments


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
    import torch
    from datasets.config import HF_DATASETS_CACHE

    from ..data.conditions import ConditionData, read_vectors
    from ..data.image_sources import open_source
    from ..data.images import ImageSet, load_images
    from ..data.text_table import embed_captions, read_captions

    if not (args.cond_columns or args.cond_image_column or args.upscale_factor or args.caption_column):
        return data
    found = ConditionData(upscale_factor=args.upscale_factor)
    if args.upscale_factor:
        if args.cond_image_column:
            raise ValueError("give --cond_image_column or --upscale_factor, not both: each is the image condition")
        if any(size % args.upscale_factor for size in data.shape[1:]):
            raise ValueError(
                f"--upscale_factor must divide the size of the images, {data.shape[1]}×{data.shape[2]}, got "
                f"{args.upscale_factor}; set --resolution"
            )
    names = ("cond_columns", "cond_image_column", "caption_column")
    columns = next((name for name in names if getattr(args, name)), None)
    path = args.dataset_name or folder
    if columns and path is None:
        raise ValueError(f"--{columns} needs a data set; set --dataset_name")
    if columns and (skip_damaged or args.frames == "all"):
        option = "skip_damaged" if skip_damaged else "frames all"
        raise ValueError(f"--{columns} cannot be used with --{option}, because its rows must be those of the images")
    shared = image_arguments(args, folder, False)
    names = ("config_name", "is_folder", "image_column", "label_column", "cache_dir", "allow_shared")
    if args.cond_columns or args.caption_column:
        rows = open_source(path, split, **{name: shared[name] for name in names}).data
    if args.caption_column:
        captions = read_captions(rows, args.caption_column, f"{path!r} ({split})")
        folder_of_texts = Path(args.cache_dir or HF_DATASETS_CACHE).expanduser() / "embedded_captions"
        texts, chosen = embed_captions(*text_encoder, captions, folder_of_texts, progress_bar)
        first = torch.tensor([each[0] for each in chosen])
        found = replace(found, texts=texts, captions=chosen, text_rows=first)
    if args.cond_columns:
        vectors, vector_names = read_vectors(rows, args.cond_columns, f"{path!r} ({split})")
        found = replace(found, vectors=vectors, vector_names=vector_names)
    if args.cond_image_column:
        other = shared | {"image_column": args.cond_image_column, "image_mode": None}
        images = load_images(path, split, progress_bar=False, **other).images
        if any(a > b for a, b in zip(images.shape[2:], data.shape[1:], strict=True)):
            raise ValueError(
                f"--cond_image_column must have images of at most the size of the others, {data.shape[1]}×"
                f"{data.shape[2]}, got {images.shape[2]}×{images.shape[3]}; set --resolution"
            )
        found = replace(found, images=images)
    if isinstance(data, ImageSet):
        return replace_keeping_fingerprint(data, found)
    data.conditions = found
    return data


def replace_keeping_fingerprint(data: Any, conditions: Any) -> Any:
    """The images with conditions; their fingerprint is not computed again."""
    result = replace(data, conditions=conditions)
    if "fingerprint" in vars(data):
        vars(result)["fingerprint"] = data.fingerprint
    return result
