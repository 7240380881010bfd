"""ResNet: basic and bottleneck blocks with in-place ReLU.

The norms are `nn.BatchNorm2d`, each right behind a convolution without bias: all of them fold backward. In
the stream the activation comes after the addition and writes in place, which a functional graph has to get
right first.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ._random import normal, randomized


@dataclass(frozen=True, kw_only=True)
class Config:
    image: int = 32
    width: int = 16
    depths: tuple[int, ...] = (1, 2)
    bottleneck: bool = False
    classes: int = 10


CONFIGS: dict[str, Config] = {
    "small": Config(),
    "small-bottleneck": Config(bottleneck=True),
    "resnet18": Config(image=224, width=64, depths=(2, 2, 2, 2), classes=1000),
    "resnet50": Config(image=224, width=64, depths=(3, 4, 6, 3), bottleneck=True, classes=1000),
}


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class Shortcut(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        same = stride == 1 and inputs == outputs
        super().__init__(
            *(() if same else (convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)))
        )


class Basic(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = convolution(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = convolution(width, width, 3), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = Shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1, self.bn1 = convolution(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = convolution(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = convolution(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = Shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += self.shortcut(x)
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        block = Bottleneck if config.bottleneck else Basic
        channels = config.width
        self.conv1, self.bn1 = convolution(3, channels, 7, 2), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.stages = nn.Sequential()
        for stage, depth in enumerate(config.depths):
            for i in range(depth):
                width, stride = config.width << stage, 2 if i == 0 and stage > 0 else 1
                self.stages.append(block(channels, width, stride))
                channels = block.expansion * width
        self.head = nn.Linear(channels, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn1(self.conv1(images))))
        return self.head(self.stages(x).mean((2, 3)))


def build(config: Config | str = "small", *, seed: int = 0) -> nn.Module:
    config = CONFIGS[config] if isinstance(config, str) else config
    return randomized(lambda: ResNet(config), seed)


def example(
    config: Config | str = "small", *, batch: int = 2, seed: int = 0
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    config = CONFIGS[config] if isinstance(config, str) else config
    return (normal(batch, 3, config.image, config.image, seed=seed),), {}
