"""The output of evaluate.py: intermediate results of an interrupted run, the printed table, and the figures."""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..evaluation.report import Report


def partial_folder(args: argparse.Namespace) -> Path:
    """The folder for intermediate results until the report is written."""
    output = Path(args.output)
    return output.with_name(f"{output.stem}.partial")


def check_partial(args: argparse.Namespace) -> None:
    """Raises `ValueError` if there are intermediate results but no --resume option; call it with the lock held."""
    partial = partial_folder(args)
    if args.resume is None and any(partial.glob("*/rows-*.safetensors")):
        raise ValueError(
            f"{partial} holds the results of an interrupted run; continue it with --resume, discard it with "
            "--no-resume, or use another --output"
        )
    if args.resume is False:
        shutil.rmtree(partial, ignore_errors=True)


def with_error(value: float | None, error: float | None = None, digits: int = 4) -> str:
    """A number with its standard error, if that is known."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + ("" if error is None or math.isnan(error) else f" ± {error:.{digits}f}")


def print_report(args: argparse.Namespace, evaluation, report: Report) -> None:
    """Prints the table of results, and what is needed to quote them."""

    name = {"ode": "probability-flow ODE", "mc": "continuous time"}.get(args.method)
    is_optimal = report.details.get("variance_type") == "optimal"
    if report.num_steps is not None:
        chosen = ""
        if args.timesteps:
            chosen = ", best timesteps" if args.timesteps == ["best"] else ", own timesteps"
        name = f"T = {report.num_steps}" + (", best variance" if is_optimal else "") + chosen
    best = report.details.get("best", [])
    print(f"\n{args.model} on {report.data.name}: {report.num_images} images, {report.seconds:.0f} s")
    rows = [(f"bits/dim, {name}", with_error(report.bpd, report.stderr_bpd))]
    rows += [(f"  {term}", f"{bpd:.4f}") for term, bpd in report.terms_bpd.items()]
    if "bpd_with_classes" in report.details:
        rows.append(("with the bits of the class", with_error(report.details["bpd_with_classes"], report.stderr_bpd)))
    rows += [(f"bound at T = {row.num_steps or '∞'}", with_error(row.bpd, row.stderr_bpd)) for row in report.table]
    rows += [(f"bound with the best {row['num_steps']} timesteps", with_error(row["bpd"], None)) for row in best]
    variance = report.details.get("variance_per_call")
    if variance is not None and not math.isnan(variance):  # a single draw of a single image has none
        rows.append(("variance per network call", f"{variance:.3g}"))
        rows.append(("  for uniform t", f"{report.details['plain_variance_per_call']:.3g}"))
    if "mean_num_calls" in report.details:
        rows.append(("network calls per solve", f"{report.details['mean_num_calls']:.0f}"))
    width = max(36, *(len(label) + 2 for label, _ in rows))
    for label, text in rows:
        print(f"  {label:<{width}}{text:>18}")
    output = Path(args.output)
    has_error = report.stderr_bpd is not None and not math.isnan(report.stderr_bpd)
    if has_error:
        also = "; in the rows of --table, of the Monte-Carlo estimate" if report.table and args.method != "mc" else ""
        print(f"± is the standard error of {report.stderr_is_of}{also}")
    if args.target_stderr and has_error and report.stderr_bpd > args.target_stderr:
        print(f"the target of {args.target_stderr} was not reached with --max_samples {args.max_samples}")
    if evaluation.scheduler.config.get("clip_sample", False) and (args.method != "vlb" or report.table):
        print("mc, ode and --table do not clip x̂; this scheduler clips x̂ when it samples, as vlb does")
    if evaluation.variance == "optimal" and (args.method != "vlb" or report.table):
        print("mc, ode and the table have the variance of the posterior; this model's steps have the best one")
    if best:
        print("the best timesteps were chosen on these images; evaluate them on others with --timesteps")
    print(f"report and figures: {output.with_name(output.stem)}*")


def curve(gammas, mse, bins: int = 50) -> dict[str, list[float]]:
    """Means of γ and the squared error over equal-sized groups of the draws, in order of γ."""
    order = gammas.flatten().argsort()
    parts = min(bins, len(order))
    gamma, error = (values.flatten()[order].tensor_split(parts) for values in (gammas, mse))
    return {
        "curve_gamma": [float(part.mean()) for part in gamma],
        "curve_mse": [float(part.mean()) for part in error],
    }


def draw(output: Path, evaluation, result, terms_bpd: dict[str, float]) -> None:
    """Draws the curve over γ, the histogram of bits, and the most and least likely images."""
    from .. import plots

    def path(name: str) -> Path:
        return output.with_name(f"{output.stem}_{name}.png")

    for name in ("by_gamma", "histogram", "most_likely", "most_unlikely"):  # left by an earlier report
        path(name).unlink(missing_ok=True)
    if hasattr(result, "mse"):
        gammas = result.gamma_t if hasattr(result, "gamma_t") else result.gammas.expand_as(result.mse)
        steps = getattr(result, "num_steps", None) or result.num_timesteps
        title = "" if steps is None else f"density: continuous time; bar: T = {steps}"
        plots.plot_loss_by_gamma(gammas, result.mse, path("by_gamma"), terms_bpd=terms_bpd, title=title)
    plots.plot_bits_histogram(result.per_image_bpd, path("histogram"))
    images = evaluation.data.images
    if images.shape[1] in (1, 3):
        order = result.per_image_bpd.argsort()
        count = min(16, len(order))
        for name, index in (("most_likely", order[:count]), ("most_unlikely", order.flip(0)[:count])):
            plots.image_grid(images[index].float() / (evaluation.num_levels - 1)).save(path(name))
