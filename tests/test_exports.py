"""Every model of the zoo exports and gives the optimized model's values in each engine, or is refused: the table."""

from pathlib import Path

import pytest

from tests.exports import HEAD, PAGE, exported, rows
from tests.zoo import ZOO

IN_CI = {"DiT", "Sana", "HunyuanVideo"}  # any batch, constants that are folded, and rows that are gathered
SAY = "run python -m tests.exports to write docs/exports.md anew"


def test_the_table_has_lines_of_models_of_the_zoo_and_none_differs() -> None:
    assert PAGE.read_text().startswith(HEAD), SAY
    assert list(rows()) == ["model", *(name for name in ZOO if name in rows())], SAY
    assert "differs" not in PAGE.read_text()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in IN_CI else pytest.mark.exhaustive)
        for name in ZOO
        if name in rows()
    ],
)
def test_a_model_exports_as_the_table_says(name: str, tmp_path: Path) -> None:
    assert exported(ZOO[name], tmp_path).row == rows()[name], SAY
