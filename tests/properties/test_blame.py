"""Every error for an invalid block names the file and the line of the guilty statement: promise 10 of the design."""

from __future__ import annotations

import linecache
from dataclasses import dataclass
from itertools import count

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tracelens as tl
from tests.support.batches import EVEN, RAGGED, random_rows
from tests.support.families import FAMILIES
from tests.support.plain import untouched
from tests.support.tokenizers import byte_level_bpe
from tracelens import errors
from tracelens.errors import TracelensError

HF = FAMILIES["llama"].build()
MODEL = tl.wrap(HF)
GPT2 = tl.wrap(FAMILIES["gpt2"].build())
_TOKENIZER = byte_level_bpe()
TALKING = tl.wrap(FAMILIES["llama"].build(vocab_size=len(_TOKENIZER)), _TOKENIZER)
ROWS, LONG_AND_SHORT = random_rows(EVEN), random_rows(RAGGED)


@dataclass(frozen=True)
class Wrong:
    """A block with one wrong line, marked by ``# <--``, and the error that names it."""

    error: str
    body: str
    opening: str = "with model.trace(rows) as t:"

    def __str__(self) -> str:
        return f"{self.error}: {self.body.strip().splitlines()[-1]}"


_ADD_V = "model.layers[0].attn_out += v  # <--\nv += 1\nmodel.logits.save()"
_READ = "h = model.layers[1].resid_post\n"
IN_A_BLOCK: tuple[Wrong, ...] = (
    Wrong("UnknownSiteError", "model.layers[0].resid_pots.save()  # <--"),
    Wrong("UnknownSiteError", "model.layers[0].logits.save()  # <--"),
    Wrong("UnknownSiteError", "model.resid_post.save()  # <--"),
    Wrong("UnknownSiteError", "model.layers[0].resid_pots = 0  # <--"),
    Wrong("UnknownSiteError", "model.embedding = 0  # <--"),
    Wrong("AbsentSiteError", "model.pos_embed.save()  # <--"),
    Wrong("AbsentSiteError", "model.pos_embed = 0  # <--"),
    Wrong("AbsentSiteError", "gpt2.layers[0].mlp_up.save()  # <--", "with gpt2.trace(rows) as t:"),
    Wrong("LayerRangeError", "model.layers[3].resid_post.save()  # <--"),
    Wrong("LayerRangeError", "model.layers[-4].resid_post = 0  # <--"),
    Wrong("LayerRangeError", "model.layers[7:9].resid_post.save()  # <--"),
    Wrong("UnknownParameterError", "model.param('lm_head.wieght').save()  # <--"),
    Wrong("ShapeError", _READ + "x = h + torch.ones(47)  # <--"),
    Wrong("ShapeError", _READ + "x = h @ torch.ones(47, 3)  # <--"),
    Wrong("ShapeError", "model.layers[0].mlp_act = torch.ones(48)  # <--"),
    Wrong("ShapeError", "model.layers[0].mlp_act += torch.ones(48)  # <--"),
    Wrong("ShapeError", _READ + "h[:, -1] = torch.ones(2, 3, 48)  # <--"),
    Wrong("ShapeError", _READ + "x = h[0, 0, 0, 0]  # <--"),
    Wrong("DtypeError", "model.layers[0].mlp_act = torch.ones(80, dtype=torch.long)  # <--"),
    Wrong("DtypeError", _READ + "model.layers[2].resid_post = h > 0  # <--"),
    Wrong("DtypeError", _READ + "x = h + np.ones(48)  # <--"),
    Wrong("DtypeError", "model.layers[0].mlp_act = 1j  # <--"),
    Wrong("StaleValueError", _READ + "h[:, -1] = 0\nx = h * 2  # <--"),
    Wrong("StaleValueError", _READ + "model.layers[1].resid_post = 0\nh[:, -1] = 0  # <--"),
    Wrong("StaleValueError", _READ + "h[:, -1] = 0\nh.save()  # <--"),
    Wrong("WriteTargetError", _READ + "x = h + 1\nx[:, -1] = 0  # <--"),
    Wrong("WriteTargetError", "model.layers[0].resid_post = 'zero'  # <--"),
    Wrong("LayerMappingError", "model.layers[0].resid_post = model.layers[0:2].resid_pre  # <--"),
    Wrong("CausalityError", "model.layers[1].attn_in = model.layers[1].mlp_out  # <--"),
    Wrong("CausalityError", "late = model.logits.mean()\nmodel.layers[0].resid_post += late  # <--"),
    Wrong("CausalityError", "model.layers[0].mlp_pre = model.layers[0].mlp_up  # <--"),
    Wrong("CausalityError", "model.layers[0:3].resid_pre = model.layers[0:3].mlp_out  # <--"),
    Wrong("ValueBranchError", _READ + "if h.sum() > 0:  # <--\n    pass"),
    Wrong("ValueBranchError", _READ + "x = float(h.sum())  # <--"),
    Wrong("ValueBranchError", _READ + "x = h.sum().item()  # <--"),
    Wrong("ValueBranchError", _READ + "for row in h:  # <--\n    pass"),
    Wrong("ValueBranchError", _READ + "x = len(h)  # <--"),
    Wrong("ValueBranchError", _READ + "x = 3 in h  # <--"),
    Wrong("ValueBranchError", _READ + "x = np.asarray(h)  # <--"),
    Wrong("ValueAttributeError", _READ + "x = h.sofmax(-1)  # <--"),
    Wrong("ValueAttributeError", _READ + "x = h.device  # <--"),
    Wrong("InPlaceError", _READ + "h.add_(1)  # <--"),
    Wrong("InPlaceError", _READ + "torch.relu_(h)  # <--"),
    Wrong("RandomFunctionError", _READ + "x = torch.rand_like(h)  # <--"),
    Wrong("RandomFunctionError", _READ + "x = torch.dropout(h, 0.5, True)  # <--"),
    Wrong("DynamicShapeError", _READ + "x = h[h > 0]  # <--"),
    Wrong("DynamicShapeError", _READ + "x = h.nonzero()  # <--"),
    Wrong("DynamicShapeError", _READ + "x = torch.unique(h)  # <--"),
    Wrong("LayerMappingError", "x = model.layers[0:2].attn_out + model.layers[1:3].attn_out  # <--"),
    Wrong("LayerMappingError", "model.layers[0:2].attn_out += tl.per_layer(torch.ones(3, 48))  # <--"),
    Wrong("DuplicateNameError", _READ + "h.save('a')\n(h * 2).save('a')  # <--"),
    Wrong("NotRunYetError", _READ + "s = h.save()\nx = s.value  # <--"),
    Wrong("NestedTraceError", "with model.trace(rows):  # <--\n    pass"),
    Wrong("NestedTraceError", "with model.record():  # <--\n    pass"),
    # Errors of the block as a whole, at its end.
    Wrong("LostUpdateError", _READ + "h += 1  # <--\nmodel.logits.save()"),
    Wrong("LostUpdateError", _READ + "p = h[:, -1]\np *= 2  # <--\nmodel.logits.save()"),
    Wrong("LostUpdateError", "m = model.layers[0:2].attn_out\nm += 1  # <--\nmodel.logits.save()"),
    Wrong("NothingSavedError", "model.layers[0].attn_out = 0\nmodel.layers[1].attn_out = 0  # <--"),
    # Errors of the run.
    Wrong("ConstantChangedError", "v = torch.ones(48)\n" + _ADD_V),
    Wrong("ConstantChangedError", "v = np.ones(48, np.float32)\n" + _ADD_V),
    Wrong("OpFailedError", _READ + "x = tl.apply(lambda x: 1 / 0, h)  # <--\nx.save()"),
    Wrong("ApplyResultError", _READ + "x = tl.apply(lambda x: x[0], h)  # <--\nx.save()"),
    Wrong("ApplyResultError", _READ + "x = tl.apply(lambda x: x.double(), h)  # <--\nx.save()"),
    Wrong("MutatedActivationError", _READ + "x = tl.apply(lambda x: x.neg_(), h)  # <--\nx.save()"),
    # Rows of different lengths.
    *(
        Wrong("PositionAxisError", line, "with model.trace(ragged) as t:")
        for line in (
            _READ + "x = h[:, 0]  # <--",
            _READ + "x = h.mean(1)  # <--",
            _READ + "x = h.flip(1)  # <--",
            _READ + "x = h.softmax(dim=-2)  # <--",
            _READ + "h[:, 2:4] = 0  # <--",
            "model.layers[0].resid_post[:, 1] += 1  # <--",
        )
    ),
    Wrong("RaggedSelectionError", _READ + "x = h.tok[1:]  # <--", "with model.trace(ragged) as t:"),
    Wrong("RaggedSelectionError", _READ + "x = h.tok[5]  # <--", "with model.trace(ragged) as t:"),
    Wrong("TokenMatchError", "x = talking.logits.tok['Rome']  # <--", "with talking.trace('Paris') as t:"),
    Wrong("TokenMatchError", "talking.layers[0].resid_post.tok['a'] = 0  # <--", "with talking.trace('a a a') as t:"),
    # Without a prompt sizes are symbols.
    Wrong("SymbolicSizeError", _READ + "x = int(h.shape[1])  # <--", "with model.record() as t:"),
    Wrong("SymbolicSizeError", _READ + "for p in range(h.shape[1]):  # <--\n    pass", "with model.record() as t:"),
    Wrong("ShapeError", _READ + "x = h + torch.ones(3, 7, 48)  # <--", "with model.record() as t:"),
    Wrong(
        "SaveInGenerationError",
        "model.layers[0].pattern.save()  # <--",
        "with model.generate(rows, max_new_tokens=2):",
    ),
)  # fmt: skip

AROUND_A_BLOCK: tuple[Wrong, ...] = (
    Wrong("NoTraceError", "model.layers[0].resid_post  # <--", ""),
    Wrong("NoTraceError", "model.logits = 0  # <--", ""),
    Wrong("EmptyPromptError", "model.trace([])  # <--", ""),
    Wrong("PromptError", "model.trace(3.5)  # <--", ""),
    Wrong("PromptTooLongError", "model.trace(list(range(3, 70)))  # <--", ""),
    Wrong("UnsavedValueError", "with model.trace(rows) as t:\n    h = model.logits\nh.value  # <--", ""),
    Wrong("UnsavedValueError", "with model.trace(rows) as t:\n    h = model.logits\nx = h + 1  # <--", ""),
    Wrong(
        "ForeignValueError",
        "with model.trace(rows):\n    h = model.logits\nwith model.trace(rows):\n    model.logits += h  # <--",
        "",
    ),
    Wrong(
        "WriteTargetError",
        "with model.trace(rows):\n    h = model.logits.save()\nh[0] = 1  # <--",
        "",
    ),
)

_files = count()
# Lines that change nothing, so that the guilty one stands anywhere.
_HARMLESS = st.lists(
    st.sampled_from(
        ["", "# a comment", "y = 1", "z = model.layers[0].attn_in + 1", "model.layers[2].attn_in += 0.5"]
    ),
    max_size=3,
)


def caught(text: str, wanted: type[TracelensError]) -> tuple[TracelensError, str]:
    """Runs the text as a file of its own."""
    filename = f"<block {next(_files)}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    names = {
        "tl": tl, "torch": torch, "np": np, "model": MODEL, "gpt2": GPT2, "talking": TALKING,
        "rows": ROWS, "ragged": LONG_AND_SHORT,
    }  # fmt: skip
    with pytest.raises(wanted) as found:
        exec(compile(text, filename, "exec"), names)
    return found.value, filename


def assert_blamed(error: TracelensError, filename: str, text: str, wrong: Wrong) -> None:
    guilty = next(number for number, line in enumerate(text.splitlines(), 1) if "# <--" in line)
    assert type(error).__name__ == wrong.error
    assert error.at is not None
    assert (error.at.filename, error.at.line) == (filename, guilty), str(error)
    # The message shows the line, and what is wrong, in that order.
    assert "# <--" in error.at.text
    assert str(error).startswith(error.problem)
    assert f"at {filename}:{guilty}" in str(error)


def is_blameless(line: str, wrong: Wrong) -> bool:
    writes = "+= 0.5" in line
    names_the_model = "with model." in wrong.opening
    return (names_the_model and not (writes and wrong.error == "NothingSavedError")) or "model" not in line


@pytest.mark.parametrize("wrong", IN_A_BLOCK, ids=str)
@given(data=st.data())
def test_an_error_names_the_line(wrong, data):
    lines = [wrong.opening]
    for line in wrong.body.splitlines():
        indented = line.startswith(" ")
        extra = [] if indented else [new for new in data.draw(_HARMLESS) if is_blameless(new, wrong)]
        lines += [f"    {new}" for new in [*extra, line]]
    text = "\n" * data.draw(st.integers(0, 3)) + "\n".join(lines) + "\n"
    error, filename = caught(text, getattr(errors, wrong.error))
    assert_blamed(error, filename, text, wrong)


@pytest.mark.parametrize("wrong", AROUND_A_BLOCK, ids=str)
def test_an_error_outside_of_a_block_names_the_line(wrong):
    text = "\n\n" + wrong.body + "\n"
    error, filename = caught(text, getattr(errors, wrong.error))
    assert_blamed(error, filename, text, wrong)


@pytest.mark.parametrize("wrong", IN_A_BLOCK, ids=str)
def test_an_error_in_a_function_names_the_line_in_the_function(wrong):
    """The innermost line that is the user's, however it was called."""
    body = "\n".join("    " + line for line in wrong.body.splitlines())
    text = f"def block():\n{body}\n{wrong.opening}\n    (lambda: block())()\n"
    error, filename = caught(text, getattr(errors, wrong.error))
    assert_blamed(error, filename, text, wrong)
    assert error.at is not None
    assert error.at.function in ("block", "<module>")


def test_the_other_lines_of_an_error_are_named_too():
    text = (
        "with model.trace(rows):\n    late = model.logits\n    model.layers[0].attn_in = late.mean()  # <--\n"
    )
    error, filename = caught(text, errors.CausalityError)
    assert [(role, at.filename, at.line) for role, at in error.also] == [
        ("the value was read at", filename, 2)
    ]


def test_a_compiled_program_blames_the_line_that_recorded():
    text = (
        "with model.record() as r:\n"
        "    h = model.layers[0].resid_post\n"
        "    h[:, 0] = 0  # <--\n"
        "    model.logits.save()\n"
        "program = model.compile(r)\n"
        "program(ragged)\n"
    )
    with untouched(HF):
        error, filename = caught(text, errors.PositionAxisError)
    assert_blamed(error, filename, text, Wrong("PositionAxisError", ""))


def test_two_blocks_of_one_structure_blame_their_own_lines():
    """They share a compiled program, and not its lines."""
    block = "with model.trace(rows):\n    x = tl.apply(f, model.layers[0].resid_post)  # {}\n    x.save()\n"
    text = "f = lambda x: x\n" + block.format("fine") + "f = lambda x: 1 / 0\n" + block.format("<--")
    error, filename = caught(text, errors.OpFailedError)
    assert_blamed(error, filename, text, Wrong("OpFailedError", ""))
