"""Continues from the probe of the same step instead of computing the start of the model again."""

from __future__ import annotations

from dataclasses import dataclass

from duca_compile.core.ports import PROBE_STREAM
from duca_compile.frontend.operators import carried_value
from duca_compile.passes.base import CachingPass, VariantDraft
from duca_compile.passes.exact.probe import probed_stream


@dataclass(frozen=True)
class ResumeFromProbe(CachingPass):
    """Reads the stream after the probe from an input."""

    def apply(self, draft: VariantDraft) -> bool:
        if draft.after is None:
            return False
        stream = carried_value(probed_stream(draft, draft.after)[1])
        if not stream.users:
            return False
        stream.replace_all_uses_with(draft.input(PROBE_STREAM, stream.meta["val"]))
        return True
