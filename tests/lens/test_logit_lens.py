"""``model.logit_lens``: the ready-made lens, against the dense one and against a forward pass over the same text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

import tracelens as tl
from tests.support.families import FAMILIES
from tests.support.tokenizers import byte_level_bpe
from tracelens.errors import LensError, LensMismatchError, NoTokenizerError, OptionError

IDS = [5, 17, 33, 2, 60, 41]
OTHER = [9, 8, 77]
SHARP: dict[str, Any] = {"initializer_range": 0.4}


@pytest.fixture(scope="module")
def model() -> tl.Model:
    return tl.wrap(FAMILIES["llama"].build(**SHARP))


def dense(model: tl.Model, ids: list[int], site: str) -> torch.Tensor:
    """Logits [L, T, V] of every layer, all of them kept, by transformers' own modules."""
    with model.trace([ids]):
        states = getattr(model.layers[:], site).save()
    hf: Any = model.hf
    return hf.lm_head(hf.model.norm(states.value[:, 0])).detach()


def test_a_prompt(model: tl.Model) -> None:
    lens = model.logit_lens([IDS], components=("attn_out", "resid_post"), top_k=4, track=[7])[0]
    assert lens.components == ("attn_out", "resid_post")
    assert (lens.layers, lens.positions, lens.n_prompt) == ((0, 1, 2), tuple(range(6)), 6)
    assert lens.token_ids.tolist() == IDS
    assert lens.next_ids.tolist() == [*IDS[1:], -1]
    final = dense(model, IDS, "resid_post")[-1].log_softmax(-1)
    for number, site in enumerate(lens.components):
        log_probs = dense(model, IDS, site).log_softmax(-1)
        values, ids = log_probs.topk(4, -1)
        assert torch.equal(lens.top_ids[number], ids)
        assert_close(lens.top_log_probs[number], values, atol=1e-5, rtol=1e-5)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        assert_close(lens.statistics["entropy"][number], entropy, atol=1e-5, rtol=1e-5)
        kl = (final.exp() * (final - log_probs)).sum(-1)
        assert kl[0].min() > 0.1
        assert_close(lens.statistics["kl"][number], kl, atol=2e-5, rtol=1e-4)
        own = log_probs[:, torch.arange(5), IDS[1:]]
        assert_close(lens.statistics["log_prob"][number, :, :5], own, atol=1e-5, rtol=1e-5)
        rank = (log_probs[:, :5] > own[..., None]).sum(-1)
        assert torch.equal(lens.statistics["rank"][number, :, :5], rank)
        assert lens.tracked_log_probs is not None
        assert_close(lens.tracked_log_probs[number, ..., 0], log_probs[..., 7], atol=1e-5, rtol=1e-5)
    assert lens.statistics["log_prob"][..., 5].isnan().all()
    assert (lens.statistics["rank"][..., 5] == -1).all()


@pytest.mark.parametrize("rows", [[IDS], [IDS, OTHER]], ids=["one", "ragged"])
def test_a_generation_says_what_a_pass_over_its_text_says(model: tl.Model, rows: list[list[int]]) -> None:
    found = model.logit_lens(rows, generate=5, top_k=3, eos_token_id=None)
    with model.generate(rows, max_new_tokens=5, eos_token_id=None) as t:
        model.logits.save()
    assert isinstance(found, tl.LensResults)
    for row, lens in enumerate(found):
        text = [*rows[row], *t.tokens[row]]
        assert lens.token_ids.tolist() == text[:-1]
        assert lens.next_ids.tolist() == text[1:]
        assert lens.n_prompt == len(rows[row])
        plain = model.logit_lens([text], top_k=3)[0].at(positions=slice(0, len(text) - 1))
        assert torch.equal(lens.top_ids, plain.top_ids)
        assert torch.equal(lens.statistics["rank"], plain.statistics["rank"])
        for name in ("log_prob", "entropy", "kl"):
            assert_close(lens.statistics[name], plain.statistics[name], atol=2e-5, rtol=1e-4)
        for where, part in (("generated", slice(len(rows[row]), None)), ("prompt", slice(0, len(rows[row])))):
            some = model.logit_lens(rows, generate=5, top_k=3, positions=where, eos_token_id=None)[row]
            spots = range(len(text) - 1)[part]
            assert some.positions == tuple(spots)
            window = lens.at(positions=list(spots))
            assert torch.equal(some.top_ids, window.top_ids)
            assert torch.equal(some.statistics["rank"], window.statistics["rank"])


def test_rows_that_end_early(model: tl.Model) -> None:
    with model.generate([IDS, OTHER], max_new_tokens=6, eos_token_id=None) as t:
        model.logits.save()
    end = t.tokens[0][2]
    found = model.logit_lens([IDS, OTHER], generate=6, eos_token_id=end, pad_token_id=0)
    before = t.tokens[0][: t.tokens[0].index(end)]
    assert len(before) < 5
    assert found[0].token_ids.tolist() == [*IDS, *before]
    assert found[0].next_ids.tolist()[-1] == end


@pytest.mark.parametrize("positions", ["last", 2, -1, [0, 2], [-2, -1], slice(1, 3)])
def test_some_positions(model: tl.Model, positions: Any) -> None:
    some = model.logit_lens([IDS, OTHER], positions=positions, layers=[-1, 0])
    for row, ids in enumerate((IDS, OTHER)):
        whole = model.logit_lens([ids])[0]
        spots = (
            {"last": [-1], 2: [2], -1: [-1]}.get(positions)
            if not isinstance(positions, list | slice)
            else None
        )
        wanted = range(len(ids))[positions] if isinstance(positions, slice) else (spots or positions)
        part = whole.at(layers=[0, 2], positions=[spot % len(ids) for spot in wanted])
        assert some[row].layers == (0, 2)
        assert some[row].positions == part.positions
        assert torch.equal(some[row].token_ids, part.token_ids)
        assert torch.equal(some[row].next_ids, part.next_ids)
        assert torch.equal(some[row].top_ids, part.top_ids)
        assert_close(some[row].statistics["kl"], part.statistics["kl"], atol=1e-5, rtol=1e-4)


def test_an_edit_is_seen(model: tl.Model) -> None:
    vector = 3 * torch.randn(48, generator=torch.Generator().manual_seed(0))

    def edit(t: Any) -> None:
        model.layers[1].resid_post += vector

    plain, steered = model.logit_lens([IDS])[0], model.logit_lens([IDS], edit=edit)[0]
    assert torch.equal(plain.at(layers=[0]).top_ids, steered.at(layers=[0]).top_ids)
    with model.trace([IDS]) as t:
        model.layers[1].resid_post += vector
        model.logits.save("logits")
    assert (t["logits"].argmax(-1)[0] != plain.top_ids[0, -1, :, 0]).any()
    assert torch.equal(t["logits"].argmax(-1)[0], steered.top_ids[0, -1, :, 0])
    assert plain.compare(steered) is not None


def test_slices_of_a_batch_and_small_workspaces_change_nothing(model: tl.Model) -> None:
    rows = [IDS, OTHER, [4, 4, 9, 1]]
    whole = model.logit_lens(rows)
    for options in ({"batch_size": 1}, {"batch_size": 2}, {"workspace": 2000}):
        for one, other in zip(whole, model.logit_lens(rows, **options), strict=True):
            assert torch.equal(one.top_ids, other.top_ids)
            assert_close(one.statistics["kl"], other.statistics["kl"], atol=1e-5, rtol=1e-4)


def test_the_identity_lens_is_the_logit_lens(model: tl.Model) -> None:
    identity = tl.TunedLens.identity(model)
    one, other = model.logit_lens([IDS])[0], model.logit_lens([IDS], lens=identity)[0]
    assert torch.equal(one.top_ids, other.top_ids)
    assert one.lens == "logit lens"
    assert one.lens != other.lens
    with pytest.raises(LensMismatchError):
        tl.wrap(FAMILIES["gpt2"].build(n_layer=2)).logit_lens([IDS], lens=identity)


def test_text_and_its_tokens() -> None:
    model = tl.wrap(FAMILIES["llama"].build(vocab_size=400), byte_level_bpe())
    lens = model.logit_lens("a text", track=["a"])
    assert isinstance(lens, tl.LensResult)
    assert "".join(lens.tokens).strip().endswith("text")
    assert list(lens.tracked) == ["a"]
    assert len(model.logit_lens(["a text", "two"])) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": [3]}, "3 layers"),
        ({"layers": []}, "3 layers"),
        ({"components": ()}, "components"),
        ({"positions": "some"}, "positions"),
        ({"positions": "generated"}, "no text is generated"),
        ({"positions": [2, 1]}, "in order"),
        ({"metrics": ["surprise"]}, "surprise"),
        ({"components": ["mlp_act"]}, "48 wide"),
        ({"top_k": 0}, "topk"),
        ({"generate": -1}, "generate"),
        ({"do_sample": True}, "no text is generated"),
        ({"track": [" Paris"]}, "tokenizer"),
        ({"track": [97]}, "no token 97"),
        ({"track": [1.5]}, "no token"),
    ],
)
def test_what_is_refused(model: tl.Model, options: dict[str, Any], words: str) -> None:
    with pytest.raises((LensError, NoTokenizerError, OptionError), match=words) as caught:
        model.logit_lens([IDS], **options)
    assert "test_logit_lens.py" in str(caught.value)
