"""The parts of the runtime that depend on torch."""
