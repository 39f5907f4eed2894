"""How files are read under a plan: as the profile found best, and from the page cache where that is sure to pay."""

from __future__ import annotations

from autosp.spec import Prediction, Profile, Reading, Tier

WORTHWHILE = 0.95
"""Of the predicted latency: what a pass would take at most with everything in the page cache."""


def measured_reading(profile: Profile) -> Reading:
    """What was measured with; the default where nothing is read, and in a profile that does not say."""
    return next((link.reading for link in profile.links if link.reading), Reading())


def planned_reading(profile: Profile, prediction: Prediction) -> Reading:
    """The same, from the page cache if a pass is faster then even where each copy takes its time from compute.

    [Note: the cache is a bonus] Copying from the page cache takes a core; reading past it takes none. So plans that
    compute limits leave it alone. And nothing is predicted of it: it is outside every budget, and may be gone when the
    plan runs, which then takes what was predicted for the disk.
    """
    reading = measured_reading(profile)
    disk = next((link for link in profile.links if link.source is Tier.DISK), None)
    if disk is None or disk.cached_bytes_per_s is None:
        return reading
    read_bytes = prediction.read_bytes if disk.target is Tier.HOST else prediction.moved_bytes
    copies_s = read_bytes / disk.cached_bytes_per_s
    on_cpu = disk.target is Tier.DEVICE
    cached_s = profile.compute_s + copies_s if on_cpu else max(profile.compute_s, copies_s)
    pays = cached_s < WORTHWHILE * prediction.latency_s
    return reading.model_copy(update={"from_cache": pays})
