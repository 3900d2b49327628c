"""Experience replay: a ring of transitions, sampled uniformly or by priority, whose state is cheap to keep and to save.

A transition is a row of bytes: observation, action, reward and a link. The rows of B envs at one time lie side by side,
and the times form a ring, so that what follows a row is the observation of the row B further on. One row time more than
the ring holds is the head: it has the observations that the newest rows led to. Only where an episode ended does a
transition lead elsewhere; the link then names an entry of a second, small ring, the ends.
"""

from __future__ import annotations

import struct
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import gymnasium.spaces as spaces
import torch
from torch import Generator, Tensor

from pgrl.data import Transition, action_rows, restore_generator

# A link is 2 * entry + terminated where an episode ended, and -2 - 2 * entry elsewhere, entry being the next one to
# come. Entries are numbered in order of time and env, modulo ENTRIES, so that a link fits 32 bits. So the link of the
# oldest row tells where the live ends begin, and ends are freed by no work at all.
ENTRIES = 2**30
FEWEST_ENDS = 64  # room for ends at first; it doubles when it is full
SEGMENTS, SEGMENT_BYTES = 64, 2**18  # a full ring has about so many segments, or fewer of at least so many bytes
FAN = 32  # children of a node of the sum tree


class Batch(NamedTuple):
    """N samples of up to n steps each."""

    obs: Tensor  # [N, *obs], as stored: uint8 or float32
    action: Tensor  # [N, ...]
    reward: Tensor  # [N] sum over k of gamma^k r_k, cut where an episode ended and at the newest row
    next_obs: Tensor  # [N, *obs] what the last of these steps led to, before any reset
    discount: Tensor  # [N] gamma^(steps taken), 0 where the last of them terminated
    weight: Tensor  # [N] importance weights of prioritised replay, otherwise ones
    index: Tensor  # type: ignore[assignment]  # [N] int64, for `update_priorities`, until the next `add`


class Priority(NamedTuple):
    """Prioritised replay: a sample's probability is proportional to (|TD error| + eps)^alpha.

    Schaul et al. 2016 (arXiv 1511.05952), section 3.3; alpha as in its table 3.
    """

    alpha: float = 0.6
    eps: float = 1e-6


class Layout(NamedTuple):
    """Where things lie in the bytes of a row, and how many rows there are."""

    capacity: int  # rows in time; times num_envs: transitions
    num_envs: int
    obs_shape: tuple[int, ...]
    obs_dtype: torch.dtype
    obs_bytes: int
    action_shape: tuple[int, ...]
    action_dtype: torch.dtype  # as stored: float32 or int32
    action_at: int
    reward_at: int
    link_at: int
    width: int  # bytes

    @property
    def size(self) -> int:
        """Times in the ring: those it holds, and the head."""
        return self.capacity + 1

    @property
    def segment(self) -> int:
        """Times in a segment of a checkpoint."""
        return max(-(-self.capacity // SEGMENTS), -(-SEGMENT_BYTES // (self.num_envs * self.width)))


def layout(capacity: int, num_envs: int, obs_space: spaces.Box, action_space: spaces.Space[Any]) -> Layout:
    """The layout for `capacity` transitions of `num_envs` envs, rounded down to whole times, but at least one."""
    obs_dtype = torch.uint8 if obs_space.dtype == "uint8" else torch.float32
    obs_bytes = torch.Size(obs_space.shape).numel() * obs_dtype.itemsize
    shape, dtype = action_rows(action_space)
    if not dtype.is_floating_point:
        dtype = torch.int32
    action_at = -(-obs_bytes // 4) * 4
    reward_at = action_at + torch.Size(shape).numel() * dtype.itemsize
    times = max(1, capacity // num_envs)
    return Layout(
        *(times, num_envs, obs_space.shape, obs_dtype, obs_bytes, shape, dtype),
        *(action_at, reward_at, reward_at + 4, reward_at + 8),
    )


def nbytes(
    capacity: int,
    num_envs: int,
    obs_space: spaces.Box,
    action_space: spaces.Space[Any],
    prioritised: Priority | None = None,
) -> int:
    """The bytes that a buffer allocates at its first transition.

    Later only the ends may take more, an observation for each episode's end that is held and at most four times that.
    """
    shape = layout(capacity, num_envs, obs_space, action_space)
    tree = 0 if prioritised is None else 8 * sum(tree_sizes(shape.size * num_envs))
    return shape.size * num_envs * shape.width + FEWEST_ENDS * shape.obs_bytes + tree


def field(rows: Tensor, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What lies from byte `at` on in rows [..., width], as [..., *shape]: a view."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return rows[..., at : at + size].view(dtype).view(*rows.shape[:-1], *shape)


class ReplayBuffer:
    """The last `capacity` transitions of B envs; `add` costs the same for each, `sample` does not wait for anything.

    capacity: transitions over all envs, rounded down to whole times of B. gamma, n_step: of the returns that samples
    come with. generator: draws the samples, and nothing else may draw from it. Memory is taken at the first `add`.
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
    ) -> None:
        self.layout = layout(capacity, num_envs, obs_space, action_space)
        self.gamma, self.n_step, self.prioritised = gamma, n_step, prioritised
        self._device, self._generator = device, generator
        self._first, self._time = 0, 0  # the times first .. time - 1 are held, numbered from the run's start
        self._rows: Tensor | None = None  # uint8 [size * B, width]
        self._ends = torch.empty(0)  # uint8 [a power of two, obs_bytes]; entry e is at e modulo its length
        self._first_end, self._next_end = 0, 0  # the first that may be live, and the next; not reduced
        self._tree: SumTree | None = None
        self._snapshots: list[weakref.ref[Snapshot]] = []
        self._saved: dict[int, str] = {}
        self._discounts = torch.tensor([gamma, 0.0], device=device)
        self._powers = torch.tensor([gamma**k for k in range(n_step + 1)], device=device)
        self._steps = torch.arange(n_step, device=device) * num_envs

    def __len__(self) -> int:
        """Transitions held."""
        return (self._time - self._first) * self.layout.num_envs

    @property
    def count(self) -> int:
        """Transitions ever added."""
        return self._time * self.layout.num_envs

    @torch.no_grad()
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
        slot, stop = self._time % shape.size, self._time + steps
        ended = block.terminated | block.truncated
        if steps > 1 and not torch.equal(block.next_obs[:-1], block.obs[1:]):
            ended[:-1] |= differ(block.next_obs[:-1], block.obs[1:], 2)
        if len(self) and not torch.equal(self._obs[slot], block.obs[0]):
            self._cut(differ(self._obs[slot], block.obs[0], 1))
        first = max(self._first, stop - shape.capacity)
        link, ends = self._linked(ended, block.terminated)
        if ends:
            self._store(block.next_obs[ended], first if first < self._time else None)
        self._keep(self._time + 1 - shape.size, stop + 1 - shape.size)
        rows, head = slice(slot, slot + steps), stop % shape.size
        self._obs[rows] = block.obs
        self._action[rows] = block.action
        self._reward[rows] = block.reward
        self._link[rows] = link
        self._obs[head] = block.next_obs[-1]
        if self._tree is not None:
            self._tree.add(slot * shape.num_envs, (slot + steps) * shape.num_envs)
            self._tree.remove(head * shape.num_envs, (head + 1) * shape.num_envs)
        self._first, self._time = first, stop

    def _allocate(self) -> Tensor:
        shape, device = self.layout, self._device
        rows = torch.zeros((shape.size * shape.num_envs, shape.width), dtype=torch.uint8, device=device)
        self._ends = torch.zeros((FEWEST_ENDS, shape.obs_bytes), dtype=torch.uint8, device=device)
        self._tree = None if self.prioritised is None else SumTree(len(rows), device)
        by_time = rows.view(shape.size, shape.num_envs, shape.width)
        self._obs = field(by_time, 0, shape.obs_shape, shape.obs_dtype)
        self._action = field(by_time, shape.action_at, shape.action_shape, shape.action_dtype)
        self._reward = field(by_time, shape.reward_at, (), torch.float32)
        self._link = field(by_time, shape.link_at, (), torch.int32)
        self._rows = rows
        return rows

    def _linked(self, ended: Tensor, terminated: Tensor) -> tuple[Tensor, int]:
        """The links of new rows, int32 in the shape of `ended`, and the number of entries that they name."""
        count = int(ended.sum())
        if not count:
            return torch.full(ended.shape, -2 - 2 * (self._next_end % ENTRIES), device=ended.device).int(), 0
        one = ended.long()
        entry = (self._next_end + one.flatten().cumsum(0).view_as(one) - one) % ENTRIES
        return torch.where(ended, 2 * entry + terminated, -2 - 2 * entry).int(), count

    def _store(self, obs: Tensor, oldest: int | None) -> None:
        """Append obs [n, *obs] to the ends; `oldest` is the oldest time whose ends are still needed, None: none is."""
        need = self._next_end + len(obs)
        if need - self._first_end > len(self._ends):
            self._first_end = self._next_end if oldest is None else self._entry_before(oldest)
        if need - self._first_end > len(self._ends):
            self._grow(need - self._first_end)
        entries = torch.arange(self._next_end, need, device=self._device) % len(self._ends)
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
        ends = torch.zeros((length, self.layout.obs_bytes), dtype=torch.uint8, device=self._device)
        entries = torch.arange(self._first_end, self._next_end, device=self._device)
        ends[entries % length] = self._ends[entries % len(self._ends)]
        self._ends = ends

    def _cut(self, differs: Tensor) -> None:
        """End the newest rows of those envs [B] whose episode does not go on, if it had not ended already."""
        last = (self._time - 1) % self.layout.size
        link = self._link[last]
        if not (differs & (link < 0)).any():
            return
        # The entries of one time are consecutive: those that it has are stored anew.
        ended = differs | (link >= 0)
        slots = torch.arange(last * len(link), (last + 1) * len(link), device=self._device)
        successors = self._followers(slots, link)
        links, _ = self._linked(ended, (link & 1).bool())
        self._store(successors[ended], self._first)
        self._keep(self._time - 1, self._time)
        self._link[last] = links

    def _followers(self, slots: Tensor, link: Tensor) -> Tensor:
        """What the rows [N] with these links led to, [N, *obs]."""
        assert self._rows is not None
        shape = self.layout
        after = (slots + shape.num_envs).remainder_(len(self._rows))
        obs = field(self._rows.index_select(0, after), 0, shape.obs_shape, shape.obs_dtype)
        at = (link >= 0).nonzero().squeeze(1)
        if len(at):
            ends = self._ends.index_select(0, (link[at] >> 1) % len(self._ends))
            obs[at] = field(ends, 0, shape.obs_shape, shape.obs_dtype)
        return obs

    @torch.no_grad()
    def sample(self, batch_size: int, beta: float = 1.0) -> Batch:
        """`batch_size` transitions with replacement: uniformly, or by priority with the importance weights.

        By priority: one sample from each of N equal parts of the sum of all p_i (stratified), and the weights
        (len * p_i / sum)^-beta over their maximum; Schaul et al. 2016 (arXiv 1511.05952), section 3.4 and algorithm 1.
        """
        if not len(self):
            raise ValueError("an empty buffer has nothing to sample")
        if self._tree is None:
            size = self.layout.size * self.layout.num_envs
            index = torch.randint(len(self), (batch_size,), generator=self._generator, device=self._device)
            start = self._first % self.layout.size * self.layout.num_envs
            if start:
                index.add_(start).remainder_(size)
            weight = torch.ones(batch_size, device=self._device)
        else:
            u = torch.rand(batch_size, dtype=torch.float64, generator=self._generator, device=self._device)
            index, share = self._tree.find((u + torch.arange(batch_size, device=self._device)) / batch_size)
            weight = (len(self) * share) ** -beta
            weight = (weight / weight.max()).float()
        return self._batch(index, weight)

    def _batch(self, index: Tensor, weight: Tensor) -> Batch:
        assert self._rows is not None
        shape = self.layout
        rows = self._rows.index_select(0, index)
        obs = field(rows, 0, shape.obs_shape, shape.obs_dtype)
        action = field(rows, shape.action_at, shape.action_shape, shape.action_dtype)
        if not action.is_floating_point():
            action = action.long()
        if self.n_step == 1:
            reward = field(rows, shape.reward_at, (), torch.float32)
            link = field(rows, shape.link_at, (), torch.int32)
            discount = self._discounts.index_select(0, ended_by_termination(link))
            return Batch(obs, action, reward, self._followers(index, link), discount, weight, index)
        slots = (index.unsqueeze(1) + self._steps).remainder_(len(self._rows))  # [N, n]
        after = self._rows[:, shape.reward_at :].index_select(0, slots.flatten()).view(*slots.shape, -1)
        rewards = field(after, 0, (), torch.float32)
        links = field(after, 4, (), torch.int32)
        newest = (self._time - 1) % shape.size
        last = (links >= 0) | (slots.div(shape.num_envs, rounding_mode="floor") == newest)
        last[:, -1] = True
        taken = (last.cumsum(1) - last.long()) == 0  # up to and with the first that is the last
        reward = rewards.mul(self._powers[:-1]).masked_fill_(~taken, 0.0).sum(1)
        steps = taken.sum(1)
        at = (steps - 1).unsqueeze(1)
        slot, link = slots.gather(1, at).squeeze(1), links.gather(1, at).squeeze(1)
        discount = self._powers.index_select(0, steps).masked_fill_(ended_by_termination(link).bool(), 0.0)
        return Batch(obs, action, reward, self._followers(slot, link), discount, weight, index)

    @torch.no_grad()
    def update_priorities(self, index: Tensor, td_error: Tensor) -> None:
        """Give the transitions of the last sample, `index` [N], the priorities of their TD errors [N]."""
        if self._tree is None or self.prioritised is None:
            raise ValueError("a uniform buffer has no priorities")
        alpha, eps = self.prioritised
        self._tree.set(index, (td_error.detach().double().abs() + eps) ** alpha)

    # The state, and the snapshots that let a buffer go on after it was taken.

    def state_dict(self) -> dict[str, Any]:
        """The state as of now; its `rows` stay those of now whatever is added later, as long as the state is kept."""
        snapshot = Snapshot(self)
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

    @torch.no_grad()
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
            slots = torch.arange(first, first + len(block)).to(self._device) % shape.size
            memory.view(shape.size, -1)[slots] = block.flatten(1).to(self._device)
            link = field(block, shape.link_at, (), torch.int32)
            if first == told["first"]:
                self._first_end = self._entry_before(first)
                if self._next_end - self._first_end > len(self._ends):
                    self._grow(self._next_end - self._first_end)
            self._ends[(link[link >= 0] >> 1).to(self._device) % len(self._ends)] = ends.to(self._device)
        self._obs[self._time % shape.size] = state["head"].to(self._device)
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
                slots = torch.arange(start, end, device=self._device) % self.layout.size
                snapshot.kept.append((slots, snapshot.rows.view(self.layout.size, -1)[slots]))


def differ(a: Tensor, b: Tensor, lead: int) -> Tensor:
    """Which observations are not equal; the first `lead` dimensions tell them apart."""
    return (a != b).reshape(*a.shape[:lead], -1).any(-1)


def ended_by_termination(link: Tensor) -> Tensor:
    """1 where a row with this link terminated its episode, otherwise 0."""
    return link & 1  # the links of rows that do not end are even


@runtime_checkable
class Rows(Protocol):
    """Rows that are saved beside a state, in numbered segments; what `pgrl.checkpoint` asks of them, and gives back."""

    @property
    def info(self) -> dict[str, Any]:
        """What else it takes to load them."""

    @property
    def saved(self) -> dict[int, str]:
        """The checksums of final segments that have been saved."""

    def segments(self) -> dict[int, bool]:
        """The numbers of the segments, ascending, and whether each is final: the same in all later states."""

    def read(self, number: int) -> bytes:
        """A segment: first time and the time after its last (int64), the rows, the ends that they name in order."""


class Snapshot:
    """The rows that a buffer held at one moment, while the buffer goes on.

    The buffer copies what it overwrites, so that a snapshot costs what is overwritten while it is kept.
    """

    def __init__(self, buffer: ReplayBuffer) -> None:
        self.layout, self.rows, self.ends = buffer.layout, buffer._rows, buffer._ends
        self.first, self.time, self.next_end = buffer._first, buffer._time, buffer._next_end
        self.saved = buffer._saved  # the buffer's own, so that the next snapshot knows it too
        self.kept: list[tuple[Tensor, Tensor]] = []  # slots of times [n], and what was there, [n, B * width]
        self.kept_ends: list[tuple[Tensor, Tensor]] = []  # slots of ends [n], and what was there, [n, obs_bytes]

    @property
    def info(self) -> dict[str, Any]:
        """The first time, the next entry, and what tells whether a buffer fits."""
        now = {"first": self.first, "time": self.time, "next_end": self.next_end}
        return {**now, "segment": self.layout.segment, **fit(self.layout)}

    def segments(self) -> dict[int, bool]:
        """All but the last are final, or all but the last two: the newest row may still be cut."""
        length = self.layout.segment
        if self.rows is None or self.first == self.time:
            return {}
        numbers = range(self.first // length, -(-self.time // length))
        return {number: (number + 1) * length < self.time for number in numbers}

    def read(self, number: int) -> bytes:
        """The rows of a segment that were held."""
        assert self.rows is not None
        shape = self.layout
        first = max(self.first, number * shape.segment)
        stop = min(self.time, (number + 1) * shape.segment)
        block = as_it_was(self.rows.view(shape.size, -1), torch.arange(first, stop) % shape.size, self.kept)
        link = field(block.view(-1, shape.width), shape.link_at, (), torch.int32)
        ends = as_it_was(self.ends, (link[link >= 0] >> 1) % len(self.ends), self.kept_ends)
        return struct.pack("<qq", first, stop) + block.numpy().tobytes() + ends.numpy().tobytes()

    def __deepcopy__(self, _: object) -> Copied:
        return Copied(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and same(self, other)

    __hash__ = None  # type: ignore[assignment]


class Copied:
    """A copy of rows that shares nothing with a buffer."""

    def __init__(self, rows: Rows) -> None:
        self.info, self.saved, self._final = rows.info, dict(rows.saved), rows.segments()
        self._data = {number: rows.read(number) for number in self._final}

    def segments(self) -> dict[int, bool]:
        """Those of the original."""
        return self._final

    def read(self, number: int) -> bytes:
        """The same bytes."""
        return self._data[number]


def as_it_was(memory: Tensor, slots: Tensor, kept: list[tuple[Tensor, Tensor]]) -> Tensor:
    """`memory` [size, width] at `slots` [n] before what was there was `kept`: [n, width] in host memory."""
    block = memory.index_select(0, slots.to(memory.device)).cpu()
    place = {slot: i for i, slot in enumerate(slots.tolist())}
    for changed, before in reversed(kept):  # of many changes the first tells what was there
        for i, slot in enumerate(changed.tolist()):
            if slot in place:
                block[place[slot]] = before[i]
    return block


def fit(shape: Layout) -> dict[str, int]:
    """What must be the same for one buffer to load the rows of another."""
    keys = ("capacity", "num_envs", "width", "obs_bytes")
    return {key: getattr(shape, key) for key in keys}


def held(rows: Rows) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Segment by segment: its first time that is held, the rows [times, B, width], and their ends [n, obs_bytes].

    ValueError where the bytes are not those of such rows.
    """
    told = rows.info
    capacity, num_envs, width, obs_bytes = (told[key] for key in ("capacity", "num_envs", "width", "obs_bytes"))
    time = told["first"]
    for number in rows.segments():
        data = bytearray(rows.read(number))
        first, stop = struct.unpack_from("<qq", data)
        size = 16 + (stop - first) * num_envs * width
        if not first <= time < stop <= told["time"] or stop - first > capacity or len(data) < size:
            raise ValueError(f"segment {number} holds the times {first} to {stop}, where {time} was expected")
        every = torch.frombuffer(data, dtype=torch.uint8)
        block, ends = every[16:size].view(-1, num_envs, width), every[size:]
        named = field(block, width - 4, (), torch.int32) >= 0
        if len(ends) != int(named.sum()) * obs_bytes:
            raise ValueError(f"segment {number} has {len(data):,} bytes, which is not what its rows say")
        skipped = int(named[: time - first].sum())  # of times that were overwritten before the state was taken
        yield time, block[time - first :], ends.view(-1, obs_bytes)[skipped:]
        time = stop
    if time != told["time"]:
        raise ValueError(f"the rows from time {time} on are missing")


def same(a: Rows, b: Rows) -> bool:
    """Whether two states have the same rows, however they are kept."""
    if a.info != b.info:
        return False
    pairs = zip(held(a), held(b), strict=True)
    return all(x[0] == y[0] and torch.equal(x[1], y[1]) and torch.equal(x[2], y[2]) for x, y in pairs)


def tree_sizes(leaves: int) -> list[int]:
    """The nodes of each level of a sum tree from the leaves up to a single family."""
    sizes = [-(-leaves // FAN) * FAN]
    while sizes[-1] > FAN:
        sizes.append(-(-sizes[-1] // FAN**2) * FAN)
    return sizes


class SumTree:
    """Priorities as the leaves of a tree of sums with FAN children a node; a leaf of 0 is never found.

    Every sum is computed anew from its children, so that no rounding accumulates.
    """

    def __init__(self, leaves: int, device: torch.device) -> None:
        sizes = tree_sizes(leaves)
        self.nodes = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        self.levels = self.nodes.split(sizes)  # from the leaves up
        self.highest = torch.ones((), dtype=torch.float64, device=device)  # priority so far, for what is new

    def add(self, first: int, stop: int) -> None:
        """Give the leaves first .. stop - 1 the highest priority that any had."""
        self.levels[0][first:stop] = self.highest
        self._sum(torch.arange(first, stop, device=self.nodes.device))

    def remove(self, first: int, stop: int) -> None:
        """Empty the leaves first .. stop - 1."""
        self.levels[0][first:stop] = 0.0
        self._sum(torch.arange(first, stop, device=self.nodes.device))

    def set(self, index: Tensor, priority: Tensor) -> None:
        """Change the leaves `index` [N], but for empty ones; of several priorities of one leaf the highest counts."""
        leaves = self.levels[0]
        priority = priority.masked_fill(leaves[index] == 0, 0.0)
        leaves.scatter_reduce_(0, index, priority, "amax", include_self=False)
        torch.maximum(self.highest, priority.max(), out=self.highest)
        self._sum(index)

    def _sum(self, index: Tensor) -> None:
        for below, above in zip(self.levels[:-1], self.levels[1:], strict=True):
            index = index.div(FAN, rounding_mode="floor")
            above[index] = below.view(-1, FAN)[index].sum(1)

    def find(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The leaves that the shares u [N] in [0, 1) of the sum fall on, and the share of the sum that each has."""
        total = self.levels[-1].sum()
        u, index = u * total, torch.zeros_like(u, dtype=torch.int64)
        for level in reversed(self.levels):
            sums = level.view(-1, FAN)[index].cumsum(1)
            u = torch.minimum(u, sums[:, -1] * (1 - 2**-50))  # below the last sum: rounding must not find an empty leaf
            child = (sums <= u.unsqueeze(1)).sum(1, keepdim=True)
            before = sums.gather(1, (child - 1).clamp_(min=0)).masked_fill_(child == 0, 0.0)
            u = u - before.squeeze(1)
            index = FAN * index + child.squeeze(1)
        return index, self.levels[0][index] / total

    def state_dict(self) -> dict[str, Any]:
        """All sums: not computed anew, they are the same to the last bit."""
        return {"nodes": self.nodes, "highest": self.highest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore, in place."""
        self.nodes.copy_(state["nodes"])
        self.highest.copy_(state["highest"])
