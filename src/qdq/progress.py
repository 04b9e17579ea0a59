"""Progress bars on long work: shown on a terminal alone, and only where `rich` is at hand."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], label: str, total: int | None = None, enabled: bool = True) -> Iterator[T]:
    """The items, with a progress bar on standard error while they are gone through.

    Args:
        items: what is gone through.
        label: what the work is.
        total: how many items there are, where `len` does not tell.
        enabled: False shows nothing; neither is anything shown where standard error is no terminal.
    """
    if not enabled or not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(items, total=total, description=label)
