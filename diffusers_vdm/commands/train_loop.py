"""The training loop, and what is due after each step: evaluations, samples, checkpoints and uploads."""

from __future__ import annotations

import argparse
import math
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..console import errors_in_one_line
from ..randomness import key_to_seed
from ..training import checkpoints, compilation
from ..training.description import RunDescription
from ..training.metrics import append_metrics, truncate_metrics
from ..training.run import Clock, Run
from ..training.stopping import Stopped, StopRequest
from .precision import resolve_precision
from .processes import check_processes, check_sharding, hold_process_group, load_collectives, only_run, set_threads
from .train_budget import resolve_budget
from .train_data import load_data
from .train_hub import Sharing
from .train_options import build, check_output_dir, resumed_description
from .train_report import draw, evaluation_metrics, finish, is_finished, plan, remove_results, save_pipelines


def set_up(args: argparse.Namespace):
    """The accelerator, after checks of its processes, and what a run that is resumed recorded; also sets threads."""
    from accelerate import Accelerator

    load_collectives()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    torch.backends.cudnn.deterministic = True  # otherwise a resumed run would not repeat every bit on a GPU
    resumed = resumed_description(args)
    resolve_precision(args, resumed)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.logger == "none" or args.dry_run else args.logger,
        project_dir=str(Path(args.output_dir) / args.logging_dir),
    )
    check_processes(accelerator)
    check_sharding(accelerator)
    args.compile = args.compile or compilation.is_requested(accelerator)
    if args.compile and accelerator.distributed_type.value == "FSDP":
        raise SystemExit("a network that FSDP shards cannot be compiled; leave out --compile and --dynamo_backend")
    hold_process_group()
    set_threads(accelerator, args.num_threads)
    return accelerator, resumed


def train(args: argparse.Namespace) -> None:
    """Trains on all processes; nothing in the output folder is written before the lock is taken."""
    with errors_in_one_line("train.py", ValueError, OSError):
        accelerator, resumed = set_up(args)
        taken = f"another run is writing to --output_dir {args.output_dir}; wait for its end, or use another folder"
        lock = only_run(accelerator, Path(args.output_dir) / ".lock", taken, lambda: check_output_dir(args))
        with nullcontext() if args.dry_run else lock:
            run_training(args, accelerator, resumed)


def run_training(args: argparse.Namespace, accelerator, resumed: RunDescription | None) -> None:

    out, is_main = Path(args.output_dir), accelerator.is_main_process
    train, test = load_data(args, progress_bar=is_main)
    resolve_budget(args, train, accelerator, resumed)
    if resumed is not None and args.muon_learning_rate is None:  # the rule for a new run may have been another one
        args.muon_learning_rate = resumed.options.get("muon_learning_rate")
        if args.optimizer == "muon" and args.muon_learning_rate is not None:
            args.given = sorted({*args.given, "muon_learning_rate"})
    torch.manual_seed(key_to_seed(args.seed, "weights"))
    unet, noise_schedule = build(args, train)
    run = Run(args, accelerator, train, unet, noise_schedule)
    if is_main:
        run.plan = plan(run, test)
        print(run.plan.text, flush=True)
    if args.dry_run:
        return
    if args.compile:
        compilation.compile_network(unet, accelerator)
    run.held_out_conditions = run.held_out(test, args.num_images)[1]
    sharing = Sharing(run)
    if args.resume_from_checkpoint == "last-checkpoint":
        sharing.fetch()
    if args.resume_from_checkpoint:
        run.resume()
    if run.step > run.total:
        raise ValueError(f"the checkpoint is at step {run.step}, past the {run.total} requested steps")
    if run.step == run.total and is_finished(out, run.total):
        accelerator.print(f"nothing to do: {out} is finished, with all {run.total} steps and results")
        sharing.push("trained")
        return sharing.wait()
    if is_main:
        if run.step == 0:  # with --overwrite_output_dir, no file of the other run may remain
            checkpoints.remove_checkpoints(out)
            remove_results(out)
        run.description().save(out)
        truncate_metrics(out / "metrics.jsonl", run.step)
    plain = {k: v for k, v in vars(args).items() if isinstance(v, int | float | str) and k != "hub_token"}
    accelerator.init_trackers("train", plain)
    accelerator.wait_for_everyone()
    bar = {"total": run.total, "initial": run.step, "desc": "training", "disable": not is_main}
    with StopRequest(accelerator.num_processes) as stop:
        try:
            with tqdm(**bar) as bar:
                finished = loop(run, test, stop, bar, sharing)
        except Stopped:  # during work that can be discarded, before the next step
            if not run.is_sharded:  # saving would need all processes, which stopped in different places
                run.save()
            finished = False
        if finished:
            accelerator.end_training()
        elif stop.has_failed:
            sharing.stop()
            raise ValueError(
                f"{stop.error or 'another process could not read its images'}\nthe {run.step} steps before it are "
                "saved; to resume, repeat the command with --resume_from_checkpoint latest, and --skip_damaged N to "
                "skip up to N damaged images"
            )
        else:
            accelerator.print(
                f"\nstopped by {stop.signal} after step {run.step} of {run.total}, which is saved; to resume, "
                "repeat the command with --resume_from_checkpoint latest"
            )
            sharing.stop()
    if finished:
        sharing.wait()


def loop(run: Run, test, stop, bar, sharing: Sharing) -> bool:
    """Runs all steps and what is due after each; returns whether it reached the end.

    What is due at a step comes after its checkpoint and does not change it, so a run resumed there repeats it.
    """
    args, accelerator, is_main = run.args, run.accelerator, run.accelerator.is_main_process
    epoch = math.ceil((run.num_images or 0) / run.global_rows)
    run.objective.train()
    batches, clock, shown, new = run.batches(), Clock(), {}, False
    while True:
        at_end = run.step == run.total
        due = {
            "evaluation": at_end or is_due(run.step, args.eval_steps),
            "images": not at_end and is_due(run.step, args.save_images_epochs and args.save_images_epochs * epoch),
            "pipeline": at_end or is_due(run.step, args.save_model_epochs and args.save_model_epochs * epoch),
        }
        # save before work of several processes: if it is interrupted, they cannot agree on saving
        is_collective = accelerator.num_processes > 1 and (due["evaluation"] or due["images"])
        saves = at_end or is_collective or is_due(run.step, args.checkpointing_steps)
        due["checkpoint"] = new and saves and args.checkpointing_steps > 0
        due["upload"] = sharing.is_due(due["checkpoint"], at_end)
        due["pipeline"] = due["pipeline"] or due["upload"]
        due["log"] = due["evaluation"] or is_due(run.step, args.logging_steps)
        if not at_end:
            clock.start()
            try:
                clock.waited += run.fetch(batches)
            except (ValueError, OSError) as error:
                stop.fail(error)
        stopping = stop.agreed() and (new or stop.has_failed)
        if stopping or any(due.values()):
            run.gather()
            clock.pause()
        if due["checkpoint"] or (stopping and new):
            run.save()
        if stopping:
            accelerator.wait_for_everyone()  # a launcher may kill the others when the first one exits
            accelerator.end_training()
            return False
        if due["log"] or accelerator.device.type == "cpu":  # on other devices, this synchronizes
            run.check_finite()

        metrics, results = {}, []
        if due["log"]:
            metrics |= run.losses() | run.speed(clock)
        if any(due[name] for name in ("evaluation", "images", "pipeline")):
            with stop.at_once():
                if due["evaluation"]:
                    samples = (args.eval_samples, None) if at_end else (1, args.max_eval_images)
                    results = [run.evaluate(test, *samples, decay) for decay in run.decays]
                    metrics |= evaluation_metrics(results, run.decays, args.class_conditional)
                if due["images"]:
                    draw(run, f"samples-{run.step}.png")
            if due["pipeline"]:
                save_pipelines(run)
            if at_end:
                with stop.at_once():
                    finish(run, results[0], metrics)
            run.objective.train()
        if due["log"]:
            name = "train_bpd" if args.objective == "vdm" else "train_mse"
            shown |= {k: f"{metrics[n]:.4g}" for k, n in ((name, name), ("eval_bpd", "eval_bpd")) if metrics.get(n)}
            bar.set_postfix(shown)
            accelerator.log({k: v for k, v in metrics.items() if v is not None}, step=run.step)
            if is_main:
                append_metrics(run.out / "metrics.jsonl", {"step": run.step} | metrics)
            run.meter.sums.zero_()
            clock = Clock()
        if due["upload"]:
            sharing.push("trained" if at_end else "in training")
        if at_end:
            return True
        clock.start()
        run.train_step()
        clock.steps, new = clock.steps + 1, True
        bar.update()


def is_due(step: int, every: int | None) -> bool:
    return bool(every) and step > 0 and step % every == 0
