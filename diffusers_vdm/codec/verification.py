"""Decode a new file in another process, with another number of threads and another batch size."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..evaluation.rows import device_of
from .errors import CodecError


def verify_file(
    pipe: Any,
    path: str | os.PathLike,
    batch_size: int,
    conditions: Mapping[str, torch.Tensor],
    *,
    is_portable: bool = True,
    progress_bar: bool = False,
) -> None:
    """Raises [`CodecError`] unless another process decodes the file; the checksums are those of the pixels.

    Args:
        pipe, path, batch_size, conditions: those of the encoder.
        is_portable (`bool`, defaults to `True`): decode with another number of threads and another batch size.
        progress_bar (`bool`, defaults to `False`): show progress.
    """
    threads = torch.get_num_threads()
    if is_portable:
        threads, batch_size = 1 if threads > 1 else 2, max(1, batch_size // 2)
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        command = [sys.executable, "-m", "diffusers_vdm.codec"]
        of_images = os.path.join(folder, "conditions.safetensors") if conditions else ""
        if conditions:
            save_file({name: value.contiguous() for name, value in conditions.items()}, of_images)
        arguments = [
            folder, os.path.abspath(path), batch_size, threads, device_of(pipe.unet), int(progress_bar), of_images,
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        done = subprocess.run(
            [*command, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, text=True, check=False,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
    if done.returncode:
        raise CodecError(
            "the file could not be decoded in another process, so it was not written: "
            f"{done.stdout.strip() or 'see above'}"
        )
