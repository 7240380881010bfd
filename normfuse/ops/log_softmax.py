"""The logarithm of a softmax along one axis, torch's own; it counts as one."""

from normfuse.ops.define import Operator
from normfuse.ops.softmax import one_axis

OPERATOR = Operator(
    "log_softmax",
    role="softmax",
    kind="softmax",
    source="METHODS 3.1",
    axes=one_axis,
    gain=None,
    shift=None,
    eps=None,
    mean_blind=True,
    each=5,
)
