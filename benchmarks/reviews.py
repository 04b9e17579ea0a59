"""Sentences of movie reviews with human ratings of their sentiment (Hutto and Gilbert, ICWSM 2014).

They are in the source distribution of `vadersentiment` on PyPI, which `setup_env.sh FOLDER accuracy` fetches.
"""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np

_ARCHIVE = "vaderSentiment-3.3.2.tar.gz"


def archive() -> Path | None:
    """The source distribution, None where it was not fetched."""
    data = os.environ.get("QDQ_DATA")
    path = (Path(data) if data else Path.home() / ".cache" / "qdq-data") / _ARCHIVE
    return path if path.exists() else None


def load(path: Path) -> tuple[list[str], np.ndarray]:
    """The 10,605 sentences and their mean ratings, -4 (negative) to 4 (positive)."""
    with tarfile.open(path) as outer:
        member = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = outer.extractfile(member)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as data:
            file = data.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert file is not None
            rows = [line.split("\t") for line in file.read().decode("utf-8", "replace").splitlines()]
    rows = [row for row in rows if len(row) >= 3]
    return [row[2].strip() for row in rows], np.array([float(row[1]) for row in rows])
