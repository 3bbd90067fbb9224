"""Writes an optimized model as an artifact: graphs with open sizes, their shared weights, and the manifest."""
