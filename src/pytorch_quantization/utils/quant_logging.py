"""Old import name. The library logs through the standard :mod:`logging` and installs no handler."""

import logging


def reset_logger_handler() -> None:
    """Remove every handler of the root logger."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)


__all__ = ["reset_logger_handler"]
