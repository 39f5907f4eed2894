"""When the actions of a schedule started and ended: what the cost model predicts and what the executor measures."""

from __future__ import annotations

from dataclasses import dataclass

from autosp.schedule.actions import COMPUTES, Action, Kind

SEEN_STALL_S = 1e-4
"""A wait longer than this lets threads go to sleep and caches go cold; a shorter one costs its own time only."""


@dataclass(frozen=True, slots=True)
class Span:
    """One executed action."""

    action: Action
    period: int
    start_s: float
    end_s: float
    stall_s: float = 0.0
    """For what computes: how long compute stood still before it, waiting for its weights."""


@dataclass(frozen=True)
class Timeline:
    """Spans of several periods, and the end of each period; the first one begins at 0 s.

    A predicted timeline begins with empty buffers. Loads that come before the first period's actions belong to it.
    """

    spans: tuple[Span, ...]
    period_ends_s: tuple[float, ...]

    @property
    def cold_s(self) -> float:
        """The first period."""
        return self.period_ends_s[0]

    @property
    def steady_s(self) -> float:
        """One period in the steady state: the mean of the last two, which may alternate."""
        ends = self.period_ends_s
        return (ends[-1] - ends[-3]) / 2 if len(ends) > 2 else ends[-1] - (ends[-2] if len(ends) > 1 else 0.0)

    def stalls_s(self) -> dict[int, float]:
        """Layer -> its stall in the last period."""
        last = len(self.period_ends_s) - 1
        stalls: dict[int, float] = {}
        for span in self.spans:
            if span.period == last and span.action.kind in COMPUTES:
                layer = span.action.layers[0]
                stalls[layer] = stalls.get(layer, 0.0) + span.stall_s
        return stalls

    @property
    def computes(self) -> list[Span]:
        """The spans of what needs weights, by their begin."""
        return sorted((span for span in self.spans if span.action.kind in COMPUTES), key=lambda span: span.start_s)

    def of_kind(self, kind: Kind) -> list[Span]:
        """The spans of one kind, in their order."""
        return [span for span in self.spans if span.action.kind is kind]

    def completed(self) -> Timeline:
        """With a LOAD, at 0 s and without duration, of all that was there before, and every EVICT before the next LOAD.

        In a timeline that was cut out of a longer run, layers are evicted that were never seen to be loaded, and may be
        loaded again after something outside of it threw them away.
        """
        there: set[tuple[int, ...]] = set()
        before: list[Span] = []
        spans: list[Span] = []
        for span in sorted(self.spans, key=_moment):
            kind, layers = span.action.kind, span.action.layers
            if kind is Kind.LOAD and layers in there:
                spans.append(Span(Action(Kind.EVICT, layers, 0), span.period, span.start_s, span.start_s))
            elif kind is Kind.EVICT and layers not in there:
                before.append(Span(Action(Kind.LOAD, layers, 0), 0, 0.0, 0.0))
            if kind is Kind.LOAD:
                there.add(layers)
            elif kind is Kind.EVICT:
                there.discard(layers)
            spans.append(span)
        return Timeline((*before, *spans), self.period_ends_s)


def _moment(span: Span) -> tuple[float, bool]:
    """When it takes or frees memory; at the same time an EVICT comes before the LOAD that it makes room for."""
    frees = span.action.kind is Kind.EVICT
    return (span.end_s if frees else span.start_s), not frees
