"""The images that train.py trains on, and the held-out ones."""

from __future__ import annotations

import argparse
import math

from options import image_arguments


def load_data(o: argparse.Namespace, progress_bar: bool):
    """The images to train on and the held-out ones."""
    train, test = _load(o, progress_bar)
    if o.random_rotation and train.shape[1] != train.shape[2]:
        raise ValueError(f"--random_rotation needs square images, got {train.shape}; set --resolution")
    if o.class_conditional and test.labels is None:
        raise ValueError(f"--class_conditional: {test.name} has no classes; name a split that has by --eval_split")
    return train, test


def _load(o: argparse.Namespace, progress_bar: bool):
    from diffusers_vdm.image_stream import ImageStream
    from diffusers_vdm.images import ImageSet, load_digits_split, load_images

    if o.digits:
        return load_digits_split()
    shared = image_arguments(o, o.train_data_dir) | {"num_workers": o.dataloader_num_workers}
    path = o.dataset_name or o.train_data_dir
    try:
        if not o.streaming:
            shared |= {"progress_bar": progress_bar, "decoded_cache": o.decoded_cache}
            return tuple(load_images(path, split, **shared) for split in (o.train_split, o.eval_split))
        stream = ImageStream(
            path, o.train_split, buffer_size=o.shuffle_buffer, num_images=o.num_train_images, **shared
        )
        held_out = ImageStream(path, o.eval_split, buffer_size=o.shuffle_buffer, **shared)
    except ValueError as error:
        if "nknown split" not in str(error):
            raise
        slices = "" if o.streaming else ", slices allowed: 'train[1000:]' and 'train[:1000]'"
        raise ValueError(f"{str(error).rstrip('.')}; set --train_split and --eval_split{slices}") from error
    count = min(held_out.num_images or math.inf, o.max_eval_images or math.inf)
    if count == math.inf:
        raise ValueError(f"--max_eval_images must say how many of {held_out.name} to take: nobody declared its number")
    if not stream.num_images and (o.num_epochs or o.save_images_epochs or o.save_model_epochs):
        raise ValueError(f"--num_train_images must tell the length of an epoch of {stream.name}: nobody declared it")
    return stream, ImageSet(*held_out.batch(range(count)), 256, f"{held_out.name}, {count} images")
