"""The house rules of DESIGN §2, read from the source with `ast`: imports, lengths of files, what is banned."""

import ast
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import diffusers_vdm

PACKAGE = Path(diffusers_vdm.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
MAX_LINES = 600

# {diffusion, files, pchip, …} → {noise_schedules, randomness} → {rows, image_files, …} →
# {gamma_scheduler, vlb, ode, codec, step_selection, images, image_stream} → schedulers →
# {pipeline, evaluation, ode_evaluation} → {hub, foreign_networks, checkpoints} → training → measurements, which reads
# metrics by training.read_metrics → card_sections → model_card; a module may import what is before it, but nothing
# beside it
CORE = {"gamma_scheduler", "vlb", "ode", "codec", "step_selection", "images", "image_stream"}
BASE = [
    {
        "call_arguments",
        "console",
        "diffusion",
        "files",
        "markdown",
        "pchip",
        "importance",
        "repository",
        "sharding",
        "threads",
        "whole_models",
    },
    {"noise_schedules", "randomness", "image_folder"},
    {"rows", "image_files", "objective", "dequantization", "diffusers_schedulers", "official_checkpoint"},
    {"image_sources"},
]
UPPER = [
    {"pipeline", "evaluation", "ode_evaluation"},
    {"hub", "remote_code", "foreign_networks", "checkpoints", "cost"},
    {"training", "uploads"},
    {"measurements"},
    {"card_sections"},
    {"model_card"},
    {"publish"},
]
LAYERS = [*BASE, CORE, {"schedulers"}, *UPPER]
# unet imports whole_models and nothing else of ours, and only these import it. conversion and plots are leaves: they
# may import anything, and nothing imports them.
IMPORTS_UNET = {"pipeline", "training", "hub", "foreign_networks", "conversion"}
LEAVES = {"conversion", "plots"}
KNOWN = set().union(*LAYERS, LEAVES, {"unet", "__init__"})

# `model_index.json` of every saved pipeline names these modules: moving a class breaks what users have saved
PINNED = {
    "FixedLinearGamma": "diffusers_vdm.noise_schedules",
    "LearnedLinearGamma": "diffusers_vdm.noise_schedules",
    "MonotoneGammaNetwork": "diffusers_vdm.noise_schedules",
    "LinearBetaGamma": "diffusers_vdm.noise_schedules",
    "BetaGamma": "diffusers_vdm.noise_schedules",
    "TableGamma": "diffusers_vdm.noise_schedules",
    "VDMScheduler": "diffusers_vdm.schedulers",
    "LinearBetaScheduler": "diffusers_vdm.schedulers",
    "VDMUNet2DModel": "diffusers_vdm.unet",
    "VDMPipeline": "diffusers_vdm.pipeline",
}


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def imported_modules(module: str) -> set[str]:
    """Our own modules that `module` imports, anywhere in it: also within functions and under `if TYPE_CHECKING`."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if node.level == 0:
                if name.split(".")[0] != "diffusers_vdm":
                    continue
                name = name.removeprefix("diffusers_vdm").removeprefix(".")
            # `from . import diffusion` names modules, `from .diffusion import alpha` a module; a name that is no
            # module comes from __init__
            parts = [name.split(".")[0]] if name else [alias.name for alias in node.names]
            found.update(part if part in MODULES else "__init__" for part in parts)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "diffusers_vdm":
                    found.add(parts[1] if len(parts) > 1 else "__init__")
    return found


def allowed_imports(module: str) -> set[str]:
    if module == "__init__":
        return set()
    if module == "unet":
        return {"whole_models"}
    if module == "pipeline":  # push_to_hub, when it is called: what makes a card loads the pipeline for it
        return allowed_below(module) | {"publish"}
    return allowed_below(module)


def allowed_below(module: str) -> set[str]:
    level = next((i for i, layer in enumerate(LAYERS) if module in layer), len(LAYERS))
    return set().union(*LAYERS[:level], {"unet"} if module in IMPORTS_UNET else set())


# ---- imports --------------------------------------------------------------------------------------------------------


def test_every_file_is_one_of_the_design():
    assert set(MODULES) <= KNOWN, "a new file needs its place in DESIGN §2 and here"
    assert {"diffusion", "noise_schedules", "schedulers", "unet", "vlb", "pipeline", "__init__"} <= set(MODULES)
    folders = [p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert not folders, "flat: a folder named like one of diffusers' pipelines cannot be loaded again"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    wrong = imported_modules(module) - allowed_imports(module)
    if _names_from_init(module) <= {"__version__"}:  # all that is there besides the lazy names
        wrong.discard("__init__")
    assert not wrong, f"{module}.py must not import {sorted(wrong)}"


def _names_from_init(module: str) -> set[str]:
    nodes = [node for node in ast.walk(tree(module)) if isinstance(node, ast.ImportFrom)]
    ours = [n for n in nodes if (n.level == 1 and not n.module) or n.module == "diffusers_vdm"]
    return {alias.name for n in ours for alias in n.names if alias.name not in MODULES}


def test_the_import_reader_sees_every_form(tmp_path, monkeypatch):
    # a test that reads the wrong thing passes for ever
    source = (
        "from . import diffusion\nfrom .vlb import x\nimport diffusers_vdm.unet\nfrom diffusers_vdm.ode import y\n"
        "def f():\n    from diffusers_vdm import schedulers, __version__\n"
    )
    (tmp_path / "sample.py").write_text(source)
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "MODULES", ["diffusion", "vlb", "unet", "ode", "schedulers"])
    assert imported_modules("sample") == {"diffusion", "vlb", "unet", "ode", "schedulers", "__init__"}


# ---- what is in the files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_too_long_to_read(module):
    lines = len((PACKAGE / f"{module}.py").read_text().splitlines())
    assert lines <= MAX_LINES, f"{module}.py has {lines} lines"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_asserted_or_pickled(module):
    banned_modules = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    banned_calls = {"torch.load", "torch.save", "np.load", "numpy.load", "eval", "exec"}
    for node in ast.walk(tree(module)):
        where = f"{module}.py:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), f"{where}: an assert vanishes under python -O; raise instead"
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = getattr(node, "module", "") or ""
            names = {alias.name.split(".")[0] for alias in node.names} | {origin.split(".")[0]}
            assert not names & banned_modules, where
            assert not (origin == "torch" and names & {"load", "save"}), where
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in ("np.load", "numpy.load"):
                # arrays alone: pickled objects only load where they are asked for
                assert not any(keyword.arg == "allow_pickle" for keyword in node.keywords), where
            elif module == "conversion":  # addtt's format; `load` unpickles tensors and plain containers alone
                safe = any(ast.unparse(keyword) == "weights_only=True" for keyword in node.keywords)
                assert ast.unparse(node.func) not in banned_calls - {"torch.load", "torch.save"}, where
                assert ast.unparse(node.func) != "torch.load" or safe, where
            else:
                assert ast.unparse(node.func) not in banned_calls, where


@pytest.mark.parametrize("module", MODULES)
def test_nothing_touches_the_global_seed(module):
    of_torch = {"manual_seed", "seed", "set_rng_state", "cuda.manual_seed", "cuda.manual_seed_all"}
    of_random = {"seed", "random", "shuffle", "randint", "choice", "uniform"}
    banned = {f"torch.{name}" for name in of_torch} | {f"random.{name}" for name in of_random} | {"set_seed"}
    banned |= {f"{numpy}.random.{name}" for numpy in ("np", "numpy") for name in of_random | {"randn", "normal"}}
    calls = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
    wrong = [f"{module}.py:{node.lineno}" for node in calls if ast.unparse(node.func) in banned]
    assert not wrong


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__"])
def test_every_file_says_what_it_is(module):
    assert ast.get_docstring(tree(module))


# ---- the public names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in diffusers_vdm.__all__ if name != "__version__"])
def test_every_public_name_resolves_and_is_documented(name):
    value = getattr(diffusers_vdm, name)
    assert name in dir(diffusers_vdm)
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return
    assert value.__module__.startswith("diffusers_vdm.") and value.__name__ == name
    # its own words: a class without a docstring inherits nothing that describes it
    assert "__doc__" not in vars(value) or vars(value)["__doc__"], name
    assert len(inspect.cleandoc(value.__doc__ or "")) > 20, name
    if inspect.isclass(value):
        for method, function in vars(value).items():
            if not method.startswith("_") and inspect.isroutine(getattr(value, method)):
                target = getattr(function, "__func__", function)
                assert inspect.getdoc(getattr(value, method)) or target.__doc__, f"{name}.{method}"


def test_the_list_of_names_is_whole():
    assert len(set(diffusers_vdm.__all__)) == len(diffusers_vdm.__all__)
    assert isinstance(diffusers_vdm.__version__, str)
    with pytest.raises(AttributeError, match="has no attribute 'VDMSchedular'"):
        diffusers_vdm.VDMSchedular  # noqa: B018


@pytest.mark.parametrize(("name", "module"), PINNED.items())
def test_classes_stay_where_saved_pipelines_look_for_them(name, module):
    assert getattr(diffusers_vdm, name).__module__ == module
    # diffusers looks for its base class in the module that defines a component
    base = "SchedulerMixin" if "Scheduler" in name else "DiffusionPipeline" if "Pipeline" in name else "ModelMixin"
    assert hasattr(import_module(module), base)


def test_every_class_that_can_be_saved_is_pinned():
    from diffusers.configuration_utils import ConfigMixin

    for name in diffusers_vdm.__all__:
        value = getattr(diffusers_vdm, name)
        if inspect.isclass(value) and issubclass(value, ConfigMixin) and name != "NoiseSchedule":
            assert name in PINNED, name


# ---- lazy imports --------------------------------------------------------------------------------------------------


def fresh_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return result.stdout.strip()


def test_importing_the_package_costs_neither_torch_nor_diffusers():
    out = fresh_python(
        "import sys; before = set(sys.modules)\n"
        "import diffusers_vdm; dir(diffusers_vdm); diffusers_vdm.__version__\n"
        "new = set(sys.modules) - before; roots = {name.split('.')[0] for name in new}\n"
        "print(len(new), *sorted({'torch', 'diffusers', 'numpy', 'transformers', 'PIL', 'huggingface_hub'} & roots))"
    )
    count, *heavy = out.split()
    assert not heavy
    assert int(count) < 10


def test_components_load_what_they_need_and_no_more():
    out = fresh_python(
        "import sys\n"
        "loaded = lambda *names: [int(name in sys.modules) for name in names]\n"
        "from diffusers_vdm import VDMScheduler, LinearBetaScheduler\n"
        "VDMScheduler(), LinearBetaScheduler()\n"
        "print(sum(n.startswith('diffusers.pipelines.') for n in sys.modules), *loaded('diffusers_vdm.pipeline'))\n"
        "from diffusers_vdm import VDMPipeline\n"
        "print(*loaded(*(f'diffusers_vdm.{n}' for n in ('schedulers', 'noise_schedules', 'unet'))))\n"
        "print(*loaded('diffusers.pipelines.stable_diffusion'))"
    )
    schedulers, components, pipelines = out.splitlines()
    # a scheduler needs no pipeline: diffusers' are 3,400 modules (PITFALLS 36)
    assert schedulers == "0 0"
    # diffusers finds the classes of a saved pipeline only in modules that are loaded by then
    assert components == "1 1 1"
    assert pipelines == "0"
