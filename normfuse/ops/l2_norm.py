"""Division by the length of the row."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from normfuse.ops.define import Operator, root_of, widened


def reference(x: Tensor, axes: Sequence[int], *, eps: float, place: str = "clamp") -> Tensor:
    """x / root(sum(x**2, axes)); `eps` stands inside the root, outside of it, or is its floor (`"clamp"`, F.normalize).

    With `"floor"` it is the floor of the sum of squares.
    """
    wide = widened(x)
    return (wide / root_of(wide.square().sum(list(axes), keepdim=True), eps, place)).to(x.dtype)


OPERATOR = Operator(
    "l2_norm",
    "(Tensor x, int[] axes, *, float eps, str place='clamp') -> Tensor",
    reference,
    role="norm",
    kind="l2_norm",
    source="torch.nn.functional.normalize",
    gain=None,
    shift=None,
    place="place",
    multiple=True,
    odd=True,
    homogeneous=True,
    bounded=True,
    each=3,
    by_reference=False,
)
L2_NORM = OPERATOR.packet
