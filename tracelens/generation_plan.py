"""Graphs for generation, compiled: a program for each run of steps that do the same, and what the saves become."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from tracelens.backends.deferring import Tail
from tracelens.backends.gathering import Course
from tracelens.backends.local import LocalCode
from tracelens.backends.stepping import Segment
from tracelens.compiled import Compiled, OfRecorded, digest, document, keeps_padding
from tracelens.errors import ExtraMemoryError
from tracelens.ir.dims import KEY, POSITION, Sizes, evaluate
from tracelens.ir.graph import Graph
from tracelens.ir.ops import WHOLE, Call, Const, Index, IndexPut, Op, Ref, Save, Write, operands, results
from tracelens.ir.padding import has_keys
from tracelens.ir.passes.at_steps import Stepped
from tracelens.ir.passes.defer_lenses import Deferred, Kept
from tracelens.ir.retype import retype, site_types, sizes_of
from tracelens.ir.rules_lens import DISTANCE, LENS, PART
from tracelens.ir.text import op_text
from tracelens.ir.types import TensorType, bytes_text
from tracelens.ir.windows import PREFILL
from tracelens.misaligned import misaligned
from tracelens.plan import Plan
from tracelens.results import SavedTensor, describe

READING = (LENS, DISTANCE, PART)
"""What reads the unembedding."""
ROWS = 512
"""So many states go through the unembedding together, where a step has fewer: more make a product no faster."""
MOST_STEPS = 32
"""So many steps wait for each other at most."""
WAITING = 32 * 2**20
"""Bytes that they may keep."""


def at_once(rows: int, kept: int) -> tuple[int, int]:
    """How many steps wait for each other, and how many positions of a prompt are done at once.

    ``rows``, ``kept``: how many states a position has, and how many bytes are kept of it.
    """
    positions = max(1, WAITING // kept)
    return min(MOST_STEPS, -(-ROWS // rows), positions), positions


@dataclass(frozen=True)
class CompiledTail:
    """What is done for several steps at once, made ready, and what each step keeps for it."""

    compiled: Compiled
    kept: tuple[Kept, ...]

    def together(self, sizes: Sizes) -> tuple[int, int]:
        """How many steps wait for each other, and how many positions of a prompt are done at once."""
        one = {**sizes, "P": 1}
        return at_once(self._rows(one), sum(each.whole.nbytes(one) for each in self.kept))

    def bytes_kept(self, sizes: Sizes) -> Mapping[str, int]:
        """What waits on each device, for so many positions as ``sizes`` say."""
        places = self.compiled.plan.placement.places
        found: dict[str, int] = {}
        for one in self.kept:
            for place in self.places[one.index]:
                device = places[place].device
                found[device] = found.get(device, 0) + one.whole.nbytes(sizes)
        return found

    def held(self, graph: Graph, sizes: Sizes) -> Mapping[str, int]:
        """The most that each device holds beside that, while so many positions are done."""
        apart = {one.index for one in self.kept}
        return {extra.place.device: extra.bytes for extra in self.compiled.held(graph, sizes, apart)}

    def _rows(self, sizes: Sizes) -> int:
        """How many states one position has."""
        graph = self.compiled.plan.graph
        states = (
            graph.types[op.args[0].id].shape[:-1]
            for op in graph.ops
            if isinstance(op, Call) and op.function in READING and isinstance(op.args[0], Ref)
        )
        return sum(prod(evaluate(dim, sizes) for dim in shape) for shape in states)

    @property
    def places(self) -> Mapping[int, tuple[int, ...]]:
        """Where what is kept is needed, by the number of the constant."""
        return {
            one.index: tuple(sorted(place for index, place in self.compiled.used if index == one.index))
            for one in self.kept
        }

    @property
    def code(self) -> Tail:
        """What runs."""
        return Tail(self.compiled.plan, self.compiled.code, self.kept, self.places, self.together)


@dataclass(frozen=True)
class CompiledGeneration(OfRecorded):
    """A graph made ready to generate with: one :class:`~tracelens.compiled.Compiled` for each segment of its steps.

    ``tails``: for each of them what is done for several of its steps at once, if there is any such thing.
    """

    stepped: Stepped
    parts: tuple[Compiled, ...]
    tails: tuple[CompiledTail | None, ...]

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
            Segment(window, part.plan, part.code, None if tail is None else tail.code)
            for window, part, tail in zip(self.stepped.segments, self.parts, self.tails, strict=True)
        )

    @property
    def everything(self) -> Iterator[Compiled]:
        """All that is compiled, the tail of a segment behind its steps."""
        for part, tail in zip(self.parts, self.tails, strict=True):
            yield part
            if tail is not None:
                yield tail.compiled

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
        texts = [document(part.plan.graph) for part in self.everything]
        return digest("\n".join([*(f"steps {window}" for window in self.stepped.segments), *texts]))

    @cached_property
    def inputs(self) -> frozenset[str]:
        """The sites that are read and no part of the model."""
        return frozenset[str]().union(*(part.inputs for part in self.parts))

    @cached_property
    def used(self) -> tuple[tuple[int, int], ...]:
        """The captured constants that some step needs, by their numbers and those of the places that need them."""
        own = set(self.stepped.held.values())
        own.update(one.index for tail in self.tails if tail is not None for one in tail.kept)
        return tuple(
            dict.fromkeys(pair for part in self.everything for pair in part.used if pair[0] not in own)
        )

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
        for window, part, tail in zip(self.stepped.segments, self.parts, self.tails, strict=True):
            if window.start >= steps:
                continue
            later = {**sizes, "P": 1, "S": sizes["P"] + steps - 1}
            for own in [sizes] * (window.start == 0) + [later] * (window.start > 0 or not window.single):
                now = {extra.place.device: extra.bytes for extra in part.held(graph, own)}
                for device, size in (
                    now if tail is None else self._with_tail(now, tail, graph, own, steps)
                ).items():
                    found[device] = max(found.get(device, 0), size)
        for course in self.courses:
            homes = self._homes(course.save.name)
            size = course.nbytes(sizes, steps, include_last=include_last)
            if course.save.to is not None and len(set(homes)) == 1:
                continue  # it goes to its file
            for device in homes:
                found[device] = found.get(device, 0) + size // len(homes)
        return found

    @staticmethod
    def _with_tail(
        now: Mapping[str, int], tail: CompiledTail, graph: Graph, sizes: Sizes, most: int
    ) -> Mapping[str, int]:
        """What a step holds on each device, or else its tail; and what waits, for as many positions as there is room.

        ``sizes``: those of a step, which has one position unless it is over the prompt. ``most``: how many there are.
        """
        steps, positions = tail.together(sizes)
        room = sizes["P"] if sizes["P"] > 1 else min(steps, most)
        kept = tail.bytes_kept({**sizes, "P": room})
        then = tail.held(graph, {**sizes, "P": min(room, positions)})
        return {device: kept.get(device, 0) + max(size, then.get(device, 0)) for device, size in now.items()}

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
        for part in self.everything:
            for save in part.plan.graph.saves:
                if save.name == name:
                    places = part.plan.placement.places
                    return [places[part.plan.home[value]].device for value in save.values]
        return []


Settled = Mapping[str, tuple[int, ...]]
"""By the name of a save, the places from which its members leave, whole."""

Making = Callable[[Graph, Settled, bool], Compiled]


Deferring = Callable[[Graph, int], "Deferred | None"]
"""Takes out of a step what can wait for others; from the number on that it is given, constants are free."""


def nothing_waits(graph: Graph, first: int) -> None:
    """All of a step is done in it."""


def compile_steps(stepped: Stepped, make: Making, defer: Deferring) -> CompiledGeneration:
    """Compiles each segment; what is saved in several of them leaves each from the same places.

    ``make``: compiles a graph, of which some saves leave from given places, where they are made whole; is it about
    steps that are over?  ``defer``: takes out of a graph what waits for other steps.
    """
    _require_apart(stepped)
    settled: dict[str, tuple[int, ...]] = {}
    found = _compiled(stepped, make, defer, settled)
    # What else a step does with a value decides where it is, and whether ranks have added it up: mostly the same, and
    # what one save has made whole another one may take.
    while more := _differing(found):
        assert not more.keys() & settled.keys(), "a save leaves from other places than it was told to"
        settled |= more
        found = _compiled(stepped, make, defer, settled)
    return found


def _compiled(stepped: Stepped, make: Making, defer: Deferring, settled: Settled) -> CompiledGeneration:
    """The later segments first: they say at which places they need what is held for them."""
    held = set(stepped.held.values())
    places: dict[int, set[int]] = {}
    parts: list[Compiled] = []
    tails: list[CompiledTail | None] = []
    free = 1 + max((op.index for op in stepped.graph.ops if isinstance(op, Const)), default=-1)
    free = max([free, *(index + 1 for index in held)])
    for segment in reversed(stepped.segments):
        graph = stepped.at(segment, places)
        # The positions of a prompt are there together.
        deferred = None if segment.single else defer(graph, free)
        tail = None
        if deferred is not None:
            free += len(deferred.kept)
            tail = CompiledTail(make(deferred.tail, settled, True), deferred.kept)
            graph = deferred.step(tail.places)
        part = make(graph, settled, False)
        for index, place in (*part.used, *(() if tail is None else tail.compiled.used)):
            if index in held:
                places.setdefault(index, set()).add(place)
        parts.append(part)
        tails.append(tail)
    return CompiledGeneration(stepped.graph, stepped, tuple(reversed(parts)), tuple(reversed(tails)))


def _differing(compiled: CompiledGeneration) -> dict[str, tuple[int, ...]]:
    """The saves whose parts of different steps lie differently, each with a place for each of its members.

    The last of those where one is: the values of all steps are there before the pass has gone on.
    """
    lying: dict[str, set[tuple[tuple[int, object], ...]]] = {}
    for part in compiled.everything:
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
