"""``python -m tracelens`` is the command ``tracelens``."""

from __future__ import annotations

from tracelens.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
