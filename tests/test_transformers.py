"""Models people really use, shrunk: the streamed output is the plain one, `generate` included."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import autosp
from autosp.batch import call, equal, map_tensors
from autosp.devices import Device
from models import llama, mamba, mixtral, t5, tokens

transformers = pytest.importorskip("transformers")


def clip() -> nn.Module:
    text = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 500,
    }
    vision = {**text, "image_size": 32, "patch_size": 8}
    del vision["vocab_size"]
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))


def albert() -> nn.Module:
    config = transformers.AlbertConfig(
        vocab_size=500,
        embedding_size=32,
        hidden_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=128,
    )
    return transformers.AlbertModel(config)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 2, 1])
    return transformers.ResNetModel(config)


IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
CASES = {
    "llama": (llama, lambda: {"input_ids": tokens(2, 9)}),
    "llama tied": (lambda: llama(tie_word_embeddings=True), lambda: {"input_ids": tokens(2, 9)}),
    "t5": (t5, lambda: {"input_ids": tokens(2, 9), "decoder_input_ids": tokens(2, 4)}),
    "clip": (clip, lambda: {"input_ids": tokens(3, 7), "pixel_values": IMAGES}),
    "albert": (albert, lambda: {"input_ids": tokens(2, 9)}),
    "mixtral": (mixtral, lambda: {"input_ids": tokens(2, 9)}),
    "mamba": (mamba, lambda: {"input_ids": tokens(2, 9)}),
    "resnet": (resnet, lambda: {"pixel_values": IMAGES}),
}


def plain(model: nn.Module, run: Any, device: Device) -> Any:
    twin = copy.deepcopy(model).to(device.torch_device)
    with torch.no_grad():
        return run(twin)


@pytest.mark.parametrize(("k", "k_prime", "residents"), [(1, 1, 0), (4, 2, 0), (4, 1, 2)])
@pytest.mark.parametrize("name", CASES)
def test_same_output(name: str, k: int, k_prime: int, residents: int, device: Device) -> None:
    maker, batch_of = CASES[name]
    torch.manual_seed(0)
    model = maker().eval()
    batch = map_tensors(lambda tensor: tensor.to(device.torch_device), batch_of())
    expected = plain(model, lambda twin: call(twin, batch), device)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plan = autosp.plan(model, batch, k=k, k_prime=k_prime, residents=residents, device=device)
    with autosp.apply(model, plan):
        for _ in range(2):
            assert equal(call(model, batch), expected)
    assert all(equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_with_a_cache(cache: str | None, device: Device) -> None:
    torch.manual_seed(0)
    model = llama().eval()
    prompt = tokens(2, 6).to(device.torch_device)
    settings: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    if cache is not None:
        settings["cache_implementation"] = cache

    def generate(model: nn.Module, batch: Any) -> Any:
        return model.generate(batch, **settings)

    expected = plain(model, lambda twin: generate(twin, prompt), device)
    plan = autosp.plan(model, prompt, k=3, k_prime=1, residents=1, step=generate, device=device)
    assert plan.partition.repeats == 7
    streamed = autosp.apply(model, plan)
    for _ in range(2):
        assert equal(generate(model, prompt), expected)
    assert streamed.stats().misses == 0
    assert streamed.stats().passes == 14
    streamed.remove()


def test_generate_of_an_encoder_decoder(device: Device) -> None:
    torch.manual_seed(0)
    model = t5().eval()
    prompt = tokens(2, 6).to(device.torch_device)

    def generate(model: nn.Module, batch: Any) -> Any:
        return model.generate(batch, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(batch))

    expected = plain(model, lambda twin: generate(twin, prompt), device)
    plan = autosp.plan(model, prompt, k=4, k_prime=1, step=generate, device=device)
    with autosp.apply(model, plan):
        for _ in range(2):
            assert equal(generate(model, prompt), expected)


def test_save_pretrained_under_a_plan(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = llama().eval()
    batch = {"input_ids": tokens(2, 9)}
    with torch.no_grad():
        expected = model(**batch).logits
    plan = autosp.plan(model, batch, k=2, k_prime=1, device="cpu")
    with autosp.apply(model, plan):
        model(**batch)
        model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert equal(again(**batch).logits, expected)
