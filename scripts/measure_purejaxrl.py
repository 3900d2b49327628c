"""PPO in the manner of PureJaxRL, beside bench_gpu.py: the whole training is one program that XLA compiles.

    python scripts/measure_purejaxrl.py                    CartPole-v1 with 1k, 4k, 16k and 64k envs
    python scripts/measure_purejaxrl.py --envs 4096 --iterations 100

For an interpreter with jax, flax, optax and gymnax. PureJaxRL (Lu et al. 2022, github.com/luchris429/purejaxrl) is no
package; this follows its structure (envs of gymnax under vmap, rollouts, advantages, epochs and minibatches as nested
scans, values predicted while acting, a time limit taken for death) with the settings of bench_gpu.py: 4 epochs of 4
minibatches, two networks of 64 x 64 tanh units, Adam with a rate that falls to 0, gradients clipped, values clipped,
advantages normalised in each minibatch. XLA multiplies in TF32 unless JAX_DEFAULT_MATMUL_PRECISION=highest. Steps/s are
of the compiled program, called once before it is timed; it reports nothing in between, and its returns are those of the
last episodes of all envs.
"""

import argparse
import time
from importlib.metadata import version
from typing import Any, NamedTuple

import flax.linen as nn
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.linen.initializers import constant, orthogonal

EPOCHS, MINIBATCHES = 4, 4
GAMMA, LAMBDA, CLIP, VALUE_CLIP, VALUE_WEIGHT, RATE, NORM = 0.99, 0.95, 0.2, 0.2, 0.5, 3e-4, 0.5


class Net(nn.Module):
    """Logits [N, 2] and values [N] of observations [N, 4]."""

    actions: int

    @nn.compact
    def __call__(self, obs: jax.Array) -> tuple[jax.Array, jax.Array]:
        outputs = []
        for units, gain in ((self.actions, 0.01), (1, 1.0)):
            x = obs
            for _ in range(2):
                x = jnp.tanh(nn.Dense(64, kernel_init=orthogonal(np.sqrt(2)), bias_init=constant(0.0))(x))
            outputs.append(nn.Dense(units, kernel_init=orthogonal(gain), bias_init=constant(0.0))(x))
        return outputs[0], outputs[1].squeeze(-1)


class Row(NamedTuple):
    """A step of all envs, [B, ...] each."""

    obs: jax.Array
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    reward: jax.Array
    done: jax.Array


def log_probs(logits: jax.Array, action: jax.Array) -> jax.Array:
    return jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], -1).squeeze(-1)


def make_training(num_envs: int, num_steps: int, iterations: int) -> Any:
    """A function of a random key: trains for so many iterations, and gives the mean return of last episodes."""
    env, env_params = gymnax.make("CartPole-v1")
    net = Net(env.action_space(env_params).n)
    total = iterations * EPOCHS * MINIBATCHES
    optimiser = optax.chain(
        optax.clip_by_global_norm(NORM), optax.adam(optax.linear_schedule(RATE, 0.0, total), eps=1e-5)
    )

    def loss(params: Any, batch: tuple[Row, jax.Array, jax.Array]) -> jax.Array:
        row, advantage, returns = batch
        logits, value = net.apply(params, row.obs)
        ratio = jnp.exp(log_probs(logits, row.action) - row.log_prob)
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        policy = -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage).mean()
        clipped = row.value + jnp.clip(value - row.value, -VALUE_CLIP, VALUE_CLIP)
        errors = jnp.maximum(jnp.square(value - returns), jnp.square(clipped - returns))
        return policy + VALUE_WEIGHT * 0.5 * errors.mean()

    def act(carry: Any, _: None) -> tuple[Any, Row]:
        params, env_state, obs, key, running, last = carry
        key, key_act, key_step = jax.random.split(key, 3)
        logits, value = net.apply(params, obs)
        action = jax.random.categorical(key_act, logits)
        keys = jax.random.split(key_step, num_envs)
        new_obs, env_state, reward, terminated, truncated, _ = jax.vmap(env.step, in_axes=(0, 0, 0, None))(
            keys, env_state, action, env_params
        )
        done = terminated | truncated
        running = running + reward
        last, running = jnp.where(done, running, last), jnp.where(done, 0.0, running)
        row = Row(obs, action, log_probs(logits, action), value, reward, done)
        return (params, env_state, new_obs, key, running, last), row

    def back(carry: tuple[jax.Array, jax.Array], row: Row) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        advantage, next_value = carry
        alive = 1.0 - row.done
        advantage = row.reward + GAMMA * next_value * alive - row.value + GAMMA * LAMBDA * alive * advantage
        return (advantage, row.value), advantage

    def descend(carry: tuple[Any, Any], batch: Any) -> tuple[tuple[Any, Any], None]:
        params, moments = carry
        changes, moments = optimiser.update(jax.grad(loss)(params, batch), moments, params)
        return (optax.apply_updates(params, changes), moments), None

    def iterate(carry: Any, _: None) -> tuple[Any, None]:
        params, moments, env_state, obs, key, running, last = carry
        acting = (params, env_state, obs, key, running, last)
        (_, env_state, obs, key, running, last), rows = jax.lax.scan(act, acting, None, num_steps)
        _, next_value = net.apply(params, obs)
        _, advantage = jax.lax.scan(back, (jnp.zeros_like(next_value), next_value), rows, reverse=True, unroll=16)
        whole = (rows, advantage, advantage + rows.value)
        flat = jax.tree.map(lambda x: x.reshape(num_steps * num_envs, *x.shape[2:]), whole)

        def epoch(carry: Any, _: None) -> tuple[Any, None]:
            params, moments, key = carry
            key, key_order = jax.random.split(key)
            order = jax.random.permutation(key_order, num_steps * num_envs)
            parts = jax.tree.map(lambda x: x[order].reshape(MINIBATCHES, -1, *x.shape[1:]), flat)
            (params, moments), _ = jax.lax.scan(descend, (params, moments), parts)
            return (params, moments, key), None

        (params, moments, key), _ = jax.lax.scan(epoch, (params, moments, key), None, EPOCHS)
        return (params, moments, env_state, obs, key, running, last), None

    def train(key: jax.Array) -> jax.Array:
        key, key_net, key_reset = jax.random.split(key, 3)
        params = net.init(key_net, jnp.zeros((1, *env.observation_space(env_params).shape)))
        keys = jax.random.split(key_reset, num_envs)
        obs, env_state = jax.vmap(env.reset, in_axes=(0, None))(keys, env_params)
        nothing = jnp.zeros(num_envs)
        carry = (params, optimiser.init(params), env_state, obs, key, nothing, nothing)
        carry, _ = jax.lax.scan(iterate, carry, None, iterations)
        last: jax.Array = carry[-1].mean()
        return last

    return train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", nargs="+", type=int, default=[1024, 4096, 16384, 65536])
    parser.add_argument("--num-steps", type=int, default=32, help="of a rollout (default 32)")
    parser.add_argument("--iterations", type=int, default=100, help="of a training (default 100)")
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, gymnax {version('gymnax')}\n")
    print("| envs | steps/s | an iteration, ms | to compile, s | last returns |\n|--:|--:|--:|--:|--:|", flush=True)
    for num_envs in options.envs:
        start = time.perf_counter()
        program = (
            jax.jit(make_training(num_envs, options.num_steps, options.iterations)).lower(jax.random.key(0)).compile()
        )
        compiling = time.perf_counter() - start
        program(jax.random.key(1)).block_until_ready()
        start = time.perf_counter()
        last = float(program(jax.random.key(2)).block_until_ready())
        seconds = (time.perf_counter() - start) / options.iterations
        sps = num_envs * options.num_steps / seconds
        print(f"| {num_envs:,} | {sps:,.0f} | {1e3 * seconds:,.2f} | {compiling:.1f} | {last:.0f} |", flush=True)


if __name__ == "__main__":
    main()
