"""Where a saved tensor goes that names a file: looked at while recording, before a run could be lost."""

from __future__ import annotations

import os
from pathlib import Path

from tracelens.errors import OptionError


def require_writable(file: str | os.PathLike[str]) -> str:
    """The file's name; raises :class:`OptionError` where no file of that name can be written."""
    if not isinstance(file, str | os.PathLike):  # pyright: ignore[reportUnnecessaryIsInstance]  # users may not be typed
        raise OptionError(f"to={file!r} is no name of a file", instead='to="h.safetensors"')
    path = Path(file)
    folder = path.absolute().parent
    if path.is_dir():
        raise OptionError(
            f"to={str(file)!r} is a folder, and a save is written to a file",
            instead=f"to={str(path / 'h.safetensors')!r}",
        )
    if not folder.is_dir():
        raise OptionError(
            f"to={str(file)!r} cannot be written: there is no folder {str(folder)!r}",
            instead=f"os.makedirs({str(folder)!r}) before the block",
        )
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise OptionError(
            f"to={str(file)!r} cannot be written: permission is denied",
            instead="a file in a folder of your own",
        )
    return str(file)
