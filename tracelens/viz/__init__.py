"""Notebook views."""
