"""The Hub, both ways: the real `huggingface_hub` client against a Hub on 127.0.0.1 (`hub_server.py`).

The client reads HF_ENDPOINT and the like when it is imported, so these tests run in one process of their own, which
holds both the Hub and the client: a test marked `in_client` is called there by name.
"""

import contextlib
import functools
import inspect
import json
import multiprocessing
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import hub_server
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel
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


def call_in_client(name: str, arguments: tuple, keywords: dict) -> None:
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
            globals()[name].__wrapped__(hub_server.HUB, *arguments, **keywords)
    except BaseException:
        raise AssertionError(f"in the client's process:\n{traceback.format_exc()}") from None


def in_client(test: Callable) -> Callable:
    """For a test `f(hub, tmp_path, **parameters)`: it runs in the client's process, as "user", with an empty Hub."""

    @functools.wraps(test)
    def run(client, tmp_path, **keywords):
        client.submit(call_in_client, test.__name__, (tmp_path,), keywords).result(timeout=200)

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
    except OSError:  # the oldest client tells it, and goes on in the next call
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
    with pytest.raises(ValueError, match=r"no weights of variant='bf16'.*'ema', 'fp16'"):
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
        with pytest.raises(hub_errors.HfHubHTTPError, match="40[134]"):
            pipe.push_to_hub(repo, token=token)
    assert set(hub.repos) == {"user/secret"}


# ---- DiffusionPipeline.from_pretrained -----------------------------------------------------------------------------


@in_client
def test_diffusion_pipeline_without_and_with_register(hub: HubServer, tmp_path: Path):
    pipe = made()
    pipe.push_to_hub("user/vdm")
    pipe.save_pretrained(tmp_path / "local")
    # what diffusers tells: the name of this package is in it, no more
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
