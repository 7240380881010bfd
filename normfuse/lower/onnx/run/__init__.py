"""Running ONNX files in onnxruntime, from torch."""
