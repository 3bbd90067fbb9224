"""The common base of ToCa and DuCa: full steps at intervals, and how many tokens partial steps recompute."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from duca_compile.core.steps import Step, StepKind
from duca_compile.errors import InternalError, PolicyError
from duca_compile.policies.base import Policy, Selection, SelectionKind, Series, TokenQuery
from duca_compile.policies.checks import check_number
from duca_compile.policies.schedule import UNIT, Interval, Linear, Moment, intervals

_POINTWISE = ("mlp", "cross_attention")


@dataclass(frozen=True)
class TokenCaching(Policy):
    """A policy with partial steps; subclasses say what runs between two full steps.

    Attributes:
        interval: number of steps from one full step to the next; an int, or an ``Interval`` that varies along the loop.
        fresh_ratio: share of the MLP tokens that a partial step recomputes, in [0, 1], before the factors below.
        selection: how those tokens are chosen: a kind such as "random", or a ``Selection``.
        step_factor: multiplies the ratio; a line over the progress of the loop.
        block_factor: multiplies the ratio; a line from the first block (0) to the last (1).
        kind_factor: multiplies the ratio, for each kind of branch ("mlp", "cross_attention"); other kinds are reused.
        text_factor: multiplies the ratio in the text stream of joint-attention models; 0 reuses it.
        latched: whether a step's kind is fixed before it runs. False is the released code: where a full step changes
            the interval so that it no longer counts as full, only its first block runs in full.

    Raises:
        PolicyError: an invalid parameter.
    """

    staleness: ClassVar[float] = 0.0  # of a selection given by its name

    interval: int | Interval = 5
    fresh_ratio: float = 0.1
    selection: SelectionKind | Selection = "random"  # type: ignore[assignment]
    step_factor: Linear = UNIT
    block_factor: Linear = UNIT
    kind_factor: Mapping[str, float] = field(default_factory=lambda: {"mlp": 1.0})
    text_factor: float = 0.0
    latched: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.interval, Interval):
            object.__setattr__(self, "interval", Interval(self.interval))
        if not isinstance(self.selection, Selection):
            object.__setattr__(self, "selection", Selection(self.selection, self.staleness))
        check_number("fresh_ratio", self.fresh_ratio, least=0, most=1)
        for name, line in (("step_factor", self.step_factor), ("block_factor", self.block_factor)):
            if not isinstance(line, Linear):
                raise PolicyError(f"{name}={line!r} is not a line; write Linear(start, slope)")
        for kind, factor in self.kind_factor.items():
            if kind not in _POINTWISE:
                raise PolicyError(f"kind_factor names {kind!r}; only {_POINTWISE} can be recomputed in part")
            check_number(f"kind_factor[{kind!r}]", factor, least=0)
        check_number("text_factor", self.text_factor, least=0)

    @classmethod
    def settings(cls, steps: int) -> tuple[Series, ...]:
        return (tuple(cls(interval) for interval in intervals(steps)),)

    @property
    def _interval(self) -> Interval:
        if not isinstance(self.interval, Interval):
            raise InternalError("interval was not converted to an Interval")
        return self.interval

    def steps(self, total: int | None) -> Iterator[Step]:
        for moment in self._interval.moments(total):
            residue = moment.residue if self.latched else moment.late_residue
            kind = StepKind.FULL if residue == 0 else self.between(residue)
            leading = int(moment.residue == 0 and kind is not StepKind.FULL)
            yield Step(kind, self._interval.length, self._ratio(moment), leading)

    @abstractmethod
    def between(self, residue: int) -> StepKind:
        """The kind of the step that is ``residue`` steps after a full one."""

    def _ratio(self, moment: Moment) -> float:
        return self.fresh_ratio * max(0.0, self.step_factor(moment.progress))

    def fresh_tokens(self, step: Step, query: TokenQuery) -> int:
        depth = query.block / max(1, query.blocks - 1)
        ratio = step.ratio * self.block_factor(depth) * self.kind_factor.get(query.kind, 0.0)
        ratio *= self.text_factor if query.text else 1.0
        return int(min(1.0, max(0.0, ratio)) * query.tokens)
