"""The folder of a run, as far as its configuration goes: its name, its config.yaml, and its status."""

from __future__ import annotations

import json
import re
import secrets
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pgrl.config import schema
from pgrl.config.schema import RunConfig
from pgrl.errors import UserError


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return (folder / "config.yaml").is_file()


def read_status(run_dir: Path) -> dict[str, Any]:
    """What status.json says, {} where there is none."""
    try:
        status = json.loads((run_dir / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def newest_runs() -> list[Path]:
    """The folders under runs/, the newest first."""
    found = [path.parent for path in Path("runs").glob("*/*/*/config.yaml")]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def new_run_dir(config: RunConfig) -> Path:
    """The folder of a new run: `run_dir`, or a name of its own under runs/<algo>/<env>."""
    if config.run_dir is not None:
        return Path(config.run_dir)
    env = re.sub(r"[^\w.-]+", "_", config.env.id)
    name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_seed{config.seed}_{secrets.token_hex(4)}"
    return Path("runs", schema.algo_name(config.algo), env, name)


def save_config(config: RunConfig) -> str:
    """The YAML text of a whole configuration; `load_run` reads it."""
    tree = asdict(config)
    tree["algo"] = {"name": schema.algo_name(config.algo), **tree["algo"]}
    return OmegaConf.to_yaml(OmegaConf.create(tree))


def load_run(run_dir: Path) -> RunConfig:
    """The configuration that a run was started with; UserError if `run_dir` is not the folder of a run."""
    return schema.real(read_run(run_dir))  # type: ignore[no-any-return]


def read_run(run_dir: Path) -> RunConfig:
    """As `load_run`, in the schema's own classes, without importing torch."""
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"))
        algo = schema.ALGOS[tree["algo"].pop("name")]
        config = OmegaConf.merge(OmegaConf.structured(RunConfig), {"algo": OmegaConf.structured(algo)}, tree)
        return OmegaConf.to_object(config)  # type: ignore[return-value]
    except Exception as error:  # whatever foreign contents may raise
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        text = f"{run_dir} is not the folder of a run of this pgrl: its config.yaml cannot be used ({why})."
        raise UserError(f"{text}\nTry: python -m pgrl.train algo=ppo env=CartPole-v1") from None
