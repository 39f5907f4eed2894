"""What other studies of the same work have measured, which a new budget need not measure again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from autosp.errors import StoreError
from autosp.search.validate import Validate, is_brief
from autosp.spec import PROFILE_SCHEMA_VERSION, Candidate, Measurement, Outcome, Partition, Profile, StudyKey, Trial

if TYPE_CHECKING:
    from autosp.store import Repository


def known_profile(
    repository: Repository, key: StudyKey, partition: Partition, host_budget_bytes: int | None
) -> Profile | None:
    """The newest profile of the same work that still holds.

    The key says that model, batch, step and device are the same, with its version of torch. The profile must be of this
    version's schema and of the layers as they are found now, and know the disk if, and only if, the host has no room
    for all of them: its links are measured in another way then. For a group, it must know the memory of one.
    """

    def holds(profile: Profile) -> bool:
        knows_groups = key.group == 1 or profile.waiting_bytes is not None
        return profile.partition == partition and knows_groups and knows_links(profile, host_budget_bytes)

    return newest_profile(repository, key, holds)


def knows_links(profile: Profile, host_budget_bytes: int | None) -> bool:
    """Whether the disk was measured if, and only if, the host's budget binds."""
    return (profile.disk_link is not None) == (host_budget_bytes is not None)


def newest_profile(repository: Repository, key: StudyKey, holds: Callable[[Profile], bool]) -> Profile | None:
    """The newest profile of the same work, of this version's schema, that still holds."""
    return next((profile for _, profile in _profiles(repository, key) if holds(profile)), None)


def known_measurements(
    repository: Repository, study: str, profile: Profile, budget_bytes: int
) -> dict[Candidate, Measurement]:
    """What other studies than `study` measured on this very profile, and fits this budget, too; the newest of each.

    A trial that did not fit another budget is no evidence: under a cap of another size it may take another peak.
    """
    found: dict[Candidate, Measurement] = {}
    for name, other in _profiles(repository, repository.study_key(study)):
        if name == study or other != profile:
            continue
        for trial in _trials(repository, name):
            measured = trial.measurement
            if measured.outcome is Outcome.FITS and measured.peak_bytes <= budget_bytes:
                found.setdefault(trial.prediction.candidate, measured)
    return found


def unless_known(known: dict[Candidate, Measurement], validate: Validate) -> Validate:
    """Answers with what is known of a candidate, once, and in no time: asked again, the device is.

    What was hopeless beside another study's best, and was timed briefly, is measured where it is not hopeless.
    """

    def answer(candidate: Candidate, hopeless_s: float = math.inf) -> Measurement:
        measured = known.pop(candidate, None)
        if measured is None or (is_brief(measured) and measured.latency_s <= hopeless_s):
            return validate(candidate, hopeless_s)
        return measured.model_copy(update={"taken_s": 0.0})

    return answer


def _profiles(repository: Repository, key: StudyKey) -> Iterator[tuple[str, Profile]]:
    for name in repository.siblings(key):
        try:
            profile = repository.profile(name)
        except StoreError:  # written by another version of autosp
            continue
        if profile is not None and profile.schema_version == PROFILE_SCHEMA_VERSION:
            yield name, profile


def _trials(repository: Repository, name: str) -> list[Trial]:
    try:
        return repository.trials(name)
    except StoreError:  # written by another version of autosp
        return []
