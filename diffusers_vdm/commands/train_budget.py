"""A budget instead of steps: --max_hours and --max_flops set the steps, the batch and the width of the network."""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from ..multiscale import fast_arguments
from ..training.description import RunDescription
from .train_options import build, is_multiscale, network_of

# seconds for which the speed of a network is measured
MEASURED_SECONDS = 2.0


def has_budget(args: argparse.Namespace) -> bool:
    """Whether hours or FLOPs were given instead of a number of steps."""
    return args.max_hours is not None or args.max_flops is not None


def resolve_budget(
    args: argparse.Namespace, data: Any, accelerator: Any, resumed: RunDescription | None = None
) -> None:
    """Sets `max_train_steps`, `train_batch_size` and `width` for the budget in `args`, if any, equal on all processes.

    A run that is resumed gets the values that it has recorded, because another measurement would give other ones.
    """
    from accelerate.utils import broadcast_object_list

    if not has_budget(args):
        return
    chosen = _recorded(args, data, accelerator, resumed)
    if chosen is None:
        measured = _choose(args, data, accelerator)  # on all processes at once, as they will train
        width, args.train_batch_size, images = broadcast_object_list([measured])[0]
        rows = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        if images < rows:  # on all processes, so that none waits for another one
            name, value = ("max_flops", args.max_flops) if args.max_hours is None else ("max_hours", args.max_hours)
            least = f"{value * rows / images:.3g}; set at least that"
            raise ValueError(f"--{name} {value:g} is less than one step of {rows} images, {least}")
        chosen = width, args.train_batch_size, int(images / rows)
    args.width, args.train_batch_size, args.max_train_steps = chosen
    # the command on a model card repeats the run, wherever it is run
    chosen_names = {"max_train_steps", "train_batch_size"} | ({"width"} if args.width else set())
    args.given = sorted(set(args.given) - {"max_hours", "max_flops"} | chosen_names)


def _recorded(
    args: argparse.Namespace, data: Any, accelerator: Any, description: RunDescription | None
) -> tuple[int | None, int, int] | None:
    """`(width, train_batch_size, max_train_steps)` of the run that is resumed, if it has the same budget.

    The batch is split over the processes that there are now.
    """
    if description is None or any(
        description.options.get(option) != getattr(args, option) for option in ("max_hours", "max_flops")
    ):
        return None
    steps = description.num_steps
    if steps is None:
        return None
    batch = args.train_batch_size
    rows = args.gradient_accumulation_steps * accelerator.num_processes
    if follows_rule(args, data) and "train_batch_size" not in args.given and description.global_batch_size:
        batch, rest = divmod(description.global_batch_size, rows)
        if rest:
            raise ValueError(
                f"the run has {description.global_batch_size} images per step, which {rows} = processes × "
                "gradient_accumulation_steps do not divide; set both so that they do"
            )
    return description.options.get("width"), batch, steps


def _choose(args: argparse.Namespace, data: Any, accelerator: Any) -> tuple[int | None, int, float]:
    """The width, the batch of a process, and the number of images that the budget pays."""
    from ..training.compilation import compile_network
    from ..training.cost import training_cost
    from ..training.scaling import BATCHES, WIDTHS, best_shape

    size = _size(data.shape)

    def cost(width: int | None, batch: int, compiled: bool = False) -> tuple[int, float] | None:
        own = copy.copy(args)
        own.width, own.train_batch_size = width, batch
        unet, noise_schedule = build(own, data)
        count = sum(parameter.numel() for parameter in unet.parameters())
        if args.max_flops is not None:
            return count, training_cost(unet, data.shape).flops_per_image / size
        if compiled:
            compile_network(unet, accelerator)
        try:
            seconds = _seconds_per_image(own, data, unet, noise_schedule, accelerator)
        except torch.OutOfMemoryError:
            if compiled:
                raise
            return None
        return count, seconds / size / accelerator.num_processes

    budget = args.max_flops if args.max_flops is not None else 3600 * args.max_hours
    width, batch, images = args.width, args.train_batch_size, None
    if follows_rule(args, data):  # without compilation, which takes a minute for each network
        groups = network_of(args)[1].get("norm_num_groups", 8)
        widths = [w for w in WIDTHS if w % groups == 0] if width is None else [width]
        batches = [batch] if "train_batch_size" in args.given else BATCHES
        rows = args.gradient_accumulation_steps * accelerator.num_processes
        width, batch, images = best_shape(budget, cost, widths, batches, rows)
    if images is None or (args.compile and args.max_hours is not None):
        found: Any = cost(width, batch, compiled=args.compile)
        images = budget / found[1]
    return width, batch, images / size


def _seconds_per_image(args: argparse.Namespace, data: Any, unet: Any, noise_schedule: Any, accelerator: Any) -> float:
    """Measured time of training on an image, for random images, without reading images and without communication."""
    from ..objectives import SimpleObjective, VariationalBound
    from ..training.averages import WeightAverages
    from ..training.cost import conditions_of_zeros, synchronize
    from ..training.optimizer import make_optimizer

    device = accelerator.device
    shared = {"num_levels": data.num_levels, "prediction_type": args.prediction_type}
    objective = (VariationalBound if args.objective == "vdm" else SimpleObjective)(unet, noise_schedule, **shared)
    objective.to(device).train()
    own = copy.copy(args)
    own.muon_learning_rate = args.muon_learning_rate or 0.01  # follows from the steps, which are not known yet
    optimizer = make_optimizer(own, unet, noise_schedule)
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    averages = WeightAverages(parameters, args.ema_decays, args.ema_inv_gamma, args.ema_power)
    images = torch.randint(0, data.num_levels, (args.train_batch_size, *data.shape), device=device)
    conditions = {name: value.to(device) for name, value in conditions_of_zeros(unet, len(images)).items()}

    def step() -> None:
        for _ in range(args.gradient_accumulation_steps):
            with accelerator.autocast():
                loss = objective(images, **conditions).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        averages.step()

    for _ in range(2):
        step()
    synchronize(device)
    start, steps = time.perf_counter(), 0
    while steps < 3 or time.perf_counter() - start < MEASURED_SECONDS:
        step()
        steps += 1
    synchronize(device)
    return (time.perf_counter() - start) / (steps * len(images) * args.gradient_accumulation_steps)


def follows_rule(args: argparse.Namespace, data: Any) -> bool:
    """Whether the scaling rule may choose width and batch: for networks like those that it was fitted to."""
    if not is_multiscale(args):
        return False
    network = network_of(args)[1]
    if args.preset == "fast":
        network |= fast_arguments(tuple(data.shape[1:]), data.num_levels, data.num_images)
    return not network.get("level_logits", False)


def budget_text(args: argparse.Namespace, unet: Any, num_images: int, shape: Sequence[int], flops: float) -> str:
    """The budget, and what the scaling rule expects of the network after `num_images` images of `shape` and `flops`.

    The rule says nothing of fewer FLOPs than those of its runs: there, it exceeds the bits/dim of uniform values.
    """
    from ..multiscale import VDMMultiscale2DModel
    from ..training.scaling import FITTED_BATCHES, FITTED_FLOPS, FITTED_PARAMETERS, RULE

    budget = f"{args.max_hours:g} h" if args.max_hours is not None else f"{args.max_flops:.3g} FLOPs"
    text = f"{budget}: {args.max_train_steps} steps" + (f", {args.width} channels" if args.width else "")
    if not isinstance(unet, VDMMultiscale2DModel) or unet.config.level_logits:
        return text
    count = sum(parameter.numel() for parameter in unet.parameters())
    batch = num_images // args.max_train_steps
    expected = RULE.expected_bpd(count, num_images * _size(shape), batch)
    least, most = FITTED_FLOPS
    if flops < least:
        return f"{text}; no bits/dim are expected, because the scaling rule begins at {least:.1e} FLOPs"
    known = f"error of the fit {RULE.error_bpd:.3f}"
    for value, limit, unit in (
        (flops, most, f"{most:.1e} FLOPs"),
        (count, FITTED_PARAMETERS[1], f"{FITTED_PARAMETERS[1]:,} parameters"),
        (batch, FITTED_BATCHES[1], f"batches of {FITTED_BATCHES[1]} images"),
    ):
        if value > limit:
            known = f"extrapolated from {unit}"
            break
    return f"{text}; on CIFAR-10, {expected:.3f} bits/dim are expected ({known})"


def _size(shape: Sequence[int]) -> float:
    """The size of an image in images of 32×32 pixels, the unit of the scaling rule."""
    return math.prod(shape[1:]) / 1024
