"""In: the files of the library. Out: every import goes to a line of the map above its own, or within its own folder."""

import ast
import pathlib
import subprocess
import sys

import gpdiff_jax

_LIBRARY = pathlib.Path(gpdiff_jax.__file__).parent
# City -> what a model sees -> prompts -> zoo -> diffusion -> hypernetwork -> forecasts; a line may import those above.
_LINES = (
    ("typing", "errors", "hosts", "host_memory", "files", "folder_lock", "vectors"),
    ("training",),
    ("cities",),
    ("ingest",),
    ("models",),
    ("data",),
    ("prompts",),
    ("zoo",),
    ("diffusion",),
    ("region_parameters",),
    ("hypernetwork_folder",),
    ("hypernetwork", "pretraining", "pretrained"),
    ("transfer",),
    ("baselines",),
    ("analysis",),
    ("report",),
    ("run",),
)
_ORDER = {name: number for number, line in enumerate(_LINES) for name in line}
_WITHOUT_JAX = ("cities", "ingest", "files", "errors", "folder_lock", "hosts", "host_memory")


def _imported(path: pathlib.Path) -> set[str]:
    """Modules that a file imports, at its head or within a function, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "gpdiff_jax"}
    return found


def _part(module: str) -> str:
    return module.split(".")[1]


def _files() -> list[tuple[str, pathlib.Path]]:
    """Every file but the library's front door, and the part of the map that it belongs to."""
    paths = [path for path in sorted(_LIBRARY.rglob("*.py")) if path != _LIBRARY / "__init__.py"]
    return [(path.relative_to(_LIBRARY).parts[0].removesuffix(".py"), path) for path in paths]


def test_every_file_has_its_place_on_the_map():
    assert {part for part, _ in _files()} == set(_ORDER)
    assert len(_files()) > 60


def test_no_import_goes_down_the_map():
    wrong = []
    for part, path in _files():
        for module in _imported(path):
            if module.startswith("gpdiff_jax."):
                other = _part(module)
                same = other == part and (_LIBRARY / part).is_dir()
                if not same and not (_ORDER[other] < _ORDER[part] or (_ORDER[other] == _ORDER[part] and other != part)):
                    wrong.append(f"{path.relative_to(_LIBRARY)} imports {module}")
            assert module != "gpdiff_jax", f"{path} imports the library's front door"
    assert not wrong, wrong


def test_a_module_does_not_import_itself_by_a_circle():
    """Within a folder, too: the modules can be put in an order in which each imports only those before it."""
    names = {
        "gpdiff_jax." + ".".join(path.relative_to(_LIBRARY).with_suffix("").parts): path
        for _, path in _files()
        if path.name != "__init__.py"
    }
    left = {name: {module for module in _imported(path) if module in names} for name, path in names.items()}
    while left:
        free = {name for name, needs in left.items() if not needs & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


def test_cities_know_nothing_of_jax():
    for part, path in _files():
        if part in _WITHOUT_JAX:
            assert not {module.split(".")[0] for module in _imported(path)} & {"jax", "flax", "jraph", "optax"}, path


def test_matplotlib_is_imported_by_those_who_draw():
    drawing = {"report/canvas.py", "report/figures.py"}
    for _, path in _files():
        roots = {module.split(".")[0] for module in _imported(path)}
        assert ("matplotlib" in roots) == (str(path.relative_to(_LIBRARY)) in drawing), path
    code = "import sys, gpdiff_jax; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=_LIBRARY.parent, check=True, timeout=120)


def test_no_file_is_longer_than_400_lines():
    root = _LIBRARY.parent
    folders = [_LIBRARY, *(root / name for name in ("experiments", "tests", "benchmarks"))]
    paths = [path for folder in folders for path in folder.rglob("*.py")]
    assert {str(path) for path in paths if len(path.read_text().splitlines()) > 400} == set()
