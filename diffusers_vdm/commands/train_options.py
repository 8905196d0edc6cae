"""The options of train.py: what they mean, which do not go together, and the data and the network that they name."""

from __future__ import annotations

import argparse
import importlib.util
import math
from pathlib import Path

from .options import check_choice, check_ranges, option_parser

# name, default, help, as [`options.add_options`] reads them
OPTIONS: dict[str, list[tuple]] = {
    "data": [
        ("dataset_name", str, "data set on the Hub, or a local copy of one; the bundled digits if nothing is given"),
        ("dataset_config_name", str, "configuration of the data set"),
        ("train_data_dir", str, "folder of image files, instead of --dataset_name"),
        ("train_split", "train", "split to train on; slices allowed, but not streamed: train[:2000]"),
        ("eval_split", "test", "split for the held-out bits/dim"),
        ("image_column", str, "column of the images, found by its type if not given"),
        ("label_column", str, "column of the classes, found by its type if not given"),
        ("image_mode", (None, "RGB", "L"), "convert images to it"),
        ("frames", (None, "first", "all"), "which frames of files with several are images; refused if not given"),
        ("allow_shared", False, "go on where held-out images are among the training images"),
        ("skip_damaged", 0, "go on without up to so many training images that are damaged"),
        ("resolution", int, "resize and crop to squares of this side; all images must have one size without it"),
        ("center_crop", False, "crop the middle instead of a place drawn once for each image"),
        ("random_flip", False, "flip half of the images, telling the network where it has the flag for it"),
        ("random_rotation", False, "turn three in four by 90, 180 or 270 degrees, telling it likewise"),
        ("cache_dir", str, "cache of data sets"),
        ("dataloader_num_workers", 2, "threads that decode the images and make the batches"),
        ("decoded_cache", True, "decode once into a file of cache_dir, which all processes and later runs map"),
        ("streaming", False, "read while training, for data that do not fit on the disk"),
        ("shuffle_buffer", 10_000, "images of a block of --streaming within which they are shuffled"),
        ("num_train_images", int, "images of --train_split, where --streaming does not know it"),
    ],
    "model": [
        ("preset", str, "network, options and, where it is public, data set by name: see README; digits if not given"),
        ("model_config_name_or_path", str, "config of a VDMUNet2DModel, instead of --preset"),
        ("class_conditional", False, "condition on the classes, with a null class"),
        ("label_dropout", 0.1, "share of the classes that is withheld, which trains the null class"),
        ("dropout", float, "dropout of the network, defaults to what its preset says"),
        ("objective", ("vdm", "ddpm"), "the variational bound, or DDPM's unweighted squared error"),
        ("schedule", (None, "learned", "learned_linear", "fixed_linear", "linear_beta"), "γ(t); learned for vdm"),
        ("gamma_min", float, "γ(0), or where it starts; -13.3, for the digits -7.5"),
        ("gamma_max", 5.0, "γ(1), or where it starts"),
        ("learn_ends", True, "train the ends of --schedule learned, too"),
        ("num_timesteps", int, "T of a discrete-time bound; continuous time if not given"),
        ("ddpm_num_steps", 1000, "T of --schedule linear_beta; its betas are rescaled by 1000/T"),
        ("ddpm_beta_schedule", ("linear",), "betas of --schedule linear_beta"),
        ("prediction_type", ("epsilon", "sample", "v_prediction"), "what the network predicts"),
    ],
    "optimisation": [
        ("train_batch_size", 64, "images of a batch, for each process"),
        ("gradient_accumulation_steps", 1, "batches of an optimiser step"),
        ("max_train_steps", int, "optimiser steps; 2500 for the digits"),
        ("num_epochs", int, "passes over the data, instead of --max_train_steps; 100, but for the digits"),
        ("importance_sampling", False, "draw t where the loss is large; for schedules whose inside is not learned"),
        ("learning_rate", float, "peak learning rate; the paper's 2e-4, for the digits 4e-3"),
        ("gamma_learning_rate", float, "of γ's parameters; 10 × --learning_rate if not given"),
        ("lr_scheduler", "cosine", "one of diffusers' schedules, counted in optimiser steps"),
        ("lr_warmup_steps", 100, "steps of linear warm-up"),
        ("adam_beta1", 0.9, "of AdamW"),
        ("adam_beta2", 0.99, "of AdamW"),
        ("adam_weight_decay", 0.01, "of AdamW; never on γ"),
        ("adam_epsilon", 1e-8, "of AdamW"),
        ("max_grad_norm", 1.0, "clip gradients to this norm"),
        ("use_ema", True, "average the weights; what is evaluated and saved are the averages"),
        ("ema_max_decay", 0.9999, "decay of the average, after warm-up"),
        ("ema_decays", [float], "several instead of it: all are measured and saved, the first as the pipeline"),
        ("ema_inv_gamma", 1.0, "of the warm-up 1 - (1 + step/inv_gamma)^-power"),
        ("ema_power", 0.75, "of the warm-up"),
        ("mixed_precision", ("no", "bf16", "fp16"), "of the network; γ and losses stay in float32 and better"),
        ("allow_tf32", False, "TF32 matrix products; they move bits/dim"),
        ("gradient_checkpointing", False, "less memory, more time"),
        ("max_nonfinite_steps", 20, "stop after so many steps in a row whose gradients are not finite, all skipped"),
        ("seed", 0, "key of all randomness"),
        ("num_threads", int, "CPU threads of a process; all cores, shared by the processes, if not given"),
    ],
    "output": [
        ("output_dir", "runs/vdm", "folder of everything that is written"),
        ("overwrite_output_dir", False, "allow an output_dir that holds another run"),
        ("logging_steps", 50, "steps between lines of metrics.jsonl"),
        ("eval_steps", 1000, "steps between looks at the held-out bits/dim, 0 for the end only"),
        ("eval_batch_size", 128, "images of a batch in evaluation"),
        ("eval_samples", 32, "draws of (t, ε) for each held-out image in the end"),
        ("max_eval_images", int, "use only so many held-out images, for every look but the last"),
        ("num_images", 64, "samples in samples.png"),
        ("ddpm_num_inference_steps", 250, "steps that draw them"),
        ("save_images_epochs", int, "also draw samples every so many epochs, as samples-STEP.png"),
        ("save_model_epochs", int, "also save the pipeline every so many epochs"),
        ("checkpointing_steps", 1000, "steps between checkpoints, 0 for none"),
        ("checkpoints_total_limit", 2, "keep the newest"),
        ("milestone_steps", int, "keep the checkpoints at its multiples besides"),
        (
            "resume_from_checkpoint",
            str,
            "'latest' (a new run if none), 'last-checkpoint', also of the Hub, or a folder",
        ),
        ("allow_changed", [str], "options that may differ from those of the run that is resumed, or data"),
        ("dry_run", False, "print the plan (parameters, FLOPs, memory, steps, noise schedule) and end"),
        ("logger", ("tensorboard", "none", "wandb", "trackio"), "tracker beside metrics.jsonl"),
        ("logging_dir", "logs", "its folder in output_dir"),
        ("push_to_hub", False, "upload the pipeline, its card and the pictures, in the background"),
        ("hub_model_id", str, "repository, defaults to the name of output_dir"),
        (
            "hub_strategy",
            ("end", "every_save", "checkpoint"),
            "in the end, with each checkpoint, or also the checkpoint",
        ),
        ("hub_include_code", False, "add code, so that it loads by DiffusionPipeline without this package"),
        ("hub_token", str, "token, defaults to the one logged in with"),
        ("hub_private_repo", False, "make it a private one"),
        ("hub_license", str, "licence that its card names, as 'apache-2.0'"),
    ],
}

_DDPM = {"objective": "ddpm", "adam_beta2": 0.999, "adam_weight_decay": 0.0, "random_flip": True,
         "lr_warmup_steps": 5000}  # fmt: skip
_LONG = {"train_batch_size": 128, "lr_scheduler": "constant_with_warmup", "checkpointing_steps": 10_000,
         "eval_steps": 10_000}  # fmt: skip
# what a preset says of training; its network is in diffusers_vdm.UNET_PRESETS. Steps, batch and rates of cifar10 are
# those of google-research/vdm, of ddpm-cifar10 those of the DDPM paper, app. B (its LSUN and CelebA-HQ: ddpm-ffhq128)
PRESETS: dict[str, dict] = {
    "cifar10": _LONG | {"max_train_steps": 10_000_000},
    "cifar10-aug": _LONG | {"max_train_steps": 10_000_000, "random_flip": True, "random_rotation": True},
    "imagenet32": _LONG | {"max_train_steps": 2_000_000},
    "imagenet64": _LONG | {"max_train_steps": 2_000_000},
    "ddpm-cifar10": _LONG | _DDPM | {"max_train_steps": 800_000},
    "ddpm-ffhq128": _LONG | _DDPM | {"max_train_steps": 500_000, "train_batch_size": 64, "learning_rate": 2e-5,
                                     "resolution": 128},
}  # fmt: skip
# the images that a preset is named after, where there is one place for them; else a run must name them itself
_CIFAR10 = {"dataset_name": "uoft-cs/cifar10", "image_column": "img", "label_column": "label", "train_split": "train",
            "eval_split": "test"}  # fmt: skip
PRESET_DATA: dict[str, dict[str, str]] = {
    **dict.fromkeys(("cifar10", "cifar10-aug", "ddpm-cifar10"), _CIFAR10),
    **dict.fromkeys(("imagenet32", "imagenet64", "ddpm-ffhq128"), {}),
}


def parse_options(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked; wrong arguments end the program before any work starts."""
    parser = option_parser("train.py [options], see --help", description, OPTIONS)
    given = parser.parse_args(arguments)
    preset, data = PRESETS.get(given.preset, {}), PRESET_DATA.get(given.preset, {})
    if given.train_data_dir is None and given.dataset_name in (None, data.get("dataset_name")):
        preset = preset | data
    parser.set_defaults(**{k: v for k, v in preset.items() if not (k == "max_train_steps" and given.num_epochs)})
    options = parser.parse_args(arguments)
    # for those who run it again, beside the preset: what was said on the command line
    options.given = sorted(k for k, v in vars(options).items() if v != parser.get_default(k))
    try:
        check_options(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def check_options(args: argparse.Namespace) -> None:
    """Everything that can be told before any work starts; fills in what depends on other options."""
    from diffusers.optimization import SchedulerType

    from .. import UNET_PRESETS
    from ..training.checkpoints import check_allowed

    args.digits = args.dataset_name is None and args.train_data_dir is None
    of_a_data_set = ("resolution", "image_mode", "image_column", "label_column", "streaming", "num_train_images",
                     "frames", "skip_damaged")  # fmt: skip
    if args.digits and args.preset in PRESET_DATA:
        raise ValueError(
            f"--preset {args.preset} is a network for other images than the bundled digits; name them by "
            "--dataset_name or --train_data_dir"
        )
    ignored = [name for name in of_a_data_set if args.digits and getattr(args, name)]
    if ignored:
        raise ValueError(f"--{ignored[0]} is of a data set; name one by --dataset_name or --train_data_dir")
    if args.schedule == "linear_beta" and args.gamma_min is not None:
        raise ValueError("--gamma_min is not of --schedule linear_beta, whose ends come from its betas")
    args.schedule = args.schedule or ("learned" if args.objective == "vdm" else "linear_beta")
    args.gamma_min = (-7.5 if args.digits else -13.3) if args.gamma_min is None else args.gamma_min
    args.learning_rate = (4e-3 if args.digits else 2e-4) if args.learning_rate is None else args.learning_rate
    if args.ema_decays is None:
        args.ema_decays = [args.ema_max_decay]
    args.ema_decays = args.ema_decays if args.use_ema else []
    if args.max_train_steps is None and args.num_epochs is None:
        args.max_train_steps, args.num_epochs = (2500, None) if args.digits else (None, 100)
    if args.preset is None and args.model_config_name_or_path is None:
        args.preset = "digits"
    for bad, message in (
        (args.dataset_name and args.train_data_dir, "give --dataset_name or --train_data_dir, not both"),
        (args.preset and args.model_config_name_or_path, "give --preset or --model_config_name_or_path, not both"),
        (args.max_train_steps and args.num_epochs, "give --max_train_steps or --num_epochs, not both"),
        (args.objective == "ddpm" and args.schedule.startswith("learned"), "--objective ddpm cannot train γ: its "
         "minimiser is one γ for all t; use --schedule linear_beta or fixed_linear"),
        (args.objective == "ddpm" and args.importance_sampling, "--importance_sampling is of the bound alone"),
        (args.resume_from_checkpoint == "last-checkpoint" and not args.push_to_hub, "--resume_from_checkpoint "
         "last-checkpoint looks for it on the Hub; add --push_to_hub, with --hub_strategy checkpoint"),
        (args.objective == "ddpm" and args.num_timesteps, "--num_timesteps is of the bound; --objective ddpm has "
         "none"),
        (not args.gamma_min < args.gamma_max, f"--gamma_min {args.gamma_min} must be below --gamma_max "
         f"{args.gamma_max}"),
    ):  # fmt: skip
        if bad:
            raise ValueError(message)
    check_allowed(args.allow_changed or (), vars(args))
    if args.hub_license is not None:
        from ..sharing.model_card import check_license

        check_license(args.hub_license)
    check_choice("preset", args.preset, UNET_PRESETS)
    check_choice("lr_scheduler", args.lr_scheduler, [member.value for member in SchedulerType])
    positive = ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "num_epochs", "learning_rate",
                "gamma_learning_rate", "max_grad_norm", "logging_steps", "eval_batch_size", "eval_samples",
                "num_images", "num_timesteps", "ddpm_num_inference_steps", "save_images_epochs", "save_model_epochs",
                "checkpoints_total_limit", "resolution", "max_eval_images", "num_threads", "adam_epsilon",
                "ema_inv_gamma", "ema_power", "shuffle_buffer", "num_train_images", "milestone_steps",
                "max_nonfinite_steps")  # fmt: skip
    counts = ("lr_warmup_steps", "eval_steps", "checkpointing_steps", "dataloader_num_workers", "adam_weight_decay",
              "skip_damaged")  # fmt: skip
    ranges = dict.fromkeys(counts, (0, math.inf)) | {
        "adam_beta1": (0, 1 - 1e-9), "adam_beta2": (0, 1 - 1e-9), "dropout": (0, 1 - 1e-9), "label_dropout": (0, 1),
        "ema_max_decay": (0, 1), "ddpm_num_steps": (21, math.inf),
    }  # fmt: skip
    check_ranges(args, ranges, positive)
    if len(set(args.ema_decays)) < len(args.ema_decays) or not all(0 <= decay <= 1 for decay in args.ema_decays):
        raise ValueError(f"--ema_decays must be different numbers within [0, 1], got {args.ema_decays}")
    if args.logger != "none" and importlib.util.find_spec(args.logger) is None:
        raise ValueError(f"--logger {args.logger} is not installed; `pip install {args.logger}`, or --logger none")
    if args.train_data_dir and not Path(args.train_data_dir).is_dir():
        raise ValueError(f"--train_data_dir {args.train_data_dir} is not a folder")
    if Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise ValueError(f"--output_dir {args.output_dir} is a file")


def check_output_dir(args: argparse.Namespace) -> None:
    """`ValueError` for a folder of another run, unless it may be replaced; no other run may be writing into it."""
    folder = Path(args.output_dir)
    own = args.resume_from_checkpoint and (
        args.resume_from_checkpoint in ("latest", "last-checkpoint")
        or Path(args.resume_from_checkpoint).resolve().parent == folder.resolve()
    )
    holds = any((folder / name).exists() for name in ("metrics.jsonl", "model_index.json"))
    if holds and not (args.overwrite_output_dir or own):
        raise ValueError(
            f"--output_dir {folder} holds another run; go on by --resume_from_checkpoint latest, replace it by "
            "--overwrite_output_dir, or name another folder"
        )


def build(args: argparse.Namespace, data):
    """The network and γ(t)."""
    from .. import noise_schedules as S
    from ..unet import VDMUNet2DModel, unet_preset

    size, channels = tuple(data.shape[1:]), data.shape[0]
    config = (
        unet_preset(args.preset) if args.preset else dict(VDMUNet2DModel.load_config(args.model_config_name_or_path))
    )
    config |= {"in_channels": channels, "out_channels": channels}
    config["sample_size"] = size[0] if size[0] == size[1] else size
    if args.preset and config.get("fourier_exponents"):  # the paper's 6 and 7, where there are 256 levels
        config["fourier_exponents"] = [math.log2(data.num_levels) - 2, math.log2(data.num_levels) - 1]
    args.dropout = config["dropout"] = config.get("dropout", 0.0) if args.dropout is None else args.dropout
    if args.class_conditional:
        config |= {"num_class_embeds": data.num_classes, "null_class": True}
    # `from_config` would take a preset for a config of diffusers, which starts otherwise where it does not say how
    unet = VDMUNet2DModel(**config) if args.preset else VDMUNet2DModel.from_config(config)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    ends = {"gamma_min": args.gamma_min, "gamma_max": args.gamma_max}
    noise_schedule = {
        "learned": lambda: S.MonotoneGammaNetwork(**ends, learn_ends=args.learn_ends),
        "learned_linear": lambda: S.LearnedLinearGamma(**ends),
        "fixed_linear": lambda: S.FixedLinearGamma(**ends),
        "linear_beta": lambda: S.LinearBetaGamma(args.ddpm_num_steps),
    }[args.schedule]()
    return unet, noise_schedule
