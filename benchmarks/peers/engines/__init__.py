"""One file a peer; each runs in a process of its own, in its peer's environment (`protocol.py`).

Packages that only that environment has are imported inside the functions.
"""
