"""What other libraries get wrong on models that ranks share, by name: each against the forward pass written by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import tracelens as tl
from tests.parallel.compared import TOLERANCE, gradients_alike
from tests.support.batches import EVEN, batch, random_rows
from tests.support.families import HEAD_DIM, HEADS, KV_HEADS, NEURONS, VOCABULARY
from tests.support.hand_forward import Intercept, hand_forward, unchanged
from tests.support.ranks import PoolOf
from tests.support.spread_models import Both, both, relative_error, stored
from tracelens.errors import PipelineError
from tracelens.ir.layout import Partial
from tracelens.ir.sites import Site

ROWS = random_rows(EVEN)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, ranks_of: PoolOf) -> Iterator[Both]:
    """Every layer on two ranks; with biases."""
    found = both("qwen2", tmp_path_factory.mktemp("shared"), ranks_of, tp=2)
    yield found
    found.close()


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory, ranks_of: PoolOf) -> Iterator[Both]:
    """The first layer on one rank, the other two on another."""
    found = both("qwen2", tmp_path_factory.mktemp("staged"), ranks_of, pp=2)
    yield found
    found.close()


def by_hand(models: Both, intercept: Intercept = unchanged) -> Tensor:
    with torch.no_grad():
        return hand_forward(models.hf, *batch(ROWS), intercept)


def seen_by_hand(models: Both) -> dict[Site, Tensor]:
    seen: dict[Site, Tensor] = {}
    by_hand(models, lambda site, tensor: seen.setdefault(site, tensor))
    return seen


def same(actual: Tensor, expected: Tensor) -> None:
    assert relative_error(actual, expected) <= TOLERANCE


def differ(one: Tensor, other: Tensor) -> None:
    assert relative_error(one, other) > 1000 * TOLERANCE


def edit(where: Site, change) -> Intercept:
    return lambda site, tensor: change(tensor.clone()) if site == where else tensor


def zeroed(index: tuple[object, ...]):
    def change(tensor: Tensor) -> Tensor:
        tensor[index] = 0
        return tensor

    return change


@pytest.mark.parametrize(
    ("first", "end"), [(0, 30), (0, 70), (35, 45), (40, NEURONS), (79, NEURONS), (3, 77)]
)
def test_neurons_are_ablated_by_their_own_numbers(shared: Both, first: int, end: int) -> None:
    """One rank has the first 40: a slice of what a rank has would hit other neurons, or twice as many."""
    site = Site("mlp_act", 1)
    expected = by_hand(shared, edit(site, zeroed((..., slice(first, end)))))
    differ(expected, by_hand(shared))
    if end - first < 77:
        differ(expected, by_hand(shared, edit(site, zeroed((...,)))))  # what ablating on each rank would be
    with shared.spread.trace(ROWS):
        shared.spread.layers[1].mlp_act[..., first:end] = 0
        logits = shared.spread.logits.save()
    same(logits.value, expected)


def test_neurons_are_ablated_by_a_list_of_numbers(shared: Both) -> None:
    chosen = [78, 3, 41, 39]
    expected = by_hand(shared, edit(Site("mlp_act", 1), zeroed((..., chosen))))
    differ(expected, by_hand(shared))
    with shared.spread.trace(ROWS):
        act = shared.spread.layers[1].mlp_act
        before = act[..., torch.tensor(chosen)].save()
        act[..., torch.tensor(chosen)] = 0
        logits = shared.spread.logits.save()
    same(logits.value, expected)
    same(before.value, seen_by_hand(shared)[Site("mlp_act", 1)][..., chosen])


@pytest.mark.parametrize("head", range(HEADS))
def test_a_head_is_ablated_by_whoever_has_it(shared: Both, head: int) -> None:
    expected = by_hand(shared, edit(Site("z", 1), zeroed((slice(None), slice(None), head))))
    differ(expected, by_hand(shared))
    with shared.spread.trace(ROWS):
        was = shared.spread.layers[1].head(head).z.save()
        shared.spread.layers[1].head(head).z = 0
        logits = shared.spread.logits.save()
    same(logits.value, expected)
    same(was.value, seen_by_hand(shared)[Site("z", 1)][:, :, head])


def test_what_each_head_adds_to_the_stream(shared: Both) -> None:
    """Computed where the head is, with its columns of the output projection."""
    z = seen_by_hand(shared)[Site("z", 1)]
    matrix = shared.hf.get_parameter("model.layers.1.self_attn.o_proj.weight").detach()
    expected = torch.einsum("bphd,ohd->bpho", z, matrix.view(-1, HEADS, HEAD_DIM))
    with shared.spread.trace(ROWS):
        every = shared.spread.layers[1].head_out.save()
        one = shared.spread.layers[1].head(2).head_out.save()
    same(every.value, expected)
    same(one.value, expected[:, :, 2])


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_projections_come_whole_and_in_natural_order(shared: Both, name: str) -> None:
    """As the matrix and the bias of the one process make them, heads one after the other."""
    heads = HEADS if name == "q" else KV_HEADS
    projection = shared.hf.get_submodule(f"model.layers.1.self_attn.{name}_proj")
    with torch.no_grad():
        expected = projection(seen_by_hand(shared)[Site("attn_in", 1)]).view(len(ROWS), -1, heads, HEAD_DIM)
    with shared.spread.trace(ROWS):
        whole = getattr(shared.spread.layers[1], name).save()
        last = getattr(shared.spread.layers[1], name)[:, :, -1].save()
        turned = getattr(shared.spread.layers[1], name).flatten(2).save()
    same(whole.value, expected)
    same(last.value, expected[:, :, -1])
    same(turned.value, expected.flatten(2))


@pytest.mark.parametrize("token", [0, 48, 49, VOCABULARY - 1])
def test_a_row_of_the_unembedding_steers(shared: Both, token: int) -> None:
    """97 rows on two ranks: 49 and 48."""
    row = shared.hf.get_parameter("lm_head.weight").detach()[token]
    expected = by_hand(shared, edit(Site("resid_post", 1), lambda tensor: tensor + 4 * row))
    differ(expected, by_hand(shared))
    with shared.spread.trace(ROWS):
        read = shared.spread.unembed[token].save()
        shared.spread.layers[1].resid_post += 4 * shared.spread.unembed[token]
        logits = shared.spread.logits.save()
    assert torch.equal(read.value, row)
    same(logits.value, expected)


@pytest.mark.parametrize(
    "path",
    [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.bias",
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
    ],
)
def test_the_norm_of_a_parameter_is_that_of_all_of_it(shared: Both, staged: Both, path: str) -> None:
    """Of the part that one rank has it would be about 0.7 of this, without any error."""
    expected = shared.hf.get_parameter(path).detach()
    for models in (shared, staged):
        with models.spread.trace(ROWS):
            norm = models.spread.param(path).norm().save()
            whole = models.spread.param(path).save()
        same(norm.value, expected.norm())
        assert torch.equal(whole.value, expected)


@pytest.mark.parametrize("name", ["attn_out", "attn_add", "mlp_out", "mlp_add", "resid_mid", "resid_post"])
def test_what_ranks_add_up_is_steered_once(shared: Both, name: str) -> None:
    """Added on each rank before their results are summed, the vector would count twice."""
    vector = torch.randn(48, generator=torch.Generator().manual_seed(1))
    expected = by_hand(shared, edit(Site(name, 1), lambda tensor: tensor + vector))
    differ(expected, by_hand(shared))
    differ(expected, by_hand(shared, edit(Site(name, 1), lambda tensor: tensor + 2 * vector)))
    with shared.spread.trace(ROWS):
        setattr(shared.spread.layers[1], name, getattr(shared.spread.layers[1], name) + vector)
        logits = shared.spread.logits.save()
    same(logits.value, expected)


@pytest.fixture(scope="module")
def summed(tmp_path_factory: pytest.TempPathFactory, ranks_of: PoolOf) -> Iterator[Both]:
    """A model that its user spread: the last matrices of attention and MLPs return what is yet to be added up."""
    folder = tmp_path_factory.mktemp("summed")
    hf = stored("qwen2", folder)
    plan = "tests.support.users_plans:partial_sums"
    found = Both(tl.load(folder, tp=2, ranks=ranks_of(2), parallelize=plan), tl.wrap(hf), hf)
    yield found
    found.close()


@pytest.mark.parametrize("name", ["attn_out", "mlp_out"])
def test_partial_sum_steering(summed: Both, name: str) -> None:
    """The tensor there is a rank's part of a sum: what each rank adds to its own would count twice."""
    vector = torch.randn(48, generator=torch.Generator().manual_seed(1))
    site = Site(name, 1)
    expected = by_hand(summed, edit(site, lambda tensor: tensor + vector))
    differ(expected, by_hand(summed))
    differ(expected, by_hand(summed, edit(site, lambda tensor: tensor + 2 * vector)))
    with summed.spread.trace(ROWS) as t:
        setattr(summed.spread.layers[1], name, getattr(summed.spread.layers[1], name) + vector)
        after = getattr(summed.spread.layers[1], name).save()
        logits = summed.spread.logits.save()
    assert t.plan().plan.placement.layout_of(site) == Partial()
    same(logits.value, expected)
    same(after.value, seen_by_hand(summed)[site] + vector)


def test_a_stage_is_patched_with_what_another_has_computed(staged: Both) -> None:
    held: dict[Site, Tensor] = {}

    def intercept(site: Site, tensor: Tensor) -> Tensor:
        held[site] = tensor
        if site == Site("resid_post", 2):
            return tensor + held[Site("resid_post", 0)]
        if site == Site("mlp_act", 1):
            return tensor - held[Site("mlp_act", 0)]
        return tensor

    expected = by_hand(staged, intercept)
    differ(expected, by_hand(staged))
    with staged.spread.trace(ROWS):
        staged.spread.layers[2].resid_post += staged.spread.layers[0].resid_post
        staged.spread.layers[1].mlp_act -= staged.spread.layers[0].mlp_act
        logits = staged.spread.logits.save()
    same(logits.value, expected)


def test_a_prompt_is_patched_with_a_saved_value_of_another(staged: Both, shared: Both) -> None:
    others = random_rows(EVEN, seed=1)
    for models in (staged, shared):
        results = []
        for model in (models.one, models.spread):
            with model.trace(others):
                donor = model.layers[1].z.save()
            with model.trace(ROWS):
                model.layers[1].z[:, 2:] = donor[:, 2:]
                logits = model.logits.save()
            results.append(logits.value)
        differ(results[0], by_hand(models))
        same(results[1], results[0])


def test_layers_of_other_stages_are_read_and_written_where_they_are(staged: Both) -> None:
    """Stages have placeholders for the layers of others, which hand on what they get: nothing is bound to them."""
    seen = seen_by_hand(staged)
    with staged.spread.trace(ROWS):
        every = [staged.spread.layers[layer].resid_post.save() for layer in range(3)]
        inside = [staged.spread.layers[layer].mlp_out.save() for layer in range(3)]
        embed = staged.spread.embed.save()
    for layer in range(3):
        same(every[layer].value, seen[Site("resid_post", layer)])
        same(inside[layer].value, seen[Site("mlp_out", layer)])
    same(embed.value, seen[Site("embed")])

    def once(site: Site, tensor: Tensor) -> Tensor:
        return tensor + 1 if site.name == "resid_post" else tensor

    with staged.spread.trace(ROWS):
        staged.spread.layers[0:3].resid_post += 1.0
        logits = staged.spread.logits.save()
    differ(by_hand(staged, once), by_hand(staged))
    same(logits.value, by_hand(staged, once))


def test_modules_of_other_stages(staged: Both) -> None:
    """By their paths, which in every stage but one lead to a placeholder."""
    seen = seen_by_hand(staged)
    with staged.spread.trace(ROWS):
        found = [staged.spread.module(f"model.layers.{layer}.mlp").output.save() for layer in range(3)]
    for layer, saved in enumerate(found):
        same(saved.value, seen[Site("mlp_out", layer)])


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize(
    "path",
    [
        "model.embed_tokens",
        "model.layers.1",
        "model.layers.1.mlp",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.act_fn",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.o_proj",
        "model.norm",
        "lm_head",
    ],
)
def test_a_module_that_ranks_share_shows_all_of_its_sides(shared: Both, path: str, side: str) -> None:
    """Never one rank's part for the whole."""
    with shared.one.trace(ROWS):
        expected = getattr(shared.one.module(path), side).save()
    with shared.spread.trace(ROWS):
        found = getattr(shared.spread.module(path), side).save()
    if expected.value.is_floating_point():
        same(found.value, expected.value)
    else:
        assert torch.equal(found.value, expected.value)


def test_gradients_are_those_of_the_whole_model(shared: Both, staged: Both) -> None:
    gradients_alike(shared, ("z", "mlp_act", "resid_post", "q"))
    with pytest.raises(PipelineError), staged.spread.trace(ROWS):
        tl.grad(staged.spread.logits.sum(), staged.spread.layers[0].resid_post).save()


def test_what_every_stage_runs_is_that_of_the_last(staged: Both) -> None:
    """The modules around all layers: each stage runs them for its own, and only the last has what they return."""
    found: list[dict[str, Tensor]] = []
    for model in (staged.one, staged.spread):
        ends = {"model": "last_hidden_state", "": "logits"}
        with model.trace(ROWS):
            read = {path: model.module(path).output[key].save() for path, key in ends.items()}
        with model.trace(ROWS):
            model.module("model").output["last_hidden_state"] *= -1
            written = model.logits.save()
        found.append({**{path: handle.value for path, handle in read.items()}, "written": written.value})
    one, spread = found
    differ(one["written"], one[""])
    for name, expected in one.items():
        same(spread[name], expected)


def test_what_each_stage_has_for_itself_is_read_and_not_written(staged: Both) -> None:
    path = "model.rotary_emb"
    for part in (0, 1):
        values: list[Tensor] = []
        for model in (staged.one, staged.spread):
            with model.trace(ROWS):
                value = model.module(path).output[part].save()
            values.append(value.value)
        same(values[1], values[0])
    with staged.spread.record() as r:
        staged.spread.module(path).output[0] *= -1
        staged.spread.logits.save()
    with pytest.raises(PipelineError, match="would change that of one stage"):
        staged.spread.compile(r)
