"""sharing/publish.py: `push_to_hub` pushes a card, the numbers of these weights, and code on request."""

import json
import time
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

from diffusers_vdm import VDMPipeline, VDMScheduler
from diffusers_vdm.sharing.model_card import is_made_here
from tests.hub_client import changed_pipeline, files_at, hub_pipeline, in_client, same_pipelines
from tests.hub_server import HubServer
from tests.models import sample


def a_run(folder: Path, pipe: VDMPipeline) -> Path:
    """A folder as train.py leaves one."""
    pipe.save_pretrained(folder)
    line = {"step": 2, "eval_bpd": 1.5, "eval_bpd_stderr": 0.25, "eval_num_images": 7, "eval_num_samples": 3,
            "eval_weights": "ema", "eval_ema_decay": 0.5, "eval_num_timesteps": None}  # fmt: skip
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    description = {"options": {"eval_split": "test", "max_train_steps": 2}, "total_steps": 2, "given": []}
    description |= {"data": {"name": "faces", "images": 9, "fingerprint": "f"}, "versions": {"torch": "2"}}
    description |= {"held_out": {"name": "faces", "images": 7, "fingerprint": "g"}}
    (folder / "options.json").write_text(json.dumps(description))
    (folder / "samples.png").write_bytes(b"png")
    for name in ("private-photo.png", "report-private.json", "ema_private/private.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("private")
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "state.json").write_text("{}")
    return folder


@in_client
def test_a_card_is_pushed_with_the_weights(hub: HubServer, tmp_path: Path):
    hub_pipeline().push_to_hub("user/vdm", license="mit", commit_message="mine")
    files = files_at(hub)
    assert "vdm_code" not in str(sorted(files)) and hub.repos["user/vdm"].at("main").title == "mine"
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit" and card.data.library_name == "diffusers" and card.data.eval_results is None
    assert 'VDMPipeline.from_pretrained("user/vdm")' in card.text
    commits = len(hub.repos["user/vdm"].commits)
    hub_pipeline().push_to_hub("user/vdm", license="mit")
    assert len(hub.repos["user/vdm"].commits) == commits, "the same again is no commit"


@in_client
def test_the_numbers_of_a_run_are_pushed_with_its_weights(hub: HubServer, tmp_path: Path):
    run = a_run(tmp_path / "run", hub_pipeline())
    loaded = VDMPipeline.from_pretrained(run)
    loaded.push_to_hub("vdm", run_dir=run)
    files = files_at(hub)
    assert {"metrics.jsonl", "options.json", "samples.png"} <= set(files)
    assert not [name for name in files if "checkpoint" in name or "private" in name]
    assert str(tmp_path).encode() not in b"".join(files.values()), "no local path is pushed"
    (result,) = ModelCard(files["README.md"].decode()).data.eval_results
    assert result.metric_value == 1.5 and result.metric_args["stderr"] == 0.25
    assert same_pipelines(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path / "cache"), loaded)


@pytest.mark.parametrize("change", ["weights", "gamma", "levels"])
@in_client
def test_the_numbers_of_a_run_are_not_pushed_with_another_pipeline(hub: HubServer, tmp_path: Path, change: str):
    run = a_run(tmp_path / "run", hub_pipeline())
    VDMPipeline.from_pretrained(run).push_to_hub("user/vdm", run_dir=run)
    before, pipe = files_at(hub), VDMPipeline.from_pretrained(run)
    if change == "weights":
        with torch.no_grad():
            pipe.unet.conv_in.bias.add_(1.0)
    elif change == "gamma":
        pipe.scheduler = VDMScheduler(gamma_min=-2.0, gamma_max=1.0)  # its γ is in JSON alone
    else:
        pipe.register_to_config(num_levels=256)
    with pytest.raises(ValueError, match="run_dir must be the folder that this pipeline was loaded from"):
        pipe.push_to_hub("user/vdm", run_dir=run)
    assert files_at(hub) == before


@in_client
def test_a_run_is_pushed_as_a_variant(hub: HubServer, tmp_path: Path):
    run = a_run(tmp_path / "run", hub_pipeline())
    VDMPipeline.from_pretrained(run).push_to_hub("user/half", run_dir=run, variant="half")
    files = files_at(hub, name="user/half")
    assert "unet/diffusion_pytorch_model.half.safetensors" in files
    assert "unet/diffusion_pytorch_model.safetensors" not in files


@pytest.mark.parametrize("place", ["nothing", "."], ids=["missing", "no run"])
@in_client
def test_a_folder_without_a_run_is_refused(hub: HubServer, tmp_path: Path, place: str):
    run = a_run(tmp_path / "run", hub_pipeline())
    with pytest.raises(FileNotFoundError, match="has no model_index.json"):
        VDMPipeline.from_pretrained(run).push_to_hub("user/vdm", run_dir=tmp_path / place)
    assert not hub.repos


@in_client
def test_an_edited_card_is_not_replaced(hub: HubServer, tmp_path: Path):
    hub_pipeline().push_to_hub("user/vdm")
    card = files_at(hub)["README.md"].decode()
    assert is_made_here(card)
    hub_pipeline().push_to_hub("user/vdm", license="mit")
    assert b"license: mit" in files_at(hub)["README.md"], "one that was made is made anew"
    for edited in ("# mine\n", card.replace("# vdm", "# My own"), card + "More.\n"):
        hub.repos["user/vdm"].write(**{"README.md": edited.encode()})
        changed_pipeline().push_to_hub("user/vdm", license="apache-2.0")
        assert files_at(hub)["README.md"].decode() == edited
    # where it cannot be read, nothing is written over it
    hub.fault("HEAD", r"README\.md", status=500, times=9)
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(OSError, match="could not check whether README.md of .* was edited"),
    ):
        patch.setattr(time, "sleep", lambda seconds: None)
        hub_pipeline().push_to_hub("user/vdm")
    hub.faults.clear()
    assert files_at(hub)["README.md"].decode() == edited
    assert same_pipelines(VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path / "cache"), changed_pipeline())


@in_client
def test_code_is_pushed_on_request(hub: HubServer, tmp_path: Path):
    pipe = hub_pipeline()
    pipe.push_to_hub("user/vdm", include_code=True)
    files = files_at(hub)
    code = sorted(name for name in files if name.endswith(".py"))
    assert len(code) == 4 and "trust_remote_code=True" in files["README.md"].decode()
    ours = VDMPipeline.from_pretrained("user/vdm", cache_dir=tmp_path / "cache")
    assert same_pipelines(ours, pipe) and not list((tmp_path / "cache").rglob("*.py"))
    theirs = DiffusionPipeline.from_pretrained("user/vdm", trust_remote_code=True, cache_dir=tmp_path / "theirs")
    assert type(theirs) is not VDMPipeline and torch.equal(
        sample(theirs), sample(VDMPipeline.from_pretrained("user/vdm"))
    )
    # what no longer belongs to it does not stay
    pipe.push_to_hub("user/vdm")
    assert not [name for name in files_at(hub) if name.endswith(".py")]
    # what was loaded by its code is pushed by diffusers, which knows no cards of ours
    assert type(theirs).push_to_hub is DiffusionPipeline.push_to_hub


@in_client
def test_a_pull_request_leaves_the_main_branch(hub: HubServer, tmp_path: Path):
    hub_pipeline().push_to_hub("user/vdm")
    before = files_at(hub)
    changed_pipeline().push_to_hub("user/vdm", create_pr=True, private=False)
    assert files_at(hub) == before
    assert same_pipelines(
        VDMPipeline.from_pretrained("user/vdm", revision="refs/pr/1", cache_dir=tmp_path / "c"), changed_pipeline()
    )


REFUSED = {
    "safe_serialization": ({"safe_serialization": False}, ValueError, "safe_serialization must be True"),
    "subfolder": ({"subfolder": "older"}, ValueError, "subfolder must not be given"),
    "license": ({"license": "My License!"}, ValueError, "license must be an identifier"),
    "unknown token": ({"token": "hf_wrong"}, OSError, "hf auth login"),
    "token of another": ({"token": "hf_other"}, OSError, "cannot be written to"),
}


@pytest.mark.parametrize("case", REFUSED)
@in_client
def test_a_refused_push_changes_nothing(hub: HubServer, tmp_path: Path, case: str):
    arguments, error, message = REFUSED[case]
    hub_pipeline().push_to_hub("user/vdm")
    before = files_at(hub)
    with pytest.raises(error, match=message):
        changed_pipeline().push_to_hub("user/vdm", **arguments)
    assert files_at(hub) == before and list(hub.repos) == ["user/vdm"]


@pytest.mark.parametrize("arguments", [{"license": "MIT"}, {"variant": "a.b"}], ids=lambda a: next(iter(a)))
@in_client
def test_a_refused_push_creates_no_repository(hub: HubServer, tmp_path: Path, arguments: dict):
    with pytest.raises(ValueError, match="license|variant"):
        hub_pipeline().push_to_hub("user/new", **arguments)
    assert not hub.repos


@in_client
def test_a_name_that_the_hub_does_not_allow_is_refused(hub: HubServer, tmp_path: Path):
    with pytest.raises(OSError, match="must be a name that the Hub allows"):
        hub_pipeline().push_to_hub("a/b/c")
    assert not hub.repos


@in_client
def test_a_pipeline_in_a_subfolder_is_not_loaded(hub: HubServer, tmp_path: Path):
    hub_pipeline().push_to_hub("user/vdm")
    with pytest.raises(ValueError, match="subfolder must not be given, got 'unet'"):
        VDMPipeline.from_pretrained("user/vdm", subfolder="unet")
