"""Rollouts, minibatches and the noise of actions."""

from typing import NamedTuple

import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from pgrl.data import NoiseStream, Rollout, Transition, action_rows, flatten_time, minibatches, random_order

T, B = 5, 3
OBS = spaces.Box(-np.inf, np.inf, (2,), np.float32)


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def rollout(obs: spaces.Box = OBS, action: spaces.Space | None = None) -> Rollout:
    return Rollout(T, B, obs, action or spaces.Discrete(3), torch.device("cpu"))


# --- rollouts ---


def test_the_next_obs_to_act_on_is_where_the_env_wrote_it() -> None:
    r = rollout()
    assert len(r.steps) == T and len(r.obs) == T + 1
    for t, step in enumerate(r.steps):
        assert step.obs.data_ptr() == r.obs[t + 1].data_ptr()
        step.obs.fill_(float(t + 1))
        assert (r.obs[t + 1] == t + 1).all()
    r.begin(torch.full((B, 2), 100.0))
    obs = r.transition.obs
    assert obs[:, 0, 0].tolist() == [100, 1, 2, 3, 4] and obs.shape == (T, B, 2)


def test_rows_are_views_of_the_transition() -> None:
    """What is written into step t is row t of the transition, and touches no other row or field."""
    r = rollout()
    for t, step in enumerate(r.steps):
        for k, field in enumerate(step[1:]):
            field.copy_(torch.full_like(field, t + 10 * k) if field.dtype == torch.float32 else field.new_tensor(t % 2))
        r.put(t, torch.full((B,), t))
    transition = r.transition
    assert transition.reward.tolist() == [[t] * B for t in range(T)]
    assert transition.terminated.tolist() == [[t % 2 == 1] * B for t in range(T)]
    assert transition.truncated.tolist() == transition.terminated.tolist()
    assert transition.terminated.data_ptr() != transition.truncated.data_ptr()
    assert transition.next_obs[:, :, 0].tolist() == [[t + 30] * B for t in range(T)]
    assert transition.action.tolist() == [[t] * B for t in range(T)]
    assert (transition.obs == 0).all()
    assert transition.reward.data_ptr() == r.steps[0].reward.data_ptr()  # no copies


def test_rollouts_follow_each_other() -> None:
    r = rollout()
    r.steps[-1].obs.fill_(7.0)
    r.begin(r.obs[-1])  # the last answer is the first obs of the next rollout
    assert (r.transition.obs[0] == 7).all()
    r.obs[0].fill_(1.0)
    assert (r.obs[-1] == 7).all()


def test_transition_is_named_as_agents_expect() -> None:
    assert Transition._fields == ("obs", "action", "reward", "next_obs", "terminated", "truncated")
    t = rollout().transition
    assert (t.terminated.dtype, t.truncated.dtype, t.reward.dtype) == (torch.bool, torch.bool, torch.float32)


def test_images_stay_bytes() -> None:
    space = spaces.Box(0, 255, (4, 4, 3), np.uint8)
    t = rollout(space).transition
    assert t.obs.dtype == t.next_obs.dtype == torch.uint8 and t.obs.shape == (T, B, 4, 4, 3)


@pytest.mark.parametrize(
    ("space", "shape", "dtype"),
    [
        (spaces.Box(-1, 1, (3,)), (3,), torch.float32),
        (spaces.Box(-1, 1, (2, 2), np.float64), (4,), torch.float32),
        (spaces.Box(-1, 1, ()), (1,), torch.float32),
        (spaces.Discrete(7), (), torch.int64),
        (spaces.MultiDiscrete([2, 3]), (2,), torch.int64),
        (spaces.MultiBinary(4), (4,), torch.int64),
        (spaces.MultiBinary((2, 3)), (6,), torch.int64),
    ],
)
def test_action_rows(space: spaces.Space, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert action_rows(space) == (shape, dtype)
    action = rollout(action=space).transition.action
    assert action.shape == (T, B, *shape) and action.dtype == dtype


# --- minibatches ---


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


def numbered(n: int) -> Pair:
    return Pair(torch.arange(n), torch.arange(n).float().unsqueeze(1) * torch.tensor([10.0, 100.0]))


def split(batch: Pair, num_minibatches: int, generator: Generator | None) -> list[Pair]:
    order = None if generator is None else random_order(len(batch.a), generator)
    return [Pair(*part) for part in zip(*minibatches(batch, num_minibatches, order), strict=True)]


@pytest.mark.parametrize(("n", "parts"), [(24, 4), (24, 1), (24, 24), (7, 7)])
def test_minibatches_are_a_permutation(n: int, parts: int) -> None:
    pieces = split(numbered(n), parts, seeded(0))
    assert len(pieces) == parts and all(len(p.a) == len(p.b) == n // parts for p in pieces)
    a, b = (torch.cat(field) for field in zip(*pieces, strict=True))
    assert a.sort().values.tolist() == list(range(n))  # each sample exactly once
    assert torch.equal(b, a.unsqueeze(1) * torch.tensor([10.0, 100.0]))  # its fields still together
    assert isinstance(minibatches(numbered(n), parts, None), Pair)


def test_every_epoch_has_a_fresh_order() -> None:
    """One of the commonest slips: minibatches never, or only once, shuffled."""
    generator = seeded(0)
    orders = [torch.cat([p.a for p in split(numbered(64), 4, generator)]) for _ in range(5)]
    assert len({tuple(order.tolist()) for order in orders}) == 5
    again = torch.cat([p.a for p in split(numbered(64), 4, seeded(0))])
    assert torch.equal(again, orders[0])  # all the randomness is the generator's


def test_every_sample_visits_every_minibatch() -> None:
    generator = seeded(1)
    counts = torch.zeros(16, 4)
    for _ in range(800):
        for i, part in enumerate(split(numbered(16), 4, generator)):
            counts[part.a, i] += 1
    assert ((counts - 200).abs() < 5 * (800 * 0.25 * 0.75) ** 0.5).all()


def test_without_generator_the_order_is_kept() -> None:
    batch = numbered(12)
    parts = split(batch, 3, None)
    assert torch.cat([p.a for p in parts]).tolist() == list(range(12))
    assert parts[0].a.data_ptr() == batch.a.data_ptr()


def test_shuffling_leaves_the_batch_alone() -> None:
    batch = numbered(12)
    for part in split(batch, 3, seeded(2)):
        part.b.zero_()
    assert torch.equal(batch.b, numbered(12).b)


def test_flatten_time() -> None:
    batch = Pair(torch.arange(6).view(3, 2), torch.arange(24).view(3, 2, 2, 2))
    flat = flatten_time(batch)
    assert isinstance(flat, Pair) and flat.a.tolist() == list(range(6)) and flat.b.shape == (6, 2, 2)
    assert torch.equal(flat.b[3], batch.b[1, 1])


# --- noise ---


def normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randn((*shape, 2), generator=generator)


def stream(seed: int, num_steps: int = 4) -> NoiseStream:
    return NoiseStream(normal, num_steps, seeded(seed))


def test_noise_is_drawn_by_the_rollout() -> None:
    s, generator = stream(0), seeded(0)
    for _ in range(3):
        block = normal((4, 3), generator)
        for row in block:
            assert torch.equal(s.next(3), row)


@pytest.mark.parametrize("done", range(10))
def test_noise_is_exact_between_any_two_steps(done: int) -> None:
    original = stream(0)
    for _ in range(done):
        original.next(3)
    state = original.state_dict()
    restored = stream(99)
    for _ in range(2):  # whatever it did before is forgotten
        restored.next(5)
    restored.load_state_dict(state)
    for _ in range(9):
        assert torch.equal(restored.next(3), original.next(3))
    again = stream(98)
    again.load_state_dict(state)  # the state is not used up, nor changed by either stream
    fresh = stream(0)
    for _ in range(done):
        fresh.next(3)
    assert torch.equal(again.next(3), fresh.next(3))


@pytest.mark.parametrize("done", range(6))
def test_saving_and_restoring_disturbs_nothing(done: int) -> None:
    a, b = stream(0), stream(0)
    for _ in range(done):
        a.next(3), b.next(3)
    state = a.state_dict()
    a.load_state_dict(state)
    again = a.state_dict()
    assert state["used"] == again["used"] and torch.equal(state["generator"], again["generator"])
    for _ in range(9):
        assert torch.equal(a.next(3), b.next(3))


@pytest.mark.parametrize("before", range(5))
def test_noise_survives_another_number_of_envs(before: int) -> None:
    """A block drawn for some envs does not serve others; the state is exact all the same."""
    a, b = stream(0), stream(1)
    for _ in range(before):
        a.next(3)
    assert a.next(2).shape == (2, 2)
    b.load_state_dict(a.state_dict())
    for n in (2, 2, 3, 3, 2):
        assert torch.equal(a.next(n), b.next(n))


def test_a_captured_block_of_noise_needs_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA gives none during a capture; elsewhere the state before a block is kept."""
    asked: list[str] = []

    class OnCUDA(Generator):
        device = torch.device("cuda")

        def get_state(self) -> Tensor:
            asked.append("state")
            return super().get_state()

    s = NoiseStream(normal, 4, OnCUDA())
    asked.clear()
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        for _ in range(4):
            s.next(3)
        assert asked == ["state"] * (not capturing)
