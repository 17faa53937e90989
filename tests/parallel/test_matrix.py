"""Every site read and every site written, of models on ranks and on several devices: the same as on one device.

The diagonal of the matrix runs always, all of it by ``make matrix``, which also writes the table of the documentation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import tracelens as tl
from examples import several_gpus
from tests.conformance.test_reads import read
from tests.parallel import measured
from tests.parallel.cells import CELLS, DIAGONAL, SHAPES, SMOLLM2, Cell, Shape, knows_ep
from tests.parallel.compared import ROWS, TOLERANCE, read_alike, written_alike
from tests.parallel.writes import EDITS
from tests.support.batches import RAGGED, random_rows
from tests.support.hand_forward import hand_sites
from tests.support.pretend import pretend_throughout
from tests.support.ranks import PoolOf
from tests.support.spread_models import Both, both, over_devices, stored
from tracelens.errors import LayoutError, RankFailedError
from tracelens.ir.layout import Joined, Partial, Replicate, Shard, owned
from tracelens.ir.ops import Redistribute, Save
from tracelens.ir.sites import Effect, Site

__all__ = ["pretend_throughout"]


def cells(names: Iterable[str], always: Iterable[str] = DIAGONAL) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "cell",
        [
            pytest.param(
                CELLS[name],
                marks=[
                    *([] if name in always else [pytest.mark.matrix]),
                    *([pytest.mark.smollm2] if CELLS[name].family == SMOLLM2 else []),
                    *([knows_ep] if CELLS[name].spread.ep > 1 and CELLS[name].refused is None else []),
                ],
            )
            for name in names
        ],
        ids=str,
        indirect=True,
    )


SUPPORTED = [name for name, cell in CELLS.items() if cell.refused is None]
REFUSED = [name for name, cell in CELLS.items() if cell.refused is not None]
every_cell = cells(SUPPORTED)
ON_RANKS = [name for name in SUPPORTED if CELLS[name].spread.world > 1]
SHARED = [name for name in ON_RANKS if CELLS[name].spread.tp > 1]
"""The cells in which several ranks have a layer together."""
every_cell = cells(SUPPORTED)


@pytest.fixture(scope="module")
def cell(request: pytest.FixtureRequest) -> Cell:
    return request.param


@pytest.fixture(scope="module")
def models(
    cell: Cell, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, ranks_of: PoolOf
) -> Iterator[Both]:
    shape = cell.spread
    if shape.devices > 1:
        request.getfixturevalue("pretend_throughout")
    if cell.family == SMOLLM2:
        one = tl.load(SMOLLM2)
        if shape.devices > 1:
            spread = several_gpus.load([f"pretend:{index}" for index in range(shape.devices)])
        else:
            spread = tl.load(SMOLLM2, ranks=ranks_of(shape.world), **asked(shape))
        found = Both(spread, one, one.hf)
    elif shape.devices > 1:
        found = over_devices(cell.family, tmp_path_factory.mktemp("model"))
    else:
        folder = tmp_path_factory.mktemp("model")
        found = both(cell.family, folder, ranks_of, settings=cell.settings, **asked(shape))
    yield found
    found.close()


def asked(shape: Shape) -> dict[str, Any]:
    """What ``tl.load`` is asked for."""
    by_hand = {"parallelize": "tests.support.users_plans:tutorial"} if shape.by_hand else {}
    return {"tp": shape.tp, "pp": shape.pp, "ep": shape.ep, **by_hand}


def middle(models: Both) -> int:
    return models.one.n_layers // 2


def sites_of(models: Both) -> list[Site]:
    """All sites of the first layer, the one in the middle and the last, and those before and after the layers."""
    layers = (None, 0, middle(models), models.one.n_layers - 1)
    return [
        site  # the first is an input: the mask; what each expert makes is not there where ranks share them
        for site in hand_sites(models.hf)[1:]
        if site.layer in layers and models.spread.anatomy.has(site)
    ]


def writable(models: Both) -> list[Site]:
    return [
        site for site in sites_of(models) if site.kind.effect is not Effect.NONE and site.kind.dtype is None
    ]


@every_cell
def test_every_site_is_read(cell: Cell, models: Both) -> None:
    sites = sites_of(models)
    worst = max(read_alike(models, sites, rows) for rows in (ROWS, random_rows(RAGGED)))
    measured.note(cell, read=len(sites), read_error=worst)


@every_cell
def test_every_site_is_written(cell: Cell, models: Both) -> None:
    """Each site by one kind of edit, another one in each layer."""
    edits = list(EDITS.values())
    chosen = [(site, edits[number % len(edits)]) for number, site in enumerate(writable(models))]
    error = written_alike(models, chosen)
    measured.note(cell, written=len(chosen), write_error=error)


@cells([name for name in SUPPORTED if CELLS[name].family != SMOLLM2], always=("llama on tp2",))
def test_every_site_takes_every_edit(cell: Cell, models: Both) -> None:
    sites = [site for site in writable(models) if site.layer in (None, middle(models))]
    error = written_alike(models, [(site, edit) for site in sites for edit in EDITS.values()])
    measured.note(cell, edits=len(sites) * len(EDITS), edit_error=error)


@cells(SHARED)
def test_ranks_have_the_same_bits_where_all_have_a_value(cell: Cell, models: Both) -> None:
    """With an edit, so that what is written is compared too."""
    compiler: Any = models.spread._compiler
    with compiler.comparing() as alike, models.spread.trace(ROWS):
        models.spread.layers[0].resid_post += 0.5
        for site in sites_of(models):
            read(models.spread, site).save()
    assert len(alike) > 20
    assert all(alike)
    measured.note(cell, alike=len(alike))


@cells(ON_RANKS)
def test_the_model_really_lies_on_its_ranks(cell: Cell, models: Both) -> None:
    parts_there = models.spread._parts
    assert parts_there is not None
    assert parts_there.bytes == expected_bytes(models, cell.spread)
    whole = sum(parameter.nbytes for parameter in models.hf.parameters())
    measured.note(cell, bytes=list(parts_there.bytes), whole=whole)


@cells([name for name in SUPPORTED if CELLS[name].shape == "device_map"])
def test_the_model_really_lies_on_its_devices(cell: Cell, models: Both) -> None:
    count = cell.spread.devices
    there = [str(parameter.device) for parameter in models.spread.hf.parameters()]
    assert set(there) == {f"pretend:{index}" for index in range(count)}
    layers = [str(next(layer.parameters()).device) for layer in layers_of(models.spread.hf)]
    assert len(set(layers)) == count


def layers_of(hf: Any) -> Any:
    return hf.transformer.h if hasattr(hf, "transformer") else hf.model.layers


def expected_bytes(models: Both, shape: Shape) -> tuple[int, ...]:
    """What each rank ought to have of the weights, by the names of the parameters alone."""
    # A tied head and the embedding are one parameter where they are in one stage, and transformers has spread them.
    twice = shape.pp > 1 or shape.by_hand
    return tuple(
        sum(
            share(name, parameter, rank, shape)
            for name, parameter in models.hf.named_parameters(remove_duplicate=not twice)
            if stage == stage_of(name, models.one.n_layers, shape.pp)
        )
        for stage in range(shape.pp)
        for rank in range(shape.tp)
    )


def stage_of(name: str, layers: int, stages: int) -> int:
    if ".layers." in name:
        layer = int(name.split(".layers.")[1].split(".")[0])
        return next(stage for stage in range(stages) if layer < (stage + 1) * layers // stages)
    return 0 if name.startswith("model.embed_tokens") else stages - 1


def share(name: str, parameter: Tensor, rank: int, shape: Shape) -> int:
    """A rank's bytes: heads, neurons and the vocabulary are shared; norms, and biases of sums, are on every rank.

    Of experts each rank has some of the neurons, or some whole ones.
    """
    module, kind = name.split(".")[-2:]
    if module in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"):
        axis = 0
    elif module in ("o_proj", "down_proj") and kind == "weight":
        axis = 1
    elif module == "experts" and not shape.by_hand:  # the tutorial's plan does not know them
        axis = 0 if shape.ep > 1 else {"gate_up_proj": 1, "down_proj": 2}[kind]
    else:
        return parameter.nbytes
    size = parameter.shape[axis]
    low, high = owned(size, shape.tp, rank)
    return parameter.nbytes // size * (high - low)


@cells([name for name in ON_RANKS if CELLS[name].family != "qwen3_moe"])
def test_what_ranks_share_is_planned_in_parts(cell: Cell, models: Both) -> None:
    """Each rank sums its own neurons, and these sums are added up after the pass; heads leave in parts."""
    shape = cell.spread
    with models.spread.record() as r:
        layer = models.spread.layers[middle(models)]
        layer.mlp_act.sum(-1).save("sum")
        layer.z.save("z")
    plan = r.plan().plan
    assert [place.ranks for place in plan.placement.places] == [shape.tp] * shape.pp
    assert not any(isinstance(op, Redistribute) for op in plan.graph.ops)
    saved = {op.name: plan.layouts[op.values[0]] for op in plan.graph.ops if isinstance(op, Save)}
    shared = {"sum": Partial(Joined.SUM), "z": Shard(2)}
    assert saved == (shared if shape.tp > 1 else {"sum": Replicate(), "z": Replicate()})


@pytest.mark.parametrize("cell", [pytest.param(CELLS[name], id=name) for name in REFUSED])
def test_a_cell_that_is_not_supported_is_refused_by_name(cell: Cell, tmp_path: Path) -> None:
    """Before anything is launched, where it is not the user's own plan."""
    shape = cell.spread
    assert cell.refused is not None
    if cell.family != SMOLLM2:
        stored(cell.family, tmp_path, cell.settings)
    source = SMOLLM2 if cell.family == SMOLLM2 else tmp_path
    # What a plan by hand cannot do, its own function finds out, on the ranks.
    with pytest.raises(RankFailedError if shape.by_hand else LayoutError) as caught:
        tl.load(source, **asked(shape)).close()
    assert cell.refused.says in caught.value.problem
    assert caught.value.at is not None
    assert caught.value.at.filename == __file__


def test_the_diagonal_is_of_the_matrix() -> None:
    assert set(DIAGONAL) <= set(SUPPORTED)
    assert {CELLS[name].shape for name in DIAGONAL} == set(SHAPES) - {"tp3", "pp3"}


def test_the_table_of_the_documentation_has_every_cell() -> None:
    """What was measured may differ in its last digits; what is supported, and why something is not, may not."""
    stored_cells = measured.stored()
    assert list(stored_cells) == list(CELLS), "run: make matrix"
    for name, cell in CELLS.items():
        known = {
            key: value
            for key, value in stored_cells[name].items()
            if key in ("model", "shape", "mark", "refused")
        }
        assert known == measured.static(cell), "run: make matrix"
        if cell.refused is None:
            assert 0 <= stored_cells[name]["read_error"] <= TOLERANCE
            assert 0 <= stored_cells[name].get("write_error", 0.0) <= TOLERANCE
            assert 0 <= stored_cells[name].get("edit_error", 0.0) <= TOLERANCE
            assert stored_cells[name]["read"] > 60
            assert stored_cells[name]["written"] > 60
            assert (stored_cells[name].get("alike", 0) > 20) == (name in SHARED)
