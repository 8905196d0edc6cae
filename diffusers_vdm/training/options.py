"""The options of the commands, a row each: everything that is known of an option stands there.

A row says its default and its range, whether a run that is resumed may change it, and whether the command on a model
card names it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

# smallest and largest value; POSITIVE leaves 0 itself out
POSITIVE = (1e-30, math.inf)
COUNT = (0, math.inf)
_BELOW_1 = 1 - 1e-9


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        name (`str`): without the dashes.
        default: its value; a type stands for an option without a default, a list with a type for several values, and a
            tuple for choices, the first the default.
        help (`str`): what `--help` says.
        range (`tuple`, *optional*): smallest and largest value.
        may_change (`bool`, defaults to `False`): a resumed run may give another value, since it says where to or how
            often, and not what is trained.
        in_card (`bool`, defaults to `True`): the command on a model card names it, if it was given: the weights or
            their numbers depend on it, and it is nothing private.
    """

    name: str
    default: Any
    help: str
    range: tuple[float, float] | None = None
    may_change: bool = False
    in_card: bool = True


TRAIN_OPTIONS: dict[str, list[Option]] = {
    "data": [
        Option(
            "dataset_name", str, "data set on the Hub, or a local copy of one; the bundled digits if nothing is given"
        ),
        Option("dataset_config_name", str, "configuration of the data set"),
        Option("train_data_dir", str, "folder of image files, instead of --dataset_name"),
        Option("train_split", "train", "split to train on; slices allowed, but not streamed: train[:2000]"),
        Option("eval_split", "test", "split for the held-out bits/dim"),
        Option("image_column", str, "column of the images, found by its type if not given"),
        Option("label_column", str, "column of the classes, found by its type if not given"),
        Option("image_mode", (None, "RGB", "L"), "convert images to it"),
        Option(
            "frames",
            (None, "first", "all"),
            "frames of multi-frame files to use: the first, or all as separate images; refused if not given",
        ),
        Option("allow_shared", False, "go on where held-out images are among the training images", may_change=True),
        Option(
            "skip_damaged",
            0,
            "leave out up to this many damaged training images",
            range=COUNT,
            may_change=True,
        ),
        Option(
            "resolution",
            int,
            "resize and crop to squares of this side; all images must have one size without it",
            range=POSITIVE,
        ),
        Option("center_crop", False, "crop the middle instead of a place drawn once for each image"),
        Option(
            "random_flip", False, "flip half of the images, and set the augmentation flag of a network that has one"
        ),
        Option("random_rotation", False, "rotate three in four by 90, 180 or 270 degrees, and set the flag likewise"),
        Option("cache_dir", str, "cache of data sets", may_change=True, in_card=False),
        Option(
            "dataloader_num_workers",
            2,
            "threads that decode the images and make the batches",
            range=COUNT,
            may_change=True,
            in_card=False,
        ),
        Option(
            "decoded_cache",
            True,
            "decode once into a file of cache_dir, which all processes and later runs map",
            may_change=True,
            in_card=False,
        ),
        Option("streaming", False, "read while training, for data that do not fit on the disk"),
        Option(
            "shuffle_buffer", 10000, "images of a block of --streaming within which they are shuffled", range=POSITIVE
        ),
        Option("num_train_images", int, "images of --train_split, where --streaming does not know it", range=POSITIVE),
    ],
    "model": [
        Option(
            "preset",
            str,
            "network, options and, where it is public, data set by name: see docs/training.md; digits if not given",
        ),
        Option("model_config_name_or_path", str, "config of a VDMUNet2DModel, instead of --preset"),
        Option("class_conditional", False, "condition on the classes, with a null class"),
        Option(
            "label_dropout", 0.1, "share of the classes that is withheld, which trains the null class", range=(0, 1)
        ),
        Option("dropout", float, "dropout of the network, defaults to what its preset says", range=(0, _BELOW_1)),
        Option("objective", ("vdm", "ddpm"), "the variational bound, or DDPM's unweighted squared error"),
        Option(
            "schedule", (None, "learned", "learned_linear", "fixed_linear", "linear_beta"), "γ(t); learned for vdm"
        ),
        Option("gamma_min", float, "γ(0), or where it starts; -13.3, for the digits -7.5"),
        Option("gamma_max", 5.0, "γ(1), or where it starts"),
        Option("learn_ends", True, "train the ends of --schedule learned, too"),
        Option("num_timesteps", int, "T of a discrete-time bound; continuous time if not given", range=POSITIVE),
        Option(
            "ddpm_num_steps",
            1000,
            "T of --schedule linear_beta; its betas are rescaled by 1000/T",
            range=(21, math.inf),
        ),
        Option("ddpm_beta_schedule", ("linear",), "betas of --schedule linear_beta"),
        Option("prediction_type", ("epsilon", "sample", "v_prediction"), "what the network predicts"),
    ],
    "optimization": [
        Option("train_batch_size", 64, "images of a batch, for each process", range=POSITIVE, may_change=True),
        Option("gradient_accumulation_steps", 1, "batches of an optimizer step", range=POSITIVE, may_change=True),
        Option("max_train_steps", int, "optimizer steps; 2500 for the digits", range=POSITIVE),
        Option(
            "num_epochs",
            int,
            "passes over the data, instead of --max_train_steps; 100, but for the digits",
            range=POSITIVE,
        ),
        Option(
            "importance_sampling",
            False,
            "draw t where the loss is large; for noise schedules that are not learned between their ends",
        ),
        Option("learning_rate", float, "peak learning rate; the paper's 2e-4, for the digits 4e-3", range=POSITIVE),
        Option("gamma_learning_rate", float, "learning rate of γ; 10 × --learning_rate if not given", range=POSITIVE),
        Option("lr_scheduler", "cosine", "one of diffusers' schedules, counted in optimizer steps"),
        Option("lr_warmup_steps", 100, "steps of linear warm-up", range=COUNT),
        Option("adam_beta1", 0.9, "decay of AdamW's first moments", range=(0, _BELOW_1)),
        Option("adam_beta2", 0.99, "decay of AdamW's second moments", range=(0, _BELOW_1)),
        Option("adam_weight_decay", 0.01, "weight decay of AdamW; never applied to γ", range=COUNT),
        Option("adam_epsilon", 1e-08, "epsilon of AdamW", range=POSITIVE),
        Option("max_grad_norm", 1.0, "clip gradients to this norm", range=POSITIVE),
        Option("use_ema", True, "average the weights; what is evaluated and saved are the averages"),
        Option("ema_max_decay", 0.9999, "decay of the average, after warm-up", range=(0, 1)),
        Option(
            "ema_decays",
            [float],
            "several decays instead of --ema_max_decay, all measured and saved; the first is the pipeline",
        ),
        Option("ema_inv_gamma", 1.0, "inv_gamma of the warm-up 1 - (1 + step/inv_gamma)^-power", range=POSITIVE),
        Option("ema_power", 0.75, "power of that warm-up", range=POSITIVE),
        Option("mixed_precision", ("no", "bf16", "fp16"), "of the network; γ and losses stay in float32 or better"),
        Option("allow_tf32", False, "TF32 matrix products; they move bits/dim"),
        Option("gradient_checkpointing", False, "less memory, more time", may_change=True),
        Option(
            "max_nonfinite_steps",
            20,
            "stop after so many steps in a row whose gradients are not finite, all skipped",
            range=POSITIVE,
            may_change=True,
        ),
        Option("seed", 0, "key of all randomness"),
        Option(
            "num_threads",
            int,
            "CPU threads of a process; all cores, shared by the processes, if not given",
            range=POSITIVE,
            may_change=True,
            in_card=False,
        ),
    ],
    "output": [
        Option("output_dir", "runs/vdm", "folder of everything that is written", may_change=True, in_card=False),
        Option(
            "overwrite_output_dir", False, "allow an output_dir that holds another run", may_change=True, in_card=False
        ),
        Option(
            "logging_steps", 50, "steps between lines of metrics.jsonl", range=POSITIVE, may_change=True, in_card=False
        ),
        Option(
            "eval_steps",
            1000,
            "steps between looks at the held-out bits/dim, 0 for the end only",
            range=COUNT,
            may_change=True,
            in_card=False,
        ),
        Option("eval_batch_size", 128, "images of a batch in evaluation", range=POSITIVE, may_change=True),
        Option(
            "eval_samples", 32, "draws of (t, ε) for each held-out image in the end", range=POSITIVE, may_change=True
        ),
        Option(
            "max_eval_images",
            int,
            "held-out images of every evaluation but the last, which uses all of them",
            range=POSITIVE,
            may_change=True,
        ),
        Option("num_images", 64, "samples in samples.png", range=POSITIVE, may_change=True),
        Option("ddpm_num_inference_steps", 250, "steps that draw them", range=POSITIVE, may_change=True),
        Option(
            "save_images_epochs",
            int,
            "also draw samples every so many epochs, as samples-STEP.png",
            range=POSITIVE,
            may_change=True,
            in_card=False,
        ),
        Option(
            "save_model_epochs",
            int,
            "also save the pipeline every so many epochs",
            range=POSITIVE,
            may_change=True,
            in_card=False,
        ),
        Option(
            "checkpointing_steps",
            1000,
            "steps between checkpoints, 0 for none",
            range=COUNT,
            may_change=True,
            in_card=False,
        ),
        Option("checkpoints_total_limit", 2, "keep the newest", range=POSITIVE, may_change=True, in_card=False),
        Option(
            "milestone_steps",
            int,
            "also keep the checkpoints at multiples of this number",
            range=POSITIVE,
            may_change=True,
            in_card=False,
        ),
        Option(
            "resume_from_checkpoint",
            str,
            "'latest' (a new run if there is none), 'last-checkpoint' (also from the Hub), or a folder",
            may_change=True,
            in_card=False,
        ),
        Option(
            "allow_changed",
            [str],
            "options that may differ from those of the run that is resumed, or data",
            may_change=True,
            in_card=False,
        ),
        Option(
            "dry_run",
            False,
            "print the plan (parameters, FLOPs, memory, steps, noise schedule) and end",
            may_change=True,
            in_card=False,
        ),
        Option(
            "logger",
            ("tensorboard", "none", "wandb", "trackio"),
            "tracker beside metrics.jsonl",
            may_change=True,
            in_card=False,
        ),
        Option("logging_dir", "logs", "its folder in output_dir", may_change=True, in_card=False),
        Option(
            "push_to_hub",
            False,
            "upload the pipeline, its card and the pictures, in the background",
            may_change=True,
            in_card=False,
        ),
        Option("hub_model_id", str, "repository, defaults to the name of output_dir", may_change=True, in_card=False),
        Option(
            "hub_strategy",
            ("end", "every_save", "checkpoint"),
            "upload at the end, with each checkpoint, or with each checkpoint and including it",
            may_change=True,
            in_card=False,
        ),
        Option(
            "hub_include_code",
            False,
            "add code, so that it loads by DiffusionPipeline without this package",
            may_change=True,
            in_card=False,
        ),
        Option("hub_token", str, "token, defaults to the one logged in with", may_change=True, in_card=False),
        Option("hub_private_repo", False, "make it a private one", may_change=True, in_card=False),
        Option("hub_license", str, "license that the card names, as 'apache-2.0'", may_change=True, in_card=False),
    ],
}


def train_option(name: str) -> Option:
    """The row of an option of training, for another command where it means the same."""
    return next(row for rows in TRAIN_OPTIONS.values() for row in rows if row.name == name)


def option_names(**values: bool) -> frozenset[str]:
    """The options of training with these values of their fields, as `may_change=True`."""
    rows = [row for rows in TRAIN_OPTIONS.values() for row in rows]
    return frozenset(row.name for row in rows if all(getattr(row, name) == value for name, value in values.items()))
