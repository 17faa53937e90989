"""Mixtures of experts on ranks, beside one process: experts in parts (``tp=2``), whole ones (``ep=2``), and stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import Qwen3Config, Qwen3MoeConfig

import tracelens as tl
from tests.conformance.test_reads import read
from tests.parallel.cells import KNOWS_EP, knows_ep
from tests.support.families import FAMILIES
from tests.support.hand_forward import hand_sites
from tests.support.ranks import PoolOf
from tracelens.backends.layouts import require_divisible
from tracelens.errors import AbsentSiteError, LayoutError, OptionError
from tracelens.ir.layout import Replicate, Shard
from tracelens.ir.ops import Save
from tracelens.ir.sites import Effect, Site
from tracelens.model import Model
from tracelens.rank_loading import require_fit

ROWS = [[5, 6, 7, 8], [9, 10, 11, 12]]
RAGGED = [[5, 6, 7, 8], [9, 10]]
TOLERANCE = 1e-5
EVEN = {"vocab_size": 98}
"""Some versions of transformers cannot share a vocabulary unevenly."""

SIZES = {"pp2": {"pp": 2}, "tp2": {"tp": 2}, "ep2": {"tp": 2, "ep": 2}}
every_spread = pytest.mark.parametrize(
    "spread", ["pp2", "tp2", pytest.param("ep2", marks=knows_ep)], indirect=True, scope="module"
)
shared = pytest.mark.parametrize(
    "spread", ["tp2", pytest.param("ep2", marks=knows_ep)], indirect=True, scope="module"
)


@dataclass(frozen=True)
class Both:
    """One model in this process and on ranks."""

    name: str
    hf: Any
    one: Model
    there: Model

    def beside(self, block: Any) -> list[tuple[Any, Any]]:
        """What a block gives on the ranks and in one process."""
        return list(zip(block(self.there), block(self.one), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("experts")
    FAMILIES["qwen3_moe"].build(**EVEN).save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def spread(request: pytest.FixtureRequest, folder: Path, ranks_of: PoolOf) -> Iterator[Both]:
    with tl.load(folder, ranks=ranks_of(2), **SIZES[request.param]) as there:
        yield Both(request.param, FAMILIES["qwen3_moe"].build(**EVEN), tl.load(folder), there)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


# --- beside one process ----------------------------------------------------------------------------------------------


@every_spread
def test_every_site_is_that_of_one_process(spread: Both) -> None:
    report = spread.there.check_parallel(RAGGED)
    present = {row.name for row in spread.there.sites() if row.absent is None} - {"head_out"}
    assert {row.site for row in report} == present
    assert {"router_logits", "expert_index", "expert_weights", "mlp_act"} <= present
    assert all(row.refused is None for row in report)
    assert report.ok
    assert report.worst.error < 5e-6
    # The router is whole on each rank, and what it returns is of all tokens.
    for name in ("router_logits", "expert_index", "expert_weights"):
        assert report[name].alike in (True, None)
    assert report["expert_index"].error == 0.0


def _numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    return 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _put(model: Model, site: Site, new: object) -> None:
    setattr(model if site.layer is None else model.layers[site.layer], site.name, new)


def _add(model: Model, site: Site, shape: tuple[int, ...]) -> None:
    _put(model, site, read(model, site) + _numbers(shape, 1))


def _assign(model: Model, site: Site, shape: tuple[int, ...]) -> None:
    _put(model, site, _numbers(shape, 2))


def _part(model: Model, site: Site, shape: tuple[int, ...]) -> None:
    """From the middle of one rank's part to the middle of the other's, where there are parts."""
    start = shape[-1] // 4
    stop = shape[-1] - start if start else 1
    handle = read(model, site)
    handle[..., start:stop] = _numbers((*shape[:-1], stop - start), 3)


@every_spread
def test_every_site_is_written(spread: Both) -> None:
    """Each by one kind of edit, another one in each layer; what the router returns by all."""
    sites = [
        site
        for site in hand_sites(spread.hf)[1:]
        if site.kind.effect is not Effect.NONE and site.kind.dtype is None and spread.there.anatomy.has(site)
    ]
    edits = [_add, _assign, _part]
    with spread.one.trace(ROWS):
        clean = {site: read(spread.one, site).save() for site in sites}
    for number, site in enumerate(sites):
        router = site.name in ("router_logits", "expert_weights")
        for edit in edits if router else [edits[number % len(edits)]]:
            shape = tuple(clean[site].value.shape)

            def block(model: Model, site: Site = site, edit: Any = edit, shape: Any = shape) -> list[Tensor]:
                with model.trace(ROWS):
                    edit(model, site, shape)
                    saved = [read(model, site).save(), model.logits.save()]
                return [value.value for value in saved]

            (site_there, site_here), (logits_there, logits_here) = spread.beside(block)
            assert relative(logits_here, clean[Site("logits")].value) > 100 * TOLERANCE, (site, edit.__name__)
            assert relative(site_there, site_here) <= TOLERANCE, (site, edit.__name__)
            assert relative(logits_there, logits_here) <= TOLERANCE, (site, edit.__name__)


@every_spread
def test_an_expert_is_taken_out_and_another_is_never_chosen(spread: Both) -> None:
    def block(model: Model) -> list[Any]:
        with model.trace(RAGGED):
            first, second = model.layers[0], model.layers[1]
            first.expert_weights = first.expert_weights * (first.expert_index != 2)
            second.router_logits[..., 3] = -1e9
            second.expert(1).force()
            index = second.expert_index.save()
            logits = model.logits.tok[-1].save()
        return [torch.cat([part.flatten() for part in index.value]), logits.value]

    (index, index_here), (logits, logits_here) = spread.beside(block)
    assert torch.equal(index, index_here)
    assert not (index == 3).any()
    assert (index.unflatten(0, (-1, 2)) == 1).any(-1).all()
    assert relative(logits, logits_here) <= TOLERANCE


@every_spread
def test_layers_without_a_site_say_so_before_anything_runs(spread: Both) -> None:
    with spread.there.trace(ROWS):
        spread.there.logits.save()
        with pytest.raises(AbsentSiteError, match="layer 1 is a mixture of experts"):
            spread.there.layers[1].mlp_act  # it raises
        with pytest.raises(AbsentSiteError, match="layer 2 has one MLP for all tokens"):
            spread.there.layers[2].router_logits


@every_spread
def test_what_each_expert_makes_is_there_where_a_rank_has_it_and_else_refused_by_name(spread: Both) -> None:
    there = spread.there
    for name in ("expert_act", "expert_out"):
        if spread.name == "pp2":
            assert there.sites()[name].layers == (0, 1)
            continue
        assert "ranks share its experts" in (there.sites()[name].absent or "")
        with there.trace(ROWS):
            there.logits.save()
            with pytest.raises(AbsentSiteError, match="ranks share its experts") as failure:
                getattr(there.layers[1], name)
        assert "model.sites()" in str(failure.value.instead)
    if spread.name != "pp2":
        return

    def block(model: Model) -> list[Tensor]:
        with model.trace(RAGGED):
            act = model.layers[0].expert_act.save()
            model.layers[1].expert_out[..., 0, :] = 0
            logits = model.logits.tok[-1].save()
        return [torch.cat([part.flatten() for part in act.value]), logits.value]

    for found, here in spread.beside(block):
        assert relative(found, here) <= TOLERANCE


@shared
def test_gradients_and_text_are_those_of_one_process(spread: Both) -> None:
    def gradients(model: Model) -> list[Tensor]:
        with model.trace(ROWS):
            loss = model.logits[:, -1].pow(2).mean()
            wrt = [
                model.layers[0].resid_post,
                model.layers[0].router_logits,
                model.layers[1].expert_weights,
                model.layers[2].mlp_act,
            ]
            found = [value.save() for value in tl.grad(loss, wrt)]
        return [value.value for value in found]

    for there, here in spread.beside(gradients):
        assert here.abs().max() > 1e-3
        assert relative(there, here) <= TOLERANCE

    def text(model: Model) -> list[list[int]]:
        with model.generate(ROWS, max_new_tokens=5) as t:
            model.layers[1].router_logits[..., 1] -= 3.0
            model.layers[0].expert_weights *= 1.5
        return t.tokens

    with spread.one.generate(ROWS, max_new_tokens=5) as plain:
        pass
    assert text(spread.there) == text(spread.one) != plain.tokens


# --- where it lies ---------------------------------------------------------------------------------------------------


@every_spread
def test_the_model_really_lies_on_its_ranks(spread: Both) -> None:
    assert spread.there._parts is not None
    # Later versions of transformers share the rows of the embedding, too.
    in_parts = "model.embed_tokens" in spread.hf.tp_plan
    assert spread.there._parts.bytes == tuple(
        sum(
            own_bytes(name, parameter, spread.name, rank, embedding_in_parts=in_parts)
            for name, parameter in spread.hf.named_parameters()
        )
        for rank in range(2)
    )


def own_bytes(name: str, parameter: Tensor, spread: str, rank: int, *, embedding_in_parts: bool) -> int:
    """What a rank ought to have of a parameter, by its name alone."""
    if spread == "pp2":
        late = name.startswith(("model.layers.1", "model.layers.2", "model.norm", "lm_head"))
        return parameter.nbytes if late == (rank == 1) else 0
    words = name.split(".")
    if "embed_tokens" in words and not embedding_in_parts:
        return parameter.nbytes
    if any(word in ("embed_tokens", "lm_head") or word.endswith("_proj") for word in words):
        return parameter.nbytes // 2
    return parameter.nbytes  # norms, and the router


@shared
def test_matrices_of_experts_are_values(spread: Both) -> None:
    """By the number of the expert, whichever rank has it or a part of it."""
    parts = spread.there.anatomy.elsewhere
    assert parts is not None
    down, up = (f"model.layers.0.mlp.experts.{name}" for name in ("down_proj", "gate_up_proj"))
    assert parts.parameters[down] == Shard(0 if spread.name == "ep2" else 2)
    assert parts.parameters.get(up) == (Shard(0) if spread.name == "ep2" else None)

    def written(model: Model) -> list[Tensor]:
        with model.trace(ROWS):
            found = (model.layers[1].mlp_in @ model.param(down)[3]).save()
            model.layers[1].resid_post += model.param(down)[1].sum(-1)
            logits = model.logits.save()
        return [found.value, logits.value]

    for there, here in spread.beside(written):
        assert relative(there, here) <= TOLERANCE

    def gates(model: Model) -> list[Tensor]:
        with model.trace(ROWS):
            found = (model.layers[1].mlp_in @ model.param(up)[3].T).save()
        return [found.value]

    if spread.name == "tp2":
        # Gates and linear branches lie side by side, and each rank has a part of both.
        with pytest.raises(LayoutError, match="packed into each other"):
            gates(spread.there)
        return
    ((there, here),) = spread.beside(gates)
    assert relative(there, here) <= TOLERANCE


@shared
def test_what_the_router_returns_is_planned_whole(spread: Both) -> None:
    with spread.there.record() as r:
        spread.there.layers[1].router_logits.save("logits")
        spread.there.layers[1].expert_index.save("index")
        spread.there.layers[2].mlp_act.save("neurons")
    plan = r.plan().plan
    saved = {op.name: plan.layouts[op.values[0]] for op in plan.graph.ops if isinstance(op, Save)}
    assert saved == {"logits": Replicate(), "index": Replicate(), "neurons": Shard(2)}


# --- ways of computing experts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes", [{"tp": 2}, pytest.param({"tp": 2, "ep": 2}, marks=knows_ep)], ids=["tp2", "ep2"]
)
def test_parts_of_experts_that_the_grouped_product_does_not_take(
    sizes: dict[str, int], tmp_path: Path, ranks_of: PoolOf
) -> None:
    """Rows of 20 numbers are whole 16 bytes, and half of one is not: ranks compute those token by token."""
    FAMILIES["qwen3_moe"].build(**EVEN, moe_intermediate_size=20).save_pretrained(tmp_path)
    with tl.load(tmp_path, ranks=ranks_of(2), **sizes) as model:
        assert model.check_parallel(ROWS).ok


def test_experts_one_after_the_other(folder: Path, ranks_of: PoolOf) -> None:
    with tl.load(folder, ranks=ranks_of(2), tp=2, experts_implementation="eager") as model:
        report = model.check_parallel(RAGGED)
    assert report.ok
    assert report["expert_weights"].error < 5e-6


# --- what is refused before anything is launched ---------------------------------------------------------------------

TINY = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}


def refused(settings: dict[str, Any], sizes: dict[str, int], config: type = Qwen3MoeConfig) -> LayoutError:
    with pytest.raises(LayoutError) as failure:
        require_fit(config(**TINY, **settings), {"tp": 1, "pp": 1, "ep": 1, **sizes})
    return failure.value


def test_numbers_that_do_not_divide_experts_are_refused() -> None:
    assert "moe_intermediate_size is 15" in refused({"moe_intermediate_size": 15}, {"tp": 2}).problem
    require_divisible(Qwen3MoeConfig(**TINY, moe_intermediate_size=15, num_experts=4), 2, experts=2)


@knows_ep
def test_numbers_that_do_not_divide_the_number_of_experts_are_refused() -> None:
    assert "num_experts is 5" in refused({"num_experts": 5}, {"tp": 2, "ep": 2}).problem
    require_fit(Qwen3MoeConfig(**TINY, num_experts=5, moe_intermediate_size=16), {"tp": 2, "pp": 1, "ep": 1})


def test_experts_are_spread_where_there_are_some() -> None:
    error = refused({}, {"tp": 2, "ep": 2}, Qwen3Config)
    assert "qwen3 has no experts" in error.problem
    assert str(error.instead).startswith("tl.load(name, tp=2)")


@knows_ep
def test_experts_over_ranks_and_stages_do_not_go_together() -> None:
    error = refused({"num_experts": 4}, {"tp": 2, "ep": 2, "pp": 2})
    assert "ep=2 and pp=2 do not go together" in error.problem
    assert str(error.instead).startswith("tl.load(name, pp=2, tp=2)")


def test_experts_are_tested_where_transformers_can_spread_them() -> None:
    """So that nothing here is skipped unseen: only versions before 5.23 cannot do all of it."""
    assert (Version(transformers.__version__) >= Version("5.23")) == KNOWS_EP


def test_experts_are_spread_over_the_ranks_that_share_a_layer(folder: Path) -> None:
    with pytest.raises(OptionError, match="ep=2 needs tp=2, not 1") as failure:
        tl.load(folder, ep=2)
    assert failure.value.instead == "tl.load(name, tp=2, ep=2)"
    assert failure.value.at is not None
    assert failure.value.at.filename == __file__
