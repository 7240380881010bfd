"""MobileNetV2: inverted residuals, depthwise convolutions and ReLU6.

The norms are `nn.BatchNorm2d` behind dense, depthwise and pointwise convolutions; a depthwise weight has
one input channel, so a per-channel scale on either side lands on the same axis. ReLU6 is bounded: unlike
ReLU it does not commute with a positive scale, and migrate_scales must stop there. The bottlenecks are
linear and let a scale through.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ._random import normal, randomized

Stage = tuple[int, int, int, int]  # expansion, channels, depth, first stride


@dataclass(frozen=True, kw_only=True)
class Config:
    image: int = 32
    stem: int = 8
    stages: tuple[Stage, ...] = ((1, 8, 1, 1), (6, 12, 2, 2), (6, 16, 2, 2))
    last: int = 64
    classes: int = 10


CONFIGS: dict[str, Config] = {
    "small": Config(),
    "mobilenet-v2": Config(
        image=224,
        stem=32,
        stages=(
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ),
        last=1280,
        classes=1000,
    ),
}


class ConvNorm(nn.Sequential):
    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, *, groups: int = 1
    ) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs))


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = expansion * inputs
        self.residual = stride == 1 and inputs == outputs
        self.branch = nn.Sequential()
        if expansion > 1:
            self.branch.extend((ConvNorm(inputs, hidden), nn.ReLU6()))
        self.branch.extend(
            (ConvNorm(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6(), ConvNorm(hidden, outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) if self.residual else self.branch(x)


class MobileNet(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        channels = config.stem
        self.features = nn.Sequential(ConvNorm(3, channels, 3, 2), nn.ReLU6())
        for expansion, outputs, depth, stride in config.stages:
            for i in range(depth):
                self.features.append(InvertedResidual(channels, outputs, expansion, stride if i == 0 else 1))
                channels = outputs
        self.features.extend((ConvNorm(channels, config.last), nn.ReLU6()))
        self.head = nn.Linear(config.last, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean((2, 3)))


def build(config: Config | str = "small", *, seed: int = 0) -> nn.Module:
    config = CONFIGS[config] if isinstance(config, str) else config
    return randomized(lambda: MobileNet(config), seed)


def example(
    config: Config | str = "small", *, batch: int = 2, seed: int = 0
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    config = CONFIGS[config] if isinstance(config, str) else config
    return (normal(batch, 3, config.image, config.image, seed=seed),), {}
