"""Lowering to ONNX. The packages onnx, onnxscript and onnxruntime are imported here alone, and only when called."""

from normfuse.lower.onnx.file.write import TARGETS, OnnxReport, write_onnx
from normfuse.lower.onnx.run.opened import OnnxFile

__all__ = ["TARGETS", "OnnxFile", "OnnxReport", "write_onnx"]
