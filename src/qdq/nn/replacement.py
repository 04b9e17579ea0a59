"""The process-wide replacement of `torch.nn` classes, for code written that way.

New code converts one model instead (:func:`qdq.nn.quantize_modules`) and changes nothing for others.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import warnings
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from torch import nn

from .conversion import QUANTIZED_CLASSES

_log = logging.getLogger(__name__)

# What is replaced by default, as published: no max pools, no instance norms, nothing that came later.
_PUBLISHED = (
    *("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
    *("Linear", "LSTM", "LSTMCell", "AvgPool1d", "AvgPool2d", "AvgPool3d"),
    *("AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d"),
)
_DEFAULT = tuple((nn, c.__name__, q) for c, q in QUANTIZED_CLASSES.items() if c.__name__ in _PUBLISHED)

_Entry = tuple[Any, str, Any]


@dataclasses.dataclass(frozen=True)
class _Level:
    """One replacement in force: who asked for it, and what it puts where."""

    owner: QuantModuleReplacementHelper
    entries: tuple[_Entry, ...]


class _Process:
    """What is replaced in this process: levels, of which the last one rules, and the originals of all of them."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.levels: list[_Level] = []
        self.originals: dict[tuple[int, str], _Entry] = {}
        self.thread: threading.Thread | None = None

    def check_thread(self) -> None:
        """Refuses a thread while another one, still alive, has classes replaced."""
        thread = self.thread
        if self.levels and thread is not None and thread is not threading.current_thread() and thread.is_alive():
            raise RuntimeError(
                f"classes of torch.nn are replaced by the thread {thread.name!r}: call deactivate() there first, or "
                "convert models one by one with qdq.nn.quantize_modules, which is safe in threads"
            )

    def set_levels(self, levels: list[_Level]) -> None:
        """Puts the originals back, and then what the last of `levels` replaces; all of it or nothing."""
        before = self.levels
        try:
            self._install(levels)
        except BaseException:
            self._install(before)
            raise
        self.levels = levels
        self.thread = threading.current_thread() if levels else None
        if not levels:
            self.originals.clear()

    def _install(self, levels: list[_Level]) -> None:
        for module, name, original in self.originals.values():
            setattr(module, name, original)
        for module, name, replacement in levels[-1].entries if levels else ():
            original = getattr(module, name)
            setattr(module, name, replacement)  # may fail: what was not replaced must not be put back
            self.originals.setdefault((id(module), name), (module, name, original))


_process = _Process()


class QuantModuleReplacementHelper:
    """Replaces classes of `torch.nn` (or of other modules) in the whole process, and puts them back.

    As a context manager it puts back, at the end of the block and on an exception, what was in force before
    `apply_quant_modules`.
    """

    def __init__(self) -> None:
        self._entries: tuple[_Entry, ...] = _DEFAULT

    def prepare_state(
        self, float_module_list: Iterable[str] | None = None, custom_map: Iterable[Any] | None = None
    ) -> None:
        """Decide what `apply_quant_modules` replaces; nothing of an earlier call remains. Arguments: `initialize`."""
        floats = _checked_names(float_module_list)
        custom = _checked_custom(custom_map)
        taken = {(id(module), name) for module, name, _ in custom}
        default = (e for e in _DEFAULT if e[1] not in floats and (id(e[0]), e[1]) not in taken)
        self._entries = (*default, *custom)

    def apply_quant_modules(self) -> None:
        """Replace. What an earlier replacement did and this one does not is undone until this one ends.

        Raises:
            RuntimeError: another thread has classes replaced.
        """
        with _process.lock:
            _process.check_thread()
            _process.set_levels([*self._before(), _Level(self, self._entries)])
        _log.debug("replaced: %s", ", ".join(name for _, name, _ in self._entries))

    def restore_float_modules(self) -> None:
        """Put back what was in force before `apply_quant_modules`; without one, nothing happens.

        Raises:
            RuntimeError: another thread has classes replaced.
        """
        with _process.lock:
            before = self._before()
            if len(before) != len(_process.levels):
                _process.check_thread()
                _process.set_levels(before)

    def _before(self) -> list[_Level]:
        """The levels below the first one of this object: all of them where it has none."""
        levels = _process.levels
        return levels[: next((i for i, level in enumerate(levels) if level.owner is self), len(levels))]

    def __enter__(self) -> QuantModuleReplacementHelper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore_float_modules()


def initialize(
    float_module_list: Iterable[str] | None = None, custom_quant_modules: Iterable[Any] | None = None
) -> QuantModuleReplacementHelper:
    """Replaces 15 classes of `torch.nn` by quantized ones, in the whole process, until :func:`deactivate`.

    They are Conv1d to 3d, ConvTranspose1d to 3d, Linear, LSTM, LSTMCell, AvgPool1d to 3d and AdaptiveAvgPool1d to 3d.
    Models built from `torch.nn` afterwards are quantized; existing ones do not change. A later call starts from the
    originals, so that its arguments alone decide. Only the names in `torch.nn` are replaced, not what other modules
    imported from there before.

    Args:
        float_module_list: names of classes that are not replaced.
        custom_quant_modules: further replacements `(module, "Name", Class)`; they win over the list and the default.

    Returns:
        A context manager that puts back, on leaving its block, what was in force before this call. Old code ignores it.

    Raises:
        TypeError, ValueError: arguments of another form; a module that has no such name. Nothing is replaced then.
        RuntimeError: another thread has classes replaced.
    """
    helper = QuantModuleReplacementHelper()
    helper.prepare_state(float_module_list, custom_quant_modules)
    helper.apply_quant_modules()
    return helper


def deactivate() -> None:
    """Puts all original classes back, whatever was nested; without a replacement nothing happens.

    Raises:
        RuntimeError: another thread has classes replaced.
    """
    with _process.lock:
        _process.check_thread()
        _process.set_levels([])


def _checked_names(names: Iterable[str] | None) -> frozenset[str]:
    if names is None:
        return frozenset()
    found = None if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    if found is None or not all(isinstance(name, str) for name in found):
        raise TypeError(f"float_module_list must be a list of class names such as ['Linear'], got {names!r}")
    unknown = sorted(set(found) - set(_PUBLISHED))
    if unknown:
        warnings.warn(
            f"float_module_list names classes that are not replaced anyway: {', '.join(unknown)}; those that are: "
            f"{', '.join(_PUBLISHED)}",
            stacklevel=4,
        )
    return frozenset(found)


def _checked_custom(custom_map: Iterable[Any] | None) -> list[_Entry]:
    checked: list[_Entry] = []
    if custom_map is not None and not isinstance(custom_map, Iterable):
        raise TypeError(f"custom_quant_modules must be a list of tuples (module, 'Name', Class), got {custom_map!r}")
    for entry in custom_map or ():
        if not isinstance(entry, (tuple, list)) or len(entry) != 3 or not isinstance(entry[1], str):
            raise TypeError(f"custom_quant_modules must hold tuples (module, 'Name', Class), got {entry!r}")
        module, name, replacement = entry
        if not callable(replacement):
            raise TypeError(f"custom_quant_modules: {replacement!r} cannot stand for the class {name!r}")
        if not hasattr(module, name):
            raise ValueError(
                f"custom_quant_modules: {getattr(module, '__name__', module)!r} has no {name!r} to replace"
            )
        checked.append((module, name, replacement))
    return checked
