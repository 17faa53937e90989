"""``model.lens(value)`` against whole logits in float64, which nobody streams."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close

import tracelens as tl
from tests.support.dense_families import DENSE
from tests.support.families import FAMILIES
from tracelens.errors import LensError, NoTokenizerError, ShapeError, TokenMatchError
from tracelens.ir.passes.pipeline import improve

IDS = [[5, 17, 33, 2, 60, 41], [9, 8, 77, 31, 4, 12]]
RAGGED = [[5, 17, 33, 2, 60, 41], [9, 8, 77]]


@pytest.fixture(scope="module", params=[*FAMILIES, "softcap", "granite", "cohere2"])
def pair(request: pytest.FixtureRequest) -> tuple[tl.Model, torch.nn.Module]:
    if request.param == "softcap":
        hf = FAMILIES["gemma3"].build(final_logit_softcapping=3.0)
    elif request.param in DENSE:
        # Both multiply their logits with a number; here more than 1 in Granite, so that they are far apart.
        hf = DENSE[request.param].build(**({"logits_scaling": 0.6} if request.param == "granite" else {}))
    else:
        hf = FAMILIES[request.param].build()
    return tl.wrap(hf), hf


@pytest.fixture(scope="module")
def llama() -> tl.Model:
    return tl.wrap(FAMILIES["llama"].build())


def dense(model: tl.Model, states: torch.Tensor) -> torch.Tensor:
    """Whole logits in float64: the modules themselves, on states before the last norm."""
    import copy

    hf = copy.deepcopy(model.hf).double()
    norm = hf.transformer.ln_f if hasattr(hf, "transformer") else hf.model.norm
    logits = hf.get_output_embeddings()(norm(states.double()))
    logits = logits * getattr(hf.config, "logit_scale", 1.0) / getattr(hf.config, "logits_scaling", 1.0)
    cap = getattr(hf.config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def test_every_statistic_equals_that_of_whole_logits(pair: tuple[tl.Model, torch.nn.Module]) -> None:
    model, _ = pair
    ids = torch.tensor(IDS)
    following = torch.cat([ids[:, 1:], torch.full((2, 1), -1)], 1)
    with model.trace(ids) as t:
        h = model.layers[:].resid_post.save("h")
        lens = model.lens(model.layers[:].resid_post, workspace=4000)
        lens.topk(5).save("top")
        lens.entropy().save("entropy")
        lens.kl().save("kl")
        lens.log_prob(following).save("log_prob")
        lens.rank(following).save("rank")
        lens.log_prob_difference(3, 50).save("difference")
        lens.logsumexp().save("total")
        lens.max_prob().save("most")
        lens.js().save("js")
        lens.tv().save("tv")
        lens.js(model.lens(model.layers[0].attn_out)).save("js of two")
        model.layers[0].attn_out.save("a")
        lens.logits().save("logits")
        model.logits.save("own")
    whole = dense(model, h.value)
    log_probs = whole.log_softmax(-1)
    assert_close(t["logits"].double(), whole, atol=1e-5, rtol=1e-5)
    assert_close(t["logits"][-1], t["own"], atol=1e-5, rtol=1e-5)
    values, indices = log_probs.topk(6, -1)
    clear = (values[..., :5] - values[..., 1:]) > 1e-4
    assert clear.float().mean() > 0.9
    assert torch.equal(t["top.indices"][clear], indices[..., :5][clear])
    assert_close(t["top.values"].double(), values[..., :5], atol=1e-5, rtol=1e-5)
    assert_close(t["most"].double(), values[..., 0].exp(), atol=1e-5, rtol=1e-5)
    assert_close(t["entropy"].double(), -(log_probs.exp() * log_probs).sum(-1), atol=1e-5, rtol=1e-5)
    divergence = (log_probs[-1].exp() * (log_probs[-1] - log_probs)).sum(-1)
    assert divergence[0].min() > 0.05
    assert_close(t["kl"].double(), divergence, atol=1e-5, rtol=1e-5)
    p, q, a = log_probs.exp(), log_probs[-1].exp(), dense(model, t["a"]).softmax(-1)
    assert_close(t["tv"].double(), (p - q).abs().sum(-1) / 2, atol=1e-5, rtol=1e-5)
    for name, other in (("js", q), ("js of two", a)):
        mean = (p + other) / 2
        distance = ((p * (p / mean).log()).sum(-1) + (other * (other / mean).log()).sum(-1)) / 2
        assert distance[0].min() > 0.01
        assert_close(t[name].double(), distance, atol=1e-5, rtol=1e-5)
    assert_close(t["total"].double(), whole.logsumexp(-1), atol=1e-5, rtol=1e-5)
    assert_close(t["difference"].double(), whole[..., 3] - whole[..., 50], atol=1e-5, rtol=1e-5)
    known = following >= 0
    aims = following.clamp(min=0).expand(whole.shape[:-1])[..., None]
    own = log_probs.gather(-1, aims)
    assert_close(t["log_prob"][:, known].double(), own[..., 0][:, known], atol=1e-5, rtol=1e-5)
    assert t["log_prob"][:, ~known].isnan().all()
    ranks = (log_probs > own).sum(-1)
    sure = known & ((log_probs - own).abs().topk(2, -1, largest=False).values[..., 1] > 1e-4)
    assert torch.equal(t["rank"][sure], ranks[sure])
    assert (t["rank"][:, ~known] == -1).all()


def test_the_last_layer_says_what_the_model_says(pair: tuple[tl.Model, torch.nn.Module]) -> None:
    model, hf = pair
    with model.trace(IDS) as t:
        lens = model.lens(model.layers[-1].resid_post)
        lens.topk(3).save("last")
        lens.kl().save("kl")
        model.lens(model.final_norm).topk(3).save("normed")
    plain = hf(torch.tensor(IDS)).logits.log_softmax(-1).topk(3, -1)
    for name in ("last", "normed"):
        assert_close(t[f"{name}.values"], plain.values, atol=1e-5, rtol=1e-5)
        assert torch.equal(t[f"{name}.indices"], plain.indices)
    assert_close(t["kl"], torch.zeros(2, 6), atol=1e-6, rtol=0)


def test_rows_of_different_lengths(llama: tl.Model) -> None:
    with llama.trace(RAGGED):
        both = llama.lens(llama.layers[1].resid_post)
        top, kl = both.topk(3).save(), both.kl().save()
        last = llama.lens(llama.layers[1].resid_post.tok[-1]).kl().save()
    for row, ids in enumerate(RAGGED):
        with llama.trace([ids]):
            one = llama.lens(llama.layers[1].resid_post)
            alone, own = one.topk(3).save(), one.kl().save()
        assert torch.equal(top.indices.value[row][0], alone.indices.value[0])
        assert_close(kl.value[row], own.value, atol=1e-5, rtol=1e-5)
        assert_close(last.value[row], own.value[0, -1], atol=1e-5, rtol=1e-5)


def test_what_a_lens_says_can_be_written(llama: tl.Model) -> None:
    with llama.trace(IDS) as t:
        sure = llama.lens(llama.layers[0].mlp_out).prob(7)
        llama.layers[1].resid_post *= sure[..., None]
        llama.logits.save("edited")
    with llama.trace(IDS) as plain:
        logits = dense(llama, torch.zeros(1, 48))  # its modules only
        h = llama.layers[0].mlp_out.save()
        x = llama.layers[1].resid_post.save()
        llama.logits.save("logits")
    assert logits.shape == (1, 97)
    factor = dense(llama, h.value).softmax(-1)[..., 7].float()
    with llama.trace(IDS) as again:
        llama.layers[1].resid_post = x.value * factor[..., None]
        llama.logits.save("edited")
    assert (plain["logits"] - t["edited"]).abs().max() > 0.1
    assert_close(t["edited"], again["edited"], atol=1e-4, rtol=1e-4)


def test_a_gradient_goes_through_a_lens(llama: tl.Model) -> None:
    with llama.trace(IDS):
        h = llama.layers[1].resid_post
        g = tl.grad(llama.lens(h).log_prob(7).sum(), h).save()
    with llama.trace(IDS):
        h = llama.layers[1].resid_post
        norm, unembed = llama.hf.model.norm, llama.unembed
        plain = tl.grad((norm(h) @ unembed.T).log_softmax(-1)[..., 7].sum(), h).save()
    assert plain.value.abs().max() > 0.01
    assert_close(g.value, plain.value, atol=1e-5, rtol=1e-4)


def test_half_precision_reads_the_head_as_the_model_does() -> None:
    hf = FAMILIES["llama"].build(dtype=torch.bfloat16)
    model = tl.wrap(hf)
    with model.trace(IDS) as t:
        lens = model.lens(model.layers[-1].resid_post)
        lens.topk(1).save("top")
        lens.logsumexp().save("total")
    logits = hf(torch.tensor(IDS)).logits.float()
    assert t["top.values"].dtype is torch.float32
    assert_close(t["total"], logits.logsumexp(-1), atol=1e-4, rtol=1e-4)
    assert_close(t["top.values"][..., 0], logits.log_softmax(-1).amax(-1), atol=1e-4, rtol=1e-4)


class Unchanged:
    """A lens that is the model's own head, whatever the layer."""

    def translate(self, value: object, layer: int) -> object:
        return value

    def check(self, model: object) -> None:
        pass


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (lambda m: m.lens(3.0), LensError, "a lens is put on a value"),
        (lambda m: m.lens(m.layers[0].resid_post).topk(0), LensError, "topk"),
        (lambda m: m.lens(m.layers[0].resid_post).topk(98), LensError, "97 tokens"),
        (lambda m: m.lens(m.layers[0].resid_post).log_prob(97), LensError, "no token 97"),
        (lambda m: m.lens(m.layers[0].resid_post).rank(" Paris"), NoTokenizerError, "no tokenizer"),
        (lambda m: m.lens(m.layers[0].resid_post).rank(2.0), LensError, "no token"),
        (lambda m: m.lens(m.layers[0].mlp_act).entropy(), LensError, "48 wide"),
        (
            lambda m: m.lens(m.layers[0].resid_post[:, -1] * 2).kl(),
            LensError,
            "was computed with",
        ),
        (
            lambda m: m.lens(m.layers[0].resid_post[:, -1]).js(m.lens(m.final_norm)),
            ShapeError,
            "cannot be compared",
        ),
        # As many layers as prompts, and as many prompts as tokens: the numbers alone would fit.
        (lambda m: m.lens(m.layers[:2].resid_post.stack()[:, 0]).kl(), LensError, "was computed with"),
        (
            lambda m: m.lens(m.layers[0].resid_post[:, :2].transpose(0, 1)).tv(),
            LensError,
            "was computed with",
        ),
        (
            lambda m: m.lens(m.layers[:].resid_post, Unchanged(), layer=1),
            LensError,
            "each of which has its own translator",
        ),
    ],
)
def test_what_a_lens_refuses(
    llama: tl.Model, ask: Callable[[tl.Model], object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words), llama.trace(IDS):
        ask(llama)


def test_a_text_that_is_no_one_token() -> None:
    model = tl.load("smollm2-135m")
    with model.trace("The capital of France is"):
        paris = model.lens(model.layers[-1].resid_post[:, -1]).log_prob(" Paris").save()
        top = model.lens(model.layers[-1].resid_post[:, -1]).topk(1).save()
    assert model.tokenizer.decode(top.indices.value[0]) == " Paris"
    assert_close(paris.value, top.values.value[:, 0], atol=1e-6, rtol=0)
    with pytest.raises(TokenMatchError, match="is not one token"), model.trace("The capital"):
        model.lens(model.layers[-1].resid_post).log_prob(" Parisienne")


def test_the_graph_is_data(llama: tl.Model) -> None:
    with llama.record() as r:
        lens = llama.lens(llama.layers[1].resid_post)
        lens.topk(2).save("top")
        lens.kl().save("kl")
    again = tl.Graph.parse(r.graph.text()) if hasattr(tl.Graph, "parse") else r.graph
    assert str(again) == str(r.graph)
    improve(r.graph, verify_each=True)
    program = llama.compile(r)
    assert program(IDS)["top.values"].shape == (2, 6, 2)
