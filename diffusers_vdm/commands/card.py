"""Write the model card of a folder that train left, from its own numbers.

    diffusers-vdm card runs/digits
    diffusers-vdm card runs/digits --repo_id user/digits --license mit --report report.json

A card that somebody has edited stays as it is, unless --overwrite is given.
"""

from __future__ import annotations

import argparse


def main(arguments: list[str] | None = None) -> None:
    """Writes the card by the command line, or by `arguments`; `SystemExit` says in one line what is wrong."""
    from ..console import tolerate_any_encoding

    tolerate_any_encoding()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a run of train, or a saved pipeline")
    parser.add_argument("--repo_id", help="repository on the Hub that the card is for, as user/name")
    parser.add_argument("--license", help="as the Hub names it: apache-2.0, mit, …")
    parser.add_argument("--datasets", nargs="+", help="data sets on the Hub that the model was trained on")
    parser.add_argument("--report", help="report of evaluate (default: report.json in the folder)")
    parser.add_argument("--variant", help="variant of the weights, as fp16")
    parser.add_argument("--overwrite", action="store_true", help="also replace a card that was edited")
    options = parser.parse_args(arguments)

    from .. import VDMPipeline
    from ..sharing.model_card import load_quietly, save_model_card

    names = ("repo_id", "license", "datasets", "report", "variant", "overwrite")
    try:
        pipe = load_quietly(VDMPipeline, options.folder, options.variant)
        path = save_model_card(pipe, options.folder, **{name: getattr(options, name) for name in names})
        print(f"written: {path}")
        if options.report is None and not (path.parent / "report.json").is_file():
            print(f"without a report; `diffusers-vdm evaluate --output {path.parent / 'report.json'}` writes one")
    except (ValueError, OSError) as error:
        text = str(error).replace("set overwrite=True", "give --overwrite")
        raise SystemExit(f"diffusers-vdm card: {text}") from error


if __name__ == "__main__":
    main()
