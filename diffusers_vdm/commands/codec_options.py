"""What the commands compress, decompress and inspect share: options, the pipeline, and errors in one line."""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..training.options import POSITIVE, Option

CONDITIONS = Option("conditions", str, "safetensors file with a row for each image: class_labels, cond_vectors, …")
DEVICE_OPTIONS = [
    Option("batch_size", 64, "images that the network sees at once", range=POSITIVE),
    Option("device", str, "defaults to cuda if available, else cpu"),
    Option("num_threads", int, "CPU threads; defaults to those of PyTorch", range=POSITIVE),
]


def check_required(args: argparse.Namespace, *names: str) -> None:
    """Raises `ValueError` unless these options are given."""
    for name in names:
        if getattr(args, name) is None:
            raise ValueError(f"--{name} must be given")


def load_pipeline(args: argparse.Namespace) -> Any:
    """The pipeline on its device."""
    import torch

    from .. import VDMPipeline
    from ..registration import pipeline_class
    from .evaluate_options import check_works_on_pixels
    from .sample import choose_device

    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    device = choose_device(args.device)
    try:
        index = VDMPipeline.load_config(args.model)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model must be a folder or repository of a pipeline, got {args.model}: {error}") from error
    check_works_on_pixels(index, args.model)
    return pipeline_class(index).from_pretrained(args.model).to(device)


@contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Ends the program with one line for errors and signals; what is unfinished is removed on the way."""

    def stop(number: int, _: Any) -> None:
        raise KeyboardInterrupt

    signals = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    earlier = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise SystemExit(f"diffusers-vdm {command}: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(f"diffusers-vdm {command}: stopped") from None
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
