"""Ordinary ways to change the weights of a model: convolution `0`, BatchNorm `1`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from tests.support import image, randomised


def model() -> Any:
    return randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))


def other() -> Any:
    return randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), seed=7)


def in_place(m: Any) -> None:
    m[0].weight.mul_(2)


def one_number(m: Any) -> None:
    m[0].weight[1, 2, 0, 1] += 3


def optimizer_step(m: Any) -> None:
    with torch.enable_grad():
        m(image(2, 3, 6, 6)).sum().backward()
    torch.optim.SGD(m.parameters(), lr=0.1).step()
    m.zero_grad()


def load_state_dict(m: Any) -> None:
    m.load_state_dict(other().state_dict())


def load_state_dict_assigned(m: Any) -> None:
    m.load_state_dict(other().state_dict(), assign=True)


def data_copied(m: Any) -> None:
    m[0].weight.data.copy_(other()[0].weight)


def data_scaled(m: Any) -> None:
    m[0].weight.data.mul_(2)


def data_assigned(m: Any) -> None:
    m[1].running_mean.data = other()[1].running_mean


def averages_swapped(m: Any) -> None:
    for now, average in zip(m.parameters(), other().parameters(), strict=True):
        now.data, average.data = average.data, now.data


def vector(m: Any) -> None:
    vector_to_parameters(2 * parameters_to_vector(m.parameters()), m.parameters())


def set_to(m: Any) -> None:
    m[0].bias.set_(other()[0].bias)


def training_forward(m: Any) -> None:
    m.train()
    m(3 * image(8, 3, 8, 8) + 1)
    m.eval()


def numpy_memory(m: Any) -> None:
    m[0].bias.detach().numpy()[:] *= 3


def many_at_once(m: Any) -> None:
    torch._foreach_mul_(list(m.parameters()), 1.5)


def parameter_replaced(m: Any) -> None:
    m[0].weight = nn.Parameter(2 * m[0].weight.detach())


def buffer_replaced(m: Any) -> None:
    m[1].running_var = 2 * m[1].running_var


def module_replaced(m: Any) -> None:
    m[1] = other()[1]


def same_memory_then_one_number(m: Any) -> None:
    m[0].weight = nn.Parameter(m[0].weight.data)
    m(image(2, 3, 6, 6))
    m[0].weight[1, 2, 0, 1] += 3


def moved_and_back(m: Any) -> None:
    kept = copy.deepcopy(m.state_dict())
    m.double()
    m[0].weight.mul_(2)
    m.float()
    assert not torch.equal(m[0].weight, kept["0.weight"])


WAYS: tuple[Callable[[Any], None], ...] = (
    in_place,
    one_number,
    optimizer_step,
    load_state_dict,
    load_state_dict_assigned,
    data_copied,
    data_scaled,
    data_assigned,
    averages_swapped,
    vector,
    set_to,
    training_forward,
    numpy_memory,
    many_at_once,
    parameter_replaced,
    buffer_replaced,
    module_replaced,
    same_memory_then_one_number,
    moved_and_back,
)
