"""Adds the cached change from the latent to the output to the latent, in place of the model (EasyCache)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from duca_compile.core.ports import LATENT, RESULT
from duca_compile.core.variants import SkipVariant
from duca_compile.passes.base import CachingPass, VariantDraft
from duca_compile.passes.exact.boundary import latent_and_output

aten = torch.ops.aten


@dataclass(frozen=True)
class RestoreOutput(CachingPass):
    """The output is the latent of this step plus what the output was above the latent at the last full step."""

    def apply(self, draft: VariantDraft) -> bool:
        if not isinstance(draft.spec, SkipVariant) or draft.spec.restores != "output":
            return False
        if draft.find_input(RESULT) is not None:
            return False
        latent, output = latent_and_output(draft)
        like = output.meta["val"]
        old_output, old_latent = draft.input(RESULT, like), draft.input(LATENT, like)
        with draft.graph.inserting_before(draft.graph.output_node()):
            change = draft.graph.call_function(aten.sub.Tensor, (old_output, old_latent))
            restored = draft.graph.call_function(aten.add.Tensor, (latent, change))
        restored.meta["val"] = like
        output.replace_all_uses_with(restored)
        return True
