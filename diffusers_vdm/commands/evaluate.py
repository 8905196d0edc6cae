"""Measure the likelihood of images in bits per dimension, for our models and diffusers' pixel-space checkpoints.

    accelerate launch examples/evaluate.py --model runs/digits                       # bundled digits, continuous time
    accelerate launch examples/evaluate.py --model runs/digits --target_stderr 0.002   # until the error is this small
    accelerate launch examples/evaluate.py --model runs/digits --table 10 50 250 1000        # the bound over T
    accelerate launch examples/evaluate.py --model runs/digits --method vlb --num_steps 1000 --best_steps 10 25
    accelerate launch examples/evaluate.py --model runs/digits --method ode
    accelerate launch examples/evaluate.py --model google/ddpm-cifar10-32 --dataset_name uoft-cs/cifar10 --method vlb

--method mc draws (t, ε) for each image, in continuous time or with --num_steps; vlb computes every term for every
image; ode solves the probability-flow ODE for every image. A report is written with everything needed to quote the
result, and figures next to it. --resume continues an interrupted run of the same command.
"""

from __future__ import annotations

import argparse
import math
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ..console import errors_in_one_line, tolerate_any_encoding
from .evaluate_options import check_condition_options, load_data, load_model, parse_options
from .evaluate_report import check_partial, curve, draw, partial_folder, print_report
from .processes import evaluation_accelerator, only_run

DECODERS = {"vdm": "softmax over the levels at γ_0", "ddpm": "discretized Gaussian at index 0"}


class Evaluation:
    """A model, its data, and the methods to measure it; intermediate results are kept in folders until the end."""

    def __init__(self, args: argparse.Namespace, accelerator):
        import torch

        from .. import Calibration, noise_schedule_of
        from ..data.conditions import conditions_of
        from ..evaluation.chain import chosen_variance, own_calibration
        from ..repository import read_json

        self.args, self.accelerator = args, accelerator
        self.unet, self.scheduler, self.num_levels, self.weights, names = load_model(args.model)
        check_condition_options(args, self.unet)
        if args.null_conditions:
            check_nulls(self.unet)
        num_classes = self.unet.config.get("num_class_embeds")
        self.data = load_data(args, self.num_levels, num_classes, names, accelerator.is_main_process)
        if accelerator.is_main_process and self.data.files:
            print(self.data.files)
        if self.unet.dtype != torch.float32:
            self.unet.to(torch.float32)
        self.unet.to(accelerator.device).eval()
        if args.method != "vlb" or args.table:
            self.noise_schedule = noise_schedule_of(self.scheduler)
        self.prediction_type = self.scheduler.config.get("prediction_type", "epsilon")
        self.variance = chosen_variance(self.scheduler, args.variance)
        if args.calibration and self.variance == "posterior" and args.timesteps != ["best"]:
            raise ValueError("--calibration needs --variance optimal or --timesteps best, which use it")
        self.calibration = own_calibration(self.scheduler)
        if args.calibration:
            path = Path(args.calibration)
            self.calibration = Calibration.from_json(read_json(path, path.name))
        self.partial = partial_folder(args)
        self.folders: list[Path] = []
        images, labels = self.data.images, self.data.labels
        without_text = torch.ones(len(images), dtype=torch.bool) if args.null_conditions else None
        given = conditions_of(self.unet, images, self.num_levels, labels, self.data.conditions, without_text)
        self.conditions = sorted(given)
        if args.null_conditions:
            # the null of a text is the empty text, which is given
            given = {name: value for name, value in given.items() if name.startswith("encoder_")}
            self.conditions = []
        self.shared = {
            **given,
            "batch_size": args.batch_size,
            "seed": args.seed,
            "accelerator": accelerator,
            "progress_bar": accelerator.is_main_process,
        }

    def folder(self, name: str) -> Path:
        """The folder for the intermediate results of a measurement."""
        self.folders.append(self.partial / name)
        return self.folders[-1]

    def tidy(self) -> None:
        """Removes the intermediate results, after the report is written."""
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)
        if self.partial.is_dir() and not any(self.partial.iterdir()):
            self.partial.rmdir()

    def mc(self, num_steps: int | None, num_samples: int, folder: str, **more):
        from .. import VariationalBound, evaluate_mc

        bound = VariationalBound(
            self.unet,
            self.noise_schedule,
            num_timesteps=num_steps,
            num_levels=self.num_levels,
            prediction_type=self.prediction_type,
        ).to(self.accelerator.device)
        more |= {"num_samples": num_samples, "resume_dir": self.folder(folder)}
        return evaluate_mc(bound, self.data.images, **more, **self.shared)

    def calibration_record(self) -> dict[str, Any]:
        """What a reader must know of the calibration: how detailed it is, and on which images it was measured."""
        table = self.calibration
        if table is None:
            return {}
        names = ("detail", "num_images", "num_draws", "data", "data_fingerprint", "weights_fingerprint", "clip_sample",
                 "seed")  # fmt: skip
        shared = {"num_shared_images": table.count_shared(self.data.images)}
        return shared | {"num_gammas": len(table.gammas)} | {name: getattr(table, name) for name in names}

    def vlb(self):
        from .. import evaluate_vlb

        args = self.args
        return evaluate_vlb(
            self.unet,
            self.scheduler,
            self.data.images,
            num_steps=args.num_steps,
            timesteps="best" if args.timesteps == ["best"] else args.timesteps,
            convention=args.convention,
            variance=args.variance,
            calibration=self.calibration,
            num_levels=self.num_levels,
            resume_dir=self.folder("vlb"),
            **self.shared,
        )

    def ode(self):
        from .. import evaluate_ode

        names = ("dequantization", "num_samples", "num_importance_samples", "divergence", "num_probes", "rtol", "atol")
        return evaluate_ode(
            self.unet,
            self.noise_schedule,
            self.data.images,
            prediction_type=self.prediction_type,
            num_levels=self.num_levels,
            resume_dir=self.folder("ode"),
            **{name: getattr(self.args, name) for name in names},
            **self.shared,
        )


def check_nulls(unet: Any) -> None:
    """Raises `ValueError` for a network that takes no condition, or one whose null it does not know."""
    from ..conditions import conditions_needed, conditions_taken

    if not conditions_taken(unet):
        raise ValueError("--null_conditions needs a model with conditions, and this one takes none")
    for name in conditions_needed(unet):
        if name != "encoder_hidden_states":
            raise ValueError(f"--null_conditions needs a model that knows the null of {name}, and this one does not")


def measure(evaluation: Evaluation) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The result of `--method`, the fields of the report that belong to the method, and its details."""
    from .. import best_timesteps
    from ..evaluation.report import OF_THE_DRAWS, OF_THE_POPULATION

    args = evaluation.args
    if args.method == "mc":
        more = {"target_stderr_bpd": args.target_stderr, "max_samples": args.max_samples}
        more |= {"importance_sampling": args.importance_sampling}
        result = evaluation.mc(args.num_steps, args.num_samples, "mc", **more)
        how = {"num_steps": result.num_timesteps, "num_samples": result.num_samples, "convention": "vdm"}
        return (
            result,
            how | {"stderr_is_of": OF_THE_DRAWS},
            {
                "target_stderr_bpd": args.target_stderr,
                "importance_sampling": args.importance_sampling,
                "variance_per_call": result.variance_per_call,
                "plain_variance_per_call": result.plain_variance_per_call,
                "decoder": DECODERS["vdm"],
                **curve(result.gamma_t, result.mse),
            },
        )
    if args.method == "ode":
        result = evaluation.ode()
        names = ("num_importance_samples", "dequantization", "divergence", "num_probes", "gamma_start",
                 "gamma_end", "rtol", "atol", "draws_stderr_bpd")  # fmt: skip
        how = {"num_samples": result.num_samples, "convention": "vdm", "stderr_is_of": OF_THE_POPULATION}
        return (
            result,
            how,
            {
                **{name: getattr(result, name) for name in names},
                "mean_num_calls": float(result.num_calls.mean()),
            },
        )
    if args.best_steps and not str(evaluation.scheduler.config.get("variance_type", "fixed_small")).startswith(
        "fixed_small"
    ):
        raise ValueError(
            "--best_steps needs the fixed_small variance: with others, a term is not a function of one level's error"
        )
    table = evaluation.calibration if evaluation.variance == "optimal" else None
    if args.best_steps and table is not None and table.detail != "level":
        raise ValueError(
            f"--best_steps needs a calibration of --detail level, got {table.detail}; --timesteps best takes any"
        )
    steps = args.num_steps or evaluation.scheduler.config.num_train_timesteps
    if args.timesteps and args.num_steps is None:
        steps = len(args.timesteps)
    if args.best_steps and max(args.best_steps) > steps:
        raise ValueError(
            f"--best_steps must be at most the {steps} steps that are measured, got {max(args.best_steps)}"
        )
    result = evaluation.vlb()
    terms = result.terms_bpd
    errors = [None] * terms.shape[1]  # undefined for one image
    if result.num_images > 1:
        errors = (terms.std(0) / math.sqrt(result.num_images)).tolist()
    rows = zip(result.gammas.tolist(), terms.mean(0).tolist(), errors, strict=True)
    best = {}
    if args.best_steps:
        found = {steps: best_timesteps(result, steps) for steps in sorted(args.best_steps)}
        best = {"best": [{"num_steps": n, "bpd": bpd, "timesteps": steps} for n, (steps, bpd) in found.items()]}
    how = {"num_steps": result.num_steps, "convention": result.convention, "clip_sample": result.clip_sample}
    return (
        result,
        how | {"stderr_is_of": OF_THE_POPULATION},
        {
            "decoder": DECODERS[result.convention],
            "variance_type": result.variance_type,
            **({"calibration": evaluation.calibration_record()} if result.variance_type == "optimal" else {}),
            **({"timesteps": result.timesteps} if args.timesteps else {}),
            "terms": [{"gamma": gamma, "bpd": bpd, "stderr_bpd": error} for gamma, bpd, error in rows],
            **curve(result.gammas.expand_as(result.mse), result.mse),
            **best,
        },
    )


def evaluate(args: argparse.Namespace) -> None:
    """Evaluates on all processes; nothing next to the report is read or written before the lock is taken."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, _: sys.exit(128 + number))  # the exception saves intermediate results
    output = Path(args.output)
    taken = f"another run is writing to --output {output}; wait for its end, or use another file"
    with (
        errors_in_one_line("evaluate.py"),
        evaluation_accelerator(args) as accelerator,
        only_run(accelerator, output.with_name(f".{output.stem}.lock"), taken, lambda: check_partial(args)),
    ):
        run_evaluation(args, accelerator)


def run_evaluation(args: argparse.Namespace, accelerator) -> None:
    import accelerate
    import diffusers
    import torch

    import diffusers_vdm

    from ..data.images import DIGITS
    from ..evaluation.report import TERMS, BoundAtSteps, MeasuredData, Report
    from ..evaluation.rows import gammas_fingerprint, weights_fingerprint

    evaluation = Evaluation(args, accelerator)
    start = time.perf_counter()
    result, how, details = measure(evaluation)
    seconds = time.perf_counter() - start
    table = []
    for num_steps in [*sorted(args.table), None] if args.table else []:
        row = evaluation.mc(num_steps, args.num_samples if args.method == "mc" else 20, f"table-{num_steps}")
        table.append(BoundAtSteps(num_steps, row.bpd, row.stderr_bpd, row.num_samples))
    if not accelerator.is_main_process:
        return

    modules = (torch, diffusers, accelerate, diffusers_vdm)
    data = evaluation.data
    if "class_labels" in evaluation.conditions:  # p(x) ≥ p(x | c)/K, for equal p(c) of K classes
        of_class = math.log2(evaluation.unet.config.num_class_embeds) / math.prod(data.images.shape[1:])
        details["bpd_with_classes"] = result.bpd + of_class
    report = Report(
        model=args.model,
        method=args.method,
        bpd=result.bpd,
        stderr_bpd=result.stderr_bpd,
        terms_bpd={term: getattr(result, f"{term}_bpd") for term in TERMS if hasattr(result, f"{term}_bpd")},
        num_images=result.num_images,
        num_levels=evaluation.num_levels,
        prediction_type=evaluation.prediction_type,
        scheduler=type(evaluation.scheduler).__name__,
        weights=evaluation.weights,
        weights_fingerprint=weights_fingerprint(evaluation.unet),
        gammas_fingerprint=gammas_fingerprint(evaluation.scheduler),
        class_conditional="class_labels" in evaluation.conditions,
        conditions=evaluation.conditions,
        dtype="float32" + (", TF32 products" if args.allow_tf32 else ""),
        seed=args.seed,
        data=MeasuredData(
            name=data.name,
            dataset=args.dataset_name or args.data_dir or DIGITS,
            split=args.split,
            is_folder=args.data_dir is not None,
            shape=list(data.images.shape),
            fingerprint=data.fingerprint,
            files=data.files,
            image_column=data.image_column,
            label_column=data.label_column,
            resolution=args.resolution,
            center_crop=args.center_crop,
            image_mode=args.image_mode,
            frames=args.frames,
            allow_shared=args.allow_shared,
        ),
        versions={module.__name__: module.__version__ for module in modules},
        num_processes=accelerator.num_processes,
        seconds=seconds,
        table=table,
        details=details,
        per_image_bpd=result.per_image_bpd.tolist(),
        **how,
    )
    output = Path(args.output)
    report.save(output)
    draw(output, evaluation, result, report.terms_bpd)
    evaluation.tidy()
    print_report(args, evaluation, report)


def main(arguments: list[str] | None = None) -> None:
    """Evaluates for the command line, or `arguments`; exits with an error message of one line."""
    tolerate_any_encoding()
    evaluate(parse_options(__doc__ or "", arguments))


if __name__ == "__main__":
    main()
