"""The output of train.py: the plan, the results, samples and figures."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..training.run import Plan
from .train_budget import budget_text, has_budget

# the arguments of the pipeline for embedded texts
_ARGUMENTS = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"}


def plan(run, test) -> Plan:
    """Describes what will be trained, on which data, and at what cost."""
    from ..conditions import conditions_taken
    from ..data.images import ImageSet, count_shared, histogram_bpd
    from ..training.cost import matmul_flops_per_second, training_cost
    from ..training.description import HeldOutDescription

    args, accelerator, data, schedule = run.args, run.accelerator, run.data, run.noise_schedule
    world, images = accelerator.num_processes, data.num_images
    cost = training_cost(run.unet, data.shape, num_averages=len(args.ema_decays), mixed_precision=args.mixed_precision)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision, torch.float32)
    flops_per_second = world * matmul_flops_per_second(accelerator.device, dtype)
    shared = histogram = None
    if isinstance(data, ImageSet):
        shared, histogram = count_shared(data, test), histogram_bpd(data, test)
    held_out = HeldOutDescription(test.name, len(test), test.fingerprint, shared, test.files)
    hours = run.total * run.global_rows * cost.flops_per_image / flops_per_second / 3600
    untrained = []
    if run.args.class_conditional and isinstance(data, ImageSet) and data.labels is not None:
        untrained = sorted(set(test.labels.tolist()) - set(data.labels.tolist()))
    steps_of_bound = f"T = {args.num_timesteps}" if args.num_timesteps else "continuous time"
    lines = {
        "data": f"{data.name}: {images or 'an unknown number of'} images of {data.shape}; "
        f"held out, {test.name}: {len(test)}"
        + (f", of which {shared} ARE AMONG THE TRAINING IMAGES" if shared else "")
        + ("" if isinstance(data, ImageSet) else "; NOT COMPARED with the training images, which are streamed"),
        **{f"files{'' if part is data else ', held out'}": part.files for part in (data, test) if part.files},
        **({"columns": columns_of(data)} if data.image_column else {}),
        "network": f"{type(run.unet).__name__}, {cost.num_parameters:,} parameters, predicts {args.prediction_type}"
        + (", compiled" if args.compile else ""),
        **({"conditions": conditions_text(run)} if conditions_taken(run.unet) else {}),
        "noise schedule": f"{type(schedule).__name__}, {schedule.describe()}",
        "objective": {"vdm": "variational bound, ", "ddpm": "unweighted squared error"}[args.objective]
        + ("" if args.objective == "ddpm" else steps_of_bound)
        + (", t drawn more often where the loss is large" if args.importance_sampling else ""),
        "batch": f"{run.global_rows} = {world} × {args.train_batch_size} × {args.gradient_accumulation_steps} "
        "(processes × batch × accumulation)" + (f", {images / run.global_rows:.1f} steps per epoch" if images else ""),
        "steps": f"{run.total}"
        + (f", or {run.total * run.global_rows / images:.1f} epochs" if images else "")
        + f"; {args.lr_scheduler} from "
        f"{args.learning_rate:g}"
        + (f", of Muon from {args.muon_learning_rate:.3g}" if args.optimizer == "muon" else "")
        + f"; averages {args.ema_decays or 'none'}",
        "FLOPs": f"{cost.flops_per_image * run.global_rows:.3g} per step; matrix products here in {dtype}: "
        f"{flops_per_second:.3g} per second, so at least {hours:.3g} h",
        "memory": f"about {cost.memory_bytes(args.train_batch_size) / 2**30:.2f} GiB per process, "
        f"{cost.fixed_bytes / 2**30:.2f} of it for weights, gradients, moments and averages",
    }
    if has_budget(args):
        images_seen = run.total * run.global_rows
        lines["budget"] = budget_text(args, run.unet, images_seen, data.shape, images_seen * cost.flops_per_image)
    if untrained:
        lines["classes"] = f"held-out images have the classes {untrained}, WHICH HAVE NO TRAINING IMAGES"
    if histogram is not None:
        lines["baseline"] = f"histogram of each training pixel: {histogram:.4f} bits/dim held out"
    text = "\n".join(f"{name + ':':<16}{line}" for name, line in lines.items())
    return Plan(text, cost.flops_per_image, flops_per_second, histogram, held_out)


def conditions_text(run) -> str:
    """The conditions of the network, and how often they are withheld."""
    config, conditions = run.unet.config, run.data.conditions
    words = []
    if config.num_class_embeds is not None:
        words.append(f"{config.num_class_embeds} classes")
    if config.get("cond_dim") is not None:
        words.append(f"a vector of {', '.join(conditions.vector_names)}")
    if config.get("cond_channels") is not None:
        factor = conditions.upscale_factor
        words.append(f"the image {factor} times smaller" if factor else f"images of {config.cond_channels} channels")
    if config.get("cross_attention_dim") is not None:
        words.append(f"texts, embedded by {run.args.text_encoder}")
    how = "together" if run.args.drop_together else "independently"
    return f"{', '.join(words)}; withheld from {run.args.condition_dropout:.0%} of the images, {how}"


def columns_of(data) -> str:
    """Describes the columns that are read."""
    classes = "no classes" if data.label_column is None else f"classes {data.label_column!r} ({data.num_classes})"
    return f"images {data.image_column!r}, {classes}"


def evaluation_metrics(results: list, decays: Sequence[float | None], is_conditional: bool) -> dict:
    """The results of an evaluation, with everything needed to quote them; for other averages only the bound."""
    from ..training.metrics import LineOfEvaluation

    errors = [None if math.isnan(result.stderr_bpd) else result.stderr_bpd for result in results]
    first, decay = results[0], decays[0]
    line = LineOfEvaluation(
        first.bpd,
        errors[0],
        {term: getattr(first, f"{term}_bpd") for term in ("prior", "reconstruction", "diffusion")},
        first.num_images,
        first.num_samples,
        first.num_timesteps,
        is_conditional,
        "raw" if decay is None else "ema",
        decay,
        {str(decays[i]): (results[i].bpd, errors[i]) for i in range(1, len(results))},
    )
    return line.to_json()


def is_finished(out: Path, total: int) -> bool:
    """Whether the results of the last step exist."""
    from ..training.metrics import read_metrics

    lines = read_metrics(out / "metrics.jsonl")
    return (
        bool(lines) and lines[-1]["step"] == total and "eval_bpd" in lines[-1] and (out / "model_index.json").exists()
    )


def remove_results(out: Path) -> None:
    """Removes the pipelines and figures that another run left in the folder, by their names."""
    from ..repository import INDEX
    from ..sharing.uploads import PICTURES, components_in

    for folder in [out, *out.glob("ema_*")]:
        if (folder / INDEX).is_file():
            for name in components_in(folder):
                shutil.rmtree(folder / name)
            (folder / INDEX).unlink()
    for path in (path for pattern in PICTURES for path in out.glob(pattern)):
        path.unlink()


def make_pipeline(run):
    """The pipeline with the current weights."""
    from .. import LinearBetaScheduler, VDMPipeline, VDMScheduler
    from ..data.text_table import load_text_encoder

    args = run.args
    cls = LinearBetaScheduler if args.schedule == "linear_beta" else VDMScheduler
    scheduler = cls.from_noise_schedule(run.noise_schedule, prediction_type=args.prediction_type)
    learned = run.noise_schedule if args.schedule.startswith("learned") else None
    encoder, tokenizer = (None, None) if args.caption_column is None else load_text_encoder(args.text_encoder)
    levels = run.data.num_levels
    return VDMPipeline(run.unet.eval(), scheduler, learned, levels, text_encoder=encoder, tokenizer=tokenizer)


def save_pipelines(run) -> None:
    """Saves the first average as the pipeline in output_dir, and the others in its folders ema_DECAY."""
    for decay in run.decays:
        folder = run.out if decay == run.decays[0] else run.out / f"ema_{decay}"
        with run.averaged_weights(decay):
            if not run.accelerator.is_main_process:
                continue
            make_pipeline(run).save_pretrained(folder)
        for weights in folder.glob("*/*.safetensors"):  # they are readable by the owner only, unlike the JSON
            if not weights.parent.name.startswith("checkpoint"):
                shutil.copymode(folder / "model_index.json", weights)


def draw(run, name: str, animation: str | None = None) -> None:
    """Draws samples on all processes, and saves them as a grid and the denoising as a GIF of about 40 frames."""
    from .. import plots
    from ..randomness import keyed_generator

    args, accelerator = run.args, run.accelerator
    frames, steps = [], args.ddpm_num_inference_steps
    if args.schedule == "linear_beta":
        steps = min(steps, args.ddpm_num_steps)  # the network knows only these levels

    def gather_images(tensor: torch.Tensor) -> torch.Tensor:
        return accelerator.gather(tensor.contiguous())[: args.num_images].cpu()

    def keep_frame(pipe, i, t, tensors):
        if i % max(1, steps // 40) == 0 or i == steps - 1:
            frames.append(plots.image_grid(gather_images(tensors["latents"]) / 2 + 0.5))
        return {}

    # all processes draw the same number; the surplus is dropped
    share = math.ceil(args.num_images / accelerator.num_processes)
    first = share * accelerator.process_index
    generators = [keyed_generator(args.seed, "sample", i) for i in range(first, first + share)]
    with run.averaged_weights():
        pipeline = make_pipeline(run)
        pipeline.set_progress_bar_config(disable=not accelerator.is_main_process, leave=False)
        on_step = keep_frame if animation else None
        conditions = run.example_conditions(range(first, first + share))
        # as the arguments of the pipeline, which takes embedded texts under other names
        conditions = {_ARGUMENTS.get(key, key): value for key, value in conditions.items()}
        output: Any = pipeline(share, steps, generators, output_type="pt", callback_on_step_end=on_step, **conditions)
    samples = gather_images(output.images)
    if accelerator.is_main_process:
        plots.image_grid(samples).save(run.out / name)
        if animation:
            plots.save_animation([*frames, plots.image_grid(samples)], run.out / animation)


def finish(run, result, metrics: dict) -> None:
    """Draws the figures and prints the table; all processes must call it."""
    from accelerate.utils import gather_object

    from .. import plots
    from ..training.metrics import read_metrics

    out = run.out
    damaged = sorted(set(gather_object(list(run.data.damaged))))  # each process reads other images
    draw(run, "samples.png", "denoising.gif")
    with run.averaged_weights():
        if run.accelerator.is_main_process:
            plots.plot_schedule(run.noise_schedule, out / "schedule.png")
    if not run.accelerator.is_main_process:
        return
    lines = read_metrics(out / "metrics.jsonl")
    plots.plot_training([*lines, {"step": run.step} | metrics], out / "training.png")
    terms = {n: getattr(result, f"{n}_bpd") for n in ("diffusion", "reconstruction", "prior")}
    plots.plot_loss_by_gamma(result.gamma_t, result.mse, out / "loss_by_gamma.png", terms_bpd=terms)

    uniform = math.log2(run.data.num_levels)
    table = [("uniform over the levels", f"{uniform:.4f}")]
    if run.plan.histogram_bpd is not None:
        table += [("histogram of each training pixel", f"{run.plan.histogram_bpd:.4f}")]
    error = "" if math.isnan(result.stderr_bpd) else f" ± {result.stderr_bpd:.4f}"
    steps = "continuous time" if result.num_timesteps is None else f"T = {result.num_timesteps}"
    table += [(f"this model, {steps}", f"{result.bpd:.4f}" + error)]
    table += [(f"  {term}", f"{value:.4f}") for term, value in terms.items()]
    print(f"\nbits/dim on {result.num_images} held-out images, {result.num_samples} draws each")
    for row in table:
        print(f"  {row[0]:<36}{row[1]:>18}")
    if damaged:
        print("\n".join([f"{len(damaged)} damaged images were skipped in training:", *damaged]))
    print(f"pipeline, metrics and figures are in {out}")
