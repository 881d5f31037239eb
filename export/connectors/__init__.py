"""Connectors from visual features to the language model's width, one file each."""
