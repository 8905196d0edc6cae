"""The Hub, both ways: the real `huggingface_hub` client against a Hub on 127.0.0.1 (`hub_server.py`).

The client reads HF_ENDPOINT and the like when it is imported, so these tests run in one process of their own, which
holds both the Hub and the client: a test marked `in_client` is called there by name.
"""

import contextlib
import functools
import importlib
import inspect
import json
import multiprocessing
import os
import pickle  # noqa: TID251  what must not be read has to be written first
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import diffusers
import hub_server
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.pipelines import pipeline_loading_utils
from hub_server import HubServer
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub import errors as hub_errors
from test_pipeline import learned, pipeline, sample

from diffusers_vdm import (
    FixedLinearGamma,
    LinearBetaScheduler,
    MonotoneGammaNetwork,
    VDMPipeline,
    VDMScheduler,
    VDMUNet2DModel,
)


@pytest.fixture(scope="session")
def client(tmp_path_factory):
    context = multiprocessing.get_context("spawn")
    home = tmp_path_factory.mktemp("hf_home")
    with ProcessPoolExecutor(1, mp_context=context, initializer=hub_server.start, initargs=(home,)) as pool:
        yield pool


def call_in_client(module: str, name: str, arguments: tuple, keywords: dict) -> None:
    """Runs a test in the client's process. What it raises comes back as text: not every exception can be pickled."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hub_server.HUB.reset()
    try:
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as monkeypatch:
            warnings.simplefilter("error")
            # between diffusers, the client and httpx2
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

    run.__signature__ = _signature(test)
    return run


def _signature(test: Callable):
    signature = inspect.signature(test)
    names = [inspect.Parameter("client", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    return signature.replace(parameters=names + [p for p in signature.parameters.values() if p.name != "hub"])


def half_written(cache: Path) -> list[Path]:
    """Files in a cache that a later load would take for whole ones: names without content, links to nowhere."""
    return [path for path in cache.rglob("*") if path.is_symlink() and not path.exists()]


# ---- the Hub of these tests is one to the real client --------------------------------------------------------------


@in_client
def test_the_client_creates_writes_and_reads(hub: HubServer, tmp_path: Path):
    api = HfApi()
    assert api.whoami()["name"] == "user"
    assert api.create_repo("thing", private=True).repo_id == "user/thing"
    assert api.create_repo("thing", exist_ok=True).repo_id == "user/thing"
    with pytest.raises(hub_errors.HfHubHTTPError, match="409"):
        api.create_repo("thing")
    with pytest.raises(hub_errors.HfHubHTTPError, match="403"):
        api.create_repo("other/thing")
    source = tmp_path / "source"
    (source / "unet").mkdir(parents=True)
    (source / "README.md").write_text("---\nlicense: mit\n---\nhello")
    (source / "unet" / "weights.safetensors").write_bytes(os.urandom(5000))
    first = api.upload_folder(repo_id="user/thing", folder_path=source)
    assert first.oid == hub.repos["user/thing"].refs["main"]
    puts = len([1 for method, *_ in hub.log if method == "PUT"])
    assert puts == 1
    api.upload_folder(repo_id="user/thing", folder_path=source)  # nothing is new, nothing is sent
    assert len([1 for method, *_ in hub.log if method == "PUT"]) == 1
    info = api.model_info("user/thing", files_metadata=True)
    assert {s.rfilename for s in info.siblings} == {".gitattributes", "README.md", "unet/weights.safetensors"}
    assert info.private and {s.rfilename: s.size for s in info.siblings}["unet/weights.safetensors"] == 5000
    got = Path(snapshot_download("user/thing", cache_dir=tmp_path / "cache"))
    assert (got / "unet/weights.safetensors").read_bytes() == (source / "unet/weights.safetensors").read_bytes()
    assert got.name == info.sha
    # branches, pull requests, history, deletion
    api.create_branch("user/thing", branch="next")
    api.create_tag("user/thing", tag="v1")
    api.upload_file(path_or_fileobj=b"new", path_in_repo="README.md", repo_id="user/thing", revision="next")
    pull = api.upload_file(path_or_fileobj=b"pr", path_in_repo="README.md", repo_id="user/thing", create_pr=True)
    assert pull.pr_num == 1
    for revision, text in {"next": "new", "refs/pr/1": "pr", first.oid: (source / "README.md").read_text()}.items():
        path = hf_hub_download("user/thing", "README.md", revision=revision, cache_dir=tmp_path / "cache")
        assert Path(path).read_text() == text
    api.delete_file("README.md", "user/thing", revision="next")
    assert not api.file_exists("user/thing", "README.md", revision="next")
    assert [b.name for b in api.list_repo_refs("user/thing").branches] == ["main", "next", "v1"]
    assert len(api.list_repo_commits("user/thing", revision="next")) == 4
    with pytest.raises(hub_errors.HfHubHTTPError, match="412"):
        api.upload_file(path_or_fileobj=b"", path_in_repo="x", repo_id="user/thing", parent_commit="0" * 40)
    # who may see it
    for token, error in {False: "401", "hf_other": "404", "hf_wrong": "401"}.items():
        with pytest.raises(hub_errors.HfHubHTTPError, match=error):
            HfApi(token=token).model_info("user/thing")


@in_client
def test_faults_come_when_asked_and_then_stop(hub: HubServer, tmp_path: Path):
    data = os.urandom(12_000_000)  # the client writes 10 MB at a time
    hub.create("user/thing", {"a.safetensors": data, "b.txt": b"text"})
    # a connection cut in the middle of a download is taken up where it was, by a range request
    hub.fault("GET", "/cdn/", cut=11_000_000)
    try:
        path = Path(hf_hub_download("user/thing", "a.safetensors", cache_dir=tmp_path))
    except OSError:  # the oldest client raises it, and goes on in the next call
        path = Path(hf_hub_download("user/thing", "a.safetensors", cache_dir=tmp_path))
    assert path.read_bytes() == data
    assert [status for method, path, status in hub.log if "/cdn/" in path and method == "GET"] == [0, 206]
    hub.fault("GET", "b.txt", body=lambda data: b"TEXT", headers={"ETag": '"1234"'})
    path = Path(hf_hub_download("user/thing", "b.txt", cache_dir=tmp_path))
    assert path.read_bytes() == b"TEXT"  # the client believes what it is sent
    with pytest.raises(hub_errors.EntryNotFoundError):
        hf_hub_download("user/thing", "c.txt", cache_dir=tmp_path)
    with pytest.raises(hub_errors.RevisionNotFoundError):
        hf_hub_download("user/thing", "b.txt", revision="nowhere", cache_dir=tmp_path)


# ---- loading -------------------------------------------------------------------------------------------------------


def made(kind: str = "learned", seed: int = 42) -> VDMPipeline:
    """A small pipeline: all ours, or one of the mixtures with diffusers' classes."""
    schedule = learned()
    if kind == "learned":
        return pipeline(VDMScheduler.from_noise_schedule(schedule), schedule, num_levels=17)
    if kind == "our network, DDIMScheduler":
        return pipeline(DDIMScheduler(clip_sample=False))
    assert kind == "UNet2DModel, our scheduler"
    return pipeline(VDMScheduler(), cls=UNet2DModel)


def like(loaded: DiffusionPipeline, pipe: VDMPipeline) -> bool:
    """The same classes, weights, and pixels (float64: sums in another order do not count there)."""
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


def requests(hub: HubServer, method: str = "GET", part: str = "/resolve/") -> list[str]:
    return [path for verb, path, _ in hub.log if verb == method and part in path]


KINDS = ["learned", "our network, DDIMScheduler", "UNet2DModel, our scheduler"]


@pytest.mark.parametrize("kind", KINDS)
@in_client
def test_what_is_pushed_is_loaded(hub: HubServer, tmp_path: Path, kind: str):
    pipe = made(kind)
    pipe.push_to_hub("user/vdm")
    loaded = VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path)
    assert like(loaded, pipe) and loaded.name_or_path == "user/vdm"
    assert not half_written(tmp_path)
    # a second load sends for nothing that it has, and a third needs no Hub
    hub.log.clear()
    assert like(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path), pipe)
    assert not requests(hub, part="/cdn/") and not requests(hub)
    hub.log.clear()
    assert like(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path, local_files_only=True), pipe)
    assert not hub.log
    # what was loaded can be pushed again, and as a private one
    loaded.unet.float()
    loaded.push_to_hub("user/again", private=True)
    assert hub.repos["user/again"].private
    assert like(VDMPipeline.from_pretrained("user/again", cache_dir=tmp_path), pipe)


@in_client
def test_revisions(hub: HubServer, tmp_path: Path):
    old, new = made(), made("our network, DDIMScheduler")
    old.push_to_hub("user/vdm")
    first = hub.repos["user/vdm"].refs["main"]
    HfApi().create_branch("user/vdm", branch="before")
    HfApi().create_tag("user/vdm", tag="v1")
    new.push_to_hub("user/vdm")
    old.push_to_hub("user/vdm", create_pr=True)
    for revision in ("before", "v1", first, "refs/pr/1"):
        assert like(VDMPipeline.from_pretrained("user/vdm", revision=revision, cache_dir=tmp_path), old), revision
        again = {"revision": revision, "local_files_only": True, "cache_dir": tmp_path}
        assert like(VDMPipeline.from_pretrained("user/vdm", **again), old), revision
    assert like(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path), new)
    with pytest.raises(OSError, match="no branch, tag or commit 'v2'"):
        VDMPipeline.from_pretrained("user/vdm", revision="v2", cache_dir=tmp_path)
    # a branch that moves is followed
    old.push_to_hub("user/vdm")
    assert like(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path), old)


@in_client
def test_variants(hub: HubServer, tmp_path: Path):
    plain, half, average = made(), made(), made()
    half.unet.half()
    with torch.no_grad():
        average.unet.conv_in.bias.add_(1.0)
    plain.push_to_hub("user/vdm")
    half.push_to_hub("user/vdm", variant="fp16")
    average.unet.push_to_hub("user/vdm", variant="ema", subfolder="unet")  # the network alone has this one
    assert like(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path / "a"), plain)
    assert len(requests(hub, part="/cdn/")) == 2
    loaded = VDMPipeline.from_pretrained("user/vdm", variant="ema", cache_dir=tmp_path / "b")
    assert like(loaded, average)
    with torch_dtype_allowed():
        loaded = VDMPipeline.from_pretrained(
            "user/vdm", variant="fp16", torch_dtype=torch.float16, cache_dir=tmp_path / "c"
        )
    assert loaded.unet.dtype == torch.float16
    assert all(torch.equal(v, half.unet.state_dict()[k]) for k, v in loaded.unet.state_dict().items())
    assert all(p.dtype == torch.float32 for p in loaded.noise_schedule.parameters())
    # never another one in its place, also where the cache holds nothing else
    with pytest.raises(ValueError, match="`variant=bf16`, but no such modeling files are available. .*'ema', 'fp16'"):
        VDMPipeline.from_pretrained("user/vdm", variant="bf16", cache_dir=tmp_path / "a")
    with pytest.raises((OSError, ValueError), match="variant|cache"):
        VDMPipeline.from_pretrained("user/vdm", variant="ema", cache_dir=tmp_path / "a", local_files_only=True)
    with pytest.raises(OSError, match="cache"):
        VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path / "c", local_files_only=True)
    with pytest.raises(ValueError, match="variant must be without a dot"):
        VDMPipeline.from_pretrained("user/vdm", variant="ema_0.9999", cache_dir=tmp_path)


@contextlib.contextmanager
def torch_dtype_allowed():
    """The name that every supported diffusers knows, and the newest warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@in_client
def test_half_precision(hub: HubServer, tmp_path: Path, dtype: torch.dtype):
    pipe = made()
    pipe.push_to_hub("user/vdm")
    with torch_dtype_allowed():
        loaded = VDMPipeline.from_pretrained("user/vdm", torch_dtype=dtype, cache_dir=tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.unet.dtype == dtype
    assert torch.equal(loaded.noise_schedule.table(9), pipe.noise_schedule.table(9))
    assert sample(loaded).isfinite().all()


@in_client
def test_components_alone(hub: HubServer, tmp_path: Path):
    pipe = made()
    pipe.push_to_hub("user/vdm")
    given = {"cache_dir": tmp_path}
    unet = VDMUNet2DModel.from_pretrained("user/vdm", subfolder="unet", **given)
    scheduler = VDMScheduler.from_pretrained("user/vdm", subfolder="scheduler", **given)
    schedule = MonotoneGammaNetwork.from_pretrained("user/vdm", subfolder="noise_schedule", **given)
    assert like(VDMPipeline(unet, scheduler, schedule, num_levels=17), pipe)
    # each of them as a repository of its own
    pipe.unet.push_to_hub("user/unet")
    LinearBetaScheduler(timestep_spacing="trailing").push_to_hub("user/betas")
    FixedLinearGamma(-9.0, 4.0).push_to_hub("user/gamma")
    unet = VDMUNet2DModel.from_pretrained("user/unet", **given)
    betas = LinearBetaScheduler.from_pretrained("user/betas", **given)
    assert betas.config.timestep_spacing == "trailing"
    assert FixedLinearGamma.from_pretrained("user/gamma", **given).config.gamma_min == -9.0
    # and in the place of what a repository holds: that is not fetched
    hub.log.clear()
    swapped = VDMPipeline.from_pretrained("user/vdm", unet=unet, scheduler=betas, cache_dir=tmp_path / "empty")
    assert swapped.unet is unet and swapped.scheduler is betas and swapped.noise_schedule is not None
    assert not [path for path in requests(hub) if "/unet/" in path or "/scheduler/" in path]
    assert VDMPipeline.from_pretrained("user/vdm", noise_schedule=None, cache_dir=tmp_path).noise_schedule is None


@in_client
def test_schedulers_are_swapped(hub: HubServer, tmp_path: Path):
    made().push_to_hub("user/vdm")
    pipe = VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = pipe.scheduler.to_diffusers(DDIMScheduler)
    expected = sample(pipe)
    pipe.push_to_hub("user/ddim")
    loaded = VDMPipeline.from_pretrained("user/ddim", cache_dir=tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is DDIMScheduler
    torch.testing.assert_close(sample(loaded), expected, rtol=1e-3, atol=1e-3)
    loaded.scheduler = VDMScheduler.from_pretrained("user/vdm", subfolder="scheduler", cache_dir=tmp_path)
    assert sample(loaded).isfinite().all()


@in_client
def test_private_repositories_and_tokens(hub: HubServer, tmp_path: Path):
    pipe = made()
    pipe.push_to_hub("user/secret", private=True)
    given = {"cache_dir": tmp_path}
    for token in (False, "hf_other"):
        with pytest.raises(OSError, match="'user/secret' is neither a folder here nor.*private.*token="):
            VDMPipeline.from_pretrained("user/secret", token=token, **given)
    with pytest.raises(OSError, match="the token was not accepted.*hf auth login"):
        VDMPipeline.from_pretrained("user/secret", token="hf_wrong", **given)
    with pytest.raises(OSError, match="neither a folder here nor"):
        VDMPipeline.from_pretrained("user/nothing", **given)
    assert not list(tmp_path.rglob("*.json"))
    assert like(VDMPipeline.from_pretrained("user/secret", token="hf_user", **given), pipe)
    assert like(VDMPipeline.from_pretrained("user/secret", **given), pipe)  # the one of HF_TOKEN
    # what was fetched with a token is not handed out without one, unless asked for
    with pytest.raises(OSError, match="local_files_only=True"):
        VDMPipeline.from_pretrained("user/secret", token="hf_other", **given)
    assert like(VDMPipeline.from_pretrained("user/secret", token=False, local_files_only=True, **given), pipe)
    # pushing needs the right one
    for repo, token in {"user/secret": "hf_other", "other/vdm": "hf_user", "user/vdm": "hf_wrong"}.items():
        with pytest.raises(OSError, match=f"{repo} cannot be written to .40[134]: .*hf auth login"):
            pipe.push_to_hub(repo, token=token)
    assert set(hub.repos) == {"user/secret"}


@in_client
def test_a_gated_repository_says_what_to_do(hub: HubServer, tmp_path: Path):
    made().push_to_hub("user/vdm")
    gated = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model user/vdm is restricted"}
    hub.fault("GET", "/api/models/", times=10, status=403, headers=gated)
    with pytest.raises(OSError, match=r"'user/vdm' is gated: accept its conditions at http.*/user/vdm, then"):
        VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path)
    assert not list(tmp_path.rglob("*.json"))


# ---- DiffusionPipeline.from_pretrained -----------------------------------------------------------------------------


@in_client
def test_diffusion_pipeline_without_and_with_register(hub: HubServer, tmp_path: Path):
    pipe = made()
    pipe.push_to_hub("user/vdm")
    pipe.save_pretrained(tmp_path / "local")
    # what diffusers reports: the name of this package is in it, no more
    with pytest.raises(ValueError, match=r"diffusers_vdm\.\w+\.py as defined in `model_index.json` does not exist"):
        DiffusionPipeline.from_pretrained("user/vdm", cache_dir=tmp_path / "cache")
    with pytest.raises(AttributeError, match="module diffusers has no attribute VDMPipeline"):
        DiffusionPipeline.from_pretrained(tmp_path / "local")
    code = "import diffusers, diffusers_vdm, sys; diffusers_vdm.register(); diffusers_vdm.register()\n" + (
        f"for name in ('user/vdm', {str(tmp_path / 'local')!r}):\n"
        f"    pipe = diffusers.DiffusionPipeline.from_pretrained(name, cache_dir={str(tmp_path / 'cache')!r})\n"
        "    pipe.save_pretrained(sys.argv[1])\n"
        "    assert type(pipe) is diffusers_vdm.VDMPipeline is diffusers.VDMPipeline\n"
        "    assert type(diffusers_vdm.VDMPipeline.from_pretrained(sys.argv[1])) is type(pipe)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "saved")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # the format of saved pipelines is the same
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    index.pop("_name_or_path")
    assert index == json.loads((tmp_path / "local" / "model_index.json").read_text())


@in_client
def test_the_code_about_sharing_runs(hub: HubServer, tmp_path: Path):
    text = (Path(__file__).parents[1] / "docs" / "sharing.md").read_text(encoding="utf-8")
    [code] = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "push_to_hub" in block]
    scope = {"pipe": made()}
    with pytest.MonkeyPatch.context() as patch, torch_dtype_allowed():
        # what register() adds is taken away again
        patch.setattr(diffusers, "VDMPipeline", VDMPipeline, raising=False)
        patch.setattr(pipeline_loading_utils, "LOADABLE_CLASSES", dict(pipeline_loading_utils.LOADABLE_CLASSES))
        exec(code, scope)
    assert hub.repos["user/my-vdm"].private
    assert type(scope["pipe"]) is VDMPipeline and type(scope["unet"]) is VDMUNet2DModel
    assert not hasattr(diffusers, "VDMPipeline")


@in_client
def test_hf_hub_offline(hub: HubServer, tmp_path: Path):
    pipe = made()
    pipe.push_to_hub("user/vdm")
    VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path)
    code = (
        f"from diffusers_vdm import VDMPipeline; cache = {str(tmp_path)!r}\n"
        "pipe = VDMPipeline.from_pretrained('user/vdm', cache_dir=cache)\n"
        "assert float(pipe.unet.conv_in.bias.detach().sum()) == "
        f"{float(pipe.unet.conv_in.bias.detach().sum())!r}\n"
        "try:\n    VDMPipeline.from_pretrained('user/vdm', cache_dir=cache + '/empty')\n"
        "except OSError as error:\n    print(error)\n"
    )
    hub.log.clear()
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert result.returncode == 0, result.stderr
    assert "not in the cache" in result.stdout and not hub.log


# ---- faults --------------------------------------------------------------------------------------------------------


@in_client
def test_faults_of_a_download_are_survived_or_told(hub: HubServer, tmp_path: Path):
    pipe, waits = made(), []
    pipe.push_to_hub("user/vdm")
    faults = {
        "busy": ("GET", r"^/api/models/", {"status": 429, "headers": {"Retry-After": "7"}}),
        "ill": ("GET", r"^/api/models/", {"status": 500, "times": 2}),
        "no list of files": ("GET", r"/tree/", {"status": 503}),
        "no metadata": ("HEAD", r"/resolve/", {"status": 500}),
        "no file": ("GET", r"/cdn/", {"status": 500}),
        "slow down": ("GET", r"/cdn/", {"status": 429, "headers": {"Retry-After": "3"}}),
        "cut": ("GET", r"/cdn/", {"cut": 1000}),
        "cut JSON": ("GET", r"\.json$", {"cut": 10}),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", waits.append)
        for name, (method, pattern, what) in faults.items():
            cache = tmp_path / name.replace(" ", "-")
            fault = hub.fault(method, pattern, **what)
            try:
                loaded = VDMPipeline.from_pretrained("user/vdm", cache_dir=cache)
            except Exception as error:  # the oldest client does not go on by itself: it raises, and the next call does
                assert isinstance(error, OSError), name
                assert not half_written(cache), name
                loaded = VDMPipeline.from_pretrained("user/vdm", cache_dir=cache)
            assert fault.times <= 0 or name == "no list of files", name  # which the oldest client does not ask for
            hub.faults.clear()
            assert like(loaded, pipe), name
            assert like(VDMPipeline.from_pretrained("user/vdm", cache_dir=cache, local_files_only=True), pipe), name
    assert 7.0 in waits  # what Retry-After asked for


@in_client
def test_a_hub_that_stays_ill_is_told_and_the_cache_is_taken(hub: HubServer, tmp_path: Path):
    pipe = made()
    pipe.push_to_hub("user/vdm")
    VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path / "full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: None)
        hub.fault("GET", ".*", status=500, times=10**6)
        hub.fault("HEAD", ".*", status=500, times=10**6)
        assert like(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path / "full"), pipe)
        with pytest.raises(OSError, match="user/vdm is not in the cache, .*500"):
            VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path / "empty")
        # in the middle: what came is kept, none of it passes for a whole pipeline
        hub.faults.clear()
        hub.fault("GET", "/cdn/", status=500, times=10**6)
        with pytest.raises(OSError, match="500"):
            VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path / "part")
    hub.faults.clear()
    with pytest.raises(OSError, match="only a part"):
        VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path / "part", local_files_only=True)
    assert not half_written(tmp_path)
    assert like(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path / "part"), pipe)


@in_client
def test_content_that_is_not_what_the_hub_lists(hub: HubServer, tmp_path: Path):
    old, new = made(), made()
    with torch.no_grad():
        new.unet.conv_in.bias.add_(1.0)
    old.push_to_hub("user/vdm")
    stale = hub.repos["user/vdm"].at("main").files["unet/diffusion_pytorch_model.safetensors"].etag
    assert like(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path), old)
    new.push_to_hub("user/vdm")
    # an ETag of yesterday: the client takes the old weights, which it has, for the new ones
    hub.fault("HEAD", "unet/.*safetensors", headers={"X-Linked-Etag": f'"{stale}"', "ETag": f'"{stale}"'})
    with pytest.raises(OSError, match="another content than the Hub lists"):
        VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path)
    assert not half_written(tmp_path)
    before = hub.repos["user/vdm"].at("main").parent
    assert like(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path), new)
    assert like(
        VDMPipeline.from_pretrained("user/vdm", revision=before, cache_dir=tmp_path, local_files_only=True), old
    )
    # weights that were changed on their way, at the same length; and a config
    flip = {"body": lambda data: data[:-1] + bytes([data[-1] ^ 1])}
    for pattern in ("/cdn/", r"scheduler_config\.json", r"model_index\.json"):
        cache = tmp_path / pattern.strip("/").replace("\\", "")
        hub.fault("GET", pattern, **flip)
        with pytest.raises(OSError, match="another content than the Hub lists"):
            VDMPipeline.from_pretrained("user/vdm", cache_dir=cache)
        assert not half_written(cache)
        assert like(VDMPipeline.from_pretrained("user/vdm", cache_dir=cache), new)


@in_client
def test_faults_of_an_upload_leave_the_old_commit_or_make_the_new_one(hub: HubServer, tmp_path: Path):
    old, new = made("our network, DDIMScheduler"), made()
    with torch.no_grad():
        new.unet.conv_in.bias.add_(1.0)
    faults = {
        "busy": ("PUT", "/lfs/", {"status": 429, "headers": {"Retry-After": "3"}}),
        "ill": ("PUT", "/lfs/", {"status": 500}),
        "cut": ("PUT", "/lfs/", {"cut": 500}),
        "no commit": ("POST", "/commit/", {"status": 500}),
        "cut commit": ("POST", "/commit/", {"cut": 50}),
        "no plan": ("POST", "/preupload/", {"status": 503}),
        "gone": ("POST", "/commit/", {"status": 412}),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: None)
        for name, (method, pattern, what) in faults.items():
            hub.reset()
            old.push_to_hub("user/vdm")
            before = hub.repos["user/vdm"].refs["main"]
            fault = hub.fault(method, pattern, **what)
            try:
                new.push_to_hub("user/vdm")
            except Exception as error:
                assert str(error), name
                assert hub.repos["user/vdm"].refs["main"] == before, name  # a commit is whole or none
                assert like(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path / name), old), name
                new.push_to_hub("user/vdm")
            assert fault.times <= 0, name
            assert like(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path / name), new), name


# ---- what is refused -----------------------------------------------------------------------------------------------


class Boom:
    """Its pickle writes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def files_of(pipe: VDMPipeline, folder: Path) -> dict[str, bytes]:
    pipe.save_pretrained(folder)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def header(value, length: int | None = None) -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


UNET = "unet/diffusion_pytorch_model.safetensors"
BOMB = (
    "import pathlib; pathlib.Path('{marker}').touch()\n"
    "from diffusers_vdm.unet import *\nclass Net(VDMUNet2DModel): pass\n"
)
TENSOR = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
# what is put into the repository (None: taken away; a dict: changes of the index), and what is said
REFUSED = {
    "a .bin alone": ({UNET: None, "unet/diffusion_pytorch_model.bin": "pickle"}, "pickles only .*model.bin"),
    "a pickle": ({UNET: None, "unet/weights.pkl": "pickle"}, "pickles only .*weights.pkl"),
    "a pickle by another name": ({UNET: "pickle"}, "damaged, or no safetensors file"),
    "a huge header": ({UNET: header(b"{}", 2**62)}, "must have a header of at most"),
    "a long header": ({UNET: header(b" " * 25_000_001)}, "must have a header of at most"),
    "an empty file": ({UNET: b""}, "must have a header of at most"),
    "a header that is no JSON": ({UNET: header(b"[" * 1000)}, "damaged, or no safetensors file"),
    "a tensor that is not there": ({UNET: header({"a": TENSOR}) + b"\0" * 8}, "damaged, or no safetensors file"),
    "a shape that lies": ({UNET: header({"a": {**TENSOR, "shape": [2**40]}}) + b"\0" * 16}, "damaged, or no"),
    "tensors that overlap": ({UNET: header({"a": TENSOR, "b": TENSOR}) + b"\0" * 16}, "damaged, or no"),
    "a name that leads out": ({"../../evil.json": b"{}"}, r"'../../evil.json', which leads out"),
    "an absolute name": ({"/evil.json": b"{}"}, "'/evil.json', which leads out"),
    "a backslash": ({"unet\\..\\evil": b""}, "which leads out"),
    "a shard elsewhere": (
        {f"{UNET}.index.json": b'{"metadata": {}, "weight_map": {"a": "../../secret.safetensors"}}'},
        "names the file '../../secret.safetensors', which is not beside it",
    ),
    "code for a component": (
        {"model_index.json": {"unet": ["my_net", "Net"]}, "unet/my_net.py": "code"},
        "unet as code of its own, unet/my_net.py, which is not run",
    ),
    "code in the place of ours": ({"unet/diffusers_vdm.unet.py": "code"}, "code of its own.*which is not run"),
    "None.py": ({"None.py": "code"}, "None.py, which diffusers would run"),
    "a module that nobody imported": (
        {"model_index.json": {"unet": ["this", "Net"]}},
        "no model or scheduler .* Nothing is imported because",
    ),
    "a function of a library": ({"model_index.json": {"unet": ["os", "system"]}}, "unet as system of os, which is no"),
    "a module of diffusers' pipelines": (
        {"model_index.json": {"unet": ["ddpm", "DDPMPipeline"]}},
        "which is no model",
    ),
    "an index that is none": ({"model_index.json": b"[1]"}, "must hold a JSON object"),
    "an index that is damaged": ({"model_index.json": b'{"unet": '}, "is not JSON"),
    "an entry that is none": ({"model_index.json": {"unet": [["os"], "system"]}}, "unet as .library, class., got"),
    "a huge config": ({"unet/config.json": b" " * ((16 << 20) + 1)}, "must be at most 16777216 bytes"),
    "no config": ({"unet/config.json": None}, "has no unet/config.json"),
    "no weights": ({UNET: None}, "has no safetensors weights of unet"),
    "no index": ({"model_index.json": None}, "has no model_index.json"),
}


@in_client
def test_what_is_refused(hub: HubServer, tmp_path: Path):
    good = files_of(made(), tmp_path / "good")
    for number, (name, (changes, message)) in enumerate(REFUSED.items()):
        marker = tmp_path / f"marker-{number}"
        special = {"pickle": pickle.dumps(Boom(marker)), "code": BOMB.format(marker=marker).encode()}
        files = dict(good)
        for path, content in changes.items():
            if isinstance(content, dict):
                content = json.dumps(json.loads(good[path]) | content).encode()
            files[path] = special.get(content, content) if isinstance(content, str) else content
        files = {path: content for path, content in files.items() if content is not None}
        hub.create(f"user/repo-{number}", files)
        folder = tmp_path / f"folder-{number}"
        sources = [f"user/repo-{number}"]
        if not any(".." in path or path.startswith("/") for path in files):
            for path, content in files.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content)
            sources.append(str(folder))
        for source in sources:
            for trust in (False, True):
                with pytest.raises((ValueError, OSError), match=message):
                    VDMPipeline.from_pretrained(source, cache_dir=tmp_path / "cache", trust_remote_code=trust)
            assert not marker.exists(), name
        # once in the cache, it is refused there as well
        with pytest.raises((ValueError, OSError)):
            VDMPipeline.from_pretrained(sources[0], cache_dir=tmp_path / "cache", local_files_only=True)
    fetched = {path.name for path in (tmp_path / "cache").rglob("*") if not path.is_dir()}
    assert not [name for name in fetched if name.endswith((".py", ".bin", ".pkl"))]
    assert "this" not in sys.modules and not list(tmp_path.rglob("evil*"))


@in_client
def test_code_and_pickles_beside_good_weights_are_left_where_they_are(hub: HubServer, tmp_path: Path):
    pipe, marker = made(), tmp_path / "marker"
    files = files_of(pipe, tmp_path / "good")
    code, pickled = BOMB.format(marker=marker).encode(), pickle.dumps(Boom(marker))
    index = json.loads(files["model_index.json"])
    # as a repository that also serves those without this package; and module paths of an older version
    index |= {"_class_name": ["pipeline", "VDMPipeline"], "unet": ["net", "VDMUNet2DModel"]}
    index |= {"scheduler": ["diffusers_vdm.old_schedulers", "VDMScheduler"]}
    extra = {"pipeline.py": code, "unet/net.py": code, "unet/diffusion_pytorch_model.bin": pickled, "run.pt": pickled}
    hub.create("user/vdm", files | extra | {"model_index.json": json.dumps(index).encode()})
    assert like(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path / "cache"), pipe)
    names = {path.name for path in (tmp_path / "cache").rglob("*")}
    assert not marker.exists() and not [name for name in names if name.endswith((".py", ".bin", ".pt"))]
    # also where another program has fetched all of it
    folder = Path(snapshot_download("user/vdm", cache_dir=tmp_path / "cache"))
    assert (folder / "unet/net.py").exists()
    assert like(VDMPipeline.from_pretrained(folder), pipe)
    assert like(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path / "cache"), pipe)
    assert not marker.exists()


@in_client
def test_arguments_that_are_refused(hub: HubServer, tmp_path: Path):
    made().save_pretrained(tmp_path)
    for arguments, message in {
        ("custom_pipeline", "clip_guided"): "custom_pipeline must not be given",
        ("use_safetensors", False): "use_safetensors must not be False",
        ("proxies", (("https", "x"),)): "HTTPS_PROXY",
        ("variant", "../x"): "variant must be without a dot",
    }.items():
        with pytest.raises(ValueError, match=message):
            VDMPipeline.from_pretrained(tmp_path, **dict([arguments]))
    with pytest.raises(OSError, match="neither a folder here nor a name that the Hub allows"):
        VDMPipeline.from_pretrained("no spaces please")
    hub.create("user/unet", {"config.json": b"{}"})
    with pytest.raises(OSError, match="no model_index.json: it is not a pipeline"):
        VDMPipeline.from_pretrained("user/unet", cache_dir=tmp_path)


@in_client
def test_sharded_weights(hub: HubServer, tmp_path: Path):
    pipe = made()
    pipe.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / UNET).unlink()
    pipe.unet.save_pretrained(tmp_path / "saved" / "unet", max_shard_size="5KB")
    shards = [path.name for path in (tmp_path / "saved" / "unet").glob("*-of-*.safetensors")]
    assert len(shards) > 1
    HfApi().create_repo("user/vdm")
    HfApi().upload_folder(repo_id="user/vdm", folder_path=tmp_path / "saved")
    for source in ("user/vdm", tmp_path / "saved"):
        assert like(VDMPipeline.from_pretrained(source, cache_dir=tmp_path / "cache"), pipe)
    hub.repos["user/vdm"].write(**{f"unet/{shards[0]}": None})
    with pytest.raises(ValueError, match="which is not beside it"):
        VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path / "cache")
