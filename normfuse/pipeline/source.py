"""What an optimized model was made from: enough to lower it again from the weights as they were given, while they last."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normfuse.graph.program import Program
from normfuse.pipeline.run import detached
from normfuse.pipeline.subject import Model, as_runnable
from normfuse.verification.inputs import draws
from normfuse.verification.trials import Trials, cloned, make_trials, original_run

_KEPT = 1 << 26
"""Bytes of trials that are kept; larger ones are computed again when they are asked for."""

State = tuple[int, int]
"""Address and version of a tensor: both stay as long as nobody moves it or writes to it."""


def state_of(tensor: Tensor) -> State:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


@dataclass
class Source:
    """The model, held weakly, its programs without its weights, and what it computed on the trials."""

    model: weakref.ref[Any]
    captured: Program
    unbaked: Program
    example: list[Any]
    drawn: tuple[list[Any], list[Any], list[Any]] | None
    states: Mapping[str, State]

    @classmethod
    def of(cls, model: Model, captured: Program, unbaked: Program, example: list[Any], trials: Trials | None) -> Source:
        drawn = None if trials is None else (trials.inputs, trials.reference64, trials.original)
        drawn = None if _bytes(drawn) > _KEPT else drawn
        states = {name: state_of(t) for name, t in captured.tensors.items() if t.device.type != "meta"}
        return cls(weakref.ref(model), detached(captured), detached(unbaked), example, drawn, states)

    def weights(self) -> Program | None:
        """The weight programs over the model's weights; None where those are gone or have changed."""
        return self._whole(self.unbaked)

    def trials(self, count: int) -> Trials | None:
        """What the model computes, drawn now if nobody has looked before; None as `weights`."""
        model, captured = self.model(), self._whole(self.captured)
        if model is None or captured is None:
            return None
        run = original_run(as_runnable(model, (), {})[0], captured)
        if self.drawn is None:
            made = make_trials(captured, run, self.example, count)
            self.drawn = made.inputs, made.reference64, made.original
            return made
        more = islice(draws(captured.signature, self.example, _accepts(run, captured)), len(self.drawn[0]), None)
        return Trials(captured, lambda leaves: run(cloned(leaves)), more, *map(list, self.drawn))

    def _whole(self, program: Program) -> Program | None:
        model = self.model()
        known = {} if model is None else _tensors(model)
        tensors: dict[str, Tensor] = {}
        for name, tensor in program.tensors.items():
            found = tensor if tensor.device.type != "meta" else _named(program.origins[name].names, known)
            if found is None or (name in self.states and state_of(found) != self.states[name]):
                return None
            tensors[name] = found.detach()
        return dataclasses.replace(program, tensors=tensors)


def _bytes(tree: Any) -> int:
    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves(tree) if isinstance(t, Tensor))


def _tensors(model: Any) -> dict[str, Tensor]:
    if not isinstance(model, nn.Module):
        return {**model.state_dict, **{n: t for n, t in model.constants.items() if isinstance(t, Tensor)}}
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _named(names: tuple[str, ...], known: Mapping[str, Tensor]) -> Tensor | None:
    return next((known[name] for name in names if name in known), None)


def _accepts(run: Any, captured: Program) -> Any:
    def accepts(leaves: list[Any]) -> bool:
        try:
            run(cloned(leaves))
            captured.signature.check(leaves)
        except Exception:
            return False
        return True

    return accepts
