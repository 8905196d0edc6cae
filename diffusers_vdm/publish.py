"""A pipeline made ready for others and sent to the Hub: with its card and its numbers, and its code if asked for."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file

from .model_card import MARK, NAME, save_model_card
from .pipeline import VDMPipeline
from .remote_code import save_code
from .repository import patiently
from .uploads import create_repository, refusals, stage

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
    path_in_repo: str | None = None,
) -> Any:
    """[`VDMPipeline.push_to_hub`], which tells of the arguments; everything is made before anything is sent."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pipeline"
        if run_dir is None:
            folder.mkdir()
        else:
            shutil.move(stage(run_dir, within=temporary), folder)
        saved = Path(temporary) / "saved"
        pipeline.save_pretrained(saved, variant=variant)
        if run_dir is not None:
            _check_weights(saved, folder, run_dir)
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        created = create_repository(repo_id, private=private, token=token)
        dress(folder, created, include_code=include_code, license=license, variant=variant)
        keep_edited_card(folder, created, token)
        message = commit_message or f"Upload {type(pipeline).__name__}"
        upload = HfApi(token=token).upload_folder
        where = {"repo_id": created, "path_in_repo": path_in_repo, "create_pr": create_pr}
        with refusals(created):
            return patiently(upload, folder_path=folder, commit_message=message, **where)


def dress(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    include_code: bool = False,
    license: str | None = None,
    variant: str | None = None,
) -> None:
    """Adds the card to a folder that is to be uploaded, and the code that loads it without this package."""
    if include_code:
        save_code(folder)
    save_model_card(folder, overwrite=True, repo_id=repo_id, license=license, variant=variant)


def keep_edited_card(folder: str | os.PathLike, repo_id: str, token: str | None = None) -> None:
    """Takes the card out of a folder that is to be uploaded if the repository has one that was written by hand."""
    try:
        there = Path(patiently(HfApi(token=token).hf_hub_download, repo_id, NAME)).read_text("utf-8", "replace")
    except EntryNotFoundError:
        return
    if MARK not in there and there.strip():
        logger.warning(f"{NAME} of {repo_id} was not made by diffusers_vdm, or edited since: it stays as it is.")
        (Path(folder) / NAME).unlink(missing_ok=True)


def _check_weights(saved: Path, folder: Path, run_dir: str | os.PathLike) -> None:
    """`ValueError` unless the weights are those that the numbers of the run are of."""
    for path in sorted(saved.glob("*/*.safetensors")):
        other = folder / path.relative_to(saved)
        ours, theirs = load_file(path), load_file(other) if other.is_file() else {}
        same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        if not same:
            raise ValueError(
                f"run_dir must be the folder that this pipeline was loaded from, so that its numbers are of these "
                f"weights; {path.relative_to(saved)} differs in {os.fspath(run_dir)!r}. Leave run_dir out, or push "
                "VDMPipeline.from_pretrained(run_dir)."
            )
