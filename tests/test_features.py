"""Each row of docs/followed.md is what its case gives."""

from __future__ import annotations

import pytest

from tests.features.table import PAGE, Feature, cases, observed, row


@pytest.mark.parametrize("case", cases())
def test_feature(case: Feature) -> None:
    outcome, text = observed(case)
    assert outcome is case.outcome, text
    assert case.says in text
    assert row(case, outcome) in PAGE.read_text()
