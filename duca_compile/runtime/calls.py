"""Finds the guidance pass that a call belongs to: by its name, its conditions and, for tiles, its latent."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter

import numpy as np

from duca_compile.core.tensors import Array, TensorVersions, equal, on_host, same_values, unchanged, version

SAMPLED = 4096  # values of a latent that a sample holds
NEAR = 0.25  # the relative change of a latent over one rounded timestep is smaller than this
UNRELATED = 0.9  # latents of one tile are closer to each other than to others: the ratio of distances is below this
PassKey = tuple[str | None, int]  # the name of a pass, and which call of that name at the step


class CallInputs:
    """The tensors of one call but the timestep: its latent, and what it is conditioned on.

    Attributes:
        name: the name of its pass, if the caller gave one.
        kind: an object that stands for its options and shapes.
        latent: what the call denoises.
        names: the inputs that it is conditioned on.
        conditions: their tensors.
    """

    __slots__ = ("conditions", "kind", "latent", "name", "names")

    def __init__(
        self, name: str | None, kind: object, latent: Array, names: tuple[str, ...], conditions: Sequence[Array]
    ) -> None:
        self.name, self.kind = name, kind
        self.latent = latent
        self.names, self.conditions = names, conditions

    def only(self, names: Collection[str]) -> CallInputs:
        """The same call, conditioned on these inputs alone."""
        pairs = [(name, tensor) for name, tensor in zip(self.names, self.conditions, strict=True) if name in names]
        kept = tuple(name for name, _ in pairs)
        return CallInputs(self.name, self.kind, self.latent, kept, [tensor for _, tensor in pairs])


def tensor_getter(names: tuple[str, ...]) -> Callable[[Mapping[str, Array]], Sequence[Array]]:
    """A function that returns the tensors of these names. It runs at every call."""
    return itemgetter(*names) if len(names) > 1 else lambda call: [call[name] for name in names]


class LatentSample:
    """A copy of some values of a latent; read from the device when they are first compared."""

    def __init__(self, latent: Array) -> None:
        flat = latent.reshape(-1)[:: max(1, latent.nbytes // latent.itemsize // SAMPLED)]
        self._copy: Array = flat.copy() if isinstance(flat, np.ndarray) else flat.detach().clone()
        self._values: np.ndarray | None = None

    @property
    def values(self) -> np.ndarray:
        if self._values is None:
            copy = self._copy
            array = copy if isinstance(copy, np.ndarray) else copy.float().cpu().numpy()
            self._values = array.astype(np.float32)
        return self._values

    def distance(self, other: LatentSample) -> float:
        """The norm of the difference; infinite if the sizes differ."""
        one, two = self.values, other.values
        return float(np.linalg.norm(one - two)) if one.shape == two.shape else float("inf")

    def is_near(self, other: LatentSample) -> bool:
        """Whether it may be the other latent, or the same one a small step later."""
        return self.distance(other) <= NEAR * float(np.linalg.norm(other.values))

    def is_unrelated_to(self, other: LatentSample) -> bool:
        """Whether the two have nothing in common, like the noise of two tiles."""
        together = float(np.hypot(np.linalg.norm(self.values), np.linalg.norm(other.values)))
        return self.distance(other) > UNRELATED * together


class GuidancePass:
    """One pass of a loop, as of its last call; keeps what that call was given, so that identities stay unique.

    Attributes:
        name: the name that the caller gave it.
        index: its number among the passes of that name.
        place: its number among all passes of the first step.
        kind: an object that stands for its options and shapes.
        conditions: the tensors that it is conditioned on.
        step: the step of its last call.
        sample: of the latent of its last call, where one was taken.
        candidates: the passes that its first call might have belonged to.
    """

    def __init__(self, index: int, place: int, call: CallInputs) -> None:
        self.name, self.index, self.place = call.name, index, place
        self.step = -1
        self.sample: LatentSample | None = None
        self.candidates: list[GuidancePass] = []
        self._set_conditions(call)

    def _set_conditions(self, call: CallInputs) -> None:
        self.kind, self._names, self.conditions = call.kind, call.names, TensorVersions.of(call.conditions)
        self._matched = call  # the last call with these very objects

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of the latent of its last call."""
        return tuple(map(int, self._latent.shape))

    def record(self, step: int, call: CallInputs, samples: bool) -> None:
        """Records its call at ``step``; with ``samples``, its latent can be compared with others later."""
        self.move_to(step, call.latent)
        if samples:
            self.sample = LatentSample(call.latent)
        if self._matched is not call and not self.has_same_objects(call):
            self._set_conditions(call)

    def move_to(self, step: int, latent: Array) -> None:
        """Records a call at ``step`` under the same conditions."""
        self.step, self._latent, self._version = step, latent, version(latent)
        self.sample = None

    def has_same_objects(self, call: CallInputs) -> bool:
        """Whether a call has the same kind and the same, unchanged condition objects; runs at every call."""
        if self._matched is not call:
            if call.kind is not self.kind or not self.conditions.matches(call.conditions):
                return False
            self._matched = call
        return True

    def has_same_kind(self, call: CallInputs) -> bool:
        """Whether a call has the same options and shapes."""
        return call.kind is self.kind and all(now.shape == known.shape for _, now, (known, _) in self._shared(call))

    def has_same_values(self, call: CallInputs) -> bool:
        """Whether a call has the same kind and the same values of all conditions."""
        return call.kind is self.kind and not self.changed_inputs(call, reads=True)

    def count_same(self, call: CallInputs) -> int:
        """How many of a call's conditions are the same, unchanged objects, plus one if the kind is the same."""
        return (call.kind is self.kind) + sum(unchanged(now, *known) for _, now, known in self._shared(call))

    def changed_inputs(self, call: CallInputs, reads: bool) -> set[str]:
        """The conditions that have other values in a call; tensors on an accelerator are compared only if ``reads``."""
        return {name for name, now, known in self._shared(call) if _differs(now, *known, reads)}

    def _shared(self, call: CallInputs) -> Iterator[tuple[str, Array, tuple[Array, int]]]:
        """The conditions that both have: the call's tensor, and this pass's tensor with its version."""
        known = dict(zip(self._names, zip(self.conditions.tensors, self.conditions.versions, strict=True), strict=True))
        return (
            (name, now, known[name]) for name, now in zip(call.names, call.conditions, strict=True) if name in known
        )

    def differing_inputs(self, other: GuidancePass) -> set[str]:
        """The names of the conditions that are other objects in another pass."""
        others = dict(zip(other._names, other.conditions.tensors, strict=True))
        pairs = zip(self._names, self.conditions.tensors, strict=True)
        return {name for name, tensor in pairs if others.get(name) is not tensor}

    def has_latent(self, latent: Array) -> bool:
        """Whether its last call had this latent, by value."""
        known, at_version = self._latent, self._version
        if latent is known and version(latent) == at_version >= 0:
            return True
        if self.sample is not None and self.sample.distance(LatentSample(latent)) > 0:
            return False
        if latent is known:  # written in place: the same as far as the sample goes, or unknown
            return self.sample is not None or at_version < 0
        return version(known) == at_version and same_values(latent, known)

    def latent_sample(self) -> LatentSample | None:
        """A sample of its latent; None if the latent was overwritten."""
        if self.sample is None and version(self._latent) == self._version:
            self.sample = LatentSample(self._latent)
        return self.sample

    def may_continue_with(self, latent: Array) -> bool:
        """Whether this may be its latent a small step later: close to it, or the same tensor overwritten."""
        sample = self.latent_sample()
        return latent is self._latent if sample is None else LatentSample(latent).is_near(sample)

    def is_unrelated_to(self, latent: Array) -> bool:
        """Whether this latent has nothing in common with its own."""
        sample = self.latent_sample()
        return sample is not None and LatentSample(latent).is_unrelated_to(sample)


class GuidancePasses:
    """The passes of one loop, in the order of their first calls.

    Attributes:
        all: the passes.
        tiled: whether passes are told apart by their latents.
    """

    def __init__(self) -> None:
        self.all: list[GuidancePass] = []
        self._by_name: dict[str | None, list[GuidancePass]] = {}
        self.tiled = False

    def clear(self) -> None:
        self.all.clear()
        self._by_name.clear()
        self.tiled = False

    def of(self, name: str | None) -> Sequence[GuidancePass]:
        """The passes called ``name``."""
        return self._by_name.get(name, ())

    def get(self, key: PassKey) -> GuidancePass | None:
        passes = self._by_name.get(key[0], ())
        return passes[key[1]] if key[1] < len(passes) else None

    def add(self, call: CallInputs) -> GuidancePass:
        """A new pass that starts with this call."""
        passes = self._by_name.setdefault(call.name, [])
        pass_ = GuidancePass(len(passes), len(self.all), call)
        passes.append(pass_)
        self.all.append(pass_)
        return pass_

    def put(self, passes: Iterable[GuidancePass]) -> None:
        """Replaces all passes by these, and renumbers them."""
        self.all = list(passes)
        self._by_name = {}
        for place, pass_ in enumerate(self.all):
            named = self._by_name.setdefault(pass_.name, [])
            pass_.place, pass_.index = place, len(named)
            named.append(pass_)

    def find(self, call: CallInputs, step: int, reads: bool) -> GuidancePass | None:
        """The pass that best matches a call at ``step``; it may have been called at that step already.

        The same objects count first. Where they do not tell the passes apart, values are compared: on an accelerator
        only if ``reads``. Among equals, the first pass that was not called at this step yet is taken.

        Returns:
            The pass; None if there is none of its name or, among tiles, none with a similar latent.
        """
        passes = self.of(call.name)
        if len(passes) < 2:
            return passes[0] if passes else None
        if not self.tiled:
            expected = _expected(passes, step)
            if expected.step != step and expected.has_same_objects(call):
                return expected
        similar = _highest(passes, [pass_.count_same(call) for pass_ in passes])
        telling = {name for pass_ in similar[1:] for name in similar[0].differing_inputs(pass_)}
        if telling:
            similar = _highest(similar, [-len(pass_.changed_inputs(call.only(telling), reads)) for pass_ in similar])
        return self._nearest(similar, call.latent, step) if self.tiled else _expected(similar, step)

    def _nearest(self, passes: Sequence[GuidancePass], latent: Array, step: int) -> GuidancePass | None:
        """The pass with the closest latent, if it is similar; one called at this step already must be much closer."""
        now = LatentSample(latent)

        def distance(pass_: GuidancePass) -> float:
            then = pass_.latent_sample()
            weight = UNRELATED if pass_.step != step else 1.0
            return float("inf") if then is None else weight * then.distance(now)

        nearest = min(passes, key=distance)
        return None if nearest.step != step and nearest.is_unrelated_to(latent) else nearest


def _differs(tensor: Array, known: Array, at_version: int, reads: bool) -> bool:
    if unchanged(tensor, known, at_version):
        return False
    if not reads and not on_host(tensor) and tensor is not known:
        return False
    return not equal(tensor, known, at_version)


def _highest(passes: Sequence[GuidancePass], scores: Sequence[int]) -> list[GuidancePass]:
    most = max(scores)
    return [pass_ for pass_, score in zip(passes, scores, strict=True) if score == most]


def _expected(passes: Sequence[GuidancePass], step: int) -> GuidancePass:
    """The first pass that was not called at this step yet, among those that were called last."""
    for pass_ in passes:
        if pass_.step == step - 1:  # the usual case
            return pass_
    return max(passes, key=lambda pass_: -1 if pass_.step == step else pass_.step)
