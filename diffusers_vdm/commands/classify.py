"""Classify images by the likelihood of a class-conditional model.

    diffusers-vdm classify --model runs/classes                                          # the bundled digits
    diffusers-vdm classify --model runs/classes --mutual_information --neighbors train
    diffusers-vdm classify --model user/vdm --dataset_name user/images --split test[:500] --num_samples 64

An image gets the class under which its bound is the smallest. If the images have classes, the report has the accuracy,
and the expected calibration error of p(c | x). Its temperature is fitted on one half of the images and used for the
other, and the reverse. The mean of log2 p(c | x)/p(c) is a lower bound of the mutual information I(x; c).
--mutual_information also measures the images without their classes: the difference to those with their classes is
another estimate, which is right if the network was trained as well without classes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from ..console import errors_in_one_line, tolerate_any_encoding
from ..json_values import number
from ..training.options import POSITIVE, Option, train_option
from .evaluate_options import (
    ALLOW_SHARED,
    BATCH_SIZE,
    DATA_SET_OPTIONS,
    IMAGE_OPTIONS,
    MACHINE_OPTIONS,
    MODEL,
    bound_of,
    check_condition_options,
    digits_part,
    load_data,
    load_model,
    parse_checked,
)
from .evaluate_report import with_error
from .processes import evaluation_accelerator

OPTIONS: dict[str, list[Option]] = {
    "model": [MODEL],
    "measurement": [
        Option("num_samples", 32, "draws of (t, ε) for each image, the same for all classes", range=POSITIVE),
        Option("rejection", True, "stop drawing for classes that are surely far behind"),
        Option("mutual_information", False, "also measure I(x; c); needs a null class, and images with classes"),
        Option("temperature", float, "temperature of p(c | x); fitted to the classes if not given", range=POSITIVE),
        Option("neighbors", str, "split of training images for the accuracy of the nearest neighbor, to compare with"),
        train_option("seed"),
    ],
    "data": [
        *DATA_SET_OPTIONS,
        Option("split", "test", "split to classify; slices such as test[:500] are allowed"),
        *IMAGE_OPTIONS,
        ALLOW_SHARED,
    ],
    "work": [
        BATCH_SIZE,
        Option("output", "classes.json", "report to write"),
        *MACHINE_OPTIONS,
    ],
}


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line; wrong arguments end the program before any work starts."""
    return parse_checked(__doc__ or "", OPTIONS, arguments, check_neighbors)


def check_neighbors(args: argparse.Namespace) -> None:
    """Raises `ValueError` for a split that the bundled digits do not have."""
    if args.neighbors is not None and args.dataset_name is None and args.data_dir is None:
        digits_part(args.neighbors, "neighbors")


def classify(args: argparse.Namespace) -> None:
    """Measures, writes the report and prints it."""
    with evaluation_accelerator(args) as accelerator:
        run_classification(args, accelerator)


def run_classification(args: argparse.Namespace, accelerator: Any) -> None:
    from ..evaluation.classes import evaluate_classes
    from ..files import write_atomically

    unet, scheduler, num_levels, _, names = load_model(args.model)
    num_classes = unet.config.get("num_class_embeds")
    if num_classes is None:
        raise ValueError(f"{args.model} has no classes; train one by train.py --class_conditional")
    check_condition_options(args, unet)
    is_main = accelerator.is_main_process
    data = load_data(args, num_levels, num_classes, names, is_main)
    if data.labels is None and args.mutual_information:
        raise ValueError(f"--mutual_information needs images with classes, and {data.name} has none")
    bound = bound_of(unet, scheduler, num_levels, accelerator.device)
    # on all processes, because a wrong split must end all of them
    neighbors = None if args.neighbors is None else nearest_neighbors(args, data, num_levels, num_classes, names)
    start = time.perf_counter()
    result = evaluate_classes(
        bound,
        data.images,
        class_labels=data.labels if args.mutual_information else None,
        with_null=args.mutual_information,
        num_samples=args.num_samples,
        rejection=args.rejection,
        batch_size=args.batch_size,
        seed=args.seed,
        device=accelerator.device,
        accelerator=accelerator,
        progress_bar=is_main,
    )
    if not is_main:
        return
    seconds = (time.perf_counter() - start) / len(data.images)
    possible = args.num_samples * (num_classes + args.mutual_information)
    report: dict[str, Any] = {
        "model": args.model, "data": data.name, "fingerprint": data.fingerprint, "num_images": len(data.images),
        "num_classes": num_classes, "class_names": names or data.class_names, "num_samples": args.num_samples,
        "seed": args.seed, "num_calls_per_image": result.num_calls / len(data.images),
        "num_calls_without_rejection": possible, "seconds_per_image": seconds,
    }  # fmt: skip
    report |= measured(args, result, data.labels)
    if neighbors is not None and data.labels is not None:
        report["nearest_neighbor_accuracy"] = float((neighbors == data.labels).float().mean())
    report["images"] = of_images(report, result, data.labels)
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(report, allow_nan=False) + "\n")
    print_report(report, path)


def measured(args: argparse.Namespace, result: Any, labels: Any) -> dict[str, Any]:
    """What is known of all images together: accuracy, calibration and mutual information."""
    import torch

    from ..evaluation.classes import calibration_error, fit_temperature, information_bound

    if labels is None:
        return {"temperatures": [args.temperature or 1.0]}
    n, bits = len(labels), result.class_bits
    halves = [torch.arange(start, n, 2) for start in (0, 1)]
    temperatures = [args.temperature]
    if args.temperature is None:  # of the even images from the odd ones, and the reverse
        temperatures = [fit_temperature(bits[other], labels[other]) if len(other) else 1.0 for other in halves[::-1]]
    found = probabilities_of(result, temperatures)
    accuracy = float((bits.argmin(1) == labels).double().mean())
    frequencies = labels.bincount(minlength=bits.shape[1]).double() / n
    lower, lower_error = information_bound(found, labels, frequencies)
    report = {
        "accuracy": accuracy,
        "accuracy_stderr": math.sqrt(accuracy * (1 - accuracy) / max(1, n - 1)),
        "calibration_error": calibration_error(found, labels),
        "calibration_error_at_1": calibration_error(result.probabilities(), labels),
        "temperatures": temperatures,
        "information_bound_bits": lower,
        "information_bound_stderr_bits": number(lower_error),
        "information_bound_bpd": lower / result.num_dimensions,
        "class_entropy_bits": -float((frequencies * frequencies.clamp(min=1e-300).log2()).sum()),
    }
    if result.null_bits is not None:
        information, error = result.mutual_information(labels)
        report |= {
            "mutual_information_bits": information, "mutual_information_stderr_bits": number(error),
            "mutual_information_bpd": information / result.num_dimensions,
        }  # fmt: skip
    return report


def probabilities_of(result: Any, temperatures: list[float]) -> Any:
    """p(c | x) with one temperature, or one for the even and one for the odd images."""
    found = result.probabilities(temperature=temperatures[0])
    if len(temperatures) == 2:
        found[1::2] = result.probabilities(temperature=temperatures[1])[1::2]
    return found


def of_images(report: dict[str, Any], result: Any, labels: Any) -> list[dict[str, Any]]:
    """A row for each image: the predicted class, p(c | x) and the bits of each class."""
    found = probabilities_of(result, report["temperatures"])
    rows: list[dict[str, Any]] = [
        {"predicted": int(bits.argmin()), "probabilities": p.tolist(), "class_bits": bits.tolist()}
        for p, bits in zip(found, result.class_bits, strict=True)
    ]
    for name, values in (("label", labels), ("null_bits", result.null_bits)):
        for row, value in zip(rows, [] if values is None else values.tolist(), strict=False):
            row[name] = value
    return rows


def nearest_neighbors(args: argparse.Namespace, data: Any, num_levels: int, num_classes: int, names: Any) -> Any:
    """The class of the nearest image of another split, by the squared distance of pixels."""
    import torch

    other = argparse.Namespace(**vars(args) | {"split": args.neighbors, "allow_shared": True})
    train = load_data(other, num_levels, num_classes, names, False, split_option="neighbors")
    if train.labels is None:
        raise ValueError(f"--neighbors needs images with classes, and {train.name} has none")
    known, found = train.images.flatten(1).float(), []
    for part in data.images.split(256):
        found.append(train.labels[torch.cdist(part.flatten(1).float(), known).argmin(1)])
    return torch.cat(found)


def print_report(report: dict[str, Any], path: Path) -> None:
    """Prints what is measured."""
    from ..evaluation.classes import TEMPERATURES

    print(f"\n{report['model']} on {report['data']}: {report['num_images']} images, {report['num_classes']} classes")
    rows = [
        ("network calls for each image", f"{report['num_calls_per_image']:.1f}"),
        ("  without rejection", str(report["num_calls_without_rejection"])),
        ("seconds for each image", f"{report['seconds_per_image']:.4f}"),
    ]
    if "accuracy" in report:
        temperatures = " and ".join(f"{value:.3g}" for value in report["temperatures"])
        low, high = TEMPERATURES
        if not all(1.01 * low < value < 0.99 * high for value in report["temperatures"]):
            temperatures += " (limit)"
        rows += [
            ("accuracy", with_error(report["accuracy"], report["accuracy_stderr"])),
            ("expected calibration error", f"{report['calibration_error']:.4f}"),
            ("  at temperature 1", f"{report['calibration_error_at_1']:.4f}"),
            ("temperature", temperatures),
            ("entropy of the classes, bits", f"{report['class_entropy_bits']:.3f}"),
            (
                "I(x; c), bits, at least",
                with_error(report["information_bound_bits"], report["information_bound_stderr_bits"], 3),
            ),
            ("I(x; c), bits/dim, at least", f"{report['information_bound_bpd']:.5f}"),
        ]
    if "nearest_neighbor_accuracy" in report:
        rows.append(("accuracy of the nearest neighbor", f"{report['nearest_neighbor_accuracy']:.4f}"))
    if "mutual_information_bits" in report:
        value, error = report["mutual_information_bits"], report["mutual_information_stderr_bits"]
        rows += [
            ("I(x; c), bits, by the null class", with_error(value, error, 3)),
            ("I(x; c), bits/dim, by the null class", f"{report['mutual_information_bpd']:.5f}"),
        ]
    for name, value in rows:
        print(f"  {name:<36}{value:>18}")
    print(f"report: {path}")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command with the command line or with `arguments`; `SystemExit` names an error in one line."""
    tolerate_any_encoding()
    args = parse_options(arguments)
    with errors_in_one_line("diffusers-vdm classify"):
        classify(args)


if __name__ == "__main__":
    main()
