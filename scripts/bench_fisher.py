"""What a Fisher-vector product costs, in forward-backward passes of the policy on the same batch.

    python scripts/bench_fisher.py [--rows 2048] [--rounds 30]

The policy is that of TRPO on HalfCheetah-v4: 17 numbers in, two layers of 64, six actions. Beside the Gauss-Newton
product stands the Hessian of the KL by differentiating twice. One thread, interleaved blocks, medians.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import pgrl  # noqa: F401  # before numpy and torch, as in every run

# isort: split
import gymnasium.spaces as spaces
import numpy as np
import torch
from torch import Tensor
from torch.autograd import grad

from bench_peers import processor
from pgrl.distributions import detached
from pgrl.flat import flatten
from pgrl.networks import ActorCritic, NetworkConfig, PolicyConfig
from pgrl.trust_region import FisherProduct


def passes(rows: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    torch.manual_seed(0)
    box = spaces.Box(-1.0, 1.0, (6,), np.float32)
    net = ActorCritic(spaces.Box(-np.inf, np.inf, (17,), np.float32), box, NetworkConfig(), PolicyConfig())
    obs, parameters = torch.randn(rows, 17), net.policy_parameters()
    distribution = net.policy(obs)
    old = detached(distribution)
    action = old.sample(torch.randn(rows, 6))
    log_prob = old.log_prob(action)
    v = torch.randn(sum(p.numel() for p in parameters))
    product = FisherProduct(distribution, parameters)
    slope = flatten(grad(old.kl(distribution).mean(), parameters, create_graph=True))

    def both_ways() -> tuple[Tensor, ...]:
        return grad((net.policy(obs).log_prob(action) - log_prob).exp().mean(), parameters)

    return {
        "forward and backward pass of the surrogate": both_ways,
        "Fisher-vector product (Gauss-Newton)": lambda: product(v),
        "the same by differentiating the KL twice": lambda: grad(slope @ v, parameters, retain_graph=True),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048, help="observations of the batch (default 2048)")
    parser.add_argument("--rounds", type=int, default=30, help="timed blocks of each (default 30)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    timed = passes(options.rows)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(options.rounds + 2):
        for name, run in timed.items():
            start = time.perf_counter()
            for _ in range(5):
                run()
            seconds[name].append((time.perf_counter() - start) / 5)
    medians = {name: statistics.median(taken[2:]) for name, taken in seconds.items()}
    base = next(iter(medians.values()))
    for name, median in medians.items():
        print(f"{name:45} {median * 1e6:8,.0f} us   {median / base:.2f} passes")
    print(f"{options.rows} rows, one thread, {processor()}, torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
