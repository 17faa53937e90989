"""The whole language: a graph is a tuple of these operations over values that are assigned once.

Every value has a number (``%3``) and a :class:`~tracelens.ir.types.TensorType`. Operations are frozen data: no tensor,
no function object and no place in anybody's code is held here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from types import EllipsisType

from tracelens.ir.dims import Sym
from tracelens.ir.layout import Layout
from tracelens.ir.module_sites import ModuleSite
from tracelens.ir.sites import Site
from tracelens.ir.types import DType, TensorType


@dataclass(frozen=True, slots=True)
class Ref:
    """The use of a value: ``%3``."""

    id: int


@dataclass(frozen=True, slots=True)
class Slice:
    """``start:stop:step``."""

    start: int | None = None
    stop: int | None = None
    step: int | None = None


WHOLE = Slice()


class Special(Enum):
    """Floats that Python compares wrongly for us: minus zero equals zero, and nan does not equal itself."""

    NEGATIVE_ZERO = "-0.0"
    NAN = "nan"

    @property
    def number(self) -> float:
        return float(self.value)


Scalar = bool | int | float | complex | Special
Arg = None | Scalar | str | DType | EllipsisType | Sym | Slice | Ref | tuple["Arg", ...]


@dataclass(frozen=True, slots=True)
class TokenAt:
    """``.tok[k]``: the k-th real token of every row; drops the position axis."""

    index: int


@dataclass(frozen=True, slots=True)
class TokenSlice:
    """``.tok[a:b:c]``: real tokens of every row.  ``width``: how many each row selects, where that is known."""

    start: int | None
    stop: int | None
    step: int | None
    width: int | None


@dataclass(frozen=True, slots=True)
class TokenList:
    """``.tok[[0, 3, -1]]``: those real tokens of every row."""

    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenText:
    """``.tok["Paris"]``: the span that spells this text, or with ``pick`` one token of the span."""

    text: str
    pick: int | None
    width: int | None


@dataclass(frozen=True, slots=True)
class TokenId:
    """``.tok[tl.token_id(4649)]``: the one real token of every row with this id; drops the position axis."""

    id: int


@dataclass(frozen=True, slots=True)
class TokenChars:
    """``.tok[tl.chars(4, 20)]``: the tokens that spell these characters of every row's text."""

    start: int
    stop: int
    width: int | None


TokenSelector = TokenAt | TokenSlice | TokenList | TokenText | TokenId | TokenChars


@dataclass(frozen=True, slots=True)
class PromptRow:
    """``t.prompts[row]`` on the axis of rows: that row alone; the axis stays."""

    row: int


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """``t.prompts[row]`` on an axis of positions or keys: the row's own ``length``, without padding."""

    row: int
    length: int


@dataclass(frozen=True, slots=True)
class OwnTokens:
    """``.tok[...]`` on the axis of one prompt's own ``length`` tokens."""

    row: int
    length: int
    selector: TokenSelector


Selector = TokenSelector | PromptTokens | OwnTokens
"""What points to tokens of a prompt, so that only the prompt tells where it points."""
IndexItem = int | Slice | None | Ref | TokenSelector | PromptRow | PromptTokens | OwnTokens
"""One entry of an index. A ``Ref`` is an integer index tensor, ``None`` a new axis. Ellipses are written out."""


def drops_axis(item: IndexItem) -> bool:
    """Does an entry of an index name one place, so that its axis is not in the result?"""
    if isinstance(item, OwnTokens):
        item = item.selector
    return isinstance(item, int | TokenAt | TokenId) or (
        isinstance(item, TokenText) and item.pick is not None
    )


def as_slice(item: PromptRow | PromptTokens) -> Slice:
    """The part of its axis that belongs to one prompt; padding stands before the tokens."""
    return Slice(item.row, item.row + 1) if isinstance(item, PromptRow) else Slice(-item.length, None)


@dataclass(frozen=True, slots=True)
class Const:
    """A tensor captured from the user: entry ``index`` of the graph's constants.

    One with a ``name`` can be given another value for a call of the program.
    """

    out: int
    type: TensorType
    index: int
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter or buffer of the traced model, whole whatever the sharding."""

    out: int
    type: TensorType
    path: str


@dataclass(frozen=True, slots=True)
class Read:
    """A site's value after ``version`` writes to it."""

    out: int
    type: TensorType
    site: Site
    version: int


@dataclass(frozen=True, slots=True)
class Call:
    """A pure function, by its qualified name, applied to values and plain arguments; it may have several results."""

    outs: tuple[int, ...]
    types: tuple[TensorType, ...]
    function: str
    args: tuple[Arg, ...]
    kwargs: tuple[tuple[str, Arg], ...] = ()


@dataclass(frozen=True, slots=True)
class Index:
    """``base[index]``."""

    out: int
    type: TensorType
    base: int
    index: tuple[IndexItem, ...]


@dataclass(frozen=True, slots=True)
class IndexPut:
    """A copy of ``base`` in which ``base[index]`` is ``value``."""

    out: int
    type: TensorType
    base: int
    index: tuple[IndexItem, ...]
    value: Ref | Scalar


@dataclass(frozen=True, slots=True)
class Write:
    """Replaces a site's value, making version ``version``; broadcast to the site's shape, cast once to its dtype.

    ``instead``: the module that makes the site is not run, and the value takes the place of what it would have
    returned. It is the moment before the module, at which the value has to be there.
    """

    site: Site
    version: int
    value: Ref | Scalar
    instead: ModuleSite | None = None


class Keep(Enum):
    """Where a saved tensor ends up."""

    CPU = "cpu"
    DEVICE = "keep"


@dataclass(frozen=True, slots=True)
class Save:
    """Values that leave the run under ``name``; several are stacked on a new first axis."""

    name: str
    values: tuple[int, ...]
    stacked: bool = False
    keep: Keep = Keep.CPU
    dtype: DType | None = None
    to: str | None = None


@dataclass(frozen=True, slots=True)
class Apply:
    """The user's own Python: entry ``index`` of the graph's Python functions, run on real tensors."""

    outs: tuple[int, ...]
    types: tuple[TensorType, ...]
    index: int
    args: tuple[Arg, ...]


@dataclass(frozen=True, slots=True)
class Grad:
    """The derivatives of ``loss``, one number, with respect to the values ``wrt`` of sites, each as it was read."""

    outs: tuple[int, ...]
    types: tuple[TensorType, ...]
    loss: int
    wrt: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Transfer:
    """A value goes from one place to another, where it has a number of its own. Only plans hold it."""

    out: int
    type: TensorType
    value: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Redistribute:
    """A value takes another layout on the ranks of its place, under another number. Only plans hold it."""

    out: int
    type: TensorType
    value: int
    source: Layout
    target: Layout


@dataclass(frozen=True, slots=True)
class Hold:
    """A place keeps a value of a generation step for later, as the constant ``index``. Only plans hold it.

    ``part``: it is one of the members of that constant, which has the positions of several steps.
    """

    value: int
    index: int
    place: int
    part: int | None = None


Op = (
    Const
    | Param
    | Read
    | Call
    | Index
    | IndexPut
    | Write
    | Save
    | Apply
    | Grad
    | Transfer
    | Redistribute
    | Hold
)


def moment(op: Read | Write) -> Site:
    """The site at which an operation on a site is done: the site itself, or the moment before a module not run."""
    return op.instead if isinstance(op, Write) and op.instead is not None else op.site


def results(op: Op) -> tuple[tuple[int, TensorType], ...]:
    """The values that ``op`` makes, with their types."""
    match op:
        case Const() | Param() | Read() | Index() | IndexPut() | Transfer() | Redistribute():
            return ((op.out, op.type),)
        case Call() | Apply() | Grad():
            return tuple(zip(op.outs, op.types, strict=True))
        case Write() | Save() | Hold():
            return ()


def refs(arg: Arg) -> Iterator[int]:
    """The values that an argument uses, in order."""
    if isinstance(arg, Ref):
        yield arg.id
    elif isinstance(arg, tuple):
        for part in arg:
            yield from refs(part)


def operands(op: Op) -> tuple[int, ...]:
    """The values that ``op`` uses, in order, with repetitions."""
    match op:
        case Const() | Param() | Read():
            return ()
        case Call():
            found = [ref for arg in op.args for ref in refs(arg)]
            return tuple(found + [ref for _, arg in op.kwargs for ref in refs(arg)])
        case Apply():
            return tuple(ref for arg in op.args for ref in refs(arg))
        case Index():
            return (op.base, *(item.id for item in op.index if isinstance(item, Ref)))
        case IndexPut():
            used = (op.base, *(item.id for item in op.index if isinstance(item, Ref)))
            return (*used, op.value.id) if isinstance(op.value, Ref) else used
        case Write():
            return (op.value.id,) if isinstance(op.value, Ref) else ()
        case Save():
            return op.values
        case Grad():
            return (op.loss, *op.wrt)
        case Transfer() | Redistribute() | Hold():
            return (op.value,)
