"""Convert official JAX checkpoints, addtt's PyTorch checkpoints and diffusers' DDPM pipelines.

    diffusers-vdm convert official    CHECKPOINT_FOLDER OUTPUT_FOLDER [--weights ema_params|params]
    diffusers-vdm convert addtt       FILE              OUTPUT_FOLDER [--weights ema|model]
    diffusers-vdm convert diffusers   PATH_OR_REPO      OUTPUT_FOLDER [--scheduler FOLDER]
    diffusers-vdm convert to-official PIPELINE          OUTPUT_FOLDER [--step N]
    diffusers-vdm convert to-addtt    PIPELINE          OUTPUT_FOLDER

The first three write a pipeline for `VDMPipeline.from_pretrained`. OUTPUT_FOLDER must be new or empty; nothing
is written if the conversion fails. Values that the files do not contain are assumed, and printed. (TensorFlow's .index
and .data files in the official folders have no weights and are neither read nor written.) Each command has a --help.
"""

from __future__ import annotations

import argparse

from ..conversion import PAPER_ENDS


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, source: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("source", metavar=source)
        added.add_argument("output", metavar="OUTPUT_FOLDER", help="new or empty")
        return added

    official = command("official", "CHECKPOINT_FOLDER", "convert a checkpoint of the official JAX code to a pipeline")
    official.add_argument(
        "--weights", choices=("ema_params", "params"), default="ema_params", help="default: ema_params"
    )
    addtt = command("addtt", "FILE", "convert model.pt of github.com/addtt/variational-diffusion-models to a pipeline")
    addtt.add_argument("--weights", choices=("ema", "model"), default="ema", help="default: ema")
    addtt.add_argument("--num_heads", type=int, help="attention heads (default: config.yaml's, else 1)")
    addtt.add_argument(
        "--norm_num_groups", type=int, help="groups of group normalization (default: config.yaml's, else 32)"
    )
    for added, where in ((official, ""), (addtt, "config.yaml's, else ")):
        added.add_argument("--gamma_min", type=float, help=f"configured end of γ (default: {where}{PAPER_ENDS[0]})")
        added.add_argument("--gamma_max", type=float, help=f"configured end of γ (default: {where}{PAPER_ENDS[1]})")
        added.add_argument("--sample_size", type=int, default=32, help="height and width of the images (default: 32)")
    theirs = command("diffusers", "PATH_OR_REPO", "convert a DDPMPipeline or UNet2DModel of diffusers to a pipeline")
    theirs.add_argument("--scheduler", help="folder or repository of the scheduler (default: the pipeline's)")
    back = command("to-official", "PIPELINE", "convert a saved pipeline to a checkpoint of the official JAX code")
    back.add_argument("--step", type=int, default=0, help="number of training steps to store in the file (default: 0)")
    command("to-addtt", "PIPELINE", "convert a saved pipeline to model.pt and config.yaml of addtt's code")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; exits with an error message for input that cannot be converted."""
    from ..console import tolerate_any_encoding

    tolerate_any_encoding()
    given = {name: value for name, value in vars(parse_options(arguments)).items() if value is not None}
    name, source, output = (given.pop(key) for key in ("command", "source", "output"))
    from .. import conversion
    from ..conversion.foreign_networks import check_new, whole_folder
    from ..pipeline import VDMPipeline

    try:
        check_new(output)
        if name.startswith("to-"):
            save = conversion.save_official if name == "to-official" else conversion.save_addtt
            save(VDMPipeline.from_pretrained(source), output, **given)
        else:
            pipe = getattr(conversion, f"load_{name}")(source, **given)
            with whole_folder(output) as new:
                pipe.save_pretrained(new)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"conversion {name}: {error}") from error
    print(f"written: {output}")


if __name__ == "__main__":
    main()
