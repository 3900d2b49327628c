"""The configuration: schemas, files, their order, sweeps, and the folders of runs."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
import yaml

import pgrl.functional
import pgrl.networks
from pgrl import config
from pgrl.agents import AGENTS, A2CConfig, PPOConfig
from pgrl.config import RunConfig, checks, composition, schema
from pgrl.config.checks import Wrong
from pgrl.envs.base import EnvConfig
from pgrl.errors import UserError

ROOT = Path(__file__).parents[1]
TUNED = sorted(path.relative_to(ROOT / "configs/tuned") for path in (ROOT / "configs/tuned").rglob("*-v*.yaml"))
ENVS = """CartPole-v1 Acrobot-v1 MountainCar-v0 Pendulum-v1 MountainCarContinuous-v0 LunarLander-v3
LunarLanderContinuous-v3 HalfCheetah-v4 HalfCheetah-v5 Hopper-v4 Hopper-v5 Walker2d-v4 Walker2d-v5 Ant-v4 Ant-v5
Humanoid-v4 Humanoid-v5 InvertedPendulum-v4 InvertedPendulum-v5 InvertedDoublePendulum-v4 InvertedDoublePendulum-v5
Swimmer-v4 Swimmer-v5 Reacher-v4 Reacher-v5""".split()


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


IDLE = {
    "algo.n_step": "algo.n_step=3",
    "algo.gae_lambda": "algo.gae_lambda=0.9 algo.advantage=td0",
    "algo.bootstrap_truncated": "algo.bootstrap_truncated=false algo=reinforce algo.baseline=mean",
    "algo.norm_value": "algo.norm_value=true algo=reinforce algo.baseline=null",
    "algo.update_epochs": "algo.update_epochs=3 algo=reinforce algo.baseline=null",
    "algo.num_minibatches": "algo.num_minibatches=10 algo=reinforce algo.baseline=time",
    "algo.shuffle": "algo.shuffle=false algo=reinforce algo.baseline=time",
    "algo.value_learning_rate": "algo.value_learning_rate=1e-4 algo=reinforce algo.baseline=time",
    "algo.vf_clip_coef": "algo.vf_clip_coef=0.1 algo=reinforce algo.baseline=time",
    "algo.step_size": "algo.step_size=0.2 algo=npg",
    "algo.clip_obs": "algo.clip_obs=5 env=CartPole-v1",
    "algo.anneal_clip": "algo.anneal_clip=true algo.clip_coef=null",
    "algo.clip_grad_per_network": "algo.clip_grad_per_network=true algo.max_grad_norm=null",
    "algo.kl_coef_target": "algo.kl_coef_target=0.02",
    "algo.rms_prop_alpha": "algo.rms_prop_alpha=0.9 algo=a2c algo.optimizer=adam",
    "algo.network.activation": "algo.network.activation=relu algo=dpg env=Pendulum-v1",
    "algo.network.policy_gain": "algo.network.policy_gain=1 algo.network.init=xavier",
    "algo.network.value_gain": "algo.network.value_gain=2 algo.network.init=xavier",
    "algo.policy.log_std_init": "algo.policy.log_std_init=-1 algo.policy.distribution=beta",
    "algo.policy.state_dependent_std": "algo.policy.state_dependent_std=true algo.policy.distribution=beta",
    "checkpoint.replay": "checkpoint.replay=false",
    "algo.network.layer_norm": "algo.network.layer_norm=true algo=sac algo.network.hidden_sizes=[]",
    "algo.per_beta": "algo.per_beta=0.5 algo=sac env=Pendulum-v1",
    "algo.ou_theta": "algo.ou_theta=0.5 algo=ddpg env=Pendulum-v1",
    "algo.target_noise_clip": "algo.target_noise_clip=0.3 algo=ddpg env=Pendulum-v1",
    "algo.alpha_init": "algo.alpha_init=0.5 algo=sac env=Pendulum-v1 algo.alpha=0.2",
    "algo.alpha_lr": "algo.alpha_lr=1e-3 algo=sac env=Pendulum-v1 algo.alpha=0.2",
    "algo.target_entropy": "algo.target_entropy=-3 algo=sac env=Pendulum-v1 algo.alpha=0.2",
    "eval_episodes": "eval_episodes=7",
    "tf32": "tf32=true",
}


@pytest.mark.parametrize("key", checks.NEEDS)
def test_a_key_without_effect_is_told(
    key: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "wrong_device", lambda _: [])  # as if there was a GPU
    words, jobs = IDLE[key].split(), []
    config.main(words, jobs.append)
    note = capsys.readouterr().err
    needed = checks.NEEDS[key].words
    assert note == f"note: {words[0]} changes nothing without {needed}\n"
    others = [word for word in words if word.partition("=")[0] != needed.partition("=")[0]]
    config.main([*others, needed], jobs.append)
    assert not capsys.readouterr().err and len(jobs) == 2


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert config.compose(["compile=false"]).compile is False
    with pytest.raises(UserError, match="compile=True: needs a C.. compiler(.|\n)*Try: .* compile=false"):
        config.compose(["compile=true"])


@pytest.mark.parametrize(
    ("words", "compiled", "why"),
    [
        ("algo=ppo env=Pendulum-v1 tuned=null num_envs=1 total_timesteps=300000", True, "46,720 gradient steps repay"),
        ("algo=ppo env=Pendulum-v1 tuned=null num_envs=1 total_timesteps=200000", False, "31,040 .* 45,000 would"),
        ("algo=a2c env=Pendulum-v1 tuned=null num_envs=1 algo.num_steps=10 total_timesteps=350000", True, "35,000"),
        ("algo=sac env=Pendulum-v1 tuned=null total_timesteps=35000", True, "25,000 gradient steps repay"),
        ("algo=sac env=Pendulum-v1 tuned=null total_timesteps=35000 algo.utd_ratio=0.5", False, "12,500"),
        ("algo=reinforce env=CartPole-v1 tuned=null algo.baseline=null total_timesteps=9000000", False, "110,000"),
        ("algo=a3c env=CartPole-v1 total_timesteps=9000000", False, ""),
        ("algo=dpg env=Pendulum-v1 total_timesteps=9000000", False, ""),
        ("algo=ppo env=Pendulum-v1 compile=true", True, ""),
        ("algo=sac env=Pendulum-v1 compile=false total_timesteps=90000", False, ""),
    ],
)
def test_compile_auto_asks_whether_it_pays(words: str, compiled: bool, why: str) -> None:
    decided, said = config.decide_compile(config.compose(words.split()))
    assert decided == compiled and re.search(why, said) and bool(said) == bool(why)


def test_compile_auto_does_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    found = config.compose(["algo=sac", "env=Pendulum-v1", "total_timesteps=90000"])
    assert config.decide_compile(found) == (False, ANY)
    assert "no C++ compiler" in config.decide_compile(found)[1]
    found.device = "cuda"  # composing asks for a GPU
    assert "on cuda" in config.decide_compile(found)[1]


ALL = "env=CartPole-v1 env.backend=torch"


@pytest.mark.parametrize(
    ("words", "captured", "why"),
    [
        (f"algo=ppo {ALL}", True, "^rollouts and updates are captured as two CUDA graphs$"),
        (f"algo=a2c {ALL}", True, "rollouts and updates"),
        (
            f"algo=ppo {ALL} algo.target_kl=0.02",
            "rollout",
            "^rollouts are .*; updates are not, .*target_kl=0.02",
        ),
        (f"algo=trpo {ALL}", "rollout", "^rollouts are .*; updates are not, for algo=trpo decides"),
        (
            "algo=a2c env=CartPole-v1",
            "update",
            "^updates, and acting .*; whole rollouts are not, for env.backend=gymnasium steps",
        ),
        ("algo=npg env=CartPole-v1", False, "^nothing is .* env.backend=gymnasium .*, and algo=npg decides"),
        (
            "algo=sac env=Pendulum-v1 env.backend=torch",
            "update",
            "^updates, and acting .*, for algo=sac decides on the CPU how",
        ),
        ("algo=dpg env=Pendulum-v1 env.backend=torch", False, "algo=dpg decides on the CPU how it acts, and algo=dpg"),
        (f"algo=ppo {ALL} profile=true", False, "profile=true"),
    ],
)
def test_capture_auto_takes_what_can_be_captured(words: str, captured: bool | str, why: str) -> None:
    found = config.compose(["capture=auto", *words.split()])
    assert config.decide_capture(found) == (False, "")  # a CPU has no graphs, and leaves nothing to decide
    found.device = "cuda"  # composing asks for a GPU
    decided, said = config.decide_capture(found)
    assert decided == captured and re.search(why, said) and bool(said) == bool(why)
    found.capture = decided
    assert config.decide_capture(found) == (decided, "") and not list(checks.wrong_capture(found))


def test_what_can_be_captured_is_captured_unasked() -> None:
    found = config.compose(ALL.split())
    assert config.decide_capture(found) == (False, "")
    found.device = "cuda"
    assert config.decide_capture(found)[0] is True


@pytest.mark.parametrize(
    ("words", "key", "why", "use"),
    [
        ("env=CartPole-v1 capture=true", "capture", "^rollouts cannot .* env.backend=gymnasium", "capture=update"),
        ("env=CartPole-v1 capture=rollout", "capture", "^rollouts cannot .* env.backend=gymnasium", "capture=update"),
        (
            f"{ALL} capture=true algo.target_kl=0.1",
            "capture",
            "^updates cannot .*target_kl=0.1",
            "capture=rollout",
        ),
        (f"{ALL} algo=npg capture=update", "capture", "^updates cannot .* algo=npg", "capture=rollout"),
        ("env=Pendulum-v1 algo=sac capture=true", "capture", "^rollouts cannot", "capture=update"),
        ("env=Pendulum-v1 algo=dpg capture=true", "capture", "rollouts .*, and updates cannot", "capture=false"),
        (f"{ALL} capture=true profile=true", "profile", "capture=true leaves a CUDA graph", "profile=false"),
    ],
)
def test_what_cannot_be_captured_is_refused(
    words: str, key: str, why: str, use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "wrong_device", lambda _: [])
    with pytest.raises(UserError) as caught:
        config.compose([*words.split(), "device=cuda"])
    line, remedy = str(caught.value).splitlines()
    assert re.search(why, line.partition(": ")[2]) and line.startswith(f"{key}=")
    assert use in remedy.split() and "device=cuda" in remedy.split()
    assert config.compose(remedy.split()[4:])


def test_a_resumed_run_keeps_to_what_it_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "wrong_device", lambda _: [])
    folder = stopped_run(tmp_path / "run", *ALL.split(), "device=cuda", "capture=rollout")
    assert config.decide_capture(config.compose([f"resume={folder}"])) == ("rollout", "")
    on_cpu = config.compose([f"resume={folder}", "device=cpu"])
    assert on_cpu.capture is False and config.decide_capture(on_cpu) == (False, "")
    with pytest.raises(UserError, match="profile=True: capture=rollout leaves(.|\n)*profile=false"):
        config.compose([f"resume={folder}", "profile=true"])
    with pytest.raises(UserError, match="capture=true: cannot change"):
        config.compose([f"resume={folder}", "capture=true"])


def test_a_compiled_run_is_not_resumed_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stopped_run(tmp_path / "run", "algo=ppo", "env=CartPole-v1", "compile=true")
    assert config.compose([f"resume={folder}"]).compile is True
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="compile=True: the run's steps are compiled(.|\n)*install g"):
        config.compose([f"resume={folder}"])


def test_stopped_a3c_run_stays_on_the_cpu(tmp_path: Path) -> None:
    folder = stopped_run(tmp_path / "run", "algo=a3c", "env=Acrobot-v1")
    with pytest.raises(UserError, match="device=cuda: algo=a3c is for the CPU(.|\n)*Try: .* device=cpu"):
        config.compose([f"resume={folder}", "device=cuda"])
    with pytest.raises(UserError, match="profile=True: algo=a3c(.|\n)*Try: .* profile=false"):
        config.compose([f"resume={folder}", "profile=true"])


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of configs/ to change."""
    copy = tmp_path / "configs"
    shutil.copytree(ROOT / "configs", copy)
    for module in (config, composition):
        monkeypatch.setattr(module, "config_dir", lambda: copy)
    return copy


def add(configs: Path, name: str, text: str) -> None:
    path = configs / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def leaves(words: list[str]) -> dict[str, Any]:
    return dict(schema.leaves(config.checked(words)))


# ------------------------------------------------------------------------------------------------------------- schema


@pytest.mark.parametrize("cls", [*AGENTS, EnvConfig, pgrl.networks.NetworkConfig, pgrl.networks.PolicyConfig])
def test_schema_is_the_dataclass_of_the_module(cls: type) -> None:
    own = schema.ALGOS.get(cls.__name__.removesuffix("Config").lower()) or getattr(schema._module, cls.__name__)
    assert own is not cls and [f.name for f in dataclasses.fields(own)] == [f.name for f in dataclasses.fields(cls)]
    assert [f.type for f in dataclasses.fields(own)] == [f.type for f in dataclasses.fields(cls)]
    assert schema.real(own()) == cls() and type(schema.real(own())) is cls


def test_every_algorithm_has_a_schema_and_an_agent() -> None:
    assert [agent.name for agent in AGENTS.values()] == list(map(schema.algo_name, (cls() for cls in AGENTS)))
    assert {agent.name for agent in AGENTS.values()} == schema.ALGOS.keys()


def test_choices_are_those_of_the_code() -> None:
    assert set(checks.CHOICES["activation"]) == set(pgrl.networks.ACTIVATIONS)
    assert set(checks.CHOICES["advantage"]) == set(pgrl.functional.ADVANTAGES)


@pytest.mark.parametrize("algo", schema.ALGOS)
def test_every_number_has_a_range_and_every_text_its_choices(algo: str) -> None:
    free = {
        "ent_coef",
        "ent_coef_final",
        "log_std_init",
        "target_entropy",
        "id",
        "run_dir",
        "resume",
    }  # any finite number, any text
    for key, (kind, _) in schema.keys(RunConfig, schema.ALGOS[algo]).items():
        name = key.rpartition(".")[2]
        if re.match(r"int|float|str|list", kind) and name not in free:
            assert name in checks.RULES or name in checks.CHOICES, key


@pytest.mark.parametrize("algo", schema.ALGOS)
def test_defaults_are_valid(algo: str) -> None:
    assert config.checked([f"algo={algo}", "tuned=null"]).algo == schema.ALGOS[algo]()


def test_composition_does_not_import_torch() -> None:
    code = "import sys; from pgrl import config; config.checked(['env=Hopper-v4']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_types_resolve_to_those_the_agents_use() -> None:
    run = config.compose(["algo=a2c", "env=Pendulum-v1", "algo.network.hidden_sizes=[8]"])
    assert type(run.algo) is A2CConfig and type(run.env) is EnvConfig
    assert type(run.algo.network) is pgrl.networks.NetworkConfig and run.algo.network.hidden_sizes == [8]
    assert typing.get_type_hints(type(run.algo))


# -------------------------------------------------------------------------------------------------------------- files


def test_tuned_envs_of_the_algorithms_for_all_of_them() -> None:
    tuned = {str(path.with_suffix("")) for path in TUNED}
    assert {f"{algo}/{env}" for algo in ("a2c", "ppo") for env in ENVS} <= tuned
    mujoco = {name.partition("/")[2] for name in tuned if name.startswith("a2c/") and "-v4" in name}
    assert len(mujoco) > 8 and {f"{algo}/{env}" for algo in ("npg", "trpo") for env in mujoco} <= tuned
    assert {f"a3c/{env}" for env in ("CartPole-v1", "Acrobot-v1", "Pendulum-v1")} <= tuned


def tree_of(path: Path) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "configs/tuned" / path).read_text())


PLAIN = [path for path in TUNED if set(tree_of(path)) == {"defaults"}]  # only take another's settings


@pytest.mark.parametrize("path", [path for path in TUNED if path not in PLAIN[1:]], ids=str)
def test_tuned_file_composes(path: Path) -> None:
    algo, _, env = str(path.with_suffix("")).partition("/")
    tuned = config.checked([f"algo={algo}", f"env={env}"])
    assert schema.algo_name(tuned.algo) == algo and tuned.env.id == env


def test_tuned_files_take_others_that_exist_and_v5_those_of_v4() -> None:
    for path in TUNED:
        taken = [entry for entry in tree_of(path).get("defaults", []) if entry != "_self_"]
        assert all((ROOT / f"configs{entry}.yaml").is_file() for entry in taken), path
        v4 = str(path.with_suffix("")).replace("-v5", "-v4")
        assert not path.stem.endswith("-v5") or f"/tuned/{v4}" in taken


@pytest.mark.parametrize("path", TUNED, ids=str)
def test_tuned_files_repeat_no_default(path: Path) -> None:
    tree, keys = tree_of(path), schema.keys(RunConfig, schema.ALGOS[path.parts[0]])
    alone = tree.pop("defaults", None) is None
    for key in composition.flat(tree, keys):
        value: Any = tree
        for part in key.split("."):
            value = value[part]
        assert key in keys, key
        assert not alone or as_number(value) != keys[key].default, key


def as_number(value: Any) -> Any:
    """The number in a text: YAML 1.1 takes 1e-3 for one."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def test_misspelt_and_mistyped_keys_in_files_are_refused(configs: Path) -> None:
    add(configs, "tuned/ppo/Acrobot-v1", "# @package _global_\nalgo:\n  gama: 0.9\n")
    with pytest.raises(UserError, match="gama"):
        config.compose(["env=Acrobot-v1"])
    add(configs, "tuned/ppo/Acrobot-v1", "# @package _global_\nalgo:\n  gamma: high\n")
    with pytest.raises(UserError, match="gamma"):
        config.compose(["env=Acrobot-v1"])


def test_later_files_win(configs: Path) -> None:
    words = ["env=Acrobot-v1"]
    (configs / "tuned/ppo/Acrobot-v1.yaml").unlink()
    assert leaves(words)["algo.vf_coef"] == schema.ALGOS["ppo"]().vf_coef
    add(configs, "algo/ppo", "defaults:\n  - /schema/ppo\n  - _self_\nvf_coef: 1\n")
    assert leaves(words)["algo.vf_coef"] == 1
    names = ["env/Acrobot-v1", "tuned/ppo/Acrobot-v1", "experiment/mine", "network/mine"]
    for number, name in enumerate(names, 2):
        env = "env:\n  id: Acrobot-v1\n" if name.startswith("env") else ""
        add(configs, name, f"# @package _global_\n{env}algo:\n  vf_coef: {number}\n")
        words += [f"{name.replace('/', '=')}"] if name.endswith("mine") else []
        assert leaves(words)["algo.vf_coef"] == number, name
    assert leaves([*words, "algo.vf_coef=9"])["algo.vf_coef"] == 9


def test_tuned_settings_can_be_left_out_or_borrowed() -> None:
    tuned, plain = leaves(["env=CartPole-v1"]), leaves(["env=CartPole-v1", "tuned=null"])
    assert tuned["num_envs"] != 1 and plain["num_envs"] == 1
    assert leaves(["env=CartPole-v1", "~tuned"]) == plain
    assert leaves(["env=Acrobot-v1", "tuned=ppo/CartPole-v1"]) | {"env.id": "CartPole-v1"} == tuned


def test_network_is_a_choice() -> None:
    cnn = leaves(["network=cnn"])
    assert cnn["algo.network.body"] == "cnn" and cnn["algo.network.shared"]
    assert leaves(["network=mlp"])["algo.network.body"] == "mlp"
    assert leaves(["network=null", "experiment=null"])["algo.network.body"] == "auto"


def test_any_prefix_of_an_override_does() -> None:
    for seed, kwargs in (
        ("seed=3", "env.kwargs={g: 9}"),
        ("+seed=3", "env.kwargs.g=9"),
        ("++seed=3", "+env.kwargs.g=9"),
    ):
        values = leaves(["env.id=Acrobot-v1", seed, kwargs])
        assert (values["seed"], values["env.kwargs"]) == (3, {"g": 9})
        assert values["num_envs"] == 16  # env.id= finds the tuned file as env= does


def test_value_may_refer_to_another() -> None:
    assert leaves(["seed=7", "run_dir=runs/s${seed}"])["run_dir"] == "runs/s7"


# ---------------------------------------------------------------------------------------------------------------- env


def test_env_of_a_package_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv
gymnasium.register("MyCartPole-v0", CartPoleEnv, max_episode_steps=9)
"""
    (tmp_path / "a_package_of_mine.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert config.checked(["env=a_package_of_mine:MyCartPole-v0"]).env.id == "a_package_of_mine:MyCartPole-v0"
    swept = composition.jobs(["env=a_package_of_mine:MyCartPole-v0,CartPole-v1"])
    assert config.checked(swept[0]).env.id == "a_package_of_mine:MyCartPole-v0" and swept[1] == ["env=CartPole-v1"]
    with pytest.raises(Wrong, match="a_package_of_mine:MyKartPole-v0"):
        config.checked(["env=a_package_of_mine:MyKartPole-v0"])


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from pgrl import env_ids

    monkeypatch.setattr(env_ids, "find_spec", lambda name: None)
    for env_id, package in (
        ("Hopper-v4", "'pgrl[mujoco]'"),
        ("LunarLander-v3", "'pgrl[box2d]'"),
        ("ALE/Pong-v5", "ale-py"),
    ):
        with pytest.raises(UserError, match=re.escape(f"pip install {package}")):
            config.compose([f"env={env_id}"])


def test_composed_choices_name_a_slashed_env() -> None:
    assert composition.compose(["env=ALE/Pong-v5"]).config.env.id == "ALE/Pong-v5"


# -------------------------------------------------------------------------------------------------------- experiments

# arXiv 2005.12729, appendix A.1, and the authors' code: returns?, init, annealed?, value clip, policy and value rates,
# reward and obs clip, lambda, entropy, gradient clip
ENGSTROM = {
    ("engstrom_ppo", "Walker2d"): (True, "orthogonal", True, 0.2, 4e-4, 3e-4, 10, 10, 0.95, 0, None),
    ("engstrom_ppo", "Hopper"): (True, "orthogonal", True, None, 3e-4, 2.5e-4, 10, 10, 0.95, 0, None),
    ("engstrom_ppo", "Humanoid"): (True, "orthogonal", True, 0.2, 1.5e-4, 1e-4, 10, 10, 0.95, 0, None),
    ("engstrom_ppo_m", "Walker2d"): (False, "xavier", False, None, 1e-4, 2e-4, None, None, 0.95, 0, None),
    ("engstrom_ppo_m", "Hopper"): (False, "xavier", False, None, 1.7e-4, 4e-4, None, None, 0.95, 0, None),
    ("engstrom_ppo_m", "Humanoid"): (False, "xavier", False, None, 9e-5, 4e-4, None, None, 0.95, 0, None),
    ("engstrom_ppo_noclip", "Walker2d"): (False, "orthogonal", True, None, 7.25e-5, 6e-4, 30, None, 0.85, -0.01, 0.1),
    ("engstrom_ppo_noclip", "Hopper"): (False, "orthogonal", True, None, 6e-5, 4e-4, 2.5, 10, 0.925, -0.005, 4),
    ("engstrom_ppo_noclip", "Humanoid"): (True, "xavier", False, 0.2, 2e-5, 5e-5, 10, 10, 0.85, 0.005, 0.5),
}
COLUMNS = """norm_reward network.init anneal_lr vf_clip_coef learning_rate value_learning_rate clip_reward clip_obs
gae_lambda ent_coef max_grad_norm""".split()
COMMON = {
    "total_timesteps": 999_424,
    "num_envs": 1,
    "algo.num_steps": 2048,
    "algo.update_epochs": 10,
    "algo.num_minibatches": 32,
    "algo.gamma": 0.99,
    "algo.adam_eps": 1e-5,
    "algo.norm_obs": True,
    "algo.norm_adv": "minibatch",
    "algo.bootstrap_truncated": False,
    "algo.clip_grad_per_network": True,
    "algo.network.hidden_sizes": [64, 64],
    "algo.network.activation": "tanh",
    "algo.network.shared": False,
    "algo.network.policy_gain": 0.01,
    "algo.network.value_gain": 1.0,
    "algo.policy.log_std_init": 0.0,
    "algo.policy.state_dependent_std": False,
    "algo.policy.rescale": False,
}


# init, value clip, KL, value rate, reward and obs clip, returns?, lambda
ENGSTROM_TRPO = {
    ("engstrom_trpo", "Walker2d"): ("xavier", None, 0.04, 3e-4, None, None, False, 0.95),
    ("engstrom_trpo", "Hopper"): ("xavier", None, 0.13, 2e-4, None, None, False, 0.95),
    ("engstrom_trpo", "Humanoid"): ("xavier", None, 0.07, 3e-4, None, None, False, 0.95),
    ("engstrom_trpo_plus", "Walker2d"): ("orthogonal", None, 0.07, 1e-4, 10, 10, True, 0.95),
    ("engstrom_trpo_plus", "Hopper"): ("orthogonal", None, 0.04, 2e-4, 10, 10, True, 0.95),
    ("engstrom_trpo_plus", "Humanoid"): ("xavier", 0.2, 0.10, 5e-5, 10, 10, True, 0.85),
}
TRPO_COLUMNS = (
    """network.init vf_clip_coef max_kl value_learning_rate clip_reward clip_obs norm_reward gae_lambda""".split()
)
COMMON_TRPO = {
    **{key: value for key, value in COMMON.items() if key not in ("algo.norm_adv", "algo.clip_grad_per_network")},
    "algo.fisher_fraction": 0.1,
    "algo.cg_steps": 10,
    "algo.damping": 0.1,
    "algo.backtrack_factor": 0.5,
    "algo.backtrack_steps": 10,
    "algo.accept_ratio": 0.1,
    "algo.anneal_lr": False,
    "algo.max_grad_norm": None,
}


def add_hostile(configs: Path, algo: str, env: str) -> dict[str, Any]:
    """Tuned settings that set every key to something strange; the algorithm's defaults by key."""
    keys = {k: v for k, v in schema.keys(RunConfig, schema.ALGOS[algo]).items() if k.startswith("algo.")}
    hostile = {"int": 17, "float": 0.1234, "str": "x", "list[int]": [3]}
    lines: dict[str, Any] = {"num_envs": 17, "total_timesteps": 17}
    for key, (kind, default) in keys.items():
        *parents, name = key.split(".")
        place = lines
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = not default if kind == "bool" else hostile[kind.removesuffix(" | None")]
    add(configs, f"tuned/{algo}/{env}", "# @package _global_\n" + yaml.safe_dump(lines))
    return {key: default for key, (_, default) in keys.items()}


@pytest.mark.parametrize("experiment, family", ENGSTROM, ids=str)
def test_engstrom_is_the_table_and_nothing_tuned_leaks_in(experiment: str, family: str, configs: Path) -> None:
    defaults = add_hostile(configs, "ppo", f"{family}-v5")
    values = leaves([f"env={family}-v5", f"experiment={experiment}"])
    assert {key: values[key] for key in COMMON} == COMMON
    row = ENGSTROM[experiment, family]
    assert {key: values[f"algo.{key}"] for key in COLUMNS} == dict(zip(COLUMNS, row, strict=True))
    assert values["algo.clip_coef"] == (None if experiment.endswith("noclip") else 0.2)
    named = {*COMMON, "algo.clip_coef", *(f"algo.{key}" for key in COLUMNS)}
    rest = {key: default for key, default in defaults.items() if key not in named}
    rest |= {"algo.network.body": "mlp", "algo.vf_coef": 2.0}  # their value loss is not halved
    assert {key: values[key] for key in rest} == rest


@pytest.mark.parametrize("experiment, family", ENGSTROM_TRPO, ids=str)
def test_engstrom_trpo_is_the_table_and_nothing_tuned_leaks_in(experiment: str, family: str, configs: Path) -> None:
    defaults = add_hostile(configs, "trpo", f"{family}-v5")
    values = leaves([f"env={family}-v5", f"experiment={experiment}"])
    assert {key: values[key] for key in COMMON_TRPO} == COMMON_TRPO
    row = ENGSTROM_TRPO[experiment, family]
    assert {key: values[f"algo.{key}"] for key in TRPO_COLUMNS} == dict(zip(TRPO_COLUMNS, row, strict=True))
    named = {*COMMON_TRPO, *(f"algo.{key}" for key in TRPO_COLUMNS)}
    rest = {key: default for key, default in defaults.items() if key not in named} | {"algo.network.body": "mlp"}
    assert {key: values[key] for key in rest} == rest


def test_minibatches_matter_where_there_is_a_critic() -> None:
    config.checked(["algo=reinforce", "env=Acrobot-v1", "algo.num_steps=501", "algo.baseline=null"])
    with pytest.raises(Wrong, match="num_minibatches"):
        config.checked(["algo=reinforce", "env=Acrobot-v1", "algo.num_steps=501"])


def test_actor_critic_is_one_step_a2c() -> None:
    values = leaves(["experiment=actor_critic", "env=CartPole-v1"])
    assert values["algo.advantage"] == "td0" and values["algo.num_steps"] == 1
    assert schema.algo_name(config.checked(["experiment=actor_critic", "env=Pendulum-v1"]).algo) == "a2c"


@pytest.mark.parametrize("experiment", ["cleanrl_ppo", "cleanrl_ppo_discrete"])
def test_cleanrl_is_its_own_config_whatever_is_tuned(experiment: str) -> None:
    values = leaves([f"experiment={experiment}", "env=CartPole-v1"])
    assert values | {"env.id": "Acrobot-v1"} == leaves([f"experiment={experiment}", "env=Acrobot-v1"])
    expected = {"num_envs": 1, "algo.num_steps": 2048, "algo.num_minibatches": 32, "algo.update_epochs": 10}
    if experiment == "cleanrl_ppo_discrete":
        expected = {"num_envs": 4, "algo.num_steps": 128, "algo.num_minibatches": 4, "algo.update_epochs": 4}
    assert {key: values[key] for key in expected} == expected


# ------------------------------------------------------------------------------------------------------------- sweeps


def test_sweep_is_the_product_of_its_values() -> None:
    swept = composition.jobs(["algo=ppo,a2c", "env=CartPole-v1", "seed=range(1,4)", "algo.network.hidden_sizes=[8,8]"])
    expected = [[f"algo={algo}", "env=CartPole-v1", f"seed={seed}", "algo.network.hidden_sizes=[8,8]"]
                for algo in ("ppo", "a2c") for seed in (1, 2, 3)]  # fmt: skip
    assert swept == expected


def test_sweep_runs_every_combination_and_leaves_one_file(tmp_path: Path) -> None:
    met: list[RunConfig] = []
    config.main(["-m", "env=CartPole-v1,Acrobot-v1", "env.kwargs={}"], met.append)
    assert [(type(run.algo), run.env.id) for run in met] == [(PPOConfig, "CartPole-v1"), (PPOConfig, "Acrobot-v1")]
    assert {run.num_envs for run in met} == {8, 16}  # each with its own tuned file
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["multirun.yaml"]
    assert next(tmp_path.glob("runs/sweeps/*/multirun.yaml"))


def test_sweep_is_checked_before_its_first_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    met: list[RunConfig] = []
    with pytest.raises(SystemExit) as caught:
        config.main(["-m", "seed=1,2", "algo.gamma=0.9,7"], met.append)
    assert caught.value.code == 2 and not met and not any(tmp_path.iterdir())
    assert "algo.gamma=7" in capsys.readouterr().err


def test_mistake_inside_a_job_of_a_sweep_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def job(run: RunConfig) -> None:
        raise UserError(f"no: {run.seed}")

    with pytest.raises(SystemExit) as caught:
        config.main(["-m", "seed=1,2"], job)
    assert caught.value.code == 2 and "no: 1" in capsys.readouterr().err


def test_single_run_leaves_nothing_behind(tmp_path: Path) -> None:
    config.main(["seed=2"], lambda run: None)
    assert not any(tmp_path.iterdir())


def test_answers_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--cfg", "job", "algo=a2c", "seed=5"], ["--help"], ["--envs"]):
        config.main(option, lambda run: pytest.fail("ran"))
        text = capsys.readouterr().out
        if option[0] == "--cfg":
            printed = yaml.safe_load(text)
            assert printed["algo"]["name"] == "a2c" and printed["seed"] == 5
            (tmp_path / "config.yaml").write_text(text)
            assert config.load_run(tmp_path).seed == 5
        elif option[0] == "--help":
            named = {f.name for f in dataclasses.fields(RunConfig)} | {"tuned", "experiment", "network"}
            assert all(f"{name}=" in text for name in named - {"algo", "env", "checkpoint"}) and "algo=" in text
            assert "checkpoint.replay=" in text
            assert len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 110
        else:
            assert {"CartPole-v1", "Hopper-v5"} <= set(text.split()) and "Hopper-v3" not in text.split()


# -------------------------------------------------------------------------------------------------------- run folders


def test_default_folders_are_unique_and_safe() -> None:
    run = config.compose(["seed=3"])
    folders = {config.new_run_dir(run) for _ in range(500)}
    assert len(folders) == 500
    assert all(
        re.fullmatch(r"runs/ppo/CartPole-v1/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_seed3_[0-9a-f]{8}", str(f)) for f in folders
    )
    run.env.id = "pack.age:ALE/Pong-v5"
    assert config.new_run_dir(run).parent == Path("runs/ppo/pack.age_ALE_Pong-v5")
    run.run_dir = "here"
    assert config.new_run_dir(run) == Path("here")


@pytest.mark.parametrize(
    "words", [["algo=a2c", "env=Hopper-v5"], ["env=Acrobot-v1", "env.kwargs={a: [1, x]}", "threads=2"]]
)
def test_saved_config_loads_equal(words: list[str], tmp_path: Path) -> None:
    run = config.compose(words)
    (tmp_path / "config.yaml").write_text(config.save_config(run))
    assert config.load_run(tmp_path) == run


def stopped_run(folder: Path, *words: str, state: str = "stopped", step: int = 51_200) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.save_config(config.compose(words)))
    (folder / "status.json").write_text(f'{{"state": "{state}", "step": {step}}}')
    return folder


def test_resume_takes_the_saved_config_and_few_changes(tmp_path: Path) -> None:
    folder = stopped_run(tmp_path / "run", "algo=a2c", "env=Acrobot-v1", "seed=9")
    run = config.compose([f"resume={folder}"])
    expected = config.load_run(folder)
    expected.resume = expected.run_dir = str(folder)
    assert run == expected and run.seed == 9 and type(run.algo) is A2CConfig
    run = config.compose(
        [f"resume={folder}", "total_timesteps=2000000", "save_every=7", "tensorboard=false", "threads=1"]
    )
    assert (run.total_timesteps, run.save_every, run.tensorboard, run.threads, run.seed) == (2_000_000, 7, False, 1, 9)


def test_done_run_goes_on_only_if_made_longer(tmp_path: Path) -> None:
    folder = stopped_run(tmp_path / "run", state="done", step=99_840)
    with pytest.raises(UserError, match="is done.*\n.*total_timesteps=200000"):
        config.compose([f"resume={folder}"])
    assert config.compose([f"resume={folder}", "total_timesteps=200000"]).total_timesteps == 200_000


def test_command_lines_of_evaluate(tmp_path: Path) -> None:
    folder = stopped_run(tmp_path / "run")
    assert config.evaluate_config([f"run={folder}"]) == config.EvaluateConfig(str(folder))
    options = config.evaluate_config([f"run={folder}", "episodes=3", "seed=4", "checkpoint=100"])
    assert options == config.EvaluateConfig(str(folder), 3, 4, "100")


def test_config_dir_holds_the_files() -> None:
    assert config.config_dir() == ROOT / "configs"
    assert {path.stem for path in (config.config_dir() / "algo").glob("*.yaml")} == schema.ALGOS.keys()


def test_docs_name_every_top_level_key() -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    for key in schema.keys(RunConfig, None):
        assert f"`{key}" in page, key


def test_threads_of_torch_are_left_alone() -> None:
    before = torch.get_num_threads()
    config.compose(["threads=7"])
    assert torch.get_num_threads() == before
