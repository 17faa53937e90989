"""Each pass on small graphs, written out before and after."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tracelens.ir.graph import Graph, Pin
from tracelens.ir.parse import parse
from tracelens.ir.passes.drop_dead import drop_dead
from tracelens.ir.passes.fold_writes import fold_writes
from tracelens.ir.passes.forward_order import forward_order, moments_of
from tracelens.ir.passes.pipeline import PASSES, Pass, improve
from tracelens.ir.passes.rebuild import rebuild, substitute
from tracelens.ir.passes.share_values import share_values
from tracelens.ir.sites import BEFORE_ALL, Site
from tracelens.ir.text import op_text
from tracelens.ir.types import parse_type
from tracelens.ir.verify import verify
from tracelens.location import Location
from tracelens.placement import Placement
from tracelens.plan import Carry, carry_stream_writes, make_plan
from tracelens.program import lower

STREAM = "f32[B,P,48]"


def graph(body: str) -> Graph:
    """``layer`` stands for ``layers.1``, and every value is of the stream's type unless it says otherwise."""
    lines = [line.strip().replace("layer.", "layers.1.") for line in body.strip().splitlines()]
    lines = [line + f" : {STREAM}" if line[0] == "%" and " : " not in line else line for line in lines]
    found = parse("\n".join(["graph {", *lines, "}"]))
    verify(found)
    return replace(found, locations=tuple(Location("a.py", number + 1) for number in range(len(found.ops))))


def lines_of(found: Graph) -> str:
    return "\n".join(
        op_text(op).replace(f" : {STREAM}", "").replace("layers.1.", "layer.") for op in found.ops
    )


def becomes(step: Pass, before: str, after: str) -> None:
    result = step(graph(before))
    assert lines_of(result) == "\n".join(line.strip() for line in after.strip().splitlines())
    verify(result)


def stays(step: Pass, before: str) -> None:
    becomes(step, before, before)


# --- share_values ---------------------------------------------------------------------------------------------------


def test_share_values_merges_equal_operations_and_what_becomes_equal_by_that():
    becomes(
        share_values,
        """
        %0 = read layer.resid_post@0
        %1 = read layer.resid_post@0
        %2 = call torch.tanh(%0)
        %3 = call torch.tanh(%1)
        %4 = call torch.add(%2, %3)
        save "a" <- %3
        save "b" <- %4
        """,
        """
        %0 = read layer.resid_post@0
        %2 = call torch.tanh(%0)
        %4 = call torch.add(%2, %2)
        save "a" <- %2
        save "b" <- %4
        """,
    )


def test_share_values_keeps_versions_numbers_and_applied_functions_apart():
    stays(
        share_values,
        """
        %0 = read layer.resid_post@0
        %1 = call torch.mul(%0, 1)
        %2 = call torch.mul(%0, 1.0)
        %3 = call torch.mul(%0, True)
        %4 = call torch.mul(%0, 0.0)
        %5 = call torch.mul(%0, -0.0)
        write layer.resid_post@1 <- 0
        %6 = read layer.resid_post@1
        %7 = apply #0(%0)
        %8 = apply #0(%0)
        save "all" <- stack(%0, %1, %2, %3, %4, %5, %6, %7, %8)
        """,
    )


def test_share_values_merges_functions_with_several_results():
    becomes(
        share_values,
        """
        %0 = read logits@0 : f32[B,P,97]
        %1, %2 = call torch.topk(%0, 2) : f32[B,P,2], i64[B,P,2]
        %3, %4 = call torch.topk(%0, 2) : f32[B,P,2], i64[B,P,2]
        save "v" <- %3
        save "i" <- %4
        """,
        """
        %0 = read logits@0 : f32[B,P,97]
        %1, %2 = call torch.topk(%0, 2) : f32[B,P,2], i64[B,P,2]
        save "v" <- %1
        save "i" <- %2
        """,
    )


# --- fold_writes ----------------------------------------------------------------------------------------------------


def test_fold_writes_forwards_a_written_value_and_keeps_the_last_write():
    becomes(
        fold_writes,
        """
        %0 = read layer.attn_out@0
        %1 = call torch.mul(%0, 2)
        write layer.attn_out@1 <- %1
        %2 = read layer.attn_out@1
        %3 = call torch.add(%2, 1)
        write layer.attn_out@2 <- %3
        %4 = read layer.attn_out@2
        save "a" <- %4
        """,
        """
        %0 = read layer.attn_out@0
        %1 = call torch.mul(%0, 2)
        %3 = call torch.add(%1, 1)
        write layer.attn_out@1 <- %3
        save "a" <- %3
        """,
    )


def test_fold_writes_does_not_forward_what_the_write_casts_or_broadcasts():
    stays(
        fold_writes,
        """
        %0 = const #0 : f64[48]
        write layer.attn_out@1 <- %0
        %1 = read layer.attn_out@1
        write layer.mlp_out@1 <- 0.5
        %2 = read layer.mlp_out@1
        save "a" <- %1
        save "b" <- %2
        """,
    )


def test_fold_writes_drops_writing_back_what_was_read():
    becomes(
        fold_writes,
        """
        %0 = read layer.attn_out@0
        write layer.attn_out@1 <- %0
        %1 = read layer.attn_out@1
        write layer.attn_out@2 <- %1
        %2 = read layer.attn_out@2
        save "a" <- %2
        """,
        """
        %0 = read layer.attn_out@0
        save "a" <- %0
        """,
    )


def test_fold_writes_keeps_a_write_of_an_older_version():
    """Not what the site holds by then: the write undoes another one."""
    becomes(
        fold_writes,
        """
        %0 = read layer.attn_out@0
        write layer.attn_out@1 <- 0
        %1 = read layer.attn_out@1
        write layer.attn_out@2 <- %0
        save "zero" <- %1
        """,
        """
        %0 = read layer.attn_out@0
        write layer.attn_out@1 <- 0
        %1 = read layer.attn_out@1
        write layer.attn_out@2 <- %0
        save "zero" <- %1
        """,
    )


def test_fold_writes_keeps_a_write_of_another_sites_value():
    stays(
        fold_writes,
        """
        %0 = read layer.attn_out@0
        write layer.attn_add@1 <- %0
        save "a" <- %0
        """,
    )


# --- drop_dead ------------------------------------------------------------------------------------------------------


def test_drop_dead_keeps_writes_that_a_later_site_or_version_sees():
    becomes(
        drop_dead,
        """
        %0 = read layer.attn_out@0
        %1 = call torch.tanh(%0)
        %2 = call torch.mul(%0, 2)
        write layer.attn_out@1 <- %2
        write layer.mlp_out@1 <- 0
        write logits@1 <- 0
        %3 = read layer.mlp_in@0
        save "m" <- %3
        """,
        """
        %0 = read layer.attn_out@0
        %2 = call torch.mul(%0, 2)
        write layer.attn_out@1 <- %2
        %3 = read layer.mlp_in@0
        save "m" <- %3
        """,
    )


def test_drop_dead_drops_a_write_after_the_read_of_its_site():
    becomes(
        drop_dead,
        """
        %0 = read layer.mlp_out@0
        write layer.mlp_out@1 <- 0
        save "m" <- %0
        """,
        """
        %0 = read layer.mlp_out@0
        save "m" <- %0
        """,
    )


def test_drop_dead_drops_a_write_that_feeds_only_dropped_writes():
    becomes(
        drop_dead,
        """
        write layer.attn_in@1 <- 0
        %0 = read layer.mlp_in@0
        write logits@1 <- 1
        %1 = read embed@0
        save "e" <- %1
        """,
        """
        %1 = read embed@0
        save "e" <- %1
        """,
    )


def test_drop_dead_keeps_what_an_applied_function_sees_and_the_function():
    stays(
        drop_dead,
        """
        write layer.attn_in@1 <- 0
        %0 = read layer.mlp_in@0
        %1 = apply #0(%0)
        """,
    )


def test_a_graph_for_generation_keeps_all_its_writes():
    stays(
        drop_dead,
        """
        %0 = read layer.mlp_in@0
        write layer.mlp_out@1 <- %0
        write logits@1 <- 0
        """,
    )


# --- forward_order --------------------------------------------------------------------------------------------------


def test_forward_order_puts_everything_where_its_last_operand_is():
    becomes(
        forward_order,
        """
        %0 = read logits@0 : f32[B,P,97]
        %1 = read embed@0
        %2 = const #0 : f32[48]
        %3 = read layer.attn_out@0
        %4 = call torch.add(%1, %2)
        %5 = call torch.add(%4, %3)
        write layer.attn_out@1 <- %4
        save "l" <- %0
        save "h" <- %5
        """,
        """
        %2 = const #0 : f32[48]
        %1 = read embed@0
        %4 = call torch.add(%1, %2)
        %3 = read layer.attn_out@0
        %5 = call torch.add(%4, %3)
        write layer.attn_out@1 <- %4
        save "h" <- %5
        %0 = read logits@0 : f32[B,P,97]
        save "l" <- %0
        """,
    )


def test_moments_are_sites_in_their_total_order():
    found = moments_of(
        graph(
            """
            %0 = const #0 : f32[48]
            %1 = read layers.2.mlp_up@0 : f32[B,P,80]
            %2 = read layers.2.mlp_pre@0 : f32[B,P,80]
            %3 = call torch.add(%1, %2) : f32[B,P,80]
            """
        )
    )
    up, gate = Site("mlp_up", 2).sequence, Site("mlp_pre", 2).sequence
    assert found == (BEFORE_ALL, up, gate, max(up, gate))


# --- the pipeline ---------------------------------------------------------------------------------------------------


def test_the_pipeline_goes_round_until_nothing_is_removed():
    """The read keeps the first write; it is dead itself, which only the next pass sees."""
    becomes(
        improve,
        """
        write layer.attn_out@1 <- 0.5
        %0 = read layer.attn_out@1
        %1 = call torch.tanh(%0)
        write layer.attn_out@2 <- %1
        write layer.attn_out@3 <- 1
        %2 = read layer.resid_post@0
        save "h" <- %2
        """,
        """
        write layer.attn_out@1 <- 1
        %2 = read layer.resid_post@0
        save "h" <- %2
        """,
    )


def test_the_pipeline_verifies_each_step_if_asked(monkeypatch):
    seen: list[Graph] = []
    monkeypatch.setattr("tracelens.ir.passes.pipeline.verify", seen.append)
    found = graph('%0 = read layer.attn_out@0\nsave "h" <- %0')
    improve(found)
    assert not seen
    improve(found, verify_each=True)
    assert len(seen) == len(PASSES)


def test_passes_keep_lines_and_pins_in_step():
    found = graph(
        """
        %0 = read layer.attn_out@0
        %1 = read layer.attn_out@0
        %2 = call torch.tanh(%1)
        save "t" <- %2
        """
    )
    found = replace(found, pins=(Pin("B", 3, 2), Pin("P", 5, 1)))
    shared = share_values(found)
    assert [location.line for location in shared.locations] == [1, 3, 4]
    assert shared.pins == (Pin("B", 3, 1), Pin("P", 5, -1))
    reordered = rebuild(found, [(number, found.ops[number]) for number in (1, 0, 2, 3)])
    assert [location.line for location in reordered.locations] == [2, 1, 3, 4]
    assert reordered.pins == (Pin("B", 3, 2), Pin("P", 5, 0))


def test_substitute_replaces_every_use():
    found = graph(
        """
        %0 = read layer.attn_out@0
        %1 = const #0 : i64[2]
        %2 = index %0[:, :, %1] : f32[B,P,2]
        %3 = put %0[:, :, %1] <- %2
        %4 = call torch.cat((%0, %3), dim=-1) : f32[B,P,96]
        %5 = apply #0(%0, (%0, 3))
        write layer.attn_out@1 <- %0
        save "s" <- stack(%0, %3)
        """
    )
    new = {0: 100, 1: 101, 2: 102, 3: 103}
    assert [op_text(substitute(op, new)).split(" : ")[0] for op in found.ops[2:]] == [
        "%2 = index %100[:, :, %101]",
        "%3 = put %100[:, :, %101] <- %102",
        "%4 = call torch.cat((%100, %103,), dim=-1)",
        "%5 = apply #0(%100, (%100, 3,))",
        "write layers.1.attn_out@1 <- %100",
        'save "s" <- stack(%100, %103)',
    ]


# --- what the plan adds ---------------------------------------------------------------------------------------------

CARRY = (Carry("resid_mid", "mlp_add", "resid_post"),)


def carried(found: Graph, *, to_the_end: bool = False) -> Graph:
    return carry_stream_writes(found, CARRY, type_of=lambda site: parse_type(STREAM), to_the_end=to_the_end)


def test_a_write_between_the_branches_is_carried_to_the_blocks_output():
    result = carried(
        graph(
            """
            write layer.resid_mid@1 <- 0
            %0 = read layer.mlp_add@0
            write layer.mlp_add@1 <- 1
            %1 = read layer.resid_post@0
            write layer.resid_post@1 <- %0
            save "h" <- %1
            """
        )
    )
    assert lines_of(result) == "\n".join(
        [
            "write layer.resid_mid@1 <- 0",
            "%0 = read layer.mlp_add@0",
            "write layer.mlp_add@1 <- 1",
            "%2 = read layer.resid_mid@1",
            "%3 = read layer.mlp_add@1",
            "%4 = call torch.add(%2, %3)",
            "write layer.resid_post@1 <- %4",
            "%1 = read layer.resid_post@1",
            "write layer.resid_post@2 <- %0",
            'save "h" <- %1',
        ]
    )
    verify(result)
    # What was added stands on the line of the write that made it necessary.
    assert [location.line for location in result.locations] == [1, 2, 3, 1, 1, 1, 1, 4, 5, 6]


@pytest.mark.parametrize("body", ['write layer.resid_mid@1 <- 0\n%0 = read layer.mlp_in@0\nsave "m" <- %0'])
def test_a_write_whose_stream_nobody_looks_at_is_not_carried_unless_the_pass_goes_on(body):
    found = graph(body)
    assert carried(found) == found
    assert len(carried(found, to_the_end=True).ops) == len(found.ops) + 4


def test_a_plan_stops_after_the_last_site_that_anything_needs():
    def plan(body: str, *, generating: bool = False):
        return make_plan(
            graph(body), Placement.single("cpu", 3), carries=CARRY, type_of=lambda site: parse_type(STREAM),
            generating=generating,
        )  # fmt: skip

    read = '%0 = read layer.attn_out@0\nsave "a" <- %0'
    assert plan(read).stop == Site("attn_out", 1)
    assert plan(read).layers_run(3) == 2
    assert plan(read + "\nwrite logits@1 <- 0").stop == Site("attn_out", 1)
    assert plan('%0 = read logits@0 : f32[B,P,97]\nsave "l" <- %0').layers_run(3) == 3
    assert plan('%0 = read embed@0\nsave "e" <- %0').layers_run(3) == 0
    assert plan('%0 = param "norm" : f32[48]\nsave "n" <- %0').stop is None
    everything = plan("write layer.attn_out@1 <- 0", generating=True)
    assert everything.whole
    assert everything.layers_run(3) == 3


def test_a_plan_knows_the_bytes_that_are_saved():
    found = graph(
        """
        %0 = read layer.attn_out@0
        %1 = index %0[:, :, :3] : f32[B,P,3]
        save "h" <- stack(%0, %0) dtype=f64
        save "part" <- %1
        """
    )
    plan = make_plan(
        found,
        Placement.single("cpu", 3),
        carries=CARRY,
        type_of=lambda site: parse_type(STREAM),
        generating=False,
    )
    types = {name: str(type_) for name, type_ in plan.saved_types().items()}
    assert types == {"h": "f64[2,B,P,48]", "part": "f32[B,P,3]"}
    assert plan.bytes_saved({"B": 2, "P": 5}) == 8 * 2 * 2 * 5 * 48 + 4 * 2 * 5 * 3


def test_a_program_does_things_at_their_sites_and_frees_values_after_their_last_use():
    found = graph(
        """
        %0 = const #0 : f32[48]
        %1 = read embed@0
        %2 = call torch.add(%1, %0)
        write layer.attn_out@1 <- %2
        %3 = read layer.attn_out@1
        %4 = read layer.attn_add@0
        save "a" <- stack(%3, %4)
        save "e" <- %1
        """
    )
    plan = make_plan(
        found,
        Placement.single("cpu", 3),
        carries=CARRY,
        type_of=lambda site: parse_type(STREAM),
        generating=False,
    )
    (program,) = lower(plan)
    assert program.text().splitlines()[1:] == [
        "  before the pass:",
        "    %0 = const #0 : f32[48]",
        "  at embed:",
        "    %1 = read embed@0 : f32[B,P,48]",
        '    save "e" <- %1',
        "    %2 = call torch.add(%1, %0) : f32[B,P,48]   free %0, %1",
        '    save "a"[0] <- %2',
        "  at layers.1.attn_out:",
        "    write layers.1.attn_out@1 <- %2   free %2",
        "  at layers.1.attn_add:",
        "    %4 = read layers.1.attn_add@0 : f32[B,P,48]",
        '    save "a"[1] <- %4   free %4',
        "  stop after layers.1.attn_add",
        "}",
    ]
