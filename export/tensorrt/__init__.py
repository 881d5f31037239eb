"""TensorRT engines from a bundle: one adapter for all its versions, a process an engine, a plan cache."""
