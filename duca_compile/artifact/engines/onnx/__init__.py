"""Engines that run ONNX graphs."""
