"""Vision encoders, one file each, and the selection of their hidden states."""
