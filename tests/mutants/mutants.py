"""Deliberate mistakes: each one is a line of the library made wrong, and the tests that must notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """In ``file`` the text ``right`` (which stands there once) becomes ``wrong``; one of ``tests`` has to fail."""

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


PASSES = ("tests/ir/test_passes.py", "tests/properties/test_pass_meaning.py")
GRAPHS = ("tests/properties/test_mutated_graphs.py",)
MODEL = ("tests/test_model.py",)
BITS = ("tests/conformance/test_writes.py", "-k", "bit_for_bit and bf16 and eager and llama")
RESULTS = ("tests/test_results.py",)
GRADIENTS = ("tests/test_gradients.py", "-k", "version or names or written or losses or llama and order")
BLAME = ("tests/properties/test_blame.py",)
GENERATION = ("tests/test_generation.py",)
MODULES = ("tests/test_modules.py", "-k", "not family and not every")
SKIPPING = ("tests/test_skipping.py", "-k", "own or several")

OFFLOAD = ("tests/test_offload.py",)
SPREAD = ("tests/test_spread.py",)
ATTENTION = ("tests/conformance/test_attention.py",)
HEADS = ("tests/test_heads.py",)
KEYS = ("tests/conformance/test_keys.py",)

MUTANTS = (
    Mutant(
        "a write is dead although a later version of its site is read",
        "ir/passes/drop_dead.py",
        "return read.version >= write.version",
        "return read.version == write.version - 1",
        PASSES,
    ),
    Mutant(
        "a write is dead although a later site is read",
        "ir/passes/drop_dead.py",
        "return write.site.sequence < read.site.sequence",
        "return False",
        PASSES,
    ),
    Mutant(
        "a written value is forwarded although the write casts or broadcasts it",
        "ir/passes/fold_writes.py",
        "graph.types[value] == op.type",
        "graph.types[value] is not None",
        PASSES,
    ),
    Mutant(
        "reads of different versions are shared",
        "ir/passes/share_values.py",
        "return (type(op), op_text(replace(op, out=0)))",
        'return (type(op), op_text(replace(op, out=0)).replace("@1", "@0"))',
        PASSES,
    ),
    Mutant(
        "an operation is done at the first of its operands' sites",
        "ir/passes/forward_order.py",
        "default=BEFORE_ALL)",
        "default=BEFORE_ALL) and min((known[value] for value in operands(op)), default=BEFORE_ALL)",
        PASSES,
    ),
    Mutant(
        "the verifier does not count the writes",
        "ir/verify.py",
        "if op.version != written[op.site]:",
        "if False:",
        GRAPHS,
    ),
    Mutant(
        "the verifier believes any type",
        "ir/verify.py",
        "if not isinstance(op, Write) and inferred.types != declared:",
        "if False:",
        GRAPHS,
    ),
    Mutant(
        "a read does not see the writes before it",
        "recorder.py",
        "        self._current.pop(site, None)\n",
        "        pass\n",
        ("tests/conformance/test_writes.py", "-k", "seen_by_the_reads and llama"),
    ),
    Mutant(
        "a write in the middle of a block is not carried to its output",
        "plan.py",
        "    if not after and not to_the_end:",
        "    if not to_the_end or after:",
        BITS,
    ),
    Mutant(
        "the carried sum is the wrong way round",
        "plan.py",
        '"torch.add", (Ref(first), Ref(first + 1))',
        '"torch.sub", (Ref(first), Ref(first + 1))',
        BITS,
    ),
    Mutant(
        "a write is not cast to the site's dtype",
        "backends/execute.py",
        "new = new.to(site.dtype)",
        "new = new * 1",
        BITS,
    ),
    Mutant(
        "positions may be mixed where rows differ in length",
        "recorder.py",
        "if inferred.mixes and not self._aligned:",
        "if False:",
        GENERATION,
    ),
    Mutant(
        "a program mixes positions of rows that differ in length",
        "compiling.py",
        "if prompt.ragged and compiled.mixing:",
        "if False:",
        ("tests/test_language.py", "tests/test_compiling.py", "-k", "ragged or lengths"),
    ),
    Mutant(
        "positions count the padding",
        "batch.py",
        "places >= 0, places.clamp_(min=0)",
        "places >= 0, torch.arange(longest).expand(len(rows), -1)",
        ("tests/test_batch.py", "-k", "padded or positions"),
    ),
    Mutant(
        "token selectors forget the padding",
        "selection.py",
        "_shifted(row, pad) for row, pad",
        "_shifted(row, 0) for row, pad",
        ("tests/test_selection.py",),
    ),
    Mutant(
        "a changed constant is not noticed",
        "constants.py",
        "        if changed:\n",
        "        if False:\n",
        BLAME,
    ),
    Mutant(
        "a lost update is not noticed",
        "recorder.py",
        "        if self._pending:\n",
        "        if False:\n",
        BLAME,
    ),
    Mutant(
        "numbers of different kinds lead to the same step",
        "draft.py",
        "return (kind, arg)",
        "return (float, arg)",
        ("tests/test_steps.py",),
    ),
    Mutant(
        "values travel backwards",
        "origins.py",
        "    if not (\n        origin.order < site.order\n",
        "    if False and not (\n        origin.order < site.order\n",
        (*GENERATION, "-k", "refuses"),
    ),
    Mutant(
        "two names of one tensor have one gradient",
        "ir/infer.py",
        "return value.view_as(value) if value.requires_grad",
        "return value if value.requires_grad",
        GRADIENTS,
    ),
    Mutant(
        "the model does not go on from the leaf",
        "ir/passes/mark_leaves.py",
        "if op.version == last.get(op.site, 0):",
        "if op.version < last.get(op.site, 0):",
        GRADIENTS,
    ),
    Mutant(
        "a gradient is taken at the value that was written and not at the site",
        "ir/passes/fold_writes.py",
        "                and (op.site, op.version) not in kept_apart\n            ):",
        "            ):",
        GRADIENTS,
    ),
    Mutant(
        "autograd's graph is freed after the first of several gradients",
        "backends/differentiate.py",
        "retain_graph=not last",
        "retain_graph=False",
        GRADIENTS,
    ),
    Mutant(
        "frozen parameters stay frozen",
        "backends/hooks.py",
        "            parameter.requires_grad_(True)\n",
        "            pass\n",
        ("tests/test_gradient_runs.py", "-k", "parameters"),
    ),
    Mutant(
        "saves share their memory",
        "leaving.py",
        "if not whole or storage.data_ptr() in taken:",
        "if not whole:",
        RESULTS,
    ),
    Mutant(
        "a sweep in one batch writes the last row of all",
        "ir/passes/lift_constants.py",
        "if op.base in self.rows and op.index[:1] != (WHOLE,):",
        "if False:",
        ("tests/test_sweeping.py", "-k", "some_rows"),
    ),
    Mutant(
        "a sweep gives a point's value to the rows of another",
        "sweeping.py",
        "for values in differing]).repeat_interleave(rows, 0)",
        "for values in differing]).repeat(rows, *[1] * (type_.ndim - 1))",
        ("tests/test_sweeping.py", "-k", "alone and llama"),
    ),
    Mutant(
        "a sweep lets rows of the batch meet",
        "ir/passes/lift_constants.py",
        "if inferred.mixes or inferred.pins",
        "if inferred.pins",
        ("tests/test_sweeping.py", "-k", "one_by_one"),
    ),
    Mutant(
        "a splice forgets what was done to its features",
        "splicing.py",
        "        self._features = Features(self._recorder, value, self)\n",
        "        pass\n",
        ("tests/test_splicing.py", "-k", "direction"),
    ),
    Mutant(
        "the forward pass is left one site too early",
        "plan.py",
        "site.sequence > reached",
        "site.sequence < reached",
        RESULTS,
    ),
    Mutant(
        "the mask is made for another attention kernel than the model's own",
        "backends/attention.py",
        "ALL_MASK_ATTENTION_FUNCTIONS[implementation(config)](",
        'ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](',
        (*ATTENTION, "-k", "bit_identical and llama and eager"),
    ),
    Mutant(
        "looking at scores or pattern replaces the kernel",
        "backends/attention.py",
        "        if not self.replaces:\n",
        "        if weights is None:\n",
        (*ATTENTION, "-k", "bit_identical and llama and sdpa"),
    ),
    Mutant(
        "query heads are given the wrong keys and values",
        "backends/attention.py",
        "right[:, :, None].expand(batch, shared, heads // shared, *matrix)",
        "right[:, None].expand(batch, heads // shared, shared, *matrix)",
        (*ATTENTION, "-k", "written and llama"),
    ),
    Mutant(
        "a head is shown the keys and values of another",
        "heads.py",
        "numbers = tuple(head // shared for head in chosen.heads)",
        'numbers = tuple(head % widths["K"] for head in chosen.heads)',
        HEADS,
    ),
    Mutant(
        "queries and keys are taken for each other where one matrix makes both",
        "backends/architectures/gpt2.py",
        '"k": Tap("attn.c_attn", Side.OUT, view=HeadsView(_FUSED, 1))',
        '"k": Tap("attn.c_attn", Side.OUT, view=HeadsView(_FUSED, 0))',
        ("tests/conformance/test_reads.py", "-k", "gpt2"),
    ),
    Mutant(
        "written scores and patterns show the padding",
        "backends/attention.py",
        "if found is tensor or (real := self.real(found.device)) is None:",
        "if True or (real := self.real(found.device)) is None:",
        (*ATTENTION, "-k", "padding"),
    ),
    Mutant(
        "the implementation of attention stays switched",
        "backends/attention.py",
        "                    if config._attn_implementation == NAME:\n",
        "                    if False:\n",
        (*ATTENTION, "-k", "whatever_happens"),
    ),
    Mutant(
        "a module that is left out runs all the same",
        "backends/stand_in.py",
        "            code, new = self.calls[number]\n",
        "            code, new = self.calls[number]\n            own(*args, **kwargs)\n",
        SKIPPING,
    ),
    Mutant(
        "a forward of the user's own does not come back",
        "backends/hooks.py",
        'vars(module)["forward"] = had',
        'vars(module).pop("forward", None)',
        SKIPPING,
    ),
    Mutant(
        "sites inside of a module that is left out may be read",
        "ir/verify.py",
        "if write.instead.sequence < op.site.sequence < write.site.sequence:",
        "if write.instead.sequence < op.site.sequence < write.instead.sequence:",
        ("tests/ir/test_verify.py",),
    ),
    Mutant(
        "a tensor that the model changes in place later is not copied",
        "backends/module_hooks.py",
        "here.clone() if self.copies else here",
        "here",
        MODULES,
    ),
    Mutant(
        "a module amid named sites of one level takes a place after them",
        "backends/survey.py",
        "amid = last.order == coming.order",
        "amid = False",
        MODULES,
    ),
    Mutant(
        "the first call of a module is taken for each of them",
        "backends/module_hooks.py",
        "return run if number == self.call else None",
        "return run if number == 0 else None",
        ("tests/test_plain_models.py",),
    ),
    Mutant(
        "weights stay loaded after a stop",
        "backends/spread.py",
        "            if keeper.loaded:\n                keeper.unload()",
        "            pass",
        OFFLOAD,
    ),
    Mutant(
        "weights that the user has loaded are unloaded",
        "backends/spread.py",
        "[keeper for keeper in keepers if not keeper.loaded]",
        "list(keepers)",
        OFFLOAD,
    ),
    Mutant(
        "an offloaded weight is computed with where it has no data",
        "backends/anatomy.py",
        "if not found.is_meta:",
        "if True:",
        OFFLOAD,
    ),
    Mutant(
        "the parameters that accelerate put in the place of frozen ones stay frozen",
        "backends/hooks.py",
        "if now is not None and now is not parameter:",
        "if False:",
        OFFLOAD,
    ),
    Mutant(
        "programs do not notice that the model was moved",
        "compiling.py",
        "if compiled.spread != self.anatomy.spread.key:",
        "if False:",
        OFFLOAD,
    ),
    Mutant(
        "a model is not looked at again after it was spread anew",
        "backends/anatomy.py",
        "if known is None or known.state != state:",
        "if known is None:",
        OFFLOAD,
    ),
    Mutant(
        "a layer's input is edited where it comes from",
        "backends/local.py",
        "            tensor = moved(tensor, self.device)",
        "            pass",
        SPREAD,
    ),
    Mutant(
        "a constant that was moved to one device is used on all",
        "backends/transfer.py",
        "key = (id(constant.tensor), device)",
        'key = (id(constant.tensor), torch.device("cpu"))',
        SPREAD,
    ),
    Mutant(
        "what a read brought to a module's device is moved there again",
        "backends/local.py",
        "self.writes = code.writes or code.device is not None",
        "self.writes = code.writes",
        SPREAD,
    ),
    Mutant(
        "a sum over keys is taken to leave padding out whatever it holds there",
        "ir/keys.py",
        "return numbers is None or not all(",
        "return numbers is None and not all(",
        KEYS,
    ),
    Mutant(
        "a pattern is taken to be zero at padding after it was written, too",
        "ir/keys.py",
        "if op.version:",
        "if False:",
        KEYS,
    ),
    Mutant(
        "every value at padding is as in the first of several that are joined",
        "ir/padding.py",
        "numbers += held.padding",
        "numbers = numbers or [*held.padding]",
        KEYS,
    ),
    Mutant(
        "a graph that meets rows of different lengths is not asked about keys",
        "ir/retype.py",
        "keys is not None and keys.counts_padding(op)",
        "keys is not None and False",
        KEYS,
    ),
    Mutant(
        "zero times what is infinite at padding is zero",
        "ir/keys.py",
        "if not other.finite and is_other_keyed:",
        "if False:",
        KEYS,
    ),
    Mutant(
        "what is low for a soft-max does not depend on how low real scores are",
        "ir/padding.py",
        "return highest == -inf or highest < -2 * self.reach - 200",
        "return highest < -200",
        KEYS,
    ),
    Mutant(
        "a write that only a module that is not run would see is taken",
        "recorder.py",
        "            refuse_unseen(self.skipped, site, self.anatomy)\n",
        "            pass\n",
        ("tests/test_skipping.py", "-k", "any_order"),
    ),
    Mutant(
        "what takes the place of a module may overlook what was written to it",
        "recorder.py",
        "            refuse_overlooked(skipped, self.ops, self.locations, self.anatomy)\n",
        "            pass\n",
        ("tests/test_skipping.py", "-k", "any_order"),
    ),
    Mutant(
        "a skipped layer returns what came in before its module's input was written",
        "handles.py",
        "received = at_module if recorder.is_written(at_module) else received",
        "pass",
        ("tests/test_skipping.py", "-k", "after_the_writes_before"),
    ),
    Mutant(
        "a module is left out at the moment of the model that the graph was recorded for",
        "backends/replacing.py",
        "ops[number] = replace(op, instead=begins)",
        "pass",
        ("tests/test_skipping.py", "-k", "another_family"),
    ),
    Mutant(
        "a generation beyond a sliding window starts",
        "backends/windows.py",
        "if window is None or new == 1 or fed <= window:",
        "if True:",
        ("tests/conformance/test_attention.py", "-k", "forgets"),
    ),
    Mutant(
        "padding gets the lowest number where scores were written, which others may have too",
        "backends/attention.py",
        'torch.where(queries, found.new_full((), float("-inf")), lowest)',
        "lowest",
        KEYS,
    ),
)
