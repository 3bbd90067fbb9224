"""What one guidance pass of one request carries from step to step: caches, hoisted values and what was decided."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from duca_compile.core.ports import Port, dead_caches
from duca_compile.core.steps import CacheKinds
from duca_compile.core.tensors import Array, TensorVersions
from duca_compile.runtime.adaptive import Decisions
from duca_compile.runtime.arrays import size
from duca_compile.runtime.forecast_state import ForecastState
from duca_compile.runtime.selection import TokenSelector

StepInputs = dict[Any, Array]  # the values of one step: the tensors of the call by name, all others by port


class Reader(Protocol):
    """The inputs of a program, which is identified by its object."""

    inputs: tuple[Port, ...]
    caches: frozenset[Port]  # the inputs that are caches
    reads: frozenset[Port]  # the caches that must exist


class Gathered(NamedTuple):
    """The inputs of one program that stay the same from step to step.

    Attributes:
        values: one for each input, in order; None for those that a call gives.
        missing: index and key of each input that is None.
        complete: whether all caches that must exist do.
    """

    values: list[Array | None]
    missing: tuple[tuple[int, Port | str], ...]
    complete: bool


@dataclass
class CacheState:
    """What one guidance pass of one request carries from step to step; dropped when the next request starts.

    Attributes:
        caches: by port.
        last_step: the last step of this pass; -1 before the first.
        gathered: the inputs of each program that has run, until one of them changes.
        hoisted: the loop-invariant values, by port.
        hoisted_from: the tensors that they were computed from.
        condition: what the pass was conditioned on when they were last found valid.
        timestep_rows: the precomputed timestep-only values, by timestep.
        timesteps_precomputed: whether precomputing them was tried.
        selector: chooses the tokens of partial steps.
        forecasts: what forecasts start from: one entry, or one for each batch row where rows decide for themselves.
        decisions: of an adaptive policy.
        measured: what the variants of this step measured, by port.
        live: the kinds of caches that were kept after the last step.
    """

    caches: dict[Port, Array] = field(default_factory=dict)
    last_step: int = -1
    gathered: dict[Reader, Gathered] = field(default_factory=dict)
    hoisted: dict[Port, Array] = field(default_factory=dict)
    hoisted_from: TensorVersions | None = None
    condition: TensorVersions | None = None
    timestep_rows: Mapping[float, Sequence[Array]] = field(default_factory=dict)
    timesteps_precomputed: bool = False
    selector: TokenSelector | None = None
    forecasts: tuple[ForecastState, ...] = ()
    decisions: Decisions | None = None
    measured: dict[Port, Array] = field(default_factory=dict)
    live: CacheKinds = CacheKinds.ALL
    _most: tuple[int, int] = (0, 0)  # the largest number of caches so far, and their bytes

    def store(self, values: Mapping[Port, Array]) -> None:
        """Stores caches by port. A cache that was written in place is the same object, and changes nothing."""
        caches = self.caches
        new = [port for port, value in values.items() if caches.get(port) is not value]
        if new:
            caches.update(values)
            self._forget_gathered(new)

    def drop(self, ports: Collection[Port]) -> None:
        """Drops those of these caches that exist."""
        for port in ports:
            self.caches.pop(port, None)
        self._forget_gathered(ports)

    def _forget_gathered(self, ports: Collection[Port]) -> None:
        for reader in [reader for reader in self.gathered if not reader.caches.isdisjoint(ports)]:
            del self.gathered[reader]

    def hoist(self, values: dict[Port, Array], sources: TensorVersions) -> None:
        """Stores the loop-invariant values of a call. Timestep-only values may depend on them, so they are dropped."""
        self.hoisted, self.hoisted_from = values, sources
        self.timestep_rows, self.timesteps_precomputed = {}, False
        self.gathered.clear()

    def gather(self, reader: Reader) -> Gathered:
        """The caches and hoisted values that a program reads, looked up once until one of them changes."""
        gathered = self.gathered.get(reader)
        if gathered is None:
            values = [*map({**self.hoisted, **self.caches}.get, reader.inputs)]
            missing = tuple([(i, reader.inputs[i].key) for i, value in enumerate(values) if value is None])
            complete = reader.reads.isdisjoint(key for _, key in missing)
            gathered = self.gathered[reader] = Gathered(values, missing, complete)
        return gathered

    def inputs(self, reader: Reader, given: StepInputs) -> list[Array]:
        """All inputs of a program, in order; ``given`` holds those that are neither caches nor hoisted."""
        gathered = self.gathered.get(reader) or self.gather(reader)
        values = gathered.values.copy()
        for i, key in gathered.missing:
            values[i] = given[key]
        return values

    @property
    def most_bytes(self) -> int:
        """The most bytes that the caches have held, with the token scores."""
        if len(self.caches) >= self._most[0]:
            self._most = len(self.caches), sum(map(size, self.caches.values()))
        return self._most[1] + (0 if self.selector is None else self.selector.bytes)

    def end(self) -> None:
        """Drops everything that decisions keep, after the last step. Another step would start afresh."""
        self.keep(CacheKinds.NOTHING)
        self.decisions, self.forecasts = None, ()

    def keep(self, live: CacheKinds) -> None:
        """Drops the caches of all other kinds."""
        self.live = live
        if live is CacheKinds.ALL:
            return
        if len(self.caches) > self._most[0]:
            self.most_bytes  # noqa: B018 - records it
        if live is CacheKinds.NOTHING:
            self.caches.clear()
            self.gathered = {reader: gathered for reader, gathered in self.gathered.items() if not reader.caches}
        else:
            self.drop(dead_caches(live, self.caches))
