"""Train a Variational Diffusion Model, or a DDPM, on images, and report its likelihood in bits per dimension.

    accelerate launch examples/train.py                                     # bundled digits: minutes on a laptop CPU
    accelerate launch examples/train.py --objective ddpm --schedule linear_beta          # DDPM, on the same digits
    accelerate launch examples/train.py --preset cifar10 --mixed_precision bf16         # the paper's network and data
    accelerate launch examples/train.py --preset ddpm-ffhq128 --train_data_dir faces --dry_run         # only its cost

--output_dir receives the pipeline with its EMA weights, metrics.jsonl, options.json, samples.png, training.png,
schedule.png, loss_by_gamma.png, denoising.gif, and checkpoints. To resume a run that was stopped or killed, repeat the
command with --resume_from_checkpoint latest; on the same kind of CPU with the same number of threads, the results are
equal bit for bit. Options are named as in diffusers' train_unconditional.py.
"""

from __future__ import annotations

from ..console import tolerate_any_encoding
from .train_options import parse_options


def main(arguments: list[str] | None = None) -> None:
    """Trains for the command line, or `arguments`; exits with an error message of one line."""
    tolerate_any_encoding()
    options = parse_options(__doc__ or "", arguments)
    # torch and diffusers take seconds to import, so check the arguments first
    from .train_loop import train

    try:
        train(options)
    except KeyboardInterrupt:
        raise SystemExit("stopped; to resume, repeat the command with --resume_from_checkpoint latest") from None


if __name__ == "__main__":
    main()
