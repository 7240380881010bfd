"""Writing a plan into the user's modules, so that everything can be put back bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from normfuse.inplace.plan import Norm, Plan


class Written:
    """A model as it was before: `undo()` puts back every parameter, buffer, submodule, hook and class."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._classes = [type(module) for module in self._modules]
        self._properties = [dict(vars(cls)) for cls in self._classes]
        self._states = [dict(module.__dict__) for module in self._modules]
        self._inner = [{k: copy.copy(v) for k, v in state.items() if isinstance(v, dict)} for state in self._states]

    def undo(self) -> None:
        kept = zip(self._modules, self._classes, self._properties, self._states, self._inner, strict=True)
        for module, cls, properties, state, inner in kept:
            for name, entry in properties.items():
                if isinstance(entry, property) and name not in vars(cls):
                    setattr(cls, name, entry)
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(state)
            for name, entries in inner.items():
                held = module.__dict__[name]
                held.clear()
                held.update(entries)


def write_back(model: nn.Module, plan: Plan, tensors: Mapping[fx.Node, Tensor]) -> Written:
    """Change the model as planned; `tensors` has the value of every weight program. Nothing is written in place."""
    written = Written(model)
    try:
        _write(model, plan, tensors)
    except BaseException:
        written.undo()
        raise
    return written


def _write(model: nn.Module, plan: Plan, tensors: Mapping[fx.Node, Tensor]) -> None:
    made: dict[tuple[fx.Node, bool], nn.Parameter] = {}
    own_parameter = dict(model.named_parameters(remove_duplicate=False)).get

    def parameter(node: fx.Node, like: nn.Parameter | None) -> nn.Parameter:
        if node.op == "get_attr" and (own := own_parameter(str(node.target))) is not None:
            return own
        grad = like is not None and like.requires_grad
        if (node, grad) not in made:
            made[node, grad] = nn.Parameter(tensors[node], requires_grad=grad)
        return made[node, grad]

    for name in plan.materialized:
        _materialize(model, name)
    for name, node in plan.values.items():
        path, _, last = name.rpartition(".")
        owner = model.get_submodule(path)
        if last in owner._buffers:
            owner._buffers[last] = tensors[node]
            continue
        old = owner._parameters[last]
        owner._parameters[last] = parameter(node, old if old is not None else next(iter(owner.parameters()), None))
    for path, norm in plan.norms.items():
        old_module = model.get_submodule(path)
        new_module = _module(norm, old_module, parameter)
        for owner in list(model.modules()):
            for key, child in owner._modules.items():
                if child is old_module:
                    owner._modules[key] = new_module


def _materialize(model: nn.Module, name: str) -> None:
    """Remove the parametrization or hook that computes a weight; its value is overwritten right after."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    if parametrize.is_parametrized(module, last):
        # Torch writes the value into the original in place: let it write into a copy.
        originals = module.parametrizations[last]  # type: ignore[index, union-attr]
        for key, original in list(originals._parameters.items()):  # type: ignore[union-attr]
            if original is not None:
                copied = nn.Parameter(original.detach().clone(), requires_grad=original.requires_grad)
                originals._parameters[key] = copied  # type: ignore[union-attr]
        _give_own_class(module)
        parametrize.remove_parametrizations(module, last, leave_parametrized=True)
        return
    for key, hook in list(module._forward_pre_hooks.items()):
        if getattr(hook, "name", None) == last and hasattr(hook, "remove"):
            with torch.no_grad():
                hook.remove(module)  # type: ignore[attr-defined]
            del module._forward_pre_hooks[key]
    value = getattr(module, last)
    if last not in module._parameters:
        module.__dict__.pop(last, None)
        module.register_parameter(last, nn.Parameter(value.detach()))


def _give_own_class(module: nn.Module) -> None:
    """Torch takes the property off the class, which copies of the module share: let it be a class of this one alone."""
    cls = type(module)
    own = {name: entry for name, entry in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = cast("type[nn.Module]", type(cls.__name__, cls.__bases__, own))


def _module(norm: Norm, old: nn.Module, parameter: Any) -> nn.Module:
    from normfuse.nn import RMSNorm

    if norm.kind is None:
        return nn.Identity().train(old.training)
    affine = norm.weight is not None
    if norm.kind == "layer_norm":
        new: nn.Module = nn.LayerNorm(list(norm.sizes), norm.eps, affine, norm.bias is not None, device="meta")
    else:
        new = RMSNorm(norm.sizes, norm.eps, affine, norm.bias is not None, device="meta")
    like = next(iter(old.parameters()), None)
    for name, node in (("weight", norm.weight), ("bias", norm.bias)):
        if node is not None:
            new._parameters[name] = parameter(node, like)
    return new.train(old.training)
