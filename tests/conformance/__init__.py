"""The public API against the oracles, for every family and every site."""
