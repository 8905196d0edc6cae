"""Publish a pipeline on the Hub with its model card and results, and its code on request."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers.utils import logging
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file

from ..evaluation.rows import fingerprint
from ..files import write_atomically
from ..repository import INDEX, call_with_retries, read_json
from .model_card import NAME, is_made_here, load_quietly, save_model_card
from .remote_code import save_code
from .uploads import LAST_CHECKPOINT, STALE_CODE, components_in, create_repository, full_name, refusals, stage

if TYPE_CHECKING:
    from ..pipeline import VDMPipeline

logger = logging.get_logger(__name__)


def publish(
    pipeline: VDMPipeline,
    repo_id: str,
    *,
    run_dir: str | os.PathLike | None = None,
    include_code: bool = False,
    license: str | None = None,
    variant: str | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Implements [`VDMPipeline.push_to_hub`], see its arguments; all files are prepared before the upload."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pipeline"
        if run_dir is None:
            folder.mkdir()
        else:
            shutil.move(stage(run_dir, within=temporary), folder)
        saved = Path(temporary) / "saved"
        pipeline.save_pretrained(saved, variant=variant)
        if run_dir is not None:
            _check_same_pipeline(saved, folder, run_dir, variant)
            for component in components_in(folder):
                shutil.rmtree(folder / component)
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        with refusals(repo_id):
            named = full_name(repo_id, token)
        loaded = load_quietly(type(pipeline), folder, variant)  # check that the upload can be loaded
        add_card_and_code(loaded, folder, named, include_code=include_code, license=license, variant=variant)
        created = create_repository(repo_id, private=private, token=token)
        keep_edited_card(folder, created, token)
        message = commit_message or f"Upload {type(pipeline).__name__}"
        upload = HfApi(token=token).upload_folder
        where = {"repo_id": created, "create_pr": create_pr, "delete_patterns": STALE_CODE}
        with refusals(created):
            return call_with_retries(upload, folder_path=folder, commit_message=message, **where)


def add_card_and_code(
    pipeline: VDMPipeline,
    folder: str | os.PathLike,
    repo_id: str,
    *,
    include_code: bool = False,
    license: str | None = None,
    variant: str | None = None,
    step: int | None = None,
) -> None:
    """Adds the card, and with `include_code` the code to load it without this package, to a folder for upload.

    Local paths are removed from the configs and the report. `step` is that of weights from an unfinished training.
    """
    for path in Path(folder).rglob("*.json"):
        if LAST_CHECKPOINT not in path.relative_to(folder).parts:
            _remove_local_paths(path)
    if include_code:
        save_code(folder)
    save_model_card(pipeline, folder, overwrite=True, repo_id=repo_id, license=license, variant=variant, step=step)


def _remove_local_paths(path: Path) -> None:
    if path.name not in ("report.json", INDEX) and not path.name.endswith("config.json"):
        return
    content = read_json(path, path.name)
    named = {"report.json": "model"}.get(path.name, "_name_or_path")
    value = content.get(named)
    if isinstance(value, str) and (os.path.isabs(value) or os.path.exists(value)):
        content[named] = Path(value).name
        write_atomically(path, json.dumps(content, indent=2) + "\n")


def keep_edited_card(folder: str | os.PathLike, repo_id: str, token: str | None = None) -> None:
    """Removes the card from a folder for upload if the repository has one that was written by hand."""
    download = HfApi(token=token).hf_hub_download
    try:
        with tempfile.TemporaryDirectory() as temporary:
            path = call_with_retries(download, repo_id, NAME, local_dir=temporary)
            there = Path(path).read_text("utf-8", "replace")
    except LocalEntryNotFoundError as error:
        raise OSError(f"could not check whether {NAME} of {repo_id} was edited: {error}") from error
    except EntryNotFoundError:
        return
    if there.strip() and not is_made_here(there):
        logger.warning(f"{NAME} of {repo_id} was not made by diffusers_vdm, or was edited since; it is not replaced.")
        (Path(folder) / NAME).unlink(missing_ok=True)


def _check_same_pipeline(saved: Path, folder: Path, run_dir: str | os.PathLike, variant: str | None) -> None:
    """Raises `ValueError` unless the pipeline is exactly the one that the run measured."""
    for path in sorted([saved / INDEX, *saved.glob("*/*")]):
        name = path.relative_to(saved)
        other = folder / name
        if variant is not None and not other.is_file():
            other = other.with_name(other.name.replace(f".{variant}.", "."))
        if not other.is_file() or _content(path) != _content(other):
            raise ValueError(
                f"run_dir must be the folder that this pipeline was loaded from, so that its results are of this "
                f"pipeline; {name} differs in {os.fspath(run_dir)!r}. Leave run_dir out, or push "
                "VDMPipeline.from_pretrained(run_dir)."
            )


def _content(path: Path) -> Any:
    """The content of a pipeline file, without the diffusers version and the path that it was loaded from."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        return {name: (str(t.dtype), tuple(t.shape), fingerprint([t])) for name, t in tensors.items()}
    return {k: v for k, v in read_json(path, path.name).items() if k not in ("_name_or_path", "_diffusers_version")}
