"""The runtime: runs a bundle with numpy and one engine; never imports torch or the export side."""
