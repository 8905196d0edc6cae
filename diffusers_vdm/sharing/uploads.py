"""Upload a run to the Hub during training, and download its checkpoint on another machine.

A Hub that is slow or down does not delay a run: a thread uploads copies, and the next upload includes what an earlier
one could not upload. A commit is atomic.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from ..files import write_atomically
from ..repository import INDEX, UNREACHABLE, call_with_retries, list_files, read_json, status_of
from ..training.checkpoints import list_checkpoints, load_checkpoint, step_of
from ..training.description import NAME as OPTIONS
from ..training.description import RunDescription, read_description

logger = logging.get_logger(__name__)

LAST_CHECKPOINT = "last-checkpoint"  # the name that transformers' Trainer uses
# files that train.py and evaluate.py write; no other file in the folder is uploaded
PICTURES = ("samples.png", "samples-*.png", "training.png", "schedule.png", "loss_by_gamma.png", "denoising.gif")
_REPORT_FIGURES = ("by_gamma", "histogram", "most_likely", "most_unlikely")
_RUN_FILES = (
    *(INDEX, "README.md", "options.json", "metrics.jsonl", "report.json"),
    *PICTURES,
    *(f"report_{name}.png" for name in _REPORT_FIGURES),
)
STALE_CODE = ["vdm_code_*.py", "*/vdm_code_*.py"]  # code of older commits, to which the new index does not refer
_PREFIX = ".upload-vdm-"
_CHECKPOINT_FILE = re.compile(rf"{LAST_CHECKPOINT}/(state\.json|[\w.]+\.safetensors)")


# ---- upload ------------------------------------------------------------------------------------------------------


def stage(
    output_dir: str | os.PathLike,
    checkpoint: str | os.PathLike | None = None,
    within: str | os.PathLike | None = None,
) -> Path:
    """Copies what is to be uploaded into a new hidden folder, for [`Uploads.push`].

    It has the pipeline and those of other averages (`ema_*`), options, metrics, the card, the report and figures, as
    train.py and evaluate.py name them. A `checkpoint` folder is added by links, as `last-checkpoint`. The new folder
    is in `within`, by default in `output_dir`.
    """
    output_dir = Path(output_dir)
    if not (output_dir / INDEX).is_file() and checkpoint is None:
        raise FileNotFoundError(f"output_dir must be the folder of a run, got {output_dir}, which has no {INDEX}.")
    staged = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=within or output_dir))
    try:
        for pattern in _RUN_FILES:
            for path in output_dir.glob(pattern):
                shutil.copyfile(path, staged / path.name)
        for pipeline in [output_dir, *output_dir.glob("ema_*")]:
            if (pipeline / INDEX).is_file():
                target = staged / pipeline.relative_to(output_dir)
                target.mkdir(exist_ok=True)
                shutil.copyfile(pipeline / INDEX, target / INDEX)
                for name in components_in(pipeline):
                    shutil.copytree(pipeline / name, target / name)
        if checkpoint is not None:
            (staged / LAST_CHECKPOINT).mkdir()
            for path in Path(checkpoint).iterdir():
                _link(path, staged / LAST_CHECKPOINT / path.name)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return staged


def remove_left_overs(output_dir: str | os.PathLike) -> None:
    """Removes folders that [`stage`] made in `output_dir` for a killed process."""
    for folder in Path(output_dir).glob(f"{_PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)


def components_in(folder: Path) -> list[str]:
    """The component folders in a pipeline's index."""
    index = read_json(folder / INDEX, INDEX).items()
    named = [name for name, entry in index if isinstance(entry, list) and entry != [None, None] and name[:1] != "_"]
    return [name for name in named if (folder / name).is_dir()]


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path, to)  # safe, because a checkpoint is never changed, only removed
    except OSError:  # another file system, or one without links
        shutil.copyfile(path, to)


class RefusedError(OSError):
    """The Hub answered, but does not allow this user to do it."""


def create_repository(
    repo_id: str, *, private: bool | None = None, token: str | None = None, attempts: int = 4
) -> str:
    """Creates the repository if needed and returns its full name; raises [`RefusedError`] without write access."""
    with refusals(repo_id):
        create = HfApi(token=token).create_repo
        return call_with_retries(create, repo_id, private=private, exist_ok=True, attempts=attempts).repo_id


def full_name(repo_id: str, token: str | None) -> str:
    """`repo_id`, in the user's own space if it names none."""
    return repo_id if "/" in repo_id else f"{call_with_retries(HfApi(token=token).whoami)['name']}/{repo_id}"


@contextmanager
def refusals(repo_id: str) -> Iterator[None]:
    """Turns client errors for missing write access to the repository into a [`RefusedError`]."""
    try:
        yield
    except HFValidationError as error:
        raise RefusedError(f"repo_id must be a name that the Hub allows, got {repo_id!r}: {error}") from error
    except UNREACHABLE as error:
        if status_of(error) not in (400, 401, 403, 404):
            raise
        raise RefusedError(
            f"{repo_id} cannot be written to ({reason_of(error)}); pass token=… or run `hf auth login` as a user "
            "with write access."
        ) from error


class Uploads:
    """Uploads folders to one repository in the background, one after another.

    If several are waiting, only the newest is uploaded. A failed upload is reported but not repeated, because the next
    folder includes its content.

    Args:
        repo_id (`str`): `"user/name"`, or a name in the user's own space.
        private (`bool`, *optional*): for a new repository; defaults to the setting of the user or organization.
        token (`str`, *optional*): defaults to that of the login.
        before_upload (`Callable`, *optional*): called on the thread with the folder and the repository's name.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        before_upload: Callable[[Path, str], object] | None = None,
    ):
        self.repo_id, self.private, self.token, self.before_upload = repo_id, private, token, before_upload
        self.is_created = False
        self._changed = threading.Condition()
        self._next: tuple[Path, str] | None = None
        self._current: tuple[Path, str] | None = None
        self._failure: str | None = None
        self._thread: threading.Thread | None = None

    def create(self) -> bool:
        """Creates the repository if needed; returns `False`, with a warning, if the Hub does not answer.

        Raises: `OSError` if the Hub refuses, because of a token without write access or an invalid name.
        """
        try:
            self._create(attempts=2)
        except UNREACHABLE as error:
            if isinstance(error, RefusedError):
                raise
            logger.warning(f"The Hub does not answer ({reason_of(error)}); uploads are kept and tried again.")
            return False
        return True

    def _create(self, attempts: int = 4) -> None:
        self.repo_id = create_repository(self.repo_id, private=self.private, token=self.token, attempts=attempts)
        self.is_created = True

    def push(self, folder: str | os.PathLike, message: str) -> None:
        """Queues `folder`, which is removed afterwards, and returns immediately; `message` is the commit message."""
        with self._changed:
            if self._next is not None:
                shutil.rmtree(self._next[0], ignore_errors=True)
            self._next = (Path(folder), message)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    @property
    def is_busy(self) -> bool:
        with self._changed:
            return self._next is not None or self._current is not None

    def wait(self, seconds: float | None = None) -> str | None:
        """Waits up to `seconds` for all uploads; returns why the newest folder was not uploaded, or `None`."""
        with self._changed:
            idle = self._changed.wait_for(lambda: self._next is None and self._current is None, seconds)
            return self._failure if idle else f"not complete after {seconds:g} s"

    def close(self) -> None:
        """Discards everything that is not uploaded yet."""
        with self._changed:
            waiting = [job[0] for job in (self._next, self._current) if job is not None]
            self._next = None
        for folder in waiting:
            shutil.rmtree(folder, ignore_errors=True)

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._next is None:
                    self._changed.wait()
                folder, message = self._current = self._next
                self._next = None
            failure = None
            try:
                self._upload(folder, message)
            except Exception as error:  # no error of an upload may stop training
                failure = reason_of(error)
                logger.warning(
                    f"{message!r} was not uploaded to {self.repo_id} ({failure}); the next upload is tried."
                )
            shutil.rmtree(folder, ignore_errors=True)
            with self._changed:
                self._current, self._failure = None, failure
                self._changed.notify_all()

    def _upload(self, folder: Path, message: str) -> None:
        if not self.is_created:
            self._create()
        if self.before_upload is not None:
            self.before_upload(folder, self.repo_id)
        call_with_retries(
            HfApi(token=self.token).upload_folder,
            repo_id=self.repo_id,
            folder_path=folder,
            commit_message=message,
            # files of an older run, or of one with another noise schedule or other averages
            delete_patterns=[f"{LAST_CHECKPOINT}/*", "ema_*/*", "noise_schedule/*", *STALE_CODE],
        )


def reason_of(error: BaseException) -> str:
    """An error of the Hub client in one line."""
    message = getattr(error, "server_message", None) if isinstance(error, HfHubHTTPError) else None
    reason = str(message or error).strip().split("\n")[0]
    return f"{status_of(error) or type(error).__name__}: {reason}"


# ---- download ----------------------------------------------------------------------------------------------------


def fetch_description(repo_id: str, *, token: str | None = None) -> RunDescription | None:
    """Reads what the run in `last-checkpoint` of a repository has recorded; writes nothing.

    `repo_id` may be a name in the user's own space. Returns `None` if there is none, and with a warning if the Hub
    does not answer. Raises: `ValueError` if it is not JSON.
    """
    try:
        repo_id = full_name(repo_id, token)
        listing, _ = list_files(repo_id, None, token)
        names = [file.rfilename for file in listing.siblings] if listing else []
        if f"{LAST_CHECKPOINT}/state.json" not in names or OPTIONS not in names:
            return None
        with tempfile.TemporaryDirectory() as temporary:
            options = {"revision": listing.sha, "local_dir": temporary, "token": token}
            call_with_retries(snapshot_download, repo_id, allow_patterns=[OPTIONS], **options)
            return read_description(temporary)
    except UNREACHABLE as error:  # OSError is one of them
        if not isinstance(error.__cause__, RepositoryNotFoundError):  # a new run has no repository yet
            logger.warning(f"What the run in {repo_id} has recorded could not be read: {error}")
        return None


def fetch_checkpoint(
    repo_id: str,
    output_dir: str | os.PathLike,
    *,
    token: str | None = None,
    check: Callable[[dict[str, Any]], object] | None = None,
) -> Path | None:
    """Downloads `last-checkpoint` of a repository into `output_dir` as `checkpoint-N`, if it is newer than any there.

    It also downloads `options.json` and `metrics.jsonl`, which replace the local ones. Only safetensors and JSON are
    downloaded. The checkpoint gets its final name after its hashes were verified and `check` was called with its
    state; `check` raises an error to reject a checkpoint of another run.

    Returns: the folder; `None` if the repository has no checkpoint, or `output_dir` has one that is as new.
    Raises: `OSError` if the Hub does not answer or refuses, or the download is damaged.
    """
    output_dir = Path(output_dir)
    listing, reason = list_files(repo_id, None, token)
    if listing is None:
        raise OSError(f"could not check whether {repo_id} has a {LAST_CHECKPOINT} ({reason}).")
    names = [file.rfilename for file in listing.siblings if _CHECKPOINT_FILE.fullmatch(file.rfilename)]
    state = f"{LAST_CHECKPOINT}/state.json"
    if state not in names:
        return None
    here = list_checkpoints(output_dir)
    temporary = output_dir / ".checkpoint-hub.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        options = {"revision": listing.sha, "local_dir": temporary, "token": token}
        call_with_retries(snapshot_download, repo_id, allow_patterns=[state], **options)
        step = read_json(temporary / state, f"{state} of {repo_id}").get("step")
        if not isinstance(step, int) or step < 0:
            raise OSError(f"{state} of {repo_id} has no valid step.")
        if here and step_of(here[-1]) >= step:
            return None
        call_with_retries(
            snapshot_download, repo_id, allow_patterns=[*names, "options.json", "metrics.jsonl"], **options
        )
        try:
            _, found = load_checkpoint(temporary / LAST_CHECKPOINT)
        except ValueError as error:
            raise OSError(f"{LAST_CHECKPOINT} of {repo_id}: {error}") from error
        try:
            if check is not None:
                check(found)
        except (KeyError, TypeError, AttributeError) as error:
            raise OSError(f"{LAST_CHECKPOINT} of {repo_id} does not describe its run.") from error
        for name in ("options.json", "metrics.jsonl"):
            if (temporary / name).is_file():
                write_atomically(output_dir / name, (temporary / name).read_bytes())
        final = output_dir / f"checkpoint-{step}"
        os.rename(temporary / LAST_CHECKPOINT, final)
        return final
    except UNREACHABLE as error:
        if isinstance(error, OSError) and status_of(error) is None:
            raise
        raise OSError(f"{LAST_CHECKPOINT} of {repo_id} could not be downloaded ({reason_of(error)}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
