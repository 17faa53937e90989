"""How the sites and parameters of a model lie on the ranks that transformers spread it over.

transformers says of modules how their weights are spread (a *style* for each); what follows for the tensors at a
module's sides is the table below. A style that is not in it is refused, and so is a site at which a rank's tensor has
another shape than the table says: that is checked whenever a site is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from tracelens.backends.base import Side
from tracelens.errors import LayoutError
from tracelens.ir.layout import Layout, Shard
from tracelens.ir.sites import KINDS, Scope

if TYPE_CHECKING:
    from tracelens.backends.anatomy import ModelAnatomy

_WHOLE = (False, False)
STYLES: Mapping[str, tuple[bool, bool]] = {
    # Is the last axis of the input in parts, and that of the output?
    "colwise": (False, True),
    "colwise_gather_output": _WHOLE,
    "colwise_rep": _WHOLE,
    "rowwise": (True, False),
    "rowwise_split_input": _WHOLE,
    "rowwise_rep": _WHOLE,
    "embedding_rowwise": _WHOLE,
    "embedding_colwise": _WHOLE,
    "all_reduce": _WHOLE,
    "moe_tp_experts": _WHOLE,
}
_AS_PROJECTED = {"q_normed": "q", "k_normed": "k", "q_rot": "q", "k_rot": "k", "scores": "q", "pattern": "q"}
"""Sites that lie as the projections that they are made from."""


def site_layouts(anatomy: ModelAnatomy, styles: Mapping[str, str]) -> dict[str, Layout]:
    """The sites that ranks have in parts, by name; ``styles`` are transformers' by module, layers as ``*``."""
    found: dict[str, Layout] = {}
    for kind in KINDS:
        tap = anatomy.family.taps.get(kind.name)
        if tap is None or kind.name in _AS_PROJECTED or tap.side is Side.EXPERTS:
            continue
        layers = anatomy.layers_with(kind.name) if kind.scope is Scope.LAYER else (None,)
        if not layers:
            continue
        path = anatomy.module_path(tap, layers[0])
        style = style_of(styles, path)
        if style is None:
            continue
        if style not in STYLES:
            raise LayoutError(
                f"transformers spreads {path!r} by the style {style!r}, of which it is not known what it makes of "
                f"{kind.name!r}",
                instead="a model whose plan has styles of these: " + ", ".join(STYLES),
            )
        split = STYLES[style][tap.side is Side.OUT]
        if split:
            # The last axis of the module's tensor: heads side by side, or neurons.
            found[kind.name] = Shard(2)
    for name, projected in _AS_PROJECTED.items():
        if name in anatomy.family.taps and projected in found:
            found[name] = Shard(1) if name in ("scores", "pattern") else Shard(2)
    return found


def expert_ranks(config: Any) -> int:
    """Over how many ranks whole experts are spread; 1 where each rank has a part of every expert."""
    asked = getattr(config, "distributed_config", None)
    return getattr(asked, "ep_size", None) or 1


def styles_of(model: Any) -> Mapping[str, str]:
    """How transformers spreads a model's modules, by path with layers as ``*``."""
    experts = model.ep_plan if expert_ranks(model.config) > 1 else {}
    return {**(model.tp_plan or {}), **experts}


def style_of(styles: Mapping[str, str], path: str) -> str | None:
    """How transformers spreads a module, if it does."""
    return styles.get(re.sub(r"\.\d+\.", ".*.", path)) or styles.get(path)


_SPLIT = {
    # By style: the axis along which a module's matrix is in parts, and that of its bias.
    "colwise": (0, 0),
    "colwise_gather_output": (0, 0),
    "colwise_rep": (0, 0),
    "rowwise": (1, None),
    "rowwise_split_input": (1, None),
    "rowwise_rep": (1, None),
    "embedding_rowwise": (0, None),
    "embedding_colwise": (1, None),
}

_ALONE = {"rowwise": -1, "grouped_gemm": 0}
"""The same for parameters that have a style by their own path."""


def parameter_layouts(
    whole: nn.Module, own: nn.Module, styles: Mapping[str, str]
) -> tuple[dict[str, Layout], frozenset[str]]:
    """The parameters that ranks have in parts, by path, as the styles say; held to what this rank has of them.

    Beside them those whose parts nobody could put together: of packed matrices.
    """
    found: dict[str, Layout] = {}
    for path, tensor in whole.named_parameters(remove_duplicate=False):
        module, _, name = path.rpartition(".")
        matrix, bias = _SPLIT.get(style_of(styles, module) or "", (None, None))
        # The matrices of all experts are one tensor, with a style of its own.
        alone = _ALONE.get(style_of(styles, path) or "")
        axis = bias if name == "bias" else matrix if alone is None else alone % tensor.ndim
        if axis is not None:
            found[path] = Shard(axis)
    strange: set[str] = set()
    for path, tensor in own.named_parameters(remove_duplicate=False):
        placements: Any = getattr(tensor, "placements", None)
        if placements is None or placements[0].is_replicate():
            really = None
        else:
            # Parts that are packed into each other are no shard of one axis.
            really = (
                Shard(placements[0].dim % tensor.ndim) if placements[0].is_shard() else str(placements[0])
            )
        if path in found and found[path] != really:
            raise LayoutError(f"{path!r} lies on its ranks as {placements}, where {found[path]} was expected")
        if really is not None and path not in found:
            strange.add(path)
    return found, frozenset(strange)


def require_divisible(config: Any, ranks: int, experts: int = 1) -> None:
    """Refuses a number of ranks over which heads or neurons cannot be spread evenly, and names those that could.

    ``experts``: the number of ranks over which experts are spread, whole ones; where that is one, every rank has a part
    of each expert's neurons.
    """
    counts = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "intermediate_size": getattr(config, "intermediate_size", ranks),
    }
    if getattr(config, "num_experts", None):
        word = "num_experts" if experts > 1 else "moe_intermediate_size"
        counts[word] = getattr(config, word, ranks)
    odd = {name: count for name, count in counts.items() if count % ranks}
    if odd:
        fitting = [n for n in range(1, min(counts.values()) + 1) if all(c % n == 0 for c in counts.values())]
        raise LayoutError(
            f"{ranks} ranks cannot share the model evenly: "
            + ", ".join(f"{name} is {count}" for name, count in odd.items()),
            instead="one of these numbers of ranks: " + ", ".join(map(str, fitting)),
        )
