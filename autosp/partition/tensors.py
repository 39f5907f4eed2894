"""A model's tensors as byte ranges: which of them share memory, and how to see them in another buffer.

[Note: extents] An extent is a maximal run of bytes of one storage covered by overlapping tensors. Tied parameters, and
views of a fused parameter, fall into one extent and so move together; neighbours in a big storage (a memory-mapped
checkpoint, a flat buffer) do not overlap and stay apart.

[Note: wrapped tensors] A quantised weight is a tensor subclass that wraps plain tensors (`__tensor_flatten__`): its
codes, scales and so on. Those hold the bytes, so those are what is collected, named "layer.weight:qdata"; rebinding
the `.data` of the wrapped tensor object is seen through the wrapper, which itself stays the object that it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from autosp.errors import EmptyModelError, MetaModelError, ModelError
from autosp.partition.mapped import Source

EXTENT_ALIGNMENT = 256
"""Bytes. torch's allocators align to 64 on a CPU and to 512 on an accelerator, and what cuBLAS is told of an operand's
alignment ends at 256: so kernels take the same path on a streamed tensor as on one of torch's own."""

LAYER_ALIGNMENT = 4096
"""Bytes. What O_DIRECT asks of file offsets, lengths and memory addresses."""


def align(n_bytes: int, alignment: int) -> int:
    """The least multiple of `alignment` that is at least `n_bytes`."""
    return -(-n_bytes // alignment) * alignment


@dataclass(eq=False)
class NamedTensor:
    """One tensor object that holds bytes, with every name it goes by; the first is its canonical one.

    What a wrapper holds has the wrapper's name, a colon, and the wrapper's name for it: see [Note: wrapped tensors].
    """

    tensor: torch.Tensor
    names: list[str]
    is_buffer: bool
    offset: int = 0
    """Bytes from its extent's beginning."""
    rows: tuple[int, int] | None = None
    """The run of rows that its extent holds, from and to; None if it holds all of the tensor."""

    @property
    def name(self) -> str:
        """The canonical name."""
        return self.names[0]

    def on(self, base: torch.Tensor, byte_offset: int) -> torch.Tensor:
        """This tensor, or its rows, over the bytes of `base` (uint8): its shape, strides, dtype, from `byte_offset`."""
        tensor = self.tensor
        start = (base.storage_offset() + byte_offset) // tensor.element_size()
        size = tensor.size()
        if self.rows is not None:
            begin, end = self.rows
            start += begin * tensor.stride(0)
            size = torch.Size((end - begin, *size[1:]))
        with torch.no_grad():
            return torch.empty(0, dtype=tensor.dtype, device=base.device).set_(
                base.untyped_storage(), start, size, tensor.stride()
            )


@dataclass(eq=False)
class Extent:
    """See [Note: extents]. `begin` and `end` are bytes of `storage`."""

    storage: torch.UntypedStorage
    begin: int
    end: int
    tensors: list[NamedTensor] = field(default_factory=list)
    source: Source | None = None
    """The file that it can be read from, if it was looked for and found: `mapped.locate`."""

    @property
    def n_bytes(self) -> int:
        """Bytes of the run."""
        return self.end - self.begin

    @property
    def weight_bytes(self) -> int:
        """Bytes of its tensors, wherever they are: without what precedes the first."""
        return self.n_bytes - max(0, self.tensors[0].offset)

    @property
    def is_part(self) -> bool:
        """Whether it is a run of rows, see `rows`."""
        return self.tensors[0].rows is not None

    @property
    def name(self) -> str:
        """The canonical name of its first tensor."""
        return self.tensors[0].name

    def trimmed(self) -> Extent:
        """The same tensors, without what precedes the first."""
        lead = self.tensors[0].offset
        tensors = [replace(item, offset=item.offset - lead) for item in self.tensors]
        source = self.source.part(lead, self.n_bytes - lead) if self.source else None
        return Extent(self.storage, self.begin + lead, self.end, tensors, source)

    def rows(self, begin: int, end: int) -> Extent:
        """A run of rows of its one tensor, which is contiguous; in a file if the whole is. It keeps no storage."""
        (item,) = self.tensors
        row_bytes = item.tensor.stride(0) * item.tensor.element_size()
        skipped, n_bytes = item.offset + begin * row_bytes, (end - begin) * row_bytes
        part = replace(item, offset=-begin * row_bytes, rows=(begin, end))
        source = self.source.part(skipped, n_bytes) if self.source else None
        return Extent(torch.UntypedStorage(), self.begin + skipped, self.begin + skipped + n_bytes, [part], source)

    def raw(self) -> torch.Tensor:
        """The bytes, as a uint8 view of the storage they are in."""
        return torch.empty(0, dtype=torch.uint8, device="cpu").set_(self.storage, self.begin, (self.n_bytes,), (1,))

    def release(self) -> None:
        """Let go of the storage, once the tensors are somewhere else."""
        self.storage = torch.UntypedStorage()


@dataclass
class ModelTensors:
    """All tensors of a model: in extents, or opaque (sparse, empty, an unknown subclass …: never streamed)."""

    extents: list[Extent]
    opaque: list[NamedTensor]

    @property
    def total_bytes(self) -> int:
        """Bytes of all extents; shared memory counts once."""
        return sum(extent.n_bytes for extent in self.extents)


def collect(model: nn.Module) -> ModelTensors:
    """Find every parameter and buffer, and which of them share memory.

    Raises: MetaModelError if a tensor has no data (a meta tensor, or a lazy module's), EmptyModelError if there is no
    tensor at all, ModelError if one is on an accelerator already or a parameter was made under torch.inference_mode().
    """
    named = _named_tensors(model)
    _refuse_unusable(model, named)
    plain = [item for item in named if _is_plain(item.tensor)]
    opaque = [item for item in named if not _is_plain(item.tensor)]
    return ModelTensors(_extents(plain), opaque)


def _refuse_unusable(model: nn.Module, named: list[NamedTensor]) -> None:
    meta = [item.name for item in named if item.tensor.is_meta]
    if meta:
        raise MetaModelError(
            f"{len(meta)} of {len(named)} tensors of {type(model).__name__} are on the meta device, {meta[0]} first; "
            "load the weights before autosp sees the model"
        )
    if not any(item.tensor.numel() for item in named):
        raise EmptyModelError(f"{type(model).__name__} has no parameters and no buffers: there is nothing to stream")
    elsewhere = next((item for item in named if item.tensor.device.type not in ("cpu", "meta")), None)
    if elsewhere is not None:
        raise ModelError(
            f"{elsewhere.name} is on {elsewhere.tensor.device}: autosp moves weights itself; call model.to('cpu') first"
        )
    uncounted = next((item.name for item in named if item.tensor.is_inference() and not item.is_buffer), None)
    if uncounted is not None:
        raise ModelError(
            f"{uncounted} was made under torch.inference_mode(), where torch does not count writes to a tensor; "
            "load the model outside of it (calling it there is fine)"
        )


def held_by(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that hold a tensor's bytes, by their path in it: only itself, path "", unless it is a wrapper.

    What torch.func's transforms wrap, such as the rows that vmap maps over, goes by the path of what they wrapped.
    """
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    if not is_traceable_wrapper_subclass(tensor):
        yield "", tensor
        return
    for attribute in tensor.__tensor_flatten__()[0]:
        for path, held in held_by(getattr(tensor, attribute)):
            yield f":{attribute}{path}", held


def _registered(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Every parameter and buffer under each of its names; whether it is a buffer."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, parameter, False
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield name, buffer, True


def _named_tensors(model: nn.Module) -> list[NamedTensor]:
    """Raises: MetaModelError for a lazy module's, which have no shape."""
    by_id: dict[int, NamedTensor] = {}
    for name, tensor, is_buffer in _registered(model):
        if is_lazy(tensor):
            raise MetaModelError(
                f"{name} has no shape yet: call the model once, so that its lazy modules are initialised"
            )
        for path, held in held_by(tensor):
            by_id.setdefault(id(held), NamedTensor(held, [], is_buffer)).names.append(name + path)
    return list(by_id.values())


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor.is_inference()
        and tensor.numel() > 0
    )


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes of its storage that a strided tensor touches, as [begin, end)."""
    size = tensor.element_size()
    begin = int(tensor.storage_offset()) * size
    last = sum((int(length) - 1) * int(stride) for length, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return begin, begin + (last + 1) * size


def _extents(named: Iterable[NamedTensor]) -> list[Extent]:
    by_storage: dict[int, list[NamedTensor]] = {}
    for item in named:
        by_storage.setdefault(item.tensor.untyped_storage().data_ptr(), []).append(item)
    extents: list[Extent] = []
    for items in by_storage.values():
        open_extent: Extent | None = None
        for item in sorted(items, key=lambda item: _span(item.tensor)):
            begin, end = _span(item.tensor)
            if open_extent is None or begin >= open_extent.end:
                # From a multiple of 16, so that a view of a wider dtype starts on a whole element.
                open_extent = Extent(item.tensor.untyped_storage(), begin // 16 * 16, end)
                extents.append(open_extent)
            item.offset = begin - open_extent.begin
            open_extent.end = max(open_extent.end, end)
            open_extent.tensors.append(item)
    return [extent.trimmed() if _can_be_trimmed(extent) else extent for extent in extents]


def _can_be_trimmed(extent: Extent) -> bool:
    """Whether its tensors all start on whole elements from its first tensor on, which then lies as torch's own do."""
    lead = extent.tensors[0].offset
    return lead > 0 and all(lead % item.tensor.element_size() == 0 for item in extent.tensors)


def model_fingerprint(model: nn.Module) -> str:
    """A hash of structure: classes of modules and wrappers, tensor names, shapes, dtypes, ties. Values do not count.

    Raises: MetaModelError if a lazy module has no shapes yet.
    """
    digest = hashlib.sha256()
    for path, module in model.named_modules(remove_duplicate=False):
        digest.update(f"{path}:{type(module).__qualname__}\n".encode())
    for item in _named_tensors(model):
        line = f"{'='.join(sorted(item.names))}:{tuple(item.tensor.shape)}:{item.tensor.dtype}:{item.is_buffer}\n"
        digest.update(line.encode())
    for name, tensor, _ in _registered(model):
        if is_traceable_wrapper_subclass(tensor):
            digest.update(f"{name}:{type(tensor).__qualname__}:{tuple(tensor.shape)}:{tensor.dtype}\n".encode())
    return digest.hexdigest()[:32]


def address_of(tensor: torch.Tensor) -> int | None:
    """Of its bytes; None where they are no one run."""
    return tensor.data_ptr() if tensor.layout is torch.strided else None
