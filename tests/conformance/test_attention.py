"""The inside of attention: scores and patterns, kernels, generation, and the model as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import tracelens as tl
from tests.conformance.test_reads import close, expected_rows, real_rows
from tests.conformance.test_writes import matters, oracle, same_logits
from tests.support.batches import EVEN, RAGGED, SINGLE, Batch, batch, random_rows
from tests.support.families import EVERY, FAMILIES, LAYERS
from tests.support.plain import edited, plain_logits, untouched
from tracelens.backends.attention import NAME
from tracelens.errors import (
    AbsentSiteError,
    AttentionImplementationError,
    CausalityError,
    OpFailedError,
    SiteMismatchError,
    WriteTargetError,
)
from tracelens.ir.sites import Site

PROMPTS = {"single": random_rows(SINGLE), "ragged": random_rows(RAGGED), "even": random_rows(EVEN)}
LOOKS = ("scores", "pattern")
every_family = pytest.mark.parametrize("family", FAMILIES)
every_prompt = pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS)
every_kernel = pytest.mark.parametrize("attn", ["sdpa", "eager"])


def inside(family: str) -> list[str]:
    return [*LOOKS] if family.startswith("gpt2") else ["q_rot", "k_rot", *LOOKS]


# --- reading ---------------------------------------------------------------------------------------------------------


@every_kernel
@every_prompt
@pytest.mark.parametrize("family", EVERY)
def test_looking_at_one_site_alone_leaves_the_logits_bit_identical(
    family: str, rows: list[list[int]], attn: str
) -> None:
    hf, prompt = EVERY[family].build(attn=attn), batch(rows)
    model = tl.wrap(hf)
    with torch.no_grad():
        plain = plain_logits(hf, prompt)
    for name in inside(family):
        with untouched(hf), model.trace(rows) as t:
            getattr(model.layers[1], name).save("read")
            model.logits.save("logits")
        for actual, wanted in zip(real_rows(t["logits"], prompt), expected_rows(plain, prompt), strict=True):
            assert torch.equal(actual, wanted), name


@every_kernel
@every_prompt
@pytest.mark.parametrize("family", EVERY)
def test_a_pattern_is_a_distribution_over_what_may_be_seen(
    family: str, rows: list[list[int]], attn: str
) -> None:
    hf, prompt = EVERY[family].build(attn=attn), batch(rows)
    model = tl.wrap(hf)
    with model.trace(rows) as t:
        model.layers[:].pattern.save("pattern")
        model.layers[:].z.save("z")
        model.layers[:].v.save("v")
    for part in [t["pattern"]] if isinstance(t["pattern"], Tensor) else t["pattern"]:
        torch.testing.assert_close(part.sum(-1), torch.ones(part.shape[:-1]), rtol=0, atol=1e-5)
        assert part.triu(1).abs().max() == 0  # never ahead
        assert part.min() >= 0
    if rows is not PROMPTS["ragged"]:
        shared = t["pattern"].shape[2] // t["v"].shape[3]
        values = t["v"].transpose(2, 3).repeat_interleave(shared, dim=2)
        close((t["pattern"] @ values).transpose(2, 3), t["z"])
    windows = {"mistral_sliding": slice(None), "gemma3": slice(1, 2)}
    if family in windows and rows is PROMPTS["single"]:
        assert t["pattern"][windows[family]].tril(-4).abs().max() == 0
        assert t["pattern"][windows[family]].tril(-3).abs().max() > 0
    if family == "gemma3" and rows is PROMPTS["single"]:
        assert t["pattern"][[0, 2]].tril(-4).abs().amax((1, 2, 3, 4)).min() > 0
    assert len(prompt.lengths) == len(rows)


@every_family
def test_a_row_of_a_batch_has_the_pattern_that_it_has_alone(family: str) -> None:
    model, rows = tl.wrap(FAMILIES[family].build()), PROMPTS["ragged"]
    with model.trace(rows) as t:
        for name in LOOKS:
            getattr(model.layers[1], name).save(name)
    for number, row in enumerate(rows):
        with model.trace([row]) as alone:
            for name in LOOKS:
                getattr(model.layers[1], name).save(name)
        for name in LOOKS:
            close(t[name][number], alone[name])


@every_family
def test_in_bfloat16_a_pattern_is_as_good_as_that_of_eager_attention(family: str) -> None:
    """Against float32: sdpa's reads may not be off by more than the rounding of the model itself."""
    prompt, rows = batch(PROMPTS["even"]), PROMPTS["even"]
    exact = tl.wrap(FAMILIES[family].build(attn="eager"))
    # Rounding may send a token to other experts, and what comes after that is far from float32.
    layers = slice(1) if family == "qwen3_moe" else slice(None)
    with exact.trace(rows) as t:
        wanted = exact.layers[layers].pattern.save()
    errors: dict[str, float] = {}
    for attn in ("sdpa", "eager"):
        hf = FAMILIES[family].build(attn=attn, dtype=torch.bfloat16)
        model = tl.wrap(hf)
        with torch.no_grad():
            plain = plain_logits(hf, prompt)
        with model.trace(rows) as t:
            model.layers[layers].pattern.save("pattern")
            model.logits.save("logits")
        assert torch.equal(t["logits"], plain)
        assert t["pattern"].dtype is torch.bfloat16
        errors[attn] = (t["pattern"].float() - wanted.value).abs().max().item()
    assert 0 < errors["sdpa"] <= 2 * errors["eager"] < 0.1


def test_only_the_layers_and_sites_that_are_asked_for_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from tracelens.backends import attention

    computed: list[int] = []
    real = attention.scores_of

    def counting(name: str, module: Any, *rest: Any) -> Tensor:
        computed.append(module.layer_idx)
        return real(name, module, *rest)

    monkeypatch.setattr(attention, "scores_of", counting)
    model = tl.wrap(FAMILIES["llama"].build())
    with model.trace(PROMPTS["single"]):
        model.layers[1].pattern.save()
        model.layers[0].q_rot.save()
        model.logits.save()
    assert computed == [1]
    with model.trace(PROMPTS["single"]):
        model.layers[0].q_rot *= 2
        model.logits.save()
    assert computed == [1]
    with model.trace(PROMPTS["single"]):
        model.layers[2].pattern  # nobody needs it
        model.layers[0].scores.save()
    assert computed == [1, 0]


def test_the_pass_is_left_before_the_kernel_that_nobody_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    def counting(module: Any, *args: Any, **kwargs: Any) -> Any:
        runs.append(module.layer_idx)
        return sdpa_attention_forward(module, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", counting)
    model = tl.wrap(FAMILIES["llama"].build())
    with model.trace(PROMPTS["single"]) as t:
        model.layers[1].pattern.save()
    assert runs == [0]
    assert t.plan().plan.layers_run(LAYERS) == 2


# --- writing ---------------------------------------------------------------------------------------------------------


def _at(place: Any, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Batch], Tensor]:
    def edit(tensor: Tensor, prompt: Batch) -> Tensor:
        new = tensor.clone()
        new[place] = change(new[place])
        return new

    return edit


def _at_token(number: int, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Batch], Tensor]:
    def edit(tensor: Tensor, prompt: Batch) -> Tensor:
        new = tensor.clone()
        for row, mask in enumerate(prompt.mask):
            column = mask.nonzero()[number, 0]
            new[row, :, column] = change(new[row, :, column])
        return new

    return edit


EDITS: dict[str, Callable[[Tensor, Batch], Tensor]] = {
    "SITE *= 0.5": lambda t, _: t * 0.5,
    "SITE = SITE * 0.5": lambda t, _: t * 0.5,
    "SITE = 0.25": lambda t, _: torch.full_like(t, 0.25),
    "SITE[:, 1] *= 0.5": _at((slice(None), 1), lambda t: t * 0.5),
    "SITE[:, 1:3] = 0": _at((slice(None), slice(1, 3)), lambda t: t * 0),
    "SITE[:, :, -1] *= 0.25": _at((slice(None), slice(None), -1), lambda t: t * 0.25),
    "SITE[:, :, -1] = 0": _at((slice(None), slice(None), -1), lambda t: t * 0),
    "SITE.tok[2] = 0": _at_token(2, lambda t: t * 0),
    "h = SITE; h[:, 0] = 0": _at((slice(None), 0), lambda t: t * 0),
}  # fmt: skip

# Gemma's norm of what attention returns forgets a factor of a query's whole pattern.
FACTORS = ("SITE *= 0.5", "SITE = SITE * 0.5", "SITE[:, :, -1] *= 0.25")


@every_kernel
@pytest.mark.parametrize("code", EDITS)
@pytest.mark.parametrize("name", LOOKS)
@every_family
def test_scores_and_patterns_are_written(family: str, name: str, code: str, attn: str) -> None:
    hf = FAMILIES[family].build(attn=attn)
    model = tl.wrap(hf)
    for rows in (PROMPTS["even"], PROMPTS["ragged"]):
        prompt = batch(rows)

        def intercept(site: Site, tensor: Tensor, prompt: Batch = prompt) -> Tensor:
            return EDITS[code](tensor, prompt) if site == Site(name, 1) else tensor

        expected = oracle(hf, prompt, intercept)
        if not (family == "gemma3" and name == "pattern" and code in FACTORS):
            matters(expected, hf, prompt)
        with untouched(hf), model.trace(rows) as t:
            exec(code.replace("SITE", f"model.layers[1].{name}"), {"model": model})
            model.logits.save("logits")
        same_logits(t["logits"], expected, prompt)


@every_family
@every_prompt
def test_several_layers_at_once(family: str, rows: list[list[int]]) -> None:
    hf, prompt = FAMILIES[family].build(), batch(rows)
    model = tl.wrap(hf)

    def intercept(site: Site, tensor: Tensor) -> Tensor:
        if site.name == "pattern" and site.layer in (0, 2):
            return tensor * 0.5
        return tensor * 0.25 if site == Site("scores", 2) else tensor

    expected = oracle(hf, prompt, intercept)
    matters(expected, hf, prompt)
    with untouched(hf), model.trace(rows) as t:
        model.layers[[2, 0]].pattern *= 0.5
        model.layers[2].scores *= 0.25
        model.logits.save("logits")
    same_logits(t["logits"], expected, prompt)
    assert "layers 0, 2: the model's attention kernel is replaced" in t.explain()


@every_family
def test_a_pattern_of_ones_own(family: str) -> None:
    """Every query looks at the first token: z is the value that stands there."""
    hf, rows = FAMILIES[family].build(), PROMPTS["even"]
    model, prompt = tl.wrap(hf), batch(rows)
    first = torch.zeros(EVEN[0])
    first[0] = 1.0
    expected = oracle(hf, prompt, lambda site, t: first.expand_as(t) if site == Site("pattern", 1) else t)
    matters(expected, hf, prompt)
    with model.trace(rows) as t:
        model.layers[1].pattern = first
        model.layers[1].v.save("v")
        model.layers[1].z.save("z")
        model.logits.save("logits")
    close(t["logits"], expected)
    shared = t["z"].shape[2] // t["v"].shape[2]
    close(t["z"], t["v"][:, :1].repeat_interleave(shared, dim=2).expand_as(t["z"]))


@every_family
def test_a_frozen_pattern_is_that_of_another_run(family: str) -> None:
    hf = FAMILIES[family].build()
    model, (here, there) = tl.wrap(hf), (PROMPTS["even"][:1], PROMPTS["even"][1:2])
    with model.trace(there):
        patterns = model.layers[:].pattern.save()

    def intercept(site: Site, tensor: Tensor) -> Tensor:
        return patterns.value[site.layer] if site.name == "pattern" else tensor

    expected = oracle(hf, batch(here), intercept)
    matters(expected, hf, batch(here))
    with model.trace(here) as t:
        model.layers[:].pattern = tl.per_layer(patterns)
        model.logits.save("logits")
    close(t["logits"], expected)


@every_family
def test_whatever_is_written_no_row_sees_the_padding_of_its_batch(family: str) -> None:
    hf = FAMILIES[family].build()
    model, rows = tl.wrap(hf), PROMPTS["ragged"]
    for code in ("scores = 0", "scores *= 0", "pattern = 0.125", "pattern = pattern * 0 + 0.125"):
        name, _, rest = code.partition(" ")
        block = f"L.{name} {rest.replace('pattern', 'L.pattern')}"
        with model.trace(rows) as t:
            exec(block, {"L": model.layers[1]})
            model.logits.save("logits")
        for number, row in enumerate(rows):
            with model.trace([row]) as alone:
                exec(block, {"L": model.layers[1]})
                model.logits.save("logits")
            close(t["logits"][number], alone["logits"])


@every_family
def test_values_flow_into_attention_and_out_of_it(family: str) -> None:
    hf, rows = FAMILIES[family].build(), PROMPTS["even"]
    model, prompt = tl.wrap(hf), batch(rows)
    held: dict[Site, Tensor] = {}

    def intercept(site: Site, tensor: Tensor) -> Tensor:
        held[site] = tensor
        if site == Site("z", 1):
            return tensor + held[Site("z", 0)]
        if site == Site("pattern", 2):
            return 0.5 * (tensor + held[Site("pattern", 1)])
        return tensor

    expected = oracle(hf, prompt, intercept)
    matters(expected, hf, prompt)
    with model.trace(rows) as t:
        model.layers[2].pattern = 0.5 * (model.layers[2].pattern + model.layers[1].pattern)
        model.layers[1].z += model.layers[0].z
        model.logits.save("logits")
    close(t["logits"], expected)


def test_branches_do_not_meet_before_the_kernel() -> None:
    model = tl.wrap(FAMILIES["qwen3"].build())
    for code in (
        "L.q_normed += L.q_normed.mean() + L.v.mean()",
        "L.k = L.v",
        "L.v = L.k",
        "L.q_rot *= L.k_rot.sum()",
    ):
        with pytest.raises(CausalityError, match="at the same moment"), model.trace(PROMPTS["even"]):
            exec(code, {"L": model.layers[1]})
    # What is written early is seen late, on one level too.
    with model.trace(PROMPTS["even"]) as t:
        model.layers[1].q = 0.0
        model.layers[1].q_normed.save("q_normed")
        model.layers[1].v.save("v")
        (model.layers[1].v.mean() + model.layers[1].q_normed.mean() + model.layers[1].k.mean()).save(
            "together"
        )
    assert t["q_normed"].abs().max() == 0
    assert t["together"].isfinite()


def test_an_early_stop_waits_for_all_that_is_asked_for() -> None:
    """Qwen3 norms its queries before it makes keys and values."""
    model = tl.wrap(FAMILIES["qwen3"].build())
    names = ("q", "k", "v", "q_normed", "k_normed")
    for one in names:
        for other in names:
            with model.trace(PROMPTS["even"]) as t:
                getattr(model.layers[1], one).save("one")
                getattr(model.layers[1], other).save("other")
            assert t["one"].shape[-1] == t["other"].shape[-1]


# --- other kernels ---------------------------------------------------------------------------------------------------


# Said by torch of transformers' calls.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("family", ["llama", "mistral_sliding"])
def test_flex_attention(family: str) -> None:
    rows = PROMPTS["ragged"]
    hf, prompt = EVERY[family].build(attn="flex_attention"), batch(PROMPTS["ragged"])
    eager = tl.wrap(EVERY[family].build(attn="eager"))
    model = tl.wrap(hf)
    with torch.no_grad():
        plain = plain_logits(hf, prompt)
    with untouched(hf), model.trace(rows) as t:
        model.layers[1].pattern.save("pattern")
        model.layers[1].scores.save("scores")
        model.logits.save("logits")
    with eager.trace(rows) as wanted:
        eager.layers[1].pattern.save("pattern")
        eager.layers[1].scores.save("scores")
    for number, mask in enumerate(prompt.mask):
        assert torch.equal(t["logits"][number][0], plain[number][mask])
        close(t["pattern"][number], wanted["pattern"][number])
        close(t["scores"][number], wanted["scores"][number])
    expected = oracle(hf, prompt, lambda site, x: x * 0.5 if site == Site("pattern", 1) else x)
    with untouched(hf), model.trace(rows) as t:
        model.layers[1].pattern *= 0.5
        model.logits.save("logits")
    same_logits(t["logits"], expected, prompt)


def test_another_implementation_is_refused_for_the_inside_alone() -> None:
    AttentionInterface.register("of_my_own", sdpa_attention_forward)
    hf = FAMILIES["llama"].build()
    hf.set_attn_implementation("of_my_own")
    model = tl.wrap(hf)
    with (
        untouched(hf),
        pytest.raises(AttentionImplementationError, match="'of_my_own'") as failure,
        model.trace(PROMPTS["single"]),
    ):
        model.layers[1].pattern.save()
    assert failure.value.at is not None
    assert failure.value.at.filename == __file__
    with untouched(hf), model.trace(PROMPTS["single"]):
        z = model.layers[1].head(2).z.save()
    assert z.value.abs().max() > 0
    # The implementation is looked at in each run.
    hf.set_attn_implementation("eager")
    with untouched(hf), model.trace(PROMPTS["single"]):
        pattern = model.layers[1].pattern.save()
    torch.testing.assert_close(pattern.value.sum(-1), torch.ones(1, 4, 9))


def test_attention_that_a_block_computes_in_a_way_of_its_own_has_no_scores() -> None:
    model = tl.wrap(FAMILIES["gpt2"].build(reorder_and_upcast_attn=True))
    for name in LOOKS:
        with pytest.raises(AbsentSiteError, match="reorder_and_upcast_attn"), model.trace(PROMPTS["single"]):
            getattr(model.layers[1], name).save()
    assert "pattern" not in dir(model.layers[1])
    with model.trace(PROMPTS["single"]):
        z = model.layers[1].z.save()
    assert z.value.shape == (1, 9, 4, 12)


# --- generation ------------------------------------------------------------------------------------------------------

IDS = [3, 14, 15, 9, 2, 6]
BATCH = batch([IDS])
STEPS = 8
SHIFT = 2.0 * torch.randn(12, generator=torch.Generator().manual_seed(7))
IN_EVERY_STEP: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "q": ("L.q *= -1.5", lambda t: t * -1.5),
    "k": ("L.k = shift", SHIFT.expand_as),
    "v": ("L.v += shift", lambda t: t + SHIFT),
    "z": ("L.head([1, 2]).z = shift", lambda t: _at((..., [1, 2], slice(None)), SHIFT.expand_as)(t, BATCH)),
    # Not the places that the mask excludes, which would become the brightest.
    "scores": (
        "L.scores = tl.where(L.scores < -1e30, L.scores, -L.scores)",
        lambda t: torch.where(t < -1e30, t, -t),
    ),
    "pattern": ("L.pattern = 1 - L.pattern", lambda t: 1 - t),
    "q_rot": ("L.q_rot *= -1.5", lambda t: t * -1.5),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_EVERY_STEP)
@every_family
def test_writes_hold_in_every_step_of_a_generation(family: str, name: str) -> None:
    if family == "gpt2" and name == "q_rot":
        return
    code, edit = IN_EVERY_STEP[name]
    # Where keys are counted, none may be forgotten; everything else is the same with a window that cuts.
    wide = {"sliding_window": 64} if family == "gemma3" and name in LOOKS else {}
    eager, sdpa = FAMILIES[family].build(attn="eager", **wide), FAMILIES[family].build(**wide)
    ids = torch.tensor([IDS])
    options = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        plain = eager.generate(ids, **options)[0, len(IDS) :].tolist()
        with edited(eager, Site(name, 1), edit):
            wanted = eager.generate(ids, **options)[0, len(IDS) :].tolist()
    assert wanted != plain
    for hf in (eager, sdpa):
        model = tl.wrap(hf)
        with untouched(hf), model.generate(IDS, max_new_tokens=STEPS) as t:
            exec(code, {"L": model.layers[1], "shift": SHIFT, "tl": tl})
        assert t.tokens == wanted


@every_family
def test_in_a_generation_no_row_sees_the_padding_of_its_batch(family: str) -> None:
    model = tl.wrap(FAMILIES[family].build())
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12]]
    found: list[Any] = []
    for prompt in (prompts, *prompts):
        with model.generate(prompt, max_new_tokens=6) as t:
            model.layers[1].scores = 0.0
            model.layers[2].pattern *= 0.5
        found.append(t.tokens)
    assert found[0] == found[1:]
    with model.generate(prompts, max_new_tokens=6) as t:
        pass
    assert t.tokens != found[0]


def test_an_applied_function_sees_no_padding_among_the_keys() -> None:
    model, prompts = tl.wrap(FAMILIES["llama"].build()), [[5, 6, 7, 8, 9, 10], [11, 12]]
    seen: list[tuple[int, ...]] = []

    def flat(pattern: Tensor) -> Tensor:
        seen.append(tuple(pattern.shape[2:]))
        return torch.full_like(pattern, 1 / pattern.shape[-1])

    found: list[Any] = []
    for prompt in (prompts, *prompts):
        with model.generate(prompt, max_new_tokens=3) as t:
            model.layers[1].pattern = tl.apply(flat, model.layers[1].pattern)
        found.append(t.tokens)
    assert found[0] == found[1:]
    assert seen[:6] == [(6, 6), (2, 2), (1, 7), (1, 3), (1, 8), (1, 4)]


def test_rotated_keys_are_refused_in_generations() -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    with pytest.raises(WriteTargetError, match="cache") as failure, model.generate(IDS, max_new_tokens=2):
        model.layers[1].k_rot *= 2
    assert failure.value.at is not None
    with pytest.raises(WriteTargetError, match="cache"), model.generate(IDS, max_new_tokens=2):
        model.layers[1].z += model.layers[1].k_rot[..., :1, :1]


@pytest.mark.parametrize("family", ["mistral_sliding", "qwen2_sliding", "gemma3"])
@pytest.mark.parametrize("site", ["pattern", "scores"])
def test_layers_whose_cache_forgets_are_refused_before_the_run_where_keys_are_counted(family, site) -> None:
    hf = EVERY[family].build()
    assert hf.config.sliding_window == 4
    model = tl.wrap(hf)
    ids, calls = [5, 6, 7], []
    counted = hf.register_forward_hook(lambda *_: calls.append(1))

    def halved(layer: int, **options: Any) -> Any:
        with untouched(hf), model.generate(ids, eos_token_id=None, **options) as t:
            setattr(model.layers[layer], site, getattr(model.layers[layer], site) * 0.5)
        return t.tokens

    for new in (3, 9):
        with pytest.raises(SiteMismatchError, match="sliding window of 4") as failure:
            halved(1, max_new_tokens=new)
        assert failure.value.at is not None
        assert failure.value.at.filename == __file__
        assert "max_new_tokens=2" in str(failure.value.instead)
        assert not calls
    assert len(halved(1, max_new_tokens=2)) == 2  # all that goes in are four tokens
    if family == "qwen2_sliding":
        assert len(halved(0, max_new_tokens=9)) == 9  # layer 0 looks back over everything
    # Every step over the whole text: the same as tracing each of them.
    tokens = halved(1, max_new_tokens=5, use_cache=False)
    for end, token in enumerate(tokens):
        with model.trace([*ids, *tokens[:end]]):
            setattr(model.layers[1], site, getattr(model.layers[1], site) * 0.5)
            best = model.logits[0, -1].argmax(-1).save()
        assert best.value.item() == token
    counted.remove()


def test_layers_whose_cache_forgets_take_what_counts_no_keys() -> None:
    hf = EVERY["mistral_sliding"].build()
    model = tl.wrap(hf)
    # Every head of the layer looks nowhere.
    with untouched(hf), model.generate(IDS, max_new_tokens=4) as t:
        model.layers[1].pattern = 0.0
    with model.generate(IDS, max_new_tokens=4) as zero:
        model.layers[1].z = 0.0
    assert t.tokens == zero.tokens


# --- the model as it was ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["pattern", "z", "resid_post"])
def test_the_implementation_is_put_back_whatever_happens(error: BaseException, place: str) -> None:
    hf = FAMILIES["llama"].build()
    model = tl.wrap(hf)

    def failing(x: Tensor) -> Tensor:
        assert hf.config._attn_implementation == NAME
        raise error

    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OpFailedError
    with untouched(hf), pytest.raises(expected), model.trace(PROMPTS["single"]):  # noqa: PT012
        model.layers[0].pattern.save()
        setattr(model.layers[1], place, tl.apply(failing, getattr(model.layers[1], place)))
        model.logits.save()
    assert hf.config._attn_implementation == "sdpa"
    with untouched(hf), model.trace(PROMPTS["single"]):
        model.layers[1].pattern.save()


def test_runs_that_do_not_look_inside_switch_nothing() -> None:
    hf = FAMILIES["llama"].build()
    model = tl.wrap(hf)
    seen: list[str] = []

    def look(x: Tensor) -> Tensor:
        seen.append(hf.config._attn_implementation)
        return x

    with model.trace(PROMPTS["single"]):
        tl.apply(look, model.layers[1].head(1).z)
        model.layers[0].q *= 2
        model.logits.save()
    assert seen == ["sdpa"]


def test_models_that_share_a_configuration_do_not_disturb_each_other() -> None:
    """One is looked at while the other runs, in a thread of its own and without tracelens."""
    one, other = FAMILIES["llama"].build(), FAMILIES["llama"].build(seed=1)
    other.config = one.config
    for module in other.modules():
        if hasattr(module, "config"):
            module.config = one.config
    prompt, rows = batch(PROMPTS["ragged"]), PROMPTS["ragged"]
    with torch.no_grad():
        wanted = plain_logits(other, prompt)
    models = [tl.wrap(one), tl.wrap(other)]
    found: list[Tensor] = []
    patterns: list[Any] = []

    def beside(x: Tensor) -> Tensor:
        def run() -> None:
            with torch.no_grad():
                found.append(plain_logits(other, prompt))
            with models[1].trace(rows):
                saved = models[1].layers[1].pattern.save()
            patterns.append(saved.value)
            assert one.config._attn_implementation == NAME  # the outer run still needs it

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return x

    with untouched(one), models[0].trace(rows):
        models[0].layers[1].pattern = tl.apply(beside, models[0].layers[1].pattern)
        models[0].logits.save()
    assert torch.equal(found[0][prompt.mask], wanted[prompt.mask])
    with models[1].trace(rows):
        alone = models[1].layers[1].pattern.save()
    assert all(map(torch.equal, patterns[0], alone.value))
    assert one.config._attn_implementation == "sdpa"


def test_another_thread_on_the_same_model_is_not_looked_at() -> None:
    hf = FAMILIES["llama"].build()
    model, prompt = tl.wrap(hf), batch(PROMPTS["ragged"])
    with torch.no_grad():
        wanted = plain_logits(hf, prompt)
    found: list[Tensor] = []

    def beside(x: Tensor) -> Tensor:
        def run() -> None:
            with torch.no_grad():
                found.append(plain_logits(hf, prompt))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return x

    with untouched(hf), model.trace(PROMPTS["ragged"]):
        model.layers[2].pattern *= 0.0
        model.layers[1].pattern = tl.apply(beside, model.layers[1].pattern)
        model.logits.save()
    assert torch.equal(found[0][prompt.mask], wanted[prompt.mask])


def test_nothing_is_registered_before_it_is_needed() -> None:
    import subprocess
    import sys

    code = (
        "import tracelens, sys\n"
        "from transformers.modeling_utils import AttentionInterface\n"
        f"sys.exit({NAME!r} in AttentionInterface._global_mapping)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
