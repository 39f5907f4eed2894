"""What autosp raises, raised elsewhere: pools of processes pickle it."""

from __future__ import annotations

import copy
import errno
import pickle
from collections.abc import Iterator

import pytest

from autosp.errors import AutospError, BudgetTooSmallError


def kinds(kind: type[AutospError] = AutospError) -> Iterator[type[AutospError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from kinds(below)


def made(kind: type[AutospError]) -> Iterator[AutospError]:
    """In all ways in which it is raised."""
    if issubclass(kind, BudgetTooSmallError):
        yield kind("2 bytes are the least", budget_bytes=1, least_bytes=2, layer="head")
    else:
        yield kind("what, which, the numbers, the next step")
    if issubclass(kind, OSError):
        yield kind(errno.ENOSPC, "no room")


@pytest.mark.parametrize("kind", sorted(set(kinds()), key=lambda kind: kind.__name__))
def test_an_error_arrives_as_it_was_raised(kind: type[AutospError]) -> None:
    for error in made(kind):
        error.add_note("told to the user")
        for arrived in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            assert type(arrived) is kind
            assert (str(arrived), arrived.args, vars(arrived)) == (str(error), error.args, vars(error))
            if isinstance(error, OSError):
                assert (arrived.errno, arrived.strerror) == (error.errno, error.strerror)
