"""HTTP service: texts in, answers of ONNX model folders out."""
