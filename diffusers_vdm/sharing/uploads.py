"""What a run sends to the Hub while it goes on, and its checkpoint that comes back on another machine.

A Hub that is slow, ill or gone costs a run nothing: what is sent is a copy, on a thread of its own, and what could not
be sent goes with the next. A commit is whole or not there.
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
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..files import write_atomically
from ..repository import INDEX, UNREACHABLE, call_with_retries, list_files, read_json, status_of
from ..training.checkpoints import list_checkpoints, load_checkpoint, step_of

logger = logging.get_logger(__name__)

LAST_CHECKPOINT = "last-checkpoint"  # the name that transformers' Trainer gives it
# what train.py and evaluate.py write, and nothing else that may lie in the folder
PICTURES = ("samples.png", "samples-*.png", "training.png", "schedule.png", "loss_by_gamma.png", "denoising.gif")
_OF_A_REPORT = ("by_gamma", "histogram", "most_likely", "most_unlikely")
_RUN_FILES = (
    *(INDEX, "README.md", "options.json", "metrics.jsonl", "report.json"),
    *PICTURES,
    *(f"report_{name}.png" for name in _OF_A_REPORT),
)
STALE_CODE = ["vdm_code_*.py", "*/vdm_code_*.py"]  # of an older commit, which the newer index does not name
_PREFIX = ".upload-vdm-"
_IN_A_CHECKPOINT = re.compile(rf"{LAST_CHECKPOINT}/(state\.json|[\w.]+\.safetensors)")


# ---- there -------------------------------------------------------------------------------------------------------


def stage(
    output_dir: str | os.PathLike,
    checkpoint: str | os.PathLike | None = None,
    within: str | os.PathLike | None = None,
) -> Path:
    """A copy of what a run shows to others, in a new hidden folder `within` another one: what [`Uploads.push`] takes.

    It holds the pipeline and those of other averages (`ema_*`), options, metrics, the card, the report and pictures,
    as train.py and evaluate.py name them; with `checkpoint`, a folder, that as well, by links, as `last-checkpoint`.
    `within` defaults to `output_dir`.
    """
    output_dir = Path(output_dir)
    if not (output_dir / INDEX).is_file() and checkpoint is None:
        raise FileNotFoundError(f"{output_dir} is no folder of a run: it has no {INDEX}.")
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
    """Removes what [`stage`] made in `output_dir` for a process that was killed."""
    for folder in Path(output_dir).glob(f"{_PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)


def components_in(folder: Path) -> list[str]:
    """The folders that a pipeline's index names."""
    index = read_json(folder / INDEX, INDEX).items()
    named = [name for name, entry in index if isinstance(entry, list) and entry != [None, None] and name[:1] != "_"]
    return [name for name in named if (folder / name).is_dir()]


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path, to)  # a checkpoint is never written again, only removed
    except OSError:  # another file system, or one that knows no links
        shutil.copyfile(path, to)


class RefusedError(OSError):
    """The Hub answers, and does not let this user do it."""


def create_repository(
    repo_id: str, *, private: bool | None = None, token: str | None = None, attempts: int = 4
) -> str:
    """Makes sure of a repository and returns its whole name; [`RefusedError`] where this user may not write there."""
    with refusals(repo_id):
        create = HfApi(token=token).create_repo
        return call_with_retries(create, repo_id, private=private, exist_ok=True, attempts=attempts).repo_id


@contextmanager
def refusals(repo_id: str) -> Iterator[None]:
    """Errors of the client that say that this user may not write to the repository become a [`RefusedError`]."""
    try:
        yield
    except HFValidationError as error:
        raise RefusedError(f"repo_id {repo_id!r} is no name that the Hub allows: {error}") from error
    except UNREACHABLE as error:
        if status_of(error) not in (400, 401, 403, 404):
            raise
        raise RefusedError(
            f"{repo_id} cannot be written to ({reason_of(error)}); pass token=… or run `hf auth login`, as a user who "
            "may."
        ) from error


class Uploads:
    """Folders that go to one repository, one after another, while the program does something else.

    Of several that wait only the newest goes. What fails is reported and not repeated: the next folder holds it too.

    Args:
        repo_id (`str`): `"user/name"`, or a name in the user's own space.
        private (`bool`, *optional*): of a repository that is created; the space's default if not given.
        token (`str`, *optional*): the one that was logged in with, if not given.
        before_upload (`Callable`, *optional*): called with a folder and the repository's name, on the thread.
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
        """Makes sure of the repository; `False`, and a warning, if the Hub does not answer.

        Raises: `OSError` where the Hub refuses: a token that may not write there, a name that it does not allow.
        """
        try:
            self._create(attempts=2)
        except UNREACHABLE as error:
            if isinstance(error, RefusedError):
                raise
            logger.warning(
                f"The Hub does not answer ({reason_of(error)}); what is to be uploaded is kept and tried again."
            )
            return False
        return True

    def _create(self, attempts: int = 4) -> None:
        self.repo_id = create_repository(self.repo_id, private=self.private, token=self.token, attempts=attempts)
        self.is_created = True

    def push(self, folder: str | os.PathLike, message: str) -> None:
        """Takes `folder` over, which is removed in the end, and returns at once; `message` is the commit's."""
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
        """Until all is there, or the time is over; the reason why the newest folder is not, `None` if it is."""
        with self._changed:
            idle = self._changed.wait_for(lambda: self._next is None and self._current is None, seconds)
            return self._failure if idle else f"it was not done after {seconds:g} s"

    def close(self) -> None:
        """Gives up what is not there yet."""
        with self._changed:
            waiting = [job[0] for job in (self._next, self._current) if job is not None]
            self._next = None
        for folder in waiting:
            shutil.rmtree(folder, ignore_errors=True)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None)
                self._current, self._next = self._next, None
                if self._current is None:
                    continue
                folder, message = self._current
            failure = None
            try:
                self._upload(folder, message)
            except Exception as error:  # whatever it is, training goes on
                failure = reason_of(error)
                logger.warning(f"{message!r} was not uploaded to {self.repo_id} ({failure}); the next one is tried.")
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
            # of an older run, or of one with another schedule and other averages
            delete_patterns=[f"{LAST_CHECKPOINT}/*", "ema_*/*", "noise_schedule/*", *STALE_CODE],
        )


def reason_of(error: BaseException) -> str:
    """An error of the Hub's client in one line."""
    message = getattr(error, "server_message", None) if isinstance(error, HfHubHTTPError) else None
    reason = str(message or error).strip().split("\n")[0]
    return f"{status_of(error) or type(error).__name__}: {reason}"


# ---- and back ----------------------------------------------------------------------------------------------------


def fetch_checkpoint(
    repo_id: str,
    output_dir: str | os.PathLike,
    *,
    token: str | None = None,
    check: Callable[[dict[str, Any]], object] | None = None,
) -> Path | None:
    """Brings `last-checkpoint` of a repository into `output_dir`, as the `checkpoint-N` that it was, if it is newer.

    With it come `options.json` and `metrics.jsonl`, in the place of those that are there. Only safetensors and JSON
    are fetched, and the checkpoint must be what its own hashes say before it gets its name. `check` is called with its
    state before that, too, to refuse by an error what is of another run.

    Returns: the folder; `None` where the repository has no checkpoint, or `output_dir` has one as new.
    Raises: `OSError` where the Hub does not answer or refuses, or what came is damaged.
    """
    output_dir = Path(output_dir)
    listing, reason = list_files(repo_id, None, token)
    if listing is None:
        raise OSError(f"whether {repo_id} has a {LAST_CHECKPOINT} could not be found out ({reason}).")
    names = [file.rfilename for file in listing.siblings if _IN_A_CHECKPOINT.fullmatch(file.rfilename)]
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
            raise OSError(f"{state} of {repo_id} says no step.")
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
            raise OSError(f"{LAST_CHECKPOINT} of {repo_id} does not say what run it is of.") from error
        for name in ("options.json", "metrics.jsonl"):
            if (temporary / name).is_file():
                write_atomically(output_dir / name, (temporary / name).read_bytes())
        final = output_dir / f"checkpoint-{step}"
        os.rename(temporary / LAST_CHECKPOINT, final)
        return final
    except UNREACHABLE as error:
        if isinstance(error, OSError) and status_of(error) is None:
            raise
        raise OSError(f"{LAST_CHECKPOINT} of {repo_id} could not be fetched ({reason_of(error)}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
