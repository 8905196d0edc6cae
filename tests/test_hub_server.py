"""hub_server.py: the Hub of these tests is one to the real `huggingface_hub` client."""

import os
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub import errors as hub_errors

from tests.hub_client import in_client
from tests.hub_server import HubServer


@in_client
def test_repositories_are_created_once_and_under_ones_own_name(hub: HubServer, tmp_path: Path):
    api = HfApi()
    assert api.whoami()["name"] == "user"
    assert api.create_repo("thing", private=True).repo_id == "user/thing"
    assert api.create_repo("thing", exist_ok=True).repo_id == "user/thing"
    with pytest.raises(hub_errors.HfHubHTTPError, match="409"):
        api.create_repo("thing")
    with pytest.raises(hub_errors.HfHubHTTPError, match="403"):
        api.create_repo("other/thing")


def uploaded(folder: Path) -> tuple[HfApi, object]:
    """A private repository of two files, one of which is LFS: the client and its commit."""
    api = HfApi()
    api.create_repo("thing", private=True)
    (folder / "unet").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nhello")
    (folder / "unet" / "weights.safetensors").write_bytes(os.urandom(5000))
    return api, api.upload_folder(repo_id="user/thing", folder_path=folder)


@in_client
def test_a_folder_is_uploaded_and_files_that_are_there_are_not_sent_again(hub: HubServer, tmp_path: Path):
    api, first = uploaded(tmp_path)
    assert first.oid == hub.repos["user/thing"].refs["main"]
    puts = len([1 for method, *_ in hub.log if method == "PUT"])
    assert puts == 1
    api.upload_folder(repo_id="user/thing", folder_path=tmp_path)
    assert len([1 for method, *_ in hub.log if method == "PUT"]) == 1


@in_client
def test_files_are_listed_with_their_sizes_and_downloaded(hub: HubServer, tmp_path: Path):
    source = tmp_path / "source"
    api, _ = uploaded(source)
    info = api.model_info("user/thing", files_metadata=True)
    assert {s.rfilename for s in info.siblings} == {".gitattributes", "README.md", "unet/weights.safetensors"}
    assert info.private and {s.rfilename: s.size for s in info.siblings}["unet/weights.safetensors"] == 5000
    got = Path(snapshot_download("user/thing", cache_dir=tmp_path / "cache"))
    assert (got / "unet/weights.safetensors").read_bytes() == (source / "unet/weights.safetensors").read_bytes()
    assert got.name == info.sha


@in_client
def test_branches_tags_pull_requests_and_commits_have_their_own_files(hub: HubServer, tmp_path: Path):
    source = tmp_path / "source"
    api, first = uploaded(source)
    api.create_branch("user/thing", branch="next")
    api.create_tag("user/thing", tag="v1")
    api.upload_file(path_or_fileobj=b"new", path_in_repo="README.md", repo_id="user/thing", revision="next")
    pull = api.upload_file(path_or_fileobj=b"pr", path_in_repo="README.md", repo_id="user/thing", create_pr=True)
    assert pull.pr_num == 1
    for revision, text in {"next": "new", "refs/pr/1": "pr", first.oid: (source / "README.md").read_text()}.items():
        path = hf_hub_download("user/thing", "README.md", revision=revision, cache_dir=tmp_path / "cache")
        assert Path(path).read_text() == text
    assert [b.name for b in api.list_repo_refs("user/thing").branches] == ["main", "next", "v1"]


@in_client
def test_a_deleted_file_is_gone_and_its_commit_is_in_the_history(hub: HubServer, tmp_path: Path):
    api, _ = uploaded(tmp_path)
    api.create_branch("user/thing", branch="next")
    api.upload_file(path_or_fileobj=b"new", path_in_repo="README.md", repo_id="user/thing", revision="next")
    api.delete_file("README.md", "user/thing", revision="next")
    assert not api.file_exists("user/thing", "README.md", revision="next")
    assert len(api.list_repo_commits("user/thing", revision="next")) == 4


@in_client
def test_a_commit_on_another_parent_than_the_head_is_refused(hub: HubServer, tmp_path: Path):
    api, _ = uploaded(tmp_path)
    with pytest.raises(hub_errors.HfHubHTTPError, match="412"):
        api.upload_file(path_or_fileobj=b"", path_in_repo="x", repo_id="user/thing", parent_commit="0" * 40)


@pytest.mark.parametrize(("token", "error"), [(False, "401"), ("hf_other", "404"), ("hf_wrong", "401")])
@in_client
def test_a_private_repository_is_hidden_from_others(hub: HubServer, tmp_path: Path, token: str, error: str):
    uploaded(tmp_path)
    with pytest.raises(hub_errors.HfHubHTTPError, match=error):
        HfApi(token=token).model_info("user/thing")


@in_client
def test_a_download_that_was_cut_continues_where_it_was(hub: HubServer, tmp_path: Path):
    data = os.urandom(12_000_000)  # the client writes 10 MB at a time
    hub.create("user/thing", {"a.safetensors": data})
    hub.fault("GET", "/cdn/", cut=11_000_000)
    try:
        path = Path(hf_hub_download("user/thing", "a.safetensors", cache_dir=tmp_path))
    except OSError:  # the oldest client raises it, and continues in the next call
        path = Path(hf_hub_download("user/thing", "a.safetensors", cache_dir=tmp_path))
    assert path.read_bytes() == data
    assert [status for method, path, status in hub.log if "/cdn/" in path and method == "GET"] == [0, 206]


@in_client
def test_the_client_believes_false_content_and_headers(hub: HubServer, tmp_path: Path):
    hub.create("user/thing", {"b.txt": b"text"})
    hub.fault("GET", "b.txt", body=lambda data: b"TEXT", headers={"ETag": '"1234"'})
    path = Path(hf_hub_download("user/thing", "b.txt", cache_dir=tmp_path))
    assert path.read_bytes() == b"TEXT"


@in_client
def test_files_and_revisions_that_do_not_exist_have_errors_of_their_own(hub: HubServer, tmp_path: Path):
    hub.create("user/thing", {"b.txt": b"text"})
    with pytest.raises(hub_errors.EntryNotFoundError):
        hf_hub_download("user/thing", "c.txt", cache_dir=tmp_path)
    with pytest.raises(hub_errors.RevisionNotFoundError):
        hf_hub_download("user/thing", "b.txt", revision="nowhere", cache_dir=tmp_path)
