"""The norms that torch's operators cannot say."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from normfuse.ops.define import Given, Operator, affine, count_of, narrowed, root_of, widened


def reference(
    x: Tensor,
    axes: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    place: str = "inside",
    centre: bool = True,
    ddof: int = 0,
) -> Tensor:
    """weight * d / root(sum(d**2, axes) / (n - ddof)) + bias, where d is x, less its mean if `centre`.

    `eps` stands `"inside"` the root, `"outside"` of it (added to it), or is its floor (`"clamp"`) or that of the mean
    square below it (`"floor"`); the variance may be unbiased (`ddof` 1).
    """
    wide, over = widened(x), list(axes)
    d = wide - wide.mean(over, keepdim=True) if centre else wide
    mean_square = d.square().sum(over, keepdim=True) / (count_of(x, over) - ddof)
    return affine(narrowed(d / root_of(mean_square, eps, place), x, weight), weight, bias, axes).to(x.dtype)


def kind(given: Given) -> str | None:
    """By another deviation it is no norm of that name, though it is one operator."""
    return None if given["ddof"] else "layer_norm" if given["centre"] else "rms_norm"


def each(given: Given) -> int:
    return 5 if given["centre"] else 3


OPERATOR = Operator(
    "standardize",
    "(Tensor x, int[] axes, Tensor? weight=None, Tensor? bias=None, *, float eps, str place='inside', "
    "bool centre=True, int ddof=0) -> Tensor",
    reference,
    role="norm",
    kind=kind,
    kinds=("layer_norm", "rms_norm"),
    source="METHODS 1.1",
    place="place",
    odd=True,
    homogeneous=True,
    bounded=True,
    each=each,
    by_reference=False,
)
STANDARDIZE = OPERATOR.packet
