"""`Sensitivity`: what each quantizer of a model costs by itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from numbers import Integral
from typing import Any

from ..errors import QdqError

KINDS = ("activation", "weight", "layer")
ORDERS = ("alone_on", "alone_off")


@dataclasses.dataclass(frozen=True)
class QuantizerSensitivity:
    """One quantizer, or one layer, at one number of bits.

    Attributes:
        name: path of the quantizer; of a layer, the path of its weight.
        kind: "activation", "weight" or "layer" (its weight and its input at once).
        bits: of the codes; of a layer, of its weight.
        tried: whether these are not the model's own bits but some that were asked for.
        alone_on: SQNR in dB of the float model with this quantizer alone; or the user's metric of that model.
        alone_off: what the quantized model gains where this quantizer alone is taken off, in dB or in the user's
            metric. Where `tried`, the model that it is taken off from has these bits here.
        elements: of the weight, or of the activation per sample (of both, of a layer).
        patterns: for `Recipe.exclude`: the operations that compute with these codes.
    """

    name: str
    kind: str
    bits: int
    tried: bool
    alone_on: float
    alone_off: float
    elements: int
    patterns: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """All quantizers of a model, the worst first; printing it gives a table.

    Attributes:
        entries: first those with the model's own bits, then those with other bits; within each, the worst first.
        quantized: SQNR in dB of the quantized model; or the user's metric of it.
        in_float: the user's metric of the float model; None for SQNR.
        samples: how many samples were run (dimension 0 of the first input); 0 for a user's metric.
        kinds: what was tried.
        bits: at which quantizers were tried besides their own.
    """

    entries: tuple[QuantizerSensitivity, ...]
    quantized: float
    in_float: float | None = None
    samples: int = 0
    kinds: tuple[str, ...] = KINDS
    bits: tuple[int, ...] = ()

    def __iter__(self) -> Iterator[QuantizerSensitivity]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def find(self, name: str, bits: int | None = None) -> QuantizerSensitivity:
        """The entry of a quantizer; `bits` None means the model's own.

        Raises:
            KeyError: there is none.
        """
        for entry in self.entries:
            if entry.name == name and (not entry.tried if bits is None else entry.bits == bits):
                return entry
        raise KeyError(f"no quantizer {name!r}" + ("" if bits is None else f" at {bits} bits"))

    def sorted_by(self, order: str) -> Sensitivity:
        """The same in another order: "alone_on" (the least first) or "alone_off" (the largest gain first).

        Raises:
            QdqError: another order.
        """
        return dataclasses.replace(self, entries=in_order(self.entries, order))

    def worst(self, count: int, kind: str | None = None, bits: int | None = None) -> list[str]:
        """Patterns of the first `count` entries: `Recipe(exclude=result.worst(3))` keeps what they name in float.

        Args:
            count: of entries, 0 or more; an activation may give several patterns, as all operations that compute with
                its codes have to leave them.
            kind: only of this kind.
            bits: at this number of bits; None means the model's own.

        Raises:
            QdqError: a count that is no integer, an unknown kind, or a kind or bits that were not tried.
        """
        if isinstance(count, bool) or not isinstance(count, Integral) or count < 0:
            raise QdqError(f"count must be a number of entries, 0 or more, not {count!r}")
        if kind is not None and kind not in KINDS:
            raise QdqError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
        if kind is not None and kind not in self.kinds:
            raise QdqError(f"no {kind} was tried: pass kinds={[*self.kinds, kind]} to qdq.sensitivity")
        meant = [e for e in self.entries if kind is None or e.kind == kind]
        meant = [e for e in meant if (not e.tried if bits is None else e.bits == bits)]
        if not meant and bits is not None and (kind == "layer" or bits not in self.bits):
            told = "layers have their own bits alone" if kind == "layer" else f"pass bits={bits!r} to qdq.sensitivity"
            raise QdqError(f"nothing was tried at {bits!r} bits: {told}")
        return list(dict.fromkeys(p for entry in meant[: int(count)] for p in entry.patterns))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON takes it; None for a value that is infinite (no error at all) or not a number."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(v) for v in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        return plain(dataclasses.asdict(self))

    def __str__(self) -> str:
        if self.in_float is None:
            lines = [f"quantized model: SQNR {self.quantized:.2f} dB, {self.samples} samples"]
        else:
            lines = [f"quantized model: metric {self.quantized:.6g}, in float {self.in_float:.6g}"]
        show: Callable[[float], str] = "{:.2f} dB".format if self.in_float is None else "{:.6g}".format
        gain: Callable[[float], str] = "{:+.2f} dB".format if self.in_float is None else "{:+.6g}".format
        rows = [("quantizer", "kind", "bits", "elements", "alone on", "alone off")]
        rows += [
            (e.name, e.kind, str(e.bits), str(e.elements), show(e.alone_on), gain(e.alone_off)) for e in self.entries
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        for row in rows:
            cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            lines.append("  ".join(cells))
        return "\n".join(lines)


def in_order(entries: Iterable[QuantizerSensitivity], order: str = "alone_on") -> tuple[QuantizerSensitivity, ...]:
    """The entries, those with the model's own bits first, the worst first within each number of bits."""
    if order not in ORDERS:
        raise QdqError(f"order must be one of {', '.join(ORDERS)}, not {order!r}")

    def key(entry: QuantizerSensitivity) -> tuple[Any, ...]:
        # NaN, which a metric may give of a broken model, is the worst.
        on = -math.inf if math.isnan(entry.alone_on) else entry.alone_on
        gain = math.inf if math.isnan(entry.alone_off) else entry.alone_off
        ranks = (on, -gain) if order == "alone_on" else (-gain, on)
        return entry.tried, entry.bits if entry.tried else 0, *ranks

    return tuple(sorted(entries, key=key))
