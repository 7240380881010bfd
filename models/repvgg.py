"""RepVGG as it is trained: a 3x3, a 1x1 and an identity branch, each with its BatchNorm, added up.

The norms are `nn.BatchNorm2d`; the identity branch is a norm with no convolution in front of it, a kernel
with one entry per channel once merged. After fold_batch_norm and merge_branches each block is one
convolution and a ReLU.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from ._random import normal, randomized


@dataclass(frozen=True, kw_only=True)
class Config:
    image: int = 32
    stem: int = 8
    depths: tuple[int, ...] = (2, 2)
    widths: tuple[int, ...] = (16, 32)
    groups: int = 1
    classes: int = 10


CONFIGS: dict[str, Config] = {
    "small": Config(),
    "small-grouped": Config(groups=2),
    "repvgg-a0": Config(image=224, stem=48, depths=(2, 4, 14, 1), widths=(48, 96, 192, 1280), classes=1000),
}


class ConvNorm(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.dense = ConvNorm(inputs, outputs, 3, stride, groups)
        self.pointwise = ConvNorm(inputs, outputs, 1, stride, groups)
        self.identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, 3**-0.5)  # three branches add up

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x) + self.pointwise(x)
        return F.relu(y if self.identity is None else y + self.identity(x))


class RepVGG(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        channels = config.stem
        self.blocks = nn.Sequential(Block(3, channels, 2, 1))
        for depth, width in zip(config.depths, config.widths, strict=True):
            for i in range(depth):
                self.blocks.append(Block(channels, width, 2 if i == 0 else 1, config.groups))
                channels = width
        self.head = nn.Linear(channels, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(images).mean((2, 3)))


def build(config: Config | str = "small", *, seed: int = 0) -> nn.Module:
    config = CONFIGS[config] if isinstance(config, str) else config
    return randomized(lambda: RepVGG(config), seed)


def example(
    config: Config | str = "small", *, batch: int = 2, seed: int = 0
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    config = CONFIGS[config] if isinstance(config, str) else config
    return (normal(batch, 3, config.image, config.image, seed=seed),), {}
