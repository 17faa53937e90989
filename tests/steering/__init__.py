"""Steering vectors: what they are made of, how they are applied, measured and kept."""
