"""Measurements: latency and memory of a bundle, with the machine's name beside them."""
