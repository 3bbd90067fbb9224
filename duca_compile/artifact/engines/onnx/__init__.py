"""Engines that run artifacts of ONNX graphs."""
