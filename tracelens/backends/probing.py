"""How the tensors at a model's modules lie on its ranks, seen in one forward pass over a few tokens.

Styles say it of the modules that have weights in parts; of what lies between these (an activation function, the norm of
each head) nobody does. So all ranks run the pass and compare: what has one shape and the same bits everywhere is whole,
and what has on each rank that rank's stretch of one axis, and all of every other, is in parts. A DTensor says itself
how it lies, and is held to that. Anything else is not guessed at, and refused when it is used. The table of named sites
is held to the same pass; where the user has spread the model there is none, and it is made of what is seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tracelens.backends.base import HeadsView, RowsView, Side, Tap
from tracelens.backends.hooks import seat_of, watch
from tracelens.backends.layouts import style_of, styles_of
from tracelens.backends.meta_copy import aside, meta_copy
from tracelens.backends.module_sides import without_data_of_experts
from tracelens.backends.survey import Watcher
from tracelens.backends.transfer import moved, on_cpu
from tracelens.backends.users_plan import fits, said, settled
from tracelens.backends.views import shown
from tracelens.errors import LayoutError
from tracelens.ir.layout import WHOLE_EVERYWHERE, Layout, Partial, Replicate, Shard, owned
from tracelens.ir.module_sites import INPUT, OUTPUT, Key, module_site
from tracelens.ir.sites import KINDS, Scope, Site
from tracelens.placement import InParts, Placement, Probed, Seen

if TYPE_CHECKING:
    from tracelens.backends.anatomy import ModelAnatomy
    from tracelens.backends.mesh import Mesh

_ROWS = 2
Shapes = dict[str, tuple[int, ...]]


def probe(anatomy: ModelAnatomy, placement: Placement) -> Probed:
    """How the tensors at modules lie. Every rank of the model calls it, and is given the same answer.

    Raises :class:`~tracelens.errors.LayoutError` on all ranks where a named site lies otherwise than ``placement``
    has it.
    """
    mesh = anatomy.mesh
    assert mesh is not None
    whole: Shapes = {}
    paths: dict[str, str] = {}
    skeleton = without_data_of_experts(meta_copy(anatomy._whole))
    # Ranks may share the positions, by layers of torch's that do not know how many there are: as many for each.
    positions = 2 * mesh.ranks if mesh.by_user else 3
    ids = torch.arange(_ROWS * positions).reshape(_ROWS, positions) % anatomy.widths["V"]
    with aside():
        watcher = _watching(skeleton)
        skeleton(**_inputs(ids.to("meta")))
    for name, path, tensor in _tensors(watcher):
        whole[name], paths[name] = tuple(tensor.shape), path
    passed = _passed(anatomy, ids)
    own = {name: _about(tensor, mesh) for name, _, tensor in _tensors(passed)}
    everywhere = mesh.exchanged({"stage": mesh.stage, "tensors": own})
    parts: dict[str, InParts] = {}
    unclear: dict[str, str] = {}
    sums: set[str] = set()
    styles = {} if mesh.by_user else styles_of(anatomy.model)
    for name, shape in whole.items():
        # What the model itself returns is where its logits are.
        stage = placement.of_path(paths[name]) if paths[name] else placement.place_of(Site("logits")).index
        seen = [rank["tensors"].get(name) for rank in everywhere if rank["stage"] == stage]
        found = lying(shape, seen, mesh.ranks)
        style = style_of(styles, paths[name])
        if isinstance(found, InParts) and style is not None and "packed" in style:
            found = f"is at a module that is spread by the style {style!r}, whose parts are packed into each other"
        if isinstance(found, InParts):
            parts[name] = found
        elif isinstance(found, Partial):
            sums.add(name)
        elif found is not None:
            unclear[name] = found
    probed = Probed(parts, unclear, frozenset(sums))
    if mesh.by_user:
        require_same_weights(anatomy.model, mesh)
        anatomy.distributed = frozenset(
            event.path
            for event in passed.events
            if event.side == OUTPUT and any(said(tensor) is not None for tensor in event.tensors.values())
        )
        anatomy.seen = seen_layouts(anatomy, probed, whole)
    else:
        check_named(anatomy, placement, probed, whole)
    return probed


def _inputs(ids: torch.Tensor) -> dict[str, Any]:
    count = ids.shape[1]
    positions = torch.arange(count, device=ids.device).expand(_ROWS, count)
    # A mask of this form is taken as it is: nothing is looked up in its data, which a skeleton lacks.
    mask = torch.ones((_ROWS, 1, count, count), dtype=torch.bool, device=ids.device).tril()
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "use_cache": False}


def _watching(copy: nn.Module) -> Watcher:
    watcher = Watcher({id(module): path for path, module in copy.named_modules()})
    watch(copy.modules(), watcher.before, watcher.after)
    return watcher


def _passed(anatomy: ModelAnatomy, ids: torch.Tensor) -> Watcher:
    """The pass on this rank, watched from where the hooks of a run would be."""
    mesh, model = anatomy.mesh, anatomy.model
    assert mesh is not None
    watcher = Watcher({id(module): path for path, module in model.named_modules()})
    inputs = _inputs(moved(ids, mesh.device))
    seat = seat_of(model)
    with seat.lock, torch.no_grad():
        try:
            for module in model.modules():
                seat.before(module, watcher.before)
                seat.after(module, watcher.after)
            if mesh.pipeline is None:
                model(**inputs)
            else:
                mesh.pipeline.forward(inputs, mesh.pipeline.stages - 1)
        finally:
            seat.clear()
    return watcher


def _tensors(watcher: Watcher) -> list[tuple[str, str, torch.Tensor]]:
    """Every tensor that passed a module: the name of its site, the module's path, and the tensor."""
    return [
        (
            _name(event.path, event.side, key, event.call if watcher.counts[event.path] > 1 else None),
            event.path,
            tensor,
        )
        for event in watcher.events
        for key, tensor in event.tensors.items()
    ]


def _name(path: str, side: str, key: tuple[int | str, ...], call: int | None) -> str:
    return module_site(path, side, key, call, after=None, number=1, amid=False).name


def _about(tensor: torch.Tensor, mesh: Mesh) -> list[Any]:
    """What a rank tells of a tensor: the shape that it shows, the numbers that it has, and how it says that it lies."""
    layout = said(tensor)
    if isinstance(layout, Layout) and not fits(tensor, layout, mesh.ranks, mesh.rank):
        layout = f"has other parts on its ranks than {layout}"
    match layout:
        case None | str():
            words: Any = layout
        case Shard():
            words = [layout.dim]
        case _:
            words = ["sum"] if isinstance(layout, Partial) else []
    return [list(tensor.shape), digest_of(tensor), words]


def digest_of(tensor: torch.Tensor) -> str:
    """What two tensors have in common if their numbers are the same, bit for bit."""
    data = on_cpu(settled(tensor.detach())).contiguous()
    return hashlib.sha256(data.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def require_same_weights(model: nn.Module, mesh: Mesh) -> None:
    """Every rank has the same numbers in what a user's plan has left whole; all ranks call it.

    Where it has not, the model computes with other numbers on each, and nothing that follows is anybody's.
    """
    own: dict[str, str] = {}
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        layout = said(tensor)
        if layout is None or layout == WHOLE_EVERYWHERE:
            own[path] = digest_of(tensor)
    differing = sorted(
        {path for other in mesh.exchanged(own) for path in own if other.get(path) != own[path]}
    )
    if differing:
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise LayoutError(
            f"{differing[0]!r}{more} is whole on every rank, and has other numbers on each",
            instead="the same weights on all ranks before the model is spread: of one file, or from one seed",
        )


def lying(shape: tuple[int, ...], seen: Sequence[Any], ranks: int) -> InParts | Partial | str | None:
    """How a tensor of this shape lies on the ranks of its place; ``None``: whole. A text says why it is not known."""
    if not seen or any(one is None for one in seen):
        return "is not there in the pass of every rank of its place"
    shapes = [tuple(one[0]) for one in seen]
    words = seen[0][2]
    if any(one[2] != words for one in seen):
        return "says on some ranks that it lies otherwise than on others"
    if isinstance(words, str):
        return words
    same = len({one[1] for one in seen}) == 1
    if words is not None:  # a DTensor, whose shape is that of the whole
        if any(one != shape for one in shapes):
            return f"says that the whole is {shapes[0]}, where it is {shape}"
        if words == ["sum"]:
            return Partial()
        if words:
            return InParts(words[0], len(shape))
        return None if same else "says that it is whole on every rank, and has other numbers on each"
    if all(one == shape for one in shapes):
        if same:
            return None
        return (
            "has the whole shape on every rank, and other numbers on each: partial results, or another order"
        )
    if all(len(one) == len(shape) for one in shapes):
        shorter = [axis for axis, size in enumerate(shape) if any(one[axis] != size for one in shapes)]
        if len(shorter) == 1:
            (axis,) = shorter
            ends = [owned(shape[axis], ranks, rank) for rank in range(ranks)]
            if [one[axis] for one in shapes] == [end - start for start, end in ends]:
                return InParts(axis, len(shape))
    if len(set(shapes)) > 1:
        return f"has other shapes on other ranks: {', '.join(map(str, sorted(set(shapes))))}"
    return f"is {shapes[0]} on a rank, where the whole is {shape}"


def shown_at(anatomy: ModelAnatomy, tap: Tap, layer: int | None, whole: Container[str]) -> str | None:
    """The name of the module's tensor that shows a site, if the pass has come by it."""
    path = anatomy.module_path(tap, layer)
    keys: list[Key] = [] if tap.key is None else [(tap.key,)]
    if tap.side is Side.IN:
        keys.append((0,))
    elif tap.key is None:
        keys += [(), (0,)]
    side = INPUT if tap.side is Side.IN else OUTPUT
    return next((name for key in keys if (name := _name(path, side, key, None)) in whole), None)


# --- named sites -----------------------------------------------------------------------------------------------------

_INSIDE = {"q_rot": "q", "k_rot": "k", "scores": "q", "pattern": "q", "v": "k"}
"""Sites inside attention, which no module shows, and the projections that they are made from."""


def seen_layouts(anatomy: ModelAnatomy, probed: Probed, whole: Container[str]) -> Seen:
    """How the named sites lie, by what was seen at the modules that show them."""
    mesh = anatomy.mesh
    assert mesh is not None
    found: dict[str, dict[int | None, Layout | str]] = {}
    for kind in KINDS:
        tap = anatomy.family.taps.get(kind.name)
        if tap is None or tap.side is Side.EXPERTS:
            continue  # not there where ranks share experts
        for layer in anatomy.layers_with(kind.name) if kind.scope is Scope.LAYER else (None,):
            if tap.side is Side.INSIDE:
                # Keys and values of latents are no projection's.
                made = found.get(_INSIDE[kind.name], {}).get(layer, "is made of latents")
                layout = _inside(kind.name, made)
            else:
                name = shown_at(anatomy, tap, layer, whole)
                layout = _seen(anatomy, tap, name, probed, mesh.ranks)
            found.setdefault(kind.name, {})[layer] = layout
    layouts: dict[str, Layout] = {}
    own: dict[tuple[str, int], Layout] = {}
    unknown: dict[tuple[str, int | None], str] = {}
    for name, layers in found.items():
        known = {layer: layout for layer, layout in layers.items() if not isinstance(layout, str)}
        unknown |= {(name, layer): text for layer, text in layers.items() if isinstance(text, str)}
        if len(set(known.values())) == 1:
            layouts[name] = next(iter(known.values()))
        else:
            own |= {(name, layer): layout for layer, layout in known.items() if layer is not None}
    return Seen(layouts, own, unknown)


def _seen(anatomy: ModelAnatomy, tap: Tap, name: str | None, probed: Probed, ranks: int) -> Layout | str:
    if name is None:
        return "was not come by when the model was looked at"
    if name in probed.unclear:
        return probed.unclear[name]
    layout = probed.layout_of(name)
    view = tap.view
    if isinstance(view, RowsView) and isinstance(layout, Shard):
        return "lies in parts of a tensor with the tokens of all rows in one axis"
    if not isinstance(view, HeadsView) or view.heads_first or layout != Shard(2):
        return shown(layout, view)
    heads = [anatomy.widths[part] for part in view.parts]
    if len(heads) > 1:
        return "lies beside others in a tensor that ranks share without regard to that"
    return "has heads of which ranks have pieces" if heads[0] % ranks else Shard(2)


def _inside(name: str, made: Layout | str) -> Layout | str:
    if isinstance(made, Shard) and made.dim == 2:
        return Shard(1) if name in ("scores", "pattern") else made
    if made == WHOLE_EVERYWHERE:
        return WHOLE_EVERYWHERE
    return "is made inside attention, of projections that lie in a way of which nothing follows for it"


def check_named(anatomy: ModelAnatomy, placement: Placement, probed: Probed, whole: Shapes) -> None:
    """The named sites that a module's side shows lie there as the table of styles says."""
    for kind in KINDS:
        tap = anatomy.family.taps.get(kind.name)
        if tap is None or tap.side not in (Side.IN, Side.OUT):
            continue
        for layer in anatomy.layers_with(kind.name) if kind.scope is Scope.LAYER else (None,):
            name = shown_at(anatomy, tap, layer, whole)
            if name is None:
                continue
            declared = not isinstance(placement.layout_of(Site(kind.name, layer)), Replicate)
            problem = probed.unclear.get(name)
            if problem is None and declared != (name in probed.parts):
                there, said = ("whole", "in parts") if declared else ("in parts", "whole")
                problem = f"is {there} on its ranks, where {said} was expected"
            if problem is not None:
                raise LayoutError(
                    f"the site {kind.name!r}, at {name}, {problem}",
                    instead="a model and a version of transformers whose tensor parallelism tracelens knows",
                )
