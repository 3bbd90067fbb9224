"""From a module and one call to a graph: binding, tracing, and what the model is and does besides."""
