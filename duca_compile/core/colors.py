"""The color of each kind of step in pictures."""

from duca_compile.core.steps import StepKind

COLORS = {
    StepKind.FULL: "#c0392b",
    StepKind.PARTIAL: "#f1c40f",
    StepKind.REUSE: "#5dade2",
    StepKind.SKIP: "#58b368",
    StepKind.FORECAST: "#9b59b6",
    StepKind.PREDICT: "#2c3e50",
}
