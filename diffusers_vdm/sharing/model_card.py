"""Generate a model card from the files of a run. It reports only what was measured.

A card is generated only for a loaded pipeline, and a report is used only if it measured exactly these weights. The
same folder gives the same text.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers.utils import logging
from huggingface_hub import EvalResult, ModelCardData

from ..evaluation.report import NAME as REPORT
from ..evaluation.report import Report, read_report
from ..evaluation.rows import gammas_fingerprint, weights_fingerprint
from ..files import write_atomically
from ..repository import INDEX, read_json
from ..training.description import RunDescription, read_description
from ..training.metrics import read_steps
from .card_sections import (
    CardSource,
    figures_section,
    likelihood_section,
    title_section,
    training_section,
    use_section,
)
from .markdown import one_line
from .measurements import DataName, Measurement, last_part, measured_in_report, measured_in_training

if TYPE_CHECKING:
    from ..pipeline import VDMPipeline

logger = logging.get_logger(__name__)

NAME = "README.md"
_MARK = (
    "*Made by `diffusers_vdm.sharing.model_card` of the files beside it, as {digest}; "
    "once edited, it is no longer updated.*"
)
_MARKED = re.compile(
    r"(.*\n)\*Made by `diffusers_vdm(?:\.sharing)?\.model_card` of the files beside it, as ([0-9a-f]{16});[^\n]*\n*",
    re.DOTALL,
)


def load_quietly(cls: type[VDMPipeline], folder: str | os.PathLike, variant: str | None = None) -> VDMPipeline:
    """Loads the pipeline in a folder without a progress bar; raises `ValueError` if there is no folder."""
    if not Path(folder).is_dir():
        raise ValueError(f"folder must contain a saved pipeline, got {os.fspath(folder)!r}.")
    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return cls.from_pretrained(folder, variant=variant)
    finally:
        if shows_bars:
            logging.enable_progress_bar()


def model_card(
    pipeline: VDMPipeline,
    folder: str | os.PathLike,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    datasets: str | Sequence[str] | None = None,
    report: str | os.PathLike | None = None,
    variant: str | None = None,
    step: int | None = None,
) -> str:
    """The text of README.md for a saved pipeline: YAML metadata, use, bits/dim with their errors, figures, training.

    Args:
        pipeline ([`VDMPipeline`]): the loaded pipeline of the folder. It is not changed.
        folder (`str` or `os.PathLike`): output of examples/train.py, or of `VDMPipeline.save_pretrained` for a
            shorter card.
        repo_id (`str`, *optional*): repository in the code example; defaults to ".", which works within the folder.
        license (`str`, *optional*): the Hub's identifier of the license; no license is stated if not given.
        datasets (`str` or sequence of them, *optional*): data sets on the Hub that the model was trained on; defaults
            to the one in options.json.
        report (`str` or `os.PathLike`, *optional*): report of examples/evaluate.py; defaults to report.json in the
            folder, which is skipped with a warning if it is damaged or of other weights.
        variant (`str`, *optional*): the variant of the weights, as for `VDMPipeline.from_pretrained`.
        step (`int`, *optional*): training step of the weights, if it is not the last.

    Returns: `str`, the same for the same folder and arguments.
    Raises: `TypeError` or `ValueError` for invalid arguments, a report that is invalid or of other weights, and
        damaged files; `OSError` for a folder without a pipeline.
    """
    _check_arguments(repo_id, license)
    run = _read(pipeline, Path(folder), repo_id, report, variant, step)
    metadata = _metadata(run, license, _checked_datasets(datasets, run.data))
    sections = [title_section, use_section, likelihood_section, figures_section, training_section]
    body = "\n\n".join(text for section in sections if (text := section(run)))
    text = f"---\n{metadata.to_yaml()}\n---\n\n{body}\n\n"
    return text + _MARK.format(digest=_digest(text)) + "\n"


def is_made_here(text: str) -> bool:
    """Whether [`model_card`] generated a card and it was not edited since."""
    found = _MARKED.fullmatch("\n".join(text.splitlines()) + "\n")
    return found is not None and _digest(found[1]) == found[2]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.strip().encode(), digest_size=8).hexdigest()


def save_model_card(
    pipeline: VDMPipeline, folder: str | os.PathLike, *, overwrite: bool = False, **arguments: Any
) -> Path:
    """Writes [`model_card`] atomically to README.md in `folder`, and returns its path.

    Args:
        pipeline ([`VDMPipeline`]), folder (`str` or `os.PathLike`), arguments: as in [`model_card`].
        overwrite (`bool`, defaults to `False`): replace a README.md that was not generated by it, or was edited.

    Raises: as [`model_card`]; `ValueError` for such a README.md.
    """
    path = Path(folder) / NAME
    if path.exists() and not overwrite and not is_made_here(path.read_text(encoding="utf-8", errors="replace")):
        raise ValueError(
            f"{NAME} of {folder} was not made by save_model_card, or was edited; set overwrite=True to replace it."
        )
    write_atomically(path, model_card(pipeline, folder, **arguments))
    return path


# ---- reading the folder ------------------------------------------------------------------------------------------


def _check_arguments(repo_id: str | None, license: str | None) -> None:
    if repo_id is not None and not isinstance(repo_id, str):
        raise TypeError(f"repo_id must be a str like 'user/name', got {type(repo_id).__name__}.")
    if repo_id is not None and not repo_id.strip():
        raise ValueError("repo_id must not be empty; leave it out if there is no repository yet.")
    check_license(license)


def check_license(license: str | None) -> None:
    """Raises `ValueError` for anything but an identifier of the Hub."""
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise ValueError(f"license must be an identifier of the Hub like 'apache-2.0' or 'other', got {license!r}.")


def _read(
    pipe: VDMPipeline,
    folder: Path,
    repo_id: str | None,
    report: str | os.PathLike | None,
    variant: str | None,
    step: int | None,
) -> CardSource:
    if not folder.is_dir():
        raise ValueError(f"folder must contain a saved pipeline, got {str(folder)!r}.")
    description = read_description(folder) or RunDescription()
    lines = read_steps(folder)
    found, report_path = _report_of(folder, report, pipe)
    return CardSource(
        folder=folder,
        name=one_line(last_part((repo_id or "").split("/")[-1]) or folder.resolve().name, 96) or "model",
        repo_id=repo_id,
        variant=variant,
        step=step,
        pipe=pipe,
        has_code=isinstance(read_json(folder / INDEX, INDEX).get("_class_name"), list),
        description=description,
        lines=lines,
        measured=[*(measured_in_report(found) if found else []), *measured_in_training(lines, description)],
        report=found,
        report_path=report_path,
    )


def _report_of(folder: Path, report: str | os.PathLike | None, pipe: VDMPipeline) -> tuple[Report | None, Path | None]:
    """The report, if it measured these weights."""
    path = folder / REPORT if report is None else Path(report)
    if report is None and not path.is_file():
        return None, None
    try:
        found = read_report(path)
        _check_same_model(found, pipe, path.name)
    except ValueError as error:
        if report is not None:
            raise
        logger.warning(f"the model card skips {path.name}: {error}")
        return None, None
    return found, path


def _check_same_model(report: Report, pipe: VDMPipeline, name: str) -> None:
    """Raises `ValueError` unless the report is of these weights and, where recorded, of the same γ(t) and levels."""
    here = {
        "weights_fingerprint": weights_fingerprint(pipe.unet),
        "gammas_fingerprint": gammas_fingerprint(pipe.scheduler),
        "num_levels": pipe.config.num_levels,
        "prediction_type": pipe.scheduler.config.get("prediction_type", "epsilon"),
    }
    for key, value in here.items():
        found = getattr(report, key)
        if found is not None and found != value:
            raise ValueError(
                f"report {name} must be of the model in the folder, whose {key} is {value}, got "
                f"{one_line(found)}; evaluate this model again."
            )


def _checked_datasets(datasets: str | Sequence[str] | None, data: DataName | None) -> list[str]:
    if datasets is None:
        return [data.name] if data and data.is_repository else []
    names = [datasets] if isinstance(datasets, str) else list(datasets)
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"([\w-]+/)?[\w.-]+", name, re.ASCII):
            raise ValueError(f"datasets must be names of data sets on the Hub like 'user/name', got {name!r}.")
    return names


# ---- metadata ----------------------------------------------------------------------------------------------------


def _metadata(run: CardSource, license: str | None, datasets: list[str]) -> ModelCardData:
    """The metadata for the Hub, with results only of these weights on named data."""
    results = [_result(m, m.data) for m in run.claimed if m.data]
    kind = {"vdm": ["variational-diffusion-model"], "ddpm": ["ddpm"]}.get(str(run.options.get("objective")), [])
    conditional = ["class-conditional"] if run.pipe.unet.config.num_class_embeds is not None else []
    return ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["diffusers_vdm", *kind, "likelihood", *conditional],
        datasets=datasets or None,
        model_name=run.name if results else None,
        eval_results=results or None,
    )


def _result(m: Measurement, data: DataName) -> EvalResult:
    """A result in the Hub's format, with everything needed to quote it as arguments of the metric."""
    # YAML may parse a hexadecimal number as 1e9, but not with a word before it
    data_fingerprint = one_line(f"blake2b {m.data_fingerprint}") if m.data_fingerprint else None
    arguments = {
        "stderr": m.stderr_bpd,
        "stderr_is_of": m.stderr_is_of if m.stderr_bpd is not None else None,
        "method": m.method,
        "num_steps": m.num_steps or (None if m.method == "ode" else "continuous time"),
        "num_images": m.num_images,
        "num_draws": m.num_draws,
        "weights": m.weights,
        "step": m.step,
        "convention": m.convention,
        **{f"{term}_bpd": value for term, value in m.terms_bpd.items()},
        "data_fingerprint": data_fingerprint,
        **m.details,
    }
    plain = {k: one_line(v) if isinstance(v, str) else v for k, v in arguments.items() if v not in (None, "")}
    name = one_line(data.name)
    return EvalResult(
        task_type="unconditional-image-generation",
        task_name="Unconditional image generation",
        dataset_type=name if data.is_repository else re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-") or "data",
        dataset_name=name,
        dataset_split=one_line(data.split) if data.split else None,
        metric_type="bits-per-dim",
        metric_name=one_line(f"bits/dim ({m.quantity})"),
        metric_value=m.bpd,
        metric_args=plain,
    )
