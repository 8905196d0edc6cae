"""sharing/model_card.py: the card quotes measured numbers, its code and command run, and foreign text stays text."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from diffusers_vdm import LinearBetaScheduler, VDMPipeline, VDMScheduler
from diffusers_vdm.evaluation.rows import fingerprint
from diffusers_vdm.sharing.card_sections import training_command
from diffusers_vdm.sharing.markdown import one_line
from diffusers_vdm.sharing.measurements import data_name, data_name_from_text, last_part
from diffusers_vdm.sharing.model_card import is_made_here, load_quietly, model_card, save_model_card
from diffusers_vdm.training.description import RunDescription
from diffusers_vdm.training.metrics import append_metrics
from diffusers_vdm.training.options import option_names
from tests.models import curved_gamma, network, pipeline
from tests.running import run_example, run_python
from tests.sharing.nasty_text import NASTY, strangers

SMALL = (
    "--train_batch_size 8 --max_train_steps 2 --logging_steps 1 --eval_steps 0 --checkpointing_steps 0 --seed 3 "
    "--max_eval_images 20 --eval_samples 2 --num_images 4 --ddpm_num_inference_steps 5 --lr_warmup_steps 2 "
    "--logger none --no-learn_ends --ema_decays 0.9 0.99"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run of train.py."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    run_example("train.py", "--output_dir", folder, *SMALL.split())
    return folder


def saved(folder: Path, description: dict | None = None, lines: list[dict] = (), pipe=None) -> Path:
    """A folder with a saved pipeline, and what else a run leaves."""
    (pipe or pipeline(VDMScheduler.from_noise_schedule(curved_gamma()), curved_gamma())).save_pretrained(folder)
    if description is not None:
        (folder / "options.json").write_text(json.dumps(description))
    for line in lines:
        append_metrics(folder / "metrics.jsonl", line)
    return folder


def measured(step: int, bpd: float = 3.25, stderr: float | None = 0.0123, **more) -> dict:
    """A line of metrics with bits/dim, as train.py writes it."""
    terms = {"eval_prior_bpd": 0.25, "eval_reconstruction_bpd": 0.5, "eval_diffusion_bpd": bpd - 0.75}
    how = {"eval_num_images": 50, "eval_num_samples": 4, "eval_num_timesteps": None, "eval_weights": "ema"}
    return {"step": step, "train_bpd": 3.5, "eval_bpd": bpd, "eval_bpd_stderr": stderr} | terms | how | more


def description(**options) -> dict:
    """options.json of a run on a data set of the Hub."""
    given = {"dataset_name": "user/pictures", "train_split": "train", "eval_split": "test[:50]", "objective": "vdm"}
    given |= {"schedule": "learned", "max_train_steps": 6, "ema_decays": [0.99], "digits": False, "hub_token": None}
    data = {"name": "user/pictures, train", "images": 700, "fingerprint": "0123456789abcdef"}
    versions = {"torch": "2.13.0", "diffusers_vdm": "0.1.0"}
    return {"options": given | options, "data": data, "num_processes": 1, "versions": versions}


def report_of(folder: Path, **changes) -> dict:
    """A report of examples/evaluate.py on the pipeline in a folder, by every term of every image."""
    from diffusers_vdm import VDMPipeline

    weights = fingerprint(VDMPipeline.from_pretrained(folder).unet.state_dict().values())
    return {
        "model": "/home/alice/runs/x", "method": "vlb", "bpd": 3.0625, "stderr_bpd": 0.001234, "num_images": 1000,
        "diffusion_bpd": 2.5, "reconstruction_bpd": 0.5, "prior_bpd": 0.0625, "weights": "average (EMA)",
        "weights_fingerprint": weights, "dtype": "float32", "seed": 0, "num_steps": 250, "convention": "vdm",
        "clip_sample": False, "stderr_is_of": "the mean over the population of images",
        "data": {"name": "user/pictures, test", "fingerprint": "fedcba9876543210", "resolution": None},
        "table": [
            {"num_steps": 10, "bpd": 4.5, "stderr_bpd": 0.02, "num_samples": 20},
            {"num_steps": 20, "bpd": None, "stderr_bpd": 0.02, "num_samples": 20},
            {"num_steps": None, "bpd": 3.03125, "stderr_bpd": 0.01, "num_samples": 20},
        ],
    } | changes  # fmt: skip


def card_of(folder: Path, **arguments) -> str:
    return model_card(load_quietly(VDMPipeline, folder, arguments.get("variant")), folder, **arguments)


def save_card_of(folder: Path, **arguments) -> Path:
    return save_model_card(load_quietly(VDMPipeline, folder, arguments.get("variant")), folder, **arguments)


def results(card: str) -> dict:
    """The numbers in the metadata, by their names."""
    return {result.metric_name: result for result in ModelCard(card).data.eval_results or []}


def python_blocks(card: str) -> list[str]:
    return re.findall(r"^(`{3,})python\n(.*?)^\1$", card, flags=re.DOTALL | re.MULTILINE)


def code(card: str, number: int = 0) -> str:
    return python_blocks(card)[number][1]


# ---- what a run left ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_card(trained) -> str:
    return card_of(trained, repo_id="user/tiny", license="apache-2.0")


def test_the_metadata_of_a_run_name_the_library_the_task_and_the_license(trained_card):
    data = ModelCard(trained_card).data
    expected = ("diffusers", "unconditional-image-generation", "apache-2.0")
    assert (data.library_name, data.pipeline_tag, data.license) == expected
    assert data.datasets is None  # the digits are not on the Hub


def test_the_metadata_of_a_run_hold_its_last_evaluation(trained, trained_card):
    line = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    (result,) = ModelCard(trained_card).data.eval_results
    assert result.metric_value == line["eval_bpd"] and result.metric_args["stderr"] == line["eval_bpd_stderr"]
    assert result.metric_args["num_images"] == 297 and result.metric_args["num_draws"] == 2
    assert result.metric_args["step"] == 2 and result.metric_args["weights"] == "EMA 0.9"
    assert (result.dataset_name, result.dataset_split) == ("scikit-learn digits", "test")


@pytest.mark.parametrize("name", ["eval_bpd", "eval_bpd_ema_0.99", "eval_prior_bpd", "eval_diffusion_bpd"])
def test_the_text_quotes_the_metrics_of_a_run(trained, trained_card, name):
    line = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{line[name]:.4f}" in trained_card


def test_the_text_shows_the_pictures_and_names_data_and_versions(trained, trained_card):
    recorded = json.loads((trained / "options.json").read_text())
    pictures = ("samples.png", "schedule.png", "loss_by_gamma.png", "training.png", "denoising.gif")
    for text in (*(f"]({name})" for name in pictures), "continuous time", "297 images"):
        assert text in trained_card, text
    assert recorded["data"]["fingerprint"] in trained_card and recorded["versions"]["torch"] in trained_card


def test_the_same_folder_gives_the_same_card(trained, trained_card):
    assert card_of(trained, repo_id="user/tiny", license="apache-2.0") == trained_card


def test_the_command_of_the_card_asks_for_the_same_run(trained):
    from diffusers_vdm.commands.train_options import parse_options

    recorded = json.loads((trained / "options.json").read_text())
    assert "train_batch_size" in recorded["given"] and "learning_rate" not in recorded["given"]
    for record in ({name: value for name, value in recorded.items() if name != "given"}, recorded):
        command = training_command(RunDescription.from_json(record))
        words = shlex.split(command.replace("\\\n", " "))
        assert words[:3] == ["accelerate", "launch", "examples/train.py"]
        again = vars(parse_options("", [*words[3:], "--output_dir", "does-not-exist"]))
        named = option_names(in_card=True)
        # what the network itself says is filled in when it is built
        differ = {n for n in named if again[n] != recorded["options"].get(n)} - (
            {"dropout"} if "given" in record else set()
        )
        assert differ == set()
    assert len(words) < 30


def test_the_code_of_a_card_runs(trained, tmp_path):
    card = card_of(trained, repo_id=str(trained))
    block = code(card)
    assert len([line for line in block.splitlines() if line]) == 6 and "num_inference_steps=5" in block
    run_python("-c", block, cwd=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"sample-{i}.png" for i in range(4)]


def test_the_code_of_a_card_without_a_repository_runs_in_its_folder(tmp_path, monkeypatch):
    folder = saved(tmp_path / "model")
    card = card_of(folder)
    monkeypatch.chdir(folder)
    exec(code(card).replace("250", "2"), {})
    assert (folder / "sample-3.png").is_file() and "in this folder" in card


def test_the_card_of_a_pipeline_alone_has_no_numbers(tmp_path):
    folder = saved(tmp_path / "just a pipeline")
    card = card_of(folder)
    data = ModelCard(card).data
    assert data.eval_results is None and "model-index" not in card and data.license is None and data.datasets is None
    assert "bits/dim" not in card and "trained on" not in card and "accelerate launch" not in card
    assert "# just a pipeline" in card and "![" not in card and "register()" in card
    assert re.findall("^## .*", card, flags=re.MULTILINE) == ["## Use", "## Model and training"]


@pytest.mark.slow
def test_the_card_quotes_the_reports_of_evaluate(trained, tmp_path):
    for number, arguments in enumerate(("--num_samples 2 --table 3", "--method vlb --num_steps 5", "--method ode")):
        path = tmp_path / f"{number}.json"
        more = ["--rtol", 0.3, "--atol", 0.3] if "ode" in arguments else []
        run_example(
            "evaluate.py", "--model", trained, *arguments.split(), *more, "--split", "test[:6]", "--output", path
        )
        report, card = json.loads(path.read_text()), card_of(trained, report=path)
        found = ModelCard(card).data.eval_results
        values = {result.metric_value for result in found if result.metric_args["num_images"] == 6}
        assert values == {report["bpd"], *(row["bpd"] for row in report["table"])}
        assert "split test&#91;&#58;6&#93;" in card and report["weights_fingerprint"] in card


# ---- numbers -----------------------------------------------------------------------------------------------------


BY_TERMS = "bits/dim (variational bound, T = 250, every term)"
CONTINUOUS = "bits/dim (variational bound, continuous time)"  # in the report, and in training on other images


@pytest.fixture
def card_with_report(tmp_path) -> str:
    """The card of a run with a report, and with an evaluation in training."""
    folder = saved(tmp_path / "m", description(), [measured(6)])
    (folder / "report.json").write_text(json.dumps(report_of(folder)))
    for name in ("report_histogram.png", "samples.png"):
        (folder / name).write_bytes(b"")
    return card_of(folder)


def test_the_metadata_hold_each_number_of_a_report(card_with_report):
    found = results(card_with_report)
    assert {name: result.metric_value for name, result in found.items() if name != CONTINUOUS} == {
        BY_TERMS: 3.0625,
        "bits/dim (variational bound, T = 10)": 4.5,
    }
    limits = [r for r in ModelCard(card_with_report).data.eval_results if r.metric_name == CONTINUOUS]
    assert [(r.metric_value, r.dataset_split) for r in limits] == [(3.03125, "test"), (3.25, "test[:50]")]


def test_the_metadata_say_how_and_on_what_a_number_was_measured(card_with_report):
    main = results(card_with_report)[BY_TERMS]
    assert main.metric_args["stderr"] == 0.001234 and main.metric_args["num_steps"] == 250
    assert main.metric_args["stderr_is_of"] == "the mean over the population of images"
    assert main.metric_args["diffusion_bpd"] == 2.5
    assert main.metric_args["data_fingerprint"].endswith("fedcba9876543210")
    assert (main.dataset_type, main.dataset_name, main.dataset_split) == ("user/pictures", "user/pictures", "test")
    assert ModelCard(card_with_report).data.datasets == ["user/pictures"]


def test_the_metadata_are_read_by_the_client_of_the_hub(card_with_report):
    raw = yaml.safe_load(card_with_report.split("---\n")[1])["model-index"]
    assert model_index_to_eval_results(raw)[1] == ModelCard(card_with_report).data.eval_results


def test_the_text_quotes_the_numbers_with_their_errors_and_images(card_with_report):
    card = card_with_report
    assert "3.0625 ± 0.0012" in card and "4.5000 ± 0.0200" in card and "T = 20" not in card
    assert "(report_histogram.png)" in card and "alice" not in card
    assert "50 of user/pictures, test&#91;&#58;50&#93;" in card  # the images of the evaluation in training


def test_the_card_names_the_ode_and_its_dequantization(tmp_path):
    folder = saved(tmp_path / "m")
    ode = {"method": "ode", "num_steps": None, "dequantization": "truncated_normal", "rtol": 1e-5, "table": []}
    (folder / "r.json").write_text(json.dumps(report_of(folder, **ode)))
    card = card_of(folder, report=folder / "r.json")
    (result,) = results(card).values()
    assert result.metric_name == "bits/dim (probability-flow ODE, truncated-normal dequantization)"
    assert result.metric_args["rtol"] == 1e-5 and "num_steps" not in result.metric_args
    assert "continuous time" not in card and "rtol 1e-05" in card


def test_the_card_describes_a_ddpm(tmp_path):
    pipe = pipeline(LinearBetaScheduler(num_train_timesteps=100))
    options = {"objective": "ddpm", "schedule": "linear_beta", "ddpm_num_inference_steps": 250, "gamma_min": -13.3}
    line = measured(6, eval_num_timesteps=99, eval_weights="raw") | {"train_mse": 0.0321}
    del line["train_bpd"]
    folder = saved(tmp_path / "m", description(**options), [line], pipe)
    card = card_of(folder)
    assert "A DDPM (" in card and "linear betas" in card and "0.0321 squared error" in card and "raw" in card
    assert "num_inference_steps=100," in card and "ddpm" in ModelCard(card).data.tags
    assert "gamma_min" not in card and list(results(card)) == ["bits/dim (variational bound, T = 99)"]
    # the bound of a checkpoint of diffusers' own is in another convention
    changes = {"convention": "ddpm", "clip_sample": True, "num_steps": 100, "table": []}
    (folder / "report.json").write_text(json.dumps(report_of(folder, **changes)))
    card = card_of(folder)
    assert "bits/dim (variational bound, T = 100, every term, DDPM's convention, clipped x̂)" in results(card)
    assert "discretized Gaussian" in card


def test_a_bound_with_the_best_variance_is_named_with_its_calibration(tmp_path):
    folder = saved(tmp_path / "m")
    calibration = {
        "detail": "pixel",
        "num_gammas": 65,
        "num_images": 300,
        "num_draws": 1,
        "data": "/home/alice/faces, train",
    }
    more = {"variance_type": "optimal", "timesteps": [900.0, 400.0], "calibration": calibration, "num_steps": 2}
    (folder / "report.json").write_text(json.dumps(report_of(folder, **more)))
    card = card_of(folder)
    name = "bits/dim (variational bound, T = 2, every term, best variance, chosen timesteps)"
    assert results(card)[name].metric_args["calibration"] == "300 images of faces, split train, for each pixel"
    assert "calibration 300 images of faces, split train, for each pixel" in card and "alice" not in card


@pytest.mark.parametrize(
    ("lines", "total"),
    [
        ([measured(4), {"step": 6, "train_bpd": 3.4}], 6),  # the run went on
        ([measured(4)], 6),  # and was to
        ([measured(4), measured(6, float("nan"))], 6),
    ],
)
def test_a_number_of_an_earlier_step_is_not_in_the_metadata(tmp_path, lines, total):
    folder = saved(tmp_path / "m", description(max_train_steps=total), lines)
    card = card_of(folder)
    assert results(card) == {} and "3.2500" in card and "nan" not in card.lower()
    assert "Measured at step 4; the weights here may be from another step." in card


@pytest.mark.parametrize(("step", "claimed"), [(22, 1), (20, 0)])
def test_the_last_step_of_a_run_is_known_from_its_epochs(tmp_path, step, claimed):
    recorded_run = description(max_train_steps=None, num_epochs=2) | {"global_batch_size": 64}  # 700 images, 22 steps
    card = card_of(saved(tmp_path / "m", recorded_run, [measured(step)]))
    assert len(results(card)) == claimed


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "3.1", True, [1]])
def test_values_that_are_not_numbers_are_not_quoted(tmp_path, bad):
    lines = [measured(6) | {"eval_bpd": bad}, ["no", "line"], {"step": "six"}]
    folder = saved(tmp_path / "m", description(), lines)
    report = report_of(folder, bpd=bad, table=[{"num_steps": 10, "bpd": bad}, bad])
    (folder / "report.json").write_text(json.dumps(report))
    card = card_of(folder)
    assert "## Likelihood" not in card and results(card) == {}
    report = report_of(folder, stderr_bpd=bad, prior_bpd=bad, num_images=bad, table=bad)
    (folder / "report.json").write_text(json.dumps(report))
    (result,) = results(card_of(folder)).values()
    assert not {"stderr", "stderr_is_of", "prior_bpd", "num_images"} & set(result.metric_args)


def test_images_that_were_trained_on_are_named(tmp_path):
    folder = saved(tmp_path / "m", description() | {"histogram_bpd": 6.5})
    data = {"name": "user/pictures, train", "fingerprint": "0123456789abcdef"}
    (folder / "report.json").write_text(json.dumps(report_of(folder, data=data)))
    assert "**These are the images that the model was trained on.**" in card_of(folder)
    held_out = {"name": "user/pictures, test", "images": 50, "fingerprint": "aa", "shared_with_training": 7}
    more = {"held_out": held_out, "histogram_bpd": 6.5, "device": "NVIDIA H200", "total_steps": 6}
    folder = saved(tmp_path / "n", description(max_train_steps=None) | more, [measured(6)])
    card = card_of(folder)
    assert "**7 of these images are also training images.**" in card
    assert "give 6.5000" in card and "NVIDIA H200" in card and len(results(card)) == 1


# ---- what is refused and left out --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights_fingerprint": "00"}, "in the folder, whose weights_fingerprint is .* got 00"),
        ({"gammas_fingerprint": "00"}, "in the folder, whose gammas_fingerprint is .* got 00"),
        ({"num_levels": 3}, "in the folder, whose num_levels is .* got 3"),
        ('{"bpd": 1.0}', "report must be what examples/evaluate.py writes"),
        ("{", "is not JSON"),
    ],
    ids=["weights", "gammas", "levels", "no report", "no JSON"],
)
def test_a_report_of_other_weights_is_refused_and_not_quoted(tmp_path, content, message):
    folder = saved(tmp_path / "m")
    path = folder / "report.json"
    path.write_text(content if isinstance(content, str) else json.dumps(report_of(folder, **content)))
    with pytest.raises(ValueError, match=message):
        card_of(folder, report=path)
    assert "## Likelihood" not in card_of(folder)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"license": "Apache 2.0\n"}, ValueError, "license must be an identifier"),
        ({"datasets": "a b"}, ValueError, "datasets must be names"),
        ({"datasets": ["../x/y"]}, ValueError, "datasets must be names"),
        ({"repo_id": " "}, ValueError, "repo_id must not be empty"),
        ({"repo_id": 3}, TypeError, "repo_id must be a str"),
    ],
    ids=["license", "data set", "data sets", "empty name", "number"],
)
def test_wrong_arguments_are_refused(tmp_path, arguments, error, message):
    folder = saved(tmp_path / "m")
    with pytest.raises(error, match=message):
        card_of(folder, **arguments)


def test_folders_without_a_pipeline_are_refused(tmp_path):
    with pytest.raises(ValueError, match="folder must contain a saved pipeline"):
        card_of("user/not-a-folder")
    with pytest.raises(OSError, match="it is not a pipeline"):
        card_of(tmp_path)


def test_a_card_is_written_whole_and_does_not_replace_a_foreign_readme(tmp_path):
    folder = saved(tmp_path / "m")
    path = save_card_of(folder, repo_id="user/m")
    first = path.read_bytes()
    assert path == folder / "README.md" and first.decode() == card_of(folder, repo_id="user/m")
    assert save_card_of(folder, repo_id="user/m").read_bytes() == first  # a second push makes no commit
    assert is_made_here(first.decode()) and not [p for p in folder.iterdir() if p.name.endswith(".tmp")]
    path.write_text("# by hand")
    with pytest.raises(ValueError, match="was not made by save_model_card"):
        save_card_of(folder)
    assert path.read_text() == "# by hand"
    save_card_of(folder, overwrite=True)
    assert is_made_here(path.read_text(encoding="utf-8"))


def test_a_card_holds_no_local_paths_and_no_tokens(tmp_path):
    home = "/home/alice/secret project"
    options = {
        "dataset_name": None, "train_data_dir": f"{home}/faces/", "model_config_name_or_path": f"{home}/unet.json",
        "output_dir": f"{home}/runs", "cache_dir": f"{home}/cache", "resume_from_checkpoint": f"{home}/c",
        "hub_token": "hf_abcdefghijklmnopqrstuvwxyz", "image_column": "hf_abcdefghijklmnopqrstuvwxyz",
        "logging_dir": f"{home}/logs", "schedule": "fixed_linear",
    }  # fmt: skip
    recorded_run = description(**options) | {"data": {"name": f"{home}/faces/, train", "images": 7}}
    folder = saved(tmp_path / "m", recorded_run, [measured(6)])
    data = {"name": f"{home}/faces, test", "fingerprint": "fe"}
    (folder / "report.json").write_text(json.dumps(report_of(folder, data=data)))
    card = card_of(folder)
    for word in ("alice", "secret", "hf_abc", "/runs", "cache"):
        assert word not in card, word
    assert "--train_data_dir faces " in card and "--model_config_name_or_path unet" in card
    assert "trained on faces." in card and ModelCard(card).data.datasets is None


@pytest.mark.parametrize(
    "name", ["C:\\Users\\alice\\faces, train", "~/faces, train", "../a/faces", "a/b/faces, t, streamed, 9 images"]
)
def test_a_local_data_set_is_named_by_the_last_part_of_its_path(name):
    assert data_name_from_text(name).name == "faces"


def test_a_data_set_of_the_hub_keeps_its_name():
    assert data_name_from_text("user/faces, train").name == "user/faces"


def test_the_command_names_a_local_folder_by_the_last_part_of_its_path():
    assert "--train_data_dir faces" in training_command(
        RunDescription(options={"train_data_dir": "mine/faces", "preset": "x"})
    )


def test_paths_without_a_last_part_have_no_name():
    assert last_part("/") == "" and last_part("a\n/b/c") == "c"
    assert data_name_from_text("/, x").name == "a folder" and data_name(None) is None


# ---- other kinds of models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("null_class", [True, False])
def test_the_code_of_a_class_conditional_model_runs(tmp_path, monkeypatch, null_class):
    from diffusers_vdm import VDMPipeline

    pipe = VDMPipeline(network(num_class_embeds=3, null_class=null_class), VDMScheduler())
    folder = saved(tmp_path / "m", description(ddpm_num_inference_steps=2), pipe=pipe)
    card = card_of(folder, repo_id=str(folder))
    monkeypatch.chdir(tmp_path)
    exec(code(card), {})
    assert (tmp_path / "sample-3.png").is_file() and "classes in [0, 3)" in card
    assert "class-conditional" in ModelCard(card).data.tags


def test_a_card_offers_trust_remote_code_where_code_is_saved(tmp_path):
    remote_code = pytest.importorskip("diffusers_vdm.sharing.remote_code")
    folder = saved(tmp_path / "m")
    assert len(python_blocks(card_of(folder))) == 1
    remote_code.save_code(folder)
    card = card_of(folder, repo_id=str(folder))
    assert "trust_remote_code=True" in code(card, 1) and "register()" not in card
    program = code(card, 1) + "\nprint(type(pipe).__module__)"
    done = run_python("-c", program, environment={"HF_MODULES_CACHE": str(tmp_path / "c")})
    assert "diffusers_modules" in done.stdout


def test_the_code_of_a_card_loads_its_variant(tmp_path):
    folder = tmp_path / "m"
    pipeline().to(torch.float16).save_pretrained(folder, variant="fp16")
    assert 'variant="fp16")' in code(card_of(folder, variant="fp16"))


# ---- foreign text -------------------------------------------------------------------------------------------


def nasty_folder(folder: Path, text: str, pipe) -> Path:
    """A folder whose every text is `text`."""
    recorded_run = description(
        dataset_name=None, train_data_dir=text, train_split=text, eval_split=text, lr_scheduler=text
    )
    recorded_run["options"] |= {text: text, "image_column": [text, text], "allow_tf32": text, "mixed_precision": text}
    recorded_run["data"] |= {"name": text, "fingerprint": text, "images": text}
    recorded_run |= {"versions": {text: text}, "device": text, "global_batch_size": text}
    held_out = {"name": text, "fingerprint": text}
    saved(
        folder,
        recorded_run | {"held_out": held_out},
        [measured(6, eval_weights=text, **{f"eval_bpd_ema_{text}": 1.5})],
        pipe,
    )
    changes = {"weights": text, "stderr_is_of": text, "dtype": text, "variance_type": text, "model": text}
    report = report_of(folder, **changes, data={"name": f"{text}, {text}", "fingerprint": text})
    (folder / f"{text.replace('/', '')[:20].encode('ascii', 'ignore').decode()}.json".replace("\0", "")).write_text("")
    (folder / "report.json").write_text(json.dumps(report))
    for name in ("samples.png", "schedule.png", "report_histogram.png"):
        (folder / name).write_bytes(b"")
    return folder


def test_foreign_text_does_not_change_the_structure_of_a_card(tmp_path):
    markdown_it = pytest.importorskip("markdown_it")
    parser = markdown_it.MarkdownIt("commonmark").enable("table")
    pipe = pipeline()
    plain = None
    texts = ["word", *(text for text in strangers(1)[: len(NASTY) + 30] if one_line(text))]
    for number, text in enumerate(texts):
        folder = nasty_folder(tmp_path / str(number), text, pipe)
        card = card_of(folder, repo_id=text)
        data = ModelCard(card).data
        assert set(data.to_dict()) == {"library_name", "pipeline_tag", "tags", "model-index"}, text
        assert {result.metric_value for result in data.eval_results} >= {3.0625, 4.5, 3.03125}
        assert all(isinstance(result.dataset_name, str) for result in data.eval_results)
        assert ast.parse(code(card)).body[2].value.args[0].value == text
        tokens = parser.parse(ModelCard(card).text)
        shape = [(token.type, token.tag, token.level) for token in tokens]
        inline = [child for token in tokens for child in token.children or []]
        kinds = {child.type for child in inline}
        targets = [child.attrs.get("href") or child.attrs.get("src") for child in inline if child.attrs]
        plain = plain or (shape, kinds, targets)
        assert (shape, kinds, targets) == plain, text  # nothing but the words differs
        title = next(token for token in tokens if token.type == "inline").children[0].content
        assert title == (one_line(last_part(text.split("/")[-1]), 96) or str(number)), text


def test_odd_names_of_folders_and_files(tmp_path):
    folder = saved(tmp_path / "a`b <i> [x](y) #1")
    (folder / "my (odd) %#.json").write_text(json.dumps(report_of(folder)))
    (folder / "my (odd) %#_histogram.png").write_bytes(b"")
    card = card_of(folder, report=folder / "my (odd) %#.json")
    assert "](my%20%28odd%29%20%25%23_histogram.png)" in card
    assert "# a&#96;b &#60;i&#62; &#91;x&#93;(y) &#35;1" in card
    (tmp_path / "report.json").write_text(json.dumps(report_of(folder)))
    assert "_histogram" not in card_of(folder, report=tmp_path / "report.json")  # not within the repository
