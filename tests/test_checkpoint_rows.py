"""The rows of a replay buffer in checkpoints: written once, linked, verified, left out, and refused where too large."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
from torch import Tensor

from pgrl import agents, checkpoint, evaluate, files, launch, memory, runs
from pgrl.agents import Agent, Setting
from pgrl.agents.base import generator
from pgrl.config import RunConfig, load_run, save_config, schema
from pgrl.data import Transition
from pgrl.envs import EnvConfig, make_vec
from pgrl.errors import CheckpointError, UserError
from pgrl.replay import ReplayBuffer
from pgrl.replay_rows import same
from pgrl.upkeep import Upkeep

OBS, ACTION = spaces.Box(-1.0, 1.0, (2,), np.float32), spaces.Box(-1.0, 1.0, (1,), np.float32)
SEGMENT = 10  # rows


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr("pgrl.replay_layout.SEGMENT_BYTES", SEGMENT * 24)


def make_buffer(capacity: int = 100) -> ReplayBuffer:
    device = torch.device("cpu")
    return ReplayBuffer(capacity, 1, OBS, ACTION, device, torch.Generator().manual_seed(0), gamma=0.9)


def steps(start: int, count: int) -> Transition:
    """Steps that tell their number, of episodes of 7 steps."""
    number = torch.arange(start, start + count + 1.0).view(-1, 1, 1)
    none = torch.zeros((count, 1), dtype=torch.bool)
    ended = (number[:-1, :, 0] + 1) % 7 == 0
    return Transition(
        number[:-1].expand(-1, 1, 2), number[:-1], number[:-1, :, 0], number[1:].expand(-1, 1, 2), ended, none
    )


def add(buffer: ReplayBuffer, count: int) -> None:
    buffer.add(steps(buffer.count, count))


def save(run_dir: Path, buffer: ReplayBuffer, **options: Any) -> Path:
    return checkpoint.save(run_dir, buffer.count, {"agent": {"replay": buffer.state_dict()}}, **options)


def loaded(path: Path, capacity: int = 100) -> ReplayBuffer:
    buffer = make_buffer(capacity)
    buffer.load_state_dict(checkpoint.load(path)["agent"]["replay"])
    return buffer


def segments(path: Path) -> dict[str, Path]:
    return {file.name: file for file in sorted(path.glob("rows_*"))}


def assert_same(buffer: ReplayBuffer, other: ReplayBuffer) -> None:
    assert buffer.count == other.count and len(buffer) == len(other)
    assert buffer.state_dict()["rows"] == other.state_dict()["rows"]


def test_rows_come_back_and_go_on(tmp_path: Path) -> None:
    buffer = make_buffer()
    for count in (1, 8, 1, 1, 10, 64, 30, 5, 200):
        add(buffer, count)
        path = save(tmp_path, buffer)
        assert_same(buffer, loaded(path))
    other = loaded(path)
    add(buffer, 17)
    add(other, 17)
    assert_same(buffer, other)
    assert all(torch.equal(a, b) for a, b in zip(buffer.sample(99), other.sample(99), strict=True))


def test_final_segments_are_linked_and_only_new_rows_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = make_buffer(400)
    written: dict[str, int] = {}
    real = files.write_synced
    monkeypatch.setattr(
        files, "write_synced", lambda path, data: (written.__setitem__(path.name, len(data)), real(path, data))
    )
    before: dict[str, Path] = {}
    for _ in range(60):
        add(buffer, 13)
        written.clear()
        path = save(tmp_path, buffer)
        rows = {name: size for name, size in written.items() if name.startswith("rows")}
        assert len(rows) <= 3 and sum(rows.values()) <= 3 * (SEGMENT * 32 + 16)
        now = segments(path)
        assert len(now) >= min(buffer.count, 400) // SEGMENT
        kept = [name for name in now if name in before and name not in rows]
        assert len(kept) >= len(now) - 3
        assert all(now[name].stat().st_ino == before[name].stat().st_ino for name in kept)
        assert all(now[name].stat().st_nlink >= 2 for name in kept)
        before = now
    assert_same(buffer, loaded(path, 400))
    assert len(checkpoint.list_steps(tmp_path)) == 3


def test_a_resumed_run_links_what_it_loaded(tmp_path: Path) -> None:
    buffer = make_buffer()
    add(buffer, 55)
    first = segments(save(tmp_path, buffer))
    other = loaded(checkpoint.folder(tmp_path, 55))
    add(other, 20)
    second = segments(save(tmp_path, other))
    final = [f"rows_0_{number}.bin" for number in range(5)]
    assert all(first[name].stat().st_ino == second[name].stat().st_ino for name in final)
    add(buffer, 20)
    assert_same(buffer, loaded(checkpoint.folder(tmp_path, 75)))


def test_each_folder_is_whole_by_itself(tmp_path: Path) -> None:
    """Rotation removes no file that a folder needs, and a copied folder loads."""
    buffer, states = make_buffer(), {}
    for _ in range(12):
        add(buffer, 23)
        save(tmp_path, buffer, keep=2, keep_also=[46])
        states[buffer.count] = [x.clone() for x in buffer._batch(torch.arange(3), torch.ones(3))]
    assert checkpoint.list_steps(tmp_path) == [46, 253, 276]
    for step in (46, 253, 276):
        copied = Path(shutil.copytree(checkpoint.folder(tmp_path, step), tmp_path / "copy" / f"step_{step:012d}"))
        expected = states[step]
        assert all(
            torch.equal(a, b)
            for a, b in zip(loaded(copied)._batch(torch.arange(3), torch.ones(3)), expected, strict=True)
        )
    assert checkpoint.list_steps(tmp_path) == [46, 253, 276]


@pytest.mark.parametrize("how", ["gone", "manifest", "files gone", "shorter", "a link", "no links here"])
def test_what_cannot_be_linked_is_written_from_memory(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = make_buffer()
    add(buffer, 55)
    path = save(tmp_path, buffer)
    if how == "gone":
        shutil.rmtree(path)
    elif how == "manifest":
        (path / "MANIFEST.json").write_text("[]")
    elif how == "no links here":
        monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(PermissionError(1, "not permitted")))
    for name, file in segments(path).items() if path.exists() else []:
        if how == "files gone":
            file.unlink()
        elif how == "shorter":
            os.truncate(file, 7)
        elif how == "a link":
            file.rename(tmp_path / name)
            file.symlink_to(tmp_path / name)
    add(buffer, 3)
    path = save(tmp_path, buffer)
    assert all(file.stat().st_nlink == 1 and not file.is_symlink() for file in segments(path).values())
    assert_same(buffer, loaded(path))


def test_segments_of_another_history_are_not_linked(tmp_path: Path) -> None:
    """A folder may hold checkpoints that this buffer did not come from: only what it wrote or read itself counts."""
    other, buffer = make_buffer(), make_buffer()
    other.add(steps(1000, 55))
    save(tmp_path, other)
    add(buffer, 66)
    path = save(tmp_path, buffer)
    assert all(file.stat().st_nlink == 1 for file in segments(path).values())
    assert_same(buffer, loaded(path))


def test_a_damaged_segment_is_noticed_in_every_checkpoint_that_has_it(tmp_path: Path) -> None:
    buffer = make_buffer()
    for _ in range(3):
        add(buffer, 25)
        save(tmp_path, buffer)
    data = bytearray((checkpoint.folder(tmp_path, 75) / "rows_0_3.bin").read_bytes())
    data[40] ^= 1
    (checkpoint.folder(tmp_path, 75) / "rows_0_3.bin").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rows_0_3\.bin is not as MANIFEST\.json says"):
        checkpoint.load(checkpoint.folder(tmp_path, 75))
    warnings: list[str] = []
    step, state = checkpoint.load_newest(tmp_path, warnings.append)
    assert step == 25  # the one of step 50 has the same file
    assert "rows_0_3.bin" in warnings[0]
    assert state["agent"]["replay"]["rows"].segments()


def test_a_segment_that_changes_after_it_was_verified_is_refused(tmp_path: Path) -> None:
    buffer = make_buffer()
    add(buffer, 25)
    path = save(tmp_path, buffer)
    rows = checkpoint.load(path)["agent"]["replay"]["rows"]
    (path / "rows_0_1.bin").write_bytes(bytes(400))
    with pytest.raises(CheckpointError, match=r"rows_0_1\.bin has changed"):
        make_buffer().load_state_dict({**buffer.state_dict(), "rows": rows})
    (path / "rows_0_1.bin").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        rows.read(1)


def test_where_only_rows_are_damaged_the_message_says_how_to_go_on_without(tmp_path: Path) -> None:
    buffer = make_buffer()
    add(buffer, 25)
    path = save(tmp_path, buffer)
    (path / "rows_0_0.bin").unlink()
    assert checkpoint.load_newest(tmp_path, pytest.fail, rows=False)[0] == 25
    with pytest.raises(CheckpointError, match=r"(?s)rows_0_0\.bin is missing.*checkpoint\.replay=false"):
        checkpoint.load_newest(tmp_path, pytest.fail)


def test_without_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left out when saving, there are no files; left out when loading, none is looked at."""
    buffer = make_buffer()
    add(buffer, 25)
    path = save(tmp_path, buffer, rows=False)
    assert not segments(path) and json.loads((path / "MANIFEST.json").read_text())["version"] == 1
    assert checkpoint.load(path)["agent"]["replay"]["rows"] is None
    add(buffer, 25)
    path = save(tmp_path, buffer)
    assert segments(path) and json.loads((path / "MANIFEST.json").read_text())["version"] == 2
    seen: list[str] = []
    monkeypatch.setattr(files, "operation", lambda name, file: seen.append(file.name))
    assert checkpoint.load(path, rows=False)["agent"]["replay"]["rows"] is None
    assert sorted(seen) == ["MANIFEST.json", "state.json", "state.safetensors"]


def test_a_loaded_state_can_be_saved_again(tmp_path: Path) -> None:
    buffer = make_buffer()
    add(buffer, 45)
    state = checkpoint.load(save(tmp_path / "a", buffer))
    again = checkpoint.load(checkpoint.save(tmp_path / "b", 45, state))
    assert same(state["agent"]["replay"]["rows"], again["agent"]["replay"]["rows"])


def test_two_buffers_and_none(tmp_path: Path) -> None:
    one, two, empty = make_buffer(), make_buffer(50), make_buffer()
    add(one, 33)
    add(two, 77)
    state = {"one": one.state_dict(), "two": [two.state_dict()], "empty": empty.state_dict()}
    back = checkpoint.load(checkpoint.save(tmp_path, 1, state))
    others = make_buffer(), make_buffer(50), make_buffer()
    for other, part in zip(others, (back["one"], back["two"][0], back["empty"]), strict=True):
        other.load_state_dict(part)
    assert_same(one, others[0])
    assert_same(two, others[1])
    assert len(others[2]) == 0 and others[2]._rows is None


def test_a_full_ring_fits_the_manifest(tmp_path: Path) -> None:
    buffer = make_buffer(1000)
    add(buffer, 1995)
    path = save(tmp_path, buffer)
    assert 60 <= len(segments(path)) <= 110
    assert (path / "MANIFEST.json").stat().st_size < checkpoint._MANIFEST_LIMIT / 4
    assert_same(buffer, loaded(path, 1000))


HOSTILE = {
    "another table": lambda t: [1, t[1], t[2]],
    "a number twice": lambda t: [t[0], t[1], [*t[2], t[2][0]]],
    "one segment less": lambda t: [t[0], t[1], t[2][:-1]],
    "one segment more": lambda t: [t[0], t[1], [*t[2], [99, True]]],
    "a path": lambda t: ["../0", t[1], t[2]],
    "a word for a number": lambda t: [t[0], t[1], [["x", True]]],
    "not a list": lambda t: {"table": 0},
    "too much": lambda t: [*t, 1],
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("rows", [True, False])
def test_trees_that_name_other_rows_are_refused(change: Any, rows: bool, tmp_path: Path) -> None:
    buffer = make_buffer()
    add(buffer, 25)
    path = save(tmp_path, buffer)
    tree = json.loads((path / "state.json").read_text())
    node = tree["state"]["agent"]["replay"]["rows"]
    node["$rows"] = change(node["$rows"])
    data = json.dumps(tree, separators=(",", ":")).encode()
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["files"]["state.json"] = checkpoint._entry(data)
    (path / "state.json").write_bytes(data)
    (path / "MANIFEST.json").write_text(json.dumps(manifest, separators=(",", ":")))
    if change is HOSTILE["a number twice"]:
        assert checkpoint.load(path, rows=rows)  # the same rows, told twice
    else:
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.load(path, rows=rows)


# Runs: an agent with a buffer that stands for those to come.


@dataclass
class HoarderConfig:
    """An algorithm that only stores what it sees."""

    num_steps: int = 1
    buffer_size: int = 200
    batch_size: int = 8


class Hoarder(Agent):
    """Stores transitions and adds up a sample of rewards."""

    name = "Hoarder"

    def __init__(self, config: HoarderConfig, setting: Setting) -> None:
        self.num_steps, self.batch_size = config.num_steps, config.batch_size
        self.net, self.noise = torch.nn.Linear(1, 1), generator(setting.seed, 1, setting.device)
        self.replay = ReplayBuffer(
            *(config.buffer_size, setting.num_envs, setting.obs_space, setting.action_space, setting.device),
            generator(setting.seed, 2, setting.device),
            gamma=0.9,
        )

    def act(self, obs: Tensor, explore: bool = True) -> Tensor:
        return torch.randint(2, (len(obs),), generator=self.noise)

    def update(self, rollout: Transition, progress: float) -> dict[str, Tensor]:
        self.replay.add(rollout)
        with torch.no_grad():
            self.net.weight += self.replay.sample(self.batch_size).obs.mean()
        return {"losses/weight": self.net.weight.detach().sum()}


@pytest.fixture
def hoarding(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(agents.AGENTS, HoarderConfig, Hoarder)
    monkeypatch.setitem(schema.ALGOS, "hoarder", HoarderConfig)
    yield


def config(run_dir: Path, **changes: Any) -> RunConfig:
    return RunConfig(
        algo=HoarderConfig(),
        env=EnvConfig(id="CartPole-v1"),
        total_timesteps=600,
        num_envs=2,
        threads=1,
        run_dir=str(run_dir),
        save_every=100,
        log_every=100,
        tensorboard=False,
        **changes,
    )


def final(run_dir: Path) -> dict[str, Any]:
    step, state = checkpoint.load_newest(run_dir, pytest.fail)
    assert step == 600
    return state["agent"]


@pytest.mark.usefixtures("hoarding")
def test_a_resumed_run_has_the_same_buffer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch.launch(config(tmp_path / "whole"))
    assert "replay buffer: 200 transitions, 0 MB" in capsys.readouterr().out
    launch.launch(replace(config(tmp_path / "parts"), total_timesteps=350))
    launch.launch(replace(config(tmp_path / "parts"), resume=str(tmp_path / "parts")))
    whole, parts = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert torch.equal(whole["net"]["weight"], parts["net"]["weight"])
    assert same(whole["replay"]["rows"], parts["replay"]["rows"])
    assert "exact" not in capsys.readouterr().out


@pytest.mark.usefixtures("hoarding")
def test_a_signal_in_mid_update_saves_the_buffer_of_the_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buffer wraps several times between the snapshot and the signal."""
    launch.launch(config(tmp_path / "whole"))
    monkeypatch.setattr("pgrl.upkeep.SNAPSHOT_SECONDS", 1e9)
    options = replace(config(tmp_path / "parts"), save_every=None)
    update, count = Hoarder.update, itertools.count()

    def interrupted(self: Hoarder, rollout: Transition, progress: float) -> dict[str, Tensor]:
        metrics = update(self, rollout, progress)
        if next(count) == 250:
            os.kill(os.getpid(), 15)
        return metrics

    tend = Upkeep.tend

    def tended(self: Any, *args: Any, **kwargs: Any) -> None:
        tend(self, *args, **kwargs)
        if self._run.position.iteration == 130:
            self._last = self._run.snapshot()

    with monkeypatch.context() as patch:
        patch.setattr(Hoarder, "update", interrupted)
        patch.setattr(Upkeep, "tend", tended)
        with pytest.raises(launch.Stop):
            launch.launch(options)
    assert checkpoint.list_steps(tmp_path / "parts") == [260]
    launch.launch(replace(options, resume=str(tmp_path / "parts")))
    whole, parts = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert torch.equal(whole["net"]["weight"], parts["net"]["weight"])
    assert same(whole["replay"]["rows"], parts["replay"]["rows"])


@pytest.mark.usefixtures("hoarding")
def test_a_run_without_the_buffer_in_its_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = config(tmp_path / "run")
    options.checkpoint.replay = False
    launch.launch(replace(options, total_timesteps=300))
    assert capsys.readouterr().out.count("checkpoint.replay=false: a resumed run goes on with an empty") == 1
    assert not list((tmp_path / "run").rglob("rows_*"))
    assert load_run(tmp_path / "run").checkpoint.replay is False
    launch.launch(replace(options, resume=str(tmp_path / "run")))
    assert capsys.readouterr().out.count("checkpoint.replay=false: a resumed run goes on with an empty") == 1
    assert final(tmp_path / "run")["replay"]["time"] == 300
    options.checkpoint.replay = True
    launch.launch(replace(options, total_timesteps=700, resume=str(tmp_path / "run")))
    assert "the checkpoint has no replay buffer" in capsys.readouterr().err
    assert checkpoint.load_newest(tmp_path / "run", pytest.fail)[1]["agent"]["replay"]["rows"].segments()
    launch.launch(replace(options, total_timesteps=800, resume=str(tmp_path / "run")))
    assert "the checkpoint has no replay buffer" not in capsys.readouterr().err


@pytest.mark.usefixtures("hoarding")
def test_a_run_can_be_resumed_without_its_damaged_rows(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    launch.launch(replace(config(run_dir), total_timesteps=300))
    for file in run_dir.rglob("rows_*"):
        file.write_bytes(b"")
    options = replace(config(run_dir), resume=str(run_dir))
    options.checkpoint.replay = False
    launch.launch(options)
    assert final(run_dir)["replay"]["rows"] is None


@pytest.mark.usefixtures("hoarding")
def test_an_evaluation_neither_reads_nor_allocates_the_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "run"
    launch.launch(config(run_dir))
    monkeypatch.setattr(memory, "available", lambda: 0)
    for file in run_dir.rglob("rows_*"):
        file.unlink()
    for which in ("last", "500"):
        agent, _, _ = evaluate.load(run_dir, which)
        assert isinstance(agent, Hoarder) and agent.replay._rows is None and len(agent.replay) == 0


@pytest.mark.usefixtures("hoarding")
def test_a_buffer_that_does_not_fit_is_refused_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = config(tmp_path / "run")
    options.algo.buffer_size = 50_000_000
    monkeypatch.setattr(memory, "available", lambda: 10**9)
    with pytest.raises(UserError) as caught:
        launch.launch(options)
    text = str(caught.value)
    assert text.startswith("algo.buffer_size=50000000: the replay buffer would take 1,600 MB, and 1,000 MB of memory")
    assert not (tmp_path / "run").exists()
    key, _, size = text.split("Use: ")[1].partition("=")
    assert key == "algo.buffer_size"
    options.algo.buffer_size = int(size)
    env = make_vec(options.env, 2, 1)
    needed = runs.replay_bytes(options, env)
    env.close()
    assert needed is not None and 0.5e9 < needed <= 1e9


def test_what_is_proposed_in_its_place_is_a_command_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    from pgrl.config import compose

    words = ["algo=sac", "env=HalfCheetah-v4", "tuned=null"]
    options = compose(words)
    env = make_vec(options.env, 1, 1)
    for free, proposed in ((10**8, 1), (10**6, 2), (5 * 10**4, 2), (10**4, 0)):
        monkeypatch.setattr(memory, "available", lambda free=free: free)
        with pytest.raises(UserError) as caught:
            runs.refuse_too_large(options, env)
        use = str(caught.value).split("Use: ")[1]
        if not proposed:
            assert (
                use == "a machine with more memory: a buffer of 256 transitions is the least that these settings need"
            )
            continue
        assert len(use.split()) == proposed
        runs.refuse_too_large(compose([*words, *use.split(), "total_timesteps=20000"]), env)
    env.close()


def test_runs_without_a_buffer_have_no_size() -> None:
    options = SimpleNamespace(algo=SimpleNamespace(gamma=0.9))
    assert runs.replay_bytes(options, None) is None  # type: ignore[arg-type]


def test_the_key_is_kept_in_the_configuration(tmp_path: Path) -> None:
    from pgrl.config import compose

    options = compose(["algo=ppo", "env=CartPole-v1", "checkpoint.replay=false"])
    assert options.checkpoint.replay is False
    (tmp_path / "config.yaml").write_text(save_config(options))
    assert load_run(tmp_path).checkpoint.replay is False
    assert compose([f"resume={tmp_path}"]).checkpoint.replay is False
    assert compose([f"resume={tmp_path}", "checkpoint.replay=true"]).checkpoint.replay is True
    text = save_config(options).replace("checkpoint:\n  replay: false\n", "")  # of an older version
    (tmp_path / "config.yaml").write_text(text)
    assert load_run(tmp_path).checkpoint.replay is True
