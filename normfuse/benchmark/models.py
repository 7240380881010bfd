"""The models of the benchmark by short names: Hugging Face architectures and timm's, with random parameters."""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import nn

from normfuse.errors import NormfuseError
from normfuse.named_model import Loaded, find

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
_REP_BATCH_NORM = {"deit-ti-repbn": "deit-ti"}
PLAIN = tuple(_HUGGING_FACE)
MERGEABLE = (*_TIMM, *_REP_BATCH_NORM)
SUITES = {"plain": PLAIN, "mergeable": MERGEABLE}
MODEL_TYPES = {"bert-base": "bert", "gpt2": "gpt2", "opt-125m": "gpt2", "vit-b16": "vit", "deit-ti": "vit", "swin-t": "swin"}
"""What onnxruntime.transformers calls a model, where it knows it."""


def load(name: str, batch: int) -> Loaded:
    """A model in inference mode with its example, the same in every process. Raises `NormfuseError` for unknown names."""
    torch.manual_seed(0)
    if name in _HUGGING_FACE:
        return _hugging_face(name, *_HUGGING_FACE[name], batch)
    if name in _REP_BATCH_NORM:
        return _with_rep_batch_norm(name, _REP_BATCH_NORM[name], batch)
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
    _spread(model)
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
    _spread(model)
    side = model.pretrained_cfg["input_size"]
    return Loaded(name, model, (torch.randn(batch, *side),), {})


def _with_rep_batch_norm(name: str, base: str, batch: int) -> Loaded:
    """Every LayerNorm replaced as SLAB does (arXiv 2405.11582), as if trained: statistics and factors are random."""
    loaded = load(base, batch)
    assert isinstance(loaded.model, nn.Module)
    for path, module in list(loaded.model.named_modules()):
        if isinstance(module, nn.LayerNorm):
            parent, _, leaf = path.rpartition(".")
            setattr(loaded.model.get_submodule(parent), leaf, _RepBatchNorm(module.normalized_shape[0]))
    _spread(loaded.model.eval())
    return Loaded(name, loaded.model, loaded.args, loaded.kwargs)


class _RepBatchNorm(nn.Module):
    """(batch, length, channels) -> BatchNorm(x) + eta * x, the transposes as in the paper's own code."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eta = nn.Parameter(torch.ones(1))
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2)
        return (self.norm(x) + self.eta * x).transpose(1, 2)


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    """Nothing at its default: ones, zeros and unit statistics would make what there is to do a trifle."""
    for parameter in model.parameters():
        if bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    for module in model.modules():
        mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, torch.Tensor) and isinstance(variance, torch.Tensor):
            mean.normal_(0, 0.1)
            variance.uniform_(0.5, 1.5)


class _Open(type):
    """A class with every attribute, and an item for every key."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return name

    def __getitem__(cls, key: Any) -> Any:
        return cls


class _Anything(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Open(name, (), {})


class _Torchvision(MetaPathFinder, Loader):
    """timm imports torchvision for data alone; where it is missing an empty one will do."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass
