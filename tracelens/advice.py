"""What to write instead, in the user's own words: read from the line that made the mistake, where that can be read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tracelens.errors import TracelensError
from tracelens.ir.retype import ANY_SIZES
from tracelens.location import Location

_SHORT = 80
"""Longer pieces of the user's code would hide the advice."""
_LARGEST = {"max": "torch.maximum", "min": "torch.minimum"}
_BLOCKS = ("for ", "if ", "while ", "with ", "else:", "try:", "def ", "async ")


def _statement(at: Location) -> ast.Module | None:
    """The user's line as Python reads it; ``None`` for part of a statement, or where there is no source."""
    text = at.text
    text = text.removeprefix("el") if text.startswith("elif ") else text
    text = text.partition("else:")[2].strip() or "pass" if text.startswith("else:") else text
    opens = text.startswith(_BLOCKS)
    for tried in (f"{text}\n    pass", text) if opens else (text, text.rstrip(",")):
        try:
            return ast.parse(tried)
        except (SyntaxError, ValueError):
            continue
    return None


def _nodes(at: Location) -> Iterator[ast.AST]:
    statement = _statement(at)
    return iter(()) if statement is None else ast.walk(statement)


def _words(node: ast.expr) -> str:
    return ast.unparse(node)


def _fitting(text: str) -> str | None:
    return text if len(text) <= _SHORT else None


def _called(node: ast.AST, *names: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in names


# --- a truth that a value does not have ---------------------------------------------------------------------------

_BRANCH = "tl.where(condition, a, b), or two traces with a Python `if` between them"


def instead_of_branching(at: Location) -> str:
    """What to write where Python asked a value whether it is true."""
    for node in _nodes(at):
        said = _without_truth(node)
        if said is not None:
            return f"{said}; and in place of an `if`, {_BRANCH}"
    return f"{_BRANCH}; (0 < h) & (h < 1) for 0 < h < 1; torch.maximum(a, b) for max(a, b)"


def _without_truth(node: ast.AST) -> str | None:
    if isinstance(node, ast.Compare) and len(node.ops) > 1:
        ends = [node.left, *node.comparators]
        pairs = (
            f"({_words(ast.Compare(left, [op], [right]))})"
            for left, op, right in zip(ends, node.ops, ends[1:], strict=False)
        )
        return _fitting(" & ".join(pairs))
    if isinstance(node, ast.BoolOp):
        sign = " & " if isinstance(node.op, ast.And) else " | "
        return _fitting(sign.join(f"({_words(part)})" for part in node.values))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return _fitting(f"~({_words(node.operand)})")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _LARGEST:
        function = _LARGEST[node.func.id]
        if len(node.args) == 2 and not node.keywords:
            return _fitting(f"{function}({', '.join(map(_words, node.args))})")
        return f"{function}(a, b)"
    return None


# --- a length, or the parts, that a value does not have -----------------------------------------------------------

_MAKERS = ("torch.tensor", "torch.as_tensor", "torch.Tensor", "torch.FloatTensor", "np.array", "numpy.array")


def instead_of_len(at: Location) -> str:
    """What to write where Python asked a value for its length."""
    for node in _nodes(at):
        stacked = _stacked(node)
        if stacked is not None:
            return stacked
        if isinstance(node, ast.Call) and _called(node, "len") and len(node.args) == 1:
            return _fitting(f"{_words(node.args[0])}.shape[0]") or "value.shape[0]"
    return "value.shape[0]; torch.stack([a, b]) instead of torch.tensor([a, b])"


def _stacked(node: ast.AST) -> str | None:
    if not (isinstance(node, ast.Call) and _called(node, *_MAKERS) and node.args):
        return None
    first = node.args[0]
    if isinstance(first, ast.List | ast.Tuple):
        return _fitting(f"torch.stack({_words(first)})") or "torch.stack([a, b])"
    if isinstance(first, ast.ListComp):
        return "torch.stack([...]) of the same list"
    return f"the value itself instead of {_words(node.func)}(value)"


def instead_of_number(at: Location, otherwise: str) -> str:
    """What to write where Python asked a value for a number."""
    for node in _nodes(at):
        stacked = _stacked(node)
        if stacked is not None and stacked.startswith("torch.stack"):
            return stacked
    return otherwise


# --- a mask as an index --------------------------------------------------------------------------------------------


def instead_of_mask(at: Location, target: str | None, missing: int) -> str:
    """What to write for ``site[mask] = new``, and for ``site[mask]``, where the mask is a value.

    ``target``: how the site is spelt that the index is applied to; ``missing``: how many axes the mask has fewer.
    """
    for node in _nodes(at):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            place, new = node.targets[0], _words(node.value)
        elif isinstance(node, ast.AugAssign):
            place, new = node.target, None
        else:
            continue
        if not isinstance(place, ast.Subscript):
            continue
        site = target or _words(place.value)
        if isinstance(place.slice, ast.Tuple | ast.Slice):
            return _masked_write("mask", new or "new", site)
        mask = _words(place.slice)
        if missing > 0:
            name = mask if mask.isidentifier() else f"({mask})"
            mask = f"{name}[..., {', '.join(['None'] * missing)}]"
        if new is None and isinstance(node, ast.AugAssign):
            new = _words(ast.BinOp(ast.Name(site), node.op, node.value))
        return _masked_write(mask, new or "new", site)
    return (
        "tl.where(mask, value, 0) keeps what the mask chooses and puts 0 elsewhere; to write where it holds: "
        "site = tl.where(mask, new, site)"
    )


def _masked_write(mask: str, new: str, site: str) -> str:
    written = f"{site} = tl.where({mask}, {new}, {site})"
    return written if len(written) <= 2 * _SHORT else f"site = tl.where(mask, new, site), with site = {site}"


# --- one name twice -------------------------------------------------------------------------------------------------


def another_name(name: str, first: Location, second: Location) -> str:
    """What to write for a name that two saves were given, at the two lines."""
    if (first.filename, first.line) != (second.filename, second.line):
        return f'another name, such as "{name}_2"'
    return (
        f'another name in each round of the loop, such as .save(f"{name}_{{i}}"); '
        f'or all layers at once: model.layers[:].<site>.save("{name}")'
    )


# --- generation ---------------------------------------------------------------------------------------------------


def in_generation(error: TracelensError) -> None:
    """Words an error about sizes that are symbols for a block in which there is a prompt, but each step has its own."""
    for words, instead in _OF_ANY_SIZE.items():
        head, found, _ = error.problem.partition(words)
        if found:
            error.problem = (
                f"{head}: in model.generate a write must not depend on the number of rows or positions, "
                "because every step has its own"
            )
            error.instead = instead
            return
    if any(str(size) in error.problem for size in _ANY):
        for size, name in _ANY.items():
            told = re.sub(rf",? {name} = {size}", "", error.problem)
            error.problem = re.sub(rf"\b{size}\b", name, told)
        error.problem = error.problem.replace(" where:", ":").replace(" where,", " where")
        error.problem += (
            "; every step has other positions, and a tensor has those of the padded prompts at most"
        )
        error.instead = _A_MASK if "bool[" in error.problem else _POSITIONS


_ONE_EACH = (
    "a tensor without positions, such as [D], or [B, 1, D] for one in each row; for rows of a number, "
    "one model.generate per prompt"
)
_PROMPTS = "for p in t.prompts: p.layers[i].resid_post += part, with [1, P_i, D] for each prompt"
_POSITIONS = f"{_ONE_EACH}; for the prompts' own positions, {_PROMPTS}"
_A_MASK = (
    "a mask that each step makes: site = tl.where(((model.positions >= 5) & (model.token_ids != 2))[..., None], new, "
    "site); for the prompts' own tokens t.prefill.layers[i].resid_post.tok[mask] = new; or one model.generate per "
    "prompt, or p in t.prompts, with a mask [1, P_i] of its own"
)
_ANY = {ANY_SIZES[name]: name for name in ("P", "S")}
_OF_ANY_SIZE = {
    ": it depends on the size ": _ONE_EACH,
    ", and this recording is for prompts of any size": _ONE_EACH,
    ": this recording is for prompts of any size": "-1 in reshape and view, or einops patterns",
}
