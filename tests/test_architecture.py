"""Who may import whom, read from the source; docs/architecture.md says the same in words."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "pgrl"
FILES = sorted(SOURCE.rglob("*.py"))

# From the top; a module, or a folder as a whole, imports from lower rows only.
LAYERS = (
    ("pgrl",),
    ("launch", "verify"),
    ("asynchronous",),
    ("train", "profiling"),
    ("upkeep", "capture"),
    ("evaluate",),
    ("runs",),
    ("record",),
    ("config", "logger"),
    ("checkpoint", "theory"),
    ("files", "state_tree"),
    ("agents", "envs"),
    ("acting", "replay"),
    ("sampling",),
    ("q_networks", "replay_rows"),
    ("replay_layout",),
    ("networks", "normalisers", "data", "optim", "processes"),
    ("compiling", "processor"),
    ("mkl",),
    (
        "native",
        "flat",
        "functional",
        "trust_region",
        "distributions",
        "signals",
        "env_ids",
        "errors",
        "memory",
        "rows",
        "sum_tree",
    ),
)
ENTRY = {"train": {"pgrl"}}  # `python -m pgrl.train` runs the package's command line
RANK = {module: i for i, layer in enumerate(LAYERS) for module in layer}

PURE = ("functional", "trust_region", "distributions")  # torch and the standard library alone
ALL_OF_PGRL = {  # for those that import still less of pgrl than their row allows
    **dict.fromkeys(
        (*PURE, "data", "flat", "signals", "env_ids", "errors", "memory", "native", "rows", "sum_tree"),
        set[str](),
    ),
    "optim": {"flat", "compiling"},
    "processor": {"mkl"},
    "checkpoint": {"errors", "files", "rows", "state_tree"},
    "files": {"errors"},
    "state_tree": {"rows"},
    "replay": {"data", "replay_layout", "replay_rows", "sum_tree"},
    "replay_rows": {"replay_layout", "rows"},
    "replay_layout": {"data"},
    "logger": {"errors", "files"},
}
ONLY_IN = {
    "hydra": {"config"},
    "omegaconf": {"config"},
    "safetensors": {"checkpoint"},
    "tensorboard": {"logger"},
    "rich": {"logger"},
    "matplotlib": {"profiling"},
    "envpool": {"envs", "env_ids"},
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


def packages(path: Path) -> set[str]:
    """The top-level packages a file imports, and torch's TensorBoard as that."""
    return {d.split(".")[0] for d in imports(path)} | {"tensorboard" for d in imports(path) if "tensorboard" in d}


def of_pgrl(path: Path) -> set[str]:
    """The modules of pgrl a file imports, by their place in LAYERS."""
    inside = [dotted.split(".") for dotted in imports(path) if dotted.split(".")[0] == "pgrl"]
    return {parts[1] if len(parts) > 1 and parts[1] in RANK else "pgrl" for parts in inside}


@pytest.fixture(params=FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_every_module_has_a_layer(path: Path) -> None:
    assert name(path) in RANK, f"give {name(path)} a row in this test, and in docs/architecture.md"


def test_imports_point_downwards(path: Path) -> None:
    here = name(path)
    for other in of_pgrl(path) - {here, *ENTRY.get(here, ())}:
        assert RANK[other] > RANK[here], f"{here} imports {other}"
    assert of_pgrl(path) <= ALL_OF_PGRL.get(here, set(RANK))


def test_pure_modules_need_torch_alone(path: Path) -> None:
    if name(path) in PURE:
        assert {p for p in packages(path) if p not in sys.stdlib_module_names} <= {"torch"}


def test_packages_stay_where_they_belong(path: Path) -> None:
    for package in packages(path) & set(ONLY_IN):
        assert name(path) in ONLY_IN[package], f"{name(path)} imports {package}"


def test_agents_know_no_env_and_no_other_algorithm(path: Path) -> None:
    if name(path) != "agents" or path.stem == "__init__":
        return
    assert not packages(path) & {"logging", "hydra", "omegaconf"}
    for dotted in imports(path):
        parts = dotted.split(".")
        assert parts[:2] != ["pgrl", "envs"], dotted
        if parts[:2] == ["pgrl", "agents"]:
            assert parts[2] in {"base", "on_policy", "critic", "natural", "off_policy"} - {path.stem}, (
                f"{path.stem} imports {dotted}"
            )


def test_envs_know_no_agent(path: Path) -> None:
    if name(path) == "envs":
        assert not of_pgrl(path) & {"agents", "networks", "optim"}


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
    assert not packages(path) & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in ("save", "load"), f"{path}:{node.lineno}"
