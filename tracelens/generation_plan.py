"""Graphs for generation, compiled: a program for each run of steps that do the same, and what the saves become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from tracelens.backends.gathering import Course
from tracelens.backends.local import LocalCode
from tracelens.backends.stepping import Segment
from tracelens.compiled import Compiled, OfRecorded, digest, document, keeps_padding
from tracelens.errors import ExtraMemoryError
from tracelens.ir.dims import KEY, POSITION, Sizes
from tracelens.ir.graph import Graph
from tracelens.ir.ops import WHOLE, Call, Index, IndexPut, Op, Save, Write, operands, results
from tracelens.ir.padding import has_keys
from tracelens.ir.passes.at_steps import Stepped
from tracelens.ir.retype import retype, site_types, sizes_of
from tracelens.ir.text import op_text
from tracelens.ir.types import TensorType, bytes_text
from tracelens.ir.windows import PREFILL
from tracelens.misaligned import misaligned
from tracelens.plan import Plan
from tracelens.results import SavedTensor, describe


@dataclass(frozen=True)
class CompiledGeneration(OfRecorded):
    """A graph made ready to generate with: one :class:`~tracelens.compiled.Compiled` for each segment of its steps."""

    stepped: Stepped
    parts: tuple[Compiled, ...]

    @property
    def spread(self) -> object:
        """The key of what the model's parts ran on."""
        return self.parts[0].spread

    @property
    def plan(self) -> Plan:
        """The plan of the first step, which says where the model's parts are."""
        return self.parts[0].plan

    @property
    def code(self) -> LocalCode:
        """The program of the first step."""
        return self.parts[0].code

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """What runs in which steps."""
        return tuple(
            Segment(window, part.plan, part.code)
            for window, part in zip(self.stepped.segments, self.parts, strict=True)
        )

    @cached_property
    def courses(self) -> tuple[Course, ...]:
        """What becomes of each save over the steps."""
        graph = self.recorded
        return tuple(
            Course(save, graph.types[save.values[0]], self.stepped.window_of(save)) for save in graph.saves
        )

    @property
    def saves(self) -> tuple[Save, ...]:
        return self.recorded.saves

    @cached_property
    def described(self) -> tuple[SavedTensor, ...]:
        """What each save holds."""
        return tuple(over_steps(describe(self.recorded, course.save), course) for course in self.courses)

    @cached_property
    def plan_digest(self) -> str:
        """Two have it in common if and only if they do the same in every step."""
        parts = zip(self.stepped.segments, self.parts, strict=True)
        return digest("\n".join(f"steps {window}\n{document(part.plan.graph)}" for window, part in parts))

    @cached_property
    def inputs(self) -> frozenset[str]:
        """The sites that are read and no part of the model."""
        return frozenset[str]().union(*(part.inputs for part in self.parts))

    @cached_property
    def used(self) -> tuple[tuple[int, int], ...]:
        """The captured constants that some step needs, by their numbers and those of the places that need them."""
        held = set(self.stepped.held.values())
        return tuple(dict.fromkeys(pair for part in self.parts for pair in part.used if pair[0] not in held))

    @cached_property
    def any_passes(self) -> bool:
        """Does the graph the same to each position of any pass, whatever rows and steps there are, and look at none?"""
        graph = self.recorded
        return (
            not graph.saves
            and not graph.applies
            and not graph.pins
            and not self.inputs
            # What no query may see of padded keys, a run knows for its own rows alone.
            and not has_keys(graph.types.values())
            and bound_to_steps(self.stepped) is None
            and len(self.stepped.segments) == 1
        )

    @property
    def mixing(self) -> tuple[int, ...]:
        """The recorded operations that rows of different lengths do not allow."""
        return self.parts[0].mixing

    @property
    def padded(self) -> tuple[tuple[int, TensorType], ...]:
        """The recorded saves whose positions do not stay apart by row, so that padding could not be taken out."""
        return tuple(
            (_number_of(self.recorded, course.save.name), course.type)
            for course in self.courses
            if course.window is not None and 0 in course.window and keeps_padding(course.type)
        )

    # --- memory --------------------------------------------------------------------------------------------------

    def held(self, graph: Graph, sizes: Sizes, steps: int, *, include_last: bool) -> Mapping[str, int]:
        """The most that a generation holds on each device beside the model and its cache."""
        found: dict[str, int] = {}
        for window, part in zip(self.stepped.segments, self.parts, strict=True):
            if window.start >= steps:
                continue
            own = sizes if window.start == 0 else {**sizes, "P": 1, "S": sizes["P"] + steps - 1}
            for extra in part.held(graph, own):
                device = extra.place.device
                found[device] = max(found.get(device, 0), extra.bytes)
        for course in self.courses:
            homes = self._homes(course.save.name)
            size = course.nbytes(sizes, steps, include_last=include_last)
            if course.save.to is not None and len(set(homes)) == 1:
                continue  # it goes to its file
            for device in homes:
                found[device] = found.get(device, 0) + size // len(homes)
        return found

    def require_room(self, graph: Graph, sizes: Sizes, steps: int, most: int, *, include_last: bool) -> None:
        """Raises :class:`~tracelens.errors.ExtraMemoryError` for a generation that would hold more than ``most``."""
        for device, size in self.held(graph, sizes, steps, include_last=include_last).items():
            if size <= most:
                continue
            weights = sorted(
                self.courses, key=lambda one: -one.nbytes(sizes, steps, include_last=include_last)
            )
            largest = "; ".join(
                f"{bytes_text(one.nbytes(sizes, steps, include_last=include_last))} for `{op_text(one.save)}`"
                for one in weights[:3]
            )
            error = ExtraMemoryError(
                f"the generation would hold {bytes_text(size)} on {device} beside the model, and max_extra_memory is "
                f"{bytes_text(most)}; the most of it: {largest or 'values of single steps'}",
                instead='value.save(to="file.safetensors"), which goes to disk as it is made; fewer steps, such as '
                "t.steps[0:100]; a reduction or a narrower dtype: value.norm(dim=-1).save()",
            )
            raise graph.blame(error, graph.ops.index(weights[0].save)) if weights else error

    def _homes(self, name: str) -> list[str]:
        """The device of each member of a save."""
        for part in self.parts:
            for save in part.plan.graph.saves:
                if save.name == name:
                    places = part.plan.placement.places
                    return [places[part.plan.home[value]].device for value in save.values]
        return []


Settled = Mapping[str, tuple[int, ...]]
"""By the name of a save, the places from which its members leave, whole."""

Making = Callable[[Graph, Settled], Compiled]


def compile_steps(stepped: Stepped, make: Making) -> CompiledGeneration:
    """Compiles each segment; what is saved in several of them leaves each from the same places.

    ``make``: compiles a graph, of which some saves leave from given places, where they are made whole.
    """
    _require_apart(stepped)
    settled: dict[str, tuple[int, ...]] = {}
    found = _compiled(stepped, make, settled)
    # What else a step does with a value decides where it is, and whether ranks have added it up: mostly the same, and
    # what one save has made whole another one may take.
    while more := _differing(found):
        assert not more.keys() & settled.keys(), "a save leaves from other places than it was told to"
        settled |= more
        found = _compiled(stepped, make, settled)
    return found


def _compiled(stepped: Stepped, make: Making, settled: Settled) -> CompiledGeneration:
    """The later segments first: they say at which places they need what is held for them."""
    held = set(stepped.held.values())
    places: dict[int, set[int]] = {}
    parts: list[Compiled] = []
    for segment in reversed(stepped.segments):
        part = make(stepped.at(segment, places), settled)
        for index, place in part.used:
            if index in held:
                places.setdefault(index, set()).add(place)
        parts.append(part)
    return CompiledGeneration(stepped.graph, stepped, tuple(reversed(parts)))


def _differing(compiled: CompiledGeneration) -> dict[str, tuple[int, ...]]:
    """The saves whose parts of different steps lie differently, each with a place for each of its members.

    The last of those where one is: the values of all steps are there before the pass has gone on.
    """
    lying: dict[str, set[tuple[tuple[int, object], ...]]] = {}
    for part in compiled.parts:
        for save in part.plan.graph.saves:
            lies = tuple((part.plan.home[value], part.plan.layouts[value]) for value in save.values)
            lying.setdefault(save.name, set()).add(lies)
    return {
        name: tuple(max(home for home, _ in members) for members in zip(*ways, strict=True))
        for name, ways in lying.items()
        if len(ways) > 1
    }


def _number_of(graph: Graph, name: str) -> int:
    return next(number for number, op in enumerate(graph.ops) if isinstance(op, Save) and op.name == name)


def _require_apart(stepped: Stepped) -> None:
    """Refuses what needs all positions at once in steps that have one each."""
    graph = stepped.graph
    sizes, sites = sizes_of(graph), site_types(graph)
    for number, op in enumerate(graph.ops):
        window = stepped.windows[number]
        if window is None or window == PREFILL:
            continue
        inferred = retype(op, graph.types, sizes, sites)
        if inferred is not None and inferred.mixes:
            used = [graph.types[value] for value in operands(op)]
            raise graph.blame(misaligned(op_text(op), True, has_keys(used)), number)


def bound_to_steps(stepped: Stepped) -> int | None:
    """The first operation for which it matters that a pass has the positions of its own step alone, if there is one.

    A pass without a cache is over all of the text again, and does to each position what was done in its own step only
    if every write is one of every step and treats each position alone.
    """
    graph = stepped.graph
    needed: set[int] = set()
    for number in reversed(range(len(graph.ops))):
        op = graph.ops[number]
        if isinstance(op, Write):
            if op.site.steps is not None:
                return number
            needed.update(operands(op))
            continue
        made = [type_ for value, type_ in results(op) if value in needed]
        if not made:
            continue
        needed.update(operands(op))
        window = stepped.windows[number]
        used = [graph.types[value] for value in operands(op)]
        if (window is not None and window.single) or not any(POSITION in type_.symbols for type_ in used):
            continue
        if any(len(type_.position_axes) != 1 for type_ in made):
            return number
        # Later keys are there too, in a pass over all of the text: what is zero at them has to stay so.
        if any(KEY in type_.symbols for type_ in (*made, *used)) and not _scales(op):
            return number
        if isinstance(op, Index | IndexPut):
            axis = graph.types[op.base].position_axes
            if not axis or any(item not in (WHOLE, None) for item in op.index[: axis[0] + 1]):
                return number
    return None


def over_steps(saved: SavedTensor, course: Course) -> SavedTensor:
    """What a save holds over the steps, where ``saved`` is what one step has of it."""
    if course.once or course.axis is not None:
        return replace(saved, steps=course.window)
    return replace(saved, axes=("step", *saved.axes), steps=course.window)


def _scales(op: Op) -> bool:
    """Does an operation leave zero what is zero, and lowest what is lowest?"""
    return isinstance(op, Call) and op.function in ("torch.mul", "torch.div")
