"""The vocabulary: operators that torch lacks, in the namespace `torch.ops.normfuse`."""

from normfuse.ops import norms, softmax, squash

__all__ = ["norms", "softmax", "squash"]
