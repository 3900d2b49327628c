"""Wrong commands: each is answered in one screen with key, value, reason and a command that works; exit code 2."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pgrl import config, files
from pgrl.config import checks
from pgrl.launch import launch

# The command, what the answer must name, and why. In the folder lie the runs `stopped` and `done`, the folder `other`
# that is no run, one with a config.yaml of something else, `foreign`, and the file `file`.
WRONG = [
    # algorithms, envs, and other choices of files
    ("algo=foo", "algo=foo", "must be a2c or"),
    ("algo=", "algo=", "needs a name"),
    ("env=CartPole", "env=CartPole", "did you mean CartPole-v1"),
    ("env=Hoper-v4", "env=Hoper-v4", "did you mean Hopper-v4"),
    ("env=no_such_package:Env-v0", "env=no_such_package:Env-v0", "No module named"),
    ("experiment=engstrom", "experiment=engstrom", "must be actor_critic or cleanrl_ppo"),
    ("experiment=engstrom_ppo env=Ant-v4", "env=Ant-v4", "Hopper, Humanoid, Walker2d only"),
    ("algo=a2c experiment=engstrom_ppo env=Hopper-v4", "algo=a2c", "experiment=engstrom_ppo sets"),
    ("tuned=ppo/Nothing", "tuned=ppo/Nothing", "no tuned settings"),
    # keys
    ("gamma=0.9", "gamma=0.9", "did you mean algo.gamma"),
    ("algo.gama=0.9", "algo.gama=0.9", "did you mean algo.gamma"),
    ("~algo.gamma", "~algo.gamma", "null switches off"),
    ("--seed 3", "--seed", "no such option"),
    ("algo.gamma=[0.9", "algo.gamma=[0.9", "cannot be read"),
    ("seed=1,2", "seed=1,2", "needs -m"),
    # types
    ("seed=abc", "seed=abc", "a whole number"),
    ("total_timesteps=1e6", "total_timesteps=1e6", "a whole number"),
    ("algo.network.hidden_sizes=64", "algo.network.hidden_sizes=64", "a list such as"),
    # ranges and choices
    ("algo.gamma=1.5", "algo.gamma=1.5", "in [0, 1]"),
    ("algo.learning_rate=0", "algo.learning_rate=0.0", "above 0"),
    ("num_envs=0", "num_envs=0", "at least 1"),
    ("algo.advantage=gea", "algo.advantage=gea", "must be gae"),
    # what does not fit together
    ("algo.num_minibatches=7", "algo.num_minibatches=7", "does not divide"),
    ("algo.num_minibatches=256", "algo.num_minibatches=256", "cannot be normalised"),
    ("algo.norm_adv=batch num_envs=1 algo.num_steps=1 algo.num_minibatches=1", "algo.num_steps=1", "normalised"),
    ("algo.num_minibatches=100000000", "algo.num_minibatches=100000000", "does not divide"),
    ("algo.update_epochs=1 algo.target_kl=0.02", "algo.update_epochs=1", "nothing to judge"),
    ("total_timesteps=10", "total_timesteps=10", "less than one rollout"),
    ("algo.clip_coef=null algo.dual_clip=3", "algo.dual_clip=3", "switches clipping off"),
    ("algo.gamma=2 env=Hoper-v4 seed=-1", "seed=-1", "must be in [0, 1]"),
    ("algo=reinforce env=Pendulum-v1 algo.num_steps=64", "algo.num_steps=64", "can take 200 steps"),
    ("algo=reinforce algo.baseline=leave_one_out num_envs=1", "num_envs=1", "none of them"),
    ("algo=reinforce algo.baseline=none", "algo.baseline=none", "or null"),
    ("algo=trpo algo.max_kl=0", "algo.max_kl=0.0", "above 0"),
    ("algo=npg algo.max_kl=-1", "algo.max_kl=-1.0", "above 0"),
    ("algo=trpo algo.damping=-0.1", "algo.damping=-0.1", "not be negative"),
    ("algo=trpo algo.backtrack_factor=1", "algo.backtrack_factor=1.0", "below 1"),
    # a deterministic policy
    ("algo=dpg algo.noise_std=0", "algo.noise_std=0.0", "above 0"),
    ("algo=dpg compile=true", "compile=True", "no loss"),
    ("algo=dpg network=mlp", "network=mlp", "algo=dpg does not have"),
    ("algo=sac env=Pendulum-v1 network=cnn algo.learning_starts=500", "network=cnn", "which algo=sac does not have"),
    ("algo=ddpg env=Pendulum-v1 algo.per_alpha=3", "algo.per_alpha=3.0", "at most 1"),
    ("algo=sac env=Pendulum-v1 algo.policy_delay=20000", "total_timesteps=20000", "no step of the policy"),
    ("algo=dpg algo.ent_coef=0.1", "algo.ent_coef=0.1", "but for algo=a2c"),
    ("env=LinearQuadratic-v0", "env=LinearQuadratic-v0", "did you mean pgrl/LinearQuadratic-v0"),
    # replay
    ("algo=sac env=Pendulum-v1 algo.buffer_size=100", "algo.buffer_size=100", "cannot hold one batch"),
    ("algo=ddpg env=Pendulum-v1 algo.learning_starts=10", "algo.learning_starts=10", "less than one batch"),
    ("algo=sac env=Pendulum-v1 total_timesteps=500", "total_timesteps=500", "no gradient step"),
    ("algo=sac num_envs=4000 total_timesteps=11000 algo.learning_starts=10000", "total_timesteps=11000", "no gradient"),
    ("algo=sac env=Acrobot-v1 algo.utd_ratio=1e-7", "total_timesteps=1000000", "no gradient step"),
    ("algo=sac num_envs=10 algo.num_steps=5000 algo.buffer_size=20000", "algo.buffer_size=20000", "one rollout"),
    ("algo=sac env=Acrobot-v1 num_envs=2000 algo.buffer_size=1000", "algo.buffer_size=1000", "one rollout of"),
    ("algo=sac env=Acrobot-v1 algo.buffer_size=1000", "algo.buffer_size=1000", "cannot hold algo.learning_starts"),
    (
        "algo=sac env=Acrobot-v1 algo.learning_starts=1000 algo.buffer_size=1000 num_envs=500 algo.n_step=50",
        "algo.buffer_size=1000",
        "cannot hold algo.n_step=50",
    ),
    ("algo=ddpg env=Pendulum-v1 algo.noise=ou algo.num_steps=2", "algo.noise=ou", "seen after a rollout"),
    ("algo=sac env=Pendulum-v1 algo.noise_correlation=1", "algo.noise_correlation=1.0", "in [0, 1)"),
    ("algo=sac env=Pendulum-v1 algo.tau=0", "algo.tau=0.0", "above 0"),
    ("algo=ddpg env=Pendulum-v1 algo.noise=white", "algo.noise=white", "must be gaussian or ou"),
    # asynchronous workers
    ("algo=a3c device=cuda", "device=cuda", "for the CPU"),
    ("algo=a3c compile=true", "compile=True", "which no compiled step may"),
    ("algo=a3c profile=true", "profile=True", "processes of its own"),
    ("algo=a3c algo.norm_value=true", "algo.norm_value=True", "cannot rescale"),
    ("algo=a3c algo.num_workers=0", "algo.num_workers=0", "at least 1"),
    ("algo=a3c total_timesteps=4", "total_timesteps=4", "less than one rollout"),
    ("algo=a3c algo.optimizer=adam", "algo.optimizer=adam", "but for algo=a2c"),
    # envs in processes
    ("env.processes=0", "env.processes=0", "at least 1"),
    ("num_envs=4 env.processes=8", "env.processes=8", "more than there are envs"),
    ("env.backend=torch env.processes=2", "env.processes=2", "for Gymnasium's envs"),
    ("algo=a3c env.processes=2", "env.processes=2", "whose workers are processes"),
    # CUDA graphs
    ("env=CartPole-v1 env.backend=torch capture=true", "capture=True", "need device=cuda"),
    ("env=CartPole-v1 capture=maybe", "capture=maybe", "rollout or update"),
    ("env=CartPole-v1 device=cuda:99 capture=update", "device=cuda:99", "not available"),
    # folders and devices
    ("device=cuda:99", "device=cuda:99", "not available"),
    ("run_dir=file/run", "run_dir=file/run", "not a folder"),
    ("run_dir=other", "run_dir=other", "exists already"),
    ("run_dir=stopped", "run_dir=stopped", "resume= continues"),
    ("-m seed=1,2 run_dir=shared", "run_dir=shared", "2 runs would share"),
    ("-m seed=1,2 algo.gamma=0.9,7", "algo.gamma=7", "in [0, 1]"),
    ("-m algo=ppo seed=1,x,3", "seed=x", "a whole number"),
    # resume
    ("resume=nothing", "resume=nothing", "no such folder"),
    ("resume=foreign", "foreign", "cannot be used"),
    ("resume=done", "resume=done", "the run is done"),
    ("resume=stopped total_timesteps=1000", "total_timesteps=1000", "taken 51,200 steps already"),
    (
        "resume=stopped algo.network.hidden_sizes=[8]",
        "algo.network.hidden_sizes=[8]",
        "(algo.network.hidden_sizes=[64,64])",
    ),
    ("resume=stopped algo=a2c seed=2", "algo=a2c", "(algo=ppo)"),
    # evaluate
    ("evaluate", "run", "is missing"),
    ("evaluate run=nothing", "run=nothing", "no such folder"),
    ("evaluate stopped", "stopped", "not of the form key=value"),
    ("evaluate run=stopped episode=3", "episode=3", "did you mean episodes"),
    ("evaluate run=stopped device=cpu", "device=cpu", "there is no such key."),
    ("evaluate run=stopped episodes=many", "episodes=many", "a whole number"),
    ("evaluate run=stopped checkpoint=first", "checkpoint=first", "last, best or a step"),
]

# More of the same.
MORE = [
    ("algo=a2c algo.update_epochs=3", "algo.update_epochs=3", "but for algo=ppo"),
    ("seed", "seed", "not of the form key=value"),
    ("algo.learning_rate=fast", "algo.learning_rate=fast", "a number"),
    ("algo.network.hidden_sizes=[64,0]", "algo.network.hidden_sizes=[64, 0]", "at least 1"),
    ("-m algo=ppo,foo", "algo=foo", "must be a2c or"),
    ("resume=other", "resume=other", "not the folder of a run"),
    ("evaluate run=other", "run=other", "not the folder of a run"),
    ("evaluate run=stopped episodes=0", "episodes=0", "at least 1"),
    ("algo=PPO", "algo=PPO", "must be a2c or"),
    ("algo=td3 env=Pendulum-v1", "algo=td3", "must be a2c or"),
    ("experiment=foo env=CartPole-v1", "experiment=foo", "must be actor_critic or"),
    ("env=Hopper-v9", "env=Hopper-v9", "did you mean Hopper-v5"),
    ("env=Hopper-v3", "env=Hopper-v3", "no such environment"),
    ("network=resnet", "network=resnet", "must be cnn or mlp"),
    ("+algo.foo=1", "algo.foo=1", "no such key"),
    ("total_timestep=1000", "total_timestep=1000", "did you mean total_timesteps"),
    ("algo.network=3", "algo.network=3", "group of keys"),
    ("CartPole-v1", "CartPole-v1", "not of the form key=value"),
    ("--num-envs=3", "--num-envs=3", "no such option"),
    ("tensorboard=maybe", "tensorboard=maybe", "true or false"),
    ("seed=null", "seed=null", "a whole number"),
    ("algo.gae_lambda=-0.1", "algo.gae_lambda=-0.1", "in [0, 1]"),
    ("algo.learning_rate=nan", "algo.learning_rate=nan", "finite"),
    ("algo.num_steps=-8", "algo.num_steps=-8", "at least 1"),
    ("eval_every=0", "eval_every=0", "at least 1"),
    ("seed=-1", "seed=-1", "from 0"),
    ("algo.dual_clip=0.5", "algo.dual_clip=0.5", "above 1"),
    ("algo.network.activation=rleu", "algo.network.activation=rleu", "relu"),
    ("algo.policy.distribution=normal", "algo.policy.distribution=normal", "gaussian"),
    ("device=gpu", "device=gpu", "cpu, cuda"),
    ("run_dir=done", "run_dir=done", "exists already"),
    ("resume=stopped env=Acrobot-v1", "env=Acrobot-v1", "(env=CartPole-v1)"),
]
COMMANDS = [*WRONG, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
NAMES = [command for command, *_ in [*WRONG, *MORE]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wrong")
    run = config.save_config(config.compose(["env=CartPole-v1"]))
    for name, text, status in (("stopped", run, "stopped"), ("done", run, "done"), ("foreign", "model: gpt\n", None)):
        (path / name).mkdir()
        (path / name / "config.yaml").write_text(text)
        if status:
            (path / name / "status.json").write_text(
                f'{{"state": "{status}", "step": {100_000 if status == "done" else 51_200}}}'
            )
    (path / "other").mkdir()
    (path / "other/notes.txt").touch()
    (path / "file").touch()
    return path


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Every command line that was found good."""
    good: list[list[str]] = []

    def watch(module: object, name: str, prefix: list[str]) -> None:
        original = getattr(module, name)

        def watched(words: list[str]) -> object:
            result = original(words)
            good.append([*prefix, *words])
            return result

        monkeypatch.setattr(module, name, watched)

    watch(config, "checked", [])
    watch(config, "evaluation", ["evaluate"])
    watch(config.composition, "jobs", ["-m"])
    return good


def entry(words: list[str]) -> None:
    """The command line in this process; nothing is trained."""
    if words[:1] == ["evaluate"]:
        config.evaluate_main(words[1:], lambda options: None)
    else:
        config.main(words, lambda run: None)


def assert_answers(text: str, key: str, why: str) -> str:
    """One screen that names the key and the reason; returns the command it proposes."""
    *lines, last = text.rstrip("\n").splitlines()
    assert "Traceback" not in text and len(lines) <= 10 and max(map(len, lines)) <= 240
    assert any(line.startswith(key) or (key in line and "config.yaml" in line) for line in lines), text
    assert why in text
    assert last.startswith("Try: "), text
    return last.removeprefix("Try: ")


def test_there_are_enough() -> None:
    assert len(set(NAMES)) == len(NAMES) >= 70 and len(WRONG) >= 40


@pytest.mark.parametrize("command, key, why", COMMANDS, ids=NAMES)
def test_wrong_command(
    command: str, key: str, why: str, folder: Path, composed: list[list[str]],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        entry(shlex.split(command))
    assert caught.value.code == 2 and sorted(folder.rglob("*")) == before
    remedy = shlex.split(assert_answers(capsys.readouterr().err, key, why))
    assert remedy[:2] == ["python", "-m"] and remedy[2] in ("pgrl.train", "pgrl.evaluate")
    words = ["evaluate", *remedy[3:]] if remedy[2] == "pgrl.evaluate" else remedy[3:]
    if words not in composed and words != ["algo=ppo", "env=CartPole-v1"] and words[:1] != ["-m"]:
        entry(words)


def test_unwritable_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.os, "access", lambda path, mode: False)
    problems = list(checks.wrong_folder(folder / "a/b", given=True))
    assert [p.key for p in problems] == ["run_dir"] and "is not writable" in problems[0].why


def test_env_and_network_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What only the built env can tell is still told in one screen, and leaves no folder."""
    monkeypatch.chdir(tmp_path)
    for words, key in ((["network=cnn"], "algo.network.body=cnn"), (["env.kwargs={colour: red}"], "env.kwargs")):
        with pytest.raises(SystemExit) as caught:
            config.main(words, launch)
        text = capsys.readouterr().err
        assert caught.value.code == 2 and key in text and "Traceback" not in text
        assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        ("algo=PPO seed=3", "algo=ppo seed=3"),
        ("algo=td3 env=Pendulum-v1", "experiment=td3 env=Pendulum-v1"),
        ("experiment=foo env=CartPole-v1", "env=CartPole-v1"),
        ("experiment=tdd3 env=Pendulum-v1", "experiment=td3 env=Pendulum-v1"),
        ("algo=sac env=Pendulum-v1 network=cnn", "algo=sac env=Pendulum-v1 algo.network.body=cnn"),
        ("-m algo=ppo seed=1,x,3", "-m algo=ppo seed=1,3"),
        ("-m algo=ppo,foo seed=x", "algo=ppo seed=1"),
        ("env=tests.envs_for_tests:Lukc-v0", "env=tests.envs_for_tests:Luck-v0"),
    ],
)
def test_remedies_are_what_was_meant(
    command: str, remedy: str, composed: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        config.main(shlex.split(command), launch)
    assert capsys.readouterr().err.splitlines()[-1] == f"Try: python -m pgrl.train {remedy}"


def test_a_run_that_diverges_is_one_clear_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "algo=ddpg env=Pendulum-v1 tuned=null total_timesteps=300 algo.learning_starts=64 algo.batch_size=32"
    words += f" num_envs=4 algo.critic_lr=1e20 algo.per_alpha=0.6 tensorboard=false run_dir={tmp_path / 'run'}"
    with pytest.raises(SystemExit) as caught:
        config.main(words.split(), launch)
    text = capsys.readouterr().err
    assert caught.value.code == 1 and "Traceback" not in text
    assert "the update gave NaN or infinity: losses/" in text and "algo.critic_lr=1e+19" in text
    assert "Traceback" in (tmp_path / "run/train.log").read_text()


def test_folder_in_use(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    with files.lock(Path("stopped")), pytest.raises(SystemExit) as caught:
        config.main(["resume=stopped"], launch)
    text = capsys.readouterr().err
    assert caught.value.code == 2 and "stopped" in text and "another process" in text
    (folder / "stopped/.lock").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "command, key, why",
    [
        ("train algo.gamma=2 algo.num_minibatches=7 env=Hoper-v4", "algo.num_minibatches=7", "in [0, 1]"),
        ("train -m seed=1,2 algo=ppo,foo", "algo=foo", "must be a2c or"),
        ("train resume=done", "resume=done", "the run is done"),
        ("evaluate run=nothing", "run=nothing", "no such folder"),
    ],
)
def test_answer_comes_within_five_seconds(command: str, key: str, why: str, folder: Path) -> None:
    program, *words = shlex.split(command)
    source = str(Path(config.__file__).parents[2])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", f"pgrl.{program}", *words], cwd=folder, capture_output=True, text=True, env=env
    )
    seconds = time.monotonic() - start
    assert done.returncode == 2 and not done.stdout
    assert_answers(done.stderr, key, why)
    assert seconds < 5
