"""What evaluate.py leaves behind: the numbers of an interrupted run, the table in the end, and the figures."""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..evaluation.report import Report


def partial_folder(args: argparse.Namespace) -> Path:
    """Where the numbers of a run are kept until its report is there."""
    output = Path(args.output)
    return output.with_name(f"{output.stem}.partial")


def check_partial(args: argparse.Namespace) -> None:
    """`ValueError` rather than the loss of work that nobody asked to throw away; no other run may be at it."""
    partial = partial_folder(args)
    if args.resume is None and any(partial.glob("*/rows-*.safetensors")):
        raise ValueError(
            f"{partial} holds the numbers of an interrupted run; go on with it by --resume, throw it away by "
            "--no-resume, or name another --output"
        )
    if args.resume is False:
        shutil.rmtree(partial, ignore_errors=True)


def print_report(args: argparse.Namespace, evaluation, report: Report) -> None:
    """Prints the table of the numbers, and what they must be quoted with."""

    def value(bpd: float | None, error: float | None) -> str:
        return f"{bpd:.4f}" + ("" if error is None or math.isnan(error) else f" ± {error:.4f}")

    name = {"ode": "probability-flow ODE", "mc": "continuous time"}.get(args.method)
    if report.num_steps is not None:
        name = f"T = {report.num_steps}"
    best = report.details.get("best", [])
    print(f"\n{args.model} on {report.data.name}: {report.num_images} images, {report.seconds:.0f} s")
    rows = [(f"bits/dim, {name}", value(report.bpd, report.stderr_bpd))]
    rows += [(f"  {term}", f"{bpd:.4f}") for term, bpd in report.terms_bpd.items()]
    rows += [(f"bound at T = {row.num_steps or '∞'}", value(row.bpd, row.stderr_bpd)) for row in report.table]
    rows += [(f"bound with the best {row['num_steps']} timesteps", value(row["bpd"], None)) for row in best]
    if report.details.get("variance_per_call") is not None:
        rows.append(("variance per network call", f"{report.details['variance_per_call']:.3g}"))
        rows.append(("  of plain uniform t", f"{report.details['plain_variance_per_call']:.3g}"))
    if "mean_num_calls" in report.details:
        rows.append(("network calls of a solve", f"{report.details['mean_num_calls']:.0f}"))
    for label, text in rows:
        print(f"  {label:<36}{text:>18}")
    output = Path(args.output)
    has_error = report.stderr_bpd is not None and not math.isnan(report.stderr_bpd)
    if has_error:
        also = "; in the rows of the table, of the draws" if report.table and args.method != "mc" else ""
        print(f"± is the standard error of {report.stderr_is_of}{also}")
    if args.target_stderr and has_error and report.stderr_bpd > args.target_stderr:
        print(f"the target of {args.target_stderr} was not reached with --max_samples {args.max_samples}")
    if evaluation.scheduler.config.get("clip_sample", False) and (args.method != "vlb" or report.table):
        print("mc, ode and the table are of the model as it is; this scheduler clips x̂ when it samples, as vlb does")
    if best:
        print("the best timesteps were chosen on these very images; judge them on others by --timesteps")
    print(f"report and figures: {output.with_name(output.stem)}*")


def curve(gammas, mse, bins: int = 50) -> dict[str, list[float]]:
    """Means of the squared error over equal shares of the draws, by γ."""
    order = gammas.flatten().argsort()
    parts = min(bins, len(order))
    gamma, error = (values.flatten()[order].tensor_split(parts) for values in (gammas, mse))
    return {
        "curve_gamma": [float(part.mean()) for part in gamma],
        "curve_mse": [float(part.mean()) for part in error],
    }


def draw(output: Path, evaluation, result, terms_bpd: dict[str, float]) -> None:
    """The curve over γ, the histogram of bits, and the most and least likely images."""
    from .. import plots

    def path(name: str) -> Path:
        return output.with_name(f"{output.stem}_{name}.png")

    for name in ("by_gamma", "histogram", "most_likely", "most_unlikely"):  # of a report that this one replaces
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
