"""Minimum cut: the cheapest way to part a directed graph with capacities into the side of a source and that of a sink.

By maximum flow (Ford and Fulkerson 1956), with the layered search of Dinic 1970.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable


def minimum_cut(
    edges: Iterable[tuple[Hashable, Hashable, float]], source: Hashable, sink: Hashable
) -> frozenset[Hashable]:
    """The nodes on the side of `source` in a cut of least capacity; of several such cuts the one nearest to it.

    Args:
        edges: (from, to, capacity of at least 0); infinite capacities are never cut. Several edges may join two nodes.
        source, sink: nodes that must come to lie on different sides.

    Raises:
        ValueError: a path of infinite capacity joins `source` to `sink`.
    """
    network = _Network()
    for start, end, capacity in edges:
        if capacity > 0:
            network.add(start, end, capacity)
    while True:
        levels = network.levels(source)
        if sink not in levels:
            return frozenset(levels)
        network.fill(source, sink, levels)


class _Network:
    """Edges with what they can still take; edge i ^ 1 is edge i backwards."""

    def __init__(self) -> None:
        self.ends: list[Hashable] = []
        self.left: list[float] = []
        self.leaving: dict[Hashable, list[int]] = {}

    def add(self, start: Hashable, end: Hashable, capacity: float) -> None:
        for node, other, room in ((start, end, capacity), (end, start, 0.0)):
            self.leaving.setdefault(node, []).append(len(self.ends))
            self.ends.append(other)
            self.left.append(room)

    def levels(self, source: Hashable) -> dict[Hashable, int]:
        """How many edges away from the source each node is that can still be reached."""
        found, queue = {source: 0}, deque([source])
        while queue:
            node = queue.popleft()
            for edge in self.leaving.get(node, ()):
                end = self.ends[edge]
                if self.left[edge] > 0 and end not in found:
                    found[end] = found[node] + 1
                    queue.append(end)
        return found

    def fill(self, source: Hashable, sink: Hashable, levels: dict[Hashable, int]) -> None:
        """Sends flow along shortest paths until each of them has an edge that is full."""
        position = dict.fromkeys(self.leaving, 0)
        path: list[int] = []
        node = source
        while True:
            if node == sink:
                self._send(path)
                path, node = [], source
            edges = self.leaving[node]
            while position[node] < len(edges) and not self._leads_on(edges[position[node]], node, levels):
                position[node] += 1
            if position[node] < len(edges):
                path.append(edges[position[node]])
                node = self.ends[path[-1]]
            elif path:  # a dead end: back, and on from there by another edge
                node = self.ends[path.pop() ^ 1]
                position[node] += 1
            else:
                return

    def _send(self, path: list[int]) -> None:
        room = min(self.left[edge] for edge in path)
        if room == float("inf"):
            raise ValueError("source and sink are joined by a path of infinite capacity")
        for edge in path:
            self.left[edge] -= room
            self.left[edge ^ 1] += room

    def _leads_on(self, edge: int, node: Hashable, levels: dict[Hashable, int]) -> bool:
        return self.left[edge] > 0 and levels.get(self.ends[edge], -1) == levels[node] + 1
