"""Load the training and the held-out images of train.py."""

from __future__ import annotations

import argparse
import math

from .condition_data import COLUMNS, add_conditions
from .options import image_arguments


def load_data(args: argparse.Namespace, progress_bar: bool):
    """Loads and checks the training and the held-out images."""
    train, test = with_conditions(args, *_load(args, progress_bar), progress_bar)
    _, height, width = train.shape or (0, 0, 0)
    if args.random_rotation and height != width:
        raise ValueError(f"--random_rotation needs square images, got {train.shape}; set --resolution")
    if args.random_shift >= min(height, width):
        raise ValueError(
            f"--random_shift must be below the size of the images, {height}×{width}, got {args.random_shift}; use a "
            "few pixels"
        )
    if args.class_conditional:
        check_classes(train, test)
    if not args.allow_shared:
        check_shared(train, test)
    return train, test


def with_conditions(args: argparse.Namespace, train, test, progress_bar: bool):
    """The training and the held-out images with the conditions that the options name, beside the classes."""
    names = [name for name in COLUMNS if getattr(args, name)]
    if args.streaming and names:
        raise ValueError(f"--{names[0]} cannot be used with --streaming, which reads only images and classes")
    splits = ((train, args.train_split, args.skip_damaged), (test, args.eval_split, 0))
    encoder = None
    if args.caption_column:
        from ..data.text_table import load_text_encoder

        try:
            encoder = load_text_encoder(args.text_encoder)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"--text_encoder must be a folder or a repository with an encoder and a tokenizer of transformers, "
                f"got {args.text_encoder!r} ({reason})"
            ) from error
    folder = args.train_data_dir
    train, test = (
        add_conditions(args, data, folder, split, skip, encoder, progress_bar) for data, split, skip in splits
    )
    if train.conditions is not None and train.conditions.images is not None and args.random_shift:
        raise ValueError("--random_shift cannot be used with --cond_image_column, whose images it does not move")
    return train, test


def check_classes(train, test) -> None:
    """Raises `ValueError` if the held-out images have classes that the network will not know."""
    if train.num_classes is None:
        raise ValueError(
            f"--class_conditional: {train.name} has no classes; set --label_column to their column, which must be a "
            f"ClassLabel with --streaming ({train.files})"
        )
    if test.labels is None:
        raise ValueError(
            f"--class_conditional: {test.name} has no classes; set --eval_split to a split with classes ({test.files})"
        )
    names = test.class_names or train.class_names or {}
    held_out = set(test.labels.tolist())
    known = train.classes_in_split if train.classes_in_split is not None else set(range(train.num_classes))
    unknown = [
        f"{label} ({names[label]})" if label < len(names) else str(label) for label in sorted(held_out - set(known))
    ]
    if unknown or (train.class_names and test.class_names and train.class_names != test.class_names):
        raise ValueError(
            f"--class_conditional: {test.name} has classes that {train.name} does not have: "
            f"{', '.join(unknown) or test.class_names}; remove their images, or set another --eval_split"
        )


def check_shared(train, test) -> None:
    """Raises `ValueError` if a held-out image is a training image, by its place in the data set or by its pixels."""
    from ..data.image_sources import overlap
    from ..data.images import ImageSet, count_shared

    shared = overlap(train.parts, test.parts)
    if not shared and isinstance(train, ImageSet):
        shared = count_shared(train, test)
    if shared:
        raise ValueError(
            f"{'all' if shared == math.inf else shared} of the held-out images, {test.name}, are among the training "
            f"images, {train.name}: their bits/dim would not be held out. Use other splits, or set --allow_shared"
        )


def _load(args: argparse.Namespace, progress_bar: bool):
    from ..data.image_stream import ImageStream
    from ..data.images import load_digits_split, load_images

    if args.digits:
        return load_digits_split()
    shared = image_arguments(args, args.train_data_dir, args.class_conditional) | {
        "num_workers": args.dataloader_num_workers
    }
    path = args.dataset_name or args.train_data_dir
    damage = {"skip_damaged": args.skip_damaged}
    try:
        if not args.streaming:
            shared |= {"progress_bar": progress_bar, "decoded_cache": args.decoded_cache}
            return load_images(path, args.train_split, **shared, **damage), load_images(
                path, args.eval_split, **shared
            )
        stream = ImageStream(
            path,
            args.train_split,
            buffer_size=args.shuffle_buffer,
            num_images=args.num_train_images,
            **shared,
            **damage,
        )
        held_out = ImageStream(path, args.eval_split, buffer_size=args.shuffle_buffer, **shared)
    except ValueError as error:
        if "nknown split" not in str(error):
            raise
        slices = "" if args.streaming else ", slices are allowed: 'train[1000:]' and 'train[:1000]'"
        raise ValueError(f"{str(error).rstrip('.')}; set --train_split and --eval_split{slices}") from error
    counts = [count for count in (held_out.num_images, args.max_eval_images) if count]
    if not counts:
        raise ValueError(f"--max_eval_images must be set, because the number of images of {held_out.name} is unknown")
    if not stream.num_images and (args.num_epochs or args.save_images_epochs or args.save_model_epochs):
        raise ValueError(f"--num_train_images must be set, because the length of an epoch of {stream.name} is unknown")
    return stream, held_out.take(min(counts))
