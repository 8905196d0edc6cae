"""The console script `diffusers-vdm`, which runs any of the commands in one process."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from ..console import tolerate_any_encoding

COMMANDS = {
    "train": "train a model on images, with the variational bound or DDPM's objective",
    "evaluate": "measure bits per dimension of a model on images",
    "calibrate": "measure what the best variance and the best timesteps of few steps need",
    "classify": "classify images by their likelihood under each class",
    "rank": "find the least likely images, and measure how well likelihoods separate others",
    "sample": "draw images from a saved model",
    "compress": "compress images losslessly; each costs its bound in bits",
    "decompress": "write the images of a compressed file",
    "inspect": "show what a compressed file contains",
    "convert": "convert checkpoints from and to other code bases",
    "card": "write the model card of a saved run",
    "env": "print versions and devices for a bug report",
}


def _help() -> str:
    rows = "\n".join(f"  {name:<11}{text}" for name, text in COMMANDS.items())
    return (
        f"usage: diffusers-vdm COMMAND [options]\n\n{rows}\n\n"
        "`diffusers-vdm COMMAND --help` lists the options of a command. For several processes or devices:\n"
        "`accelerate launch -m diffusers_vdm.commands.train [options]`, and the same for evaluate."
    )


def main(arguments: list[str] | None = None) -> None:
    """Runs the command in the command line, or in `arguments`; exits with code 2 for an unknown command."""
    tolerate_any_encoding()
    try:
        _run(sys.argv[1:] if arguments is None else arguments, is_script=arguments is None)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _run(arguments: list[str], is_script: bool) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return
    name, *rest = arguments
    if name == "--version":
        from .. import __version__

        print(__version__)
        return
    if name not in COMMANDS:
        print(f"diffusers-vdm: {name!r} is not a command\n\n{_help()}", file=sys.stderr)
        raise SystemExit(2)
    if is_script:
        sys.argv = [f"diffusers-vdm {name}", *rest]  # the name of the program for argparse
    import_module(f".{name}", __package__).main(rest)


if __name__ == "__main__":
    main()
