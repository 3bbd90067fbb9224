"""The former place of the papers' FLOPs."""

from duca_compile.app.paper_flops import Blocks, LoopFlops, explain_dit_xl, loop_flops, paper_flops, published_policies

__all__ = ["Blocks", "LoopFlops", "explain_dit_xl", "loop_flops", "paper_flops", "published_policies"]
