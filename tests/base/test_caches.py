from pathlib import Path

import pytest

from isoforward.base.caches import cache_directory
from isoforward.base.errors import StorageFailed


def test_the_variable_says_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory("hardware") == tmp_path / "isoforward" / "hardware"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory().is_relative_to(tmp_path)


def test_a_user_without_a_home_is_told_which_variable_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(*_: object, **__: object) -> Path:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr("isoforward.base.caches.user_cache_path", homeless)
    with pytest.raises(StorageFailed, match="set XDG_CACHE_HOME"):
        cache_directory()
