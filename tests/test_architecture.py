"""The layers are a contract: who may import whom, and what the core needs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

STANDARD = set(sys.stdlib_module_names)
# layer -> (project modules it may import, third-party packages it may import); data flows top to bottom
LAYERS: dict[str, tuple[set[str], set[str]]] = {
    "pipeline/choose.py": (set(), set()),
    "pipeline/ranges.py": (set(), set()),
    "pipeline/size.py": (set(), set()),
    "pipeline/folders.py": (set(), {"torch", "safetensors"}),
    "pipeline/diffusion": ({"pipeline.choose"}, {"torch"}),
    "pipeline/schedulers.py": ({"pipeline.choose", "pipeline.diffusion"}, {"torch"}),
    "pipeline/text": (
        {"pipeline.choose", "pipeline.folders"},
        {"torch", "safetensors", "tokenizers", "sentencepiece"},
    ),
    "pipeline/backbones": ({"pipeline.size", "pipeline.choose", "pipeline.diffusion"}, {"torch"}),
    "pipeline/storage": (set(), {"numpy", "boto3", "botocore", "psutil", "pyarrow"}),
    "pipeline/data/formats": ({"pipeline.choose", "pipeline.size"}, {"numpy", "cv2", "isal", "PIL", "simplejpeg"}),
    "pipeline/data/sets": (
        {"pipeline.size", "pipeline.choose", "pipeline.storage", "pipeline.data.formats"},
        {"numpy", "pyarrow"},
    ),
    "pipeline/data/config.py": (
        {
            "pipeline.ranges",
            "pipeline.size",
            "pipeline.choose",
            "pipeline.storage",
            "pipeline.data.formats",
            "pipeline.data.sets",
        },
        set(),
    ),
    "pipeline/data/making": (
        {
            "pipeline.choose",
            "pipeline.size",
            "pipeline.storage",
            "pipeline.data.formats",
            "pipeline.data.sets",
            "pipeline.data.config",
        },
        {"numpy", "pyarrow", "cv2", "braceexpand"},
    ),
    "pipeline/data/reading": (
        {"pipeline.choose", "pipeline.storage", "pipeline.data.formats", "pipeline.data.sets", "pipeline.data.config"},
        {"torch", "numpy", "pyarrow", "webdataset"},
    ),
    "pipeline/conditioner.py": ({"pipeline.choose", "pipeline.diffusion"}, {"torch"}),
    "pipeline/data/__init__.py": ({"pipeline.data"}, set()),
    "pipeline/training": (
        {
            "pipeline.ranges",
            "pipeline.choose",
            "pipeline.conditioner",
            "pipeline.diffusion",
            "pipeline.backbones",
            "pipeline.data",
            "pipeline.storage",
        },
        {"torch", "numpy", "safetensors"},
    ),
    "pipeline/model.py": (
        {
            "pipeline.ranges",
            "pipeline.size",
            "pipeline.choose",
            "pipeline.conditioner",
            "pipeline.diffusion",
            "pipeline.backbones",
            "pipeline.data",
            "pipeline.storage",
        },
        {"torch", "safetensors"},
    ),
    "pipeline/interchange.py": (
        {"pipeline.choose", "pipeline.diffusion", "pipeline.backbones", "pipeline.model"},
        {"torch", "safetensors"},
    ),
    "pipeline/evaluation": (
        {
            "pipeline.ranges",
            "pipeline.choose",
            "pipeline.conditioner",
            "pipeline.diffusion",
            "pipeline.data",
            "pipeline.storage",
            "pipeline.model",
        },
        {"torch", "numpy", "scipy", "sklearn", "matplotlib", "safetensors", "cv2"},
    ),
    "pipeline/serving": (
        {
            "pipeline.ranges",
            "pipeline.size",
            "pipeline.choose",
            "pipeline.conditioner",
            "pipeline.diffusion",
            "pipeline.data",
            "pipeline.storage",
            "pipeline.model",
        },
        {"torch", "numpy", "pydantic"},
    ),
    "pipeline/web": ({"pipeline.serving"}, {"fastapi", "starlette", "pydantic"}),
    "pipeline/assembly.py": (
        {
            "pipeline.choose",
            "pipeline.conditioner",
            "pipeline.config",
            "pipeline.data",
            "pipeline.storage",
            "pipeline.diffusion",
            "pipeline.interchange",
            "pipeline.model",
            "pipeline.training",
        },
        {"torch"},
    ),
    "pipeline/places.py": (set(), set()),
    "pipeline/config.py": (
        {
            "pipeline.ranges",
            "pipeline.choose",
            "pipeline.data",
            "pipeline.storage",
            "pipeline.evaluation",
            "pipeline.interchange",
            "pipeline.model",
            "pipeline.places",
            "pipeline.serving",
            "pipeline.training",
        },
        {"pydantic", "omegaconf", "yaml"},
    ),
    "pipeline/preflight.py": (
        {
            "pipeline.assembly",
            "pipeline.config",
            "pipeline.data",
            "pipeline.storage",
            "pipeline.tracking",
            "pipeline.training",
            "pipeline.evaluation",
        },
        set(),
    ),
    "pipeline/trained.py": (
        {"pipeline.assembly", "pipeline.model", "pipeline.storage", "pipeline.tracking", "pipeline.training"},
        set(),
    ),
    "pipeline/resume.py": (
        {"pipeline.assembly", "pipeline.config", "pipeline.data", "pipeline.storage", "pipeline.tracking"},
        set(),
    ),
}
ONLY_HOME = {"ray": "pipeline/cluster", "mlflow": "pipeline/tracking"}


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, at any depth in it; `from a.b import c` gives a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {f"pipeline.{alias.name}" for alias in node.names} if module == "pipeline" else {module}
    return found


def files_of(layer: str) -> list[Path]:
    path = ROOT / layer
    return [path] if path.suffix else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_imports_only_what_the_contract_allows(layer: str) -> None:
    project, packages = LAYERS[layer]
    own = layer.removesuffix(".py").replace("/", ".")
    files = files_of(layer)
    assert files
    for path in files:
        for module in imports_of(path):
            root = module.split(".")[0]
            if module == "pipeline":  # `load` and the version, which import nothing by themselves
                allowed = True
            elif root == "pipeline":
                allowed = any(module == p or module.startswith(p + ".") for p in project | {own})
            else:
                allowed = root in STANDARD | packages
            assert allowed, f"{path.relative_to(ROOT)} imports {module}: not in the contract of {layer}"


def rooms_of() -> dict[str, set[str]]:
    """room -> the rooms it imports; a room is a folder of modules, its facade, or a module that lies in `pipeline`."""
    paths = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in files_of("pipeline")
    }

    def room(module: str) -> str:
        if paths[module].name == "__init__.py":
            return f"{module}.__init__"
        return module if module.count(".") < 2 else module.rpartition(".")[0]

    found: dict[str, set[str]] = {}
    for name, path in paths.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipeline."):
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    target = room(full if full in paths else node.module or "")
                    if target != room(name):
                        found.setdefault(room(name), set()).add(target)
    return found


def test_rooms_import_each_other_in_one_direction() -> None:
    rooms, done = rooms_of(), set[str]()

    def visit(room: str, above: tuple[str, ...]) -> None:
        assert room not in above, f"a circle of imports: {' -> '.join([*above[above.index(room) :], room])}"
        if room not in done:
            for target in sorted(rooms.get(room, ())):
                visit(target, (*above, room))
            done.add(room)

    assert len(rooms) > 10
    for room in list(rooms):
        visit(room, ())


@pytest.mark.parametrize("package", ONLY_HOME)
def test_ray_and_mlflow_have_one_home(package: str) -> None:
    home = ROOT / ONLY_HOME[package]
    users = {p for p in (ROOT / "pipeline").rglob("*.py") if any(m.split(".")[0] == package for m in imports_of(p))}
    assert users, f"nothing imports {package}: the check has lost its object"
    assert all(home in p.parents for p in users), f"{package} is imported outside {home}: {users}"


def test_core_loads_without_the_platform() -> None:
    blocked = ["ray", "mlflow", "boto3", "webdataset", "fastapi", "pyarrow", "pydantic"]
    names = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for layer in ("pipeline/diffusion", "pipeline/backbones")
        for p in files_of(layer)
    ]
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}:
            raise ImportError('blocked: ' + name)
sys.meta_path.insert(0, Block())
import importlib
for name in {names!r}:
    importlib.import_module(name.removesuffix('.__init__'))
print('loaded', len({names!r}))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("loaded")


def test_no_pickle_on_a_load_path() -> None:
    banned = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for path in [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")]:
        assert not banned & imports_of(path), path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                assert not (node.func.attr == "load" and isinstance(owner, ast.Name) and owner.id == "torch"), path


def test_top_level_holds_only_what_was_agreed() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    agreed = {"pyproject.toml", "pipeline", "jobs", "infra", "tests", "README.md"}
    assert {name for name in top if not name.startswith(".")} <= agreed
