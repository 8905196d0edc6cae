"""Rank images by their likelihood: the most and the least likely ones, and how well a score separates other images.

    diffusers-vdm rank --model runs/digits --picture ranking.png                         # the bundled digits
    diffusers-vdm rank --model runs/digits --other_transform rotate180       # against digits that are upside down
    diffusers-vdm rank --model runs/digits --other_data_dir letters --reference_model runs/small
    diffusers-vdm rank --model user/vdm --dataset_name user/images --split test[:500] --other_dataset_name user/others

Each image gets its bits by Monte Carlo, and scores that are high for unusual images: the bits; the bits minus those of
a PNG file; the distance to the mean bits of other images of the data; and, with --reference_model, the bits minus
those of another model. With other images the report has the AUROC of each score, and of the PNG file alone: the
probability that one of the other images has the higher score.

The mean bits are those of --typical_split. Without it they are those of every second image, which this score then
leaves out. Images of --other_data_dir and --other_dataset_name must be levels of the model: for a model with 17 levels
their pixels are 0 to 16. A model measures images without the conditions whose null it knows, such as a null class.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..console import errors_in_one_line, tolerate_any_encoding
from ..training.options import POSITIVE, Option, train_option
from .evaluate_options import (
    ALLOW_SHARED,
    BATCH_SIZE,
    DATA_SET_OPTIONS,
    IMAGE_OPTIONS,
    MACHINE_OPTIONS,
    MODEL,
    bound_of,
    check_classes,
    check_condition_options,
    check_writable,
    digits_part,
    load_data,
    load_model,
    parse_checked,
)
from .evaluate_report import with_error
from .processes import evaluation_accelerator

# changes of images `(N, C, H, W)` with levels below `num_levels`
TRANSFORMS: dict[str, Callable[[Any, int], Any]] = {
    "rotate180": lambda images, num_levels: images.flip(2, 3),
    "flip": lambda images, num_levels: images.flip(2),
    "mirror": lambda images, num_levels: images.flip(3),
    "negative": lambda images, num_levels: num_levels - 1 - images,
}
OPTIONS: dict[str, list[Option]] = {
    "model": [
        MODEL,
        Option("reference_model", str, "a second model of the same images, for the difference of the bits"),
    ],
    "measurement": [
        Option("num_samples", 64, "draws of (t, ε) for each image, the same for both models", range=POSITIVE),
        Option("importance_sampling", False, "draw t more often where the loss was large in a first pass"),
        train_option("seed"),
    ],
    "data": [
        *DATA_SET_OPTIONS,
        Option("split", "test", "split to rank; slices such as test[:500] are allowed"),
        *IMAGE_OPTIONS,
        ALLOW_SHARED,
        Option("typical_split", str, "split whose mean bits are typical; otherwise those of every second image"),
    ],
    "other images, to compare with": [
        Option("other_dataset_name", str, "data set on the Hub, or a local copy"),
        Option("other_data_dir", str, "folder of image files"),
        Option("other_split", str, "split of the other images, defaults to test; alone: of the same data set"),
        Option("other_image_column", str, "column of the other images, found by its type if not given"),
        Option("other_transform", (None, *TRANSFORMS), "the same images, changed"),
    ],
    "work": [
        BATCH_SIZE,
        Option("num_images", 8, "most and least likely images to show", range=POSITIVE),
        Option("picture", str, "PNG file to draw these images into"),
        Option("output", "ranking.json", "report to write"),
        *MACHINE_OPTIONS,
    ],
}
LABEL_OF = {
    "bits": "bits",
    "png_bits": "bits of a PNG file, without the model",
    "bits_minus_png": "bits − bits of a PNG file",
    "typicality_bits": "|bits − typical bits|",
    "bits_minus_reference": "bits − bits of the reference",
}


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line; wrong arguments end the program before any work starts."""
    return parse_checked(__doc__ or "", OPTIONS, arguments, check_options_of_rank)


def check_options_of_rank(args: argparse.Namespace) -> None:
    """Raises `ValueError` for a picture that is no PNG file, and for other images that are not defined once."""
    if args.picture is not None and (Path(args.picture).suffix.lower() != ".png" or Path(args.picture).is_dir()):
        raise ValueError(f"--picture must name a .png file, got {args.picture}")
    if args.picture is not None:
        check_writable("picture", args.picture)
    if args.other_dataset_name and args.other_data_dir:
        raise ValueError("give --other_dataset_name or --other_data_dir, not both")
    if args.other_data_dir and not Path(args.other_data_dir).is_dir():
        raise ValueError(f"--other_data_dir {args.other_data_dir} is not a folder")
    own_data = bool(args.other_dataset_name or args.other_data_dir)
    if args.other_image_column and not own_data:
        raise ValueError("--other_image_column needs --other_dataset_name or --other_data_dir")
    if args.other_transform and (own_data or args.other_split):
        raise ValueError("--other_transform changes the images of --split; give no other images with it")
    is_digits = args.dataset_name is None and args.data_dir is None
    for name in ("typical_split", "other_split"):
        split = getattr(args, name)
        if split is None or (name == "other_split" and own_data):
            continue
        if split == args.split:
            raise ValueError(f"--{name} must not be --split, got {split!r} for both")
        if is_digits:
            digits_part(split, name)


@dataclass
class Model:
    """A bound to measure with; `num_classes` is `None` if images are measured without classes."""

    name: str
    bound: Any
    num_levels: int
    num_classes: int | None
    class_names: list[str] | None


@dataclass
class Measured:
    """The bits of a set of images: `evaluations` has those of the model and, if any, of the reference model."""

    data: Any
    evaluations: list[Any]
    scores: dict[str, Any]
    files: list[str] | None


def rank(args: argparse.Namespace) -> None:
    """Measures, writes the report and prints it."""
    with evaluation_accelerator(args) as accelerator:
        run_ranking(args, accelerator)


def run_ranking(args: argparse.Namespace, accelerator: Any) -> None:
    from .. import evaluate_mc
    from ..evaluation.rows import check_images
    from ..files import write_atomically

    names = ["model", *(["reference_model"] if args.reference_model else [])]
    models = [load_bound(option, getattr(args, option), accelerator.device) for option in names]
    levels = [model.num_levels for model in models]
    if len(set(levels)) > 1:
        raise ValueError(f"--reference_model must have the {levels[0]} levels of the model, got {levels[1]}")
    is_main = accelerator.is_main_process
    check_condition_options(args, models[0].bound.unet)
    sets = load_sets(args, models, is_main)
    for model in models:  # before any of them is measured
        for data in sets.values():
            try:
                check_images(data.images, model.num_levels, model.bound.unet)
            except ValueError as error:
                raise ValueError(f"{model.name} cannot measure {data.name}: {error}") from error
    check_disjoint(args, sets)
    files = {name: files_of(args, name, data) for name, data in sets.items() if name != "typical"}
    # images and their changed copies share their noise; others have their own
    seeds = {"typical": args.seed + 1, "other": args.seed + (0 if args.other_transform else 2)}
    start, results = time.perf_counter(), {}
    for name, data in sets.items():
        used = models[:1] if name == "typical" else models
        results[name] = [
            evaluate_mc(
                model.bound,
                data.images,
                num_samples=args.num_samples,
                importance_sampling=args.importance_sampling,
                batch_size=args.batch_size,
                seed=seeds.get(name, args.seed),
                device=accelerator.device,
                accelerator=accelerator,
                progress_bar=is_main,
                **conditions_without_null(model, data),
            )
            for model in used
        ]
    seconds = time.perf_counter() - start
    if not is_main:
        return
    measured = scored(args, sets, results, files)
    conditions = sorted(conditions_without_null(models[0], sets["in"]))
    report = report_of(args, sets, results, measured, conditions) | {"seconds": seconds}
    for path, write in (
        (args.output, lambda path: write_atomically(path, json.dumps(report, allow_nan=False) + "\n")),
        (args.picture, lambda path: draw(path, args.num_images, measured, models[0].num_levels)),
    ):
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write(Path(path))
    print_report(args, report)


def load_bound(option: str, name: str, device: Any) -> Model:
    """The bound of a saved model, in float32; errors name the option that gave the model."""
    try:
        unet, scheduler, num_levels, _, class_names = load_model(name)
    except SystemExit as error:
        raise SystemExit(str(error).replace("--model", f"--{option}", 1)) from error
    num_classes = None if unet.config.get("null_class", False) else unet.config.get("num_class_embeds")
    return Model(name, bound_of(unet, scheduler, num_levels, device), num_levels, num_classes, class_names)


# ---- the images --------------------------------------------------------------------------------------------------


def load_sets(args: argparse.Namespace, models: list[Model], is_main: bool) -> dict[str, Any]:
    """The images to rank, `in`, and those that are asked for of `typical` and `other`."""
    given, num_levels = vars(args), models[0].num_levels
    sets = {"in": load_classes(args, models, num_levels, is_main)}
    if args.typical_split:
        typical = argparse.Namespace(**given | {"split": args.typical_split, "allow_shared": True})
        sets["typical"] = load_classes(typical, models, num_levels, is_main, "typical_split")
    if args.other_transform:
        data = sets["in"]
        changed = TRANSFORMS[args.other_transform](data.images, num_levels).contiguous()
        sets["other"] = replace(data, images=changed, name=f"{data.name}, {args.other_transform}")
    elif args.other_dataset_name or args.other_data_dir:
        source = {
            "dataset_name": args.other_dataset_name, "data_dir": args.other_data_dir,
            "image_column": args.other_image_column, "split": args.other_split or "test",
            "dataset_config_name": None, "label_column": None, "allow_shared": True,
        }  # fmt: skip
        other = load_classes(argparse.Namespace(**given | source), models, 256, is_main, "other_split")
        sets["other"] = in_levels(other, num_levels)
    elif args.other_split:
        other = argparse.Namespace(**given | {"split": args.other_split, "allow_shared": True})
        sets["other"] = load_classes(other, models, num_levels, is_main, "other_split")
    return sets


def load_classes(
    args: argparse.Namespace, models: list[Model], num_levels: int, is_main: bool, split_option: str = "split"
) -> Any:
    """Images, with the classes that some of the models need; `ValueError` if they are not known."""
    from ..conditions import conditions_needed

    needing = [model for model in models if model.num_classes is not None]
    first = needing[0] if needing else replace(models[0], num_classes=None)
    needs_some = any(conditions_needed(model.bound.unet) for model in models)
    data = load_data(args, num_levels, first.num_classes, first.class_names, is_main, needs_some, split_option)
    for model in needing:
        if data.labels is None:
            raise ValueError(
                f"{model.name} has classes and no null class, so it needs the classes of the images, and {data.name} "
                "has none; use a model that was trained without classes, or with a null class"
            )
        check_classes(data, model.num_classes or 0, model.class_names)
    return data


def check_disjoint(args: argparse.Namespace, sets: dict[str, Any]) -> None:
    """Raises `ValueError` if images to rank are among those of another split, typical or other ones."""
    from ..data.images import count_shared

    for option, why in (("typical_split", "compared with their own bits"), ("other_split", "both unusual and not")):
        is_compared = getattr(args, option) and not args.allow_shared
        shared = count_shared(sets["in"], sets[option.removesuffix("_split")]) if is_compared else 0
        if shared:
            raise ValueError(
                f"{shared} images of --{option} are also in --split, so they would be {why}; use another split, or "
                "set --allow_shared"
            )


def in_levels(data: Any, num_levels: int) -> Any:
    """Files whose 8-bit pixels are levels of the model, as images with `num_levels`."""
    highest = int(data.images.max())
    if highest >= num_levels:
        raise ValueError(
            f"the model has {num_levels} levels, so pixels of the other images must be 0 to {num_levels - 1}, but "
            f"{data.name} has {highest}; write files with levels as pixels"
        )
    return replace(data, num_levels=num_levels)


def conditions_without_null(model: Model, data: Any) -> dict[str, Any]:
    """The conditions of the images without which the network cannot measure them."""
    from ..conditions import conditions_needed
    from ..data.conditions import conditions_of

    given = conditions_of(model.bound.unet, data.images, model.num_levels, data.labels, data.conditions)
    needed = [*conditions_needed(model.bound.unet), "encoder_attention_mask"]
    return {name: value for name, value in given.items() if name in needed}


def files_of(args: argparse.Namespace, name: str, data: Any) -> list[str] | None:
    """The file names of a set of images, if the data set has them; relative to its folder."""
    import datasets

    from ..data.image_sources import open_source

    path, split, is_folder = args.dataset_name or args.data_dir, args.split, args.data_dir is not None
    column, config = args.image_column, args.dataset_config_name
    if name == "other" and (args.other_dataset_name or args.other_data_dir):
        path, split = args.other_dataset_name or args.other_data_dir, args.other_split or "test"
        column, config, is_folder = args.other_image_column, None, args.other_data_dir is not None
    elif name == "other" and args.other_split:
        split = args.other_split
    if path is None:
        return None
    source = open_source(
        path, split, config_name=config, is_folder=is_folder, image_column=column, label_column="",
        cache_dir=args.cache_dir, allow_shared=True,
    )  # fmt: skip
    rows = source.data.select_columns([source.image_column])
    rows = rows.cast_column(source.image_column, datasets.Image(decode=False))
    files = [(row[source.image_column] or {}).get("path") for row in rows]
    if len(files) != len(data) or not all(files):  # all frames of a file are images
        return None
    return [str(file).removeprefix(f"{path.rstrip('/')}/") for file in files]


# ---- the scores --------------------------------------------------------------------------------------------------


def scored(
    args: argparse.Namespace,
    sets: dict[str, Any],
    results: dict[str, list[Any]],
    files: dict[str, list[str] | None],
) -> dict[str, Measured]:
    """The scores of the images of `in` and `other`, in bits per image; NaN where an image is left out."""
    from ..evaluation.ranking import bits_minus_reference, png_bits, typicality_bits

    dims = sets["in"].images[0].numel()
    bits = {name: dims * found[0].per_image_bpd for name, found in results.items()}
    typical = bits.get("typical", bits["in"][1::2])
    measured = {}
    for name in files:
        scores = {"bits": bits[name]}
        if sets[name].images.shape[1] in (1, 3):
            scores["png_bits"] = png_bits(sets[name].images)
            scores["bits_minus_png"] = bits[name] - scores["png_bits"]
        if len(typical):
            scores["typicality_bits"] = typicality_bits(bits[name], typical)
            if not args.typical_split and (name == "in" or args.other_transform):
                scores["typicality_bits"][1::2] = math.nan  # their bits, or those of their originals, are in the mean
        if len(results[name]) > 1:
            scores["bits_minus_reference"] = bits_minus_reference(bits[name], dims * results[name][1].per_image_bpd)
        measured[name] = Measured(sets[name], results[name], scores, files[name])
    return measured


def aurocs(measured: dict[str, Measured], paired: bool) -> dict[str, dict[str, Any]]:
    """The AUROC of each score, with its standard error and the number of scores of both kinds."""
    from ..evaluation.ranking import auroc

    table = {}
    for name in measured["in"].scores:
        known = [each.scores[name][~each.scores[name].isnan()] for each in (measured["other"], measured["in"])]
        value, error = auroc(known[0], known[1], paired=paired)
        table[name] = {
            "auroc": value, "stderr": finite(error), "num_other": len(known[0]), "num_in": len(known[1]),
        }  # fmt: skip
    return table


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def rows_of(measured: Measured) -> list[dict[str, Any]]:
    """What is known of each image."""
    from ..evaluation.monte_carlo import mean_stderr

    columns: dict[str, Any] = {"bpd": measured.evaluations[0].per_image_bpd}
    columns["stderr_bpd"] = measured.evaluations[0].per_image_stderr_bpd
    if len(measured.evaluations) > 1:
        one, two = measured.evaluations
        columns |= {
            "reference_bpd": two.per_image_bpd,
            "bpd_minus_reference_stderr": mean_stderr(one.draws_bpd - two.draws_bpd),
        }
    columns |= measured.scores
    values = {name: [finite(value) for value in column.tolist()] for name, column in columns.items()}
    rows: list[dict[str, Any]] = []
    for i in range(len(measured.data)):
        row: dict[str, Any] = {"index": i}
        if measured.files is not None:
            row["file"] = measured.files[i]
        if measured.data.labels is not None:
            row["label"] = int(measured.data.labels[i])
        rows.append(row | {name: column[i] for name, column in values.items()})
    return rows


def summary_of(measured: Measured) -> dict[str, Any]:
    """What is known of all images of a set together."""
    result, n = measured.evaluations[0], len(measured.data)
    bpd, errors = result.per_image_bpd, result.per_image_stderr_bpd
    spread = float(bpd.std()) if n > 1 else math.nan
    return {
        "data": measured.data.name,
        "fingerprint": measured.data.fingerprint,
        "num_images": n,
        "bpd": result.bpd,
        "bpd_stderr_of_population": finite(spread / math.sqrt(n)),
        "bpd_spread": finite(spread),
        "bpd_rms_stderr_of_image": finite(float(errors.square().mean().sqrt())),
    }


# ---- what is written ---------------------------------------------------------------------------------------------


def report_of(
    args: argparse.Namespace,
    sets: dict[str, Any],
    results: dict[str, list[Any]],
    measured: dict[str, Measured],
    conditions: list[str],
) -> dict[str, Any]:
    """Everything that was measured."""
    dims = sets["in"].images[0].numel()
    report: dict[str, Any] = {
        "model": args.model, "reference_model": args.reference_model, "num_samples": args.num_samples,
        "importance_sampling": args.importance_sampling,
        "conditions": conditions, "seed": args.seed, "num_dimensions": dims, **summary_of(measured["in"]),
    }  # fmt: skip
    if "typical" in sets:
        report["typical"] = {"data": sets["typical"].name, "num_images": len(sets["typical"])}
        report["typical"]["bpd"] = results["typical"][0].bpd
    elif len(sets["in"]) > 1:
        reference = results["in"][0].per_image_bpd[1::2]
        report["typical"] = {"data": f"every second image of {sets['in'].name}", "num_images": len(reference)}
        report["typical"]["bpd"] = float(reference.mean())
    if "other" in measured:
        report["other"] = summary_of(measured["other"])
        report["auroc"] = aurocs(measured, paired=args.other_transform is not None)
        report["other_images"] = rows_of(measured["other"])
    report["images"] = rows_of(measured["in"])
    return report


def draw(path: Path, num_images: int, measured: dict[str, Measured], num_levels: int) -> None:
    """Draws the least and the most likely images of each set."""
    from ..plots import plot_image_rows

    rows = []
    for name, each in measured.items():
        bpd = each.evaluations[0].per_image_bpd
        order, kind = bpd.argsort(), "other, " if name == "other" else ""
        for title, index in (("least likely", order.flip(0)), ("most likely", order)):
            index = index[:num_images]
            pictures = each.data.images[index].float() / (num_levels - 1)
            rows.append((f"{kind}{title}", pictures, [f"{value:.2f}" for value in bpd[index].tolist()]))
    plot_image_rows(rows, path)


def print_report(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Prints what is measured."""
    for part in (report, report.get("other")):
        if part is None:
            continue
        where = "" if part is report else "the other images: "
        print(f"\n{where}{report['model']} on {part['data']}: {part['num_images']} images")
        for name, value in (
            ("bits/dim", with_error(part["bpd"], part["bpd_stderr_of_population"])),
            ("  spread of the images", with_error(part["bpd_spread"])),
            ("  standard error of an image", with_error(part["bpd_rms_stderr_of_image"])),
        ):
            print(f"  {name:<40}{value:>16}")
        rows = sorted(report["images"] if part is report else report["other_images"], key=lambda row: row["bpd"])
        for title, shown in (("least", rows[::-1]), ("most", rows)):
            print(f"  {title} likely: index, bits/dim, bits" + (", file" if "file" in rows[0] else ""))
            for row in shown[: args.num_images]:
                value = with_error(row["bpd"], row["stderr_bpd"], 3)
                print(f"    {row['index']:>6}  {value:>16}  {row['bits']:>10.1f}  {row.get('file', '')}".rstrip())
    if "auroc" in report:
        print("\nprobability that one of the other images has the higher score (AUROC)")
        for name, row in report["auroc"].items():
            print(f"  {LABEL_OF[name]:<40}{with_error(row['auroc'], row['stderr']):>16}")
    print(f"report: {args.output}" + (f", picture: {args.picture}" if args.picture else ""))


def main(arguments: list[str] | None = None) -> None:
    """Runs the command with the command line or with `arguments`; `SystemExit` names an error in one line."""
    tolerate_any_encoding()
    args = parse_options(arguments)
    with errors_in_one_line("diffusers-vdm rank"):
        rank(args)


if __name__ == "__main__":
    main()
