"""A loaded model is the plain one, over maps of its files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autosp
from autosp.batch import call, equal
from autosp.errors import CheckpointError, SettingError
from checkpoint_samples import Rotary, big_state, files_of, is_mapped
from models import Stack, Tied, make
from processes import run

safetensors = pytest.importorskip("safetensors.torch")


def save(model: nn.Module, path: Path, *left_out: str) -> Path:
    """Its state dict as safetensors."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in left_out}
    safetensors.save_file(state, path)
    return path


def save_shards(model: nn.Module, folder: Path) -> Path:
    """Its state dict in three files and an index."""
    folder.mkdir()
    state = model.state_dict()
    weight_map = {name: f"model-0000{index % 3 + 1}-of-00003.safetensors" for index, name in enumerate(state)}
    for shard in sorted(set(weight_map.values())):
        held = {name: tensor.clone() for name, tensor in state.items() if weight_map[name] == shard}
        safetensors.save_file(held, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def output(model: nn.Module, batch: Any) -> Any:
    with torch.no_grad():
        return call(model, batch)


@pytest.mark.parametrize("name", ["stack", "tied", "shared", "borrowed", "two_towers", "fast_path", "convolutions"])
def test_same_output_and_every_parameter_is_mapped(name: str, tmp_path: Path) -> None:
    plain, batch = make(name)
    path = save(plain, tmp_path / "weights.safetensors")
    torch.manual_seed(1)  # what the factory draws must not matter
    loaded = autosp.load(lambda: make(name)[0].train(), weights=path)
    assert not loaded.training
    assert equal(output(loaded, batch), output(plain, batch))
    assert loaded.state_dict().keys() == plain.state_dict().keys()
    assert all(is_mapped(parameter, path) for parameter in loaded.parameters())


def test_shards_by_their_index_or_their_folder(tmp_path: Path) -> None:
    plain, batch = make("stack")
    index = save_shards(plain, tmp_path / "shards")
    for weights in (index, index.parent):
        loaded = autosp.load(Stack, weights=weights)
        assert equal(output(loaded, batch), output(plain, batch))
        assert len(files_of(loaded)) == 3
    index.unlink()
    assert equal(output(autosp.load(Stack, weights=index.parent), batch), output(plain, batch))


def test_a_factory_by_its_name_that_returns_a_batch_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, batch = make("stack")
    save(plain, tmp_path / "weights.safetensors")
    (tmp_path / "their_models.py").write_text(
        "import torch\nfrom models import Stack\n\n\ndef make():\n    return Stack(), torch.arange(3)\n"
    )
    monkeypatch.chdir(tmp_path)
    loaded = autosp.load("their_models:make", weights="weights.safetensors")
    assert equal(output(loaded, batch), output(plain, batch))


@pytest.mark.parametrize("left_out", [(), ("head.weight",), ("embed.weight",)])
def test_tied_parameters_stay_tied(left_out: tuple[str, ...], tmp_path: Path) -> None:
    plain, batch = make("tied")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = autosp.load(Tied, weights=save(plain, tmp_path / "weights.safetensors", *left_out))
    assert loaded.head.weight is loaded.embed.weight
    assert equal(output(loaded, batch), output(plain, batch))


def test_buffers_and_what_parameters_have_besides_data(tmp_path: Path) -> None:
    plain = Rotary()
    plain.mean.fill_(3)
    path = save(plain, tmp_path / "weights.safetensors")
    loaded = autosp.load(Rotary, weights=path)
    assert torch.equal(loaded.frequencies, plain.frequencies)
    assert is_mapped(loaded.mean, path)
    assert not loaded.linear.bias.requires_grad
    assert loaded.linear.weight.requires_grad
    assert loaded.linear.weight.is_special
    assert loaded.first is loaded.second
    x = torch.rand(2, 8)
    assert equal(output(loaded, x), output(plain, x))


def test_loading_in_a_factory_and_building_in_a_thread_are_left_alone(tmp_path: Path) -> None:
    import threading

    plain, batch = make("stack")
    path = save(plain, tmp_path / "weights.safetensors")
    others: list[nn.Module] = []

    def factory() -> nn.Module:
        others.append(autosp.load(Stack, weights=path))  # nested
        thread = threading.Thread(target=lambda: others.append(Stack()))
        thread.start()
        thread.join()
        model = Stack()
        assert all(parameter.is_meta for parameter in model.parameters())
        return model

    loaded = autosp.load(factory, weights=path)
    others.append(Stack())  # nothing is left patched
    for model in (loaded, *others):
        assert not any(parameter.is_meta for parameter in model.parameters())
    assert equal(output(others[0], batch), output(plain, batch))


def test_a_failing_factory_passes_through_and_leaves_nothing_patched(tmp_path: Path) -> None:
    path = save(Stack(), tmp_path / "weights.safetensors")

    def broken() -> nn.Module:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        autosp.load(broken, weights=path)
    assert not any(parameter.is_meta for parameter in Stack().parameters())


def test_a_write_never_reaches_the_file(tmp_path: Path) -> None:
    path = save(Stack(), tmp_path / "weights.safetensors")
    before = path.read_bytes()
    loaded = autosp.load(Stack, weights=path)
    with torch.no_grad():
        loaded.head.weight.zero_()
    assert not loaded.head.weight.any()
    assert path.read_bytes() == before


def test_tune_and_apply_on_a_loaded_model(tmp_path: Path) -> None:
    plain, batch = make("stack")
    path = save(plain, tmp_path / "weights.safetensors")
    model = autosp.load(Stack, weights=path)
    plan = autosp.tune(model, batch, 0.01, max_trials=3, progress=False, device="cpu")
    assert all(is_mapped(parameter, path) for parameter in model.parameters())
    with autosp.load(Stack, plan, weights=path) as streamed:
        assert equal(output(streamed, batch), output(plain, batch))


def test_a_loaded_model_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.save_file(big_state(), path)
    code = """
import sys, torch, autosp
from checkpoint_samples import AnonymousPeak, big_model
peak = AnonymousPeak()
model = autosp.load(big_model, weights=sys.argv[1])
peak.sample()
assert model[0].weight.sum() > 0
peak.sample()
print(peak.growth_bytes)
"""
    assert int(run(code, path)) < 40 * 2**20  # of 200 MiB


@pytest.mark.parametrize("how", ["missing", "other names", "shape", "kind of dtype"])
def test_a_checkpoint_of_another_model(how: str, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in Stack().state_dict().items()}
    if how == "missing":
        del state["blocks.3.up.weight"], state["head.bias"]
        message = r"lacks 2 of the 39 tensors of Stack: blocks\.3\.up\.weight, head\.bias"
    elif how == "other names":
        state = {f"model.{name}": tensor for name, tensor in state.items()}
        message = r"lacks 39 of the 39 tensors of Stack: .*it has model\.\S+, .* instead"
    elif how == "shape":
        state["head.weight"] = torch.zeros(7, 64)
        message = r"weights\.safetensors: tensor head\.weight has shape \(7, 64\), the model's has \(500, 64\)"
    else:
        state["head.weight"] = state["head.weight"].to(torch.int8)
        message = r"tensor head\.weight is torch\.int8, the model's is torch\.float32"
    path = tmp_path / "weights.safetensors"
    safetensors.save_file(state, path)
    with pytest.raises(CheckpointError, match=message):
        autosp.load(Stack, weights=path)


def test_unexpected_tensors_are_warned_of(tmp_path: Path) -> None:
    state = Stack().state_dict() | {f"extra.{index}": torch.zeros(1) for index in range(5)}
    path = tmp_path / "weights.safetensors"
    safetensors.save_file(state, path)
    with pytest.warns(UserWarning, match=r"has 5 tensors that Stack does not use: extra\.0, extra\.1, extra\.2 …"):
        autosp.load(Stack, weights=path)


def test_a_dtype_other_than_the_model_was_built_with_is_told(tmp_path: Path) -> None:
    path = save(Stack().to(torch.bfloat16), tmp_path / "weights.safetensors")
    with pytest.warns(
        UserWarning, match=r"39 tensors of Stack are torch\.bfloat16, as .* has them, not torch\.float32"
    ):
        assert autosp.load(Stack, weights=path).head.weight.dtype is torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        autosp.load(Stack, weights=path, dtype=torch.bfloat16)
        autosp.load(lambda: Stack().to(torch.bfloat16), weights=path)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    plain = Stack()
    path = save(plain, tmp_path / "weights.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(
        CheckpointError, match=rf"weights\.safetensors ends at byte {len(whole) - 4}, inside tensor \S+"
    ):
        autosp.load(Stack, weights=path)
    path.write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match=r"\(100 bytes\) is no safetensors file, or was cut off"):
        autosp.load(Stack, weights=path)
    path.write_bytes(whole[:20] + b"\xff" * 20 + whole[40:])
    with pytest.raises(CheckpointError, match="its header is damaged"):
        autosp.load(Stack, weights=path)
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*nowhere"):
        autosp.load(Stack, weights=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty holds no checkpoint: pass a .safetensors file"):
        autosp.load(Stack, weights=tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"notes\.txt is no checkpoint that autosp reads"):
        autosp.load(Stack, weights=tmp_path / "notes.txt")


@pytest.mark.parametrize(
    "header",
    [
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [null, null]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
        ' "b": {"dtype": "F32", "shape": [2], "data_offsets": ["8", "16"]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
        "[" * 90_000,
    ],
    ids=["texts", "nothing", "numbers and texts", "backwards", "too deep"],
)
def test_a_header_of_other_things_than_offsets(header: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(16))
    with pytest.raises(CheckpointError, match="its header is damaged"):
        autosp.load(Stack, weights=path)


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x" * 300 + ".safetensors"}}))
    for weights in (index, tmp_path / ("x" * 300)):
        with pytest.raises(CheckpointError, match="xxx.* cannot be looked for: File name too long"):
            autosp.load(Stack, weights=weights)
    with pytest.raises(CheckpointError, match="xxx.* cannot be looked for: File name too long"):
        autosp.load("x" * 300)


def test_an_index_that_promises_too_much(tmp_path: Path) -> None:
    index = save_shards(Stack(), tmp_path / "shards")
    said = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": said["weight_map"] | {"lost": "model-00002-of-00003.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"says that model-00002-of-00003\.safetensors holds tensor lost"):
        autosp.load(Stack, weights=index)
    (index.parent / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"names 3 shards, of which 1 are not there, model-00002-of-00003.* \(14 t"
    ):
        autosp.load(Stack, weights=index)
    for text in ("{}", "[" * 100_000):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="it has no usable weight_map"):
            autosp.load(Stack, weights=index)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    save(Stack(), tmp_path / "a.safetensors")
    save(Stack(), tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"is in .*a\.safetensors and in .*b\.safetensors"):
        autosp.load(Stack, weights=tmp_path)


def test_arguments_that_do_not_go_together(tmp_path: Path) -> None:
    path = save(Stack(), tmp_path / "weights.safetensors")
    with pytest.raises(
        CheckpointError, match="names tensors but no modules: pass the directory with its config.json, or"
    ):
        autosp.load(path)
    with pytest.raises(
        CheckpointError, match="there is no .*nowhere: pass a Hugging Face directory, or module:factory"
    ):
        autosp.load(tmp_path / "nowhere")
    with pytest.raises(SettingError, match="Stack builds a model without weights: pass weights="):
        autosp.load(Stack)
    with pytest.raises(SettingError, match="pass what builds the Stack, not the module itself"):
        autosp.load(Stack(), weights=path)
    with pytest.raises(SettingError, match="returned a dict; it must return the module"):
        autosp.load(dict, weights=path)
    with pytest.raises(SettingError, match="dtype=torch.int8: pass one of torch.float64, torch.float32"):
        autosp.load(Stack, weights=path, dtype=torch.int8)
    with pytest.raises(SettingError, match="no 'mak' in module models .*; did you mean 'make'"):
        autosp.load("models:mak", weights=path)


@pytest.mark.parametrize("package", ["safetensors", "transformers"])
def test_without_the_extra_it_is_named(package: str, tmp_path: Path) -> None:
    save(Stack(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    code = f"""
import sys
sys.modules[{package!r}] = None
import autosp
from models import Stack
try:
    autosp.load({str(tmp_path)!r}) if {package!r} == "transformers" else autosp.load(Stack, weights={str(tmp_path)!r})
except autosp.errors.SettingError as error:
    print(error)
"""
    assert f"needs {package}: pip install 'autosp[hf]'" in run(code)
