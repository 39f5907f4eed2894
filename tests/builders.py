"""Tiny records for the tests that need no torch, and Hypothesis strategies that make them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from autosp.cost_model.predict import predict
from autosp.schedule.actions import Action, Kind, Ref, Schedule
from autosp.spec import (
    PROFILE_SCHEMA_VERSION,
    BackwardProfile,
    Block,
    Candidate,
    DeviceInfo,
    Layer,
    LayerProfile,
    Leaf,
    LinkProfile,
    Measurement,
    Outcome,
    Partition,
    Plan,
    Prediction,
    Profile,
    StudyKey,
    Tier,
    Trial,
)

thorough = settings(
    max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
"""The same examples in every run, and no time limit on a busy machine."""

quick = settings(thorough, max_examples=30)
"""For properties that rank whole plan spaces."""


def device(kind: str = "cuda") -> DeviceInfo:
    """The machine of a profile. On a "cpu" some of a budget is left free, elsewhere none."""
    return DeviceInfo(
        kind=kind,
        name="a device",
        slow_tier=Tier.DISK if kind == "cpu" else Tier.HOST,
        memory_bytes=2**40,
        torch_version="2.13.0",
        fingerprint="d" * 32,
    )


def partition(
    layer_bytes: Sequence[int],
    visits: Sequence[int] | None = None,
    *,
    repeats: int = 1,
    resident_bytes: int = 0,
    head: range | None = None,
    read_bytes: Sequence[int] | None = None,
) -> Partition:
    """Layers of these sizes; visited once each, in order, unless `visits` says otherwise.

    Those in `head` are runs of one weight's rows, 256 each. `read_bytes`: of each from disk, default: its size.
    """

    def layer(index: int, n_bytes: int, disk_bytes: int | None) -> Layer:
        sizes = {"index": index, "n_bytes": n_bytes, "disk_bytes": disk_bytes}
        if head is None or index not in head:
            return Layer(name=f"blocks.{index}", tensors=(f"blocks.{index}.weight",), **sizes)
        begin = 256 * (index - head[0])
        name = f"head[{begin}:{begin + 256}]"
        return Layer(name=name, tensors=("head.weight",), rows=(begin, begin + 256), **sizes)

    of_disk = [None] * len(layer_bytes) if read_bytes is None else read_bytes
    return Partition(
        layers=tuple(map(layer, range(len(layer_bytes)), layer_bytes, of_disk)),
        leaves=(Leaf(path="head", inputs=("float32[1,8]",)),) if head else (),
        resident_tensors=("embedding.weight",) if resident_bytes else (),
        resident_bytes=resident_bytes,
        visits=tuple(range(len(layer_bytes)) if visits is None else visits),
        repeats=repeats,
    )


def link(
    *,
    bytes_per_s: float,
    latency_s: float = 0.0,
    link_slowdown: float = 1.0,
    compute_slowdown: float = 1.0,
    source: Tier = Tier.HOST,
) -> LinkProfile:
    """A link of a profile; without `_slowdown`s transfers and compute do not disturb each other."""
    return LinkProfile(
        source=source,
        target=Tier.DEVICE if source is Tier.HOST else Tier.HOST,
        latency_s=latency_s,
        bytes_per_s=bytes_per_s,
        link_slowdown=link_slowdown,
        compute_slowdown=compute_slowdown,
        points=(),
    )


def profile(
    layer_bytes: Sequence[int],
    visits: Sequence[int] | None = None,
    *,
    forward_s: Sequence[float] | float = 1.0,
    before_s: Sequence[float] | float = 0.0,
    tail_s: float = 0.0,
    repeats: int = 1,
    resident_bytes: int = 0,
    workspace_bytes: int = 0,
    bytes_per_s: float = 1.0,
    latency_s: float = 0.0,
    link_slowdown: float = 1.0,
    compute_slowdown: float = 1.0,
    least_compute_s: float | None = None,
    wake_s: float = 0.0,
    kind: str = "cuda",
    disk: LinkProfile | None = None,
    read_bytes: Sequence[int] | None = None,
) -> Profile:
    """A profile whose least-memory plan was observed to take exactly what the memory formula says.

    Unless `least_compute_s` says so, no visit was ever faster than its median.
    """
    parts = partition(layer_bytes, visits, repeats=repeats, resident_bytes=resident_bytes, read_bytes=read_bytes)
    count = len(parts.visits)
    forwards = [forward_s] * count if isinstance(forward_s, float) else forward_s
    befores = [before_s] * count if isinstance(before_s, float) else before_s
    least = Candidate(k=1, k_prime=1)
    least_peak = max(layer_bytes) + resident_bytes + workspace_bytes
    compute_s = (sum(forwards) + sum(befores)) * repeats + tail_s
    return Profile(
        schema_version=PROFILE_SCHEMA_VERSION,
        model_name="Tiny",
        model_fingerprint="m" * 32,
        batch_signature="float32[1,8]",
        mode="inference",
        device=device(kind),
        partition=parts,
        visits=tuple(
            LayerProfile(layer=layer, before_s=before, forward_s=forward, peak_bytes=0, output_bytes=0)
            for layer, before, forward in zip(parts.visits, befores, forwards, strict=True)
        ),
        tail_s=tail_s,
        least_compute_s=compute_s if least_compute_s is None else least_compute_s,
        links=(
            link(
                bytes_per_s=bytes_per_s,
                latency_s=latency_s,
                link_slowdown=link_slowdown,
                compute_slowdown=compute_slowdown,
            ),
            *([disk] if disk else []),
        ),
        workspace_bytes=workspace_bytes,
        wake_s=wake_s,
        observed=trial(prediction(least, peak_bytes=least_peak), peak_bytes=least_peak),
    )


def trained(
    measured: Profile,
    backward: tuple[int, ...],
    *,
    backward_s: list[float],
    recompute_s: list[float],
    before_s: list[float] | None = None,
    kept: list[tuple[int, int]] | None = None,
    return_bytes_per_s: float = 1.0,
) -> Profile:
    """The profile, of training: all layers have gradients as large as they are. `kept`: activations and inputs."""
    parts = measured.partition
    layers = tuple(layer.model_copy(update={"gradient_bytes": layer.n_bytes}) for layer in parts.layers)
    back = link(bytes_per_s=return_bytes_per_s).model_copy(update={"source": Tier.DEVICE, "target": Tier.HOST})
    befores = before_s or [0.0] * len(backward)
    times = zip(backward, befores, recompute_s, backward_s, strict=True)
    sizes = kept or [(0, 0)] * len(parts.visits)
    least = Candidate(k=1, k_prime=1, recompute=tuple(sorted(set(backward))))
    offloadable = tuple(n_bytes for n_bytes, _ in sizes)
    changes = {"layers": layers, "backward": backward, "repeats": 1, "activation_bytes": offloadable}
    found = measured.model_copy(
        update={
            "mode": "training",
            "partition": parts.model_copy(update=changes),
            "visits": tuple(
                visit.model_copy(update={"kept_bytes": all_of_it, "input_bytes": inputs})
                for visit, (all_of_it, inputs) in zip(measured.visits, sizes, strict=True)
            ),
            "backward": tuple(
                BackwardProfile(layer=layer, before_s=before, recompute_s=again, backward_s=own)
                for layer, before, again, own in times
            ),
            "links": (measured.link, back),
        }
    )
    found = found.model_copy(update={"least_compute_s": found.compute_s})
    (prediction,) = predict(found, [least])
    return found.model_copy(update={"observed": trial(prediction)})


def prediction(
    candidate: Candidate, *, latency_s: float = 1.0, stall_s: float = 0.0, peak_bytes: int = 0, moved_bytes: int = 0
) -> Prediction:
    """What a cost model might have said."""
    return Prediction(
        candidate=candidate, latency_s=latency_s, stall_s=stall_s, moved_bytes=moved_bytes, peak_bytes=peak_bytes
    )


def measurement(
    *, latency_s: float = 1.0, peak_bytes: int = 0, outcome: Outcome = Outcome.FITS, moved_bytes: int = 0
) -> Measurement:
    """What a device might have said; a trial without an output to trust has no samples."""
    timed = outcome in (Outcome.FITS, Outcome.OVER_BUDGET)
    return Measurement(
        outcome=outcome,
        latency_s=latency_s if timed else 0.0,
        samples_s=(latency_s,) * 3 if timed else (),
        cold_latency_s=latency_s if timed else 0.0,
        peak_bytes=peak_bytes,
        moved_bytes=moved_bytes,
        misses=0,
    )


def trial(
    predicted: Prediction,
    *,
    latency_s: float | None = None,
    peak_bytes: int | None = None,
    outcome: Outcome = Outcome.FITS,
    number: int = 0,
) -> Trial:
    """A validated prediction, measured just as predicted unless said otherwise."""
    measured = measurement(
        latency_s=predicted.latency_s if latency_s is None else latency_s,
        peak_bytes=predicted.peak_bytes if peak_bytes is None else peak_bytes,
        outcome=outcome,
    )
    return Trial(number=number, prediction=predicted, measurement=measured)


def study_key(**changes: Any) -> StudyKey:
    """What a study of `profile`'s model on its machine was made for."""
    fields: dict[str, Any] = {
        "model_name": "Tiny",
        "model_fingerprint": "m" * 32,
        "device_fingerprint": "d" * 32,
        "batch_signature": "float32[1,8]",
        "step": "call",
        "mode": "inference",
        "budget_bytes": 10**9,
    }
    return StudyKey(**(fields | changes))


def plan(chosen: Trial, measured: Profile, *, budget_bytes: int, study_name: str = "tiny") -> Plan:
    """The answer of a study, of which a trial was the best."""
    return Plan(
        autosp_version="0.1.0",
        torch_version=measured.device.torch_version,
        created_at="2025-01-01T00:00:00+00:00",
        study_name=study_name,
        mode=measured.mode,
        model_name=measured.model_name,
        model_fingerprint=measured.model_fingerprint,
        batch_signature=measured.batch_signature,
        device=measured.device,
        budget_bytes=budget_bytes,
        partition=measured.partition,
        candidate=chosen.prediction.candidate,
        prediction=chosen.prediction,
        measurement=chosen.measurement,
    )


def load(layers: tuple[int, ...], offset: int | None, *waits: Ref, occurrence: int = 0) -> Action:
    """A LOAD, by hand."""
    return Action(Kind.LOAD, layers, occurrence, waits, offset)


def forward(layer: int, *waits: Ref, occurrence: int = 0) -> Action:
    """A FORWARD, by hand."""
    return Action(Kind.FORWARD, (layer,), occurrence, waits)


def read(layers: tuple[int, ...], offset: int | None, *waits: Ref, occurrence: int = 0) -> Action:
    """A READ, by hand."""
    return Action(Kind.READ, layers, occurrence, waits, offset)


def evict(layers: tuple[int, ...], *waits: Ref, occurrence: int = 0) -> Action:
    """An EVICT, by hand."""
    return Action(Kind.EVICT, layers, occurrence, waits)


def schedule(
    *actions: Action, cold: tuple[Action, ...] = (), arena_bytes: int, residents: tuple[int, ...] = ()
) -> Schedule:
    """A schedule, by hand."""
    return Schedule(actions, cold, residents, arena_bytes)


@dataclass(frozen=True)
class Case:
    """What `lower` and `build_ring` are given."""

    candidate: Candidate
    layer_bytes: tuple[int, ...]
    visits: tuple[int, ...]
    read_bytes: tuple[int, ...] | None = None

    @property
    def streamed(self) -> tuple[int, ...]:
        """Visited layers that are not resident, in the order of their first visit."""
        return tuple(layer for layer in dict.fromkeys(self.visits) if layer not in self.candidate.residents)

    @property
    def visited_once(self) -> bool:
        """Whether no layer is visited twice in a period."""
        return len(set(self.visits)) == len(self.visits)


@st.composite
def orders(draw: st.DrawFn, layers: int, *, once: bool = False) -> tuple[int, ...]:
    """Visits of some of the layers, at least one: in any order, and again and again unless `once`."""
    distinct = draw(st.lists(st.integers(0, layers - 1), min_size=1, max_size=layers, unique=True))
    again = [] if once else draw(st.lists(st.sampled_from(distinct), max_size=4))
    return tuple(draw(st.permutations([*distinct, *again])))


@st.composite
def candidates(draw: st.DrawFn, visited: Sequence[int], *, disk_of: int = 0) -> Candidate:
    """Any setting that `autosp.plan` would accept for these visited layers.

    `disk_of`: of how many layers in all some may rest on disk; 0 for a machine of two tiers.
    """
    distinct = list(dict.fromkeys(visited))
    residents = draw(st.lists(st.sampled_from(distinct), max_size=len(distinct), unique=True))
    ring = draw(st.integers(1, max(1, len(distinct) - len(residents))))
    k_prime = draw(st.integers(1, ring))
    everything = len(residents) == len(distinct)
    candidate = Candidate(
        k=len(residents) + (0 if everything else ring), k_prime=k_prime, residents=tuple(sorted(residents))
    )
    return draw(on_disk(candidate, visited, disk_of)) if disk_of else candidate


@st.composite
def on_disk(draw: st.DrawFn, candidate: Candidate, visited: Sequence[int], layers: int) -> Candidate:
    """The candidate with any of its groups, and any layer that is never visited, on disk."""
    never = [(layer,) for layer in sorted(set(range(layers)).difference(visited))]
    pool = [*candidate.groups(visited), *never]
    chosen = draw(st.lists(st.sampled_from(pool), max_size=len(pool), unique=True)) if pool else []
    resting = tuple(sorted(layer for group in chosen for layer in group))
    return candidate.model_copy(update={"on_disk": resting, "read_ahead": draw(st.integers(1, 4)) if resting else 0})


@st.composite
def blocks(draw: st.DrawFn, visits: Sequence[int], backward: Sequence[int]) -> tuple[Block, ...]:
    """Some blocks of a training pass: runs of layers that it visits once, and backward in the reverse order."""
    found: list[Block] = []
    begin = 0
    while begin < len(visits):
        end = begin + draw(st.integers(1, 4))
        layers = tuple(visits[begin:end])
        reverse = layers[::-1]
        once = all(visits.count(layer) == backward.count(layer) == 1 for layer in layers)
        if once and any(tuple(backward[at:])[: len(reverse)] == reverse for at in range(len(backward))):
            found.append(Block(path=f"blocks.{begin}", layers=layers))
        begin = end
    return tuple(found)


@st.composite
def recomputed(draw: st.DrawFn, parts: Partition) -> tuple[int, ...]:
    """Layers to compute again, blocks as a whole."""
    units = parts.recomputable
    chosen = draw(st.lists(st.sampled_from(units), unique=True)) if units else []
    return tuple(sorted(layer for unit in chosen for layer in unit))


sizes = st.integers(1, 40)
"""Bytes of a layer."""


def over_read(layer_bytes: Sequence[int]) -> st.SearchStrategy[tuple[int, ...]]:
    """What is read of layers of these sizes: themselves, and what is beside them in their files."""
    return st.tuples(*(st.integers(0, 8).map(n_bytes.__add__) for n_bytes in layer_bytes))


@st.composite
def cases(draw: st.DrawFn, *, once: bool = False, disk: bool = False) -> Case:
    """Any candidate on any small model; with `disk`, of three tiers."""
    layer_bytes = tuple(draw(st.lists(sizes, min_size=1, max_size=8)))
    visits = draw(orders(len(layer_bytes), once=once))
    read_bytes = draw(over_read(layer_bytes)) if disk else None
    return Case(draw(candidates(visits, disk_of=len(layer_bytes) if disk else 0)), layer_bytes, visits, read_bytes)


seconds = st.integers(1, 50).map(lambda tenths: tenths / 10)
"""Compute of a visit."""


@st.composite
def profiles(draw: st.DrawFn, *, contention: bool = False, max_layers: int = 7, disk: bool = False) -> Profile:
    """A small model on any machine; with `disk`, of three tiers.

    Without `contention` compute and links do not slow each other down.
    """
    layer_bytes = draw(st.lists(sizes, min_size=1, max_size=max_layers))
    visits = draw(orders(len(layer_bytes)))
    count = len(visits)
    slowdowns = st.integers(10, 20).map(lambda tenths: tenths / 10) if contention else st.just(1.0)
    rates, latencies = st.sampled_from([0.5, 3.0, 10.0, 50.0, 1000.0]), st.sampled_from([0.0, 0.1, 1.0])
    behind = link(
        source=Tier.DISK,
        bytes_per_s=draw(rates) if disk else 1.0,
        latency_s=draw(latencies) if disk else 0.0,
        link_slowdown=draw(slowdowns) if disk else 1.0,
        compute_slowdown=draw(slowdowns) if disk else 1.0,
    )
    return profile(
        layer_bytes,
        visits,
        forward_s=draw(st.lists(seconds, min_size=count, max_size=count)),
        before_s=draw(st.lists(st.sampled_from([0.0, 0.1, 1.0]), min_size=count, max_size=count)),
        tail_s=draw(st.sampled_from([0.0, 0.5, 4.0])),
        repeats=draw(st.integers(1, 3)),
        resident_bytes=draw(st.integers(0, 30)),
        workspace_bytes=draw(st.integers(0, 30)),
        bytes_per_s=draw(rates),
        latency_s=draw(latencies),
        link_slowdown=draw(slowdowns),
        compute_slowdown=draw(slowdowns),
        wake_s=draw(st.sampled_from([0.0, 0.2])) if contention else 0.0,
        disk=behind if disk else None,
        read_bytes=draw(over_read(layer_bytes)) if disk else None,
    )


def candidates_of(measured: Profile) -> st.SearchStrategy[Candidate]:
    """Any setting for a profile; with layers on disk where it knows the disk."""
    parts = measured.partition
    return candidates(parts.visits, disk_of=len(parts.layers) if measured.disk_link else 0)


any_profiles = st.booleans().flatmap(lambda disk: profiles(contention=True, disk=disk))
"""Of two tiers or three."""
