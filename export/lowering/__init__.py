"""Exact rewritings of the portable graph for one engine each; weights stay in the portable file."""
