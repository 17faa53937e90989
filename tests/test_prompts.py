"""``t.prompts``: one prompt of a batch for itself, by name; the properties are in tests/properties/test_prompts.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tracelens as tl
from tests.errors import LLAMA, refused
from tests.support.families import FAMILIES
from tests.support.pretend import pretend_throughout
from tests.support.spread_models import EVERY_WAY, Both, fixture_of
from tracelens.errors import (
    CausalityError,
    ForeignValueError,
    IndexingError,
    LostUpdateError,
    NotALanguageModelError,
    PositionAxisError,
    ReplacementError,
    ShapeError,
    SpecialisedGraphError,
    StaleValueError,
    SymbolicSizeError,
    TokenMatchError,
    TokenRangeError,
    UnknownSiteError,
    WriteTargetError,
)

__all__ = ["pretend_throughout"]

model = LLAMA.model
SHORT, LONG = "The capital of Italy", "Paris is the capital of France, it is said"
TEXTS = [SHORT, LONG]
ROWS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
D = 48


def logits_of(rows: Any, change: Callable[[Any], None] = lambda t: None) -> list[torch.Tensor]:
    with model.trace(rows) as t:
        change(t)
        saved = [prompt.logits.save() for prompt in t.prompts]
    return [handle.value for handle in saved]


# --- what others get wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_write_to_one_prompt_is_not_a_write_to_the_first_or_to_all(row: int) -> None:
    """Elsewhere an edit "of the second prompt" is one of row 0, or of every row."""

    def change(t: Any) -> None:
        t.prompts[row].layers[1].resid_post[:, 0] = 0

    before, after = logits_of(ROWS), logits_of(ROWS, change)
    for other in range(3):
        assert torch.equal(before[other], after[other]) == (other != row)
    with model.trace([ROWS[row]]):
        model.layers[1].resid_post[:, 0] = 0
        alone = model.logits.save()
    torch.testing.assert_close(after[row], alone.value, rtol=1e-5, atol=1e-5)


def test_a_value_of_one_prompt_is_not_shadowed_by_that_of_the_next() -> None:
    """Elsewhere the loop's variable holds the last prompt's value when the block runs."""
    with model.trace(ROWS) as t:
        streams = []
        for prompt in t.prompts:
            h = prompt.layers[1].resid_post
            streams.append(h)
        saved = [h.save() for h in streams]
    for ids, handle in zip(ROWS, saved, strict=True):
        with model.trace([ids]):
            alone = model.layers[1].resid_post.save()
        torch.testing.assert_close(handle.value, alone.value, rtol=1e-5, atol=1e-5)
        assert handle.value.shape == (1, len(ids), D)


def test_position_zero_is_the_first_token_and_not_padding() -> None:
    with model.trace(ROWS) as t:
        first = [prompt.embed[:, 0].save() for prompt in t.prompts]
        last = [prompt.embed.tok[-1].save() for prompt in t.prompts]
    table = LLAMA.hf.get_input_embeddings().weight
    for ids, one, other in zip(ROWS, first, last, strict=True):
        assert torch.equal(one.value, table[ids[:1]])
        assert torch.equal(other.value, table[ids[-1:]])


def test_two_writes_to_one_site_are_both_there() -> None:
    with model.trace(ROWS) as t:
        for number, prompt in enumerate(t.prompts):
            prompt.layers[1].resid_post[:, -1] = float(number)
            prompt.layers[1].resid_post[:, -1] += 10.0
        h = model.layers[1].resid_post.tok[-1].save()
    assert h.value[:, 0].tolist() == [10.0, 11.0, 12.0]


def test_no_padding_is_written() -> None:
    def change(t: Any) -> None:
        t.prompts[1].layers[0].resid_post = 100.0

    with model.trace(ROWS):
        before = model.layers[0].resid_post.save()
    with model.trace(ROWS) as t:
        change(t)
        whole = tl.apply(lambda x: x, model.layers[0].resid_post).save()
    for row in (0, 2):
        assert torch.equal(whole.value[row], before.value[row])
    assert whole.value[1].eq(100).all()
    torch.testing.assert_close(
        logits_of(ROWS, change)[1], logits_of([ROWS[1]], change_all)[0], rtol=1e-5, atol=1e-5
    )


def change_all(t: Any) -> None:
    model.layers[0].resid_post = 100.0


def test_a_prompt_is_patched_with_another_in_one_pass() -> None:
    with model.trace(TEXTS) as t:
        a, b = t.prompts
        b.layers[1].resid_post.tok[" France"] = a.layers[1].resid_post.tok[" Italy"]
        patched = b.logits[:, -1].save()
    with model.trace(SHORT):
        italy = model.layers[1].resid_post.tok[" Italy"].save()
    with model.trace(LONG):
        clean = model.logits[:, -1].save()
    with model.trace(LONG):
        model.layers[1].resid_post.tok[" France"] = italy.value
        expected = model.logits[:, -1].save()
    assert (clean.value - expected.value).abs().max() > 1e-3
    torch.testing.assert_close(patched.value, expected.value, rtol=1e-5, atol=1e-5)


def test_a_strength_and_a_vector_for_each_row() -> None:
    generator = torch.Generator().manual_seed(1)
    strength = torch.tensor([0.0, 2.0, -1.0])
    vectors = torch.randn(3, D, generator=generator)

    def change(t: Any) -> None:
        model.layers[1].resid_post += strength[:, None, None] * vectors[:, None]

    found = logits_of(ROWS, change)
    assert torch.equal(found[0], logits_of(ROWS)[0])
    for row in (1, 2):
        with model.trace([ROWS[row]]):
            model.layers[1].resid_post += strength[row] * vectors[row]
            alone = model.logits.save()
        torch.testing.assert_close(found[row], alone.value, rtol=1e-5, atol=1e-5)


# --- what there is ---------------------------------------------------------------------------------------------------


def test_prompts_are_counted_and_iterated_over() -> None:
    with model.trace(ROWS) as t:
        assert len(t.prompts) == 3
        assert [repr(prompt) for prompt in t.prompts] == ["t.prompts[0]", "t.prompts[1]", "t.prompts[2]"]
        assert t.prompts[-1] is t.prompts[2]
        assert t.prompts[1:] == (t.prompts[1], t.prompts[2])
        assert repr(t.prompts[1].layers[2]) == "t.prompts[1].layers[2]"
        assert len(t.prompts[0].layers) == 3
        assert {"logits", "embed", "layers", "token_mask"} <= set(dir(t.prompts[0]))


def test_every_kind_of_site_has_the_prompts_own_shape() -> None:
    with model.trace(ROWS) as t:
        prompt = t.prompts[2]
        shapes = {
            "resid_post": (1, 3, D),
            "pattern": (1, 4, 3, 3),
            "z": (1, 3, 4, 12),
            "k": (1, 3, 2, 12),
            "mlp_act": (1, 3, 80),
        }
        saved = {name: getattr(prompt.layers[1], name).save() for name in shapes}
        mapped = prompt.layers[0:2].resid_post.save()
        head = prompt.layers[1].head(3).z.save()
        out = prompt.layers[1].head_out.save()
        heads = prompt.layers[1].head([0, 2]).pattern.save()
        ends = [getattr(prompt, name).save() for name in ("embed", "final_norm", "logits", "token_mask")]
        assert prompt.layers[1].resid_post.shape == (1, 3, D)
    for name, shape in shapes.items():
        assert saved[name].value.shape == shape
    assert mapped.value.shape == (2, 1, 3, D)
    assert head.value.shape == (1, 3, 12)
    assert out.value.shape == (1, 3, 4, D)
    assert heads.value.shape == (1, 2, 3, 3)
    assert [handle.value.shape[:2] for handle in ends] == [(1, 3)] * 4
    assert ends[-1].value.all()


TOKENS: dict[str, Callable[[Any], Any]] = {
    "a number": lambda h: h.tok[2],
    "from the end": lambda h: h.tok[-2],
    "a slice": lambda h: h.tok[1:3],
    "a step": lambda h: h.tok[::2],
    "backwards": lambda h: h.tok[::-1],
    "a list": lambda h: h.tok[[3, 0, -1]],
    "a text": lambda h: h.tok[" capital"],
    "of a text": lambda h: h.tok[" capital of", -1],
    "an id": lambda h: h.tok[tl.token_id(LLAMA.tokenizer(" capital")["input_ids"][-1])],
    "characters": lambda h: h.tok[tl.chars(LONG.index("capital"), LONG.index("capital") + 7)],
    "a mask": lambda h: h.tok[torch.arange(h.shape[1])[None] % 2 == 0],
    "plain": lambda h: h[:, 2:5],
    "mixing": lambda h: h.cumsum(1),
    "of a product": lambda h: (h @ torch.ones(D, 5)).tok[" capital"],
    "of a norm": lambda h: torch.nn.functional.layer_norm(h, (D,)).tok[-1],
    "of a turned value": lambda h: h.transpose(1, 2).relu().tok[1:3],
    "of a softmax": lambda h: h.softmax(-1).tok[0],
    "of a part": lambda h: h[..., :4].tok[[0, 1]],
    "of a difference": lambda h: (h - h.mean(1, keepdim=True)).tok[" capital"],
    "a mean": lambda h: tl.masked_mean(h),
}


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
def test_tokens_are_counted_within_the_prompt(token: Callable[[Any], Any]) -> None:
    with model.trace(TEXTS) as t:
        found = token(t.prompts[1].layers[1].resid_post).save()
    with model.trace(LONG):
        alone = token(model.layers[1].resid_post).save()
    assert found.value.shape == alone.value.shape
    torch.testing.assert_close(found.value, alone.value, rtol=1e-5, atol=1e-5)


UNCERTAIN: dict[str, Callable[[Any, Any], Any]] = {
    "turned round": lambda a, b: b.flip(1).tok[0],
    "some of them": lambda a, b: b[:, 1:].tok[0],
    "chosen ones": lambda a, b: b.tok[[0, 1]].tok[0],
    "their mean": lambda a, b: b.mean(1).tok[0],
    "added up": lambda a, b: b.cumsum(1).tok[0],
}


@pytest.mark.parametrize("token", UNCERTAIN.values(), ids=UNCERTAIN)
def test_tokens_of_what_has_lost_them_are_refused(token: Callable[[Any, Any], Any]) -> None:
    says = ".tok addresses the position axis"
    with refused(PositionAxisError, says, instead="t.prompts[i]", text=".tok[0]"), model.trace(TEXTS) as t:
        token(t.prompts[0].embed, t.prompts[1].embed).save()


TWO: dict[str, Callable[[Any, Any], Any]] = {
    "token by token": lambda a, b: (a + b).tok[0],
    "every token with every other": lambda a, b: (a @ b.mT).tok[0],
}


@pytest.mark.parametrize("token", TWO.values(), ids=TWO)
def test_tokens_of_two_prompts_at_once_are_refused(token: Callable[[Any, Any], Any]) -> None:
    says = ".tok addresses the position axis"
    with (
        refused(PositionAxisError, says, instead="t.prompts[i]", text=".tok[0]"),
        model.trace([[5, 6, 7], [8, 9, 10]]) as t,
    ):
        token(t.prompts[0].embed, t.prompts[1].embed).save()


def test_a_gradient_with_respect_to_a_prompts_part() -> None:
    with model.trace(ROWS) as t:
        prompt = t.prompts[1]
        h = prompt.layers[1].resid_post
        g = tl.grad(prompt.logits[:, -1, 5].sum(), h)
        g.save("g")
        g.tok[-1].save("last")
    with model.trace([ROWS[1]]):
        loss = model.logits[:, -1, 5].sum()
        alone = tl.grad(loss, model.layers[1].resid_post).save()
    assert alone.value.abs().max() > 1e-3
    torch.testing.assert_close(t["g"], alone.value, rtol=1e-5, atol=1e-5)
    assert torch.equal(t["last"], t["g"][:, -1])
    assert t.results.entries["g"].described == "gradient at prompts[1].layers[1].resid_post"


def test_what_was_saved_says_of_which_prompt() -> None:
    with model.trace(TEXTS) as t:
        t.prompts[1].layers[2].resid_post.tok[-1].save("a")
        t.prompts[0].layers[0:2].head(3).z[:, 1].save("b")
        t.prompts[0].logits.save("c")
        model.logits.tok[-1].save("d")
    described = {name: entry.described for name, entry in t.results.entries.items()}
    assert described == {
        "a": "prompts[1].layers[2].resid_post.tok[-1]",
        "b": "prompts[0].layers[0:2].z[:, :, 3][:, 1]",
        "c": "prompts[0].logits",
        "d": "logits.tok[-1]",
    }
    assert "index %0[prompt(1), prompt(1 length=" in t.explain()


# --- programs --------------------------------------------------------------------------------------------------------


def test_a_program_finds_the_text_anew() -> None:
    """A place that was learned when it was recorded would be another token of the next prompts."""
    ids = LLAMA.tokenizer("In France it is")["input_ids"]
    with model.record([[5, 6], ids]) as r:
        r.prompts[1].embed.tok[" France"].save("h")
    turned = [*ids[len(ids) // 2 :], *ids[: len(ids) // 2]]
    (first, second) = (
        [token.position for token in model.tokens(row)[0] if token.spelt == " France"]
        for row in (ids, turned)
    )
    assert first != second
    assert torch.equal(
        model.compile(r)([[7], turned])["h"],
        LLAMA.hf.get_input_embeddings().weight[torch.tensor([[ids[first[0]]]])],
    )


def test_a_program_is_for_prompts_of_as_many_tokens() -> None:
    with model.record(ROWS) as r:
        r.prompts[1].layers[0].resid_post[:, 1] = 0
        r.prompts[1].logits.save("l")
    program = model.compile(r)
    other = [[5], [20, 21], [1, 2]]  # of the others nothing depends
    with model.trace([[20, 21]]):
        model.layers[0].resid_post[:, 1] = 0
        alone = model.logits.save()
    torch.testing.assert_close(program(other)["l"], alone.value, rtol=1e-5, atol=1e-5)
    with pytest.raises(
        SpecialisedGraphError, match=r"t\.prompts\[1\] had 2 tokens .* and has 3 here"
    ) as caught:
        program([[5], [20, 21, 22]])
    assert caught.value.at is not None
    assert caught.value.at.filename == __file__
    with pytest.raises(
        SpecialisedGraphError, match=r"about t\.prompts\[1\], and here are fewer than 2 prompts"
    ):
        program([[5, 6]])


def test_the_graph_is_data() -> None:
    with model.record(TEXTS) as r:
        a, b = r.prompts
        b.layers[1].resid_post.tok[" France"] = a.layers[1].resid_post.tok[-1]
        b.layers[1].pattern.save("p")
        b.logits.tok[tl.chars(0, 5)].save("l")
    assert tl.parse(r.graph.text()) == r.graph
    assert tl.Graph.from_json(r.graph.to_json()) == r.graph
    tl.verify(r.graph)


def test_a_graph_that_takes_anothers_tokens_is_not_valid() -> None:
    with model.record(ROWS) as r:
        r.prompts[1].embed.save("h")
    text = r.graph.text()
    for wrong in (
        text.replace("prompt(1 length=2)", "prompt(0 length=2)"),
        text.replace("[prompt(1), prompt(1 length=2)]", "[:, prompt(1 length=2)]").replace(
            "f32[1,2,48]", "f32[B,2,48]"
        ),
        text.replace("[prompt(1), prompt(1 length=2)]", "[prompt(1)]").replace("f32[1,2,48]", "f32[1,P,48]"),
    ):
        assert wrong != text
        with pytest.raises(
            tl.errors.VerificationError, match="a prompt is chosen by its row and its own tokens"
        ):
            tl.verify(tl.parse(wrong))


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_prompts_that_there_are_not() -> None:
    for key in (3, -4):
        with (
            refused(IndexingError, f"there is no prompt {key}", "0 to 2", instead="for p in t.prompts"),
            model.trace(ROWS) as t,
        ):
            t.prompts[key].embed.save()  # <-
    for wrong in ("Paris", True, 1.0, None):
        with (
            refused(IndexingError, "a prompt is chosen with a number", instead="t.prompts[0]"),
            model.trace(ROWS) as t,
        ):
            t.prompts[wrong].embed.save()  # <-


def test_a_prompt_is_no_tensor() -> None:
    with (
        refused(WriteTargetError, "t.prompts[0] is not a tensor", instead="resid_post = value"),
        model.trace(ROWS) as t,
    ):
        t.prompts[0] = 0  # <-
    with (
        refused(WriteTargetError, "t.prompts[0].layers is not a tensor", instead="resid_post = value"),
        model.trace(ROWS) as t,
    ):
        t.prompts[0].layers = 0  # <-
    with refused(WriteTargetError, "can be read but not written", instead=None), model.trace(ROWS) as t:
        t.prompts[0].token_mask = True  # <-


def test_names_that_prompts_do_not_have() -> None:
    with (
        refused(UnknownSiteError, "resid_post", instead="model.layers[i].resid_post"),
        model.trace(ROWS) as t,
    ):
        t.prompts[0].resid_post.save()  # <-
    with (
        refused(UnknownSiteError, "'unembed': it is of the model", instead="model.unembed"),
        model.trace(ROWS) as t,
    ):
        t.prompts[0].unembed.save()  # <-
    with (
        refused(UnknownSiteError, "t.prompts[1].layers[0] has no site 'resid_pots'", instead="resid_post"),
        model.trace(ROWS) as t,
    ):
        t.prompts[1].layers[0].resid_pots.save()  # <-


def test_a_module_runs_for_all_prompts() -> None:
    with (
        refused(ReplacementError, "a module runs for all prompts", instead="which changes this prompt alone"),
        model.trace(ROWS) as t,
    ):
        t.prompts[0].layers[1].skip()  # <-
    with (
        refused(ReplacementError, "a module runs for all prompts", instead="which changes this prompt alone"),
        model.trace(ROWS) as t,
    ):
        t.prompts[0].layers[0:2].replace(mlp_add=0.0)  # <-


def test_values_of_prompts_that_do_not_fit() -> None:
    with refused(ShapeError, "does not broadcast", instead="a value of that shape"), model.trace(ROWS) as t:
        t.prompts[0].layers[1].resid_post = t.prompts[1].layers[1].resid_post  # <-
    with refused(CausalityError, "layers.0", instead="write at a later site"), model.trace(ROWS) as t:
        t.prompts[0].layers[0].resid_post = t.prompts[0].layers[1].resid_post  # <-
    with (
        refused(PositionAxisError, "needs positions that line up", instead="for p in t.prompts"),
        model.trace(ROWS) as t,
    ):
        (t.prompts[0].embed + model.embed).save()  # <-


def test_updates_that_would_be_lost() -> None:
    with refused(LostUpdateError, "never handed back", instead="+= v"), model.trace(ROWS) as t:
        h = t.prompts[0].layers[1].resid_post
        h += 1  # <-
        model.logits.save()
    with (
        refused(StaleValueError, "was written after this value was read", instead="read the site again"),
        model.trace(ROWS) as t,
    ):
        h = t.prompts[0].layers[1].resid_post
        t.prompts[1].layers[1].resid_post = 0
        h[:, 1] = 0  # <-


def test_tokens_that_a_prompt_does_not_have() -> None:
    with (
        refused(TokenRangeError, "there is no token 2, it has 2 tokens", instead="counts the real tokens"),
        model.trace(ROWS) as t,
    ):
        t.prompts[1].embed.tok[2].save()  # <-
    with (
        refused(TokenMatchError, "does not stand in row 1", instead="a text as it stands in the prompt"),
        model.trace(TEXTS) as t,
    ):
        t.prompts[1].embed.tok["Rome"].save()  # <-
    with refused(WriteTargetError, "names a token twice", instead="each token once"), model.trace(ROWS) as t:
        t.prompts[1].embed.tok[[0, -2]] = 0  # <-
    with refused(ShapeError, "t.prompts[1] has 2 tokens", instead="[1, 2], or [2]"), model.trace(ROWS) as t:
        t.prompts[1].embed.tok[torch.ones(3, dtype=torch.bool)].save()  # <-
    with (
        refused(TokenRangeError, "the mask is true nowhere", instead="a mask that is true somewhere"),
        model.trace(ROWS) as t,
    ):
        t.prompts[1].embed.tok[torch.zeros(1, 2, dtype=torch.bool)].save()  # <-


def test_prompts_of_another_block() -> None:
    with model.trace(ROWS) as first:
        model.logits.save()
    with (
        refused(ForeignValueError, "t.prompts[0] of another block", instead="t.prompts of the open block"),
        model.trace([[5, 6]]),
    ):
        first.prompts[0].embed.save()  # <-


def test_a_recording_without_a_prompt_has_none() -> None:
    with (
        refused(SymbolicSizeError, "this recording has none", instead="model.record([prompt, other])"),
        model.record() as r,
    ):
        r.prompts[0].embed.save("h")  # <-


def test_inputs_are_no_prompts() -> None:
    plain = tl.wrap(torch.nn.Linear(3, 2))
    with (
        pytest.raises(NotALanguageModelError, match="these inputs are no prompts"),
        plain.trace(torch.ones(1, 3)) as t,
    ):
        t.prompts[0]


def test_the_prompts_of_a_generation_are_those_of_its_first_step() -> None:
    count = 4
    with model.generate(ROWS, max_new_tokens=count) as plain:
        pass
    with model.generate(ROWS, max_new_tokens=count) as t:
        a, _, c = t.prompts
        seen = c.layers[1].resid_post.save()
        c.layers[1].resid_post.tok[-1] = a.layers[1].resid_post.tok[1]
        after = c.layers[1].resid_post.save()
        t.decode.layers[0].resid_post += 0.0
    with model.trace(ROWS[0]):
        given = model.layers[1].resid_post.tok[1].save()
    with model.trace(ROWS[2]) as alone:
        own = model.layers[1].resid_post.save()
        model.layers[1].resid_post.tok[-1] = given
        chosen = model.logits[:, -1].argmax(-1).save()
    assert seen.shape == (1, 3, D)
    torch.testing.assert_close(seen.value, own.value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.value[:, -1], given.value, rtol=1e-5, atol=1e-5)
    assert t.tokens[2][0] == chosen.item() != plain.tokens[2][0]
    assert t.tokens[:2] == plain.tokens[:2]
    assert alone.results


def test_plain_blocks_advise_to_take_each_prompt_for_itself() -> None:
    with refused(PositionAxisError, "indexing", instead="for p in t.prompts"), model.trace(ROWS):
        model.embed[:, 1].save()  # <-


# --- spread models ---------------------------------------------------------------------------------------------------


spread = fixture_of(EVERY_WAY)


def test_on_spread_models(spread: Both) -> None:
    found: list[dict[str, torch.Tensor]] = []
    for one in (spread.one, spread.spread):
        with one.trace(ROWS) as t:
            a, b, c = t.prompts
            b.layers[2].resid_post.tok[-1] = a.layers[0].resid_post.tok[1] * 2
            c.layers[1].mlp_act[:, 1:, 30:60] = 0
            a.layers[1].head(3).z[:, -1] += 1.0
            c.layers[1].pattern[:, :, :, 0] = 0
            a.layers[0:2].resid_post.tok[[0, 2]] *= 0.5
            b.layers[1].q.save("q")
            c.layers[1].mlp_act.mean(1).save("act")
            c.layers[2].pattern.save("pattern")
            c.embed.tok[tl.token_id(12)].save("id")
            one.embed.tok[[0, -1]].save("both ends")
            for name, prompt in zip("abc", t.prompts, strict=True):
                prompt.logits.save(name)
        found.append(dict(t.results))
    assert torch.isfinite(found[0]["c"]).all()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_every_family(family: str) -> None:
    one = tl.wrap(FAMILIES[family].build())
    with one.trace(ROWS) as t:
        t.prompts[2].layers[1].resid_post[:, 1] = t.prompts[1].layers[0].resid_post.tok[-1]
        found = [prompt.logits.save() for prompt in t.prompts]
    with one.trace([ROWS[1]]):
        donor = one.layers[0].resid_post[:, -1].save()
    with one.trace([ROWS[2]]):
        one.layers[1].resid_post[:, 1] = donor.value
        alone = one.logits.save()
    torch.testing.assert_close(found[2].value, alone.value, rtol=1e-4, atol=1e-4)
