"""Lowering rules: regions that ONNX has one operator for become a call of it."""
