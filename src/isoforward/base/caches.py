"""Where this machine keeps what is made once: tokens of a corpus, calibrations, choices of kernels."""

from __future__ import annotations

from pathlib import Path

from platformdirs import user_cache_path

from isoforward.base.errors import StorageFailed


def cache_directory(*parts: str) -> Path:
    """$XDG_CACHE_HOME/isoforward, or where this system's programs keep such things. It need not exist.

    StorageFailed where neither that variable nor a home directory says where.
    """
    try:
        return user_cache_path("isoforward", appauthor=False).joinpath(*parts)
    except RuntimeError as error:
        raise StorageFailed("this user has no home directory to keep a cache in; set XDG_CACHE_HOME") from error
