"""FLOPs of a DiT's loop as the papers count them, besides the actual count in ``analysis/cost.py``.

The tables of FORA, ToCa, DuCa and TaylorSeer (and of papers that compare with them) come from one counter. It counts
the blocks, with some elementwise work, but neither the embedders nor the head. The modulation of a block counts as
C + 6C², without the factor of two for a multiply-add, and an extrapolation counts as reuse. Only compare figures of one
kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from duca_compile.core.fx_utils import op_name, value_shape
from duca_compile.core.ir import CapturedGraph, Facts
from duca_compile.errors import PolicyError, StructureError
from duca_compile.explanation import Explanation, explain
from duca_compile.policies import AdaptivePolicy, Policy, Step, StepKind, TokenQuery, Uncached, published

_UNLATCHED = {"latched": False}  # the published figures are those of the released code
METHODS: dict[str, dict[str, bool]] = {"fora": {}, "toca": _UNLATCHED, "duca": _UNLATCHED, "taylorseer": {}}


@dataclass(frozen=True)
class Blocks:
    """The sizes of a DiT's blocks, which are all the same.

    Attributes:
        count: number of blocks.
        rows: batch rows, with both halves of guidance.
        tokens: tokens of each row.
        width: channels C of the stream.
        heads: attention heads.
        hidden: width between the two layers of an MLP.
    """

    count: int
    rows: int
    tokens: int
    width: int
    heads: int
    hidden: int

    @staticmethod
    def of(captured: CapturedGraph, facts: Facts) -> Blocks:
        """The sizes of a captured DiT.

        Raises:
            StructureError: its blocks are not each a self-attention and an MLP, all of one size, so that the papers'
                count is not defined for it.
        """
        nodes = {node.name: node for node in captured.graph.nodes}
        attentions, mlps = facts.branches[::2], facts.branches[1::2]
        kinds = {b.kind for b in attentions}, {b.kind for b in mlps}
        alike = len({b.shape for b in facts.branches}) == 1 and len(facts.branches) == 2 * facts.blocks
        scored = {b.attention for b in attentions}
        if kinds != ({"self_attention"}, {"mlp"}) or not alike or None in scored:
            raise StructureError(
                "the papers count FLOPs only for DiT, whose blocks are a self-attention and an MLP, all of one size; "
                "this model has other blocks. Explanation.schedule has the actual count."
            )
        rows, tokens, width = facts.branches[0].shape
        query = nodes[str(attentions[0].attention)].all_input_nodes[0]
        linears = [nodes[name] for name in mlps[0].body if op_name(nodes[name]) == "linear"]
        hidden = max((value_shape(linear) or (0,))[-1] for linear in linears)
        return Blocks(facts.blocks, rows, tokens, width, (value_shape(query) or (0, 0))[1], hidden)

    @property
    def modulation(self) -> int:
        return self.width + 6 * self.width**2

    @property
    def norms(self) -> int:
        return 2 * self.tokens * self.width

    @property
    def attention(self) -> int:
        n, c = self.tokens, self.width
        return 8 * n * c**2 + n * c + 4 * n**2 * c + 5 * self.heads * n**2

    @property
    def mlp_token(self) -> int:
        """The MLP of one token: two products, and six operations for each hidden value."""
        return 4 * self.width * self.hidden + 6 * self.hidden

    @property
    def full(self) -> int:
        return self.norms + self.modulation + self.attention + self.tokens * self.mlp_token


def paper_flops(blocks: Blocks, policy: Policy, num_inference_steps: int) -> float:
    """FLOPs of a whole loop under a policy, as the papers count them.

    Raises:
        PolicyError: the policy decides its steps at run time, or has a kind of step that the papers do not have.
    """
    if isinstance(policy, AdaptivePolicy):
        raise PolicyError(f"{policy.name} decides its steps at run time, so its FLOPs are not known before")
    return blocks.rows * float(sum(_step(blocks, policy, step) for step in policy.steps(num_inference_steps)))


def _step(blocks: Blocks, policy: Policy, step: Step) -> int:
    rest = range(step.leading_full, blocks.count)
    return step.leading_full * blocks.full + sum(_block(blocks, policy, step, index) for index in rest)


def _block(blocks: Blocks, policy: Policy, step: Step, index: int) -> int:
    if step.kind is StepKind.FULL:
        return blocks.full
    if step.kind is StepKind.PARTIAL:
        fresh = policy.fresh_tokens(step, TokenQuery(index, blocks.count, "mlp", blocks.tokens))
        return blocks.norms + blocks.modulation + fresh * blocks.mlp_token
    if step.kind is StepKind.SKIP or (policy.forecast is not None and policy.forecast.lite):
        return 0
    if step.kind in (StepKind.REUSE, StepKind.FORECAST):
        return blocks.modulation
    raise PolicyError(f"{policy.name} has {step.kind.value} steps, which the papers do not count")


@dataclass(frozen=True)
class LoopFlops:
    """FLOPs of one policy's loop.

    Attributes:
        policy: name of the policy.
        letters: the kind of each step.
        papers: FLOPs as the papers count them.
        counted: FLOPs of every product in the graph.
        papers_speedup: over the uncached loop, as the papers count.
        counted_speedup: over the uncached loop, by the products in the graph.
    """

    policy: str
    letters: str
    papers: float
    counted: float
    papers_speedup: float
    counted_speedup: float


def loop_flops(explanation: Explanation, policy: Policy, num_inference_steps: int = 50) -> LoopFlops:
    """Both counts for the explained model and call.

    Raises:
        StructureError: the papers' count is not defined for this model.
        PolicyError: the papers' count is not defined for this policy, or the policy does not work with this model.
    """
    blocks = Blocks.of(explanation.captured, explanation.facts)
    report = explanation.schedule(policy, num_inference_steps)
    papers = paper_flops(blocks, policy, num_inference_steps)
    return LoopFlops(
        policy.name,
        "".join(step.kind.letter for step in report.steps),
        papers,
        sum(step.flops for step in report.steps),
        paper_flops(blocks, Uncached(), num_inference_steps) / papers,
        report.ideal_speedup,
    )


def explain_dit_xl(rows: int = 2) -> Explanation:
    """DiT-XL/2 at 256x256, the model of the papers' tables, on the meta device, which has shapes but no weights."""
    from diffusers import DiTTransformer2DModel

    with torch.device("meta"):
        model = DiTTransformer2DModel(
            num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, sample_size=32,
            patch_size=2, num_embeds_ada_norm=1000, norm_eps=1e-6,
        )  # fmt: skip
        integers = torch.empty(rows, dtype=torch.int64)
        latent = torch.empty(rows, 4, 32, 32)
        call = {"hidden_states": latent, "timestep": integers, "class_labels": integers.clone()}
    return explain(model.to("meta").eval(), **call)  # the positions are always created on the CPU


def published_policies(intervals: tuple[int, ...]) -> Iterator[Policy]:
    """The policies of the papers' tables for DiT, method by method, with these intervals."""
    for method, settings in METHODS.items():
        for interval in intervals:
            yield published(method, "dit", interval=interval, **settings)
