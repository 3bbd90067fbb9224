"""Two small trained diffusion transformers in diffusers pipelines: emoji from names, and clips of moving shapes."""

from duca_compile_models.pipelines import ClipsPipeline, EmojiPipeline, load

__all__ = ["ClipsPipeline", "EmojiPipeline", "load"]
