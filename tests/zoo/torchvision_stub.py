"""timm without torchvision: what timm 1.0 touches of it at import, and no more.

timm asks for `FrozenBatchNorm2d` (a norm that its models may be built with: here it is a working one), for
six data sets and for one base class and one enumeration of the image transforms (no model calls them).
Everything else that timm wants is inside a `try` for ImportError, so it is left out. The stand-in is there
while timm is imported and gone afterwards: transformers, which looks for torchvision too, never sees it.
A torchvision that can be imported wins.
"""

from __future__ import annotations

import enum
import importlib
import sys
from collections.abc import Generator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import nn


def import_timm() -> ModuleType:
    """timm, with torchvision or with its stand-in."""
    with torchvision():
        return importlib.import_module("timm")


@contextmanager
def torchvision() -> Generator[None]:
    """A torchvision that timm can be imported with, for the length of the block."""
    if _loads():
        yield
        return
    modules = {module.__name__: module for module in _modules()}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)


def _loads() -> bool:
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):  # RuntimeError: built for another torch
        for name in [each for each in sys.modules if each.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        return False
    return True


class FrozenBatchNorm2d(nn.Module):
    """Batch normalization over (N, C, H, W) whose statistics and affine parameters are buffers."""

    weight: torch.Tensor
    bias: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = (self.weight * (self.running_var + self.eps).rsqrt()).reshape(1, -1, 1, 1)
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


class _InterpolationMode(enum.Enum):
    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def _modules() -> tuple[ModuleType, ...]:
    top, ops, misc, datasets, transforms, functional = (
        ModuleType(name)
        for name in (
            "torchvision",
            "torchvision.ops",
            "torchvision.ops.misc",
            "torchvision.datasets",
            "torchvision.transforms",
            "torchvision.transforms.functional",
        )
    )
    vars(misc)["FrozenBatchNorm2d"] = FrozenBatchNorm2d
    vars(functional)["InterpolationMode"] = _InterpolationMode
    for name in ("CIFAR100", "CIFAR10", "MNIST", "KMNIST", "FashionMNIST", "ImageFolder"):
        vars(datasets)[name] = type(name, (), {})
    vars(transforms)["ToTensor"] = type("ToTensor", (), {})
    for package in (top, ops, transforms):
        package.__path__ = []
    vars(top).update(ops=ops, datasets=datasets, transforms=transforms)
    vars(ops)["misc"] = misc
    vars(transforms)["functional"] = functional
    return top, ops, misc, datasets, transforms, functional
