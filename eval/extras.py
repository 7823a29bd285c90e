"""What lies beside results: pictures, answers, tables. A disk that takes none undoes no result."""

from __future__ import annotations

import logging
from pathlib import Path

logger = logging.getLogger(__name__)


class Extras:
    """Writes files, and warns once of every kind that cannot be written."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def write(self, kind: str, path: Path, content: bytes) -> bool:
        """Whether the file is there, whole; of one that was begun nothing is left."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            if kind not in self._warned:
                self._warned.add(kind)
                logger.warning(
                    "%s: %s cannot be written (%s); results are kept without.",
                    path,
                    kind,
                    error.strerror,
                )
            _remove(path)
            return False
        return True


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        logger.debug("%s is left behind", path, exc_info=True)
