"""Which pass of a step a call is: by its name, by what it is conditioned on, and, of tiles, by its latent."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter

import numpy as np

from duca_compile.core.tensors import Array, TensorVersions, equal, on_host, same_values, unchanged, version

SAMPLED = 4096  # values of a latent that are compared where two are held against each other
NEAR = 0.25  # what one rounded timestep changes of a latent is less, relatively
APART = 0.9  # latents of one tile are nearer to each other than to those of others: by distance, at least so much
PassKey = tuple[str | None, int]  # the pass's name, and which call of that name at the step


class Named:
    """The tensors of one call, but the timestep: its latent, and what it is conditioned on."""

    __slots__ = ("inputs", "kind", "latent", "name", "others")

    def __init__(
        self, name: str | None, kind: object, latent: Array, inputs: tuple[str, ...], others: Sequence[Array]
    ) -> None:
        self.name, self.kind = name, kind  # of its pass; of its options and shapes
        self.latent = latent  # what it denoises
        self.inputs, self.others = inputs, others  # what it is conditioned on

    def only(self, inputs: Collection[str]) -> Named:
        """With these inputs and no others."""
        pairs = [(name, each) for name, each in zip(self.inputs, self.others, strict=True) if name in inputs]
        return Named(self.name, self.kind, self.latent, tuple(name for name, _ in pairs), [each for _, each in pairs])


def chosen(names: tuple[str, ...]) -> Callable[[Mapping[str, Array]], Sequence[Array]]:
    """What gives the tensors of these names; asked at every call."""
    return itemgetter(*names) if len(names) > 1 else lambda call: [call[name] for name in names]


class Sample:
    """Some values of a latent as it was; read when they are first compared."""

    def __init__(self, latent: Array) -> None:
        flat = latent.reshape(-1)[:: max(1, latent.nbytes // latent.itemsize // SAMPLED)]
        self._kept: Array = flat.copy() if isinstance(flat, np.ndarray) else flat.detach().clone()
        self._values: np.ndarray | None = None

    @property
    def values(self) -> np.ndarray:
        if self._values is None:
            kept = self._kept
            array = kept if isinstance(kept, np.ndarray) else kept.float().cpu().numpy()
            self._values = array.astype(np.float32)
        return self._values

    def distance(self, other: Sample) -> float:
        """The norm of the difference; infinite where the sizes are different."""
        one, two = self.values, other.values
        return float(np.linalg.norm(one - two)) if one.shape == two.shape else float("inf")

    def is_near(self, other: Sample) -> bool:
        return self.distance(other) <= NEAR * float(np.linalg.norm(other.values))

    def is_apart(self, other: Sample) -> bool:
        """Whether they have nothing in common, as the noise of two tiles has not."""
        together = float(np.hypot(np.linalg.norm(self.values), np.linalg.norm(other.values)))
        return self.distance(other) > APART * together


class Slot:
    """One pass of a loop, as it was when last called; holds what it was called with, so that identities last."""

    def __init__(self, index: int, place: int, call: Named) -> None:
        self.name, self.index, self.place = call.name, index, place  # ``place`` among all calls of the first step
        self.step = -1
        self.sample: Sample | None = None
        self.former: list[Slot] = []  # the passes that its first call might have been of
        self._condition(call)

    def _condition(self, call: Named) -> None:
        self.kind, self._inputs, self.sight = call.kind, call.inputs, TensorVersions.of(call.others)
        self._met = call  # the last call that was found to be as this

    def called(self, step: int, call: Named, samples: bool) -> None:
        """Notes its call at ``step``; with ``samples``, so that its latent can be held against others later."""
        self.at(step, call.latent)
        if samples:
            self.sample = Sample(call.latent)
        if self._met is not call and not self.is_as(call):
            self._condition(call)

    def at(self, step: int, latent: Array) -> None:
        self.step, self._latent, self._version = step, latent, version(latent)
        self.sample = None

    def is_as(self, call: Named) -> bool:
        """Whether it is conditioned on these very objects, as they were; asked at every call."""
        if self._met is not call:
            if call.kind is not self.kind or not self.sight.matches(call.others):
                return False
            self._met = call
        return True

    def is_alike(self, call: Named) -> bool:
        """Whether the two are of one kind: with the same options and shapes."""
        return call.kind is self.kind and all(now.shape == known.shape for _, now, (known, _) in self._common(call))

    def is_for(self, call: Named) -> bool:
        """The same by value."""
        return call.kind is self.kind and not self.changes(call, reads=True)

    def likeness(self, call: Named) -> int:
        """How many of the objects that it is conditioned on are these; its kind is one more."""
        return (call.kind is self.kind) + sum(unchanged(now, *known) for _, now, known in self._common(call))

    def changes(self, call: Named, reads: bool) -> set[str]:
        """The inputs that hold something else. What is on an accelerator is read only where ``reads`` says so."""
        return {name for name, now, known in self._common(call) if _differs(now, *known, reads)}

    def _common(self, call: Named) -> Iterator[tuple[str, Array, tuple[Array, int]]]:
        """The inputs that both have: now, and as they were with their versions."""
        known = dict(zip(self._inputs, zip(self.sight.tensors, self.sight.versions, strict=True), strict=True))
        return ((name, now, known[name]) for name, now in zip(call.inputs, call.others, strict=True) if name in known)

    def differs_in(self, other: Slot) -> set[str]:
        """The names of the inputs that are other objects there."""
        theirs = dict(zip(other._inputs, other.sight.tensors, strict=True))
        return {
            name for name, mine in zip(self._inputs, self.sight.tensors, strict=True) if theirs.get(name) is not mine
        }

    def has(self, latent: Array) -> bool:
        """Whether its last call had this latent, by value."""
        known, at_version = self._latent, self._version
        if latent is known and version(latent) == at_version >= 0:
            return True
        if self.sample is not None and self.sample.distance(Sample(latent)) > 0:
            return False
        if latent is known:  # written over: with the same, as far as a sample of it says, or unknown
            return self.sample is not None or at_version < 0
        return version(known) == at_version and same_values(latent, known)

    def sampled(self) -> Sample | None:
        """Of its latent; None where that is lost."""
        if self.sample is None and version(self._latent) == self._version:
            self.sample = Sample(self._latent)
        return self.sample

    def goes_on_with(self, latent: Array) -> bool:
        """Whether this is its latent one small step on: near it, or written over it."""
        mine = self.sampled()
        return latent is self._latent if mine is None else Sample(latent).is_near(mine)

    def is_apart_from(self, latent: Array) -> bool:
        mine = self.sampled()
        return mine is not None and Sample(latent).is_apart(mine)


class Slots:
    """The passes of one loop, in the order of their first calls."""

    def __init__(self) -> None:
        self.all: list[Slot] = []
        self._named: dict[str | None, list[Slot]] = {}
        self.tiled = False  # whether passes are told by their latents

    def clear(self) -> None:
        self.all.clear()
        self._named.clear()
        self.tiled = False

    def of(self, name: str | None) -> Sequence[Slot]:
        return self._named.get(name, ())

    def get(self, key: PassKey) -> Slot | None:
        slots = self._named.get(key[0], ())
        return slots[key[1]] if key[1] < len(slots) else None

    def add(self, call: Named) -> Slot:
        slots = self._named.setdefault(call.name, [])
        slot = Slot(len(slots), len(self.all), call)
        slots.append(slot)
        self.all.append(slot)
        return slot

    def put(self, slots: Iterable[Slot]) -> None:
        """These are all from now on."""
        self.all = list(slots)
        self._named = {}
        for place, slot in enumerate(self.all):
            named = self._named.setdefault(slot.name, [])
            slot.place, slot.index = place, len(named)
            named.append(slot)

    def find(self, call: Named, step: int, reads: bool) -> Slot | None:
        """The pass that a call at ``step`` is, by all that tells; it may have been called at that step already.

        None where there is no pass of its name, or, of tiles, none with a latent like it. Objects count first; where
        they do not tell the passes apart, values are compared, on an accelerator only if ``reads`` says so. Of equals,
        it is the first that is still to come.
        """
        slots = self.of(call.name)
        if len(slots) < 2:
            return slots[0] if slots else None
        if not self.tiled:
            coming = _coming(slots, step)
            if coming.step != step and coming.is_as(call):
                return coming
        alike = _best(slots, [slot.likeness(call) for slot in slots])
        telling = {name for slot in alike[1:] for name in alike[0].differs_in(slot)}
        if telling:
            alike = _best(alike, [-len(slot.changes(call.only(telling), reads)) for slot in alike])
        return self._nearest(alike, call.latent, step) if self.tiled else _coming(alike, step)

    def _nearest(self, slots: Sequence[Slot], latent: Array, step: int) -> Slot | None:
        """By latent, if any is like it; one that was called at the step already only if it is much nearer."""
        now = Sample(latent)

        def far(slot: Slot) -> float:
            then = slot.sampled()
            weight = APART if slot.step != step else 1.0
            return float("inf") if then is None else weight * then.distance(now)

        found = min(slots, key=far)
        return None if found.step != step and found.is_apart_from(latent) else found


def _differs(tensor: Array, known: Array, at_version: int, reads: bool) -> bool:
    if unchanged(tensor, known, at_version):
        return False
    if not reads and not on_host(tensor) and tensor is not known:
        return False
    return not equal(tensor, known, at_version)


def _best(slots: Sequence[Slot], scores: Sequence[int]) -> list[Slot]:
    most = max(scores)
    return [slot for slot, score in zip(slots, scores, strict=True) if score == most]


def _coming(slots: Sequence[Slot], step: int) -> Slot:
    """The first that was not called at the step yet, of those that were called last."""
    for slot in slots:
        if slot.step == step - 1:  # as most often
            return slot
    return max(slots, key=lambda slot: -1 if slot.step == step else slot.step)
