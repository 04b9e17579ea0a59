"""The outputs of a captured graph: what they are called in a file, and which are quantized."""

from __future__ import annotations

import itertools

from torch import fx
from torch.utils import _pytree as pytree


def output_names(graph_module: fx.GraphModule) -> list[str]:
    """Names of a captured graph's outputs as a file has them: each one once, and none of an input.

    They are the keys of the model's result where it has any ("output", or "output_0" and so on, where not).
    """
    spec = getattr(graph_module.graph._codegen, "pytree_info", None)
    count = len(_outputs(graph_module))
    names: list[str] = []
    if spec is not None and spec.out_spec is not None:
        with_paths = pytree.tree_leaves_with_path(pytree.tree_unflatten([0] * spec.out_spec.num_leaves, spec.out_spec))
        names = [
            "_".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in p) for p, _ in with_paths
        ]
    if len(names) != count or any(not n or n.isdigit() for n in names):
        names = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    inputs = {str(n.target) for n in graph_module.graph.nodes if n.op == "placeholder"}
    names = [f"{n}_out" if n in inputs else n for n in names]
    unique: list[str] = []
    for name in names:
        others = {*inputs, *names, *unique}
        numbered = (f"{name}_{i}" for i in itertools.count(1))
        unique.append(name if name not in unique else next(n for n in numbered if n not in others))
    return unique


def output_quantizers(graph_module: fx.GraphModule) -> list[str | None]:
    """For each output the path of the quantizer that computes it, if one does."""
    return [str(n.target) if n.op == "call_module" else None for n in _outputs(graph_module)]


def _outputs(graph_module: fx.GraphModule) -> list[fx.Node]:
    output = next(n for n in graph_module.graph.nodes if n.op == "output")
    return [leaf for leaf in pytree.tree_leaves(output.args[0]) if isinstance(leaf, fx.Node)]
