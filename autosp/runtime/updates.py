"""Updates of streamed weights that run beside the next forward pass.

[Note: updates under way] `optimizer.step()` updates what stays on the device, and returns. Streamed layers are updated
after that, on a thread of the host, one after another in the order in which the next forward needs them; a layer is
loaded once its own update is over. An update is the user's own optimizer, with the options of that moment, over
stand-ins that share memory with a layer's parameters, with their gradients, and with their entries in its state (or,
see [Note: state on disk], that have copies of these): the bits are those of a step over all at once, if the optimizer
treats every parameter by itself.

Until its update is over, and its state rests again, a parameter is guarded: whatever uses it, its gradient or its entry
in the optimizer's state, waits for all updates first. Two things are not seen: a view that was made of its data or
gradient before `step()`, and an iteration over the values of `optimizer.state`, for which there is `state_dict()`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial, wraps
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from autosp.devices import Device
from autosp.errors import SettingError
from autosp.intercept import to_its_end
from autosp.partition import BoundLayer
from autosp.partition.placed import tensors_of
from autosp.runtime.disk_state import DiskState
from autosp.runtime.guarded import guarded
from autosp.runtime.layer_update import Failure, LayerUpdate
from autosp.runtime.recorder import Recorder
from autosp.runtime.stepwise import alone, options_of


class _Inside:
    """Within, what is done to guarded parameters does not touch their data, nor their gradients'."""

    def __init__(self) -> None:
        self.depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1


class Updates:
    """Those of one model. Nothing is ever under way unless an optimizer is watched."""

    def __init__(self, device: Device, recorder: Recorder) -> None:
        self._device = device
        self._recorder = recorder
        self._optimizer: Optimizer | None = None
        self._layer_of: dict[int, int] = {}
        self._order: dict[int, int] = {}
        self._pending: dict[int, LayerUpdate] = {}
        """Layer -> its update, in their order."""
        self._aside: list[tuple[nn.Parameter, torch.Tensor]] = []
        """Gradients that `step()` must not see."""
        self.inside = _Inside()
        self._class = guarded(self._before_use)
        self._hooks: list[Any] = []
        self._before: Any = None
        self._methods: list[_ZeroGrad | _Step] = []
        self._disk: DiskState | None = None

    def watch(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        layers: Sequence[BoundLayer],
        order: Sequence[int],
        disk: DiskState | None = None,
    ) -> None:
        """Update these streamed layers beside passes, in that order. `check_optimizer` has no objections.

        `disk` has the state of some of them from now on, see [Note: state on disk]. Raises: TierError.
        """
        if disk is not None:
            disk.rest(optimizer)
        self._disk = disk
        self._optimizer = optimizer
        self._order = {layer: number for number, layer in enumerate(order)}
        for layer in layers:
            if layer.leaf is None and layer.layer.index in self._order:
                plain = (one.tensor for one in tensors_of(layer.placed) if type(one.tensor) is nn.Parameter)
                self._layer_of |= {id(parameter): layer.layer.index for parameter in plain}
        after = optimizer.register_step_post_hook(self._start)
        optimizer._optimizer_step_post_hooks.move_to_end(after.id, last=False)  # type: ignore[attr-defined]
        saving = optimizer.register_state_dict_pre_hook(lambda _: self.settle())
        loading = optimizer.register_load_state_dict_pre_hook(lambda *_: self.settle())
        loaded = optimizer.register_load_state_dict_post_hook(self._rest)
        self._hooks = [after, saving, loading, loaded]
        self._before = optimizer.register_step_pre_hook(self._take)
        self._methods = [*(_ZeroGrad(one, self) for one in (optimizer, model)), _Step(optimizer, self)]

    # -- what a pass asks -----------------------------------------------------------------------------------------

    def due(self, layers: Collection[int]) -> Any:
        """The job after which the weights of these layers are updated, if that is under way."""
        jobs = [update.job for layer, update in self._pending.items() if layer in layers]
        return jobs[-1] if jobs else None

    def finish(self, layer: int) -> None:
        """Wait for a layer's update. Raises: what an update before it, or its own, raised; once."""
        update = self._pending.get(layer)
        if update is None:
            return
        update.settle()  # Ctrl-C comes here, if it comes: the update is still to be finished then
        assert self._optimizer is not None
        self._recorder.updated(layer, update.job)
        update.give_back(self._optimizer)
        del self._pending[layer]
        update.raise_once()

    # -- what the user asks ---------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Wait for all updates. Raises: what the first that failed raised."""
        failed: BaseException | None = None
        for layer in list(self._pending):
            try:
                self.finish(layer)
            except BaseException as error:  # noqa: BLE001 - the others are to be waited for
                failed = failed or error
        if failed is not None:
            raise failed

    def give_back(self) -> None:
        """What a step put aside that raised before it came to its end."""
        for parameter, gradient in self._aside:
            if parameter.grad is None:
                parameter.grad = gradient
        self._aside = []

    def forget_aside(self) -> None:
        """Gradients are no longer wanted."""
        self._aside = []

    def close(self) -> None:
        """Let the optimizer go. Raises: as `settle`."""
        for hook in self._hooks:
            hook.remove()
        if self._before is not None:
            self._before.remove()
        for method in self._methods:
            method.remove()
        self._hooks, self._before, self._methods = [], None, []
        try:
            to_its_end(self.settle)
        finally:
            self.give_back()
            self._layer_of, self._optimizer, self._disk = {}, None, None

    def _before_use(self) -> None:
        if not self.inside.depth:
            self.settle()

    # -- around the user's step -----------------------------------------------------------------------------------

    def _take(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a step: parameters without gradients are left alone by it."""
        if any(one is not None for one in (*args[1:], *kwargs.values())):
            raise SettingError(
                f"{type(optimizer).__name__}.step(closure) cannot be overlapped: call backward() before step(), or "
                "apply the plan without optimizer="
            )
        self.settle()
        self.give_back()
        hooks = optimizer._optimizer_step_pre_hooks
        if next(reversed(hooks)) != self._before.id:  # somebody registered a hook since, that may look at gradients
            return
        if any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf")):
            return  # a scaler's own tensors, which it changes as soon as step() returns
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in self._layer_of and parameter.grad is not None:
                    self._aside.append((parameter, parameter.grad))
                    parameter.grad = None

    def _start(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """After it, before anybody else looks: the updates begin."""
        gradients = {id(parameter): gradient for parameter, gradient in self._aside}
        self.give_back()
        updates = self._prepare(optimizer, gradients)
        n_threads = torch.get_num_threads()
        for layer, update in updates.items():
            increment_version([parameter for parameter, _ in update.parameters])
            self._ask_for(layer, update, n_threads)
        self._pending = updates
        for update in updates.values():
            for parameter, _ in update.parameters:
                parameter.__class__ = self._class
        self._before.remove()
        self._before = optimizer.register_step_pre_hook(self._take)  # the last of all
        if not updates:  # the step was taken at once, in the file's map
            self._rest(optimizer)

    def _ask_for(self, layer: int, update: LayerUpdate, n_threads: int) -> None:
        assert self._optimizer is not None
        update.enter_state(self._optimizer)
        if self._disk is not None:
            update.move = self._disk.begin(layer, self._optimizer, update.parameters, update.optimizer)
        if update.move is None:
            update.share_state()
        update.job = self._device.work(partial(update.run, n_threads))
        if self._disk is not None and update.move is not None:
            self._disk.end(update.move, update.job)

    def _rest(self, optimizer: Optimizer) -> None:
        """Entries of its state that came to be in RAM."""
        if self._disk is not None:
            self._disk.rest(optimizer)

    def _prepare(self, optimizer: Optimizer, gradients: dict[int, torch.Tensor]) -> dict[int, LayerUpdate]:
        """One update per layer, in their order. Options may change while they wait, those in tensors in place."""
        failure = Failure()
        found: dict[int, LayerUpdate] = {}
        for group in optimizer.param_groups:
            options = options_of(group)
            groups: dict[int, dict[str, Any]] = {}
            for parameter in group["params"]:
                if id(parameter) not in gradients:
                    continue
                layer = self._layer_of[id(parameter)]
                if layer not in found:
                    found[layer] = LayerUpdate(alone(optimizer), failure)
                if layer not in groups:
                    groups[layer] = {**options, "params": []}
                    found[layer].optimizer.param_groups.append(groups[layer])
                stand_in = nn.Parameter(parameter.data)
                stand_in.grad = gradients[id(parameter)]
                groups[layer]["params"].append(stand_in)
                found[layer].parameters.append((parameter, stand_in))
        return dict(sorted(found.items(), key=lambda item: self._order[item[0]]))


class _Step:
    """An optimizer's `step`, which leaves gradients where they were if it raises."""

    def __init__(self, optimizer: Optimizer, updates: Updates) -> None:
        own = optimizer.step
        self._attributes = optimizer.__dict__
        self._before = {"step": own} if "step" in self._attributes else {}  # a scheduler's wrapper, say

        @wraps(own)
        def step(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            try:
                return own(*args, **kwargs)
            except BaseException:
                updates.give_back()
                raise

        self._method = MethodType(step, optimizer)  # whose function schedulers look for
        self._attributes["step"] = self._method

    def remove(self) -> None:
        """Give the optimizer its own back; where somebody's wrapper is around this one, it stays, and does nothing."""
        if self._attributes.get("step") is self._method:
            del self._attributes["step"]
            self._attributes |= self._before


class _ZeroGrad:
    """A model's or an optimizer's `zero_grad`, which waits for no update where it only lets gradients go."""

    def __init__(self, owner: Any, updates: Updates) -> None:
        self._owner = owner
        self._own = owner.zero_grad
        self._updates = updates
        owner.__dict__["zero_grad"] = self

    def __call__(self, set_to_none: bool = True) -> None:
        self._updates.forget_aside()
        if not set_to_none:
            self._own(set_to_none=False)
            return
        with self._updates.inside:
            self._own(set_to_none=True)

    def remove(self) -> None:
        """Give the owner its own back."""
        if self._owner.__dict__.get("zero_grad") is self:
            del self._owner.__dict__["zero_grad"]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model gets its class's."""
        return getattr, (self._owner, "zero_grad")
