"""Ranks: processes that hold the parts of a model, launched, asked and ended by the process that holds the block."""
