"""What is seen of a model's Python state: all that forward can read of it, and nothing of what is foreign."""

from __future__ import annotations

import functools
import itertools
import logging
import random
import sys
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from time import perf_counter
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from duca_compile.frontend import snapshot
from duca_compile.frontend.activations import Activations
from duca_compile.frontend.arguments import Containers, noting
from duca_compile.frontend.side_effects import ModelState
from duca_compile.frontend.snapshot import Structure, Watch, take

STORE: list[int] = []


def model(**attributes: Any) -> nn.Module:
    made = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    made[0].__dict__.update(attributes)
    return made


class Raises:
    """Raises whatever is asked of it."""

    def __getattribute__(self, name: str) -> NoReturn:
        raise RuntimeError(name)

    __eq__ = __hash__ = __bool__ = __len__ = __iter__ = __getattribute__  # type: ignore[assignment]


class Key:
    """Can be a key once, and is never to be asked again."""

    asked = False

    def __hash__(self) -> int:
        if Key.asked:
            raise RuntimeError
        return 1


class Lazy(types.ModuleType):
    def __getattr__(self, name: str) -> NoReturn:
        raise ValueError(f"cannot import {name}")


class Meta(type):
    def __eq__(cls, other: object) -> NoReturn:
        raise RuntimeError

    def __hash__(cls) -> NoReturn:
        raise RuntimeError


class BadDict(dict[str, int]):
    items = keys = values = __iter__ = Raises.__getattribute__  # type: ignore[assignment]


class Slotted:
    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = 1


def nested(depth: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


def hostile() -> nn.Module:
    loop: list[Any] = []
    loop.append({"loop": loop})
    things: list[Any] = [
        Raises(), Lazy("lazy"), Meta("WithMeta", (), {}), Meta("WithMeta", (), {})(), BadDict(a=1), threading.Lock(),
        loop, np.zeros(3), np.array([None]), np.zeros(10_000), sys, torch, iter([]), (each for each in ()),
        memoryview(b""), property(), functools.lru_cache(len), logging.getLogger(), object(), type, float("nan"),
        nested(5000),
    ]  # fmt: skip
    made = model(everything=things, **{f"thing{i}": each for i, each in enumerate(things)})
    made[0].__dict__.update(up=[made], pipe=types.SimpleNamespace(transformer=made), me=weakref.proxy(made))
    made[0].__dict__.update(keyed={Key(): 1})
    made[0].__dict__.update(words={str(i): i for i in range(100_000)}, data=[*range(100_000)], ids={*range(100_000)})
    return made


def test_foreign_objects_are_looked_at_without_asking_them_and_in_no_time() -> None:
    made = hostile()
    Key.asked = True
    started = perf_counter()
    first, second = take(made), take(made)
    assert perf_counter() - started < 0.4  # two looks
    assert first.structure == second.structure
    assert hash(first.structure) == hash(second.structure)
    assert not Watch(first).changed()
    assert {name for _, name in first.over_budget} >= {"words", "data", "ids"}
    assert not ModelState(made).changes()


def structure(made: nn.Module) -> Structure:
    return take(made).structure


def closing(value: Any) -> Callable[[], Any]:
    def function() -> Any:
        return value

    return function


def naming_a_global(*_: Any) -> None:
    STORE.append(1)


def cell(function: Any) -> Any:
    return function.__closure__[0]


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "a nested list": (lambda: {"a": [1, [2]]}, lambda x: x["a"][1].append(3)),
    "a dictionary": (lambda: {"a": 1}, lambda x: x.__setitem__("a", True)),
    "an ordered one": (lambda: OrderedDict(a=1, b=2), lambda x: x.popitem()),
    "a set": (lambda: {1}, lambda x: x.add(2)),
    "a deque": (lambda: deque([1]), lambda x: x.append(2)),
    "an object": (lambda: types.SimpleNamespace(a=types.SimpleNamespace(b=1)), lambda x: setattr(x.a, "b", 2)),
    "an object with slots": (Slotted, lambda x: setattr(x, "number", 2)),
    "a partial's argument": (lambda: functools.partial(len, [1]), lambda x: x.args[0].append(2)),
    "a bound method's object": (
        lambda: types.MethodType(len, types.SimpleNamespace()),
        lambda x: setattr(x.__self__, "a", 2),
    ),
    "a closure": (lambda: closing([1]), lambda x: x().append(2)),
    "a closure's variable": (lambda: closing(1), lambda x: setattr(cell(x), "cell_contents", 2)),
    "a default": (lambda: lambda x=[1]: x, lambda x: x().append(2)),
    "a global": (lambda: naming_a_global, lambda x: x()),
    "an array": (lambda: np.zeros(2), lambda x: x.__setitem__(0, 1)),
    "a module outside of the tree": (lambda: [nn.Linear(1, 1)], lambda x: setattr(x[0], "scale", 2)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_forward_can_read_is_seen_and_watched_and_put_back(what: str) -> None:
    make, change = CHANGES[what]
    thing = make()
    made = model(thing=thing)
    before, held = take(made), ModelState(made)
    watch = Watch(before)
    assert not watch.changed()
    change(thing)
    assert watch.changed()
    assert structure(made) != before.structure
    assert held.changes()
    held.put_back()
    assert not held.changes()
    assert structure(made) == before.structure
    assert not isinstance(thing, OrderedDict) or list(thing) == ["a", "b"]


def test_what_tells_iterators_tensors_and_random_numbers_apart() -> None:
    counter, tensor = itertools.count(), torch.zeros(2)
    held = ModelState(model(counter=counter, tensor=tensor))
    state = random.getstate()
    next(counter)
    tensor.add_(1)
    random.random()
    assert {held.label(change) for change in held.changes()} == {"0.counter", "0.tensor", "random numbers of Python"}
    held.put_back()
    assert not tensor.any()
    assert random.getstate() == state


def test_hooks_are_watched_and_one_that_is_set_again_is_the_same() -> None:
    made = model()
    bare = take(made)
    watch = Watch(bare)
    nn.Linear(1, 1).register_forward_hook(closing(1))
    assert not watch.changed()
    seen = []
    for value in (1, 1, 2):
        handle = made[0].register_forward_hook(closing(value))
        assert watch.changed()
        seen.append(structure(made))
        handle.remove()
        watch = Watch(take(made))
    one, again, other = (each._entries["0", "_forward_hooks"][1][0][1:] for each in seen)
    assert one == again != other
    assert structure(made) == bare.structure


def test_a_python_module_costs_nothing_and_counts_by_identity() -> None:
    made = model(ops=torch.nn.functional)
    before = take(made)
    assert not any(holder.name == ("0", "ops") for holder in before.holders)
    made[0].ops = torch
    assert structure(made) != before.structure


def test_other_hooks_do_not_move_what_is_behind_them() -> None:
    made = model(shared=(one := types.SimpleNamespace(a=1)), again=one)
    before = structure(made)
    made[0].register_forward_pre_hook(lambda *_: None)
    assert {name for _, name in structure(made).differences(before)} == {"_forward_pre_hooks"}


def test_what_runs_as_it_is_counts_by_its_hooks_and_kinds() -> None:
    made = model(number=1, thing=types.SimpleNamespace(a=1))
    opaque = frozenset({"0"})
    before = take(made, opaque=opaque).structure
    made[0].number, made[0].thing.a = 2, 2
    assert take(made, opaque=opaque).structure == before
    handle = made[0].register_forward_hook(closing(1))
    assert take(made, opaque=opaque).structure != before
    handle.remove()
    made[0].thing = Slotted()
    assert take(made, opaque=opaque).structure != before


def test_a_look_waits_until_it_is_a_small_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    watch = Watch(take(model()))
    monkeypatch.setattr(snapshot, "perf_counter", lambda: now[0])
    watch.back_off(1.0)
    assert not watch.is_due()
    now[0] = snapshot.WATCH_BACKOFF - 0.1
    assert not watch.is_due()
    now[0] = snapshot.WATCH_BACKOFF
    assert watch.is_due()


def test_activations_that_are_kept_are_found_with_their_line() -> None:
    given, kept = torch.ones(2), list[Tensor]()
    table = torch.ones(2)
    with Activations([given]) as activations:
        kept.append(given * 2)
        kept.append(table * 2)
        result = (given + table).view(1, 2)
        (given + 1).sum()
    found = activations.kept([result])
    assert len(found) == 1
    assert "kept.append(given * 2)" in next(iter(found.values()))
    assert activations.source(kept[0]) is not None
    assert activations.source(kept[1]) is None


PUTS: dict[str, tuple[Any, Callable[[Any], object], str | None]] = {
    "taken from the front": ([1, 2, 3], lambda x: x.pop(0), None),
    "taken from the middle": ([1, 2, 3], lambda x: x.pop(1), None),
    "cleared": ({"a": [1]}, lambda x: x.clear(), None),
    "a value again": ({"a": 1}, lambda x: x.update(a=1), None),
    "appended": ([1], lambda x: x.append(2), "given[1]"),
    "moved": ([1, 2], lambda x: x.reverse(), "given[0]"),
    "set": ({"a": 1}, lambda x: x.__setitem__("b", 1), "given['b']"),
    "replaced": ({"a": (1, {"b": [1]})}, lambda x: x["a"][1]["b"].__setitem__(0, 2), "given['a'][1]['b'][0]"),
}


@pytest.mark.parametrize("what", PUTS)
def test_what_is_put_into_a_container_is_named(what: str) -> None:
    given, act, place = PUTS[what]
    copy = noting(given, lambda: None)
    containers = Containers({"given": copy})
    act(copy)
    assert containers.written() == place


def test_a_writer_is_noted() -> None:
    lines: list[int] = []
    copy = noting({"a": [1]}, lambda: lines.append(1))
    copy["a"].append(2)
    copy["b"] = 1
    copy.pop("b")
    assert len(lines) == 2
