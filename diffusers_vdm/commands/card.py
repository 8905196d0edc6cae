"""Write the model card of a run, from the results in its folder.

    diffusers-vdm card runs/digits
    diffusers-vdm card runs/digits --repo_id user/digits --license mit --report report.json

An edited card is not replaced, unless --overwrite is given.
"""

from __future__ import annotations

import argparse


def main(arguments: list[str] | None = None) -> None:
    """Writes the card for the command line, or `arguments`; exits with an error message of one line."""
    from ..console import tolerate_any_encoding

    tolerate_any_encoding()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder of a run, or of a saved pipeline")
    parser.add_argument("--repo_id", help="Hub repository that the card is for, as user/name")
    parser.add_argument("--license", help="license, by its identifier on the Hub: apache-2.0, mit, …")
    parser.add_argument("--datasets", nargs="+", help="data sets on the Hub that the model was trained on")
    parser.add_argument("--report", help="report of evaluate (default: report.json in the folder)")
    parser.add_argument("--variant", help="variant of the weights, such as fp16")
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
            print(f"no report was found; `diffusers-vdm evaluate --output {path.parent / 'report.json'}` writes one")
    except (ValueError, OSError) as error:
        text = str(error).replace("set overwrite=True", "give --overwrite")
        raise SystemExit(f"diffusers-vdm card: {text}") from error


if __name__ == "__main__":
    main()
