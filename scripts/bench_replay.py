"""Measure the replay buffer: microseconds of `sample`, `add` and `update_priorities`, and what a snapshot costs.

    python scripts/bench_replay.py                     1,000,000 transitions of HalfCheetah, batches of 256
    python scripts/bench_replay.py 100_000 64 4        so many transitions, batches of so many, from so many envs

Each figure is the median of 2,000 calls, with the 5th and the 95th percentile.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from gymnasium import spaces

from pgrl.data import Transition
from pgrl.replay import Priority, ReplayBuffer, nbytes
from pgrl.runs import detached

OBS = spaces.Box(-np.inf, np.inf, (17,), np.float32)
ACTION = spaces.Box(-1.0, 1.0, (6,), np.float32)
EPISODE = 1000


def timed(action: Callable[[], object], calls: int = 2000) -> str:
    """Median and interval of a call, in microseconds."""
    times = []
    for _ in range(calls + calls // 10):
        start = time.perf_counter()
        action()
        times.append(1e6 * (time.perf_counter() - start))
    cuts = statistics.quantiles(times[calls // 10 :], n=20)
    return f"{cuts[9]:7.1f} us [{cuts[0]:.1f}, {cuts[-1]:.1f}]"


def transitions(num_steps: int, num_envs: int) -> Transition:
    """Random steps [T, B] of episodes of EPISODE steps, which a time limit ends."""
    obs = torch.randn((num_steps + 1, num_envs, *OBS.shape))
    truncated = (torch.arange(1, num_steps + 1) % EPISODE == 0).unsqueeze(1).expand(-1, num_envs)
    nothing = torch.zeros((num_steps, num_envs), dtype=torch.bool)
    action = torch.randn((num_steps, num_envs, *ACTION.shape))
    return Transition(obs[:-1], action, torch.randn(num_steps, num_envs), obs[1:], nothing, truncated)


def measure(capacity: int, batch_size: int, num_envs: int, n_step: int, prioritised: Priority | None) -> list[str]:
    """Lines of figures for a full buffer."""
    generator, device = torch.Generator().manual_seed(1), torch.device("cpu")
    buffer = ReplayBuffer(
        *(capacity, num_envs, OBS, ACTION, device, generator), gamma=0.99, n_step=n_step, prioritised=prioritised
    )
    block = transitions(10 * EPISODE, num_envs)
    while len(buffer) < buffer.layout.capacity * num_envs:
        buffer.add(block)
    rows = iter([Transition(*(x[t : t + 1] for x in block)) for t in range(10 * EPISODE)])
    size = nbytes(capacity, num_envs, OBS, ACTION, n_step, prioritised)
    lines = [f"n_step={n_step}, {'uniform' if prioritised is None else 'prioritised'}: {size / 1e6:.1f} MB"]
    lines.append(f"  sample({batch_size})             {timed(lambda: buffer.sample(batch_size))}")
    lines.append(f"  add, {num_envs} env(s), one step  {timed(lambda: buffer.add(next(rows)), 1000)}")
    state = buffer.state_dict()
    lines.append(f"  add, a snapshot is kept    {timed(lambda: buffer.add(next(rows)), 1000)}")
    del state
    if prioritised is not None:
        index = buffer.sample(batch_size).index
        error = torch.randn(batch_size)
        lines.append(f"  update_priorities({batch_size})  {timed(lambda: buffer.update_priorities(index, error))}")
    lines.append(f"  snapshot                   {timed(lambda: detached(buffer.state_dict()), 100)}")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capacity", nargs="?", type=int, default=1_000_000, help="transitions")
    parser.add_argument("batch_size", nargs="?", type=int, default=256)
    parser.add_argument("num_envs", nargs="?", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for n_step in (1, 3):
        for prioritised in (None, Priority(0.6)):
            print("\n".join(measure(given.capacity, given.batch_size, given.num_envs, n_step, prioritised)), flush=True)
