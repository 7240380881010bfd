"""Every specimen: the same from the same seed, nothing at its default, any batch, exportable."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

from normfuse import models

SMALL = tuple(
    (name, config)
    for name in models.names()
    for config in models.load(name).CONFIGS
    if config.startswith("small")
)
PUBLISHED = {
    ("bert", "bert-base"): 109_482_240,
    ("convnext", "convnext-tiny"): 28_589_128,
    ("dit", "dit-xl-2"): 675_129_632 - 256 * 1152,  # theirs counts the fixed positions
    ("gpt", "gpt2-124m"): 124_439_808,
    ("gpt", "gpt2-xl"): 1_557_611_200,
    ("llama", "llama2-7b"): 6_738_415_616,
    ("llama", "llama3-8b"): 8_030_261_248,
    ("llama", "tinyllama-1.1b"): 1_100_048_384,
    ("mobilenet", "mobilenet-v2"): 3_504_872,
    ("neox", "pythia-160m"): 162_322_944,
    ("resnet", "resnet18"): 11_689_512,
    ("resnet", "resnet50"): 25_557_032,
    ("swin", "swin-t"): 28_288_354,
    ("unet", "ddpm-cifar10"): 35_746_307,
    ("vit", "vit-b16"): 86_567_656,
    ("vit", "dinov2-b14"): 86_580_480 - 768 + 1000 * (768 + 1),  # theirs has a mask token and no head
}

each = pytest.mark.parametrize(("name", "config"), SMALL)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}


@each
def test_the_seed_decides_every_value(name: str, config: str) -> None:
    specimen = models.load(name)
    state = torch.get_rng_state()
    first, again, other = (values(specimen.build(config, seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)
    args, kwargs = specimen.example(config)
    same_args, same_kwargs = specimen.example(config)
    assert all(map(torch.equal, tree_leaves((args, kwargs)), tree_leaves((same_args, same_kwargs))))
    assert torch.equal(torch.get_rng_state(), state)


@each
def test_nothing_is_at_its_default(name: str, config: str) -> None:
    model = models.load(name).build(config)
    assert not any(module.training for module in model.modules())
    for key, value in values(model).items():
        if value.numel() > 1:
            assert value.std() > 0.01, f"{key} is constant"
    for key, value in model.named_buffers():
        if key.endswith("running_var"):
            assert value.min() >= 0.5
            assert value.max() <= 2.0
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            assert module.weight.mean().abs() > 0.1


@each
def test_runs_at_two_batch_sizes(name: str, config: str) -> None:
    specimen = models.load(name)
    model = specimen.build(config)
    for batch in (2, 3):
        args, kwargs = specimen.example(config, batch=batch)
        with torch.no_grad():
            outputs = tree_leaves(model(*args, **kwargs))
        for output in outputs:
            assert output.shape[0] == batch
            assert output.isfinite().all()
            assert 0.1 < output.std() < 100


@each
def test_exports_with_a_dynamic_batch(name: str, config: str) -> None:
    specimen = models.load(name)
    model = specimen.build(config)
    args, kwargs = specimen.example(config)
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    program = torch.export.export(
        model, args, kwargs, dynamic_shapes={key: {0: Dim.AUTO} for key in bound}, strict=False
    )
    args, kwargs = specimen.example(config, batch=3, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*args, **kwargs), model(*args, **kwargs))


@pytest.mark.parametrize(("name", "config"), PUBLISHED)
def test_full_sizes_are_the_published_ones(name: str, config: str) -> None:
    with torch.device("meta"):
        model = models.load(name).build(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name, config]


def test_an_unknown_name_lists_the_near_ones() -> None:
    with pytest.raises(ValueError, match="resnet"):
        models.load("resent")
    with pytest.raises(ValueError, match="bert, convnext"):
        models.load("zzz")
