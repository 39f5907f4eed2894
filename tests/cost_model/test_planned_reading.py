"""When the page cache is asked: only by plans that transfers limit, and never in a prediction."""

from __future__ import annotations

import pytest

from autosp.cost_model.predict import predict
from autosp.cost_model.reading import measured_reading, planned_reading
from autosp.spec import Candidate, LinkProfile, Profile, Reading, Tier
from builders import link, profile

READING = Reading(readers=2, block_bytes=8 * 2**20)
WINDOW = Candidate(k=2, k_prime=1)
BEHIND_HOST = Candidate(k=2, k_prime=1, on_disk=(0, 1, 2, 3), read_ahead=2)


def from_disk(target: Tier, bytes_per_s: float, cached_bytes_per_s: float | None) -> LinkProfile:
    plain = link(bytes_per_s=bytes_per_s, source=Tier.DISK)
    how = {"target": target, "reading": READING, "cached_bytes_per_s": cached_bytes_per_s}
    return plain.model_copy(update=how)


def on_cpu(forward_s: float, cached_bytes_per_s: float | None) -> Profile:
    """400 B at 10 B/s a pass, beside 4 visits."""
    made = profile((100,) * 4, forward_s=forward_s, kind="cpu")
    return made.model_copy(update={"links": (from_disk(Tier.DEVICE, 10.0, cached_bytes_per_s),)})


def on_accelerator(forward_s: float, cached_bytes_per_s: float | None) -> Profile:
    """The same from disk to host, and 100 B/s to the device."""
    disk = from_disk(Tier.HOST, 10.0, cached_bytes_per_s)
    return profile((100,) * 4, forward_s=forward_s, bytes_per_s=100.0, disk=disk)


@pytest.mark.parametrize(
    ("measured", "candidate", "pays"),
    [
        pytest.param(on_cpu(1.0, 100.0), WINDOW, True, id="4 s of compute and 4 s of copies, instead of 40 s of reads"),
        pytest.param(on_cpu(8.0, 100.0), WINDOW, True, id="32 s and 4 s instead of 40 s"),
        pytest.param(on_cpu(9.0, 100.0), WINDOW, False, id="36 s and 4 s instead of 40 s"),
        pytest.param(on_cpu(20.0, 100.0), WINDOW, False, id="compute takes longer than reads"),
        pytest.param(on_cpu(1.0, 10.5), WINDOW, False, id="the page cache is hardly faster than the disk"),
        pytest.param(on_cpu(1.0, None), WINDOW, False, id="nobody knows what is in the page cache"),
        pytest.param(on_accelerator(9.0, 100.0), BEHIND_HOST, True, id="copies take no time from an accelerator"),
        pytest.param(on_accelerator(20.0, 100.0), BEHIND_HOST, False, id="the accelerator's compute takes longer"),
        pytest.param(on_accelerator(1.0, 100.0), WINDOW, False, id="nothing on disk"),
    ],
)
def test_the_page_cache_is_asked_where_it_pays_for_sure(measured: Profile, candidate: Candidate, pays: bool) -> None:
    (predicted,) = predict(measured, [candidate])
    assert planned_reading(measured, predicted) == READING.model_copy(update={"from_cache": pays})


def test_predictions_are_the_disk_s_whatever_the_page_cache_gives() -> None:
    assert predict(on_cpu(1.0, 100.0), [WINDOW]) == predict(on_cpu(1.0, None), [WINDOW])


def test_a_profile_of_before_readers() -> None:
    old = profile((100,) * 4, kind="cpu")
    (predicted,) = predict(old, [WINDOW])
    assert measured_reading(old) == planned_reading(old, predicted) == Reading()
