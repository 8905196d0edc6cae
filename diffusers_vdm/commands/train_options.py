"""The options of train.py: presets, checks, and the network and noise schedule that they define."""

from __future__ import annotations

import argparse
import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.options import TRAIN_OPTIONS
from .condition_data import CONDITION_OF
from .options import check_choice, check_ranges, option_parser
from .processes import on_main_process, process_state

if TYPE_CHECKING:
    from ..training.description import RunDescription

_DDPM = {"objective": "ddpm", "adam_beta2": 0.999, "adam_weight_decay": 0.0, "random_flip": True,
         "lr_warmup_steps": 5000}  # fmt: skip
_LONG = {"train_batch_size": 128, "lr_scheduler": "constant_with_warmup", "checkpointing_steps": 10_000,
         "eval_steps": 10_000}  # fmt: skip
# training options of the presets; their networks are in diffusers_vdm.UNET_PRESETS. Steps, batch size and learning
# rate are from google-research/vdm for cifar10, and from the DDPM paper, app. B, for ddpm-cifar10 and ddpm-ffhq128
# (there: LSUN and CelebA-HQ)
_FAST = {"optimizer": "muon", "learning_rate": 4e-3, "gamma_learning_rate": 2e-2,
         "ema_max_decay": 0.999, "mixed_precision": "auto"}  # fmt: skip
PRESETS: dict[str, dict] = {
    "fast": _FAST | {"train_batch_size": 16},
    # 1,500 images are learned by heart unless most are augmented, and a second thread makes such small layers slower
    "digits-fast": _FAST | {"max_train_steps": 12_900, "muon_learning_rate": 0.03, "ema_max_decay": 0.9999,
                            "lr_warmup_steps": 1000,
                            "random_flip": True, "random_rotation": True, "random_shift": 1,
                            "augmentation_rate": 0.5, "mixed_precision": "no", "num_threads": 1},
    "cifar10-fast": _FAST | {"max_train_steps": 14_117, "train_batch_size": 16},
    "text": {"train_batch_size": 32, "learning_rate": 1e-3, "mixed_precision": "auto"},
    "cifar10": _LONG | {"max_train_steps": 10_000_000},
    "cifar10-aug": _LONG | {"max_train_steps": 10_000_000, "random_flip": True, "random_rotation": True},
    "imagenet32-fast": _FAST | {"max_train_steps": 24_444, "train_batch_size": 16},
    "imagenet32": _LONG | {"max_train_steps": 2_000_000},
    "imagenet64": _LONG | {"max_train_steps": 2_000_000},
    "ddpm-cifar10": _LONG | _DDPM | {"max_train_steps": 800_000},
    "ddpm-ffhq128": _LONG | _DDPM | {"max_train_steps": 500_000, "train_batch_size": 64, "learning_rate": 2e-5,
                                     "resolution": 128},
}  # fmt: skip
# data sets of the presets, if there is one public source; otherwise the run must specify the data
_CIFAR10 = {"dataset_name": "uoft-cs/cifar10", "image_column": "img", "label_column": "label", "train_split": "train",
            "eval_split": "test"}  # fmt: skip
PRESET_DATA: dict[str, dict[str, str]] = {
    **dict.fromkeys(("cifar10", "cifar10-aug", "ddpm-cifar10", "cifar10-fast"), _CIFAR10),
    **dict.fromkeys(("imagenet32", "imagenet64", "ddpm-ffhq128", "imagenet32-fast"), {}),
}


def parse_options(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line; exits on invalid arguments before any work starts."""
    parser = option_parser("%(prog)s [options], see --help", description, TRAIN_OPTIONS)
    given = parser.parse_args(arguments, argparse.Namespace(train_batch_size=None))
    # also if it is the default, or the one of the preset: a budget chooses another one otherwise
    has_batch = given.train_batch_size is not None
    name = given.preset or default_preset(given)
    preset, data = PRESETS.get(name or "", {}), PRESET_DATA.get(name or "", {})
    if given.train_data_dir is None and given.dataset_name in (None, data.get("dataset_name")):
        preset = preset | data
    has_other_end = ends_of(given) not in ([], ["max_train_steps"])
    parser.set_defaults(**{k: v for k, v in preset.items() if not (k == "max_train_steps" and has_other_end)})
    options = parser.parse_args(arguments)
    options.preset = name
    # for the model card: options that were set on the command line, in addition to the preset
    options.given = sorted(k for k, v in vars(options).items() if v != parser.get_default(k))
    if given.preset is None:
        options.given = [option for option in options.given if option != "preset"]
    if has_batch:
        options.given = sorted({*options.given, "train_batch_size"})
    try:
        check_options(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return options


def default_preset(args: argparse.Namespace) -> str | None:
    """The preset of options that name none: `fast` for one's own data, and `digits-fast` for the bundled digits.

    It is `digits` if the options need a network that knows nothing of γ.
    """
    if args.model_config_name_or_path:
        return None
    is_own = args.dataset_name is not None or args.train_data_dir is not None
    if args.caption_column:
        return "text"
    suits = args.objective == "vdm" and args.schedule != "linear_beta" and args.prediction_type == "epsilon"
    return ("fast" if is_own else "digits-fast") if suits else "digits"


def ends_of(args: argparse.Namespace) -> list[str]:
    """The options that say how long to train, 0 included, which is refused later."""
    names = ("max_train_steps", "num_epochs", "max_hours", "max_flops")
    return [name for name in names if getattr(args, name) is not None]


def check_options(args: argparse.Namespace) -> None:
    """Checks everything that can be checked before any work starts; fills in defaults that depend on other options."""
    from diffusers.optimization import SchedulerType

    from .. import MULTISCALE_PRESETS, UNET_PRESETS
    from ..training.checkpoints import check_allowed

    args.digits = args.dataset_name is None and args.train_data_dir is None
    data_set_options = ("resolution", "image_mode", "image_column", "label_column", "streaming", "num_train_images",
                     "frames", "skip_damaged")  # fmt: skip
    if args.digits and args.preset in PRESET_DATA:
        raise ValueError(
            f"--preset {args.preset} is a network for other images than the bundled digits; set --dataset_name or "
            "--train_data_dir"
        )
    ignored = [name for name in data_set_options if args.digits and getattr(args, name)]
    if ignored:
        raise ValueError(f"--{ignored[0]} needs a data set; set --dataset_name or --train_data_dir")
    if args.schedule == "linear_beta" and args.gamma_min is not None:
        raise ValueError("--gamma_min cannot be used with --schedule linear_beta, whose ends come from its betas")
    args.schedule = args.schedule or ("learned" if args.objective == "vdm" else "linear_beta")
    args.gamma_min = (-7.5 if args.digits else -13.3) if args.gamma_min is None else args.gamma_min
    args.learning_rate = (4e-3 if args.digits else 2e-4) if args.learning_rate is None else args.learning_rate
    if args.ema_decays is None:
        args.ema_decays = [args.ema_max_decay]
    args.ema_decays = args.ema_decays if args.use_ema else []
    ends = ends_of(args)
    if not ends:
        args.max_train_steps, args.num_epochs = (2500, None) if args.digits else (None, 100)
    for bad, message in (
        (args.dataset_name and args.train_data_dir, "give --dataset_name or --train_data_dir, not both"),
        (args.preset and args.model_config_name_or_path, "give --preset or --model_config_name_or_path, not both"),
        (len(ends) > 1, f"give --{' or --'.join(ends)}, not both"),
        (args.objective == "ddpm" and args.schedule.startswith("learned"), "--objective ddpm cannot train γ: its "
         "minimizer is one γ for all t; use --schedule linear_beta or fixed_linear"),
        (args.objective == "ddpm" and args.importance_sampling, "--importance_sampling needs --objective vdm"),
        (args.resume_from_checkpoint == "last-checkpoint" and not args.push_to_hub, "--resume_from_checkpoint "
         "last-checkpoint looks for it on the Hub; add --push_to_hub, with --hub_strategy checkpoint"),
        (args.objective == "ddpm" and args.num_timesteps, "--num_timesteps needs --objective vdm"),
        (not args.gamma_min < args.gamma_max, f"--gamma_min {args.gamma_min} must be below --gamma_max "
         f"{args.gamma_max}"),
    ):  # fmt: skip
        if bad:
            raise ValueError(message)
    check_allowed(args.allow_changed or (), vars(args))
    if args.hub_license is not None:
        from ..sharing.model_card import check_license

        check_license(args.hub_license)
    check_choice("preset", args.preset, [*UNET_PRESETS, *MULTISCALE_PRESETS, "text"])
    if args.width and not is_multiscale(args) and args.preset != "text":
        raise ValueError("--width needs a multiscale network; use --preset fast")
    is_for_text = network_of(args)[0].__name__ == "VDMUNet2DConditionModel"
    if is_for_text != bool(args.caption_column):
        raise ValueError(
            "--caption_column needs a network for texts; use --preset text" if args.caption_column else
            "a network for texts needs --caption_column, the column of the captions"
        )  # fmt: skip
    if bool(args.caption_column) != bool(args.text_encoder):
        missing = "text_encoder" if args.caption_column else "caption_column"
        raise ValueError(
            f"--{missing} must be given with --{'caption_column' if args.caption_column else 'text_encoder'}"
        )
    if is_for_text and (args.class_conditional or args.cond_columns):
        raise ValueError("--class_conditional and --cond_columns cannot be used with --caption_column")
    check_choice("lr_scheduler", args.lr_scheduler, [member.value for member in SchedulerType])
    check_ranges(args, TRAIN_OPTIONS)
    if len(set(args.ema_decays)) < len(args.ema_decays) or not all(0 <= decay <= 1 for decay in args.ema_decays):
        raise ValueError(f"--ema_decays must be different numbers within [0, 1], got {args.ema_decays}")
    if args.logger != "none" and importlib.util.find_spec(args.logger) is None:
        raise ValueError(f"--logger {args.logger} is not installed; `pip install {args.logger}`, or --logger none")
    if args.train_data_dir and not Path(args.train_data_dir).is_dir():
        raise ValueError(f"--train_data_dir {args.train_data_dir} is not a folder")
    if Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise ValueError(f"--output_dir {args.output_dir} is a file")


def resumed_description(args: argparse.Namespace) -> RunDescription | None:
    """What the run that `args` resume has recorded, if there is one; the main process reads it for all.

    Raises: on the main process, `ValueError` or `OSError` if its options.json cannot be read; on others, `SystemExit`.
    """
    if args.resume_from_checkpoint is None:
        return None
    return on_main_process(process_state(), lambda: _read_description(args))


def _read_description(args: argparse.Namespace) -> RunDescription | None:
    from ..training.checkpoints import list_checkpoints
    from ..training.description import read_description

    name, folder = args.resume_from_checkpoint, Path(args.output_dir)
    if name == "last-checkpoint" and not list_checkpoints(folder):  # then that of the Hub is resumed
        from ..sharing.uploads import fetch_description

        found = fetch_description(args.hub_model_id or folder.resolve().name, token=args.hub_token)
        if found is not None:
            return found
    return read_description(folder if name in ("latest", "last-checkpoint") else Path(name).parent)


def check_output_dir(args: argparse.Namespace) -> None:
    """Raises `ValueError` for a folder of another run, unless it may be replaced; call it with the lock held."""
    folder = Path(args.output_dir)
    own = args.resume_from_checkpoint and (
        args.resume_from_checkpoint in ("latest", "last-checkpoint")
        or Path(args.resume_from_checkpoint).resolve().parent == folder.resolve()
    )
    holds = any((folder / name).exists() for name in ("metrics.jsonl", "model_index.json"))
    if holds and not (args.overwrite_output_dir or own):
        raise ValueError(
            f"--output_dir {folder} holds another run; continue it with --resume_from_checkpoint latest, replace it "
            "with --overwrite_output_dir, or use another folder"
        )


def network_of(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The class of the network and its arguments, before they are fitted to the data."""
    from ..multiscale import MULTISCALE_PRESETS, VDMMultiscale2DModel
    from ..text_unet import VDMUNet2DConditionModel
    from ..unet import VDMUNet2DModel, unet_preset

    if args.preset == "text":
        return VDMUNet2DConditionModel, {"fourier_exponents": (6, 7)}
    if args.preset in MULTISCALE_PRESETS:
        return VDMMultiscale2DModel, dict(MULTISCALE_PRESETS[args.preset])
    if args.preset:
        return VDMUNet2DModel, unet_preset(args.preset)
    loaded: Any = VDMUNet2DModel.load_config(args.model_config_name_or_path)
    classes = {cls.__name__: cls for cls in (VDMMultiscale2DModel, VDMUNet2DConditionModel)}
    return classes.get(loaded.get("_class_name"), VDMUNet2DModel), dict(loaded)


def is_multiscale(args: argparse.Namespace) -> bool:
    """Whether the options are of a [`VDMMultiscale2DModel`]."""
    return network_of(args)[0].__name__ == "VDMMultiscale2DModel"


def condition_arguments_of(args: argparse.Namespace, data) -> dict[str, Any]:
    """The arguments of a network of ours for the conditions of the data beside the classes."""
    conditions, arguments = data.conditions, {}
    if conditions is None:
        return arguments
    has_null = args.condition_dropout > 0
    if conditions.vectors is not None:
        mean, std = conditions.statistics()
        arguments |= {"cond_dim": len(mean), "cond_mean": mean, "cond_std": std, "null_vectors": has_null}
    channels = conditions.num_channels(data.shape[0])
    if channels is not None:
        arguments |= {"cond_channels": channels, "null_images": has_null}
    return arguments


def build(args: argparse.Namespace, data):
    """Builds the network and γ(t)."""
    from .. import noise_schedules as S
    from ..conditions import conditions_taken
    from ..multiscale import VDMMultiscale2DModel, channels_of, fast_arguments
    from ..text_unet import text_arguments
    from ..training.batches import NUM_AUGMENTATION_FLAGS

    size = tuple(data.shape[1:])
    cls, config = network_of(args)
    config |= {"in_channels": data.shape[0], "sample_size": size[0] if size[0] == size[1] else size}
    if cls is VDMMultiscale2DModel:
        config |= {"num_levels": data.num_levels, "gamma_min": args.gamma_min, "gamma_max": args.gamma_max}
        if args.preset == "fast":
            config |= fast_arguments(size, data.num_levels, data.num_images)
            if args.random_flip or args.random_rotation or args.random_shift:
                config["num_augmentation_flags"] = NUM_AUGMENTATION_FLAGS
        if args.width:
            levels = len(config.get("block_out_channels", (1, 2, 4)))
            channels, groups = channels_of(args.width, levels), config.get("norm_num_groups", 8)
            if args.width % groups:
                raise ValueError(f"--width must be a multiple of the {groups} groups of GroupNorm, got {args.width}")
            head = math.gcd(config.get("attention_head_dim", 32), channels[-1])
            config |= {"block_out_channels": channels, "attention_head_dim": head}
    else:
        config["out_channels"] = data.shape[0]
        if args.preset == "text":
            config |= text_arguments(size, args.width or 64, data.conditions.texts.tokens.shape[1])
    if args.preset and config.get("fourier_exponents"):  # 6 and 7 for 256 levels, as in the paper
        config["fourier_exponents"] = [math.log2(data.num_levels) - 2, math.log2(data.num_levels) - 1]
    args.dropout = config["dropout"] = config.get("dropout", 0.0) if args.dropout is None else args.dropout
    if args.class_conditional:
        config |= {"num_class_embeds": data.num_classes, "null_class": args.condition_dropout > 0}
    config |= condition_arguments_of(args, data)
    # `from_config` would take a preset for a config of diffusers, which has another default initialization
    unet: Any = cls(**config) if args.preset else cls.from_config(config)
    named = {condition for option, condition in CONDITION_OF.items() if getattr(args, option)}
    for name in conditions_taken(unet):
        if name not in named and not (name == "class_labels" and args.class_conditional):
            raise ValueError(f"the network takes {name}, but no option names them; see docs/conditions.md")
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
