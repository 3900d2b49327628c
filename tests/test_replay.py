"""The replay buffer against a list of transitions, sampling against its definition, and its snapshots."""

from __future__ import annotations

import copy
import itertools
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from pgrl import memory, replay, replay_layout, replay_rows, sum_tree
from pgrl.data import Transition, action_rows
from pgrl.replay import FEWEST_ENDS, Batch, Priority, ReplayBuffer, nbytes
from pgrl.replay_layout import layout
from pgrl.replay_rows import same

CPU = torch.device("cpu")
VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (5, 3, 1), np.uint8)  # 15 bytes: rows are padded
BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)
DISCRETE = spaces.Discrete(5)
MULTI = spaces.MultiDiscrete([3, 4])


@dataclass
class World:
    """Random transitions [T, B] whose episodes end, or are cut without a word, with given probabilities."""

    num_envs: int
    obs_space: spaces.Box
    action_space: spaces.Space[Any]
    end: float
    seed: int
    cut: float = 0.0
    history: list[tuple[Transition, Tensor]] = field(default_factory=list)  # one row [B], and where episodes stopped

    def __post_init__(self) -> None:
        self.generator = Generator().manual_seed(self.seed)
        self.obs = self.draw_obs()

    def draw_obs(self) -> Tensor:
        shape = (self.num_envs, *self.obs_space.shape)
        if self.obs_space.dtype == np.uint8:
            return torch.randint(256, shape, generator=self.generator, dtype=torch.uint8)
        return torch.randn(shape, generator=self.generator)

    def chance(self, p: float) -> Tensor:
        return torch.rand(self.num_envs, generator=self.generator) < p

    def step(self) -> Transition:
        shape, dtype = action_rows(self.action_space)
        next_obs, terminated, truncated = self.draw_obs(), self.chance(self.end / 2), self.chance(self.end / 2)
        stopped = terminated | truncated | self.chance(self.cut)
        action = torch.randn((self.num_envs, *shape), generator=self.generator).mul(3).abs().to(dtype)
        reward = torch.randn(self.num_envs, generator=self.generator)
        row = Transition(self.obs, action, reward, next_obs, terminated, truncated)
        self.history.append((row, stopped))
        where = stopped.view(-1, *[1] * len(self.obs_space.shape))
        self.obs = torch.where(where, self.draw_obs(), next_obs)
        return row

    def rollout(self, steps: int) -> Transition:
        rows = [self.step() for _ in range(steps)]
        return Transition(*(torch.stack(x) for x in zip(*rows, strict=True)))


def make(
    world: World,
    capacity: int,
    n_step: int = 1,
    prioritised: Priority | None = None,
    seed: int = 0,
    to: torch.device | None = None,
) -> Any:
    return ReplayBuffer(
        *(capacity, world.num_envs, world.obs_space, world.action_space, CPU, Generator().manual_seed(seed)),
        gamma=0.9,
        n_step=n_step,
        prioritised=prioritised,
        to=to,
    )


def every(buffer: Any) -> Batch:
    """All transitions held, in order of time and env."""
    shape = buffer.layout
    times = [t % shape.size for t in range(buffer._first, buffer._time)]
    index = torch.tensor([b * shape.length + t for t in times for b in range(shape.num_envs)])
    return buffer._batch(index, torch.ones(len(index)))


def assert_holds(buffer: Any, history: list[tuple[Transition, Tensor]]) -> None:
    """The buffer gives, for each of the newest transitions, what the definition of n-step returns says."""
    shape, gamma = buffer.layout, buffer.gamma
    kept = history[-shape.capacity :]
    assert len(buffer) == len(kept) * shape.num_envs and buffer.count == len(history) * shape.num_envs
    if not kept:
        return
    batch = every(buffer)
    for k, (t, b) in enumerate(itertools.product(range(len(kept)), range(shape.num_envs))):
        last, reward = t, 0.0
        for last in range(t, min(t + shape.n_step, len(kept))):
            reward += gamma ** (last - t) * float(kept[last][0].reward[b])
            if kept[last][1][b]:
                break
        row = kept[last][0]
        discount = 0.0 if row.terminated[b] else gamma ** (last - t + 1)
        assert torch.equal(batch.obs[k], kept[t][0].obs[b])
        assert torch.equal(batch.action[k], kept[t][0].action[b])
        assert torch.equal(batch.next_obs[k], row.next_obs[b])
        assert batch.reward[k].item() == pytest.approx(reward, abs=1e-5)
        assert batch.discount[k].item() == pytest.approx(discount, abs=1e-6)
    assert batch.obs.dtype == kept[0][0].obs.dtype and batch.action.dtype == kept[0][0].action.dtype


CASES = {
    "box": (VECTOR, BOX),
    "discrete": (VECTOR, DISCRETE),
    "multi": (VECTOR, MULTI),
    "images": (IMAGE, DISCRETE),
    "images, box": (IMAGE, BOX),
}


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("capacity", "num_envs"), [(1, 1), (2, 3), (7, 1), (50, 1), (50, 3)])
def test_samples_are_what_was_added(case: str, capacity: int, num_envs: int, n_step: int) -> None:
    """Rollouts of many lengths, longer than the buffer too; episodes rare, frequent, and of one step each."""
    for seed, end in enumerate((0.05, 0.5, 1.0, 2.0)):
        world = World(num_envs, *CASES[case], end, seed)
        buffer = make(world, capacity, n_step)
        for steps in (1, 1, 2, 5, 1, 13, 1, 60, 3, 1, 1):
            buffer.add(world.rollout(steps))
            assert_holds(buffer, world.history)


@pytest.mark.parametrize("n_step", [1, 3])
def test_an_episode_that_is_cut_without_a_word_counts_as_truncated(n_step: int) -> None:
    for seed in range(10):
        world = World(2, VECTOR, BOX, 0.2, seed, cut=0.3)
        buffer = make(world, 24, n_step)
        for steps in (1, 1, 1, 4, 1, 1, 9, 1, 1, 1, 20, 1):
            buffer.add(world.rollout(steps))
            assert_holds(buffer, world.history)


def test_only_the_ends_that_are_held_take_room() -> None:
    for end, most in ((2.0, 4 * 21), (0.02, FEWEST_ENDS)):
        world = World(1, VECTOR, BOX, end, 0)
        buffer = make(world, 20)
        for _ in range(100):
            buffer.add(world.rollout(10))
        assert len(buffer._ends) <= max(most, FEWEST_ENDS)
        assert_holds(buffer, world.history)


def test_ends_find_room_one_by_one() -> None:
    """Also where one more is held than there is room for."""
    for capacity in (FEWEST_ENDS - 1, FEWEST_ENDS, FEWEST_ENDS + 1):
        world = World(1, VECTOR, BOX, 2.0, 0)
        buffer = make(world, capacity)
        for _ in range(capacity + 3):
            buffer.add(world.rollout(1))
        assert_holds(buffer, world.history)


def test_ends_may_be_numbered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their numbers start anew after a power of two."""
    monkeypatch.setattr("pgrl.replay.ENTRIES", 256)
    world = World(2, VECTOR, BOX, 1.0, 0, cut=0.1)
    buffer = make(world, 60)
    for _ in range(120):
        buffer.add(world.rollout(5))
        assert_holds(buffer, world.history)
    other = make(world, 60)
    other.load_state_dict(buffer.state_dict())
    assert_holds(other, world.history)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prioritised", [None, Priority(0.6)])
def test_it_allocates_what_it_says(case: str, prioritised: Priority | None) -> None:
    for capacity, num_envs, n_step in ((1000, 1, 1), (1000, 3, 4), (2, 5, 1)):
        world = World(num_envs, *CASES[case], 0.0, 0)
        buffer = make(world, capacity, n_step, prioritised)
        assert buffer._rows is None
        buffer.add(world.rollout(1))
        tensors = [buffer._rows, buffer._ends, *([buffer._tree.nodes] if prioritised else [])]
        allocated = sum(x.untyped_storage().nbytes() for x in tensors)
        assert allocated == nbytes(capacity, num_envs, *CASES[case], n_step, prioritised)


def test_sizes() -> None:
    cheetah = spaces.Box(-np.inf, np.inf, (17,), np.float64), spaces.Box(-1.0, 1.0, (6,), np.float32)
    assert 100e6 < nbytes(1_000_000, 1, *cheetah) < 105e6
    assert 282e6 < nbytes(10_000, 1, spaces.Box(0, 255, (84, 84, 4), np.uint8), spaces.Discrete(18)) < 285e6
    assert layout(1_000_000, 64, *cheetah).capacity == 15_625 and layout(10, 64, *cheetah).capacity == 1
    for capacity in (1, 1000, 100_000, 1_000_000, 10_000_000):
        shape = layout(capacity, 4, *cheetah)
        assert shape.capacity <= 64 * shape.segment
        assert shape.segment * 4 * shape.width >= 2**18


def test_uniform_samples_are_uniform() -> None:
    """Every transition equally often, before the buffer is full, when it is, and with several envs."""
    for num_envs, steps in ((1, 30), (1, 75), (4, 10), (4, 33)):
        world = World(num_envs, VECTOR, BOX, 0.1, 0)
        buffer = make(world, 40)
        buffer.add(world.rollout(steps))
        index = torch.cat([buffer.sample(1000).index for _ in range(40)])
        numbers, counts = index.unique(return_counts=True)
        shape = buffer.layout
        held = {b * shape.length + t % shape.size for b in range(num_envs) for t in range(buffer._first, buffer._time)}
        assert set(numbers.tolist()) == held
        expected = 40_000 / len(held)
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert chi2 < len(held) + 4 * math.sqrt(2 * len(held))
        assert torch.equal(buffer.sample(5).weight, torch.ones(5))


def test_sampled_rows_are_those_of_their_index() -> None:
    for prioritised in (None, Priority(0.6)):
        world = World(3, VECTOR, BOX, 0.3, 0)
        buffer = make(world, 30, 2, prioritised)
        buffer.add(world.rollout(25))
        batch = buffer.sample(64)
        again = buffer._batch(batch.index, batch.weight)
        assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))


def test_prioritised_samples_follow_their_definition() -> None:
    alpha, eps, beta = 0.7, 0.01, 0.4
    world = World(2, VECTOR, BOX, 0.1, 0)
    buffer = make(world, 40, prioritised=Priority(alpha, eps))
    buffer.add(world.rollout(33))
    index, error = every(buffer).index, torch.linspace(-3, 2, 40)
    buffer.update_priorities(index, error)
    p = (error.double().abs() + eps) ** alpha
    expected = p / p.sum()
    batches = [buffer.sample(50, beta) for _ in range(800)]
    place = {number: i for i, number in enumerate(index.tolist())}
    counts = torch.zeros(40)
    for batch in batches:
        at = torch.tensor([place[number] for number in batch.index.tolist()])
        weight = (40 * expected[at]) ** -beta
        assert torch.allclose(batch.weight, (weight / weight.max()).float(), atol=1e-6)
        here = torch.bincount(at, minlength=40)
        assert ((here - 50 * expected).abs() < 2).all()  # stratified: every count is its expectation but for the ends
        counts += here
    chi2 = float(((counts - 40_000 * expected) ** 2 / (40_000 * expected)).sum())
    assert chi2 < 40
    assert torch.equal(buffer.sample(9).weight.max(), torch.ones(()))


def test_new_transitions_have_the_highest_priority_so_far() -> None:
    world = World(1, VECTOR, BOX, 0.1, 0)
    buffer = make(world, 8, prioritised=Priority(1.0, 0.0))
    buffer.add(world.rollout(3))
    leaves = buffer._tree.levels[0]
    assert leaves[:8].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    buffer.update_priorities(torch.tensor([0, 1, 1, 5]), torch.tensor([-5.0, 0.5, 0.25, 9.0]))
    assert leaves[:8].tolist() == [5, 0.5, 1, 0, 0, 0, 0, 0]  # of two the higher; none for what is not held
    assert buffer._tree.highest == 5.0
    buffer.update_priorities(torch.tensor([0]), torch.tensor([2.0]))
    highest = buffer._tree.highest.item()
    buffer.add(world.rollout(7))  # ten in a ring of eight and the head
    assert leaves[:9].tolist() == [highest, 0, 1, highest, highest, highest, highest, highest, highest]
    with pytest.raises(ValueError, match="no priorities"):
        make(world, 8).update_priorities(torch.tensor([0]), torch.tensor([1.0]))


def test_sampling_an_empty_buffer_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty buffer"):
        make(World(1, VECTOR, BOX, 0.1, 0), 8).sample(2)


# Snapshots and state.


def reload(state: dict[str, Any], world: World, *args: Any) -> Any:
    other = make(world, *args, seed=99)
    other.load_state_dict(state)
    return other


def act(buffer: Any, world: World, rng: random.Random) -> None:
    """Something that an agent does between two snapshots."""
    buffer.add(world.rollout(rng.choice([1, 1, 1, 2, 5])))
    batch = buffer.sample(4, 0.5)
    if buffer.prioritised is not None:
        buffer.update_priorities(batch.index, torch.randn(4, generator=world.generator))


@pytest.mark.parametrize("prioritised", [None, Priority(0.6)])
@pytest.mark.parametrize(("capacity", "num_envs", "end"), [(1, 1, 0.3), (9, 1, 1.0), (30, 3, 0.3), (500, 2, 0.05)])
def test_a_snapshot_stays_what_it_was(
    capacity: int, num_envs: int, end: float, prioritised: Priority | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is added later, wherever the ring is, and whatever other snapshots there are; segments are small."""
    monkeypatch.setattr("pgrl.replay_layout.SEGMENT_BYTES", 300)
    rng, world = random.Random(capacity), World(num_envs, VECTOR, DISCRETE, end, 1, cut=0.05)
    args = (capacity, 2, prioritised)
    buffer = make(world, *args)
    kept: list[tuple[dict[str, Any], dict[str, Any], list[Any]]] = []
    most = 0
    for _ in range(80):
        act(buffer, world, rng)
        assert all(state["rows"] == copied["rows"] for state, copied, _ in kept)
        if rng.random() < 0.3:
            state = buffer.state_dict()
            if prioritised is not None:  # as in a run's snapshot: tensors are copied, rows are not
                state["priorities"] = {name: x.clone() for name, x in state["priorities"].items()}
            kept.append((state, copy.deepcopy(state), list(world.history)))
            most = max(most, len(state["rows"].segments()))
        if rng.random() < 0.25 and kept:
            state, _, history = kept.pop(rng.randrange(len(kept)))
            other = reload(state, world, *args)
            assert_holds(other, history)
            assert other.state_dict()["rows"] == state["rows"]
            assert prioritised is None or torch.equal(other._tree.nodes, state["priorities"]["nodes"])
    assert most > (10 if capacity == 500 else 0)


@pytest.mark.parametrize("prioritised", [None, Priority(0.6)])
def test_a_buffer_that_was_loaded_goes_on_bit_for_bit(prioritised: Priority | None) -> None:
    for seed in range(6):
        worlds = [World(2, VECTOR, BOX, 0.3, seed) for _ in range(2)]
        args = (30, 1 + seed % 3, prioritised)
        one = make(worlds[0], *args)
        rngs = [random.Random(seed), random.Random(seed)]
        for _ in range(10 + 3 * seed):
            act(one, worlds[0], rngs[0])
        state = copy.deepcopy(one.state_dict())
        worlds[1] = copy.deepcopy(worlds[0])
        worlds[1].generator = Generator().manual_seed(0)
        worlds[1].generator.set_state(worlds[0].generator.get_state())
        rngs[1].setstate(rngs[0].getstate())
        for _ in range(7):
            act(one, worlds[0], rngs[0])
        two = reload(state, worlds[1], *args)
        for _ in range(7):
            act(two, worlds[1], rngs[1])
        for a, b in zip(one.sample(50), two.sample(50), strict=True):
            assert torch.equal(a, b)
        assert one.state_dict()["rows"] == two.state_dict()["rows"]


def test_two_buffers_of_one_seed_are_the_same() -> None:
    for prioritised in (None, Priority(0.6)):
        batches = []
        for _ in range(2):
            world, rng = World(2, VECTOR, BOX, 0.3, 5), random.Random(0)
            buffer = make(world, 50, 3, prioritised)
            for _ in range(40):
                act(buffer, world, rng)
            batches.append(buffer.sample(64))
        assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_a_deep_copy_of_a_state_shares_nothing() -> None:
    world = World(1, VECTOR, BOX, 0.5, 0)
    buffer = make(world, 10)
    buffer.add(world.rollout(15))
    state, history = copy.deepcopy(buffer.state_dict()), list(world.history)
    buffer.add(world.rollout(15))
    assert_holds(reload(state, world, 10), history)
    assert state["rows"] != buffer.state_dict()["rows"] and buffer.state_dict()["rows"] == buffer.state_dict()["rows"]


def test_what_is_kept_for_a_snapshot_is_bounded_and_goes_with_it() -> None:
    world = World(1, VECTOR, BOX, 0.5, 0)
    buffer = make(world, 20)
    buffer.add(world.rollout(10))
    state = buffer.state_dict()
    rows = state["rows"]
    buffer.add(world.rollout(8))
    assert not rows.kept  # nothing was overwritten yet
    for _ in range(300):
        buffer.add(world.rollout(1))
    assert sum(len(slots) for slots, _ in rows.kept) == 10 and len(rows.kept_ends) <= 64
    del rows, state
    buffer.add(world.rollout(1))
    assert not list(buffer._live())
    buffer.state_dict()
    assert len(buffer._snapshots) == 1


class StoppedError(BaseException):
    """Stands for a signal."""


def stop_at(line: int, action: Callable[[], object]) -> bool:
    """Run the action, raising before the line that the buffer executes as number `line`; whether it came so far."""
    count, sources = itertools.count(), {module.__file__ for module in (replay, replay_layout, replay_rows, sum_tree)}

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename not in sources:
            return None
        if event == "line" and next(count) == line:
            raise StoppedError
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except StoppedError:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("prioritised", [None, Priority(0.6)])
def test_a_signal_between_any_two_statements_leaves_the_snapshot_as_it_was(prioritised: Priority | None) -> None:
    """In `add`, where rows and ends are overwritten, the ends grow, and the last row is cut; and in `state_dict`."""

    world = World(2, VECTOR, BOX, 1.2, 3, cut=0.4)
    before, after = [world.rollout(41), world.rollout(45)], [world.rollout(1), world.rollout(60), world.rollout(1)]

    def work(buffer: Any) -> None:
        for block in after:
            buffer.add(block)
            buffer.state_dict()

    lines, expected = 0, None
    for line in itertools.count():
        buffer = make(world, 140, 2, prioritised)
        for block in before:
            buffer.add(block)
        state = buffer.state_dict()
        expected = expected or copy.deepcopy(state["rows"])
        assert state["rows"] == expected
        stopped = stop_at(line, lambda buffer=buffer: work(buffer))  # type: ignore[misc]
        assert state["rows"] == expected
        if not stopped:
            break
        lines = line
    assert lines > 100
    assert buffer.state_dict()["rows"] != expected
    assert_holds(
        reload({**state, "priorities": buffer.state_dict()["priorities"]}, world, 140, 2, prioritised),
        world.history[:86],
    )


def test_without_rows_the_buffer_is_empty_and_has_counted_as_far() -> None:
    world = World(2, VECTOR, BOX, 0.3, 0)
    buffer = make(world, 20)
    buffer.add(world.rollout(33))
    other = reload({**buffer.state_dict(), "rows": None}, world, 20)
    assert len(other) == 0 and other.count == 66 and other._rows is None
    history = len(world.history)
    for steps in (1, 3, 15):
        other.add(world.rollout(steps))
        shape = other.layout
        kept = world.history[history:][-shape.capacity :]
        assert len(other) == 2 * len(kept)
        assert torch.equal(every(other).obs, torch.cat([row.obs for row, _ in kept]))
        assert set(other.sample(200).index.tolist()) <= set(every(other).index.tolist())


def test_rows_of_another_buffer_are_refused() -> None:
    world = World(2, VECTOR, BOX, 0.3, 0)
    buffer = make(world, 20)
    buffer.add(world.rollout(3))
    for other in (
        make(world, 40),
        make(World(1, VECTOR, BOX, 0.3, 0), 10),
        make(World(2, VECTOR, DISCRETE, 0.3, 0), 20),
    ):
        with pytest.raises(ValueError, match="rows of another buffer"):
            other.load_state_dict(buffer.state_dict())


class Altered:
    """Rows whose segments are not what they should be."""

    def __init__(self, rows: Any, change: Callable[[bytes], bytes], numbers: slice = slice(None)) -> None:
        self._rows, self._change, self._numbers = rows, change, numbers
        self.info, self.saved = rows.info, {}

    def segments(self) -> dict[int, bool]:
        return dict(list(self._rows.segments().items())[self._numbers])

    def read(self, number: int) -> bytes:
        return self._change(self._rows.read(number))


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        (lambda data: data[:-1], slice(None)),
        (lambda data: data + b"\0", slice(None)),
        (lambda data: data[:16], slice(None)),
        (lambda data: b"\xff" * 8 + data[8:], slice(None)),
        (lambda data: data, slice(1, None)),
        (lambda data: data, slice(None, -1)),
    ],
    ids=["short", "long", "no rows", "time -1", "the first is missing", "the last is missing"],
)
def test_segments_that_do_not_fit_are_refused(
    change: Callable[[bytes], bytes], numbers: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgrl.replay_layout.SEGMENT_BYTES", 300)
    world = World(2, VECTOR, BOX, 0.3, 0)
    buffer = make(world, 200)
    buffer.add(world.rollout(60))
    state = buffer.state_dict()
    assert len(state["rows"].segments()) > 2
    with pytest.raises(ValueError, match=r"segment|missing"):
        make(world, 200).load_state_dict({**state, "rows": Altered(state["rows"], change, numbers)})
    assert same(Altered(state["rows"], bytes), state["rows"])


# The memory that there is.


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\nHugePages_Total:       0\n"}
V2 = {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.current": "1000000\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (MEMINFO, 8000 * 1024),
        ({**MEMINFO, **V2, "sys/fs/cgroup/a/memory.max": "max\n"}, 8000 * 1024),
        ({**MEMINFO, **V2, "sys/fs/cgroup/a/memory.max": "5000000\n"}, 4_000_000),
        ({**MEMINFO, **V2, "sys/fs/cgroup/a/memory.max": "500000\n"}, 0),
        (
            {
                **{**MEMINFO, **V2, "sys/fs/cgroup/a/memory.max": "5000000\n"},
                "sys/fs/cgroup/a/memory.stat": "anon 5\ninactive_file 600000\n",
            },
            4_600_000,
        ),
        (
            {
                **{**MEMINFO, "proc/self/cgroup": "11:memory:/docker/x\n10:cpu:/y\n"},
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "3000000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000000\n",
            },
            2_000_000,
        ),
        ({**MEMINFO, "proc/self/cgroup": "0::/\n"}, 8000 * 1024),
    ],
    ids=["no limit", "max", "limit above", "over the limit", "with cache", "version 1", "no files"],
)
def test_available_memory(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert memory.available(write(tmp_path, files)) == expected


def test_available_memory_here() -> None:
    assert 2**20 < memory.available() < 2**50
    assert isinstance(memory.available(Path("/nowhere")), int)


# --- samples for another device ---


def fields_of(batch: Batch) -> list[tuple[torch.Size, torch.dtype]]:
    return [(x.shape, x.dtype) for x in batch]


@pytest.mark.parametrize("prioritised", [None, Priority(0.6)])
@pytest.mark.parametrize("n_step", [1, 3])
def test_samples_go_to_the_device_of_the_agent(n_step: int, prioritised: Priority | None) -> None:
    world = World(3, VECTOR, DISCRETE, 0.2, 1)
    here, there = (make(world, 30, n_step, prioritised, to=device) for device in (None, torch.device("meta")))
    rollout = world.rollout(20)
    for buffer in (here, there):
        buffer.add(rollout)
    stays, moved = here.sample(8), there.sample(8)
    assert fields_of(stays) == fields_of(moved)
    assert [x.device.type for x in moved] == ["meta"] * (len(moved) - 1) + ["cpu"]
    assert torch.equal(moved.index, stays.index)


@pytest.mark.gpu
@pytest.mark.parametrize("prioritised", [None, Priority(0.6)])
@pytest.mark.parametrize("n_step", [1, 3])
def test_samples_on_cuda_are_those_of_main_memory(n_step: int, prioritised: Priority | None) -> None:
    world = World(3, VECTOR, DISCRETE, 0.2, 1)
    here, there = (make(world, 30, n_step, prioritised, to=device) for device in (None, torch.device("cuda")))
    for _ in range(5):
        rollout = world.rollout(7)
        for buffer in (here, there):
            buffer.add(rollout)
        for x, y in zip(stays := here.sample(8), moved := there.sample(8), strict=True):
            assert torch.equal(x, y.cpu())
        assert all(x.is_cuda for x in moved[:-1])
        if prioritised is not None:
            here.update_priorities(stays.index, stays.reward)
            there.update_priorities(moved.index, moved.reward)
