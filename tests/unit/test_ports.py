"""Ports: one object each, and names in files that tell them apart."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duca_compile.core.ports import (
    CACHES,
    FORECAST_FACTORS,
    Port,
    PortKind,
    argument,
    argument_name,
    dead_caches,
    named_input,
    named_result,
)
from duca_compile.core.steps import CacheKinds

# As artifacts that were saved earlier have them: kind, which one, order, as a result, as an input.
NAMES = [
    (PortKind.HOISTED, "exp_d1", 0, "hoisted_exp_d1", "hoisted_exp_d1"),
    (PortKind.ROW, "bfloat16", 0, "timestep_bfloat16", "timestep_bfloat16"),
    (PortKind.TOKENS, 12, 0, "tokens_12", "tokens_12"),
    (PortKind.GAP, "", 0, "forecast_gap", "forecast_gap"),
    (PortKind.ORDERS, "", 0, "forecast_orders", "forecast_orders"),
    (PortKind.FACTOR, 4, 0, "forecast_factor_4", "forecast_factor_4"),
    (PortKind.SUM_WEIGHT, 3, 0, "forecast_weight_3", "forecast_weight_3"),
    (PortKind.SUM_FACTOR, 8, 0, "forecast_sum_factor_8", "forecast_sum_factor_8"),
    (PortKind.SUMMED, "", 0, "forecast_summed", "forecast_summed"),
    (PortKind.FULL_ROWS, "", 0, "full_rows", "full_rows"),
    (PortKind.BRANCH, 0, 0, "branch_0", "cache_branch_0"),
    (PortKind.BRANCH, 3, 2, "branch_3_d2", "cache_branch_3_d2"),
    (PortKind.BRANCH_INPUT, 1, 1, "input_1_d1", "cache_input_1_d1"),
    (PortKind.SCALE, 7, 0, "scale_7", "cache_scale_7"),
    (PortKind.CHANGE, 5, 0, "change_5", "cache_change_5"),
    (PortKind.LATENT, "", 0, "boundary_latent", "cache_boundary_latent"),
    (PortKind.RESULT, "", 0, "boundary_output", "cache_boundary_output"),
    (PortKind.RATE, "", 0, "boundary_rate", "cache_boundary_rate"),
    (PortKind.STREAM_END, "", 0, "stream_end", "cache_stream_end"),
    (PortKind.STREAM_END, "", 1, "stream_end_d1", "cache_stream_end_d1"),
    (PortKind.STREAM_END, 3, 0, "stream_end_3", "cache_stream_end_3"),
    (PortKind.STREAM_END, 3, 1, "stream_end_3_d1", "cache_stream_end_3_d1"),
    (PortKind.SUM, 4, 0, "stream_sum_4", "cache_stream_sum_4"),
    (PortKind.OUTPUT, 0, 0, "output_0", "output_0"),
    (PortKind.SCORE, 2, 0, "score_2", "score_2"),
    (PortKind.VERIFY_ERROR, "", 0, "verify_error", "verify_error"),
    (PortKind.PROBE_CHANGE, "", 0, "probe_change", "probe_change"),
    (PortKind.PROBE_SEEN, "", 0, "probe_seen", "cache_probe_seen"),
    (PortKind.PROBE_STREAM, "", 0, "probe_stream", "probe_stream"),
]


@pytest.mark.parametrize(("kind", "of", "order", "result", "name"), NAMES)
def test_names_are_those_of_saved_artifacts(kind: PortKind, of: str | int, order: int, result: str, name: str) -> None:
    port = Port(kind, of, order)
    assert (port.result_name, port.input_name) == (result, name)
    assert named_result(result) is named_input(name) is port


def test_every_kind_has_a_name() -> None:
    assert {kind for kind, *_ in NAMES} == {*PortKind} - {PortKind.ARGUMENT}


@pytest.mark.parametrize(
    "name", ["timestep", "timestep_proj", "input_ids", "scale", "output", "cache_x", "tokens_x", "x"]
)
def test_other_names_are_no_ports(name: str) -> None:
    assert named_input(name) is None
    assert argument_name(name) == argument(name).input_name == name


PARTS = st.sampled_from(["given_", "cache_", "branch_", "1", "_d1", "output_", "x", "hoisted_", "stream_end"])


@given(st.lists(PARTS, min_size=1, max_size=4).map("".join), st.lists(PARTS, min_size=1, max_size=4).map("".join))
def test_arguments_have_names_of_their_own(one: str, other: str) -> None:
    assert (argument_name(one) == argument_name(other)) == (one == other)
    assert named_input(argument_name(one)) is None


def test_a_port_is_one_object() -> None:
    port = Port(PortKind.BRANCH, 3, 1)
    assert Port(PortKind.BRANCH, 3).difference(1) is port
    assert copy.copy(port) is copy.deepcopy(port) is pickle.loads(pickle.dumps(port)) is port
    assert argument("x").key == "x"
    assert port.key is port


def test_kinds_of_caches_die_apart() -> None:
    caches = [Port(kind, "" if kind in (PortKind.STREAM_END, PortKind.PROBE_SEEN) else 0) for kind in CACHES]
    differences = [port.difference(1) for port in caches]
    assert dead_caches(CacheKinds.NOTHING, [*caches, *differences]) == (*caches, *differences)
    assert {port.kind for port in dead_caches(CacheKinds.END, caches)} == {PortKind.BRANCH}
    assert {port.kind for port in dead_caches(CacheKinds.BRANCHES, differences)} == {PortKind.STREAM_END}
    assert dead_caches(CacheKinds.ALL, caches) == ()
    assert [factor.of for factor in FORECAST_FACTORS] == [1, 2, 3, 4]
