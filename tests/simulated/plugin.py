"""`pytest -p simulated.plugin -m gpu`: the accelerator of the tests is the simulated one, and a race fails its test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from simulated.device import backend, stand_in

GB_PER_S, LATENCY_US = 2.0, 20.0
"""Of the link: slow enough that what does not wait for a copy comes before it."""

UNABLE = {"mixtral": "transformers counts an expert's tokens by a kernel that the CPU, which computes here, has not"}

stand_in()
backend.set_link(GB_PER_S, LATENCY_US)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name, reason in UNABLE.items():
            if name in item.name:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[Any]:
    before = len(backend.races())
    result = yield
    races = backend.races()[before:]
    assert not races, "accesses that nothing orders:\n" + "\n".join(races[:10])
    return result
