"""Lightning's checkpoints as state files: atomic, verified, never pickled."""

from __future__ import annotations

from pathlib import Path

from lightning.fabric.plugins import CheckpointIO

from isoforward.base.storage import remove, remove_partials
from isoforward.formats import checkpoint_file


class StateFileIO(CheckpointIO):  # type: ignore[misc]
    """Passed to the Trainer as a plugin. One process writes into a directory of checkpoints at a time."""

    def save_checkpoint(self, checkpoint: dict[str, object], path: str | Path, storage_options: object = None) -> None:
        remove_partials(Path(path).parent)
        checkpoint_file.save(Path(path), checkpoint)

    def load_checkpoint(
        self, path: str | Path, map_location: object = None, weights_only: bool | None = None
    ) -> dict[str, object]:
        """On the CPU, whatever is asked: random states must stay there, and the rest is copied where it belongs."""
        return checkpoint_file.load(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        remove(Path(path))
