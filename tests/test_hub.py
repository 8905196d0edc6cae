"""The Hub, both ways: the real `huggingface_hub` client against a Hub on 127.0.0.1 (`hub_server.py`).

The client reads HF_ENDPOINT and the like when it is imported, so these tests run in one process of their own, which holds
both the Hub and the client: a test marked `in_client` is called there by name.
"""

import functools
import inspect
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import hub_server
import pytest
import torch
from hub_server import HubServer
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub import errors as hub_errors


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
            warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)  # between the client and httpx2
            monkeypatch.setenv("HF_TOKEN", "hf_user")
            globals()[name].__wrapped__(hub_server.HUB, *arguments, **keywords)
    except BaseException:
        raise AssertionError(f"in the client's process:\n{traceback.format_exc()}") from None


def in_client(test: Callable) -> Callable:
    """For a test `f(hub, tmp_path, **parameters)`: it runs in the client's process, as "user", with a Hub without repos."""

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


# ---- the Hub of these tests is one to the real client ------------------------------------------------------------------


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
