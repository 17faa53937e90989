"""Lenses: what each layer would say next. Written on the public language alone."""
