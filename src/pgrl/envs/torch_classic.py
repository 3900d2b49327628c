"""Gymnasium's classic control as tensor operations: any number of envs in one step, on the device of the run.

What a step computes is in pure functions of tensors, one class an env. A state is float64 [S, B], a column an env, so
that it equals Gymnasium's to rounding over whole episodes; B is the number of envs. The equations are those of
`gymnasium.envs.classic_control` (version 1), which names the papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import gymnasium.spaces as spaces
import torch
from torch import Tensor

from pgrl.compiling import compile_step
from pgrl.data import Step, restore_generator
from pgrl.envs.base import EnvConfig, Episodes, episode_seed, new_step
from pgrl.envs.make import make, peel
from pgrl.envs.spaces import obs_rows
from pgrl.errors import UserError

Outcome = tuple[Tensor, Tensor, Tensor]  # the next state [S, B], the reward [B] float64, and terminated [B]


class Classic(Protocol):
    """One env as pure functions; its fields are the `env.kwargs` it takes, as Gymnasium's env does."""

    size: ClassVar[int]  # S

    def reset(self, noise: Tensor) -> Tensor:
        """A first state [S, B] from `noise` [S, B], uniform in [0, 1)."""

    def dynamics(self, state: Tensor, action: Tensor) -> Outcome:
        """What `action` [B], in bounds, leads to from `state` [S, B]."""

    def observe(self, state: Tensor) -> Tensor:
        """The observation [O, B] of `state` [S, B]."""


@dataclass(frozen=True)
class CartPole:
    """Balance a pole on a cart: Barto, Sutton & Anderson 1983, in the form of Florian 2007, equations 23 and 24.

    State and observation: position (m), velocity (m/s), angle from upright (rad), angular velocity (rad/s). Action 0
    pushes left, 1 right, with 10 N for 0.02 s; a step of Euler's.
    """

    size: ClassVar[int] = 4
    sutton_barto_reward: bool = False  # -1 for the fall and 0 before, not 1 for each step

    def reset(self, noise: Tensor) -> Tensor:
        return 0.1 * noise - 0.05

    def dynamics(self, state: Tensor, action: Tensor) -> Outcome:
        gravity, pole, total, half_length = 9.8, 0.1, 1.1, 0.5  # m/s2, kg, kg, m
        _, velocity, angle, spin = state
        sin, cos = angle.sin(), angle.cos()
        push = (10.0 * (2 * action - 1) + pole * half_length * spin**2 * sin) / total
        twist = (gravity * sin - cos * push) / (half_length * (4 / 3 - pole / total * cos**2))
        pull = push - pole * half_length / total * twist * cos
        state = state + 0.02 * torch.stack([velocity, pull, spin, twist])
        terminated = (state[0].abs() > 2.4) | (state[2].abs() > math.radians(12))
        return state, -terminated.double() if self.sutton_barto_reward else torch.ones_like(push), terminated

    def observe(self, state: Tensor) -> Tensor:
        return state


@dataclass(frozen=True)
class Pendulum:
    """Swing a rod of 1 m and 1 kg up and hold it there.

    State: angle from upright (rad), angular velocity (rad/s, within 8). Observation: cosine and sine of the angle, and
    the velocity. Action: a torque (N m, within 2) for 0.05 s. The reward is of the state the action met.
    """

    size: ClassVar[int] = 2
    g: float = 10.0  # m/s2

    def reset(self, noise: Tensor) -> Tensor:
        angle, spin = 2 * noise - 1
        return torch.stack([math.pi * angle, spin])

    def dynamics(self, state: Tensor, action: Tensor) -> Outcome:
        seconds = 0.05
        angle, spin = state
        reward = -(wrap(angle) ** 2 + 0.1 * spin**2 + 0.001 * action**2)
        spin = (spin + (1.5 * self.g * angle.sin() + 3 * action) * seconds).clamp(-8, 8)
        return torch.stack([angle + spin * seconds, spin]), reward, torch.zeros_like(spin, dtype=torch.bool)

    def observe(self, state: Tensor) -> Tensor:
        angle, spin = state
        return torch.stack([angle.cos(), angle.sin(), spin])


@dataclass(frozen=True)
class Acrobot:
    """Swing two links up by a torque between them: Sutton 1996, with the equations of Sutton & Barto's book.

    State: the first link's angle from hanging, the second's from the first (rad), and their velocities (rad/s, within
    4 pi and 9 pi). Observation: cosine and sine of each angle, and the velocities. Actions 0, 1, 2 are torques of -1, 0
    and 1 N m for 0.2 s, a step of Runge and Kutta's. The links have 1 m, 1 kg, their centre halfway, and 1 kg m2.
    """

    size: ClassVar[int] = 4

    def reset(self, noise: Tensor) -> Tensor:
        return 0.2 * noise - 0.1

    def dynamics(self, state: Tensor, action: Tensor) -> Outcome:
        torque = action - 1
        first, second, spin1, spin2 = runge_kutta(lambda s: self.rates(s, torque), state, 0.2)
        state = torch.stack(
            [
                wrap(first),
                wrap(second),
                spin1.clamp(-4 * math.pi, 4 * math.pi),
                spin2.clamp(-9 * math.pi, 9 * math.pi),
            ]
        )
        terminated = -first.cos() - (first + second).cos() > 1
        return state, terminated.double() - 1, terminated

    def rates(self, state: Tensor, torque: Tensor) -> Tensor:
        """The time derivative of `state`, both [4, B], under `torque` [B]."""
        gravity = 9.8
        first, second, spin1, spin2 = state
        sin, cos = second.sin(), second.cos()
        d1, d2 = 3.5 + cos, 1.25 + 0.5 * cos
        phi2 = 0.5 * gravity * (first + second).sin()
        phi1 = 1.5 * gravity * first.sin() - (0.5 * spin2 + spin1) * spin2 * sin + phi2
        gain2 = (torque + d2 / d1 * phi1 - 0.5 * spin1**2 * sin - phi2) / (1.25 - d2**2 / d1)
        return torch.stack([spin1, spin2, -(d2 * gain2 + phi1) / d1, gain2])

    def observe(self, state: Tensor) -> Tensor:
        first, second, spin1, spin2 = state
        return torch.stack([first.cos(), first.sin(), second.cos(), second.sin(), spin1, spin2])


@dataclass(frozen=True)
class MountainCar:
    """Drive an underpowered car out of a valley: Moore 1990.

    State and observation: position and velocity. Actions 0, 1, 2 push left, not, right. Each step costs 1.
    """

    size: ClassVar[int] = 2
    goal_velocity: float = 0.0  # the least with which the goal counts as reached

    def reset(self, noise: Tensor) -> Tensor:
        return in_the_valley(noise)

    def dynamics(self, state: Tensor, action: Tensor) -> Outcome:
        state = drive(state, 0.001 * (action - 1))
        terminated = (state[0] >= 0.5) & (state[1] >= self.goal_velocity)
        return state, -torch.ones_like(state[0]), terminated

    def observe(self, state: Tensor) -> Tensor:
        return state


@dataclass(frozen=True)
class MountainCarContinuous:
    """MountainCar with a push in [-1, 1] as the action, paid by its square, and 100 for the goal.

    Gymnasium keeps this state in float32.
    """

    size: ClassVar[int] = 2
    goal_velocity: float = 0.0  # the least with which the goal counts as reached

    def reset(self, noise: Tensor) -> Tensor:
        return in_the_valley(noise)

    def dynamics(self, state: Tensor, action: Tensor) -> Outcome:
        state = drive(state, 0.0015 * action)
        terminated = (state[0] >= 0.45) & (state[1] >= self.goal_velocity)
        return state, 100 * terminated.double() - 0.1 * action**2, terminated

    def observe(self, state: Tensor) -> Tensor:
        return state


CLASSICS: dict[str, Callable[..., Classic]] = {
    "CartPole-v1": CartPole,
    "Pendulum-v1": Pendulum,
    "Acrobot-v1": Acrobot,
    "MountainCar-v0": MountainCar,
    "MountainCarContinuous-v0": MountainCarContinuous,
}


def wrap(angle: Tensor) -> Tensor:
    """The angle in [-pi, pi)."""
    return (angle + math.pi).remainder(2 * math.pi) - math.pi


def runge_kutta(rates: Callable[[Tensor], Tensor], state: Tensor, seconds: float) -> Tensor:
    """The state after one classical fourth-order step."""
    k1 = rates(state)
    k2 = rates(state + seconds / 2 * k1)
    k3 = rates(state + seconds / 2 * k2)
    k4 = rates(state + seconds * k3)
    return state + seconds / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def in_the_valley(noise: Tensor) -> Tensor:
    """A car [2, B] at rest near the bottom."""
    return torch.stack([0.2 * noise[0] - 0.6, torch.zeros_like(noise[0])])


def drive(state: Tensor, push: Tensor) -> Tensor:
    """A car [2, B] after one step; the left end of its road stops it."""
    position, velocity = state
    velocity = (velocity + push - 0.0025 * (3 * position).cos()).clamp(-0.07, 0.07)
    position = (position + velocity).clamp(-1.2, 0.6)
    return torch.stack([position, torch.where(position > -1.2, velocity, velocity.clamp(min=0))])


def classic(config: EnvConfig) -> Classic:
    """The env of `config`; UserError if it is not among CLASSICS or does not take these `env.kwargs`."""
    if config.id not in CLASSICS:
        raise UserError(
            f"env={config.id}: env.backend=torch has {', '.join(CLASSICS)}, and no other env.\n"
            f"Use: env={config.id} env.backend=gymnasium"
        )
    new = CLASSICS[config.id]
    known = {field.name: field.default for field in fields(new())}  # type: ignore[arg-type]
    takes = " ".join(f"env.kwargs.{name}={str(default).lower()}" for name, default in known.items())
    for name, value in config.kwargs.items():
        of_type = (bool,) if isinstance(known.get(name), bool) else (int, float)
        if name not in known or type(value) not in of_type:
            raise UserError(
                f"env.kwargs.{name}={value}: {config.id} with env.backend=torch takes {takes or 'none'}"
                f"{' alone' * bool(takes)}.\nUse: {f'env={config.id} env.backend=torch {takes}'.rstrip()}"
            )
    return new(**config.kwargs)


class TorchVecEnv:
    """`num_envs` copies of one classic env in tensors on `device`; an env that ends is reset within the same step.

    A step is operations on tensors that stay in their place: it waits for no device, and decides nothing by what the
    tensors hold. All first states are drawn from one generator of the env's own, so that an episode hangs on the
    number of envs and on the kind of device beside the seed.

    The length and the return of what ended are kept as rows [B], 12 bytes a step and env, until `episodes` reads them.
    That call waits for the device. It reads what the rows hold, whether the host or a CUDA graph had them written.
    """

    def __init__(
        self, config: EnvConfig, num_envs: int, seed: int, device: torch.device, compiled: bool = False
    ) -> None:
        self.num_envs, self.device = num_envs, device
        self._classic, self._seed = classic(config), seed
        env, self._limit = peel(make(config, 1)[0])
        self.obs_space, self.action_space = obs_rows(config.id, env.observation_space), env.action_space
        env.close()
        self._bounds: tuple[float, float] | None = None
        if isinstance(self.action_space, spaces.Box):
            self._bounds = float(self.action_space.low.item()), float(self.action_space.high.item())

        self._generator = torch.Generator(device)
        self._state = torch.zeros(self._classic.size, num_envs, dtype=torch.float64, device=device)
        self._length = torch.zeros(num_envs, dtype=torch.int32, device=device)  # of the running episodes, steps
        self._return = torch.zeros(num_envs, dtype=torch.float64, device=device)
        self._rows = 0  # steps since `episodes`; the lengths (0: goes on, or not yet written) and returns of what ended
        self._ended_length = torch.zeros(1, num_envs, dtype=torch.int32, device=device)
        self._ended_return = torch.zeros(1, num_envs, dtype=torch.float64, device=device)
        self._begun = False
        self._advance = compile_step(self.advance) if compiled else self.advance

    def reset(self) -> Tensor:
        self._generator.manual_seed(episode_seed(self._seed, 0, 0))
        self._state.copy_(self._classic.reset(self._noise()))
        self._length.zero_()
        self._return.zero_()
        self._forget()
        self._begun = True
        return self.obs()

    def obs(self) -> Tensor:
        return self._classic.observe(self._state).T.contiguous().float()

    def step(self, action: Tensor, out: Step | None = None) -> Step:
        if not self._begun:
            raise RuntimeError("call reset or load_state_dict before step")
        out = new_step(self.obs()) if out is None else out
        self._advance(action, self._noise(), tuple(out), self._row())
        return out

    def advance(self, action: Tensor, noise: Tensor, out: tuple[Tensor, ...], row: tuple[Tensor, Tensor]) -> None:
        """A step as operations on tensors alone, one graph where compiled: its answer in `out`, what ended in `row`.

        `noise` [S, B] makes first states: drawing those that are not needed is cheaper than asking which are.
        """
        out_obs, out_reward, out_terminated, out_truncated, out_next_obs = out
        action = action.reshape(self.num_envs)  # each of these envs takes one number
        if self._bounds is not None:
            action = action.clamp(*self._bounds)
        state, reward, terminated = self._classic.dynamics(self._state, action)
        self._length += 1
        self._return += reward
        truncated = self._length >= self._limit
        ended = terminated | truncated
        torch.mul(self._length, ended, out=row[0])
        row[1].copy_(self._return)
        out_next_obs.copy_(self._classic.observe(state).T)
        out_reward.copy_(reward)
        out_terminated.copy_(terminated)
        out_truncated.copy_(truncated)

        torch.where(ended, self._classic.reset(noise), state, out=self._state)
        self._length.masked_fill_(ended, 0)
        self._return.masked_fill_(ended, 0.0)
        out_obs.copy_(self._classic.observe(self._state).T)

    def episodes(self) -> Episodes:
        lengths, returns = self._ended_length, self._ended_return
        where = step, env = lengths.nonzero(as_tuple=True)
        table = torch.stack([returns[where], lengths[where].double(), env.double()]).cpu()  # one wait, not three
        self._forget()
        return Episodes(table[0].tolist(), table[1].int().tolist(), table[2].int().tolist())

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "generator": self._generator.get_state(),
            "state": self._state.clone(),
            "length": self._length.clone(),
            "return": self._return.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Exact on the kind of device that the state comes from; on another one, first states are drawn anew.

        ValueError if the state is that of another number of envs.
        """
        if len(state["length"]) != self.num_envs:
            raise ValueError(f"a state of {len(state['length'])} envs does not fit {self.num_envs} envs")
        self._seed = state["seed"]
        self._generator.manual_seed(episode_seed(self._seed, 0, 1))
        restore_generator(self._generator, state["generator"])
        self._state.copy_(state["state"])
        self._length.copy_(state["length"])
        self._return.copy_(state["return"])
        self._forget()
        self._begun = True

    def close(self) -> None: ...

    def _noise(self) -> Tensor:
        """What makes a first state for every env, [S, B]."""
        shape, like = self._state.shape, self._state
        return torch.rand(shape, generator=self._generator, dtype=like.dtype, device=like.device)

    def _forget(self) -> None:
        """Leave no episode to tell of."""
        self._ended_length.zero_()
        self._rows = 0

    def _row(self) -> tuple[Tensor, Tensor]:
        """Room for the lengths and returns of what ends in the next step, [B] each."""
        if self._rows == len(self._ended_length):
            self._ended_length = torch.cat([self._ended_length, torch.zeros_like(self._ended_length)])
            self._ended_return = torch.cat([self._ended_return, torch.zeros_like(self._ended_return)])
        self._rows += 1
        return self._ended_length[self._rows - 1], self._ended_return[self._rows - 1]
