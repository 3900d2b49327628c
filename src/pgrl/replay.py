"""Experience replay: a ring of transitions, sampled uniformly or by priority, whose state is cheap to keep and to save.

A transition is a row of bytes: observation, action, reward, discount and a link. Each env has a ring of rows in the
order of time, so what a transition led to is the observation of the next row, and one copy of the row and its n
followers is all that a sample needs. The ring has a row more than it holds: its head, with the observation that the
newest row led to. Only where an episode ended does a transition lead elsewhere; the link then names an entry of a
second, small ring, the ends.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import gymnasium.spaces as spaces
import numpy as np
import torch
from torch import Generator, Tensor

from pgrl.data import Transition, restore_generator
from pgrl.replay_layout import columns, field, layout
from pgrl.replay_rows import Snapshot, fit, held
from pgrl.sum_tree import SumTree, tree_sizes

# A link is 2 * entry + terminated where an episode ended, and -2 - 2 * entry elsewhere, entry being the next one to
# come. Entries are numbered in order of time and env, modulo ENTRIES, so that a link fits 32 bits. So the link of the
# oldest row tells where the live ends begin, and ends are freed by no work at all.
ENTRIES = 2**30
FEWEST_ENDS = 64  # room for ends at first; it doubles when it is full


class Batch(NamedTuple):
    """N samples of up to n steps each; views of memory that the next sample is written to, and may not outlive it."""

    obs: Tensor  # [N, *obs], as stored: uint8 or float32
    action: Tensor  # [N, ...]
    reward: Tensor  # [N] sum over k of gamma^k r_k, cut where an episode ended and at the newest row
    next_obs: Tensor  # [N, *obs] what the last of these steps led to, before any reset
    discount: Tensor  # [N] gamma^(steps taken), 0 where the last of them terminated
    weight: Tensor  # [N] importance weights of prioritised replay, otherwise ones, not to be written to
    index: Tensor  # type: ignore[assignment]  # [N] int64, for `update_priorities`, until the next `add`; where the buffer is


class Fields(NamedTuple):
    """What rows hold, and the observations of the rows that follow them."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    discount: Tensor
    link: Tensor


class Priority(NamedTuple):
    """Prioritised replay: a sample's probability is proportional to (|TD error| + eps)^alpha.

    Schaul et al. 2016 (arXiv 1511.05952), section 3.3, the proportional variant.
    """

    alpha: float
    eps: float = 1e-6


def nbytes(
    capacity: int,
    num_envs: int,
    obs_space: spaces.Box,
    action_space: spaces.Space[Any],
    n_step: int = 1,
    prioritised: Priority | None = None,
) -> int:
    """The bytes that a buffer allocates at its first transition.

    Later only the ends may take more, an observation for each episode's end that is held and at most four times that.
    """
    shape = layout(capacity, num_envs, obs_space, action_space, n_step)
    rows = shape.num_envs * shape.length
    tree = 0 if prioritised is None else 8 * sum(tree_sizes(rows))
    return rows * shape.width + FEWEST_ENDS * shape.obs_bytes + tree


class ReplayBuffer:
    """The last `capacity` transitions of B envs; `add` and `sample` cost the same however many are held.

    Both ask whether an episode ended, for which they wait where the buffer is on a GPU.

    capacity: transitions over all envs, rounded down to whole times of B. gamma, n_step: of the returns that samples
    come with. generator: draws the samples, and nothing else may draw from it. Memory is taken at the first `add`, on
    `device`, where rollouts come from; samples go to the device `to` (None: they stay), rows of one step by one copy.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        obs_space: spaces.Box,
        action_space: spaces.Space[Any],
        device: torch.device,
        generator: Generator,
        *,
        gamma: float,
        n_step: int = 1,
        prioritised: Priority | None = None,
        to: torch.device | None = None,
    ) -> None:
        self.layout = layout(capacity, num_envs, obs_space, action_space, n_step)
        self.gamma, self.n_step, self.prioritised = gamma, n_step, prioritised
        self.device, self._generator, self._to = device, generator, to or device
        self._first, self._time = 0, 0  # the times first .. time - 1 are held, numbered from the run's start
        self._rows: Tensor | None = None  # uint8 [length, B, width]; in memory env by env
        self._ends = torch.empty(0)  # uint8 [a power of two, obs_bytes]; entry e is at e modulo its length
        self._first_end, self._next_end = 0, 0  # the first that may be live, and the next; not reduced
        self._tree: SumTree | None = None
        self._snapshots: list[weakref.ref[Snapshot]] = []
        self._saved: dict[int, str] = {}
        self._ones = torch.ones((), device=self._to).expand(1)  # the weights of uniform samples
        self._powers = torch.tensor([gamma**k for k in range(n_step)], device=device)

    def __len__(self) -> int:
        """Transitions held."""
        return (self._time - self._first) * self.layout.num_envs

    @property
    def count(self) -> int:
        """Transitions ever added."""
        return self._time * self.layout.num_envs

    def add(self, rollout: Transition) -> None:
        """Append a rollout [T, B, ...]; the oldest transitions make room.

        Where an observation is not what the last step led to although no episode ended (an env whose episode could not
        be restored), the last step counts as truncated.
        """
        start, steps = 0, len(rollout.reward)
        while start < steps:  # in blocks that do not reach over the ring's end
            slot = self._time % self.layout.size
            stop = min(steps, start + min(self.layout.size - slot, self.layout.capacity))
            self._add(rollout if stop - start == steps else Transition(*(x[start:stop] for x in rollout)))
            start = stop

    def _add(self, block: Transition) -> None:
        shape, steps = self.layout, len(block.reward)
        if self._rows is None:
            self._allocate()
        obs, action, reward, discount, link = self._columns
        given = Transition(*map(plain, block))
        slot, stop = self._time % shape.size, self._time + steps
        ended = given.terminated | given.truncated
        if steps > 1 and (given.next_obs[:-1] != given.obs[1:]).any():
            ended[:-1] |= plain(differ(block.next_obs[:-1], block.obs[1:], 2))
        if len(self) and (obs[slot] != given.obs[0]).any():
            self._cut(differ(self._obs[slot], block.obs[0], 1))
        first = max(self._first, stop - shape.capacity)
        links: Any = -2 - 2 * (self._next_end % ENTRIES)
        if ended.any():
            over = torch.as_tensor(ended)
            links = plain(self._linked(over, block.terminated))
            self._store(block.next_obs[over], first if first < self._time else None)
        self._keep(self._time + 1 - shape.size, stop + 1 - shape.size)
        rows, head = slice(slot, slot + steps), stop % shape.size
        obs[rows] = given.obs
        action[rows] = given.action
        reward[rows] = given.reward
        discount[rows] = self.gamma * ~given.terminated
        link[rows] = links
        obs[head] = given.next_obs[-1]
        self._repeat(slot, slot + steps)
        self._repeat(head, head + 1)
        if self._tree is not None:
            times = torch.arange(slot, slot + steps, device=self.device)
            self._tree.replace(self._index(times), self._index(torch.tensor([head], device=self.device)))
        self._first, self._time = first, stop

    def _allocate(self) -> Tensor:
        shape, device = self.layout, self.device
        memory = torch.zeros((shape.num_envs * shape.length, shape.width), dtype=torch.uint8, device=device)
        self._hold(torch.zeros((FEWEST_ENDS, shape.obs_bytes), dtype=torch.uint8, device=device))
        self._ints = torch.empty((0, 0), dtype=torch.int32, device=device)  # [N, (n + 1) * words]: the last sample
        self._tree = None if self.prioritised is None else SumTree(len(memory), device)
        words = shape.width // 4
        following = (len(memory) - shape.n_step, (shape.n_step + 1) * words)
        self._windows = memory.view(torch.int32).as_strided(following, (words, 1))
        rows = memory.view(shape.num_envs, shape.length, shape.width).transpose(0, 1)
        self._obs = field(rows, 0, shape.obs_shape, shape.obs_dtype)
        self._action = field(rows, shape.action_at, shape.action_shape, shape.action_dtype)
        self._reward = field(rows, shape.reward_at, (), torch.float32)
        self._discount = field(rows, shape.reward_at + 4, (), torch.float32)
        self._link = field(rows, shape.reward_at + 8, (), torch.int32)
        self._columns = [plain(x) for x in (self._obs, self._action, self._reward, self._discount, self._link)]
        self._rows = rows
        return rows

    def _hold(self, ends: Tensor) -> None:
        """Take this memory [length, obs_bytes] for ends, and for their observations [length, *obs]."""
        self._ends, self._end_obs = ends, plain(field(ends, 0, self.layout.obs_shape, self.layout.obs_dtype))

    def _repeat(self, slot: int, stop: int) -> None:
        """Copy those of the slots slot .. stop - 1 that are among the first n to where they stand once more."""
        stop = min(stop, self.layout.n_step)
        if slot < stop and self._rows is not None:
            self._rows[self.layout.size + slot : self.layout.size + stop] = self._rows[slot:stop]

    def _index(self, slots: Tensor) -> Tensor:
        """The numbers of the rows of all envs at slots [n]: [B * n]."""
        envs = torch.arange(self.layout.num_envs, device=self.device) * self.layout.length
        return (envs.unsqueeze(1) + slots).flatten()

    def _linked(self, ended: Tensor, terminated: Tensor) -> Tensor:
        """The links, int32, of new rows, which `ended` and `terminated` are of in order of time and env."""
        one = ended.long()
        entry = (self._next_end + one.flatten().cumsum(0).view_as(one) - one) % ENTRIES
        return torch.where(ended, 2 * entry + terminated, -2 - 2 * entry).int()

    def _store(self, obs: Tensor, oldest: int | None) -> None:
        """Append obs [n, *obs] to the ends; `oldest` is the oldest time whose ends are still needed, None: none is."""
        need = self._next_end + len(obs)
        if need - self._first_end > len(self._ends):
            self._first_end = self._next_end if oldest is None else self._entry_before(oldest)
        if need - self._first_end > len(self._ends):
            self._grow(need - self._first_end)
        entries = torch.arange(self._next_end, need, device=self.device) % len(self._ends)
        for snapshot in self._live():
            if snapshot.ends is self._ends and self._next_end - len(self._ends) < snapshot.next_end:
                snapshot.kept_ends.append((entries, self._ends[entries]))
        self._ends[entries] = obs.contiguous().view(torch.uint8).view(len(obs), -1)
        self._next_end = need

    def _entry_before(self, time: int) -> int:
        """The first of the ends that rows of this time or later name."""
        link = int(self._link[time % self.layout.size, 0])
        entry = link >> 1 if link >= 0 else -1 - (link >> 1)
        return self._next_end - (self._next_end - entry) % ENTRIES

    def _grow(self, need: int) -> None:
        """Make room for `need` ends, in new memory: a snapshot may hold the old."""
        length = 1 << (2 * need - 1).bit_length()
        ends = torch.zeros((length, self.layout.obs_bytes), dtype=torch.uint8, device=self.device)
        entries = torch.arange(self._first_end, self._next_end, device=self.device)
        ends[entries % length] = self._ends[entries % len(self._ends)]
        self._hold(ends)

    def _cut(self, differs: Tensor) -> None:
        """End the newest rows of those envs [B] whose episode does not go on, if it had not ended already."""
        last = (self._time - 1) % self.layout.size
        link = self._link[last]
        if not (differs & (link < 0)).any():
            return
        # The entries of one time are consecutive: those that it has are stored anew.
        ended = differs | (link >= 0)
        successors = self._obs[self._time % self.layout.size].clone()
        self._lead_elsewhere(successors, link)
        links = self._linked(ended, (link & 1).bool())
        self._store(successors[ended], self._first)
        self._keep(self._time - 1, self._time)
        self._link[last] = links
        self._repeat(last, last + 1)

    def _lead_elsewhere(self, obs: Tensor, link: Tensor) -> None:
        """Put the ends in the place of those obs [N, *obs] that rows with these links [N] did not lead to."""
        links = plain(link)
        if links.max() >= 0:
            # once: a GPU is waited for
            at = np.flatnonzero(links >= 0) if link.is_cpu else (link >= 0).nonzero().squeeze(1)
            plain(obs)[at] = self._end_obs[(links[at] >> 1) % len(self._end_obs)]

    def sample(self, batch_size: int, beta: float = 1.0) -> Batch:
        """`batch_size` transitions with replacement: uniformly, or by priority with the importance weights.

        By priority: one sample from each of N equal parts of the sum of all p_i (stratified), and the weights
        (len * p_i / sum)^-beta over their maximum; Schaul et al. 2016 (arXiv 1511.05952), sections 3.4 and B.2.1.
        """
        shape, device, generator = self.layout, self.device, self._generator
        held, start = self._time - self._first, self._first % shape.size
        if not held:
            raise ValueError("an empty buffer has nothing to sample")
        if self._tree is not None:
            u = torch.rand(batch_size, dtype=torch.float64, generator=generator, device=device)
            index, share = self._tree.find((u + torch.arange(batch_size, device=device)) / batch_size)
            weight = (len(self) * share) ** -beta
            return self._batch(index, (weight / weight.max()).float())
        index = torch.randint(held, (batch_size,), generator=generator, device=device)
        if start:
            index.add_(start).remainder_(shape.size)
        if shape.num_envs > 1:
            env = torch.randint(shape.num_envs, (batch_size,), generator=generator, device=device)
            index.add_(env, alpha=shape.length)
        if self._ones.shape[0] != batch_size:
            self._ones = self._ones[0].expand(batch_size)
        return self._batch(index, self._ones)

    def _batch(self, index: Tensor, weight: Tensor) -> Batch:
        if len(index) != len(self._ints):
            self._ints = self._windows.new_empty(len(index), self._windows.shape[1])
            self._fields = self._one_step(self._ints)
        ints, fields = self._ints, self._fields
        torch.index_select(self._windows, 0, index, out=ints)
        if self.layout.n_step > 1:
            batch = self._several_steps(ints, fields, index, weight)
            return batch if self._to == self.device else moved(batch, self._to)
        self._lead_elsewhere(fields.next_obs, fields.link)  # written to the ints
        if self._to != self.device:
            fields = self._one_step(ints.to(self._to))
        obs, action, reward, next_obs, discount, _ = fields
        return Batch(obs, chosen(action), reward, next_obs, discount, weight.to(self._to), index)

    def _one_step(self, ints: Tensor) -> Fields:
        """What windows [N, (n + 1) * words] begin with."""
        shape = self.layout
        floats = ints.view(torch.float32)
        source = ints.view(torch.uint8) if shape.obs_dtype == torch.uint8 else floats
        count, width, at = ints.shape[0], shape.width // 4, shape.reward_at // 4
        words = (shape.n_step + 1) * width
        length = words * 4 // shape.obs_dtype.itemsize  # of a row of `source`
        actions = floats if shape.action_dtype == torch.float32 else ints
        return Fields(
            columns(source, count, length, 0, shape.obs_shape),
            columns(actions, count, words, shape.action_at // 4, shape.action_shape),
            columns(floats, count, words, at, ()),
            columns(source, count, length, length // (shape.n_step + 1), shape.obs_shape),
            columns(floats, count, words, at + 1, ()),
            columns(ints, count, words, at + 2, ()),
        )

    def _several_steps(self, ints: Tensor, first: Fields, index: Tensor, weight: Tensor) -> Batch:
        """The batch of n steps of windows [N, (n + 1) * words]; `first` is what they begin with."""
        shape, n = self.layout, self.layout.n_step
        floats = ints.view(torch.float32)
        source = ints.view(torch.uint8) if shape.obs_dtype == torch.uint8 else floats
        count, width, at = ints.shape[0], shape.width // 4, shape.reward_at // 4
        rewards, discounts, links = (x.view(-1, n + 1, width)[:, :n] for x in (floats, floats, ints))
        rewards, discounts, links = rewards[..., at], discounts[..., at + 1], links[..., at + 2]
        age = (index % shape.length - self._first % shape.size) % shape.size
        left = (self._time - self._first - age).unsqueeze(1)
        ended = (links >= 0).long()
        taken = (ended.cumsum(1) == ended) & (torch.arange(n, device=index.device) < left)
        steps = taken.sum(1, keepdim=True)
        last = steps - 1
        reward = (rewards * self._powers).masked_fill_(~taken, 0.0).sum(1)
        discount = discounts.gather(1, last).squeeze(1) * self._powers[last.squeeze(1)]
        link = links.gather(1, last).squeeze(1)
        following = steps.squeeze(1) + torch.arange(0, count * (n + 1), n + 1, device=index.device)
        next_rows = source.view(count * (n + 1), -1).index_select(0, following)
        next_obs = columns(next_rows, count, next_rows.shape[1], 0, shape.obs_shape)
        self._lead_elsewhere(next_obs, link)
        return Batch(first.obs, chosen(first.action), reward, next_obs, discount, weight, index)

    def update_priorities(self, index: Tensor, td_error: Tensor) -> None:
        """Give the transitions of the last sample, `index` [N], the priorities of their TD errors [N], on any device.

        Errors that are not finite count as 0: the loss that had them is not finite either, and stops the run.
        """
        if self._tree is None or self.prioritised is None:
            raise ValueError("a uniform buffer has no priorities")
        alpha, eps = self.prioritised
        error = td_error.detach().to(self.device).double().abs().nan_to_num_(nan=0.0, posinf=0.0)
        self._tree.set(index, (error + eps) ** alpha)

    # The state, and the snapshots that let a buffer go on after it was taken.

    def state_dict(self) -> dict[str, Any]:
        """The state as of now; its `rows` stay those of now whatever is added later, as long as the state is kept."""
        snapshot = Snapshot(
            self.layout,
            self._rows,
            self._ends,
            first=self._first,
            time=self._time,
            next_end=self._next_end,
            saved=self._saved,
        )
        refs = [ref for ref in self._snapshots if ref() is not None]
        self._snapshots = [*refs, weakref.ref(snapshot)]
        head = None if self._rows is None else self._obs[self._time % self.layout.size].clone()
        return {
            "rows": snapshot,
            "head": head,
            "time": self._time,
            "priorities": None if self._tree is None else self._tree.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; where it comes without rows, with an empty buffer that has counted as far."""
        restore_generator(self._generator, state["generator"])
        rows, self._rows, self._tree = state["rows"], None, None
        self._first = self._time = state["time"]
        self._first_end = self._next_end = 0
        self._saved = {}
        if rows is None or state["head"] is None:
            return
        shape, told = self.layout, rows.info
        mine = fit(shape)
        if {key: told[key] for key in mine} != mine:
            raise ValueError(f"rows of another buffer: {told}, not {mine}")
        memory = self._allocate()
        self._next_end = told["next_end"]
        for first, block, ends in held(rows):
            slots = torch.arange(first, first + len(block)).to(self.device) % shape.size
            memory[slots] = block.to(self.device)
            link = field(block, shape.width - 4, (), torch.int32)
            if first == told["first"]:
                self._first_end = self._entry_before(first)
                if self._next_end - self._first_end > len(self._ends):
                    self._grow(self._next_end - self._first_end)
            self._ends[(link[link >= 0] >> 1).to(self.device) % len(self._ends)] = ends.to(self.device)
        self._obs[self._time % shape.size] = state["head"].to(self.device)
        self._repeat(0, shape.size)
        if self._tree is not None:
            self._tree.load_state_dict(state["priorities"])
        self._first = told["first"]
        if told["segment"] == shape.segment:
            self._saved = dict(rows.saved)

    def _live(self) -> Iterator[Snapshot]:
        for ref in self._snapshots:
            snapshot = ref()
            if snapshot is not None and snapshot.rows is self._rows:
                yield snapshot

    def _keep(self, first: int, stop: int) -> None:
        """Let the snapshots copy what they need of the rows of the times first .. stop - 1, which are about to change.

        An exception may come between any two statements of `add`: what was copied and then not changed does no harm.
        """
        for snapshot in self._live():
            start, end = max(first, snapshot.first), min(stop, snapshot.time)
            if start < end and snapshot.rows is not None:
                slots = torch.arange(start, end, device=self.device) % self.layout.size
                snapshot.kept.append((slots, snapshot.rows.index_select(0, slots)))


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on another device; its index stays."""
    return Batch(*(x.to(device) for x in batch))._replace(index=batch.index)


def chosen(action: Tensor) -> Tensor:
    """Actions as agents take them, where they are stored as int32."""
    return action if action.is_floating_point() else action.long()


def plain(x: Tensor) -> Any:
    """The tensor, in main memory as an array: writing to one costs a third of what a small operation of torch does."""
    return x.numpy() if x.is_cpu else x


def differ(a: Tensor, b: Tensor, lead: int) -> Tensor:
    """Which observations are not equal; the first `lead` dimensions tell them apart."""
    return (a != b).reshape(*a.shape[:lead], -1).any(-1)
