"""Train a Variational Diffusion Model, or a DDPM, on images, and see its likelihood in bits per dimension.

    accelerate launch examples/train.py                                     # bundled digits: minutes on a laptop CPU
    accelerate launch examples/train.py --objective ddpm --schedule linear_beta          # DDPM, on the same digits
    accelerate launch examples/train.py --preset cifar10 --dataset_name uoft-cs/cifar10 --mixed_precision bf16
    accelerate launch examples/train.py --preset ddpm-ffhq128 --train_data_dir faces --resolution 128

In --output_dir: the pipeline with its EMA weights, metrics.jsonl, options.json, samples.png, schedule.png,
loss_by_gamma.png, denoising.gif, and checkpoints. Options are named as in diffusers' train_unconditional.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from train_options import build, load_data, parse_options


def training_loss(objective, data, o: argparse.Namespace, step: int, rows: range, global_rows: int, device):
    """Loss of some rows of the global batch of a step; all that is random in it is keyed on (seed, step, row)."""
    from diffusers_vdm import training

    batch = training.keyed_batch(data, step, rows, global_rows, o.seed, o.random_flip)
    unet = objective.module.unet if hasattr(objective, "module") else objective.unet
    inputs = {"t": batch.t, "eps": batch.eps}
    if o.objective == "vdm":
        inputs["eps_0"] = batch.eps_0
    if o.random_flip and getattr(unet.config, "augmentation_flag", False):
        inputs["augmentation_flags"] = batch.flipped
    if unet.config.num_class_embeds is not None:
        # one label in ten is withheld, which trains the null class
        null = torch.full_like(batch.labels, unet.config.num_class_embeds)
        inputs["class_labels"] = torch.where(batch.withheld, null, batch.labels)
    torch.manual_seed(training.key_to_seed(o.seed, "dropout", step, rows.start))
    return objective(batch.images.to(device), **{k: v.to(device, non_blocking=True) for k, v in inputs.items()}).loss


@contextmanager
def told_to_the_user():
    """What is wrong with files and arguments is said in one line, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"train.py: {error}") from error


def main(o: argparse.Namespace) -> None:
    from accelerate import Accelerator
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from tqdm.auto import tqdm

    from diffusers_vdm import checkpoints, training
    from diffusers_vdm.images import histogram_bpd as histogram_of
    from diffusers_vdm.vlb import SimpleObjective, VariationalBound, evaluate_bound

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = o.allow_tf32
    out = Path(o.output_dir)
    accelerator = Accelerator(
        mixed_precision=o.mixed_precision,
        gradient_accumulation_steps=o.gradient_accumulation_steps,
        log_with=None if o.logger == "none" else o.logger,
        project_dir=str(out / o.logging_dir),
    )
    world, is_main = accelerator.num_processes, accelerator.is_main_process
    if int(os.environ.get("WORLD_SIZE", 1)) != world:
        raise SystemExit(
            f"{os.environ['WORLD_SIZE']} processes were launched, but each would run alone and write into one folder; "
            "on a CPU, set ACCELERATE_USE_CPU=1 and launch with --multi_gpu --num_processes N"
        )
    if accelerator.device.type == "cpu":  # `accelerate launch` leaves one thread, unless told otherwise
        torch.set_num_threads(o.num_threads or max(1, os.cpu_count() // world))

    with told_to_the_user():
        train, test = load_data(o, progress_bar=is_main)
        torch.manual_seed(training.key_to_seed(o.seed, "weights"))
        unet, noise_schedule = build(o, train)
    shared = {"num_levels": train.num_levels, "prediction_type": o.prediction_type}
    # a DDPM knows the T levels of its betas, so that its bound has the T − 1 steps between them
    bound_steps = o.num_timesteps if o.schedule != "linear_beta" or o.objective == "vdm" else o.ddpm_num_steps - 1
    # apart from the objective, which accelerate puts under autocast: bits/dim are measured in float32
    bound = VariationalBound(unet, noise_schedule, num_timesteps=bound_steps, **shared)
    if o.objective == "vdm":
        objective = VariationalBound(unet, noise_schedule, num_timesteps=o.num_timesteps, **shared)
    else:
        objective = SimpleObjective(unet, noise_schedule, **shared)

    global_rows = o.train_batch_size * o.gradient_accumulation_steps * world
    total = o.max_train_steps or math.ceil(o.num_epochs * len(train) / global_rows)
    parameters = [p for p in objective.parameters() if p.requires_grad]
    groups = [{"params": list(unet.parameters())}]
    if any(p.requires_grad for p in noise_schedule.parameters()):  # decay would pull γ to a shape of its own
        groups.append({"params": list(noise_schedule.parameters()), "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(
        groups, o.learning_rate, (o.adam_beta1, o.adam_beta2), o.adam_epsilon, o.adam_weight_decay, fused=True
    )
    steps = {"num_warmup_steps": o.lr_warmup_steps, "num_training_steps": total}
    lr_scheduler = get_scheduler(o.lr_scheduler, optimizer, **steps)
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    ema = None
    if o.use_ema:
        ema = EMAModel(parameters, o.ema_max_decay, use_ema_warmup=True, inv_gamma=o.ema_inv_gamma, power=o.ema_power)

    start, logged, loss_sum = 0, 0, 0.0
    if o.resume_from_checkpoint:
        with told_to_the_user():
            folder = checkpoints.find_checkpoint(out, o.resume_from_checkpoint)
            state = checkpoints.restore(
                folder, objective, optimizer, lr_scheduler, ema, describe(o, train, global_rows)
            )
        start, logged, loss_sum = state["step"], *(state["run"][name] for name in ("logged", "loss_sum"))
        accelerator.print(f"going on from {folder}")
    if start >= total:
        raise SystemExit(f"nothing to do: this run is finished, {folder} is at step {start} of {total}")
    if is_main:
        out.mkdir(parents=True, exist_ok=True)
        if start == 0:  # --overwrite_output_dir: nothing of the other run may be taken for this one's
            checkpoints.remove_checkpoints(out)
        training.write_atomically(out / "options.json", json.dumps(describe(o, train, global_rows), indent=2))
        training.truncate_metrics(out / "metrics.jsonl", start)
    plain = {k: v for k, v in vars(o).items() if isinstance(v, int | float | str) and k != "hub_token"}
    accelerator.init_trackers("train", plain)
    histogram_bpd = histogram_of(train, test)
    accelerator.print(
        f"{train.name} / {test.name}: {len(train)} / {len(test)} images of {tuple(train.images.shape[1:])}\n"
        f"{sum(p.numel() for p in unet.parameters()):,} parameters, {type(noise_schedule).__name__}: "
        f"{noise_schedule.describe()}\nhistogram of each training pixel: {histogram_bpd:.4f} bits/dim held out"
    )

    def evaluate(num_samples: int, num_images: int | None):
        labels = test.labels[:num_images] if unet.config.num_class_embeds is not None else None
        with training.ema_weights(ema, parameters):
            return evaluate_bound(
                bound,
                test.images[:num_images],
                class_labels=labels,
                num_samples=num_samples,
                batch_size=o.eval_batch_size,
                accelerator=accelerator,
            )

    name = "train_bpd" if o.objective == "vdm" else "train_mse"
    shown, clock, timed = {}, time.perf_counter(), start
    loss_sum = torch.tensor(loss_sum, device=accelerator.device)
    epoch = math.ceil(len(train) / global_rows)
    objective.train()
    bar = tqdm(range(start, total), initial=start, total=total, desc="training", disable=not is_main)
    for step in bar:
        for micro in range(o.gradient_accumulation_steps):
            first = (micro * world + accelerator.process_index) * o.train_batch_size
            rows = range(first, first + o.train_batch_size)
            with accelerator.accumulate(wrapped):
                loss = training_loss(wrapped, train, o, step, rows, global_rows, accelerator.device)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(parameters, o.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            loss_sum += loss.detach() / o.gradient_accumulation_steps
        lr_scheduler.step()
        if ema is not None:
            ema.step(parameters)

        done, metrics = step + 1, {}
        if done % o.logging_steps == 0 or done == total:
            value = float(accelerator.reduce(loss_sum, "mean")) / (done - logged)
            if not math.isfinite(value):
                raise SystemExit(
                    f"{name} is {value} between the steps {logged} and {done}, and nothing of that was saved; lower "
                    "--learning_rate, or go on from before by --resume_from_checkpoint latest"
                )
            speed = (done - timed) * global_rows / (time.perf_counter() - clock)
            metrics = {name: value, "learning_rate": lr_scheduler.get_last_lr()[0], "images_per_second": speed}
            shown |= {name: f"{value:.3f}"}
            loss_sum.zero_()
            logged, timed, clock = done, done, time.perf_counter()
        if done == total or (o.eval_steps and done % o.eval_steps == 0):
            result = evaluate(o.eval_samples, None) if done == total else evaluate(1, o.max_eval_images)
            metrics |= evaluation_metrics(result) | {"eval_weights": "ema" if ema else "raw"}
            shown |= {"eval_bpd": f"{result.bpd:.4f}"}
            clock = time.perf_counter()
        if metrics:
            bar.set_postfix(shown)
            accelerator.log(metrics, step=done)
            if is_main:
                training.append_metrics(out / "metrics.jsonl", {"step": done} | metrics)
        if o.checkpointing_steps and done % o.checkpointing_steps == 0:
            loss_sum = accelerator.reduce(loss_sum, "mean")
            if is_main:
                run = describe(o, train, global_rows) | {"logged": logged, "loss_sum": float(loss_sum)}
                checkpoints.save(out, done, objective, optimizer, lr_scheduler, ema, run, o.checkpoints_total_limit)
        due = [epochs and done % (epochs * epoch) == 0 for epochs in (o.save_images_epochs, o.save_model_epochs)]
        if is_main and any(due) and done < total:
            with training.ema_weights(ema, parameters):
                pipeline = make_pipeline(o, unet, noise_schedule, train.num_levels)
                if due[0]:
                    draw(o, pipeline, out, f"samples-{done}.png")
                if due[1]:
                    pipeline.save_pretrained(out)
            objective.train()
            clock = time.perf_counter()
    if is_main:
        with training.ema_weights(ema, parameters):
            finish(o, make_pipeline(o, unet, noise_schedule, train.num_levels), noise_schedule, result, histogram_bpd)
    accelerator.end_training()


def evaluation_metrics(result) -> dict:
    """The numbers of an evaluation, with all that a bits/dim must be quoted with."""
    return {
        "eval_bpd": result.bpd,
        "eval_bpd_stderr": None if math.isnan(result.stderr_bpd) else result.stderr_bpd,
        **{f"eval_{term}_bpd": getattr(result, f"{term}_bpd") for term in ("prior", "reconstruction", "diffusion")},
        **{f"eval_{name}": getattr(result, name) for name in ("num_images", "num_samples", "num_timesteps")},
    }


def describe(o: argparse.Namespace, data, global_rows: int) -> dict:
    """What a run is: its options, its data, and what it ran on."""
    import accelerate
    import diffusers

    import diffusers_vdm

    modules = (torch, diffusers, accelerate, diffusers_vdm)
    return {
        "options": vars(o) | {"hub_token": None},
        "data": {"name": data.name, "images": len(data), "fingerprint": data.fingerprint},
        "global_batch_size": global_rows,
        "versions": {module.__name__: module.__version__ for module in modules},
    }


def make_pipeline(o: argparse.Namespace, unet, noise_schedule, num_levels: int):
    from diffusers_vdm import LinearBetaScheduler, VDMPipeline, VDMScheduler

    cls = LinearBetaScheduler if o.schedule == "linear_beta" else VDMScheduler
    scheduler = cls.from_noise_schedule(noise_schedule, prediction_type=o.prediction_type)
    learned = noise_schedule if o.schedule.startswith("learned") else None
    return VDMPipeline(unet.eval(), scheduler, learned, num_levels=num_levels)


def draw(o: argparse.Namespace, pipeline, out: Path, name: str, animation: str | None = None) -> None:
    """Samples as a grid, and the way there as a GIF of about 40 frames."""
    from diffusers_vdm import plots
    from diffusers_vdm.vlb import keyed_generator

    frames, steps = [], o.ddpm_num_inference_steps
    if o.schedule == "linear_beta":
        steps = min(steps, o.ddpm_num_steps)  # the levels that the network knows

    def keep_frame(pipe, i, t, tensors):
        if i % max(1, steps // 40) == 0 or i == steps - 1:
            frames.append(plots.image_grid(tensors["latents"] / 2 + 0.5))
        return {}

    generators = [keyed_generator(o.seed, "sample", i) for i in range(o.num_images)]
    on_step = keep_frame if animation else None
    samples = pipeline(o.num_images, steps, generators, output_type="pt", callback_on_step_end=on_step).images
    plots.image_grid(samples).save(out / name)
    if animation:
        plots.save_animation([*frames, plots.image_grid(samples)], out / animation)


def finish(o: argparse.Namespace, pipeline, noise_schedule, result, histogram_bpd: float) -> None:
    """Saves the pipeline, draws the pictures, prints the table."""
    from diffusers_vdm import plots

    out = Path(o.output_dir)
    pipeline.save_pretrained(out)
    draw(o, pipeline, out, "samples.png", "denoising.gif")
    plots.plot_schedule(noise_schedule, out / "schedule.png")
    terms = {n: getattr(result, f"{n}_bpd") for n in ("diffusion", "reconstruction", "prior")}
    plots.plot_loss_by_gamma(result.gamma_t, result.mse, out / "loss_by_gamma.png", terms_bpd=terms)

    uniform = math.log2(pipeline.config.num_levels)
    table = [("every level alike", f"{uniform:.4f}"), ("histogram of each training pixel", f"{histogram_bpd:.4f}")]
    error = "" if math.isnan(result.stderr_bpd) else f" ± {result.stderr_bpd:.4f}"
    steps = "continuous time" if result.num_timesteps is None else f"T = {result.num_timesteps}"
    table += [(f"this model, {steps}", f"{result.bpd:.4f}" + error)]
    table += [(f"  {term}", f"{value:.4f}") for term, value in terms.items()]
    print(f"\nbits/dim on {result.num_images} held-out images, {result.num_samples} draws each")
    for row in table:
        print(f"  {row[0]:<36}{row[1]:>18}")
    print(f"pipeline, metrics and pictures are in {out}")
    if o.push_to_hub:
        repo = o.hub_model_id or out.name
        pipeline.push_to_hub(repo, token=o.hub_token, private=o.hub_private_repo)
        print(f"pushed to {repo}")


if __name__ == "__main__":
    try:
        main(parse_options(__doc__))
    except KeyboardInterrupt:
        raise SystemExit("stopped; --resume_from_checkpoint latest goes on from the newest checkpoint") from None
