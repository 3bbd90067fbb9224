"""One rewrite per file; ``pipeline`` holds their order."""
