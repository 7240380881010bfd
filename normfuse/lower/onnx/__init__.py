"""Lowering to ONNX. The packages onnx, onnxscript and onnxruntime are imported here alone, and only when called."""

from normfuse.lower.onnx.opened import OnnxFile
from normfuse.lower.onnx.write import TARGETS, OnnxReport, write_onnx

__all__ = ["TARGETS", "OnnxFile", "OnnxReport", "write_onnx"]
