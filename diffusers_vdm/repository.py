"""Pipeline repositories: select the files to load, check them, and download them from the Hub.

A folder or repository is checked before anything is loaded. Nothing in it is run or unpickled: code and pickles are
not downloaded, weights must be safetensors, and all other files JSON. The text encoder and the tokenizer of a pipeline
are classes of transformers, which is imported if an index names one of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

import diffusers
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from .components import OF_TRANSFORMERS

logger = logging.get_logger(__name__)

INDEX = "model_index.json"
MAX_JSON_BYTES = 16 << 20  # a γ table of 1,025 knots takes 24 KiB
MAX_HEADER_BYTES = 25_000_000  # the Hub's limit; a network of 10,000 tensors has 1 MB
_WEIGHTS, _SHARD, _SUFFIX = "diffusion_pytorch_model", r"(-\d{5}-of-\d{5})?", r"\.safetensors"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# errors of huggingface_hub derive from those of requests (all OSError) or, from 1.0, of httpx (only some OSError)
UNREACHABLE: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], OSError)  # pyright: ignore[reportAssignmentType]
_TEMPORARY_STATUSES = (429, 500, 502, 503, 504)

Components = dict[str, type]


# ---- the index and the files of a repository ---------------------------------------------------------------------


def canonical_index(index: dict[str, Any], ours: dict[str, str]) -> dict[str, Any]:
    """A `model_index.json` with our classes mapped to our modules.

    Older versions, and repositories with code beside the weights, store other module paths for the same classes.

    Args:
        index (`dict`): content of the file.
        ours (`dict`): maps the names of our classes to their modules.
    """
    out = dict(index)
    if isinstance(out.get("_class_name"), list):
        out["_class_name"] = out["_class_name"][-1]
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 2 and value[1] in ours and not name.startswith("_"):
            out[name] = [ours[value[1]], value[1]]
    return out


def component_classes(index: dict[str, Any], needed: Iterable[str], names: Collection[str], where: str) -> Components:
    """The classes of the components that are not null, without importing any module that the repository names.

    Args:
        index (`dict`): the canonical `model_index.json`.
        needed (`Iterable[str]`): the components to load; the caller passes the others.
        names (`Collection[str]`): the files of the repository.
        where (`str`): name of the repository, for error messages.

    Raises: `ValueError` for a class that is neither in diffusers nor in an imported module, for a class that is not a
        model or scheduler, and for code that diffusers would run instead.
    """
    if "None.py" in names:  # some versions of diffusers run it as a custom pipeline
        raise ValueError(f"{where} holds None.py, which diffusers would run as a custom pipeline: it is not loaded.")
    classes = {}
    for name in needed:
        entry = index.get(name, [None, None])
        if not (isinstance(entry, list) and len(entry) == 2 and all(e is None or isinstance(e, str) for e in entry)):
            raise ValueError(f"{INDEX} of {where} must give {name} as [library, class], got {entry!r}.")
        library, class_name = entry
        if library is None or class_name is None:
            continue
        if f"{name}/{library}.py" in names:
            raise ValueError(
                f"{where} gives {name} as its own code, {name}/{library}.py, which is not run. Read it; if you "
                f"trust it, import it yourself and pass {name}=… to from_pretrained."
            )
        if name in OF_TRANSFORMERS:
            classes[name] = _class_of_transformers(name, library, class_name, where)
            continue
        module = diffusers if library == "diffusers" else sys.modules.get(library)
        cls = getattr(module, class_name, None)
        if not (isinstance(cls, type) and issubclass(cls, ModelMixin | SchedulerMixin)):
            raise ValueError(
                f"{where} gives {name} as {class_name} of {library}, which is not a model or scheduler of diffusers, "
                f"diffusers_vdm or an imported module. A repository cannot import modules: import {library} yourself "
                f"if you trust it, or pass {name}=… to from_pretrained."
            )
        classes[name] = cls
    return classes


def _class_of_transformers(name: str, library: str, class_name: str, where: str) -> type:
    """A model or a tokenizer of transformers; raises `ValueError` for others, and if it is not installed."""
    if library != "transformers":
        raise ValueError(f"{where} must give {name} as a class of transformers, got {class_name} of {library}.")
    try:  # not by an import statement, which diffusers would take for a requirement of saved code
        transformers: Any = import_module("transformers")
    except ImportError:
        raise ValueError(
            f"{where} has a {name} of transformers, which is not installed: pip install transformers."
        ) from None
    cls = getattr(transformers, class_name, None)
    base = transformers.PreTrainedModel if name == "text_encoder" else transformers.PreTrainedTokenizerBase
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(
            f"{where} gives {name} as {class_name}, which is not a {base.__name__} of the installed transformers "
            f"{transformers.__version__}."
        )
    return cls


def check_repository_name(name: str) -> None:
    """Raises `OSError` if `name`, which is not a local folder, is not a valid repository name either."""
    if os.path.exists(name):
        raise OSError(f"{name!r} is a file and not the folder of a pipeline: pass the folder with {INDEX}.")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise OSError(
            f"{name!r} is neither a local folder nor a valid Hub name such as 'user/name'; pass the folder that the "
            "pipeline was saved in."
        ) from None


def check_names(names: Iterable[str], where: str) -> None:
    """Raises `ValueError` for a file name that is outside the repository's folder, or invalid."""
    for name in names:
        parts = name.split("/")
        if not name.isprintable() or "\\" in name or ":" in parts[0] or {"", ".", ".."} & set(parts):
            raise ValueError(f"{where} has a file named {name!r}, which is outside its folder: it is not loaded.")


def needed_files(names: Collection[str], classes: Components, variant: str | None, where: str) -> list[str]:
    """The configs and safetensors files of the components, of `variant` if a component has it.

    A component without a folder is read from the root, where old pipelines with one model store it.

    Raises: `OSError` for missing files; `ValueError` for a variant that no component has, and for weights that exist
        only as pickles.
    """
    files, with_variant, lacking = [INDEX], [], None
    for name, cls in classes.items():
        folder = f"{name}/" if any(n.startswith(f"{name}/") for n in names) else ""
        if name == "tokenizer":
            files += _tokenizer_files(folder, names, where)
            continue
        stem = _WEIGHTS if issubclass(cls, ModelMixin) else "model"  # of transformers
        config_name = cls.config_name if issubclass(cls, ModelMixin | SchedulerMixin) else "config.json"
        if folder + config_name not in names:
            raise OSError(f"{where} has no {name}/{config_name}: it is not a complete pipeline.")
        files.append(folder + config_name)
        if issubclass(cls, SchedulerMixin):
            continue
        here = {n.removeprefix(folder): n for n in names if n.startswith(folder) and "/" not in n[len(folder) :]}
        weights = [here[n] for n in _weights(here, variant, stem)] if variant else []
        with_variant += weights
        weights = weights or [here[n] for n in _weights(here, None, stem)]
        if not weights and getattr(cls, "_has_parameters", True):
            pickles = sorted(n for n in here if n.endswith(_PICKLES))
            if pickles:
                raise ValueError(
                    f"{where} has the weights of {name} only as pickles ({', '.join(pickles)}), which can run code "
                    "when they are read: they are not loaded. Ask the authors for safetensors, or convert the files "
                    "in a sandbox."
                )
            lacking = lacking or name
        files += weights
    if variant and not with_variant:
        pattern = re.compile(rf"(?:.*/)?{_WEIGHTS}\.([^.]+?){_SHARD}{_SUFFIX}")
        there = sorted({match[1] for match in map(pattern.fullmatch, names) if match})
        raise ValueError(  # diffusers' wording, which callers match to fall back to no variant
            f"You are trying to load the model files of the `variant={variant}`, but no such modeling files are "
            f"available. {where} has {', '.join(map(repr, there)) or 'no variants'}."
        )
    if lacking:
        raise OSError(f"{where} has no safetensors weights of {lacking}{' without a variant' if variant else ''}.")
    return files


def _weights(names: Iterable[str], variant: str | None, stem: str) -> list[str]:
    dotted = re.escape(f".{variant}") if variant else ""
    pattern = re.compile(rf"{stem}{dotted}{_SHARD}{_SUFFIX}|{stem}{_SUFFIX}\.index{dotted}\.json")
    return [name for name in names if pattern.fullmatch(name)]


def _tokenizer_files(folder: str, names: Collection[str], where: str) -> list[str]:
    """The JSON files of a tokenizer; raises `OSError` if it is of a kind that has other files."""
    if folder + "tokenizer.json" not in names:
        raise OSError(
            f"{where} has no {folder}tokenizer.json: only fast tokenizers are read, because others have files that "
            "are not JSON. Save it again with a fast one (`AutoTokenizer`)."
        )
    return [folder + name for name in _TOKENIZER_FILES if folder + name in names]


# ---- checks of the content ---------------------------------------------------------------------------------------


def check_files(folder: Path, files: Iterable[str], where: str) -> None:
    """Checks every JSON file and every safetensors header, without reading the weights.

    Raises: `OSError` for a missing file; `ValueError` for JSON that is invalid or too long, for a header that is too
        long or does not match its file, and for an index that names files outside its folder.
    """
    files = list(files)
    for name in files:
        path = folder / name
        if not path.is_file():
            raise OSError(f"{where} has no {name}, or only a part of it: load it again with access to the Hub.")
        if path.suffix == ".json":
            content = read_json(path, f"{name} of {where}")
            if ".safetensors.index." in name:
                _check_shards(content, name, files, where)
        else:
            _check_header(path, f"{name} of {where}")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file; raises `ValueError` if it is too long or not a JSON object."""
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{what} must be at most {MAX_JSON_BYTES} bytes long, got {size}: it is not loaded.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON: {type(error).__name__}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{what} must hold a JSON object, got a {type(content).__name__}.")
    return content


def _check_shards(index: dict[str, Any], name: str, files: list[str], where: str) -> None:
    shards = index.get("weight_map")
    folder = PurePosixPath(name).parent
    for shard in sorted(set(shards.values())) if isinstance(shards, dict) else [shards]:
        if not isinstance(shard, str) or "/" in shard or (folder / shard).as_posix() not in files:
            raise ValueError(f"{name} of {where} names the file {shard!r}, which is not beside it: it is not loaded.")


def _check_header(path: Path, what: str) -> None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise ValueError(
            f"{what} must have a header of at most {MAX_HEADER_BYTES} bytes within its {size} bytes, got {length}: it "
            "is damaged or not a safetensors file."
        )
    try:
        with safe_open(
            path, framework="pt"
        ):  # maps the file, and checks all names, shapes and offsets against its length
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{what} is damaged or not a safetensors file: {error}") from None


# ---- the Hub -----------------------------------------------------------------------------------------------------


def fetch(
    repo: str,
    choose: Callable[[Path, Collection[str]], list[str]],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Downloads a pipeline's files into the cache, or finds them there, all from one commit.

    Args:
        repo (`str`): `"user/name"`.
        choose (`Callable`): returns the files to download, given the folder with `model_index.json` and all file
            names of the repository.
        revision, cache_dir, token, local_files_only, force_download: as in `from_pretrained`.

    Returns: the folder of the commit in the cache.
    Raises: `OSError` for files that are not available, with the reason; `ValueError` for rejected content.
    """
    cached = {"cache_dir": cache_dir, "revision": revision}
    if local_files_only:
        return _cached(repo, choose, cached, "local_files_only=True")
    listing, reason = list_files(repo, revision, token)
    if listing is None:
        return _cached(repo, choose, cached, reason)
    names = [file.rfilename for file in listing.siblings]
    check_names(names, repo)
    _check_sizes(listing.siblings, repo)
    if INDEX not in names:
        raise OSError(
            f"{repo} has no {INDEX}: it is not a pipeline. Load a component with its own class, such as "
            f"VDMUNet2DModel.from_pretrained({repo!r})."
        )
    client = {"cache_dir": cache_dir, "token": token, "force_download": force_download}
    try:
        # by the branch name, so that the cache resolves it offline; from here on by the commit
        path = Path(call_with_retries(hf_hub_download, repo, INDEX, revision=revision, **client))
        if path.parent.name != listing.sha:
            # the branch moved in between, or the Hub stopped answering and the cache was used
            logger.warning(f"{repo} is at {listing.sha}, but {path.parent.name} was downloaded and is loaded.")
            return fetch(repo, choose, revision=path.parent.name, **client)
        by_name = {file.rfilename: file for file in listing.siblings}
        _check_content(path.parent, [by_name[INDEX]], repo)
        files = choose(path.parent, names)
        new = [by_name[name] for name in files if force_download or not (path.parent / name).is_file()]
        call_with_retries(snapshot_download, repo, revision=listing.sha, allow_patterns=files, **client)
    except LocalEntryNotFoundError as error:
        raise OSError(f"{repo} could not be downloaded from the Hub: {error}") from error
    _check_content(path.parent, new, repo)
    return path.parent


def call_with_retries(call: Callable[..., Any], *args: Any, attempts: int = 4, **kwargs: Any) -> Any:
    """`call(*args, **kwargs)`, repeated for temporary errors of the Hub after the delay that it asks for."""
    for attempt in range(attempts):
        try:
            return call(*args, **kwargs)
        except HfHubHTTPError as error:
            response = error.response
            if response is None or response.status_code not in _TEMPORARY_STATUSES or attempt == attempts - 1:
                raise
            asked = response.headers.get("Retry-After", "")
            time.sleep(min(float(asked), 60.0) if asked.isdigit() else 2.0**attempt)


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an error of the Hub's client; `None` if there was no response."""
    return getattr(getattr(error, "response", None), "status_code", None)


def list_files(repo: str, revision: str | None, token: str | bool | None) -> tuple[Any, str]:
    """(the commit with its files, sizes and hashes, ""), or (`None`, the reason why the Hub does not answer)."""
    try:
        return call_with_retries(HfApi().model_info, repo, revision=revision, token=token, files_metadata=True), ""
    except HFValidationError as error:
        raise OSError(f"{repo!r} is neither a local folder nor a valid Hub name: {error}") from error
    except GatedRepoError as error:
        raise OSError(
            f"{repo!r} is gated: accept its conditions at {HfApi().endpoint}/{repo}, then {_LOG_IN}"
        ) from error
    except RevisionNotFoundError as error:
        raise OSError(f"{repo} has no branch, tag or commit {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{repo!r} is neither a local folder nor a model at {HfApi().endpoint} that this token may read. If it is "
            f"private, {_LOG_IN} local_files_only=True loads it from the cache."
        ) from error
    except UNREACHABLE as error:
        if status_of(error) in (401, 403):
            reason = getattr(error, "server_message", None) or error
            raise OSError(f"{repo}: the token was not accepted ({reason}). Instead, {_LOG_IN}") from error
        logger.warning(f"The Hub does not answer ({type(error).__name__}: {error}); looking for {repo} in the cache.")
        return None, f"{type(error).__name__}: {error}"


_LOG_IN = "pass token=… or run `hf auth login`, as a user who may read it."


def _cached(repo: str, choose: Callable, cached: dict[str, Any], reason: str) -> Path:
    missing = f"{repo} is not in the cache, or only in part, and the Hub was not asked or did not answer ({reason})"
    try:
        folder = Path(hf_hub_download(repo, INDEX, local_files_only=True, **cached)).parent
    except (LocalEntryNotFoundError, EntryNotFoundError) as error:
        raise OSError(f"{missing}; there is no local folder of that name either.") from error
    try:
        files = choose(folder, _cached_names(repo, folder, cached))
    except OSError as error:
        raise OSError(f"{missing}: {error}") from error
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise OSError(f"{missing}: it has no {', '.join(absent)}.")
    return folder


def _cached_names(repo: str, folder: Path, cached: dict[str, Any]) -> list[str]:
    """All files of a cached commit, as the Hub listed them; with older clients, only the files in the cache."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:
        return names_in(folder)
    try:
        listed = get_cached_repo_tree(repo, revision=folder.name, cache_dir=cached["cache_dir"])
    except CachedRepoTreeNotFoundError:
        return names_in(folder)
    return [file.path for file in listed]


def names_in(folder: Path) -> list[str]:
    """The files of a folder and of its direct subfolders; a pipeline has no others."""
    return [path.relative_to(folder).as_posix() for pattern in ("*", "*/*") for path in folder.glob(pattern) if
            path.is_file()]  # fmt: skip


def _check_sizes(files: Iterable[Any], where: str) -> None:
    for file in files:
        if file.rfilename.endswith(".json") and (file.size or 0) > MAX_JSON_BYTES:
            raise ValueError(
                f"{file.rfilename} of {where} must be at most {MAX_JSON_BYTES} bytes long, got {file.size}: it is not "
                "downloaded."
            )


def _check_content(folder: Path, files: Iterable[Any], where: str) -> None:
    """Compares downloaded files with the hashes that the Hub lists, because its client only compares lengths.

    Raises: `OSError`, after it has removed wrong files from the cache, so that the next load downloads them again.
    """
    wrong = []
    for file in files:
        path = folder / file.rfilename
        expected = file.lfs.sha256 if file.lfs else file.blob_id
        if expected and _digest(path, bool(file.lfs)) != expected:
            wrong.append(file.rfilename)
            blob = path.resolve()
            path.unlink()
            # a blob named by its own hash is the correct content of another file; any other blob is damaged
            if blob.exists() and blob.name not in (_digest(blob, True), _digest(blob, False)):
                blob.unlink()
    if wrong:
        raise OSError(
            f"{', '.join(wrong)} of {where} does not match the hash that the Hub lists and was removed from the "
            "cache. Load again; if the error persists, a proxy between this machine and the Hub has an old copy."
        )


def _digest(path: Path, lfs: bool) -> str:
    """sha256 of a file, or its git blob hash."""
    digest = hashlib.sha256() if lfs else hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
