"""Who may import whom, read from the source."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "pgrl"

# From the top. A module imports from lower rows only; what else it may import from its own row stands in BESIDE.
LAYERS = [
    {"pgrl"},
    {"train", "verify"},
    {"evaluate"},
    {"config", "logger", "checkpoint", "record", "signals"},
    {"agents", "envs"},
    {"networks", "data", "optim", "flat"},
    {"functional", "trust_region", "distributions", "errors"},
]
BESIDE = {
    "logger": {"checkpoint"},
    "envs": {"envs"},
    "agents": {"agents"},
}
PURE = {"functional", "trust_region", "distributions", "errors"}
ALONE = {"checkpoint": {"errors"}, "logger": {"errors", "checkpoint"}, "data": set(), "flat": set(), "optim": set()}

# Third parties, each with the modules that may know it; whatever is not listed nobody imports.
KNOWN = {
    "torch": {*LAYERS[0], *LAYERS[1], *LAYERS[2], *LAYERS[3], *LAYERS[4], *LAYERS[5], *LAYERS[6]} - {"errors"},
    "numpy": {"train", "verify", "evaluate", "checkpoint", "record", "config", "logger", "agents", "envs"},
    "gymnasium": {"config", "envs", "agents", "networks", "data", "train", "verify", "evaluate", "pgrl"},
    "hydra": {"config", "train", "evaluate", "verify"},
    "omegaconf": {"config", "train", "evaluate", "verify"},
    "safetensors": {"checkpoint"},
    "tensorboard": {"logger"},
    "rich": {"logger", "config", "verify", "evaluate"},
    "envpool": {"envs"},
    "yaml": {"config"},
}


def name(path: Path) -> str:
    """The module's place in LAYERS: its own name, or its folder's."""
    first = path.relative_to(SOURCE).parts[0]
    return {"__init__.py": "pgrl", "__main__.py": "pgrl"}.get(first, first.removesuffix(".py"))


def imports(path: Path) -> Iterator[str]:
    """Everything a file imports, wherever in it, as dotted names that end in a module or in one of its names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(path: Path) -> Iterator[str]:
    """The modules of pgrl a file imports, by their place in LAYERS."""
    for dotted in imports(path):
        first, *rest = dotted.split(".")
        if first == "pgrl":
            known = rest and any(rest[0] in layer for layer in LAYERS)
            yield rest[0] if known else "pgrl"


FILES = sorted(SOURCE.rglob("*.py"))
RANK = {module: i for i, layer in enumerate(LAYERS) for module in layer}


@pytest.fixture(params=FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_every_module_has_a_layer(path: Path) -> None:
    assert name(path) in RANK, f"give {name(path)} a layer in this test, and in docs/architecture.md"


def test_imports_point_downwards(path: Path) -> None:
    here = name(path)
    for other in imported_modules(path):
        assert RANK[other] > RANK[here] or other in BESIDE.get(here, set()), f"{here} imports {other}"


def test_pure_modules_import_nothing_of_pgrl(path: Path) -> None:
    here = name(path)
    if here in PURE:
        assert not set(imported_modules(path))
    if here in ALONE:
        assert set(imported_modules(path)) <= ALONE[here]


def test_agents_know_no_env_and_no_other_algorithm(path: Path) -> None:
    if name(path) != "agents" or path.stem == "__init__":
        return
    allowed = {"base", "on_policy"} - {path.stem}
    for dotted in imports(path):
        parts = dotted.split(".")
        assert parts[:2] != ["pgrl", "envs"] and parts[0] not in ("logging", "hydra", "omegaconf")
        if parts[:2] == ["pgrl", "agents"]:
            assert parts[2] in allowed, f"{path.stem} imports {dotted}"


def test_third_parties_stay_where_they_belong(path: Path) -> None:
    import sys

    for dotted in imports(path):
        package = dotted.split(".")[0]
        if package == "pgrl" or package in sys.stdlib_module_names:
            continue
        assert name(path) in KNOWN.get(package, set()), f"{name(path)} imports {package}"


def test_hydra_is_imported_by_entry_points_alone(path: Path) -> None:
    """An agent, an env or a test that uses pgrl as a library does not load the command line's machinery."""
    if name(path) not in ("config", *LAYERS[1], *LAYERS[2]):
        assert not {d.split(".")[0] for d in imports(path)} & {"hydra", "omegaconf"}


def test_agents_never_see_done(path: Path) -> None:
    """Terminations and truncations arrive apart; nothing in an algorithm takes or makes a merged flag."""
    if name(path) != "agents":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        label = getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "attr", None)
        assert label not in ("done", "dones"), f"{path}:{getattr(node, 'lineno', 0)}"


def test_names_say_what_things_are(path: Path) -> None:
    assert path.stem not in ("utils", "helpers", "common", "misc")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            assert not re.search(r"(Manager|Helper|Handler)$|^Base[A-Z]|Base$", node.name), node.name


def test_nothing_is_pickled(path: Path) -> None:
    """A file that is read can run no code: no pickle, and no torch.save or torch.load, which are pickle."""
    assert not {d.split(".")[0] for d in imports(path)} & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in ("save", "load"), f"{path}:{node.lineno}"
