"""The sections of a model card: functions of a [`CardSource`] that return "" if there is nothing to report."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from ..diffusers_schedulers import noise_schedule_of
from ..evaluation.report import Report
from ..json_values import count, items, number
from ..schedulers import VDMScheduler
from ..training.description import RunDescription
from ..training.options import option_names
from .markdown import escaped, fenced, image, literal, one_line, table
from .measurements import (
    DataName,
    Measurement,
    base_name,
    first_of_each,
    last_part,
    training_data,
)

if TYPE_CHECKING:
    from ..pipeline import VDMPipeline

# keys of options.json that are not command-line options
_NOT_COMMAND_OPTIONS = ("digits",)
# details that the quantity names already
_IN_THE_QUANTITY = ("clip_sample", "dequantization", "chosen_timesteps")
_VDM = "[Kingma et al. 2021](https://arxiv.org/abs/2107.00630)"
_DDPM = "[Ho et al. 2020](https://arxiv.org/abs/2006.11239)"


@dataclass(frozen=True)
class CardSource:
    """Everything that a card is made from.

    Attributes:
        folder (`Path`), name (`str`): the folder of the pipeline, and the name of the model.
        repo_id, variant (`str`, *optional*): arguments of `from_pretrained` in the code example.
        step (`int`, *optional*): training step of the weights, if training had not finished.
        pipe ([`VDMPipeline`]): the pipeline.
        has_code (`bool`): whether the repository contains code for users without this package.
        description ([`RunDescription`]): options.json, an empty one if there is none.
        lines (`list[dict]`): metrics.jsonl.
        measured (`list[Measurement]`): all results, those of the report first.
        report ([`Report`], *optional*), report_path (`Path`, *optional*): the report, if it measured these weights.
    """

    folder: Path
    name: str
    repo_id: str | None
    variant: str | None
    step: int | None
    pipe: VDMPipeline
    has_code: bool
    description: RunDescription
    lines: list[dict[str, Any]]
    measured: list[Measurement]
    report: Report | None
    report_path: Path | None

    @property
    def options(self) -> dict[str, Any]:
        return self.description.options

    @property
    def data(self) -> DataName | None:
        return training_data(self.description)

    @property
    def claimed(self) -> list[Measurement]:
        """Results of these weights on named data; those of the report, whose weights were verified, come first."""
        return first_of_each(m for m in self.measured if m.is_final and m.data)


# ---- sections ----------------------------------------------------------------------------------------------------


def title_section(run: CardSource) -> str:
    size = "×".join(str(side) for side in run.pipe.image_shape[1:])
    objective, schedule = str(run.options.get("objective")), str(run.options.get("schedule"))
    if objective == "vdm":
        learned = {
            "learned": "a learned noise schedule γ(t)",
            "learned_linear": "a linear γ(t) whose ends are learned",
        }
        how = learned.get(schedule, "DDPM's linear betas" if schedule == "linear_beta" else "a fixed γ(t)")
        what = f"A variational diffusion model ({_VDM}) with {how}"
    elif objective == "ddpm":
        betas = "linear betas" if schedule == "linear_beta" else "a fixed γ(t)"
        what = f"A DDPM ({_DDPM}) with {betas}, trained on the unweighted squared error"
    else:
        what = f"A pixel-space diffusion model ({_VDM}, {_DDPM})"
    on = f", trained on {escaped(run.data.name)}" if run.data else ""
    picture = _picture(run, "samples.png", "Samples from the model")
    unfinished = f" Training had not finished: these are the weights after step {run.step}." if run.step else ""
    text = f"# {escaped(run.name)}\n\n{what}{on}.{unfinished} It generates images of {size} pixels"
    channels = {1: ", grayscale", 3: ", RGB"}.get(run.pipe.image_shape[0], "")
    return f"{text}{channels}." + (f"\n\n{picture}" if picture else "")


def sampling_steps(run: CardSource) -> int:
    """The steps of samples.png, else the pipeline's 250, and at most those of the scheduler."""
    steps = count(run.options.get("ddpm_num_inference_steps")) or 250
    if isinstance(run.pipe.scheduler, VDMScheduler):
        return steps
    return min(steps, count(run.pipe.scheduler.config.get("num_train_timesteps")) or steps)


def use_section(run: CardSource) -> str:
    config = run.pipe.unet.config
    classes = config.num_class_embeds
    has_null = bool(config.get("null_class", False))
    label = ", class_labels=0" if classes is not None and not has_null else ""
    if config.get("cond_dim") is not None and not config.get("null_vectors"):
        label += f", cond_vectors={[0.0] * config.cond_dim}"
    if config.get("cond_channels") is not None and not config.get("null_images"):
        label += ", image=small_image"
    if config.get("cross_attention_dim") is not None:
        label += ', prompt="…"'
    loaded = literal(run.repo_id or ".") + (f", variant={literal(run.variant)}" if run.variant else "")
    code = [
        "import torch",
        "from diffusers_vdm import VDMPipeline",
        "",
        f"pipe = VDMPipeline.from_pretrained({loaded})",
        f"images = pipe(4, num_inference_steps={sampling_steps(run)}{label}, "
        "generator=torch.Generator().manual_seed(0)).images",
        "for i, picture in enumerate(images):",
        '    picture.save(f"sample-{i}.png")',
    ]
    parts = ["## Use", fenced("pip install diffusers_vdm", "sh"), fenced("\n".join(code), "python")]
    hints = ["" if run.repo_id else "Run it in this folder.", '`pipe.to("cuda")` uses a GPU.']
    if classes is not None:
        null = "without `class_labels`, images are of all classes" if has_null else "`class_labels` must be given"
        hints.append(f"`class_labels` are classes in [0, {classes}), one for all images or one per image; {null}.")
    if config.get("cross_attention_dim") is not None:
        hints.append("`prompt` is a text for all images, or one per image; without it, the text is empty.")
    if config.get("cond_dim") is not None:
        null = "optional" if config.get("null_vectors") else "needed"
        hints.append(f"`cond_vectors` ({null}) are {config.cond_dim} numbers, one vector for all or one per image.")
    if config.get("cond_channels") is not None:
        null = "optional" if config.get("null_images") else "needed"
        hints.append(
            f"`image` ({null}) is a condition, of {config.cond_channels} channels and at most the size of the samples."
        )
    parts.append(" ".join(text for text in hints if text))
    if run.has_code:
        short = ["from diffusers import DiffusionPipeline", ""]
        short.append(f"pipe = DiffusionPipeline.from_pretrained({loaded}, trust_remote_code=True)")
        parts.append("To load it without that package, run the code in this repository (read it first):")
        parts.append(fenced("\n".join(short), "python"))
    else:
        parts.append(
            "`DiffusionPipeline.from_pretrained` also loads it after a call of `diffusers_vdm.register()`, because "
            "diffusers by itself does not know these classes."
        )
    return "\n\n".join(parts)


def likelihood_section(run: CardSource) -> str:
    if not run.measured:
        return ""
    levels = run.pipe.config.num_levels
    shape = "×".join(str(side) for side in run.pipe.image_shape)
    first = next(iter(run.claimed), run.measured[0])
    parts = ["## Likelihood", _headline(first, run)]
    rows = [_row(m, first, run) for m in run.measured]
    header = ("bits/dim", "quantity", "images", "draws per image", "± is the standard error of", "weights")
    parts.append(table(header, rows))
    termed = [m for m in first_of_each(run.measured) if m.terms_bpd]
    if termed:
        parts.append("The terms of the bound, in bits/dim:")
        parts.append(
            table(("quantity", "images", "diffusion", "reconstruction", "prior"), [_terms(m) for m in termed])
        )
    conditional = sum(bool(m.details.get("class_conditional")) for m in run.measured)
    p = {0: "p(x)", len(run.measured): "p(x | class), given the class of each image,"}.get(
        conditional, "p(x), or p(x | class) if the class of each image is given,"
    )
    text = (
        f"An upper bound on −log₂ {p} per dimension, for images of {math.prod(run.pipe.image_shape)} integers 0 … "
        f"{levels - 1} ({shape}): the bits per integer that a lossless code with this model would need. Lower is "
        f"better; a uniform distribution over the levels gives {math.log2(levels):.4f}."
    )
    if any(m.method == "ode" for m in run.measured):
        text += " For the ODE, it is a bound up to the tolerances of the solver."
    if any(m.convention == "vdm" for m in run.measured):
        text += " Decoder: softmax over the levels at γ(0), with x = 2(k + ½)/levels − 1."
    if any(m.convention == "ddpm" for m in run.measured):
        text += (
            " DDPM's convention: x = 2k/(levels − 1) − 1, and the discretized Gaussian at index 0 as the decoder; its "
            "results differ from those of the other convention in the last digits."
        )
    histogram = run.description.histogram_bpd
    if histogram is not None and first.step is not None:
        text += f" Per-pixel histograms of the training images give {histogram:.4f} on the same images."
    parts.append(text + " Results for another T, other data or other image preprocessing are not comparable.")
    return "\n\n".join(parts)


def _headline(m: Measurement, run: CardSource) -> str:
    images = f"{m.num_images} images" if m.num_images else "images"
    of = f" of {escaped(m.data.name)}" + (f", split {escaped(m.data.split)}" if m.data.split else "") if m.data else ""
    unit = {"mc": "draws of (t, ε)", "ode": "solves"}.get(m.method)
    draws = f", {unit} per image: {m.num_draws}" if m.num_draws and unit else ""
    error = f" ± is the standard error of {escaped(m.stderr_is_of)}." if m.stderr_bpd is not None else ""
    weights = f", weights: {escaped(m.weights)}" if m.weights else ""
    parts = [f"**{m.value} bits/dim** on {images}{of}: {escaped(m.quantity)}{draws}{weights}.{error}"]
    if m.stderr_bpd is None:
        parts.append("Its standard error is unknown.")
    details = {k: v for k, v in m.details.items() if k not in _IN_THE_QUANTITY}
    if details:
        listed = ", ".join(k.replace("_", " ") + ("" if v is True else f" {_short(v)}") for k, v in details.items())
        parts.append(f"Also: {escaped(listed)}.")
    fingerprints = [f"images {m.data_fingerprint}"] if m.data_fingerprint else []
    fingerprints += [f"weights {run.report.weights_fingerprint}"] if m.step is None and run.report else []
    if fingerprints:
        parts.append(f"Fingerprints: {escaped(', '.join(fingerprints))}.")
    return " ".join(parts + _warnings(m, run))


def _warnings(m: Measurement, run: CardSource) -> list[str]:
    """Caveats of a result."""
    held_out, found = run.description.held_out, []
    if _is_training_data(m, run):
        found.append("**These are the images that the model was trained on.**")
    if held_out and held_out.shared_with_training and m.data_fingerprint == held_out.fingerprint:
        found.append(f"**{held_out.shared_with_training} of these images are also training images.**")
    if not m.is_final:
        found.append(f"**Measured at step {m.step}; the weights here may be from another step.**")
    return found


def _row(m: Measurement, first: Measurement, run: CardSource) -> tuple[object, ...]:
    when = "" if m.step is None else f", during training, step {m.step}"
    data = f" of {m.data.name}, {m.data.split or 'all'}" if m.data and not m.has_same_data_as(first) else ""
    images = f"{m.num_images or ''}" + (" of the training set" if _is_training_data(m, run) else "") + data
    return (
        m.value,
        m.quantity + when,
        images,
        m.num_draws,
        m.stderr_is_of if m.stderr_bpd is not None else None,
        m.weights,
    )


def _terms(m: Measurement) -> tuple[object, ...]:
    values = [m.terms_bpd.get(term) for term in ("diffusion", "reconstruction", "prior")]
    return m.quantity, m.num_images, *(None if value is None else f"{value:.4f}" for value in values)


def _is_training_data(m: Measurement, run: CardSource) -> bool:
    trained_on = run.description.data.fingerprint
    return trained_on is not None and m.data_fingerprint == trained_on


def _picture(run: CardSource, name: str, alternative: str) -> str:
    return image(alternative, PurePath(name)) if (run.folder / name).is_file() else ""


def figures_section(run: CardSource) -> str:
    pictures = [
        _picture(run, "schedule.png", "The noise schedule, γ over t, and the fractions of signal and noise"),
        _picture(run, "loss_by_gamma.png", "The loss as a density over γ, with the terms of the bound"),
        _picture(run, "training.png", "Loss and bits/dim over the training steps"),
        _picture(run, "denoising.gif", "From noise to samples"),
    ]
    if run.report_path is not None and run.report_path.resolve().is_relative_to(run.folder.resolve()):
        beside = run.report_path.resolve().relative_to(run.folder.resolve())
        for part, alternative in (
            ("by_gamma", "The loss over γ, from the report"),
            ("histogram", "Histogram of the bits/dim of the images"),
            ("most_likely", "The images with the fewest bits"),
            ("most_unlikely", "The images with the most bits"),
        ):
            pictures.append(_picture(run, beside.with_name(f"{beside.stem}_{part}.png").as_posix(), alternative))
    found = [picture for picture in pictures if picture]
    return "\n\n".join(["## Figures", *found]) if found else ""


def training_section(run: CardSource) -> str:
    rows = [(name, value) for name, value in _facts(run).items() if value not in (None, "")]
    parts = ["## Model and training", table(("", ""), rows)]
    if run.options:
        parts.append("The command, with the scripts in the package's repository:")
        if run.description.given is None:
            parts[-1] = "All options that weights and results depend on, as a command in the package's repository:"
        parts.append(fenced(training_command(run.description), "sh"))
    return "\n\n".join(parts)


def _facts(run: CardSource) -> dict[str, object]:
    options, pipe = run.options, run.pipe
    data, description = run.data, run.description
    steps, total = run.step or (run.lines[-1]["step"] if run.lines else None), description.num_steps
    skipped = count(run.lines[-1].get("skipped_steps")) if run.lines else None
    loss = {"train_bpd": "bits/dim", "train_mse": "squared error of the network's prediction, per dimension"}
    last = next(((line, k) for line in reversed(run.lines) for k in loss if number(line.get(k)) is not None), None)
    trained = {"vdm": "variational bound, " + _time(options), "ddpm": "unweighted squared error"}.get(
        str(options.get("objective"))
    )
    decays = items(options.get("ema_decays"))
    precision = {"no": "float32"}.get(str(options.get("mixed_precision")), options.get("mixed_precision"))
    return {
        "training data": data and data.name + (f", split {data.split}" if data.split else ""),
        "images": description.data.images and f"{description.data.images}",
        "data fingerprint": description.data.fingerprint,
        "network": f"{type(pipe.unet).__name__}, {sum(p.numel() for p in pipe.unet.parameters()):,} parameters, "
        f"predicts {pipe.scheduler.config.get('prediction_type', 'epsilon')}",
        "scheduler": type(pipe.scheduler).__name__,
        "noise schedule": _noise_schedule(pipe),
        "objective": trained,
        "optimizer": {"adamw": "AdamW", "muon": "Muon, and AdamW for what is not a matrix between hidden layers"}.get(
            str(options.get("optimizer"))
        ),
        "optimizer steps": steps
        and f"{steps}"
        + (f" of {total}: training had not finished" if run.step and total and steps < total else "")
        + (f", of which {skipped} were skipped" if skipped else ""),
        "images per step": description.global_batch_size and f"{description.global_batch_size}",
        "last training loss": last and f"{last[0][last[1]]:.4f} {loss[last[1]]}, at step {last[0]['step']}",
        "weight averages": (", ".join(f"EMA {_short(d)}" for d in decays) or "none") if options else None,
        "precision": precision,
        "processes": description.num_processes and f"{description.num_processes}",
        "device": description.device,
        "versions": ", ".join(f"{k} {v}" for k, v in description.versions.items()),
    }


def _time(options: dict[str, Any]) -> str:
    steps = count(options.get("num_timesteps"))
    return f"T = {steps}" if steps else "continuous time"


def _noise_schedule(pipe: VDMPipeline) -> str | None:
    """The ends of the γ(t) used for sampling."""
    try:
        gamma_0, gamma_1 = (float(end) for end in noise_schedule_of(pipe.scheduler).ends())
    except ValueError:
        return None
    kind = "" if pipe.noise_schedule is None else f"{type(pipe.noise_schedule).__name__}, "
    return f"{kind}γ = −log SNR from {gamma_0:.3f} at t = 0 to {gamma_1:.3f} at t = 1"


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def training_command(description: RunDescription) -> str:
    """The command of a run, without options such as `output_dir`, which the reader chooses.

    It has the options that were set, or all options if the run did not record which were set, because the defaults of
    that version are unknown. Only the last part of a path is shown, and no token.
    """
    options, given = description.options, description.given
    names = list(options) if given is None else [name for name in options if name in given]
    words = []
    for name in names:
        value = options[name]
        # checked by name as well: a file from elsewhere may hold private options
        private = name in _NOT_COMMAND_OPTIONS or name.startswith(("hub_", "push_")) or "token" in name
        if private or name in option_names(in_card=False) or value in (None, []):
            continue
        if name == "gamma_min" and options.get("schedule") == "linear_beta":  # not allowed with linear_beta
            continue
        if not re.fullmatch(r"\w+", name, re.ASCII):
            continue
        words.append(" ".join([f"--{'no-' if value is False else ''}{name}", *_arguments(name, value)]))
    processes = description.num_processes or 1
    launch = "accelerate launch " + (f"--num_processes {processes} " if processes > 1 else "") + "examples/train.py"
    lines = [launch]
    for word in words:
        if len(lines[-1]) + len(word) < 110:
            lines[-1] += f" {word}"
        else:
            lines.append(f"    {word}")
    return " \\\n".join(lines)


def _arguments(name: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return []
    words = []
    for v in value if isinstance(value, list) else [value]:
        if name == "model_config_name_or_path" and isinstance(v, str) and ("/" in v or "\\" in v):
            v = "unet"  # the folder in this repository instead of the author's path
        elif isinstance(v, str):
            v = base_name(v) if name.endswith("_dir") else last_part(v)
        words.append(shlex.quote(one_line(repr(v) if isinstance(v, float) else v)))
    return words
