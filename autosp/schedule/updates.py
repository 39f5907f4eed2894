"""Adds to the action list of a training pass the updates that run beside the next one: a STEP per streamed layer.

All gradients are there before the first STEP, for what comes between may need them together (clipping by their global
norm, a scaler that looks for overflow). Steps go in the order in which the next forward needs the weights, and its
first load of a layer waits for that layer's step only. Layers that stay on the device are updated at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autosp.schedule.actions import COMPUTES, Action, Kind, Ref, Schedule


def with_updates(schedule: Schedule) -> Schedule:
    """The same pass, followed by the updates of all streamed layers that have gradients."""
    sent = [action for action in schedule.actions if action.kind is Kind.GRADIENTS]
    if not sent:
        return schedule
    computes = [action for action in schedule.actions if action.kind in COMPUTES]
    waits = (computes[-1].ref, sent[-1].ref)
    trained = {action.layers[0] for action in sent}
    visited = dict.fromkeys(action.layers[0] for action in schedule.forwards)
    order = [*(layer for layer in visited if layer in trained), *sorted(trained.difference(visited))]
    steps = [Action(Kind.STEP, (layer,), 0, waits) for layer in order]
    return replace(schedule, actions=(*_after_updates(schedule.actions, order), *steps))


def _after_updates(actions: Sequence[Action], order: Sequence[int]) -> list[Action]:
    """First loads of a pass wait for the updates at the end of the pass before."""
    left = set(order)
    found: list[Action] = []
    for action in actions:
        updated = [layer for layer in order if layer in left and layer in action.layers]
        if action.kind is not Kind.LOAD or not updated:
            found.append(action)
            continue
        left.difference_update(updated)
        waits = tuple(Ref(Kind.STEP, (layer,), 0, previous_pass=True) for layer in updated)
        found.append(replace(action, waits=action.waits + waits))
    return found
