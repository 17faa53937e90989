"""Models that users spread over ranks with ``parallelize_module``: every site read and written as in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tracelens as tl
from tests.parallel.compared import ROWS, TOLERANCE, all_read, gradients_alike, read_alike, written_alike
from tests.parallel.writes import EDITS
from tests.support.batches import EVEN, RAGGED, random_rows
from tests.support.hand_forward import hand_sites
from tests.support.ranks import PoolOf
from tests.support.spread_models import Both, relative_error, stored
from tracelens.errors import LayoutError, OptionError, RankFailedError, SiteMismatchError
from tracelens.ir.layout import Joined, Partial, Replicate, Shard
from tracelens.ir.ops import Redistribute
from tracelens.ir.sites import Effect, Site

PLANS = "tests.support.users_plans"


def loaded(family: str, plan: str, folder: Path, ranks_of: PoolOf) -> Both:
    hf = stored(family, folder)
    spread = tl.load(folder, tp=2, ranks=ranks_of(2), parallelize=f"{PLANS}:{plan}")
    return Both(spread, tl.wrap(hf), hf)


@pytest.fixture(scope="module", params=["tutorial", "logits_apart", "partial_sums", "sequence"])
def plan(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def models(plan: str, tmp_path_factory: pytest.TempPathFactory, ranks_of: PoolOf) -> Iterator[Both]:
    found = loaded("llama", plan, tmp_path_factory.mktemp("model"), ranks_of)
    yield found
    found.close()


def sites_of(models: Both) -> list[Site]:
    return hand_sites(models.hf)[1:]  # the first is an input: the mask


@pytest.mark.parametrize("lengths", [EVEN, RAGGED, [1, 1], [2, 5]], ids=str)
def test_every_site_is_read(models: Both, lengths: list[int]) -> None:
    read_alike(models, sites_of(models), random_rows(lengths))


@pytest.mark.parametrize("plan", ["partial_sums", "sequence"], indirect=True, scope="module")
def test_every_site_takes_every_edit(models: Both) -> None:
    sites = [
        site
        for site in sites_of(models)
        if site.layer in (None, 1) and site.kind.effect is not Effect.NONE and site.kind.dtype is None
    ]
    written_alike(models, [(site, edit) for site in sites for edit in EDITS.values()])


# --- sums ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory, ranks_of: PoolOf) -> Iterator[Both]:
    """What the last matrices of attention and of the MLPs return is added up only by the modules around them."""
    found = loaded("qwen2", "partial_sums", tmp_path_factory.mktemp("sums"), ranks_of)
    yield found
    found.close()


SUMMED = Partial(Joined.SUM)
V = torch.randn(48, generator=torch.Generator().manual_seed(1))
ON_SUMS = {
    # Each edit of a site that ranks add up, and what changes place for it: source and target of every redistribution.
    "a vector": ("layer.mlp_out += v", [(Replicate(), SUMMED)]),
    "a vector, from the left": ("layer.mlp_out = v + layer.mlp_out", [(Replicate(), SUMMED)]),
    "a vector, taken away": ("layer.mlp_out -= v", [(Replicate(), SUMMED)]),
    "from a vector": ("layer.mlp_out = v - layer.mlp_out", [(Replicate(), SUMMED)]),
    "scaled": ("layer.mlp_out *= 3.0", []),
    "halved and turned": ("layer.mlp_out = -(layer.mlp_out / 2)", []),
    "scaled, and a vector": ("layer.mlp_out = 3.0 * (layer.mlp_out - v)", [(Replicate(), SUMMED)]),
    "twice itself": ("layer.mlp_out = layer.mlp_out + layer.mlp_out", []),
    "another sum": ("layer.mlp_out += layer.attn_out", []),
    "a number": ("layer.mlp_out = 0.25", []),
    "nothing": ("layer.mlp_out = 0", []),
    "another value": ("layer.mlp_out = v", [(Replicate(), SUMMED)]),
    "a number, added": ("layer.mlp_out += 0.25", [(SUMMED, Replicate()), (Replicate(), SUMMED)]),
    "by a vector": ("layer.mlp_out *= v", [(SUMMED, Replicate()), (Replicate(), SUMMED)]),
    "by itself": (
        "layer.mlp_out = layer.mlp_out * layer.mlp_out",
        [(SUMMED, Replicate()), (Replicate(), SUMMED)],
    ),
    "cut off": ("layer.mlp_out = layer.mlp_out.relu()", [(SUMMED, Replicate()), (Replicate(), SUMMED)]),
    "some positions": ("layer.mlp_out[:, -2:] = v", [(SUMMED, Replicate()), (Replicate(), SUMMED)]),
    "what is whole": ("layer.mlp_out += layer.mlp_in", [(Replicate(), SUMMED)]),
}


@pytest.mark.parametrize("edit", ON_SUMS)
def test_what_is_written_to_a_sum_is_written_once(sums: Both, edit: str) -> None:
    """Added on each rank before they are summed, the vector would count twice."""
    text, planned = ON_SUMS[edit]
    found: list[Tensor] = []
    for model in (sums.one, sums.spread):
        with model.trace(ROWS) as t:
            exec(text, {"layer": model.layers[1], "v": V})
            logits = model.logits.save()
        found.append(logits.value)
    with sums.one.trace(ROWS):
        clean = sums.one.logits.save()
    assert relative_error(found[0], clean.value) > 1000 * TOLERANCE
    assert relative_error(found[1], found[0]) <= TOLERANCE
    moved = [(op.source, op.target) for op in t.plan().plan.graph.ops if isinstance(op, Redistribute)]
    assert moved == planned


def test_a_sum_is_divided_by_zero_as_a_whole(sums: Both) -> None:
    """Parts of both signs would make infinities of both signs, whose sum is no number."""
    found: list[Tensor] = []
    for model in (sums.one, sums.spread):
        with model.trace(ROWS):
            model.layers[1].mlp_out = model.layers[1].mlp_out / 0
            signs = model.layers[1].mlp_add.sign().save()
        found.append(signs.value)
    assert torch.equal(found[1], found[0])
    assert found[0].abs().min() == 1


def test_a_sum_is_read_whole_and_the_plan_says_so(sums: Both) -> None:
    with sums.spread.trace(ROWS) as t:
        read_once = sums.spread.layers[1].mlp_out.save()
        sums.spread.layers[1].mlp_out.norm().save()
        sums.spread.layers[2].mlp_out += V
        sums.spread.logits.save()
    with sums.one.trace(ROWS):
        expected = sums.one.layers[1].mlp_out.save()
    assert relative_error(read_once.value, expected.value) <= TOLERANCE
    lines = t.explain().splitlines()
    assert "  mlp_out of layers 1 to 2 lies in partial results (sum) on 2 ranks" in lines
    (summed,) = [line for line in lines if line.startswith("  sums %")]
    assert "over 2 ranks after layers.1.mlp_out" in summed


def test_no_gradient_is_taken_through_a_sum(sums: Both) -> None:
    with (
        pytest.raises(LayoutError, match=r"mlp_out lies in parts that ranks add up") as caught,
        sums.spread.trace(ROWS),
    ):
        tl.grad(sums.spread.logits.sum(), sums.spread.layers[1].mlp_out).save()
    assert caught.value.at is not None
    assert caught.value.at.filename == __file__


# --- what a plan may do beside ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["sequence"], indirect=True)
def test_positions_that_ranks_share_are_put_together_and_the_plan_says_so(models: Both) -> None:
    found: list[Tensor] = []
    for model in (models.one, models.spread):
        with model.trace(random_rows(RAGGED)) as t:
            model.layers[1].resid_post.tok[-2:] += V
            logits = model.logits[:, -1].save()
        found.append(logits.value)
    assert relative_error(found[1], found[0]) <= TOLERANCE
    moved = [(op.source, op.target) for op in t.plan().plan.graph.ops if isinstance(op, Redistribute)]
    assert moved == [(Shard(1), Replicate()), (Replicate(), Shard(1))]
    lines = t.explain().splitlines()
    assert "  resid_post of layer 1 lies in parts of axis 1 on 2 ranks" in lines
    (gathered,) = [line for line in lines if line.startswith("  gathers %")]
    # 3 rows of 9 positions: 5 at most on a rank, of 48 numbers of 4 bytes, each way.
    assert f"{2 * 3 * 5 * 48 * 4 / 1024:.1f} KiB between ranks" in gathered


def test_gradients_are_those_of_one_process(models: Both, plan: str) -> None:
    gradients_alike(models, ("z", "mlp_act", "resid_post", "q", "attn_norm"))


def test_text_is_generated_as_in_one_process(models: Both, plan: str) -> None:
    texts: list[list[int]] = []
    for model in (models.one, models.spread) if plan != "logits_apart" else (models.one,):
        with model.generate([[5, 6, 7]], max_new_tokens=6, eos_token_id=None) as steered:
            model.layers[1].resid_post += 3 * V
        texts.append(steered.tokens)
    with models.one.generate([[5, 6, 7]], max_new_tokens=6, eos_token_id=None) as clean:
        models.one.layers[1].resid_post += 0.0
    assert clean.tokens != texts[0]
    if plan != "logits_apart":
        assert texts[1] == texts[0]
        return
    with (
        pytest.raises(LayoutError, match="each of which would choose") as caught,
        models.spread.generate([[5, 6, 7]], max_new_tokens=2),
    ):
        models.spread.layers[1].resid_post += V
    assert caught.value.at is not None
    assert caught.value.at.filename == __file__


MODULES = (
    "model.layers.1",
    "model.layers.1.self_attn",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.o_proj",
    "model.layers.1.mlp",
    "model.layers.1.mlp.act_fn",
    "model.layers.1.mlp.down_proj",
    "model.norm",
    "lm_head",
)


@pytest.mark.parametrize("side", ["input", "output"])
def test_modules_show_what_they_do_in_one_process(models: Both, side: str) -> None:
    paths = [path for path in MODULES if side == "output" or not path.endswith("self_attn")]
    found: list[list[Tensor]] = []
    for model in (models.one, models.spread):
        with model.trace(ROWS):
            values = []
            for path in paths:
                value = getattr(model.module(path), side)
                values.append((value[0] if path.endswith("self_attn") else value).save())
        found.append([value.value for value in values])
    for path, actual, expected in zip(paths, found[1], found[0], strict=True):
        assert relative_error(actual, expected) <= TOLERANCE, path


def test_parameters_are_whole(models: Both) -> None:
    for path in (
        "lm_head.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.input_layernorm.weight",
    ):
        with models.spread.trace(ROWS):
            norm, whole = models.spread.param(path).norm().save(), models.spread.param(path).save()
        expected = models.hf.get_parameter(path).detach()
        assert torch.equal(whole.value, expected)
        assert relative_error(norm.value, expected.norm()) <= TOLERANCE
    with models.spread.trace(ROWS):
        row = models.spread.unembed[90].save()
    assert torch.equal(row.value, models.hf.get_parameter("lm_head.weight")[90].detach())


def test_the_report_of_a_users_plan(models: Both) -> None:
    report = models.spread.check_parallel(ROWS)
    assert report.ok
    assert all(row.refused is None for row in report)


def _replaced(model: tl.Model, path: str) -> None:
    model.module(path).replace(0.0)
    model.logits.save()


def test_only_modules_without_hooks_are_left_out(models: Both, plan: str) -> None:
    found: list[Tensor] = []
    for model in (models.one, models.spread):
        with model.trace(ROWS):
            model.module("model.layers.1.mlp.act_fn").replace(model.layers[0].mlp_act)
            logits = model.logits.save()
        found.append(logits.value)
    assert relative_error(found[1], found[0]) <= TOLERANCE
    if plan == "sequence":
        with pytest.raises(LayoutError, match="it returns DTensors"), models.spread.trace(ROWS):
            _replaced(models.spread, "model.layers.1")
    with (
        pytest.raises(LayoutError, match="cannot be left out: hooks on it") as caught,
        models.spread.trace(ROWS),
    ):
        _replaced(models.spread, "model.layers.1.mlp.down_proj")
    assert caught.value.at is not None
    assert caught.value.at.filename == __file__


def test_a_layer_may_lie_otherwise_than_others(tmp_path: Path, ranks_of: PoolOf) -> None:
    models = loaded("qwen3", "some_layers", tmp_path, ranks_of)
    placement = models.spread.anatomy.elsewhere
    assert placement is not None
    lying = {layer: placement.layout_of(Site("mlp_act", layer)) for layer in range(3)}
    assert lying == {0: Replicate(), 1: Shard(2), 2: Replicate()}
    sites = sites_of(models)
    for rows in (ROWS, random_rows(RAGGED)):
        read_alike(models, sites, rows)
    chosen = [
        site
        for site in sites
        if site.layer is not None and site.kind.effect is not Effect.NONE and site.kind.dtype is None
    ]
    edits = list(EDITS.values())
    written_alike(models, [(site, edits[number % len(edits)]) for number, site in enumerate(chosen)])
    models.close()


def test_neurons_that_do_not_divide(tmp_path: Path, ranks_of: PoolOf) -> None:
    hf = stored("llama", tmp_path, {"intermediate_size": 81})
    spread = tl.load(tmp_path, tp=2, ranks=ranks_of(2), parallelize=f"{PLANS}:uneven")
    models = Both(spread, tl.wrap(hf), hf)
    sites = [Site("mlp_act", 1), Site("mlp_pre", 2), Site("mlp_up", 0)]
    read_alike(models, sites, ROWS)
    written_alike(models, [(site, edit) for site in sites for edit in EDITS.values()])
    models.close()


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_sum_that_does_not_say_so_is_refused_where_it_is_used(tmp_path: Path, ranks_of: PoolOf) -> None:
    models = loaded("llama", "silent_sums", tmp_path, ranks_of)
    spread = models.spread

    def write() -> None:
        spread.layers[1].mlp_out = 0.0
        spread.logits.save()

    for edit in (lambda: spread.layers[1].mlp_out.save(), write):
        with (
            pytest.raises(LayoutError, match=r"layers.1.mlp_out has the whole shape on every rank") as caught,
            spread.trace(ROWS),
        ):
            edit()
        assert caught.value.at is not None
        assert caught.value.at.filename == __file__
    with pytest.raises(LayoutError, match=r"down_proj.*other numbers on each"), spread.trace(ROWS):
        spread.module("model.layers.1.mlp.down_proj").output.save()
    # The logits are whole, and made of what is not.
    with pytest.raises(LayoutError), spread.generate(ROWS, max_new_tokens=2):
        spread.layers[1].mlp_out = 0.0
    # All else is there.
    sites = [site for site in sites_of(models) if site != Site("mlp_out", 1)]
    expected, actual = (all_read(model, sites, ROWS) for model in (models.one, spread))
    for site in sites:
        assert relative_error(actual[site][0], expected[site][0]) <= TOLERANCE, str(site)
    report = spread.check_parallel(ROWS)
    assert [row.site for row in report if row.refused is not None] == ["mlp_out"]
    models.close()


REFUSED = {
    "nothing": "has spread no parameter of the model over the ranks",
    "fsdp": r"gathered for each layer by FSDP \(fully_shard\)",
    "two_meshes": "spread over several meshes of ranks",
    "two_dimensions": "a mesh of 2 dimensions",
    "other_numbers": "'model.layers.1.post_attention_layernorm.weight' is whole on every rank, and has other numbers",
}


@pytest.mark.parametrize("plan_", REFUSED)
def test_a_model_of_which_nothing_is_known_is_refused(
    plan_: str, tiny_folder: Path, ranks_of: PoolOf
) -> None:
    with pytest.raises(LayoutError, match=REFUSED[plan_]) as caught:
        tl.load(tiny_folder, tp=2, ranks=ranks_of(2), parallelize=f"{PLANS}:{plan_}")
    assert caught.value.at is not None
    assert caught.value.at.filename == __file__


def test_a_mistake_in_the_function_is_shown(tiny_folder: Path, ranks_of: PoolOf) -> None:
    with pytest.raises(RankFailedError, match="a mistake of the user's own"):
        tl.load(tiny_folder, tp=2, ranks=ranks_of(2), parallelize=f"{PLANS}:fails")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tp": 2, "parallelize": "plans"}, "does not name a function"),
        ({"tp": 2, "parallelize": "plans:a-b"}, "does not name a function"),
        ({"tp": 2, "parallelize": len}, "does not name a function"),
        ({"parallelize": f"{PLANS}:tutorial"}, "goes with tp= alone"),
        ({"tp": 2, "pp": 2, "parallelize": f"{PLANS}:tutorial"}, "goes with tp= alone"),
        ({"tp": 2, "device_map": "cpu", "parallelize": f"{PLANS}:tutorial"}, "have no place beside them"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_starts(
    options: dict[str, object], words: str, tiny_folder: Path
) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        tl.load(tiny_folder, **options)
    assert caught.value.at is not None
    assert caught.value.at.filename == __file__


@pytest.mark.parametrize("name", ["tests.no_such_module:tutorial", f"{PLANS}:no_such_function"])
def test_a_function_that_is_nowhere_is_refused(name: str, tiny_folder: Path, ranks_of: PoolOf) -> None:
    with pytest.raises(OptionError, match="could not be imported on a rank") as caught:
        tl.load(tiny_folder, tp=2, ranks=ranks_of(2), parallelize=name)
    assert caught.value.at is not None
    assert caught.value.at.filename == __file__


def test_what_lies_otherwise_than_it_did_is_refused_in_the_run(tiny_folder: Path, ranks_of: PoolOf) -> None:
    """And the ranks stay: nobody waits for anybody."""
    one = tl.load(tiny_folder)

    def steered(model: tl.Model, positions: int) -> Tensor:
        with model.trace([list(range(5, 5 + positions))]):
            model.layers[1].mlp_out += V
            logits = model.logits.save()
        return logits.value

    with tl.load(tiny_folder, tp=2, ranks=ranks_of(2), parallelize=f"{PLANS}:fickle") as spread:
        pids = ranks_of(2).pids
        assert relative_error(steered(spread, 8), steered(one, 8)) <= TOLERANCE
        for positions in (9, 10):
            with pytest.raises(
                SiteMismatchError, match="lies otherwise than when the model was looked at"
            ) as caught:
                steered(spread, positions)
            assert caught.value.at is not None
            assert caught.value.at.filename == __file__
        assert relative_error(steered(spread, 4), steered(one, 4)) <= TOLERANCE
        assert ranks_of(2).pids == pids
