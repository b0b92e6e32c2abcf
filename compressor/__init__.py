"""Make BERT-family models smaller and faster: K-SVD, the straight-through factorizer, export to ONNX."""
