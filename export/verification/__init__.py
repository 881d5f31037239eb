"""Parts of the parity ladder: the report, the measures, the bundle's layers and one reference a family."""
