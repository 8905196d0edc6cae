"""repository.py: pipelines on the Hub, pushed and loaded by the real client (`hub_client.py`), and what is refused."""

import functools
import json
import os
import pickle  # noqa: TID251  what must not be read has to be written first
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.pipelines import pipeline_loading_utils
from huggingface_hub import HfApi, snapshot_download

from diffusers_vdm import (
    FixedLinearGamma,
    LinearBetaScheduler,
    MonotoneGammaNetwork,
    VDMPipeline,
    VDMScheduler,
    VDMUNet2DModel,
)
from tests.hub_client import (
    KINDS,
    changed_pipeline,
    half_written,
    hub_pipeline,
    in_client,
    requests,
    same_pipelines,
    torch_dtype_allowed,
)
from tests.hub_server import HubServer
from tests.models import sample
from tests.paths import ROOT, contents

# ---- loading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@in_client
def test_a_pushed_pipeline_is_loaded(hub: HubServer, tmp_path: Path, kind: str):
    pipe = hub_pipeline(kind)
    pipe.push_to_hub("user/vdm")
    loaded = VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path)
    assert same_pipelines(loaded, pipe) and loaded.name_or_path == "user/vdm"
    assert not half_written(tmp_path)
    # a second load sends for nothing that it has, and a third needs no Hub
    hub.log.clear()
    assert same_pipelines(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path), pipe)
    assert not requests(hub, part="/cdn/") and not requests(hub)
    hub.log.clear()
    assert same_pipelines(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path, local_files_only=True), pipe)
    assert not hub.log
    # what was loaded can be pushed again, and as a private one
    loaded.unet.float()
    loaded.push_to_hub("user/again", private=True)
    assert hub.repos["user/again"].private
    assert same_pipelines(VDMPipeline.from_pretrained("user/again", cache_dir=tmp_path), pipe)


@in_client
def test_revisions_are_branches_tags_commits_and_pull_requests(hub: HubServer, tmp_path: Path):
    old, new = hub_pipeline(), hub_pipeline("our network, DDIMScheduler")
    old.push_to_hub("user/vdm")
    first = hub.repos["user/vdm"].refs["main"]
    HfApi().create_branch("user/vdm", branch="before")
    HfApi().create_tag("user/vdm", tag="v1")
    new.push_to_hub("user/vdm")
    old.push_to_hub("user/vdm", create_pr=True)
    for revision in ("before", "v1", first, "refs/pr/1"):
        assert same_pipelines(VDMPipeline.from_pretrained("user/vdm", revision=revision, cache_dir=tmp_path), old), (
            revision
        )
        again = {"revision": revision, "local_files_only": True, "cache_dir": tmp_path}
        assert same_pipelines(VDMPipeline.from_pretrained("user/vdm", **again), old), revision
    assert same_pipelines(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path), new)
    with pytest.raises(OSError, match="no branch, tag or commit 'v2'"):
        VDMPipeline.from_pretrained("user/vdm", revision="v2", cache_dir=tmp_path)
    # a branch that moves is followed
    old.push_to_hub("user/vdm")
    assert same_pipelines(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path), old)


def push_variants() -> tuple[VDMPipeline, VDMPipeline, VDMPipeline]:
    """Pushes a pipeline, its variant "fp16", and the variant "ema" of its network alone."""
    plain, half, average = hub_pipeline(), hub_pipeline(), changed_pipeline()
    half.unet.half()
    plain.push_to_hub("user/vdm")
    half.push_to_hub("user/vdm", variant="fp16")
    average.unet.push_to_hub("user/vdm", variant="ema", subfolder="unet")
    return plain, half, average


@in_client
def test_without_a_variant_only_the_plain_weights_are_fetched(hub: HubServer, tmp_path: Path):
    plain, _, _ = push_variants()
    assert same_pipelines(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path), plain)
    assert len(requests(hub, part="/cdn/")) == 2


@in_client
def test_a_variant_of_the_network_alone_is_loaded(hub: HubServer, tmp_path: Path):
    _, _, average = push_variants()
    assert same_pipelines(VDMPipeline.from_pretrained("user/vdm", variant="ema", cache_dir=tmp_path), average)


@in_client
def test_a_variant_in_half_precision_keeps_its_schedule_in_float32(hub: HubServer, tmp_path: Path):
    _, half, _ = push_variants()
    arguments = {"variant": "fp16", "cache_dir": tmp_path}
    with torch_dtype_allowed():
        loaded = VDMPipeline.from_pretrained("user/vdm", torch_dtype=torch.float16, **arguments)
    assert loaded.unet.dtype == torch.float16
    assert all(torch.equal(v, half.unet.state_dict()[k]) for k, v in loaded.unet.state_dict().items())
    assert all(p.dtype == torch.float32 for p in loaded.noise_schedule.parameters())
    # the cache holds no plain weights
    with pytest.raises(OSError, match="cache"):
        VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path, local_files_only=True)


@in_client
def test_no_other_variant_is_loaded_in_the_place_of_a_missing_one(hub: HubServer, tmp_path: Path):
    push_variants()
    VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="`variant=bf16`, but no such modeling files are available. .*'ema', 'fp16'"):
        VDMPipeline.from_pretrained("user/vdm", variant="bf16", cache_dir=tmp_path)
    with pytest.raises((OSError, ValueError), match="variant|cache"):
        VDMPipeline.from_pretrained("user/vdm", variant="ema", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(ValueError, match="variant must consist of letters"):
        VDMPipeline.from_pretrained("user/vdm", variant="ema_0.9999", cache_dir=tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@in_client
def test_half_precision_keeps_the_schedule_in_float32(hub: HubServer, tmp_path: Path, dtype: torch.dtype):
    pipe = hub_pipeline()
    pipe.push_to_hub("user/vdm")
    with torch_dtype_allowed():
        loaded = VDMPipeline.from_pretrained("user/vdm", torch_dtype=dtype, cache_dir=tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.unet.dtype == dtype
    assert torch.equal(loaded.noise_schedule.table(9), pipe.noise_schedule.table(9))
    assert sample(loaded).isfinite().all()


@in_client
def test_components_are_pushed_and_loaded_alone(hub: HubServer, tmp_path: Path):
    pipe = hub_pipeline()
    pipe.push_to_hub("user/vdm")
    given = {"cache_dir": tmp_path}
    unet = VDMUNet2DModel.from_pretrained("user/vdm", subfolder="unet", **given)
    scheduler = VDMScheduler.from_pretrained("user/vdm", subfolder="scheduler", **given)
    schedule = MonotoneGammaNetwork.from_pretrained("user/vdm", subfolder="noise_schedule", **given)
    assert same_pipelines(VDMPipeline(unet, scheduler, schedule, num_levels=17), pipe)
    # each component in its own repository
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
    hub_pipeline().push_to_hub("user/vdm")
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


SECRET = "user/secret"


@pytest.mark.parametrize(
    ("repository", "token", "message"),
    [
        (SECRET, False, "'user/secret' is neither a local folder nor.*private.*token="),
        (SECRET, "hf_other", "'user/secret' is neither a local folder nor.*private.*token="),
        (SECRET, "hf_wrong", "the token was not accepted.*hf auth login"),
        ("user/nothing", None, "neither a local folder nor"),
    ],
    ids=["no token", "token of another", "unknown token", "no repository"],
)
@in_client
def test_a_repository_that_may_not_be_read_is_refused(
    hub: HubServer, tmp_path: Path, repository: str, token: str | bool | None, message: str
):
    hub_pipeline().push_to_hub(SECRET, private=True)
    with pytest.raises(OSError, match=message):
        VDMPipeline.from_pretrained(repository, token=token, cache_dir=tmp_path)
    assert not list(tmp_path.rglob("*.json"))


@in_client
def test_a_private_repository_is_loaded_with_its_token(hub: HubServer, tmp_path: Path):
    pipe = hub_pipeline()
    pipe.push_to_hub(SECRET, private=True)
    given = {"cache_dir": tmp_path}
    assert same_pipelines(VDMPipeline.from_pretrained(SECRET, token="hf_user", **given), pipe)
    assert same_pipelines(VDMPipeline.from_pretrained(SECRET, **given), pipe)  # the token of HF_TOKEN
    # what was fetched with a token is not loaded without one, unless that is asked for
    with pytest.raises(OSError, match="local_files_only=True"):
        VDMPipeline.from_pretrained(SECRET, token="hf_other", **given)
    assert same_pipelines(VDMPipeline.from_pretrained(SECRET, token=False, local_files_only=True, **given), pipe)


@pytest.mark.parametrize(
    ("repository", "token"), [(SECRET, "hf_other"), ("other/vdm", "hf_user"), ("user/vdm", "hf_wrong")]
)
@in_client
def test_pushing_needs_a_token_of_the_owner(hub: HubServer, tmp_path: Path, repository: str, token: str):
    pipe = hub_pipeline()
    pipe.push_to_hub(SECRET, private=True)
    with pytest.raises(OSError, match=f"{repository} cannot be written to .40[134]: .*hf auth login"):
        pipe.push_to_hub(repository, token=token)
    assert set(hub.repos) == {SECRET}


@in_client
def test_a_gated_repository_says_what_to_do(hub: HubServer, tmp_path: Path):
    hub_pipeline().push_to_hub("user/vdm")
    gated = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model user/vdm is restricted"}
    hub.fault("GET", "/api/models/", times=10, status=403, headers=gated)
    with pytest.raises(OSError, match=r"'user/vdm' is gated: accept its conditions at http.*/user/vdm, then"):
        VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path)
    assert not list(tmp_path.rglob("*.json"))


# ---- DiffusionPipeline.from_pretrained ---------------------------------------------------------------------------


@in_client
def test_diffusion_pipeline_without_and_with_register(hub: HubServer, tmp_path: Path):
    pipe = hub_pipeline()
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
def test_the_code_of_the_page_about_sharing_runs(hub: HubServer, tmp_path: Path):
    text = (ROOT / "docs" / "sharing.md").read_text(encoding="utf-8")
    [code] = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "push_to_hub" in block]
    scope = {"pipe": hub_pipeline()}
    with pytest.MonkeyPatch.context() as patch, torch_dtype_allowed():
        # what register() adds is taken away again
        patch.setattr(diffusers, "VDMPipeline", VDMPipeline, raising=False)
        patch.setattr(pipeline_loading_utils, "LOADABLE_CLASSES", dict(pipeline_loading_utils.LOADABLE_CLASSES))
        exec(code, scope)
    assert hub.repos["user/my-vdm"].private
    assert type(scope["pipe"]) is VDMPipeline and type(scope["unet"]) is VDMUNet2DModel
    assert not hasattr(diffusers, "VDMPipeline")


@in_client
def test_hf_hub_offline_loads_from_the_cache_alone(hub: HubServer, tmp_path: Path):
    pipe = hub_pipeline()
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


# ---- faults ------------------------------------------------------------------------------------------------------


DOWNLOAD_FAULTS = {
    "busy": ("GET", r"^/api/models/", {"status": 429, "headers": {"Retry-After": "7"}}),
    "error": ("GET", r"^/api/models/", {"status": 500, "times": 2}),
    "no list of files": ("GET", r"/tree/", {"status": 503}),
    "no metadata": ("HEAD", r"/resolve/", {"status": 500}),
    "no file": ("GET", r"/cdn/", {"status": 500}),
    "busy with a file": ("GET", r"/cdn/", {"status": 429, "headers": {"Retry-After": "3"}}),
    "cut": ("GET", r"/cdn/", {"cut": 1000}),
    "cut JSON": ("GET", r"\.json$", {"cut": 10}),
}


@pytest.mark.parametrize("name", DOWNLOAD_FAULTS)
@in_client
def test_a_fault_of_a_download_is_tried_again_or_an_error(hub: HubServer, tmp_path: Path, name: str):
    method, pattern, what = DOWNLOAD_FAULTS[name]
    pipe, waits = hub_pipeline(), []
    pipe.push_to_hub("user/vdm")
    fault = hub.fault(method, pattern, **what)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", waits.append)
        try:
            loaded = VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path)
        except Exception as error:  # the oldest client raises, and works in the next call
            assert isinstance(error, OSError)
            assert not half_written(tmp_path)
            loaded = VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path)
    assert fault.times <= 0 or name == "no list of files"  # which the oldest client does not ask for
    hub.faults.clear()
    assert same_pipelines(loaded, pipe)
    assert same_pipelines(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path, local_files_only=True), pipe)
    assert name != "busy" or 7.0 in waits  # the seconds of Retry-After


@in_client
def test_a_hub_with_errors_only_leaves_the_cache(hub: HubServer, tmp_path: Path):
    pipe = hub_pipeline()
    pipe.push_to_hub("user/vdm")
    VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path / "full")
    hub.fault("GET", ".*", status=500, times=10**6)
    hub.fault("HEAD", ".*", status=500, times=10**6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: None)
        assert same_pipelines(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path / "full"), pipe)
        with pytest.raises(OSError, match="user/vdm is not in the cache, .*500"):
            VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path / "empty")


@in_client
def test_a_part_of_a_pipeline_in_the_cache_is_kept_and_not_loaded(hub: HubServer, tmp_path: Path):
    pipe = hub_pipeline()
    pipe.push_to_hub("user/vdm")
    hub.fault("GET", "/cdn/", status=500, times=10**6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: None)
        with pytest.raises(OSError, match="500"):
            VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path)
    hub.faults.clear()
    with pytest.raises(OSError, match="or only in part"):
        VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path, local_files_only=True)
    assert not half_written(tmp_path)
    assert same_pipelines(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path), pipe)


@in_client
def test_old_weights_under_the_name_of_new_ones_are_refused(hub: HubServer, tmp_path: Path):
    old, new = hub_pipeline(), changed_pipeline()
    old.push_to_hub("user/vdm")
    stale = hub.repos["user/vdm"].at("main").files["unet/diffusion_pytorch_model.safetensors"].etag
    assert same_pipelines(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path), old)
    new.push_to_hub("user/vdm")
    # by an outdated ETag, the client takes the old weights, which it has, for the new ones
    hub.fault("HEAD", "unet/.*safetensors", headers={"X-Linked-Etag": f'"{stale}"', "ETag": f'"{stale}"'})
    with pytest.raises(OSError, match="does not match the hash that the Hub lists"):
        VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path)
    assert not half_written(tmp_path)
    before = hub.repos["user/vdm"].at("main").parent
    assert same_pipelines(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path), new)
    cached = {"revision": before, "cache_dir": tmp_path, "local_files_only": True}
    assert same_pipelines(VDMPipeline.from_pretrained("user/vdm", **cached), old)


@pytest.mark.parametrize("pattern", ["/cdn/", r"scheduler_config\.json", r"model_index\.json"])
@in_client
def test_content_that_changed_on_its_way_is_refused(hub: HubServer, tmp_path: Path, pattern: str):
    pipe = hub_pipeline()
    pipe.push_to_hub("user/vdm")
    hub.fault("GET", pattern, body=lambda data: data[:-1] + bytes([data[-1] ^ 1]))  # of the same length
    with pytest.raises(OSError, match="does not match the hash that the Hub lists"):
        VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path)
    assert not half_written(tmp_path)
    assert same_pipelines(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path), pipe)


UPLOAD_FAULTS = {
    "busy": ("PUT", "/lfs/", {"status": 429, "headers": {"Retry-After": "3"}}),
    "error": ("PUT", "/lfs/", {"status": 500}),
    "cut": ("PUT", "/lfs/", {"cut": 500}),
    "no commit": ("POST", "/commit/", {"status": 500}),
    "cut commit": ("POST", "/commit/", {"cut": 50}),
    "no plan": ("POST", "/preupload/", {"status": 503}),
    "another parent": ("POST", "/commit/", {"status": 412}),
}


@pytest.mark.parametrize("name", UPLOAD_FAULTS)
@in_client
def test_a_fault_of_an_upload_leaves_the_old_commit_or_makes_the_new_one(hub: HubServer, tmp_path: Path, name: str):
    method, pattern, what = UPLOAD_FAULTS[name]
    old, new = hub_pipeline("our network, DDIMScheduler"), changed_pipeline()
    old.push_to_hub("user/vdm")
    before = hub.repos["user/vdm"].refs["main"]
    fault = hub.fault(method, pattern, **what)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: None)
        try:
            new.push_to_hub("user/vdm")
        except Exception as error:
            assert str(error)
            assert hub.repos["user/vdm"].refs["main"] == before
            assert same_pipelines(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path), old)
            new.push_to_hub("user/vdm")
    assert fault.times <= 0
    assert same_pipelines(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path), new)


# ---- what is refused ---------------------------------------------------------------------------------------------


class Boom:
    """An object whose pickle writes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@functools.cache
def good_files() -> dict[str, bytes]:
    """The files of a repository that is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        hub_pipeline().save_pretrained(folder)
        return contents(Path(folder))


def header(value, length: int | None = None) -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


UNET = "unet/diffusion_pytorch_model.safetensors"
BOMB = (
    "import pathlib; pathlib.Path('{marker}').touch()\n"
    "from diffusers_vdm.unet import *\nclass Net(VDMUNet2DModel): pass\n"
)
TENSOR = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
# changes of a good repository (None removes a file, a dict changes the index), and the message
REFUSED = {
    "a .bin alone": ({UNET: None, "unet/diffusion_pytorch_model.bin": "pickle"}, "only as pickles .*model.bin"),
    "a pickle": ({UNET: None, "unet/weights.pkl": "pickle"}, "only as pickles .*weights.pkl"),
    "a pickle by another name": ({UNET: "pickle"}, "damaged or not a safetensors file"),
    "a huge header": ({UNET: header(b"{}", 2**62)}, "must have a header of at most"),
    "a long header": ({UNET: header(b" " * 25_000_001)}, "must have a header of at most"),
    "an empty file": ({UNET: b""}, "must have a header of at most"),
    "a header that is no JSON": ({UNET: header(b"[" * 1000)}, "damaged or not a safetensors file"),
    "a tensor that is not there": ({UNET: header({"a": TENSOR}) + b"\0" * 8}, "damaged or not a safetensors file"),
    "a shape that lies": ({UNET: header({"a": {**TENSOR, "shape": [2**40]}}) + b"\0" * 16}, "damaged or not"),
    "tensors that overlap": ({UNET: header({"a": TENSOR, "b": TENSOR}) + b"\0" * 16}, "damaged or not"),
    "a name that leads out": ({"../../evil.json": b"{}"}, r"'../../evil.json', which is outside"),
    "an absolute name": ({"/evil.json": b"{}"}, "'/evil.json', which is outside"),
    "a backslash": ({"unet\\..\\evil": b""}, "which is outside"),
    "a shard elsewhere": (
        {f"{UNET}.index.json": b'{"metadata": {}, "weight_map": {"a": "../../secret.safetensors"}}'},
        "names the file '../../secret.safetensors', which is not beside it",
    ),
    "code for a component": (
        {"model_index.json": {"unet": ["my_net", "Net"]}, "unet/my_net.py": "code"},
        "unet as its own code, unet/my_net.py, which is not run",
    ),
    "code in the place of ours": ({"unet/diffusers_vdm.unet.py": "code"}, "its own code.*which is not run"),
    "None.py": ({"None.py": "code"}, "None.py, which diffusers would run"),
    "a module that was not imported": (
        {"model_index.json": {"unet": ["this", "Net"]}},
        "not a model or scheduler .* A repository cannot import modules",
    ),
    "a function of a library": ({"model_index.json": {"unet": ["os", "system"]}}, "unet as system of os, which is no"),
    "a module of diffusers' pipelines": (
        {"model_index.json": {"unet": ["ddpm", "DDPMPipeline"]}},
        "which is not a model",
    ),
    "an index that is none": ({"model_index.json": b"[1]"}, "must hold a JSON object"),
    "an index that is damaged": ({"model_index.json": b'{"unet": '}, "is not JSON"),
    "an entry that is none": ({"model_index.json": {"unet": [["os"], "system"]}}, "unet as .library, class., got"),
    "a huge config": ({"unet/config.json": b" " * ((16 << 20) + 1)}, "must be at most 16777216 bytes"),
    "no config": ({"unet/config.json": None}, "has no unet/config.json"),
    "no weights": ({UNET: None}, "has no safetensors weights of unet"),
    "no index": ({"model_index.json": None}, "has no model_index.json"),
}


def sources_of(case: str, tmp_path: Path, hub: HubServer) -> list[str]:
    """A repository with the changes of a case, and a folder unless a name leads out of it."""
    special = {
        "pickle": pickle.dumps(Boom(tmp_path / "marker")),
        "code": BOMB.format(marker=tmp_path / "marker").encode(),
    }
    files = dict(good_files())
    for path, content in REFUSED[case][0].items():
        if isinstance(content, dict):
            content = json.dumps(json.loads(files[path]) | content).encode()
        files[path] = special.get(content, content) if isinstance(content, str) else content
    files = {path: content for path, content in files.items() if content is not None}
    hub.create("user/vdm", files)
    if any(".." in path or path.startswith("/") for path in files):
        return ["user/vdm"]
    for path, content in files.items():
        (tmp_path / "folder" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / path).write_bytes(content)
    return ["user/vdm", str(tmp_path / "folder")]


@pytest.mark.parametrize("case", REFUSED)
@in_client
def test_a_repository_with_code_pickles_or_damage_is_refused(hub: HubServer, tmp_path: Path, case: str):
    sources, cache = sources_of(case, tmp_path, hub), tmp_path / "cache"
    for source in sources:
        for trust in (False, True):
            with pytest.raises((ValueError, OSError), match=REFUSED[case][1]):
                VDMPipeline.from_pretrained(source, cache_dir=cache, trust_remote_code=trust)
        assert not (tmp_path / "marker").exists()
    # it is refused from the cache as well
    with pytest.raises((ValueError, OSError)):
        VDMPipeline.from_pretrained(sources[0], cache_dir=cache, local_files_only=True)
    fetched = {path.name for path in cache.rglob("*") if not path.is_dir()}
    assert not [name for name in fetched if name.endswith((".py", ".bin", ".pkl"))]
    assert "this" not in sys.modules and not list(tmp_path.rglob("evil*"))


@in_client
def test_code_and_pickles_beside_good_weights_are_not_fetched(hub: HubServer, tmp_path: Path):
    pipe, marker = hub_pipeline(), tmp_path / "marker"
    files = dict(good_files())
    code, pickled = BOMB.format(marker=marker).encode(), pickle.dumps(Boom(marker))
    index = json.loads(files["model_index.json"])
    # as a repository that also serves those without this package; and module paths of an older version
    index |= {"_class_name": ["pipeline", "VDMPipeline"], "unet": ["net", "VDMUNet2DModel"]}
    index |= {"scheduler": ["diffusers_vdm.old_schedulers", "VDMScheduler"]}
    extra = {"pipeline.py": code, "unet/net.py": code, "unet/diffusion_pytorch_model.bin": pickled, "run.pt": pickled}
    hub.create("user/vdm", files | extra | {"model_index.json": json.dumps(index).encode()})
    assert same_pipelines(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path / "cache"), pipe)
    names = {path.name for path in (tmp_path / "cache").rglob("*")}
    assert not marker.exists() and not [name for name in names if name.endswith((".py", ".bin", ".pt"))]
    # also where another program has fetched all of it
    folder = Path(snapshot_download("user/vdm", cache_dir=tmp_path / "cache"))
    assert (folder / "unet/net.py").exists()
    assert same_pipelines(VDMPipeline.from_pretrained(folder), pipe)
    assert same_pipelines(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path / "cache"), pipe)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"custom_pipeline": "clip_guided"}, "custom_pipeline must not be given"),
        ({"use_safetensors": False}, "use_safetensors must not be False"),
        ({"proxies": {"https": "x"}}, "HTTPS_PROXY"),
        ({"variant": "../x"}, "variant must consist of letters"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_refused(tmp_path, arguments, message):
    hub_pipeline().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        VDMPipeline.from_pretrained(tmp_path, **arguments)


@in_client
def test_names_and_repositories_that_are_no_pipeline_are_refused(hub: HubServer, tmp_path: Path):
    with pytest.raises(OSError, match="neither a local folder nor a valid Hub name"):
        VDMPipeline.from_pretrained("no spaces please")
    hub.create("user/unet", {"config.json": b"{}"})
    with pytest.raises(OSError, match="no model_index.json: it is not a pipeline"):
        VDMPipeline.from_pretrained("user/unet", cache_dir=tmp_path)


@in_client
def test_sharded_weights_are_loaded_and_must_be_complete(hub: HubServer, tmp_path: Path):
    pipe = hub_pipeline()
    pipe.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / UNET).unlink()
    pipe.unet.save_pretrained(tmp_path / "saved" / "unet", max_shard_size="5KB")
    shards = [path.name for path in (tmp_path / "saved" / "unet").glob("*-of-*.safetensors")]
    assert len(shards) > 1
    HfApi().create_repo("user/vdm")
    HfApi().upload_folder(repo_id="user/vdm", folder_path=tmp_path / "saved")
    for source in ("user/vdm", tmp_path / "saved"):
        assert same_pipelines(VDMPipeline.from_pretrained(source, cache_dir=tmp_path / "cache"), pipe)
    hub.repos["user/vdm"].write(**{f"unet/{shards[0]}": None})
    with pytest.raises(ValueError, match="which is not beside it"):
        VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path / "cache")
