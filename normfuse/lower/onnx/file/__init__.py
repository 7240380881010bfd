"""Writing an ONNX file: operators, functions, names."""
