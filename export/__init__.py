"""The export: a checkpoint becomes a bundle of ONNX graphs, written rather than traced."""
