"""Layers that several encoders and language models share."""
