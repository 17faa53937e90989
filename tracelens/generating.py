"""Text from a model whose computation a block changes: transformers' own generation, with the program's hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from tracelens.agreeing import require_agreement
from tracelens.backends.local import Run
from tracelens.backends.pipeline_generation import StagedGeneration
from tracelens.backends.ready import running_device
from tracelens.backends.transfer import Everywhere, inputs_on
from tracelens.backends.windows import refuse_forgotten
from tracelens.compiled import Compiled, relocate
from tracelens.compiling import Compiler, check_fits
from tracelens.errors import TracelensError
from tracelens.ir.graph import Graph
from tracelens.ir.module_sites import ModuleSite
from tracelens.ir.sites import Scope
from tracelens.prompted import Prompt
from tracelens.ranked import RankedCompiler

if TYPE_CHECKING:
    from tracelens.model import Model


def generate(
    model: Model,
    compiler: Compiler,
    graph: Graph,
    compiled: Compiled,
    prompt: Prompt,
    options: Mapping[str, Any],
) -> list[list[int]]:
    """transformers' own generation, with the program's hooks in every forward pass."""
    anatomy = model.anatomy
    if isinstance(compiler, RankedCompiler):
        return compiler.generate(graph, compiled, prompt, options)
    device = running_device(anatomy)
    check_fits(graph, compiled, prompt)
    drawn = anatomy.mesh is not None and bool(
        options.get("do_sample", cast(Any, anatomy.model).generation_config.do_sample)
    )
    if anatomy.mesh is not None and not compiler.owned:
        require_agreement(anatomy.mesh, compiled, graph, prompt, options, sampled=drawn)
    run = Run(anatomy.model, compiled.code, compiler.state(graph, compiled, prompt), None)
    inputs = inputs_on(prompt.batch.model_inputs(), device)
    # transformers derives the positions from the mask itself, and continues them in every step.
    inputs.pop("position_ids")
    hf: Any = anatomy.model
    if any(
        site.name in ("lm_head", "logits")
        or (isinstance(site, ModuleSite) and site.kind.scope is Scope.AFTER)
        for site in compiled.plan.sites
    ):
        # transformers would compute only the last position's; the sites are those of every position.
        inputs["logits_to_keep"] = 0

    def sizes(args: Any, kwargs: Mapping[str, Any]) -> dict[str, int]:
        ids = kwargs.get("input_ids")
        ids = args[0] if ids is None else ids
        cache = kwargs.get("past_key_values")
        if prompt.ragged:
            run.real = Everywhere(kwargs["attention_mask"].bool())
        seen = 0 if cache is None else int(cache.get_seq_length())
        return {"B": ids.shape[0], "P": ids.shape[1], "S": seen + ids.shape[1]}

    pipeline = None if anatomy.mesh is None else anatomy.mesh.pipeline

    def forward() -> torch.Tensor:
        if pipeline is not None:
            newest = inputs.get("logits_to_keep") == 0
            StagedGeneration(run, pipeline, newest=newest, draws=drawn).begin(compiled.code.seat)
        return hf.generate(**inputs, **options)

    try:
        refuse_forgotten(anatomy, compiled.plan.graph, prompt.sizes["P"], options)
        output = run.execute(forward, each_forward=sizes)
        if anatomy.mesh is not None:
            compiler.report(graph, run, anatomy.mesh)
    except TracelensError as error:
        raise relocate(error, graph) from error.__cause__
    new = output[:, inputs["input_ids"].shape[1] :].tolist()
    ends = _end_tokens(hf, options)
    return [_until_end(row, ends) for row in new]


def _end_tokens(hf: Any, options: Mapping[str, Any]) -> frozenset[int]:
    end = options.get("eos_token_id", getattr(hf.generation_config, "eos_token_id", None))
    return frozenset(end if isinstance(end, list | tuple) else () if end is None else (end,))


def _until_end(row: list[int], ends: frozenset[int]) -> list[int]:
    for position, token in enumerate(row):
        if token in ends:
            return row[: position + 1]
    return row
