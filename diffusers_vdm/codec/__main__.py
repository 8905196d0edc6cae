"""The process that verifies a new file.

python -m diffusers_vdm.codec MODEL FILE BATCH_SIZE THREADS DEVICE PROGRESS_BAR CONDITIONS

CONDITIONS is a safetensors file, or empty.
"""

from __future__ import annotations

import sys

import torch

from ..pipeline import VDMPipeline
from ..registration import pipeline_class
from .conditions import read_conditions
from .errors import CodecError
from .files import iterate


def main(arguments: list[str]) -> int:
    """Decodes a file; prints an error and returns 1 if that fails."""
    model, path, batch_size, threads, device, progress_bar, conditions = arguments
    torch.set_num_threads(int(threads))
    pipe = pipeline_class(VDMPipeline.load_config(model)).from_pretrained(model).to(device)
    try:
        given = read_conditions(conditions or None)
        for _ in iterate(pipe, path, batch_size=int(batch_size), progress_bar=bool(int(progress_bar)), **given):
            pass
    except CodecError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
