"""Every specimen the whole way: captured, optimized, equal, also at another batch size."""

from __future__ import annotations

import pytest
import torch

import normfuse
from normfuse import models
from tests.support import assert_same_function
from tests.zoo.test_hugging_face import close

SMALL = [(name, config) for name in models.names() for config in models.load(name).CONFIGS if config.startswith("small")]


@pytest.mark.parametrize(("name", "config"), SMALL, ids=lambda p: str(p))
@torch.no_grad()
def test_the_whole_way(name: str, config: str) -> None:
    family = models.load(name)
    model = family.build(config)
    args, kwargs = family.example(config)
    result = normfuse.optimize(model, args, kwargs)
    assert_same_function(result)
    args, kwargs = family.example(config, batch=3)
    assert close(result(*args, **kwargs), model(*args, **kwargs))


NOTHING_LEFT = {
    "gpt": "layer_norm",
    "vit": "layer_norm",
    "resnet": "batch_norm",
    "mobilenet": "batch_norm",
    "repvgg": "batch_norm",
}


@pytest.mark.parametrize(("name", "kind"), list(NOTHING_LEFT.items()))
def test_what_is_left(name: str, kind: str) -> None:
    family = models.load(name)
    args, kwargs = family.example("small")
    result = normfuse.optimize(family.build("small"), args, kwargs)
    assert not any(getattr(n.target, "_opname", "") == kind for n in result.graph_module.graph.nodes)
