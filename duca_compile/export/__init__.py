"""An optimized model as files: traces with open sizes, ONNX graphs over one pool of weights, and the manifest."""
