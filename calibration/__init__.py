"""Calibration: data, activation ranges, quantize/dequantize insertion and its error."""
