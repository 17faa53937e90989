"""Text from a model that a block looks into and changes: transformers' own generation, with each step's program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import torch

from tracelens.agreeing import require_agreement
from tracelens.backends.gathering import Gathering
from tracelens.backends.generation_options import (
    Watched,
    is_cached,
    keeps_logits,
    refusing,
    require_plain,
    resolved,
    watched_criteria,
)
from tracelens.backends.pipeline_generation import StagedGeneration
from tracelens.backends.ready import running_device
from tracelens.backends.stepping import SteppedRun
from tracelens.backends.transfer import inputs_on, moved
from tracelens.backends.windows import refuse_forgotten
from tracelens.compiled import Compiled, relocate
from tracelens.compiling import Compiler
from tracelens.errors import OptionError, TracelensError
from tracelens.fitting import check_fits
from tracelens.gathered import Generated, ends_of, finished, from_ranks
from tracelens.generation_plan import CompiledGeneration, bound_to_steps
from tracelens.ir.graph import Graph
from tracelens.ir.module_sites import ModuleSite
from tracelens.ir.ops import Read, Write
from tracelens.ir.passes.newest_logits import of_logits
from tracelens.ir.sites import Scope
from tracelens.leaving import elsewhere
from tracelens.prompted import Prompt
from tracelens.ranked import RankedCompiler
from tracelens.report import RunReport
from tracelens.telling import OneStep, StepTold, Telling

if TYPE_CHECKING:
    from tracelens.model import Model


def generate(
    model: Model,
    compiler: Compiler,
    graph: Graph,
    compiled: CompiledGeneration,
    prompt: Prompt,
    options: Mapping[str, Any],
    *,
    include_last: bool = False,
    seed: int | None = None,
    told: StepTold | None = None,
) -> Generated:
    """transformers' own generation, with each step's program in its pass.

    ``options``: those of transformers, ``max_new_tokens`` among them. ``include_last``: one more pass, over the last
    token. ``seed``: for tokens that are drawn. ``told``: who hears of each step.
    """
    config = resolved(compiler.anatomy.model, options)
    if not compiled.any_passes or include_last or options["max_new_tokens"] == 0:
        require_plain(config, options)
    _require_history(graph, compiled, cached=is_cached(config, options))
    if isinstance(compiler, RankedCompiler):
        if told is not None:
            return compiler.stream(graph, compiled, prompt, options, told, seed=seed)
        return compiler.generate(graph, compiled, prompt, options, include_last=include_last, seed=seed)
    with _seeded(seed, running_device(compiler.anatomy)):
        return _Generation(
            model, compiler, graph, compiled, prompt, options, config, include_last, told
        ).run()


class _Ending:
    """Among the stopping criteria: lets a step end, which its tokens now are known of. It stops nothing."""

    def __init__(self) -> None:
        self.run: SteppedRun | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.run is not None:
            self.run.chosen(input_ids[:, -1])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _Generation:
    """One generation in this process, or this rank's part of one."""

    def __init__(
        self,
        model: Model,
        compiler: Compiler,
        graph: Graph,
        compiled: CompiledGeneration,
        prompt: Prompt,
        options: Mapping[str, Any],
        config: Any,
        include_last: bool,
        told: StepTold | None,
    ) -> None:
        self.compiler, self.graph, self.compiled, self.prompt = compiler, graph, compiled, prompt
        self.anatomy = compiler.anatomy
        self.hf: Any = self.anatomy.model
        self.given, self.options = options, dict(options)
        self.include_last = include_last
        self.told = told
        self.count: int = self.options["max_new_tokens"]
        self.watched: list[Watched] = watched_criteria(self.options, model.tokenizer)
        self.cached = is_cached(config, options)
        self.draws = bool(config.do_sample)
        self.ends = _end_tokens(config)
        self.ending = _Ending()
        if "next_tokens" in compiled.inputs:
            self.options["stopping_criteria"] = [*self.options.get("stopping_criteria", ()), self.ending]

    def run(self) -> Generated:
        anatomy, compiled, prompt, graph = self.anatomy, self.compiled, self.prompt, self.graph
        started = perf_counter()
        check_fits(graph, compiled, prompt)
        mesh = anatomy.mesh
        if mesh is not None and not self.compiler.owned:
            require_agreement(mesh, compiled, graph, prompt, self.options, sampled=self.draws)
        cached = self.cached
        steps = max(1, self.count)
        if self.told is None:
            gathering = Gathering(
                compiled.courses, prompt.sizes, steps, include_last=self.include_last, cached=cached
            )
        else:
            gathering = OneStep(compiled.courses, prompt.sizes, cached=cached)
        run = SteppedRun(
            self.hf,
            compiled.segments,
            self.compiler.state(graph, compiled, prompt),
            gathering,
            sizes=prompt.sizes,
            cached=cached,
            any_passes=compiled.any_passes,
            mask=moved(prompt.batch.mask, running_device(anatomy)),
            ragged=prompt.ragged,
            inputs=bool(compiled.inputs),
        )
        self.ending.run = run
        if self.told is not None and isinstance(gathering, OneStep):
            run.waiting = self.told.waiting
            # What waits for the tokens is done after the vote of its pass.
            vote = run.vote if "next_tokens" in compiled.inputs else None
            telling = Telling(self.told, gathering, prompt, self.ends, self.watched, vote)
            self.options["stopping_criteria"] = [*self.options.get("stopping_criteria", ()), telling]
        inputs = self._inputs(prompt)
        if mesh is not None and mesh.pipeline is not None:
            newest = inputs.get("logits_to_keep") == 0
            run.staged = StagedGeneration(run, mesh.pipeline, newest=newest, draws=self.draws)
        try:
            self._refuse_forgotten()
            found = run.execute(partial(self._forward, run, inputs))
            if mesh is not None:
                self.compiler.report(graph, run, mesh)
            tokens = [] if found is None else self._tokens(found[:, prompt.sizes["P"] :])
            tensors = self._tensors(gathering, run, tokens)
        except TracelensError as error:
            raise relocate(error, graph) from error.__cause__
        finally:
            gathering.remove()
        report = RunReport(perf_counter() - started, run.state.traffic, tuple, {})
        return Generated(tokens, tensors, report)

    def _inputs(self, prompt: Prompt) -> dict[str, Any]:
        inputs = inputs_on(prompt.batch.model_inputs(), running_device(self.anatomy))
        # transformers derives the positions from the mask itself, and continues them in every step.
        inputs.pop("position_ids")
        # With a cache later steps have one position anyway.
        if any(map(_behind_all, self.compiled.parts[:1] if self.cached else self.compiled.parts)):
            # transformers would compute only the last position's; the sites are those of every position.
            inputs["logits_to_keep"] = 0
        elif keeps_logits(self.hf):
            inputs["logits_to_keep"] = 1
        return inputs

    def _forward(self, run: SteppedRun, inputs: Mapping[str, Any]) -> torch.Tensor:
        """All passes of the generation: the tokens, the prompt's among them."""
        if self.count == 0:
            # One pass, over the prompt alone.
            self.hf(**inputs, use_cache=False)
            run.chosen(None)
            run.catch_up()
            return inputs["input_ids"]
        with refusing(self.given, lambda: run.begun):
            found = self.hf.generate(**inputs, **self.options, return_dict_in_generate=True)
        if self.include_last:
            self._last_pass(inputs, found)
            run.chosen(None)
        run.catch_up()
        return found.sequences

    def _last_pass(self, inputs: Mapping[str, Any], found: Any) -> None:
        """One more pass, over the last token, which generation has no need of."""
        text: torch.Tensor = found.sequences
        mask = inputs["attention_mask"]
        new = text.shape[1] - mask.shape[1]
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], new)], 1)
        cache = found.past_key_values
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        given: dict[str, Any] = {"input_ids": text, "attention_mask": mask, "position_ids": positions}
        if self.cached:
            given |= {"input_ids": text[:, -1:], "position_ids": positions[:, -1:], "past_key_values": cache}
        keep = {name: inputs[name] for name in ("logits_to_keep",) if name in inputs}
        self.hf(**given, **keep, use_cache=self.cached)

    def _tokens(self, new: torch.Tensor) -> list[list[int]]:
        """The new tokens of each row up to its end."""
        rows: list[list[int]] = new.tolist()
        for row, text in enumerate(rows):
            del text[next((at + 1 for at, token in enumerate(text) if token in self.ends), len(text)) :]
            for watched in self.watched:
                if (end := watched.steps(len(rows))[row]) is not None:
                    del text[end:]
        return rows

    def _tensors(
        self, gathering: Gathering, run: SteppedRun, tokens: list[list[int]]
    ) -> dict[str, Callable[[], Any]]:
        if self.told is not None:
            return {}
        ends = ends_of(tokens)
        mesh = self.anatomy.mesh
        if mesh is None:
            return finished(gathering, self.prompt, ends)
        members = from_ranks(gathering, ends, run.code.devices, mesh)
        if not mesh.has_results:
            return {name: partial(elsewhere, name) for name in gathering.courses}
        return finished(gathering, self.prompt, ends, members)

    def _refuse_forgotten(self) -> None:
        for segment, part in zip(self.compiled.stepped.segments, self.compiled.parts, strict=True):
            if segment.stop != 1:
                refuse_forgotten(self.anatomy, part.plan.graph, self.prompt.sizes["P"], self.options)


def _behind_all(part: Compiled) -> bool:
    """Does a program look at more than the newest position, where transformers computes no other by itself?"""
    reads = [op for op in part.plan.graph.ops if isinstance(op, Read | Write)]
    if any(isinstance(op.site, ModuleSite) and op.site.kind.scope is Scope.AFTER for op in reads):
        return True
    named = [op for op in reads if of_logits(op.site)]
    # What is planned for the newest position alone is read with one; what is only written fits any number.
    return any(isinstance(op, Read) and op.type.position_axes for op in named)


def _require_history(graph: Graph, compiled: CompiledGeneration, *, cached: bool) -> None:
    """Without a cache, a pass is over earlier positions again, and has to do to them what their own steps did."""
    if cached or (compiled.stepped.segments[-1].start == 0 and not compiled.recorded.writes):
        return
    number = bound_to_steps(compiled.stepped)
    if number is not None and compiled.recorded.writes:
        raise graph.blame(
            OptionError(
                "without a cache every step runs the model over the whole text again, and this would be done to the "
                "positions of other steps as well",
                instead="use_cache=True, which is the default",
            ),
            number,
        )


def _end_tokens(config: Any) -> frozenset[int]:
    end = config.eos_token_id
    if isinstance(end, torch.Tensor):
        end = end.tolist()
    return frozenset(
        cast("list[int]", end) if isinstance(end, list | tuple) else () if end is None else (end,)
    )


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Random numbers from a seed, and after it those that the user's own would have been."""
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
