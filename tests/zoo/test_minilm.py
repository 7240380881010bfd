"""A trained sentence encoder says the same after `optimize` as before."""

from __future__ import annotations

import pytest
import torch

import normfuse
from tests.zoo import minilm

pytestmark = pytest.mark.real

PARAPHRASES = (
    "Our kitten likes to sleep on the heated ledge over the furnace.",
    "The cat prefers the warm shelf above the boiler to every cushion in the house.",
)


@pytest.fixture(scope="module")
def encoder() -> minilm.Encoder:
    pytest.importorskip(minilm.PACKAGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        return minilm.load()


@pytest.fixture(scope="module")
def reference(encoder: minilm.Encoder) -> torch.Tensor:
    return encoder.embed(encoder.model)


def nearest(embeddings: torch.Tensor, sentence: str) -> str:
    scores = embeddings @ embeddings[minilm.SENTENCES.index(sentence)]
    return minilm.SENTENCES[int(scores.topk(2).indices[1])]


def test_the_model_is_the_trained_one(reference: torch.Tensor) -> None:
    assert reference.shape == (len(minilm.SENTENCES), 384)
    assert len(minilm.SENTENCES) == 50
    assert nearest(reference, PARAPHRASES[0]) == PARAPHRASES[1]


def test_embeddings_are_the_same(encoder: minilm.Encoder, reference: torch.Tensor) -> None:
    before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    optimized = normfuse.optimize(encoder.model, kwargs=encoder.batch(minilm.SENTENCES[16:24]))
    embeddings = encoder.embed(optimized)

    assert optimized.report.verification
    assert (embeddings - reference).norm() / reference.norm() < 1e-5
    per_sentence = (embeddings - reference).norm(dim=1)  # the reference's rows have norm one
    assert per_sentence.max() < 1e-5
    after = encoder.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
