"""The real `huggingface_hub` client in a separate process, with the Hub of `hub_server.py`.

The client reads HF_ENDPOINT and the like when it is imported. So these tests run in one process that holds both the
Hub and the client: a test marked `in_client` is called there by name.
"""

import contextlib
import functools
import importlib
import inspect
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel

from diffusers_vdm import VDMPipeline, VDMScheduler
from tests import hub_server
from tests.hub_server import HubServer
from tests.models import curved_pipeline, pipeline, sample
from tests.text_models import text_pipeline


def call_in_client(module: str, name: str, arguments: tuple, keywords: dict) -> None:
    """Runs a test in the client's process. What it raises comes back as text: not every exception can be pickled."""
    torch.set_num_threads(1)
    hub_server.HUB.reset()
    try:
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as monkeypatch:
            warnings.simplefilter("error")
            # raised between diffusers, the client and httpx2
            warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument", UserWarning)
            monkeypatch.setenv("HF_TOKEN", "hf_user")
            getattr(importlib.import_module(module), name).__wrapped__(hub_server.HUB, *arguments, **keywords)
    except BaseException:
        raise AssertionError(f"in the client's process:\n{traceback.format_exc()}") from None


def in_client(test: Callable) -> Callable:
    """For a test `f(hub, tmp_path, **parameters)`: it runs in the client's process, as "user", with an empty Hub."""

    @functools.wraps(test)
    def run(client, tmp_path, **keywords):
        client.submit(call_in_client, test.__module__, test.__name__, (tmp_path,), keywords).result(timeout=200)

    signature = inspect.signature(test)
    parameters = [inspect.Parameter("client", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [parameter for parameter in signature.parameters.values() if parameter.name != "hub"]
    run.__signature__ = signature.replace(parameters=parameters)
    return run


@contextlib.contextmanager
def torch_dtype_allowed() -> Iterator[None]:
    """Allows `torch_dtype`: every supported diffusers knows this name, and the newest warns of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        yield


# ---- pipelines that are pushed and loaded ------------------------------------------------------------------------

KINDS = ["learned", "our network, DDIMScheduler", "UNet2DModel, our scheduler", "texts"]


def hub_pipeline(kind: str = "learned") -> VDMPipeline:
    """A small pipeline: all ours, or one of the mixtures with diffusers' classes."""
    if kind == "learned":
        return curved_pipeline(num_levels=17)
    if kind == "our network, DDIMScheduler":
        return pipeline(DDIMScheduler(clip_sample=False))
    if kind == "texts":
        return text_pipeline()
    assert kind == "UNet2DModel, our scheduler"
    return pipeline(VDMScheduler(), cls=UNet2DModel)


def changed_pipeline() -> VDMPipeline:
    """The pipeline of [`hub_pipeline`] with other weights."""
    pipe = hub_pipeline()
    with torch.no_grad():
        pipe.unet.conv_in.bias.add_(1.0)
    return pipe


def same_pipelines(loaded: DiffusionPipeline, pipe: VDMPipeline) -> bool:
    """Asserts that classes and weights are equal, and returns whether the samples are.

    The samples are drawn in float64: there the order of sums changes no pixel.
    """
    assert type(loaded) is type(pipe)
    for name, component in pipe.components.items():
        assert type(getattr(loaded, name)) is type(component), name
    weights = pipe.unet.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.unet.state_dict().items())
    loaded.set_progress_bar_config(disable=True)
    for p in (loaded, pipe):
        p.unet.double()
    same = torch.equal(sample(loaded, output_type="pt"), sample(pipe, output_type="pt"))
    pipe.unet.float()
    return same


# ---- the Hub and the cache ---------------------------------------------------------------------------------------


def requests(hub: HubServer, method: str = "GET", part: str = "/resolve/") -> list[str]:
    """The paths of the requests so far."""
    return [path for verb, path, _ in hub.log if verb == method and part in path]


def files_at(hub: HubServer, ref: str = "main", name: str = "user/vdm") -> dict[str, bytes]:
    """The files of a repository at a branch."""
    repo = hub.repos[name]
    return {path: blob.data for path, blob in repo.commits[repo.refs[ref]].files.items()}


def half_written(cache: Path) -> list[Path]:
    """Files in a cache that a later load would take for whole ones: links to files that do not exist."""
    return [path for path in cache.rglob("*") if path.is_symlink() and not path.exists()]
