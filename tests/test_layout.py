"""The rules of the layout, read from the source with `ast`: imports, lengths of files, and what is banned."""

import ast
import graphlib
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import diffusers.pipelines
import pytest

import diffusers_vdm
from diffusers_vdm.components import NOISE_SCHEDULES
from tests.paths import PACKAGE, TESTS
from tests.rooms import ROOMS

MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)
MAX_LINES = 600
# imports within a function, on the call of push_to_hub and of `python -m diffusers_vdm.conversion`
LATER = {("pipeline", "sharing.publish"), ("conversion.__main__", "commands.convert")}
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
    "VDMMultiscale2DModel": "diffusers_vdm.multiscale",
    "VDMUNet2DConditionModel": "diffusers_vdm.text_unet",
    "VDMPipeline": "diffusers_vdm.pipeline",
}


def path_of(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split(".")) if module != "__init__" else PACKAGE
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def tree(module: str) -> ast.Module:
    return ast.parse(path_of(module).read_text(encoding="utf-8"))


def room_of(module: str) -> str:
    first = module.split(".")[0]
    return first if first in ROOMS else "core"


def imports_for_annotations(module: str) -> set[str]:
    """Our own modules that `module` imports under `if TYPE_CHECKING:`, to name classes in annotations."""
    blocks = [n for n in ast.walk(tree(module)) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return imported_modules(module, [part for block in blocks for node in block.body for part in ast.walk(node)])


def imports_that_run(module: str) -> set[str]:
    """Our own modules that `module` imports when it is run, also within its functions."""
    blocks = [n for n in ast.walk(tree(module)) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    lines = {
        part.lineno for block in blocks for node in block.body for part in ast.walk(node) if hasattr(part, "lineno")
    }
    return imported_modules(module, [n for n in ast.walk(tree(module)) if getattr(n, "lineno", 0) not in lines])


def imported_modules(module: str, nodes: list[ast.AST] | None = None) -> set[str]:
    """Our own modules that `module` imports, or that some of its `nodes` do."""
    found = set()
    folder = module.split(".") if path_of(module).name == "__init__.py" else module.split(".")[:-1]
    folder = [] if module == "__init__" else folder
    for node in ast.walk(tree(module)) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found.update(".".join(name[1:]) or "__init__" for name in names if name[0] == "diffusers_vdm")
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = folder[: len(folder) - node.level + 1] + (node.module.split(".") if node.module else [])
        elif node.module.split(".")[0] == "diffusers_vdm":
            base = node.module.split(".")[1:]
        else:
            continue
        # `from . import diffusion` names modules, `from .diffusion import alpha` a module
        for alias in node.names:
            whole = ".".join([*base, alias.name])
            found.add(whole if whole in MODULES else ".".join(base) or "__init__")
    return found


# ---- imports -----------------------------------------------------------------------------------------------------


def test_every_folder_is_a_room():
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(ROOMS) - {"core", "pipeline", "registration"}
    assert not [p for p in PACKAGE.glob("*/*") if p.is_dir() and p.name != "__pycache__"], "one level of folders"
    # a folder with components that is named like one of diffusers' pipelines could not be loaded again
    assert not folders & set(vars(diffusers.pipelines)), folders


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    wrong = {
        other
        for other in imports_that_run(module)
        if room_of(other) not in ROOMS[room_of(module)] | {room_of(module)} and (module, other) not in LATER
    }
    if _names_from_init(module) <= {"__version__", *diffusers_vdm.__all__} and room_of(module) == "commands":
        wrong.discard("__init__")
    assert not wrong, f"{module} must not import {sorted(wrong)}"


@pytest.mark.parametrize("module", MODULES)
def test_annotations_name_classes_of_lower_rooms_or_the_pipeline(module):
    if module == "__init__":  # names all public classes, which it imports on first use
        return
    rooms = {room_of(other) for other in imports_for_annotations(module)}
    assert rooms <= ROOMS[room_of(module)] | {room_of(module)} | (
        {"pipeline"} if room_of(module) == "sharing" else set()
    )


def test_no_imports_go_round_in_a_circle():
    graph = {m: imports_that_run(m) - {m, "__init__", "conversion.__main__"} for m in MODULES}
    order = graphlib.TopologicalSorter(graph)
    order.prepare()  # `CycleError` names the circle


def _names_from_init(module: str) -> set[str]:
    nodes = [node for node in ast.walk(tree(module)) if isinstance(node, ast.ImportFrom)]
    ours = [n for n in nodes if (n.level and not n.module) or n.module == "diffusers_vdm"]
    return {alias.name for n in ours for alias in n.names if alias.name not in MODULES}


def test_the_import_reader_sees_every_form(tmp_path, monkeypatch):
    # with a reader that misses imports, every test would pass
    source = (
        "from . import diffusion\nfrom .vlb import x\nimport diffusers_vdm.unet\nfrom diffusers_vdm.ode import y\n"
        "def f():\n    from diffusers_vdm import schedulers, __version__\n"
    )
    (tmp_path / "sample.py").write_text(source)
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "inner.py").write_text("from . import beside\nfrom ..ode import y\nfrom .. import unet\n")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    names = ["diffusion", "vlb", "unet", "ode", "schedulers", "room.beside"]
    monkeypatch.setattr(sys.modules[__name__], "MODULES", names)
    assert imported_modules("sample") == {"diffusion", "vlb", "unet", "ode", "schedulers", "__init__"}
    assert imported_modules("room.inner") == {"room.beside", "ode", "unet"}
    (tmp_path / "sample.py").write_text("from . import unet\nif TYPE_CHECKING:\n    from .ode import y\n")
    assert imports_that_run("sample") == {"unet"} and imports_for_annotations("sample") == {"ode"}


# ---- what is in the files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_too_long_to_read(module):
    lines = len(path_of(module).read_text(encoding="utf-8").splitlines())
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
            elif module == "conversion.addtt":  # addtt's format; `load` unpickles tensors and plain containers alone
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
    if room_of(module) == "commands" or module == "training.run":  # a run seeds what draws within the network
        banned -= {"torch.manual_seed"}
    calls = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
    wrong = [f"{module}.py:{node.lineno}" for node in calls if ast.unparse(node.func) in banned]
    assert not wrong


@pytest.mark.parametrize("module", MODULES)
def test_every_file_says_what_it_is(module):
    assert ast.get_docstring(tree(module))


# ---- the public names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in diffusers_vdm.__all__ if name != "__version__"])
def test_every_public_name_resolves_and_is_documented(name):
    value = getattr(diffusers_vdm, name)
    assert name in dir(diffusers_vdm)
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return
    assert value.__module__.startswith("diffusers_vdm.")
    assert value.__name__ == diffusers_vdm._EARLIER_NAMES.get(name, name)
    # a docstring of its own: an inherited one would describe another class
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


# ---- lazy imports ------------------------------------------------------------------------------------------------


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
    # a scheduler needs no pipeline: diffusers' are 3,400 modules
    assert schedulers == "0 0"
    # diffusers finds the classes of a saved pipeline only in modules that are loaded by then
    assert components == "1 1 1"
    assert pipelines == "0"


# ---- the tests ----------------------------------------------------------------------------------------------------

TEST_FILES = sorted(path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py"))
# the subject of a test file that is not named after a module
SUBJECTS = {
    "commands/test_locks.py": "two runs in one place",
    "commands/test_main.py": "commands/__main__.py",
    "commands/test_resume.py": "runs that were stopped",
    "commands/test_text_training.py": "a training with captions",
    "data/test_hub_data_sets.py": "data sets on the Hub",
    "evaluation/test_exact_likelihood.py": "the bounds of data whose probabilities are known",
    "evaluation/test_monte_carlo_statistics.py": "the statistics of monte_carlo.py",
    "sharing/test_loading_table.py": "the table of docs/sharing.md",
    "test_benchmarks.py": "the scripts in benchmarks/",
    "test_documentation.py": "the pages of the documentation",
    "test_earlier_versions.py": "files that an earlier version saved",
    "test_examples.py": "the self-contained examples",
    "test_gpu.py": "what only a GPU shows",
    "test_hub_server.py": "hub_server.py",
    "test_layout.py": "the layout of the package and of the tests",
    "test_minimize_variance.py": "the schedule that training finds",
    "test_offloading.py": "pipelines on the devices of accelerate",
    "test_oracles.py": "oracles.py",
    "test_wheel.py": "the wheel",
}


def test_the_folders_of_the_tests_are_those_of_the_package():
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - {"fixtures"} == {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"}


@pytest.mark.parametrize("file", TEST_FILES)
def test_a_test_file_is_named_after_its_module_or_says_its_subject(file):
    module = PACKAGE / file.replace("test_", "")
    assert module.is_file() != (file in SUBJECTS), f"{file}: name it after a module of its folder, or list its subject"
    assert ast.get_docstring(ast.parse((TESTS / file).read_text(encoding="utf-8")))


@pytest.mark.parametrize("file", TEST_FILES)
def test_no_test_file_imports_another(file):
    modules = set()
    for node in ast.walk(ast.parse((TESTS / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    wrong = [module for module in modules if module.split(".")[-1].startswith("test_") and module.startswith("test")]
    assert not wrong, f"{file} imports {wrong}: what two files use belongs into a file that is no test"


def test_every_subject_is_a_test_file():
    assert set(SUBJECTS) <= set(TEST_FILES)


def test_names_that_type_checkers_see_are_the_public_ones():
    block = next(n for n in tree("__init__").body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    for name, module in seen.items():
        assert diffusers_vdm._MODULE_OF[diffusers_vdm._EARLIER_NAMES.get(name, name)] == module
    assert set(diffusers_vdm.__all__) - set(seen) - set(NOISE_SCHEDULES) == {"__version__"}
