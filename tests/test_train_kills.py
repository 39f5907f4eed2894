"""A training process that is killed goes on from its last checkpoint, to the bits of an undisturbed run."""

from __future__ import annotations

from pathlib import Path

import pytest

from autosp.batch import equal
from processes import serve
from train_kills import STEPS, KilledAt, final, run

PLACES = ["forward", "backward", "before the update", "after the update", "while saving", "between steps"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    serve()
    folder = tmp_path_factory.mktemp("plain")
    assert run(folder, streamed=False, overlap=False)
    return final(folder)


@pytest.mark.parametrize("overlap", [False, True])
def test_sigkill_anywhere(overlap: bool, undisturbed: dict[str, object], tmp_path: Path) -> None:
    """One process after another, each killed at another place."""
    for number, place in enumerate(PLACES):
        assert not run(tmp_path, True, overlap, KilledAt(place, 1 + number))
        saved = final(tmp_path)["step"]
        assert saved == 1 + number + (place == "between steps")
        assert not equal(final(tmp_path), undisturbed)
    assert run(tmp_path, True, overlap)
    assert final(tmp_path)["step"] == STEPS
    assert equal(final(tmp_path), undisturbed)
