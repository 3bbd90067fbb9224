"""The runtime's parts that hold tensors and graphs of torch."""
