"""Train a Variational Diffusion Model, or a DDPM, on images, and see its likelihood in bits per dimension.

    accelerate launch examples/train.py                                     # bundled digits: minutes on a laptop CPU
    accelerate launch examples/train.py --objective ddpm --schedule linear_beta          # DDPM, on the same digits
    accelerate launch examples/train.py --preset cifar10 --mixed_precision bf16         # the paper's network and data
    accelerate launch examples/train.py --preset ddpm-ffhq128 --train_data_dir faces --dry_run      # what it will cost

In --output_dir: the pipeline with its EMA weights, metrics.jsonl, options.json, samples.png, training.png,
schedule.png, loss_by_gamma.png, denoising.gif, and checkpoints. A run that was stopped or killed goes on by the same
command with --resume_from_checkpoint latest: bit for bit on the same kind of CPU with as many threads. Options are
named as in diffusers' train_unconditional.py.
"""

from __future__ import annotations

from ..console import tolerate_any_encoding
from .train_options import parse_options


def main(arguments: list[str] | None = None) -> None:
    """Trains by the command line, or by `arguments`; `SystemExit` says in one line what is wrong."""
    tolerate_any_encoding()
    options = parse_options(__doc__ or "", arguments)
    # torch and diffusers take seconds to import: not before the arguments are known to be right
    from .train_loop import train

    try:
        train(options)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command with --resume_from_checkpoint latest goes on") from None


if __name__ == "__main__":
    main()
