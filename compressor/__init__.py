"""Make BERT-family models smaller and faster: K-SVD, the straight-through factorizer, export to ONNX."""

from compressor.after_import import after_import

# What teaches Transformers to read our checkpoints; Transformers takes seconds to import, so not before it is wanted.
after_import("transformers.quantizers.auto", "compressor.quantizer")
