"""What people do with a language model: generate in every way, save it, load into it, cast it, copy it, train it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autosp
from autosp.batch import equal
from autosp.errors import ModelChangedError
from models import llama, tokens

transformers = pytest.importorskip("transformers")

SETTINGS = [
    pytest.param({"k": 1, "k_prime": 1}, id="k=1 k'=1"),
    pytest.param({"k": 4, "k_prime": 1, "residents": 2}, id="ring and residents"),
]
PROMPT = tokens(2, 6) + 3


def seeded(seed: int = 0) -> Any:
    """A small Llama that never stops by itself, the same for the same seed."""
    torch.manual_seed(seed)
    return llama(eos_token_id=None).eval()


def generate(model: Any, **settings: Any) -> torch.Tensor:
    """Eight more tokens for each prompt."""
    torch.manual_seed(3)
    output = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=8, **settings)
    assert isinstance(output, torch.Tensor)
    return output


def logits(model: Any) -> torch.Tensor:
    """Of one plain call."""
    with torch.no_grad():
        output = model(PROMPT).logits
    assert isinstance(output, torch.Tensor)
    return output


def planned(model: Any, **setting: int) -> autosp.Plan:
    """For one forward pass over the prompt."""
    return autosp.plan(model, PROMPT, device="cpu", **setting)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "no cache": {"do_sample": False, "use_cache": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "beams, static cache": {"do_sample": False, "num_beams": 2, "cache_implementation": "static"},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "num_return_sequences": 2},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_generate_in_every_way(setting: dict[str, int]) -> None:
    model = seeded()
    expected = {name: generate(model, **way) for name, way in WAYS.items()}
    with autosp.apply(model, planned(model, **setting)):
        found = {name: generate(model, **way) for name, way in WAYS.items()}
    assert [name for name in WAYS if not equal(found[name], expected[name])] == []
    assert equal(generate(model, **WAYS["greedy"]), expected["greedy"])


def test_planned_by_a_beam_search() -> None:
    model = seeded()
    expected = generate(model, **WAYS["beams"])
    plan = autosp.plan(model, PROMPT, k=3, k_prime=1, device="cpu", step=lambda m, _: generate(m, **WAYS["beams"]))
    assert plan.partition.repeats == 8
    with autosp.apply(model, plan) as streamed:
        assert equal(generate(streamed, **WAYS["beams"]), expected)


def test_a_pipeline() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: index for index, word in enumerate(["<pad>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    model = seeded()

    def answers() -> list[str]:
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        return [answer[0]["generated_text"] for answer in pipe(["a b c", "d e"], max_new_tokens=5, do_sample=False)]

    expected = answers()
    with autosp.apply(model, planned(model, k=4, k_prime=1, residents=2)):
        assert answers() == expected
    assert answers() == expected


@pytest.mark.parametrize("setting", SETTINGS)
def test_saved_and_loaded_at_rest(setting: dict[str, int], tmp_path: Path) -> None:
    model, other = seeded(), seeded(seed=1)
    expected, new = logits(model), logits(other)
    assert not equal(expected, new)
    with autosp.apply(model, planned(model, **setting)):
        logits(model)
        model.save_pretrained(tmp_path)
        saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(other.state_dict())
        for _ in range(2):
            assert equal(logits(model), new)
        model.load_state_dict(saved)
        assert equal(logits(model), expected)
        model.load_state_dict(other.state_dict())
    assert equal(logits(model), new)
    assert equal(logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()), expected)


def through_pickle(model: nn.Module) -> Any:
    """As a process sends it to another."""
    return pickle.loads(pickle.dumps(model))


def through_a_file(model: nn.Module) -> Any:
    """torch.save of the whole model."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_a_file])
def test_copies_are_plain_and_stay_when_the_original_goes(way: Callable[[Any], Any]) -> None:
    model = seeded()
    expected, continued = logits(model), generate(model, **WAYS["greedy"])
    streamed = autosp.apply(model, planned(model, k=4, k_prime=1, residents=2))
    logits(model)
    twin = way(model)
    visits = streamed.stats().visits
    assert equal(logits(twin), expected)
    assert streamed.stats().visits == visits
    streamed.remove()
    del streamed, model
    assert equal(generate(twin, **WAYS["greedy"]), continued)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_cast_under_a_plan_is_refused_and_kept(setting: dict[str, int]) -> None:
    model = seeded()
    expected = logits(seeded().to(torch.bfloat16))
    with autosp.apply(model, planned(model, **setting)):
        logits(model)
        model.to(torch.bfloat16)
        with pytest.raises(ModelChangedError, match=r"remove\(\)"):
            logits(model)
    assert equal(logits(model), expected)
    with autosp.apply(model, planned(model, **setting)):
        assert equal(logits(model), expected)


def test_resized_embeddings_are_what_the_next_pass_uses() -> None:
    model, twin = seeded(), seeded()
    with autosp.apply(model, planned(model, k=4, k_prime=1, residents=2)):
        logits(model)
        for changed in (model, twin):
            torch.manual_seed(4)
            changed.resize_token_embeddings(510)
        assert equal(logits(model), logits(twin))
    assert equal(logits(model), logits(twin))


def test_an_optimiser_steps_at_rest() -> None:
    model, twin = seeded(), seeded()
    with autosp.apply(model, planned(model, k=4, k_prime=1, residents=2)):
        logits(model)
        for changed in (model, twin):
            for parameter in changed.parameters():
                parameter.grad = torch.full_like(parameter, 0.01)
            torch.optim.AdamW(changed.parameters(), lr=0.01).step()
        for _ in range(2):
            assert equal(logits(model), logits(twin))
    assert equal(logits(model), logits(twin))
