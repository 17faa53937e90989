"""Small scripts, each with a ``main()``: ``python -m examples.logit_lens``."""
