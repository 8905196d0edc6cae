"""sharing/remote_code.py: pipelines that diffusers loads by the code beside their weights, without this package.

The loading is done once, in a fresh Python that cannot import the package, from folders and from a Hub on 127.0.0.1.
"""

import ast
import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.utils import dynamic_modules_utils
from safetensors.torch import load_file

import diffusers_vdm
from diffusers_vdm import FixedLinearGamma, LinearBetaGamma, LinearBetaScheduler, VDMPipeline, VDMScheduler
from diffusers_vdm.repository import INDEX
from diffusers_vdm.sharing.remote_code import code, save_code
from tests.hub_server import HubServer
from tests.models import curved_gamma, pipeline
from tests.paths import ROOT, contents
from tests.running import run_python
from tests.text_models import text_pipeline

# diffusers 0.35.1 runs the code of a folder without asking
ASKS_FOR_FOLDERS = "trust_remote_code" in inspect.signature(dynamic_modules_utils.get_cached_module_file).parameters


def made(kind: str) -> VDMPipeline:
    """A small pipeline that draws images of noise."""
    if kind == "learned":
        return pipeline(VDMScheduler.from_noise_schedule(curved_gamma()), curved_gamma(), num_levels=17)
    if kind == "linear betas":
        return pipeline(LinearBetaScheduler(50), LinearBetaGamma(50))
    if kind == "texts":
        return text_pipeline()
    if kind == "UNet2DModel":
        return pipeline(VDMScheduler(), cls=UNet2DModel)
    return pipeline({"fixed": VDMScheduler, "DDIMScheduler": lambda: DDIMScheduler(clip_sample=False)}[kind]())


KINDS = ["learned", "fixed", "linear betas", "DDIMScheduler", "UNet2DModel", "texts"]


def saved(folder: Path, kind: str = "learned") -> Path:
    made(kind).save_pretrained(folder)
    return folder


def drawn(pipe) -> dict[str, torch.Tensor]:
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    latents = pipe(num_inference_steps=4, generator=torch.Generator().manual_seed(7), output_type="latent").images
    pixels = pipe(2, num_inference_steps=4, generator=seeds, decode="sample", output_type="pt").images
    return {"latents": latents, "pixels": pixels}


# ---- loading without the package ---------------------------------------------------------------------------------

# what runs in the fresh Python; `drawn` is that of above
CLEAN = f"""
import json, sys, warnings
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffusers_vdm":
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocked())
warnings.simplefilter("error")
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import save_file
warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument", UserWarning)
torch.set_num_threads(1)

{inspect.getsource(drawn)}

def error_of(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{{type(error).__name__}}: {{error}}"

def package():
    return [name for name in sys.modules if name.split(".")[0] == "diffusers_vdm"]

plan = json.loads(sys.argv[1])
out, modules, load = Path(plan["out"]), Path(plan["modules"]), DiffusionPipeline.from_pretrained
report, samples = {{}}, {{}}

report["refusals"] = {{source: error_of(load, source) for source in plan["refused"]}}
report["code that was fetched or run unasked"] = [p.name for p in modules.rglob("vdm_code*")]
report["code that was fetched or run unasked"] += [name for name in sys.modules if "vdm_code" in name]

pipes = {{}}
for source, arguments in plan["sources"]:
    key = " ".join([source, *arguments.values()])
    pipes[key] = pipe = load(source, trust_remote_code=True, **arguments)
    samples |= {{f"{{key}}|{{name}}": value for name, value in drawn(pipe).items()}}
first = {{key: drawn(pipe) for key, pipe in pipes.items()}}  # later loads leave earlier pipelines alone
report["changed by later loads"] = [
    key for key in first for name in first[key] if not torch.equal(first[key][name], samples[f"{{key}}|{{name}}"])
]
code = sys.modules[type(pipe).__module__]
report["classes"] = {{
    key: {{name: type(part).__module__ for name, part in pipe.components.items()}} for key, pipe in pipes.items()
}}
report["not shared"] = [
    f"{{key}}: {{name}}"
    for key, pipe in pipes.items()
    for name, part in {{"pipeline": pipe, **pipe.components}}.items()
    if type(part).__module__ == code.__name__ and getattr(code, type(part).__name__) is not type(part)
]

# classes that know each other: the class methods ask with isinstance
pipe = pipes[plan["learned"]]
tabled = type(pipe.scheduler).from_noise_schedule(pipe.noise_schedule)
report["tables"] = [tabled.config.trained_gammas == pipe.scheduler.config.trained_gammas]
betas = pipes[plan["linear betas"]]
report["tables"] += [type(betas.scheduler).from_noise_schedule(betas.noise_schedule).config.num_train_timesteps == 50]
report["another scheduler at loading"] = error_of(
    load, plan["learned"], scheduler=DDIMScheduler(), trust_remote_code=True
)
pipe.scheduler = pipe.scheduler.to_diffusers(DDIMScheduler)
report["another scheduler afterwards"] = bool(drawn(pipe)["latents"].isfinite().all())
pipe.scheduler = tabled

again = out / "again"
pipe.save_pretrained(again)
report["saved again, alone"] = error_of(load, again, trust_remote_code=True)
loaded = type(pipe).from_pretrained(again)
samples |= {{f"again|{{name}}": value for name, value in drawn(loaded).items()}}
report["files of save_code"] = [path.relative_to(again).as_posix() for path in code.save_code(again)]
loaded = load(again, trust_remote_code=True)
report["class of saved again"] = type(loaded) is code.VDMPipeline
samples |= {{f"again with code|{{name}}": value for name, value in drawn(loaded).items()}}
report["package"] = package()

# from here on, by the package itself
sys.meta_path.pop(0)
sys.path.insert(0, plan["package"])
import urllib.request
from diffusers_vdm import VDMPipeline
for source, arguments in plan["sources"]:
    key = " ".join([source, *arguments.values()])
    if not Path(source).is_dir():
        pipe = VDMPipeline.from_pretrained(source, cache_dir=out / "ours", trust_remote_code=True, **arguments)
        samples |= {{f"ours {{key}}|{{name}}": value for name, value in drawn(pipe).items()}}
        report["fetched by ours"] = [p.name for p in (out / "ours").rglob("*.py")]
report["package, at the end"] = "diffusers_vdm" in package()
save_file(samples, out / "samples.safetensors")
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """What a Python without the package loaded: its report, its samples, and the pipelines as they were saved."""
    root = tmp_path_factory.mktemp("remote_code")
    folders = {kind: saved(root / kind, kind) for kind in KINDS}
    for folder in folders.values():
        save_code(folder)
    hub = HubServer()
    try:
        repository = hub.create("user/vdm", contents(folders["learned"]))
        commit = repository.refs["main"]
        sources = [[str(folder), {}] for folder in folders.values()]
        sources += [["user/vdm", {}], ["user/vdm", {"revision": commit}]]
        plan = {"out": str(root), "modules": str(root / "modules"), "package": str(ROOT), "sources": sources}
        plan |= {kind: str(folders[kind]) for kind in ("learned", "linear betas")}
        plan |= {"refused": ["user/vdm", *([str(folders["learned"])] if ASKS_FOR_FOLDERS else [])]}
        # TRANSFORMERS_OFFLINE silences the client, too
        environment = {k: v for k, v in os.environ.items() if not (k.startswith("HF_") or k.endswith("_OFFLINE"))}
        environment.pop("PYTHONPATH", None)
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(root / "home"), "NO_PROXY": "*", "no_proxy": "*"}
        environment |= {"HF_MODULES_CACHE": plan["modules"], "HF_HUB_DISABLE_TELEMETRY": "1"}
        result = subprocess.run(
            [sys.executable, "-c", CLEAN, json.dumps(plan)],
            **{"capture_output": True, "text": True, "env": environment, "cwd": root, "timeout": 280},
        )
    finally:
        hub.shutdown()
        hub.server_close()
    assert result.returncode == 0, result.stderr
    samples = defaultdict(dict)
    for key, value in load_file(root / "samples.safetensors").items():
        samples[key.split("|")[0]][key.split("|")[1]] = value
    report = json.loads(result.stdout.splitlines()[-1])
    return SimpleNamespace(report=report, samples=samples, folders=folders, commit=commit, log=result.stderr)


@pytest.fixture
def one_thread():
    """The number of threads of the other process: sums in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) == {"latents", "pixels"} and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_the_package_to_the_last_bit(clean, one_thread, tmp_path, kind):
    # loaded as well, but without code: torch rounds differently for weights at another place in memory
    expected = drawn(VDMPipeline.from_pretrained(saved(tmp_path, kind)))
    torch.testing.assert_close(expected["latents"], drawn(made(kind))["latents"], rtol=1e-4, atol=1e-4)
    assert expected["latents"].std() > 0.1 and same(clean.samples[str(clean.folders[kind])], expected)
    # our class loads the folder as well
    assert same(drawn(VDMPipeline.from_pretrained(clean.folders[kind])), expected)
    if kind == "learned":
        assert same(clean.samples["user/vdm"], expected)
        assert same(clean.samples[f"user/vdm {clean.commit}"], expected)
        assert same(clean.samples["ours user/vdm"], expected)
        for again in ("again", "again with code"):
            assert same(clean.samples[again], expected)


def test_the_package_was_out_of_reach_and_the_code_was_of_one_module(clean):
    assert clean.report["package"] == [] and clean.report["package, at the end"]
    name = f"diffusers_modules.local.{code_name()}"
    classes = clean.report["classes"]
    none = dict.fromkeys(("text_encoder", "tokenizer"), "builtins")
    expected = dict.fromkeys(("noise_schedule", "scheduler", "unet"), name)
    assert classes[str(clean.folders["learned"])] == expected | none
    texts = classes[str(clean.folders["texts"])]
    assert texts["unet"] == name and texts["text_encoder"].startswith("transformers.")
    assert classes["user/vdm"] == classes[str(clean.folders["learned"])]
    ddim = classes[str(clean.folders["DDIMScheduler"])]
    assert ddim["unet"] == name and ddim["scheduler"].startswith("diffusers.")
    assert clean.report["not shared"] == [] and clean.report["changed by later loads"] == []
    assert clean.report["tables"] == [True, True]
    # a component of a class that the pipeline does not expect is named, not refused
    assert "Expected types" not in clean.log


def test_no_code_is_fetched_or_run_without_consent(clean):
    refusals = clean.report["refusals"]
    assert len(refusals) == 1 + ASKS_FOR_FOLDERS
    for source, error in refusals.items():
        assert error and error.startswith("ValueError") and "trust_remote_code=True" in error, source
    assert clean.report["code that was fetched or run unasked"] == []
    assert clean.report["fetched by ours"] == []


def test_saved_code_has_the_documented_limits_of_diffusers(clean):
    # documented: these are error messages of diffusers
    assert "has no attribute VDMPipeline" in clean.report["saved again, alone"]
    assert code_name() in clean.report["another scheduler at loading"]
    # what the documentation says to do instead
    assert clean.report["another scheduler afterwards"]
    assert clean.report["class of saved again"]
    expected = ["", "noise_schedule/", "scheduler/", "unet/"]
    assert clean.report["files of save_code"] == [f"{place}{code_name()}.py" for place in expected] + [INDEX]


def test_our_class_does_not_run_saved_code(tmp_path):
    folder = saved(tmp_path / "vdm")
    paths = save_code(folder)[:-1]
    for path in paths:
        path.write_text(f"open({str(tmp_path / 'marker')!r}, 'w').close()\nraise SystemExit\n")
    for trust in (False, True):
        assert type(VDMPipeline.from_pretrained(folder, trust_remote_code=trust)) is VDMPipeline
    assert len(paths) == 4 and not (tmp_path / "marker").exists()


# `pip install torch diffusers` brings no accelerate, and neither does this package
WITHOUT_ACCELERATE = f"""
import sys
sys.modules["accelerate"] = None
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
torch.set_num_threads(1)

{inspect.getsource(drawn)}

samples = {{}}
for name in ("diffusers", "ours"):
    load = DiffusionPipeline.from_pretrained
    if name == "diffusers":
        sys.modules["diffusers_vdm"] = None
    else:
        del sys.modules["diffusers_vdm"]
        from diffusers_vdm import VDMPipeline
        load = VDMPipeline.from_pretrained
    pipe = load(sys.argv[1], trust_remote_code=True)
    samples |= {{f"{{name}}|{{key}}": value for key, value in drawn(pipe).items()}}
    half = load(sys.argv[1], trust_remote_code=True, torch_dtype=torch.bfloat16)
    assert half.unet.dtype == torch.bfloat16 and half.noise_schedule.dtype == torch.float32
    samples[f"{{name}} table"] = half.noise_schedule.table(9)
    assert drawn(half)["latents"].isfinite().all()
save_file(samples, sys.argv[2])
"""


def test_saved_code_runs_without_accelerate(tmp_path, one_thread):
    folder, out = saved(tmp_path / "vdm"), tmp_path / "out.safetensors"
    save_code(folder)
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(ROOT)}
    run_python("-c", WITHOUT_ACCELERATE, folder, out, environment=environment)
    samples, expected = load_file(out), drawn(made("learned"))
    for name in ("diffusers", "ours"):
        assert torch.equal(samples[f"{name} table"], curved_gamma().table(9))  # no digit was lost on the way
        for key, value in expected.items():
            torch.testing.assert_close(samples[f"{name}|{key}"], value, rtol=1e-4, atol=1e-4)
            assert torch.equal(samples[f"{name}|{key}"], samples[f"ours|{key}"])


# ---- the files ---------------------------------------------------------------------------------------------------


def code_name() -> str:
    return f"vdm_code_{hashlib.sha256(code().encode()).hexdigest()[:12]}"


def test_save_code_writes_a_file_for_each_component_and_the_index(tmp_path):
    folder = saved(tmp_path / "vdm")
    before = contents(folder)
    returned = save_code(folder)
    after = contents(folder)
    name = code_name()
    files = [f"{place}{name}.py" for place in ("", "noise_schedule/", "scheduler/", "unet/")]
    assert [path.relative_to(folder).as_posix() for path in returned] == [*files, INDEX]
    assert {key for key in after if after[key] != before.get(key)} == {*files, INDEX}
    assert {after[file] for file in files} == {code().encode()}
    index, old = json.loads(after[INDEX]), json.loads(before[INDEX])
    assert index.pop("_class_name") == [name, "VDMPipeline"]
    for component in ("noise_schedule", "scheduler", "unet"):
        assert index.pop(component) == [name, old.pop(component)[1]]
    old.pop("_class_name")
    assert index == old
    # once more, by a str: nothing changes
    assert save_code(str(folder)) == returned and contents(folder) == after


def test_components_of_diffusers_and_none_get_no_code(tmp_path):
    folder = saved(tmp_path / "a", "DDIMScheduler")
    assert [path.parent.name for path in save_code(folder)] == ["a", "unet", "a"]
    index = json.loads((folder / INDEX).read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"] and index["noise_schedule"] == [None, None]
    # another pipeline over it, and code of another version: neither leaves its own behind
    pipeline(VDMScheduler(), FixedLinearGamma(), cls=UNet2DModel).save_pretrained(folder)
    old = [folder / "vdm_code_0123456789ab.py", folder / "scheduler" / "vdm_code_0123456789ab.py"]
    for path in [*old, folder / "mine.py"]:
        path.write_text("raise SystemExit")
    written = save_code(folder)
    assert [path.parent.name for path in written] == ["a", "noise_schedule", "scheduler", "a"]
    assert sorted(folder.rglob("*.py")) == sorted([*written[:-1], folder / "mine.py"])


def test_the_code_is_that_of_the_modules(tmp_path):
    text = code()
    assert code() == text  # the same file for the same version
    lines = text.splitlines()
    assert lines[0].startswith(f"# Generated by diffusers_vdm {diffusers_vdm.__version__} (")
    assert lines[2].startswith("# License: Apache-2.0")
    modules = lines[1].removeprefix("# From its modules ").removesuffix(".").split(", ")
    assert {"pipeline", "schedulers", "gamma_scheduler", "noise_schedules", "unet", "diffusion"} <= set(modules)
    assert not {"training", "vlb", "objective", "conversion", "checkpoints", "evaluation"} & set(modules)
    # every statement of every module but its imports of the package, and the methods that have some; and in its order
    ours = [ast.dump(node) for node in ast.parse(text).body]
    for module in modules:
        body = ast.parse(inspect.getsource(import_module(f"diffusers_vdm.{module}"))).body
        imports = [
            node for node in body if isinstance(node, ast.ImportFrom) and (node.level or node.module == "__future__")
        ]
        for cls in (node for node in body if isinstance(node, ast.ClassDef)):
            cls.body = [part for part in cls.body if not any(getattr(n, "level", 0) for n in ast.walk(part))]
        expected = [ast.dump(node) for node in body if node not in imports]
        start = ours.index(expected[0])
        found = [line for line in ours[start:] if line in set(expected)]
        assert found[: len(expected)] == expected, module
    nodes = list(ast.walk(ast.parse(text)))
    assert not [node for node in nodes if isinstance(node, ast.ImportFrom) and (node.level or "vdm" in node.module)]
    (tmp_path / "code.py").write_text(text, encoding="utf-8")
    # diffusers reads imports with regular expressions, also those in a docstring
    assert dynamic_modules_utils.check_imports(tmp_path / "code.py") == []


def test_each_name_of_the_generated_file_has_one_meaning():
    meanings = defaultdict(set)
    for node in ast.parse(code()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            meanings[node.name].add(ast.dump(node) + f"line {node.lineno}")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                origin = f"{getattr(node, 'module', '')} {alias.name}"
                meanings[alias.asname or alias.name.split(".")[0]].add(origin)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]  # not those of comprehensions
            for target in (part for whole in targets for part in ast.walk(whole)):
                if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store):
                    meanings[target.id].add(ast.unparse(node))
    assert len(meanings) > 100
    assert not {name for name, found in meanings.items() if len(found) > 1}


# ---- what goes wrong ---------------------------------------------------------------------------------------------


class MyPipeline(VDMPipeline):
    """A pipeline of somebody else."""


class MyScheduler(VDMScheduler):
    """A scheduler of somebody else."""


@pytest.mark.parametrize("what", ["pipeline", "component"])
def test_classes_of_others_are_refused(tmp_path, what):
    pipe = made("fixed")
    if what == "pipeline":
        MyPipeline(pipe.unet, pipe.scheduler).save_pretrained(tmp_path)
        message = "folder must hold a VDMPipeline itself, got a MyPipeline.*Save its components in a VDMPipeline"
    else:
        VDMPipeline(pipe.unet, MyScheduler()).save_pretrained(tmp_path)
        message = (
            "folder must hold components of diffusers_vdm or diffusers, got scheduler=MyScheduler of .*test_remote"
        )
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        save_code(tmp_path)
    assert contents(tmp_path) == before


WRONG = {
    "another pipeline": ({"_class_name": "DDPMPipeline"}, "got a DDPMPipeline"),
    "a pipeline file of others": ({"_class_name": ["pipeline", "VDMPipeline"]}, "must hold a VDMPipeline itself"),
    "no class": ({"_class_name": None}, "must hold a VDMPipeline itself, got a None"),
    "our class of others": ({"unet": ["net", "VDMUNet2DModel"]}, "got unet=VDMUNet2DModel of net"),
    "no class of diffusers": ({"unet": ["diffusers", "logging"]}, "got unet=logging of diffusers"),
    "one component more": ({"vae": ["diffusers", "AutoencoderKL"]}, r"got also \['vae'\]"),
    "a folder elsewhere": ({"../x": ["diffusers_vdm.unet", "VDMUNet2DModel"]}, r"got also \['../x'\]"),
    "no network": ({"unet": [None, None]}, r"must give unet as \[library, class\], got \[None, None\]"),
    "a number": ({"scheduler": 5}, r"must give scheduler as \[library, class\], got 5"),
    "half an entry": ({"noise_schedule": ["diffusers", None]}, "must give noise_schedule as"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_indices_are_refused(tmp_path, case):
    entries, message = WRONG[case]
    folder = saved(tmp_path / "vdm")
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | entries))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        save_code(folder)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("place", ["nothing", ".", f"vdm/{INDEX}"], ids=["missing", "no pipeline", "file"])
def test_folders_without_a_pipeline_are_refused(tmp_path, place):
    saved(tmp_path / "vdm")
    before = contents(tmp_path)
    with pytest.raises(OSError, match=r"folder must be an output of VDMPipeline.save_pretrained.*save the pipeline"):
        save_code(tmp_path / place)
    assert contents(tmp_path) == before


def test_a_pipeline_without_its_network_is_refused(tmp_path):
    folder = saved(tmp_path / "vdm")
    shutil.rmtree(folder / "unet")
    before = contents(tmp_path)
    with pytest.raises(OSError, match="has no unet"):
        save_code(folder)
    assert contents(tmp_path) == before


def test_a_damaged_index_is_refused(tmp_path):
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        save_code(tmp_path)
    assert contents(tmp_path) == {INDEX: b"{"}


@pytest.mark.parametrize("whole", range(5))
def test_an_interrupted_write_leaves_whole_files(tmp_path, monkeypatch, whole):
    folder = saved(tmp_path / "vdm", "learned")
    before, left, replace = contents(folder), [whole], os.replace

    def full_disk(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError("No space left on device")
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        with pytest.raises(OSError, match="No space"):
            save_code(folder)
    after = contents(folder)
    new = {name for name in after if name not in before}
    assert len(new) == whole and {after[name] for name in new} <= {code().encode()}
    assert {name: after[name] for name in before} == before  # the index names the code when all of it is there
    assert len(save_code(folder)) == 5


def test_the_code_imports_nothing_that_only_one_system_has():
    """Old versions of diffusers refuse code that names a missing module, wherever the import stands."""
    named = set(re.findall(r"^\s*import\s+(\w+)", code(), re.MULTILINE))
    named |= set(re.findall(r"^\s*from\s+(\w+)\S*\s+import", code(), re.MULTILINE))
    assert not named & {"msvcrt", "winreg", "fcntl", "resource", "pwd"} and "torch" in named
