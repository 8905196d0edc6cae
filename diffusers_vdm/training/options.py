"""The options of the commands, one row each.

A row has the default and the range of an option, whether a resumed run may change it, and whether the command on a
model card includes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

# smallest and largest value; POSITIVE excludes 0
POSITIVE = (1e-30, math.inf)
COUNT = (0, math.inf)
_BELOW_1 = 1 - 1e-9


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        name (`str`): without the dashes.
        default: its value. A type means that there is no default, a list with a type several values, and a tuple
            choices, of which the first is the default.
        help (`str`): its text in `--help`.
        range (`tuple`, *optional*): smallest and largest value.
        may_change (`bool`, defaults to `False`): a resumed run may change it, because it affects where or how often
            something is written, and not what is trained.
        in_card (`bool`, defaults to `True`): the command on a model card includes it if it was set, because the
            weights or results depend on it, and it is not private.
    """

    name: str
    default: Any
    help: str
    range: tuple[float, float] | None = None
    may_change: bool = False
    in_card: bool = True


# options of earlier versions, whose names stand in the options.json of their runs
RENAMED_OPTIONS = {"label_dropout": "condition_dropout"}

TRAIN_OPTIONS: dict[str, list[Option]] = {
    "data": [
        Option("dataset_name", str, "data set on the Hub, or a local copy of one; defaults to the bundled digits"),
        Option("dataset_config_name", str, "configuration of the data set"),
        Option("train_data_dir", str, "folder of image files, instead of --dataset_name"),
        Option(
            "train_split",
            "train",
            "split to train on; slices such as train[:2000] are allowed, but not with --streaming",
        ),
        Option("eval_split", "test", "split for the held-out bits/dim"),
        Option("image_column", str, "column of the images, found by its type if not given"),
        Option("label_column", str, "column of the classes, found by its type if not given"),
        Option("image_mode", (None, "RGB", "L"), "convert images to this mode"),
        Option(
            "frames",
            (None, "first", "all"),
            "frames of multi-frame files to use: the first, or all as separate images; an error if not given",
        ),
        Option(
            "allow_shared", False, "continue even if held-out images are among the training images", may_change=True
        ),
        Option(
            "skip_damaged",
            0,
            "skip up to this many damaged training images",
            range=COUNT,
            may_change=True,
        ),
        Option(
            "resolution",
            int,
            "resize and crop to squares of this size; without it, all images must have the same size",
            range=POSITIVE,
        ),
        Option("center_crop", False, "crop the center instead of a position drawn once for each image"),
        Option("random_flip", False, "flip half of the images, and set the augmentation flag if the network has one"),
        Option("random_rotation", False, "rotate 3 of 4 images by 90, 180 or 270 degrees, and set the flag as well"),
        Option("random_shift", 0, "shift images by up to this many pixels, and set the flag as well", range=COUNT),
        Option(
            "augmentation_rate",
            1.0,
            "fraction of the images that --random_flip and --random_rotation change, and that --random_shift changes",
            range=(0, 1),
        ),
        Option("cache_dir", str, "cache folder for data sets", may_change=True, in_card=False),
        Option(
            "dataloader_num_workers",
            2,
            "threads that decode images and prepare batches",
            range=COUNT,
            may_change=True,
            in_card=False,
        ),
        Option(
            "decoded_cache",
            True,
            "decode images once into a file in --cache_dir, which all processes and later runs memory-map",
            may_change=True,
            in_card=False,
        ),
        Option("streaming", False, "read images while training, for data that does not fit on the disk"),
        Option("shuffle_buffer", 10000, "images per block within which --streaming shuffles", range=POSITIVE),
        Option(
            "num_train_images",
            int,
            "number of images in --train_split, if --streaming cannot determine it",
            range=POSITIVE,
        ),
    ],
    "model": [
        Option(
            "preset",
            str,
            "named network, options and, if public, data set, see docs/training.md; defaults to fast for your "
            "own images, and to digits-fast for the bundled ones",
        ),
        Option("model_config_name_or_path", str, "config of a network, instead of --preset"),
        Option(
            "width",
            int,
            "channels of the first level of a multiscale network; each level below has twice as many, up to eight "
            "times",
            range=POSITIVE,
        ),
        Option("class_conditional", False, "condition on the classes, with a null class"),
        Option(
            "cond_columns",
            [str],
            "condition on the numbers in these columns, standardized, as a vector (cond_vectors)",
        ),
        Option("caption_column", str, "condition on texts in this column, one text or a list of them for each image"),
        Option("text_encoder", str, "encoder of transformers for --caption_column, as openai/clip-vit-base-patch32"),
        Option("cond_image_column", str, "condition on the images in this column (cond_images)"),
        Option(
            "upscale_factor",
            int,
            "condition on the image itself, smaller by this factor, for upscaling",
            range=(2, math.inf),
        ),
        Option(
            "condition_dropout",
            0.1,
            "fraction of the images whose condition is replaced by the null; with 0, only classes have a null",
            range=(0, 1),
        ),
        Option("drop_together", False, "replace all conditions of an image together, not each for itself"),
        Option(
            "dropout", float, "dropout of the network, defaults to that of its preset or config", range=(0, _BELOW_1)
        ),
        Option("objective", ("vdm", "ddpm"), "the variational bound, or DDPM's unweighted squared error"),
        Option(
            "schedule",
            (None, "learned", "learned_linear", "fixed_linear", "linear_beta"),
            "γ(t); defaults to learned for vdm, and to linear_beta for ddpm",
        ),
        Option("gamma_min", float, "γ(0), or its initial value if learned; defaults to -13.3, for the digits -7.5"),
        Option("gamma_max", 5.0, "γ(1), or its initial value if learned"),
        Option("learn_ends", True, "also train the ends of --schedule learned"),
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
        Option("train_batch_size", 64, "images per batch on each process", range=POSITIVE, may_change=True),
        Option("gradient_accumulation_steps", 1, "batches per optimizer step", range=POSITIVE, may_change=True),
        Option("max_train_steps", int, "optimizer steps; defaults to those of the preset", range=POSITIVE),
        Option(
            "num_epochs",
            int,
            "passes over the data, instead of --max_train_steps; defaults to 100 except for the digits",
            range=POSITIVE,
        ),
        Option(
            "max_hours",
            float,
            "train for about this time instead of --max_train_steps; the steps, and for a multiscale network for more "
            "than 32 levels the width and the batch, unless they are given, follow from the measured speed",
            range=POSITIVE,
        ),
        Option("max_flops", float, "the same for this number of FLOPs, of all processes together", range=POSITIVE),
        Option(
            "importance_sampling",
            False,
            "draw t more often where the loss is large; for noise schedules that are not learned between their ends",
        ),
        Option(
            "optimizer", ("adamw", "muon"), "AdamW, or Muon for the matrices inside the network and AdamW for the rest"
        ),
        Option(
            "muon_learning_rate",
            float,
            "peak learning rate of Muon; defaults to 0.6/√steps, at most 0.05",
            range=POSITIVE,
        ),
        Option(
            "learning_rate",
            float,
            "peak learning rate; defaults to the paper's 2e-4, for the digits 4e-3",
            range=POSITIVE,
        ),
        Option("gamma_learning_rate", float, "learning rate of γ; defaults to 10 × --learning_rate", range=POSITIVE),
        Option("lr_scheduler", "cosine", "one of diffusers' learning-rate schedules, counted in optimizer steps"),
        Option("lr_warmup_steps", 100, "steps of linear warm-up", range=COUNT),
        Option("adam_beta1", 0.9, "decay of AdamW's first moments", range=(0, _BELOW_1)),
        Option("adam_beta2", 0.99, "decay of AdamW's second moments", range=(0, _BELOW_1)),
        Option("adam_weight_decay", 0.01, "weight decay of AdamW; never applied to γ", range=COUNT),
        Option("adam_epsilon", 1e-08, "epsilon of AdamW", range=POSITIVE),
        Option("max_grad_norm", 1.0, "clip gradients to this norm", range=POSITIVE),
        Option("use_ema", True, "average the weights; the averages are evaluated and saved"),
        Option("ema_max_decay", 0.9999, "decay of the average, after warm-up", range=(0, 1)),
        Option(
            "ema_decays",
            [float],
            "several decays instead of --ema_max_decay; all are evaluated and saved, the first as the pipeline",
        ),
        Option("ema_inv_gamma", 1.0, "inv_gamma of the warm-up 1 - (1 + step/inv_gamma)^-power", range=POSITIVE),
        Option("ema_power", 0.75, "power in the same formula", range=POSITIVE),
        Option(
            "mixed_precision",
            ("no", "bf16", "fp16", "auto"),
            "precision of the network; γ and losses stay in float32 or better; auto measures whether bf16 is faster",
        ),
        Option(
            "compile",
            False,
            "compile the network with torch.compile, which takes one to three minutes at the start; also turned on by "
            "the --dynamo_backend of accelerate launch",
        ),
        Option("allow_tf32", False, "use TF32 matrix products, which change bits/dim"),
        Option("gradient_checkpointing", False, "use less memory and more time", may_change=True),
        Option(
            "max_nonfinite_steps",
            20,
            "stop after this many steps in a row with gradients that are not finite; such steps are skipped",
            range=POSITIVE,
            may_change=True,
        ),
        Option("seed", 0, "seed of all randomness"),
        Option(
            "num_threads",
            int,
            "CPU threads per process; defaults to an equal share of the cores",
            range=POSITIVE,
            may_change=True,
            in_card=False,
        ),
    ],
    "output": [
        Option("output_dir", "runs/vdm", "folder for all output", may_change=True, in_card=False),
        Option("overwrite_output_dir", False, "replace another run in --output_dir", may_change=True, in_card=False),
        Option(
            "logging_steps", 50, "steps between lines of metrics.jsonl", range=POSITIVE, may_change=True, in_card=False
        ),
        Option(
            "eval_steps",
            1000,
            "steps between evaluations of the held-out bits/dim, 0 for the end only",
            range=COUNT,
            may_change=True,
            in_card=False,
        ),
        Option("eval_batch_size", 128, "images per batch in evaluation", range=POSITIVE, may_change=True),
        Option(
            "eval_samples", 32, "draws of (t, ε) for each held-out image at the end", range=POSITIVE, may_change=True
        ),
        Option(
            "max_eval_images",
            int,
            "held-out images in every evaluation except the last, which uses all of them",
            range=POSITIVE,
            may_change=True,
        ),
        Option("num_images", 64, "samples in samples.png", range=POSITIVE, may_change=True),
        Option("ddpm_num_inference_steps", 250, "sampling steps for samples.png", range=POSITIVE, may_change=True),
        Option(
            "save_images_epochs",
            int,
            "also save samples-STEP.png every time after this many epochs",
            range=POSITIVE,
            may_change=True,
            in_card=False,
        ),
        Option(
            "save_model_epochs",
            int,
            "also save the pipeline every time after this many epochs",
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
        Option(
            "checkpoints_total_limit",
            2,
            "number of the newest checkpoints to keep",
            range=POSITIVE,
            may_change=True,
            in_card=False,
        ),
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
            "'latest' (or a new run if there is none), 'last-checkpoint' (also from the Hub), or a folder",
            may_change=True,
            in_card=False,
        ),
        Option(
            "allow_changed",
            [str],
            "options, or data, that may differ from the run that is resumed",
            may_change=True,
            in_card=False,
        ),
        Option(
            "dry_run",
            False,
            "print the plan (parameters, FLOPs, memory, steps, noise schedule) and exit",
            may_change=True,
            in_card=False,
        ),
        Option(
            "logger",
            ("tensorboard", "none", "wandb", "trackio"),
            "tracker in addition to metrics.jsonl",
            may_change=True,
            in_card=False,
        ),
        Option("logging_dir", "logs", "folder of the tracker in --output_dir", may_change=True, in_card=False),
        Option(
            "push_to_hub",
            False,
            "upload the pipeline, its model card and the figures, in the background",
            may_change=True,
            in_card=False,
        ),
        Option(
            "hub_model_id", str, "repository, defaults to the name of --output_dir", may_change=True, in_card=False
        ),
        Option(
            "hub_strategy",
            ("end", "every_save", "checkpoint"),
            "upload at the end, at each checkpoint, or at each checkpoint including the checkpoint",
            may_change=True,
            in_card=False,
        ),
        Option(
            "hub_include_code",
            False,
            "add code, so that DiffusionPipeline can load it without this package",
            may_change=True,
            in_card=False,
        ),
        Option("hub_token", str, "token, defaults to that of the login", may_change=True, in_card=False),
        Option("hub_private_repo", False, "create a private repository", may_change=True, in_card=False),
        Option(
            "hub_license", str, "license in the model card, for example 'apache-2.0'", may_change=True, in_card=False
        ),
    ],
}


def train_option(name: str) -> Option:
    """The row of a training option, for another command that has the same option."""
    return next(row for rows in TRAIN_OPTIONS.values() for row in rows if row.name == name)


def option_names(**values: bool) -> frozenset[str]:
    """Names of the training options with these field values, for example `may_change=True`."""
    rows = [row for rows in TRAIN_OPTIONS.values() for row in rows]
    return frozenset(row.name for row in rows if all(getattr(row, name) == value for name, value in values.items()))
