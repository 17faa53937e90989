"""Lenses: what they read, how it is kept and how it is shown."""
