"""A training run: the objective, its optimizer, the averages of the weights, and checkpoints of all of these."""

from __future__ import annotations

import argparse
import copy
import math
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from diffusers.optimization import get_scheduler

from ..conditions import conditions_taken, withheld
from ..data.conditions import conditions_of
from ..data.images import labels_fingerprint
from ..evaluation.monte_carlo import evaluate_mc
from ..network_inputs import num_augmentation_flags
from ..objectives import SimpleObjective, VariationalBound
from ..randomness import key_to_seed
from ..repository import read_json
from ..threads import in_order
from ..times import ImportanceTimes
from . import checkpoints, compilation
from .averages import WeightAverages
from .batches import KeyedBatch, keyed_batch
from .description import NAME as OPTIONS
from .description import DataDescription, HeldOutDescription, RunDescription
from .finite_steps import FiniteSteps
from .metrics import LossMeter
from .optimizer import make_optimizer, muon_learning_rate
from .sharding import gathered, sharded_like, whole


class Clock:
    """Seconds of training, without the work between steps: of the clock, of this process on its cores, and waiting."""

    def __init__(self):
        self.seconds, self.process_seconds, self.waited, self.steps = 0.0, 0.0, 0.0, 0
        self._mark: tuple[float, float] | None = None

    def start(self) -> None:
        self._mark = self._mark or (time.perf_counter(), time.process_time())

    def pause(self) -> None:
        if self._mark is not None:
            self.seconds += time.perf_counter() - self._mark[0]
            self.process_seconds += time.process_time() - self._mark[1]
            self._mark = None


@dataclass(frozen=True)
class Plan:
    """The cost of a run, and baselines for its results.

    Attributes:
        text (`str`): the plan, to be printed.
        flops_per_image, flops_per_second (`float`): training FLOPs per image, and the rate of all processes.
        histogram_bpd (`float`, *optional*): bits/dim of the held-out images under per-pixel histograms of the training
            images.
        held_out ([`HeldOutDescription`]): the held-out images, for options.json.
    """

    text: str
    flops_per_image: float
    flops_per_second: float
    histogram_bpd: float | None
    held_out: HeldOutDescription


class Run:
    """What is trained, and all state that a checkpoint saves."""

    def __init__(self, args: argparse.Namespace, accelerator, data, unet, noise_schedule):
        self.args, self.accelerator, self.data = args, accelerator, data
        # what is evaluated and saved; under FSDP an unsharded copy of what is trained, filled by [`averaged_weights`]
        self.is_sharded = accelerator.distributed_type.value == "FSDP"
        self.unet, self.noise_schedule = (
            copy.deepcopy((unet, noise_schedule)) if self.is_sharded else (unet, noise_schedule)
        )
        self.out, world = Path(args.output_dir), accelerator.num_processes
        self.num_images = data.num_images  # as declared; a stream may count its images in training
        shared = {"num_levels": data.num_levels, "prediction_type": args.prediction_type}
        # a DDPM knows the T levels of its betas, so its bound has the T − 1 steps between them
        bound_steps = (
            args.num_timesteps
            if args.schedule != "linear_beta" or args.objective == "vdm"
            else args.ddpm_num_steps - 1
        )
        # separate from the objective, which accelerate runs under autocast, because bits/dim are measured in float32
        self.bound = VariationalBound(self.unet, self.noise_schedule, num_timesteps=bound_steps, **shared)
        if args.objective == "vdm":
            self.objective = VariationalBound(unet, noise_schedule, num_timesteps=args.num_timesteps, **shared)
        else:
            self.objective = SimpleObjective(unet, noise_schedule, **shared)
        self.global_rows = args.train_batch_size * args.gradient_accumulation_steps * world
        self.total = args.max_train_steps or math.ceil(args.num_epochs * data.num_images / self.global_rows)
        if args.optimizer == "muon" and args.muon_learning_rate is None:
            args.muon_learning_rate = muon_learning_rate(self.total)
            args.given = sorted({*args.given, "muon_learning_rate"})  # a model card states it
        optimizer = make_optimizer(args, unet, noise_schedule)
        steps = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": self.total}
        self.lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, **steps)
        with compilation.not_compiled_by(accelerator):
            self.wrapped, self.optimizer = accelerator.prepare(self.objective, optimizer)
        self.parameters = [p for p in self.objective.parameters() if p.requires_grad]
        # decays of the averages to evaluate and save, the first as the pipeline; None means raw weights
        self.decays = args.ema_decays or [None]
        self.averages = WeightAverages(self.parameters, args.ema_decays, args.ema_inv_gamma, args.ema_power)
        self.finite, self.meter = FiniteSteps(accelerator.device), LossMeter(accelerator.device)
        self.times = ImportanceTimes(accelerator.device) if args.importance_sampling else None
        self.step, self.sums = 0, []
        self.next_inputs: list[tuple[int, dict]] = []  # the micro-batches of the next step
        self.plan: Plan | None = None  # only on the main process
        self.held_out_conditions: dict[str, torch.Tensor] = {}  # of some held-out images, for samples

    def description(self) -> RunDescription:
        """The options, data and environment of the run."""
        import accelerate
        import diffusers

        import diffusers_vdm

        args, data, device = self.args, self.data, self.accelerator.device
        names = data.class_names if args.class_conditional else None
        return RunDescription(
            options={k: v for k, v in vars(args).items() if k != "given"} | {"hub_token": None},
            given=args.given,
            total_steps=self.total,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            machine=checkpoints.machine_of(device),
            held_out=self.plan.held_out if self.plan else None,
            histogram_bpd=self.plan.histogram_bpd if self.plan else None,
            data=DataDescription(data.name, self.num_images, data.fingerprint),
            columns={"image": data.image_column, "label": data.label_column},
            class_names=None if names is None else list(names),
            labels=labels_fingerprint(data) if args.class_conditional and not args.streaming else None,
            conditions=None if data.conditions is None else data.conditions.fingerprint(),
            files=data.files,
            damaged=list(data.damaged),
            global_batch_size=self.global_rows,
            num_processes=self.accelerator.num_processes,
            versions={m.__name__: m.__version__ for m in (torch, diffusers, accelerate, diffusers_vdm)},
        )

    def batches(self):
        """The micro-batches of this process from the next step on, prefetched by threads."""
        args, rank, world = self.args, self.accelerator.process_index, self.accelerator.num_processes

        def make(key: tuple[int, int]):
            step, micro = key
            first = (micro * world + rank) * args.train_batch_size
            rows = range(first, first + args.train_batch_size)
            augmentations = (args.random_flip, args.random_rotation, args.condition_dropout, args.random_shift,
                             args.augmentation_rate, args.drop_together)  # fmt: skip
            batch = keyed_batch(self.data, step, rows, self.global_rows, args.seed, *augmentations)
            inputs = {"images": batch.images, "t": batch.t, "eps": batch.eps}
            if args.objective == "vdm":
                inputs["eps_0"] = batch.eps_0
            if args.random_flip or args.random_rotation or args.random_shift:
                flags = num_augmentation_flags(self.unet.config)
                if flags:
                    inputs["augmentation_flags"] = batch.augmented if flags == 1 else batch.augmentations
            inputs |= self.conditions_of_batch(batch)
            if self.accelerator.device.type == "cuda":
                inputs = {name: tensor.pin_memory() for name, tensor in inputs.items()}
            return key_to_seed(args.seed, "dropout", step, first), inputs

        micros = range(args.gradient_accumulation_steps)
        keys = ((step, micro) for step in range(self.step, self.total) for micro in micros)
        # a stream has its own decoding threads, and yields batches in order
        workers = 1 if args.streaming else max(1, args.dataloader_num_workers)
        return in_order(make, keys, workers, look_ahead=2 * workers)

    def conditions_of_batch(self, batch: KeyedBatch) -> dict[str, Any]:
        """The conditions of a batch, with the null instead of those that are withheld."""
        given = conditions_of(
            self.unet, batch.images, self.data.num_levels, batch.labels, batch.conditions,
            without_text=batch.withheld["encoder_hidden_states"],
        )  # fmt: skip
        taken = conditions_taken(self.unet)
        for name in taken:
            if name not in given:
                raise ValueError(f"{self.data.name} has no {name}, which this network was built for.")
        classes = {"class_labels": self.unet.config.num_class_embeds}
        return {
            name: withheld(value, batch.withheld[name], classes.get(name)) if taken.get(name) else value
            for name, value in given.items()
        }

    def example_conditions(self, rows: range) -> dict[str, Any]:
        """The conditions of samples: those of held-out images, without classes that may be left out."""
        taken = conditions_taken(self.unet)
        given = {k: v for k, v in self.held_out_conditions.items() if k != "class_labels" or not taken[k]}
        index = torch.tensor(rows)
        return {name: value[index % len(value)] for name, value in given.items()}

    def fetch(self, batches) -> float:
        """Waits for all micro-batches of the next step before any of them is used; returns the seconds.

        Raises: `ValueError`, `OSError` for images that cannot be read.
        """
        clock = time.perf_counter()
        self.next_inputs = [next(batches) for _ in range(self.args.gradient_accumulation_steps)]
        return time.perf_counter() - clock

    def train_step(self) -> None:
        """One optimizer step on the micro-batches from `fetch`."""
        parts, self.next_inputs = self.next_inputs, []
        for seed, inputs in parts:
            inputs = {k: v.to(self.accelerator.device, non_blocking=True) for k, v in inputs.items()}
            if self.times is not None:
                inputs["t"], inputs["t_density"] = self.times.warp(inputs["t"])
            torch.manual_seed(seed)
            with self.accelerator.accumulate(self.wrapped):
                with self.accelerator.autocast():  # accelerate does not apply it under FSDP2
                    output = self.wrapped(**inputs)
                loss = output.loss
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.parameters, self.args.max_grad_norm)
                    self.finite.step(self.optimizer, norm, has_scaler=self.accelerator.scaler is not None)
                    self.optimizer.zero_grad()
            self.meter.add(loss)
            if self.times is not None:
                self.times.add(inputs["t"], output.diffusion * inputs["t_density"])
        if self.times is not None:
            self.times.step(self.accelerator)
        self.lr_scheduler.step()
        self.averages.step()
        self.step += 1

    @contextmanager
    def averaged_weights(self, decay: float | None = None):
        """Within the context, `unet`, `noise_schedule` and `bound` have the averaged weights; all must enter it.

        The network runs without compilation there.
        """
        with self.averages.applied(decay), compilation.uncompiled() if self.args.compile else nullcontext():
            if not self.is_sharded:
                yield
                return
            self.bound.to(self.accelerator.device)
            trained = dict(self.objective.named_parameters())
            with torch.no_grad():
                for name, parameter in self.bound.named_parameters():
                    parameter.copy_(whole(trained[name]))
        try:
            yield
        finally:
            self.bound.to("cpu")  # free the memory of the device for training

    def held_out(self, test, num_images: int | None) -> tuple[torch.Tensor, dict[str, Any]]:
        """The first held-out images, and their conditions."""
        images = test.images[:num_images]
        part = None if test.conditions is None else test.conditions.slice(slice(num_images))
        labels = None if test.labels is None else test.labels[:num_images]
        return images, conditions_of(self.unet, images, test.num_levels, labels, part)

    def evaluate(self, test, num_samples: int, num_images: int | None, decay: float | None):
        images, conditions = self.held_out(test, num_images)
        with self.averaged_weights(decay):
            return evaluate_mc(
                self.bound,
                images,
                num_samples=num_samples,
                batch_size=self.args.eval_batch_size,
                accelerator=self.accelerator,
                **conditions,
            )

    def gather(self) -> None:
        """Gathers the losses of all processes since the last line of metrics; all processes must call it."""
        self.sums = self.meter.gather(self.accelerator)

    def losses(self) -> dict:
        """The FLOPs of training so far, mean loss, learning rate and skipped steps, for a line of metrics."""
        mean = self.meter.mean(self.sums)
        return {
            "train_flops": self.step * self.global_rows * self.plan.flops_per_image if self.plan else None,
            "train_bpd" if self.args.objective == "vdm" else "train_mse": None if math.isnan(mean) else mean,
            "learning_rate": self.lr_scheduler.get_last_lr()[0],
            "skipped_steps": int(self.finite.skipped),
        }

    def speed(self, clock: Clock) -> dict:
        """Processor seconds of this process since the last line of metrics, images per second, utilization of the
        devices' FLOPs, and the fraction of time spent waiting for data."""
        if not clock.seconds:
            return {}
        images = clock.steps * self.global_rows / clock.seconds
        share = images * self.plan.flops_per_image / self.plan.flops_per_second if self.plan else None
        return {
            "process_seconds": clock.process_seconds,
            "images_per_second": images,
            "flop_utilisation": share,
            "data_wait": clock.waited / clock.seconds,
        }

    def check_finite(self) -> None:
        """Raises `ValueError` after too many skipped steps in a row."""
        in_row = int(self.finite.in_row)
        if in_row >= self.args.max_nonfinite_steps:
            last = checkpoints.list_checkpoints(self.out)
            raise ValueError(
                f"the gradients of {in_row} steps in a row, up to step {self.step}, were not finite; all were "
                f"skipped. The last checkpoint is {last[-1] if last else 'none'}; resume from it with a lower "
                "--learning_rate (and --allow_changed learning_rate)"
            )

    def save(self) -> None:
        """Writes a checkpoint with the gathered losses; all processes must call it."""
        tensors = {"model": self.objective.state_dict(), "optimizer": checkpoints.optimizer_tensors(self.optimizer)}
        if self.times is not None:
            tensors["importance"] = self.times.state_dict()
        tensors = gathered(tensors | self.averages.state_dict(), keep=self.accelerator.is_main_process)
        if tensors is None:
            return
        rates = checkpoints.rate_state(self.lr_scheduler)
        state = {
            "run": self.description().to_json(),
            "lr_scheduler": rates,
            "sums": self.sums,
            **self.finite.state_dict(),
        }
        if self.args.streaming:
            state["stream"] = self.data.state_dict()
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        limits = (self.args.checkpoints_total_limit, self.args.milestone_steps)
        checkpoints.save_checkpoint(self.out, self.step, tensors, state, *limits)

    def resume(self) -> None:
        """Resumes from the requested checkpoint, or starts a new run if there is none yet."""
        name, allowed = self.args.resume_from_checkpoint, self.args.allow_changed or ()
        found = [None]
        in_output_dir = name in ("latest", "last-checkpoint")
        if in_output_dir and self.accelerator.is_main_process:  # one process decides which checkpoint is the newest
            found = [checkpoints.load_latest(self.out)]
        folder = Path(name) if not in_output_dir else broadcast_object_list([found[0] and str(found[0][0])])[0]
        now = self.description().to_json()
        if folder is None:
            if (self.out / OPTIONS).is_file():
                checkpoints.check_same_run(read_json(self.out / OPTIONS, OPTIONS), now, allowed)
            return self.accelerator.print(f"there is no checkpoint in {self.out} yet; starting a new run")
        tensors, state = found[0][1:] if found[0] else checkpoints.load_checkpoint(folder)
        notices = (
            checkpoints.check_same_run(state["run"], now, allowed),
            checkpoints.rounding_changes(state["run"], now),
        )
        self.accelerator.print("\n".join([f"resuming from {folder}", *(line for line in notices if line)]))
        try:
            here = self.objective.state_dict()
            model = {name: sharded_like(t, here.get(name, t)) for name, t in tensors["model"].items()}
            self.objective.load_state_dict(model)
        except RuntimeError as error:
            raise ValueError(f"{folder} belongs to another model: {str(error).splitlines()[1].strip()}") from error
        self.averages.load_state_dict(tensors)
        checkpoints.load_optimizer_tensors(self.optimizer, tensors["optimizer"])
        checkpoints.load_rate_state(self.lr_scheduler, state["lr_scheduler"])
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.times is not None and "importance" in tensors:
            self.times.load_state_dict(tensors["importance"])
        if self.args.streaming and "stream" in state:
            self.data.load_state_dict(state["stream"])
        self.meter.load(state["sums"], self.accelerator.process_index, self.accelerator.num_processes)
        # a run that reached max_nonfinite_steps counts from 0 again, usually with a lower learning rate
        ended = state["in_row"] >= self.args.max_nonfinite_steps
        self.finite.load_state_dict(state | {"in_row": 0.0} if ended else state)
        self.step = state["step"]
