"""The models of the benchmark by short names: Hugging Face architectures and timm's, with random parameters."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import nn

from normfuse.errors import NormfuseError
from normfuse.models_of import Loaded, find

LENGTH, SIDE = 128, 224

_HUGGING_FACE: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base": ("BertModel", {}),
    "gpt2": ("GPT2Model", {}),
    "opt-125m": ("OPTModel", {}),
    "llama-12x768": (
        "LlamaModel",
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2048},
    ),
    "vit-b16": ("ViTModel", {}),
    "deit-ti": ("DeiTModel", {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}),
    "swin-t": ("SwinModel", {}),
    "convnext-t": ("ConvNextModel", {}),
    "resnet-50": ("ResNetModel", {}),
    "mobilenet-v2": ("MobileNetV2Model", {}),
}
_TIMM = {"repvgg-a0": "repvgg_a0", "mobileone-s0": "mobileone_s0", "fastvit-t8": "fastvit_t8", "repvit-m0.9": "repvit_m0_9"}
PLAIN = tuple(_HUGGING_FACE)
MERGEABLE = tuple(_TIMM)
MODEL_TYPES = {"bert-base": "bert", "gpt2": "gpt2", "opt-125m": "gpt2", "vit-b16": "vit", "deit-ti": "vit", "swin-t": "swin"}
"""What onnxruntime.transformers calls a model, where it knows it."""


def load(name: str, batch: int) -> Loaded:
    """A model in inference mode with its example, the same in every process. Raises `NormfuseError` for unknown names."""
    torch.manual_seed(0)
    if name in _HUGGING_FACE:
        return _hugging_face(name, *_HUGGING_FACE[name], batch)
    if name.startswith("hf:"):
        return _hugging_face(name, name.removeprefix("hf:"), {}, batch)
    if name in _TIMM or name.startswith("timm:"):
        return _timm(name, _TIMM.get(name, name.removeprefix("timm:")), batch)
    found = find(name)
    if ":" not in name and not name.endswith(".pt2"):
        family, _, config = name.partition("@")
        args, kwargs = importlib.import_module(f"normfuse.models.{family}").example(config or "small", batch=batch)
        return Loaded(name, found.model, tuple(args), kwargs)
    return found


def _hugging_face(name: str, architecture: str, options: dict[str, Any], batch: int) -> Loaded:
    transformers = importlib.import_module("transformers")
    kind: Any = getattr(transformers, architecture, None)
    if kind is None:
        raise NormfuseError(f"transformers has no {architecture!r}")
    model = kind(kind.config_class(**options)).eval()
    _spread_statistics(model)
    return Loaded(name, model, (), _example(model.main_input_name, model.config, batch))


def _example(main: str, config: Any, batch: int) -> dict[str, Any]:
    if main == "pixel_values":
        side = getattr(config, "image_size", SIDE)
        return {main: torch.randn(batch, getattr(config, "num_channels", 3), side, side)}
    example: dict[str, Any] = {main: torch.randint(3, config.vocab_size, (batch, LENGTH))}
    return example | ({"use_cache": False} if getattr(config, "use_cache", None) is not None else {})


def _timm(name: str, architecture: str, batch: int) -> Loaded:
    sys.meta_path.append(_Torchvision())
    try:
        model = importlib.import_module("timm").create_model(architecture).eval()
    finally:
        sys.meta_path.pop()
    _spread_statistics(model)
    side = model.pretrained_cfg["input_size"]
    return Loaded(name, model, (torch.randn(batch, *side),), {})


@torch.no_grad()
def _spread_statistics(model: nn.Module) -> None:
    """Running statistics at their defaults would make the folding of batch norms a trifle."""
    for module in model.modules():
        mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, torch.Tensor) and isinstance(variance, torch.Tensor):
            mean.normal_(0, 0.1)
            variance.uniform_(0.5, 1.5)


class _Anything(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__class_getitem__": classmethod(lambda cls, _: cls)})


class _Torchvision(MetaPathFinder, Loader):
    """timm imports torchvision for data alone; where it is missing an empty one will do."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


Build = Callable[[], Any]
