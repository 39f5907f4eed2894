"""`pytest -p simulated.plugin -m gpu`: the accelerator of the tests is the simulated one, and a race fails its test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from simulated.device import backend, stand_in

stand_in()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[Any]:
    before = len(backend.races())
    result = yield
    races = backend.races()[before:]
    assert not races, "accesses that nothing orders:\n" + "\n".join(races[:10])
    return result
