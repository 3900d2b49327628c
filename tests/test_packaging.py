"""The files around the code agree with each other, and what is built from them works on its own."""

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
DOCKERFILE = [
    tuple(line.split(maxsplit=1))
    for line in re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text()).splitlines()
    if line and not line.startswith("#")
]


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def configs(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def stage(name: str) -> list[tuple[str, ...]]:
    """The instructions of one stage of the Dockerfile, after those of the stages that it stands on."""
    starts = [i for i, (word, *_) in enumerate(DOCKERFILE) if word == "FROM"] + [len(DOCKERFILE)]
    for start, end in zip(starts, starts[1:], strict=False):
        parent, _, own = DOCKERFILE[start][1].split()
        if own == name:
            return (stage(parent) if "$" not in parent else []) + DOCKERFILE[start + 1 : end]
    raise AssertionError(f"no stage {name}")


def test_constraints_pin_each_package_once_and_in_order() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()[1:]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines)
    names = [line.split("==")[0] for line in lines]
    assert names == sorted(set(names))


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_every_dependency_is_pinned_inside_its_range(extra: str) -> None:
    for text in EXTRAS[extra] if extra else PROJECT["project"]["dependencies"]:
        requirement = Requirement(text)
        if requirement.name == "pgrl":
            assert requirement.extras <= EXTRAS.keys()
        else:
            assert pins()[canonicalize_name(requirement.name)] in requirement.specifier, text


def test_extras_are_the_promised_ones_and_all_holds_every_feature() -> None:
    assert {"mujoco", "box2d", "envpool", "dev", "bench", "all"} <= EXTRAS.keys()
    assert Requirement(EXTRAS["all"][0]).extras == EXTRAS.keys() - {"all", "bench", "dev"}


def test_the_version_is_the_same_everywhere() -> None:
    version = PROJECT["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    assert ("ARG", f"VERSION={version}") in stage("runtime")


def test_files_named_in_pyproject_exist() -> None:
    assert (ROOT / "src/pgrl/py.typed").exists()
    project, targets = PROJECT["project"], PROJECT["tool"]["hatch"]["build"]["targets"]
    for name in {project["readme"], *project["license-files"], *targets["sdist"]["only-include"]}:
        assert (ROOT / name).exists(), name


def test_make_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony
    targets = set(re.findall(r"^([a-z][a-z-]*):(?!=)", text, re.MULTILINE))
    assert set(phony[1].split()) == targets >= {"help", "install", "train", "test", "check", "format", "test-slow"}
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^  make ([a-z-]+) +\S", shown, re.MULTILINE)) == targets


def test_continuous_integration_runs_make_test() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith("exec make test")


def test_pre_commit_hooks_are_the_commands_of_make_check() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    makefile = (ROOT / "Makefile").read_text()
    for hook in hooks:
        command = hook["entry"].removeprefix(".venv/bin/python ").removesuffix(" --fix")
        assert f"$(PY) {command}" in makefile


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_image_runs_training_as_a_user_without_rights(target: str) -> None:
    lines = stage(target)
    last = {word: value for word, value in lines if word in {"USER", "WORKDIR", "VOLUME", "ENTRYPOINT"}}
    assert last["USER"] not in {"root", "0"}
    assert last["WORKDIR"] == last["VOLUME"] == "/runs"
    init, _, *command = json.loads(last["ENTRYPOINT"])
    assert init.endswith("tini")
    assert command == ["python", "-m", "pgrl.train"]
    assert any(word == "RUN" and "install" in rest and "tini" in rest for word, rest in lines)
    assert any(word == "LABEL" and "org.opencontainers.image.licenses" in rest for word, rest in lines)


def test_image_is_built_from_pinned_versions_and_shipped_files() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    for word, rest in DOCKERFILE:
        if word == "COPY" and not rest.startswith(("--from", ". ")):
            assert all(f"!{name}" in ignore for name in rest.split()[:-1]), rest
        if word == "RUN" and "pip install" in rest:
            assert "-c /tmp/constraints.txt" in rest
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    for name in ["pyproject.toml", "README.md", "LICENSE", *wheel]:
        assert f"!{name.split('/')[0]}" in ignore, name


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def clean_python(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new venv that holds the wheel and what it requires, without extras."""
    venv = tmp_path_factory.mktemp("clean") / "venv"
    python = venv / "bin/python"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    constraints = ROOT / "constraints.txt"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-c", constraints, built[1]], check=True)
    return python


def output(folder: Path, *command: str | Path) -> str:
    """What a command prints when it runs in `folder` and sees nothing of this checkout."""
    env = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.xdist_group("wheel")
def test_sdist_and_wheel_carry_every_config(built: tuple[Path, Path], tmp_path: Path) -> None:
    with tarfile.open(built[0]) as sdist, zipfile.ZipFile(built[1]) as wheel:
        sdist.extractall(tmp_path, filter="data")
        wheel.extractall(tmp_path / "wheel")
    assert configs(ROOT / "configs")
    assert configs(next(tmp_path.glob("pgrl-*")) / "configs") == configs(ROOT / "configs")
    assert configs(tmp_path / "wheel/pgrl/configs") == configs(ROOT / "configs")
    assert (tmp_path / "wheel/pgrl/py.typed").exists()
    for folder in (tmp_path / "wheel/pgrl", next(tmp_path.glob("pgrl-*")) / "src/pgrl"):
        assert (folder / "sampling.cpp").exists() and (folder / "mkl.cpp").exists()


@pytest.mark.slow
@pytest.mark.xdist_group("wheel")
def test_every_algorithm_composes_from_the_wheel(clean_python: Path, tmp_path: Path) -> None:
    algos = sorted(path.stem for path in (ROOT / "configs/algo").glob("*.yaml"))
    assert {"a2c", "ppo"} <= set(algos)
    for algo in algos:
        shown = output(tmp_path, clean_python, "-m", "pgrl.train", "--cfg", "job", f"algo={algo}")
        assert yaml.safe_load(shown)["algo"], algo
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.xdist_group("wheel")
def test_a_short_training_from_the_wheel_is_evaluated(clean_python: Path, tmp_path: Path) -> None:
    command = ["algo=ppo", "env=CartPole-v1", "total_timesteps=2000", "run_dir=run"]
    output(tmp_path, clean_python.with_name("pgrl-train"), *command)
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "done"
    output(tmp_path, clean_python, "-m", "pgrl.evaluate", "run=run", "episodes=2")
    assert len(json.loads((tmp_path / "run/evaluation.json").read_text())["returns"]) == 2
