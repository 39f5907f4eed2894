"""How batches are passed, named, moved and compared."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from autosp.batch import call, equal, map_tensors, signature, tensors_in
from autosp.errors import SettingError


class Recorder(nn.Module):
    """Returns what it was called with."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


class Pair(NamedTuple):
    """A batch with named places."""

    left: torch.Tensor
    right: Any


@dataclass
class Ragged:
    """A batch of a class of its own."""

    values: torch.Tensor
    names: list[str] = field(default_factory=list)
    total: int = field(init=False, default=7)


ONE = torch.ones(2, 3)
TWO = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batch", "args", "kwargs"),
    [
        pytest.param(ONE, (ONE,), {}, id="tensor"),
        pytest.param((ONE, TWO, "mode"), (ONE, TWO, "mode"), {}, id="tuple"),
        pytest.param([ONE, TWO], (ONE, TWO), {}, id="list"),
        pytest.param(Pair(ONE, TWO), (ONE, TWO), {}, id="named tuple"),
        pytest.param((), (), {}, id="nothing"),
        pytest.param({"x": ONE, "flag": True}, (), {"x": ONE, "flag": True}, id="dict"),
        pytest.param(UserDict(x=ONE), (), {"x": ONE}, id="mapping"),
    ],
)
def test_call(batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    seen_args, seen_kwargs = call(Recorder(), batch)
    assert len(seen_args) == len(args)
    assert all(seen is given for seen, given in zip(seen_args, args, strict=True))
    assert seen_kwargs.keys() == kwargs.keys()
    assert all(seen_kwargs[name] is kwargs[name] for name in kwargs)


@pytest.mark.parametrize("batch", [None, 3, "text", {1, 2}, Ragged(ONE), object()])
def test_call_of_anything_else(batch: Any) -> None:
    with pytest.raises(SettingError, match=f"sample_batch is a {type(batch).__name__}; .* or give step"):
        call(Recorder(), batch)


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (ONE, "float32[2,3]"),
        (torch.tensor(1.0, dtype=torch.bfloat16), "bfloat16[]"),
        (torch.zeros(0, 5, dtype=torch.bool), "bool[0,5]"),
        ((ONE, TWO), "(float32[2,3], int64[4])"),
        ([ONE], "(float32[2,3])"),
        ({"ids": TWO, "mask": None}, "{ids: int64[4], mask: None}"),
        ({"past": [(ONE, ONE)], "n": 3}, "{n: 3, past: ((float32[2,3], float32[2,3]))}"),
        (UserDict(x=ONE), "{x: float32[2,3]}"),
        (("mode", 1.5, True), "('mode', 1.5, True)"),
    ],
)
def test_signature(batch: Any, text: str) -> None:
    assert signature(batch) == text


def test_signature_is_about_shapes_not_values() -> None:
    assert signature({"x": torch.rand(2, 3)}) == signature({"x": torch.rand(2, 3)})
    assert signature({"x": torch.rand(2, 3)}) != signature({"x": torch.rand(3, 2)})
    assert signature({"x": torch.rand(2, 3)}) != signature({"x": torch.rand(2, 3).half()})
    assert signature({"x": ONE}) != signature({"y": ONE})


def test_signature_of_an_object_has_no_address() -> None:
    assert signature(object()) == signature(object()) == "object"


def test_signature_of_a_dataclass() -> None:
    assert signature(Ragged(torch.zeros(2))) != signature(Ragged(torch.zeros(3)))


def test_signature_of_keywords_in_any_order() -> None:
    assert signature({"x": ONE, "y": TWO}) == signature({"y": TWO, "x": ONE})


def doubled(value: Any) -> Any:
    """Every tensor times two."""
    return map_tensors(lambda tensor: tensor * 2, value)


@pytest.mark.parametrize(
    "made",
    [
        lambda tensor: tensor,
        lambda tensor: (tensor, "text", 3),
        lambda tensor: [tensor, [tensor, None]],
        lambda tensor: Pair(tensor, (tensor,)),
        lambda tensor: {"x": tensor, "deep": {"y": [tensor]}},
        lambda tensor: OrderedDict(x=tensor),
        lambda tensor: UserDict(x=tensor),
        lambda tensor: Ragged(tensor, ["name"]),
    ],
    ids=["tensor", "tuple", "list", "named tuple", "dict", "ordered dict", "mapping", "dataclass"],
)
def test_map_tensors_keeps_the_shape_of_things(made: Callable[[torch.Tensor], Any]) -> None:
    given = made(ONE)
    result = doubled(given)
    assert type(result) is type(given)
    found, expected = tensors_in(result), tensors_in(made(ONE * 2))
    assert len(found) == len(expected) > 0
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(tensor is ONE for tensor in tensors_in(given))  # what was given is as it was


def test_map_tensors_keeps_everything_else() -> None:
    other = object()
    assert doubled({"text": "x", "none": None, "other": other}) == {"text": "x", "none": None, "other": other}
    assert doubled(Ragged(ONE, ["name"])).names == ["name"]
    assert doubled(other) is other
    assert doubled(torch.Size([2, 3])) == torch.Size([2, 3])
    assert isinstance(doubled(torch.Size([2, 3])), torch.Size)


def test_map_tensors_of_a_return_type() -> None:
    result = doubled(ONE.max(dim=1))
    assert type(result) is type(ONE.max(dim=1))
    assert torch.equal(result.values, torch.full((2,), 2.0))


def test_map_tensors_of_a_defaultdict() -> None:
    assert torch.equal(doubled(defaultdict(list, x=ONE))["x"], ONE * 2)


def test_tensors_in_order() -> None:
    first, second, third = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    found = tensors_in({"b": first, "a": [second, Pair(third, first)]})
    assert [id(tensor) for tensor in found] == [id(first), id(second), id(third), id(first)]
    assert tensors_in("text") == []


NAN = torch.tensor([float("nan"), 1.0])


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (ONE, ONE.clone()),
        ((ONE, {"x": TWO}), (ONE.clone(), {"x": TWO.clone()})),
        (NAN, NAN.clone()),
        (torch.tensor(1.0), torch.tensor(1.0)),
        (torch.zeros(0, 3), torch.zeros(0, 3)),
        (torch.ones(2).expand(3, 2), torch.ones(3, 2)),
        (ONE.t(), ONE.t().contiguous()),
        (ONE.bool(), ONE.bool()),
        (ONE.to(torch.complex64), ONE.to(torch.complex64)),
        (ONE.bfloat16(), ONE.bfloat16()),
        (ONE.to(torch.complex64).conj().imag, -torch.zeros(2, 3)),
        (torch.ones(2, requires_grad=True), torch.ones(2)),
    ],
    ids=str,
)
def test_equal(left: Any, right: Any) -> None:
    assert equal(left, right)
    assert equal(right, left)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0000002])),
        (torch.tensor(0.0), torch.tensor(-0.0)),  # bitwise
        (NAN, NAN.flip(0)),
        (torch.ones(2), torch.ones(2, dtype=torch.float64)),
        (torch.ones(4), torch.ones(2, 2)),
        (torch.ones(2), torch.ones(3)),
        ((ONE, ONE), (ONE,)),
        ((ONE, TWO), (TWO, ONE)),
        (torch.tensor([1.0], dtype=torch.float32), torch.tensor([0x3F800000], dtype=torch.int32)),  # the same bits
        (ONE, None),
    ],
    ids=str,
)
def test_not_equal(left: Any, right: Any) -> None:
    assert not equal(left, right)
    assert not equal(right, left)


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(lambda: torch.ones(3, dtype=torch.complex64).conj(), id="conjugate view"),
        pytest.param(lambda: torch.eye(3).to_sparse(), id="sparse"),
        pytest.param(lambda: torch.eye(3).to_sparse_csr(), id="sparse CSR"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_equal_of_unusual_tensors(made: Callable[[], torch.Tensor]) -> None:
    assert equal(made(), made())


@pytest.mark.parametrize(("left", "right"), [(1.0, 2.0), (["a", "b"], ["a", "c"]), ({"x": ONE}, {"y": ONE})])
def test_not_equal_without_tensors(left: Any, right: Any) -> None:
    assert not equal(left, right)


class Couple(tuple[Any, ...]):
    """Its constructor takes its items one by one, and it has an attribute."""

    note = ""

    def __new__(cls, left: Any, right: Any) -> Couple:
        return super().__new__(cls, (left, right))


class Sentences(list[Any]):
    """Its constructor takes no items."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


def test_tuples_and_lists_keep_their_class_whatever_it_is_made_from() -> None:
    pair = Couple(torch.ones(2), 3)
    pair.note = "mine"
    mapped = map_tensors(lambda tensor: tensor + 1, pair)
    assert type(mapped) is Couple
    assert (mapped.note, mapped[1]) == ("mine", 3)
    assert equal(mapped[0], torch.full((2,), 2.0))

    sentences = Sentences("english")
    sentences.append(torch.ones(2))
    moved = map_tensors(lambda tensor: tensor + 1, sentences)
    assert type(moved) is Sentences
    assert moved.name == "english"
    assert equal(moved[0], torch.full((2,), 2.0))
    assert equal(sentences[0], torch.ones(2))

    most = torch.tensor([1.0, 3.0]).max(0)
    assert type(map_tensors(lambda tensor: tensor, most)) is type(most)
