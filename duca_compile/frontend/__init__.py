"""From a module and one call to a graph: binding arguments, tracing, and the module's state and side effects."""
