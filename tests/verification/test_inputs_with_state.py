"""Inputs that know more than their tensors: what is lost when they are taken apart is refused by name, the rest is right."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import normfuse
from tests.support import image, randomised


class Memory:
    """A state with a step that its registration forgets."""

    def __init__(self, h: Tensor, step: int = 0) -> None:
        self.h, self.step = h, step


class Told(Memory):
    """The same, with all of it told."""


def _register(kind: type[Memory], context: Any, back: Any) -> None:
    def with_keys(memory: Any) -> tuple[list[tuple[Any, Any]], Any]:
        return [(pytree.GetAttrKey("h"), memory.h)], context(memory)

    pytree.register_pytree_node(
        kind,
        lambda m: ([m.h], context(m)),
        back,
        flatten_with_keys_fn=with_keys,
    )


_register(Memory, lambda m: None, lambda leaves, _: Memory(*leaves))
_register(Told, lambda m: m.step, lambda leaves, step: Told(*leaves, step=step))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(6), nn.Linear(6, 6)


class Step(Base):
    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        return self.out(self.norm(x + memory.h)) * (1 + memory.step)


class Gives(Base):
    def forward(self, x: Tensor, memory: Memory) -> Memory:
        return type(memory)(self.out(self.norm(x + memory.h)), memory.step + 1)


X, H = image(2, 6), image(2, 6, seed=2)


def close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.dist(a.double(), b.double()) <= 1e-5 * b.double().norm())


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("verb", [normfuse.optimize, normfuse.optimize_], ids=["optimize", "optimize_"])
def test_an_input_that_loses_state_is_refused_by_name(verb: Any, verify: bool) -> None:
    with pytest.raises(normfuse.CaptureError, match=r"memory\.step is 3 and comes back as 0"):
        verb(randomised(Step()), (X, Memory(H, 3)), verify=verify)


def test_verify_and_export_refuse_it_too(tmp_path: Path) -> None:
    model = randomised(Step())
    optimized = normfuse.optimize(model, (X, Memory(H)))
    with pytest.raises(normfuse.NormfuseError, match=r"memory\.step is 3"):
        normfuse.verify(model, optimized, (X, Memory(H, 3)))
    with pytest.raises(normfuse.NormfuseError, match=r"memory\.step is 3"):
        normfuse.export_onnx(model, tmp_path / "m.onnx", (X, Memory(H, 3)))


def test_a_later_call_with_other_state_is_refused() -> None:
    model = randomised(Step())
    optimized = normfuse.optimize(model, (X, Memory(H)))
    assert close(optimized(X, Memory(H)), model(X, Memory(H)))
    with pytest.raises(normfuse.InputError, match=r"memory\.step is 3 and comes back as 0"):
        optimized(X, Memory(H, 3))


def test_state_that_is_told_belongs_to_the_signature() -> None:
    model = randomised(Step())
    optimized = normfuse.optimize(model, (X, Told(H, 3)))
    assert close(optimized(H, Told(X, 3)), model(H, Told(X, 3)))
    with pytest.raises(normfuse.InputError, match="nested as"):
        optimized(X, Told(H, 4))


def test_an_output_that_loses_state_is_refused_and_one_that_tells_is_right() -> None:
    with pytest.raises(normfuse.VerificationError, match=r"output\.step is 1 and comes back as 0"):
        normfuse.optimize(randomised(Gives()), (X, Memory(H)))
    model = randomised(Gives())
    got, wanted = normfuse.optimize(model, (X, Told(H, 3)))(X, Told(H, 3)), model(X, Told(H, 3))
    assert got.step == wanted.step == 4
    assert close(got.h, wanted.h)


class Replaces(Base):
    def forward(self, x: Tensor, state: dict[str, Tensor]) -> Tensor:
        state["h"] = self.out(self.norm(x + state["h"]))
        return state["h"] * 2


class Appends(Base):
    def forward(self, x: Tensor, state: list[Tensor]) -> Tensor:
        state.append(x)
        return self.out(self.norm(x + state[0]))


class Counts(Base):
    def forward(self, x: Tensor, state: Memory) -> Tensor:
        state.step += 1
        return self.out(self.norm(x + state.h))


class Returns(Base):
    def forward(self, x: Tensor, state: dict[str, Tensor]) -> Any:
        state["h"] = self.out(self.norm(x + state["h"]))
        return state


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("kind", "state"), [(Replaces, {"h": H}), (Appends, [H]), (Counts, Memory(H))], ids=["dict", "list", "object"]
)
def test_inputs_that_the_model_changes_and_keeps_to_itself_are_refused(kind: Any, state: Any, verify: bool) -> None:
    with pytest.raises(normfuse.CaptureError, match="changes its input 'state' when called and does not return it"):
        normfuse.optimize(randomised(kind()), (X, state), verify=verify)
    assert pytree.tree_leaves(state) == [H], "the example was changed"


def test_changes_that_are_returned_are_right() -> None:
    model = randomised(Returns())
    optimized = normfuse.optimize(model, (X, {"h": H}))
    assert close(optimized(X, {"h": X})["h"], model(X, {"h": X})["h"])


# --- caches of transformers


def _sliding() -> Any:
    t = pytest.importorskip("transformers")
    config = t.MistralConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, sliding_window=4, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    return t.MistralForCausalLM(config)


def _hybrid() -> Any:
    t = pytest.importorskip("transformers")
    config = t.Gemma3TextConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=24, sliding_window=4, initializer_range=0.3, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return t.Gemma3ForCausalLM(config)


def _full() -> Any:
    t = pytest.importorskip("transformers")
    return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, eos_token_id=1, bos_token_id=1))


def _prefilled(model: Any, length: int) -> Any:
    """The names of the cache's argument have changed over the versions of transformers."""
    cache = sys.modules["transformers"].DynamicCache(config=model.config)
    tokens = torch.arange(2 * length).reshape(2, length) % 50 + 3
    with torch.no_grad():
        model(input_ids=tokens, use_cache=True, **{_word(model): cache})
    return cache


def _word(model: Any) -> str:
    import inspect

    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@pytest.mark.parametrize(
    ("kind", "length"), [(_sliding, 7), (_hybrid, 7), (_full, 5)], ids=["sliding", "hybrid", "full"]
)
def test_decode_steps_with_the_cache_as_input(kind: Any, length: int) -> None:
    torch.manual_seed(0)
    model = randomised(kind().eval())
    word = _word(model)
    tokens = torch.arange(16).reshape(8, 2, 1) * 3 % 50 + 3
    example = {"input_ids": tokens[0], word: _prefilled(model, length), "use_cache": True}
    optimized = normfuse.optimize(model, (), example)
    theirs, ours = _prefilled(model, length), _prefilled(model, length)
    for token in tokens:
        with torch.no_grad():
            wanted = model(input_ids=token, use_cache=True, **{word: theirs})
            got = optimized(input_ids=token, use_cache=True, **{word: ours})
        theirs, ours = wanted[word], got[word]
        assert close(got.logits, wanted.logits)
        assert ours.get_seq_length() == theirs.get_seq_length()
    if kind is _sliding:
        assert normfuse.verify(model, optimized, (), example)


def test_a_cache_that_is_not_returned_is_refused() -> None:
    model = randomised(_sliding().eval())
    example = {"input_ids": torch.tensor([[5], [6]]), _word(model): _prefilled(model, 7), "use_cache": False}
    with pytest.raises(normfuse.CaptureError, match="when called and does not return it"):
        normfuse.optimize(model, (), example)
