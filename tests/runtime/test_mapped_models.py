"""Models mapped from safetensors files, streamed from those: an ordinary model's outputs, writes, saves and memory."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autosp
from autosp.batch import call, equal
from autosp.devices.memory import status_bytes
from autosp.errors import ReadError
from autosp.settings import settings
from autosp.spec import Outcome
from autosp.tiers import forget_pages
from mapped_models import map_weights, mapped_llama, mapped_stack
from models import tokens, vectors

pytest.importorskip("safetensors")

Stream = Callable[..., autosp.StreamedModel[nn.Module]]

PLANS = [(1, 1, 0), (2, 1, 0), (4, 2, 0), (6, 1, 3), (8, 3, 2)]


def plain(model: nn.Module, batch: Any) -> Any:
    with torch.no_grad():
        return call(model, batch)


def sources(streamed: autosp.StreamedModel[nn.Module]) -> list[Any]:
    """Where every weight lies in its file."""
    bound = streamed._bound
    placed = [*(place for layer in bound.stored() for place in layer.placed), *bound.residents]
    return [place.extent.source for place in placed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_llama_in_shards_is_read_in_place_bitwise_right(dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = mapped_llama(tmp_path / "llama", dtype)
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 1
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    batches = [{"input_ids": tokens(2, 9)}, {"input_ids": tokens(1, 5)}]
    expected = [plain(model, batch) for batch in batches]
    for k, k_prime, residents in PLANS:
        plan = autosp.plan(model, batches[0], k=k, k_prime=k_prime, residents=residents, device="cpu")
        streamed = autosp.apply(model, plan)
        layers = [bound.layout for bound in streamed._bound.layers]
        assert not any(layout.packed for layout in layers)
        for _ in range(2):
            for batch, output in zip(batches, expected, strict=True):
                assert equal(model(**batch), output)
        streamed.remove()
        extents = sum(len(layout.placed) for layout in layers)
        weights = sum(place.extent.n_bytes for layout in layers for place in layout.placed)
        moved = streamed.stats().moved_bytes
        assert 0 < moved <= 4 * (weights + 12288 * extents) + sum(sorted(layout.n_bytes for layout in layers)[-k:])
        assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
        assert equal(plain(model, batches[0]), expected[0])
    assert not settings().cache_dir.exists()


def test_tune_finds_a_plan_without_writing_a_byte(tmp_path: Path) -> None:
    model, batch = mapped_stack(tmp_path / "weights")
    expected = plain(model, batch)
    plan = autosp.tune(model, batch, "300MB", device="cpu", max_trials=2, progress=False)
    assert plan.measurement
    assert plan.measurement.outcome is Outcome.FITS
    with autosp.apply(model, plan):
        assert equal(model(batch), expected)
    assert [path.name for path in settings().cache_dir.iterdir()] == ["locks"]


def test_a_plan_for_ram_streams_the_mapped_model(tmp_path: Path) -> None:
    model, batch = mapped_stack(tmp_path / "weights")
    ram = type(model)()
    ram.load_state_dict(model.state_dict())
    expected = plain(model, batch)
    plan = autosp.plan(ram, batch, k=3, k_prime=1, residents=1, device="cpu")
    for either in (model, ram):
        with autosp.apply(either, plan):
            assert equal(either(batch), expected)


def test_new_weights_at_rest_are_used_and_the_file_is_not_changed(stream: Stream, tmp_path: Path) -> None:
    model, batch = mapped_stack(tmp_path / "weights")
    content = (tmp_path / "weights").read_bytes()
    torch.manual_seed(1)
    other = type(model)()
    streamed = stream(model, batch)
    for scale in (1, 2):
        model(batch)
        model.load_state_dict({name: tensor * scale for name, tensor in other.state_dict().items()})
        twin = type(model)()
        twin.load_state_dict(model.state_dict())
        for _ in range(2):
            assert equal(model(batch), plain(twin, batch))
    streamed.remove()
    assert equal(dict(model.state_dict()), dict(twin.state_dict()))
    assert equal(plain(model, batch), plain(twin, batch))
    assert (tmp_path / "weights").read_bytes() == content


@pytest.mark.parametrize(
    "write",
    [
        lambda tensor: tensor.data.mul_(2),
        lambda tensor: tensor.detach().numpy().fill(0.01),
        lambda tensor: tensor.data.view(-1)[-1:].add_(1),
    ],
    ids=[".data", "numpy", "one element"],
)
def test_writes_that_no_version_counter_sees(
    write: Callable[[torch.Tensor], Any], stream: Stream, tmp_path: Path
) -> None:
    model, batch = mapped_stack(tmp_path / "weights")
    stream(model, batch)
    model(batch)
    for parameter in model.parameters():
        write(parameter)
    twin = type(model)()
    twin.load_state_dict(model.state_dict())
    for _ in range(2):
        assert equal(model(batch), plain(twin, batch))


class Growing(nn.Linear):
    """Adds one to its weight in every call, once it is told to."""

    writes = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = super().forward(x)
        if self.writes:
            self.weight.add_(1)
        return output


class Twice(nn.Module):
    """Calls its layers twice per pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64), Growing(64, 64), nn.Linear(64, 64)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.layers, *self.layers):
            x = torch.tanh(layer(x))
        return x


def test_what_a_pass_writes_is_in_its_next_load(tmp_path: Path) -> None:
    model, twin = Twice(), Twice()
    map_weights(model, tmp_path / "weights")
    twin.load_state_dict(model.state_dict())
    for k in (1, 2, 3):
        plan = autosp.plan(model, vectors(), k=k, k_prime=1, device="cpu")
        with autosp.apply(model, plan):
            model.layers[1].writes = twin.layers[1].writes = True
            for _ in range(3):
                assert equal(model(vectors()), plain(twin, vectors()))
            model.layers[1].writes = twin.layers[1].writes = False
    assert equal(dict(model.state_dict()), dict(twin.state_dict()))


def test_an_adapter_added_and_merged_while_applied(stream: Stream, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("transformers")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    batch = {"input_ids": tokens(2, 9)}
    model, twin = mapped_llama(tmp_path / "llama"), mapped_llama(tmp_path / "llama")
    stream(model, batch)
    model(**batch)
    adapted = []
    for base in (model, twin):
        torch.manual_seed(1)
        adapted.append(peft.get_peft_model(base, config).eval())
    assert equal(adapted[0](**batch), plain(adapted[1], batch))
    adapted[0].merge_adapter()
    adapted[1].merge_adapter()
    assert equal(adapted[0](**batch), plain(adapted[1], batch))


def test_saving_at_rest(stream: Stream, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model, batch = mapped_llama(tmp_path / "llama"), {"input_ids": tokens(2, 9)}
    expected = plain(model, batch)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stream(model, batch)
    model(**batch)
    assert equal(dict(model.state_dict()), state)
    model.save_pretrained(tmp_path / "saved")
    assert equal(plain(mapped_llama(tmp_path / "saved"), batch), expected)


def test_residents_go_back_to_the_map_unless_they_were_written(tmp_path: Path) -> None:
    model, batch = mapped_stack(tmp_path / "weights")
    plan = autosp.plan(model, batch, k=8, k_prime=1, residents=7, device="cpu")
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    streamed = autosp.apply(model, plan)
    resident = [name for name, parameter in model.named_parameters() if parameter.data_ptr() != before[name]]
    assert len(resident) > 6
    model(batch)
    written = dict(model.named_parameters())[resident[5]]
    written.data.view(-1)[3] = 7
    streamed.remove()
    assert written.view(-1)[3] == 7
    moved = [name for name, parameter in model.named_parameters() if parameter.data_ptr() != before[name]]
    assert moved == [resident[5]]


def test_a_lookup_table_is_read_where_it_is_mapped(stream: Stream, tmp_path: Path) -> None:
    model, batch = mapped_stack(tmp_path / "weights")
    address = model.embed.weight.data_ptr()
    few = batch[:1, :4]
    expected = plain(model, few)
    streamed = stream(model, few)
    assert streamed._bound.lookups
    assert equal(model(few), expected)
    assert model.embed.weight.data_ptr() == address


@pytest.mark.parametrize("fault", ["truncated", "written"])
def test_a_file_that_changes_while_applied_ends_the_pass_before_it_computes(
    fault: str, stream: Stream, tmp_path: Path
) -> None:
    model, batch = mapped_stack(tmp_path / "weights")
    streamed = stream(model, batch)
    expected = model(batch)
    calls: list[nn.Module] = []
    hook = model.head.register_forward_hook(lambda module, *_: calls.append(module))
    content = (tmp_path / "weights").read_bytes()
    with (tmp_path / "weights").open("r+b") as file:
        if fault == "truncated":
            file.truncate(4096)
        else:
            file.seek(len(content) // 2)
            file.write(b"\0" * 1000)
    for _ in range(2):
        with pytest.raises(ReadError, match=r"weights (was written|has 4096 bytes).* call remove\(\)"):
            model(batch)
    assert not calls
    (tmp_path / "weights").write_bytes(content)
    hook.remove()
    streamed.remove()
    assert equal(plain(model, batch), expected)
    with autosp.apply(model, autosp.plan(model, batch, k=2, k_prime=1, device="cpu")):
        assert equal(model(batch), expected)


def test_two_processes_stream_the_same_file_at_once(tmp_path: Path) -> None:
    model, batch = mapped_stack(tmp_path / "weights")
    torch.save(plain(model, batch), tmp_path / "expected.pt")
    script = """
        import sys
        from pathlib import Path
        import torch, autosp
        from mapped_models import mapped_stack

        folder = Path(sys.argv[1])
        model, batch = mapped_stack(folder / "weights")
        plan = autosp.plan(model, batch, k=2, k_prime=1, device="cpu")
        with autosp.apply(model, plan):
            print("applied", flush=True)
            sys.stdin.readline()
            for _ in range(50):
                assert torch.equal(model(batch), torch.load(folder / "expected.pt"))
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [subprocess.Popen(command, env=environment, text=True, **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout
        assert process.stdout.readline() == "applied\n"
    for process in both:
        _, errors = process.communicate("go\n", timeout=200)
        assert process.returncode == 0, errors


def test_the_peak_is_the_plan_s_whatever_pages_a_plain_pass_left(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(28)))
    map_weights(model, tmp_path / "weights")
    assert (tmp_path / "weights").stat().st_size > 110e6
    expected = plain(model, vectors(2, 1024))
    plan = autosp.plan(model, vectors(2, 1024), k=5, k_prime=1, residents=3, device="cpu")
    streamed = autosp.apply(model, plan)
    for _ in range(2):
        assert equal(model(vectors(2, 1024)), expected)
    forget_pages(sources(streamed))  # as the kernel does when it wants the memory
    plan_bytes = streamed._residents.n_bytes + streamed._executor.loader.arena.numel()
    assert plan_bytes > 20e6
    assert plan_bytes * 0.9 <= streamed.stats().peak_bytes <= plan_bytes + 10e6
    streamed.remove()


class Embedded(nn.Module):
    """A table of 32 MiB, of which a pass looks up some rows, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32768, 256)
        self.layers = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.layers(self.table(indices))


def test_rows_of_a_table_come_without_their_neighbours(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Embedded().eval()
    map_weights(model, tmp_path / "weights")
    batch = torch.arange(0, 32768, 1024).view(1, -1)
    plan = autosp.plan(model, batch, k=1, k_prime=1, device="cpu")
    assert plan.partition.lookups is not None
    expected = plain(model, batch)
    with autosp.apply(model, plan):
        file = os.open(tmp_path / "weights", os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
        before = status_bytes("RssFile")
        assert equal(model(batch), expected)
        assert status_bytes("RssFile") - before < 2**20  # of 32 rows on 32 pages, not of 32 times the read-ahead
        assert reads_at_random(tmp_path / "weights")
    assert not reads_at_random(tmp_path / "weights")


def reads_at_random(path: Path) -> bool:
    """Whether the kernel was told to bring single pages of any map of the file (proc_pid_smaps(5), "rr")."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmFlags:"):
            if inside and " rr" in line:
                return True
        elif "-" in line.split(" ", 1)[0]:
            inside = line.endswith(str(path))
    return False
