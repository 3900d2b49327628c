"""What acting, collecting and learning ask of torch, counted: a loss of speed is seen without a clock.

Where networks are small, time goes with the number of torch's operations rather than with their arithmetic. What C++
and numpy do in main memory is not seen, as in acting and in the replay buffer, where torch does the same on a GPU, and
waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from tests.test_agents import configure
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pgrl.agents import AGENTS, Agent, Setting
from pgrl.config.schema import ALGOS
from pgrl.data import Rollout, Transition
from pgrl.envs import EnvConfig, VecEnv, make_vec
from pgrl.native import compilers
from pgrl.train import collect


class Counts(NamedTuple):
    """Of an algorithm with 2 envs and rollouts of 8 steps, whose episodes all end after 4 steps by the clock."""

    act: int  # operations of torch in a step of acting; 1: room for the actions, which are made in C++
    collect: int  # operations that take new memory, in a rollout after the first
    update: int  # operations in an update of two gradient steps, or in one that has no number of them to choose
    step: int  # operations in each further gradient step, the sampling of its batch among them; 0: there is none
    waits: int  # times that this update waits for a number: there a GPU must first finish all that it was given


# The accepted counts, of the version of torch in constraints.txt. A lower count is put here; a higher one needs a
# reason, which its commit tells.
ACCEPTED = {
    "a2c": Counts(act=1, collect=1, update=224, step=0, waits=1),
    "a3c": Counts(act=1, collect=1, update=224, step=0, waits=1),
    "ddpg": Counts(act=1, collect=0, update=407, step=176, waits=2),
    "dpg": Counts(act=5, collect=33, update=88, step=0, waits=0),
    "npg": Counts(act=1, collect=1, update=1733, step=55, waits=22),
    "ppo": Counts(act=1, collect=1, update=529, step=203, waits=1),
    "reinforce": Counts(act=1, collect=1, update=320, step=55, waits=2),
    "sac": Counts(act=1, collect=0, update=595, step=267, waits=2),
    "trpo": Counts(act=1, collect=1, update=1739, step=55, waits=25),
    "sac, discrete": Counts(act=1, collect=0, update=459, step=199, waits=2),
}
DISCRETE = "sac, discrete"

T, B = 8, 2
MINIBATCHES = [{"num_minibatches": number, "update_epochs": 1} for number in (2, 4)]
# Batches of 32, so that an episode's end is in each: what is done only where one is counts too.
REPLAY = [{"utd_ratio": steps / (T * B), "buffer_size": 64, "batch_size": 32, "learning_starts": 8} for steps in (2, 4)]
# The keys that make updates of two gradient steps, and of four; alone where the number cannot be chosen.
KEYS: dict[str, Sequence[dict[str, Any]]] = {
    "a2c": [{}],
    "a3c": [{}],
    "ddpg": REPLAY,
    "dpg": [{}],
    "npg": MINIBATCHES,
    "ppo": MINIBATCHES,
    "reinforce": MINIBATCHES,
    "sac": REPLAY,
    "trpo": [{**keys, "backtrack_steps": 1} for keys in MINIBATCHES],  # the end of the search might hang on rounding
    DISCRETE: REPLAY,
}
WAITING = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2"}


class Count(TorchDispatchMode):
    """Counts the operations that torch dispatches, forwards and backwards, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.allocations, self.waits = Counter[str](), Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.operations[name] += 1
        if any("Tensor" in str(x.type) and x.alias_info is None for x in func._schema.returns):
            self.allocations[name] += 1  # what it returns is neither a view nor an argument
        by_mask = name.startswith("index") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool for x in (args[1] if isinstance(args[1], list) else [])
        )
        if name in WAITING or by_mask:
            self.waits[name] += 1
        return func(*args, **kwargs or {})


def counted(call: Callable[[], Any]) -> tuple[Any, Count]:
    """What the call returns, and what it asked of torch."""
    with Count() as count:
        result = call()
    return result, count


class Bench:
    """An agent and its envs after two rollouts and updates, when nothing is done for the first time any more."""

    def __init__(self, algo: str, keys: dict[str, Any]) -> None:
        kind = next(kind for kind in AGENTS if kind.__name__ == ALGOS[algo.partition(",")[0]].__name__)
        # episodes that the clock alone ends: that depends on nothing that is computed
        env_id = "Acrobot-v1" if algo == DISCRETE else "Pendulum-v1"
        self.env: VecEnv = make_vec(EnvConfig(env_id, max_episode_steps=4), B, seed=1)
        setting = Setting(self.env.obs_space, self.env.action_space, B, 1, torch.device("cpu"))
        torch.manual_seed(1)
        self.agent: Agent = AGENTS[kind](configure(kind, {"num_steps": T, **keys}), setting)
        self.rollout = Rollout(T, B, self.env.obs_space, self.env.action_space, self.env.device)
        self.obs = self.env.reset()
        for _ in range(2):
            self.update(self.collect())

    def collect(self) -> Transition:
        transition = collect(self.env, self.agent, self.rollout, self.obs, torch.device("cpu"))
        self.obs = self.rollout.obs[-1]
        return transition

    def update(self, rollout: Transition) -> dict[str, Tensor]:
        return self.agent.update(rollout, 0.5)

    @torch.no_grad()
    def act(self) -> Tensor:
        return self.agent.act(self.obs)


def measure(algo: str) -> tuple[Counts, dict[str, Count]]:
    """The counts of an algorithm, and the operations that they are of."""
    benches = [Bench(algo, keys) for keys in KEYS[algo]]
    updates = []
    for bench in benches:
        rollout, collecting = counted(bench.collect)
        updates.append(counted(lambda bench=bench, rollout=rollout: bench.update(rollout))[1])
    bench.act()  # the first step of a rollout may draw the noise of all
    _, acting = counted(bench.act)
    few, more = (count.operations.total() for count in (updates[0], updates[-1]))
    step, rest = divmod(more - few, 2)
    assert rest == 0, f"the gradient steps of {algo} differ from each other: {few} and {more} in two and four of them"
    counts = Counts(acting.operations.total(), collecting.allocations.total(), few, step, updates[0].waits.total())
    return counts, {"act": acting, "collect": collecting, "update": updates[0]}


@pytest.mark.parametrize("algo", [*ALGOS, DISCRETE])
def test_no_algorithm_asks_more_of_torch(algo: str) -> None:
    found, details = measure(algo)
    lines = [f"What {algo} asks of torch {torch.__version__} has changed. Measured, to be put into ACCEPTED:", ""]
    lines += [f'    "{algo}": {found},', ""]
    lines += ["A higher number is a slower run: more operations to dispatch (act, update, step), memory taken anew in"]
    lines += ["every rollout (collect), or more places where a GPU is waited for (waits). The operations were:", ""]
    lines += [f"    {what}: {dict(sorted(count.operations.items()))}" for what, count in details.items()]
    lines += [f"    of collect, with new memory: {dict(sorted(details['collect'].allocations.items()))}"]
    lines += [f"    of update, with a wait: {dict(sorted(details['update'].waits.items()))}"]
    accepted = ACCEPTED.get(algo)
    if accepted is not None and accepted.act == 1 and not compilers():
        accepted = accepted._replace(act=3)  # the way to numpy and back
    assert found == accepted, "\n".join(lines)


@pytest.mark.parametrize("algo", [*ALGOS, DISCRETE])
def test_rollouts_stay_where_they_are(algo: str) -> None:
    """The memory of a rollout is taken once: what an update is given, and where the envs write, does not move."""
    bench = Bench(algo, KEYS[algo][0])

    def places(rollout: Transition) -> list[int]:
        rows = [x for step in bench.rollout.steps for x in step]
        return [x.data_ptr() for x in [*rollout, *bench.rollout.obs, *rows]]

    first = places(bench.collect())
    assert len(set(first)) > len(Transition._fields)
    assert places(bench.collect()) == first


def test_what_is_counted() -> None:
    """A dispatch, memory that is new, and a wait are told from what is none."""
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, False])

    def totals(call: Callable[[], Any]) -> tuple[int, int, int]:
        count = counted(call)[1]
        return count.operations.total(), count.allocations.total(), count.waits.total()

    assert totals(lambda: x + 1) == (1, 1, 0)
    assert totals(lambda: x.add_(1)) == (1, 0, 0)
    assert totals(lambda: torch.add(x, 1, out=torch.empty(0))) == (2, 1, 0)
    assert totals(lambda: (x.view(2, 2), x.split(2), x[1:])) == (3, 0, 0)
    assert totals(lambda: float(x[0])) == (2, 0, 1)
    assert totals(lambda: bool(x[0] > 0)) == (3, 1, 1)
    assert totals(lambda: torch.equal(x, x)) == (1, 0, 1)
    assert totals(lambda: x[mask]) == (1, 1, 1)
    assert totals(lambda: x.numpy() + 1) == (1, 0, 0)  # torch is left by a view
    y = torch.ones(2, requires_grad=True)
    assert totals(lambda: torch.autograd.grad((y * y).sum(), y))[0] > 2  # the way back counts too
