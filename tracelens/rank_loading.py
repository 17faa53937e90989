"""Models that are spread over ranks when they are loaded: on ranks of this process's own, or under torchrun."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tracelens.backends.architectures.lookup import family_of, require_shareable, require_table
from tracelens.backends.architectures.registry import families_of, told
from tracelens.backends.layouts import require_divisible
from tracelens.backends.pipeline import require_cut
from tracelens.backends.places import look_at
from tracelens.backends.rank_versions import EXPERTS, STAGES_OF_RANKS, require_known, require_known_vocabulary
from tracelens.backends.sharded_loading import load_part
from tracelens.backends.users_plan import load_parallelized, require_name
from tracelens.errors import Blaming, LayoutError, OptionError
from tracelens.location import here
from tracelens.model import Model
from tracelens.pretrained import SOURCES, embedded_model
from tracelens.ranked import Parts
from tracelens.remote import placement_from

if TYPE_CHECKING:
    from tracelens.backends.ranks.pool import Ranks

Sizes = Mapping[str, int]


def checked_sizes(
    tp: int, pp: int, ep: int, ranks: Ranks | None, *, apart: bool, parallelize: object = None
) -> dict[str, int]:
    """The numbers of ranks that were asked for, if they make sense together."""
    with Blaming(here()):
        for name, size in (("tp", tp), ("pp", pp), ("ep", ep)):
            if type(size) is not int or size < 1:
                raise OptionError(
                    f"{name}={size!r} is no number of ranks", instead=f"a whole number: {name}=2, or {name}=4"
                )
        if apart:
            raise OptionError(
                "tp=, pp= and ep= load the parts of a model on ranks, so that device_map= and weights=False have no "
                "place beside them",
                instead="tl.load(name, tp=2), or tl.load(name, device_map=...)",
            )
        if ep > 1 and ep != tp:
            raise OptionError(
                f"experts are spread over the ranks that share a layer: ep={ep} needs tp={ep}, not {tp}",
                instead=f"tl.load(name, tp={ep}, ep={ep})",
            )
        if parallelize is not None:
            require_name(parallelize)
            if tp == 1 or pp != 1 or ep != 1:
                raise OptionError(
                    f"parallelize={parallelize!r} spreads layers over ranks that share each of them: it goes with tp= "
                    "alone",
                    instead=f"tl.load(name, tp=2, parallelize={parallelize!r})",
                )
        if ranks is not None and not hasattr(ranks, "world"):
            raise OptionError(
                f"ranks={ranks!r} are no ranks: they are processes that are there already",
                instead=f"tl.load(name, tp={tp}, pp={pp}), which starts its own; or ranks=tl.Ranks({tp * pp})",
            )
        if ranks is not None and ranks.world != tp * pp:
            raise OptionError(
                f"tp={tp} and pp={pp} take {tp * pp} ranks, and there are {ranks.world}",
                instead=f"Ranks({tp * pp}), or no ranks= at all",
            )
    return {"tp": tp, "pp": pp, "ep": ep}


def load_over_ranks(
    name: str | Path,
    sizes: Sizes,
    dtype: Any,
    ranks: Ranks | None,
    timeout: float | None,
    options: Mapping[str, Any],
    parallelize: str | None = None,
) -> Model:
    """The model, spread over ranks. What the configuration rules out is refused before anything is launched."""
    from transformers import AutoConfig

    source = str(embedded_model(str(name))) if str(name) in SOURCES else str(name)
    config = AutoConfig.from_pretrained(source)
    with Blaming(here()):
        require_table(config, source)
    if parallelize is None:
        require_fit(config, sizes)
    tokenizer = tokenizer_of(source)
    if ranks is None and under_torchrun():
        with Blaming(here()):
            if parallelize is None:
                part = load_part(source, **sizes, dtype=dtype, options=options)
            else:
                part = load_parallelized(source, parallelize, ranks=sizes["tp"], dtype=dtype, options=options)
            model = Model(part, tokenizer)
            look_at(model.anatomy)
        return model
    from transformers import AutoModelForCausalLM

    from tracelens.backends.ranks.pool import Ranks

    with Blaming(here()):
        families = told(config.model_type)
        parts = Parts(
            ranks if ranks is not None else Ranks(sizes["tp"] * sizes["pp"], timeout=timeout),
            owns=ranks is None,
            timeout=timeout,
        )
        about = parts.load(source, sizes, str(dtype).removeprefix("torch."), options, parallelize, families)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, about["dtype"])).eval()
    if str(name) in SOURCES:
        whole.config.name_or_path = str(name)  # not the folder in the cache, whose name has a version of ours
    return Model(whole, tokenizer, parts, placement_from(about["placement"]))


def require_fit(config: Any, sizes: Sizes) -> None:
    """Refuses numbers of ranks and stages that a model cannot be shared by, and names some that it can."""
    with Blaming(here()):
        if families_of(config.model_type):
            require_shareable(family_of(config), tp=sizes["tp"] > 1, pp=sizes["pp"] > 1)
        if sizes["tp"] > 1:
            # gpt-oss has one for its experts alone.
            plans = ("base_model_tp_plan", *(("base_model_ep_plan",) if sizes.get("ep", 1) > 1 else ()))
            if not any(getattr(config, plan, None) for plan in plans):
                raise LayoutError(
                    f"transformers has no plan by which ranks share a layer of {config.model_type}",
                    instead='tl.load(name, device_map="auto"), which spreads the layers over devices',
                )
            require_divisible(config, sizes["tp"], sizes.get("ep", 1))
            require_known_vocabulary(config, sizes["tp"])
        if sizes.get("ep", 1) > 1:
            _require_experts(config, sizes)
        if sizes["pp"] > 1:
            require_cut(config)
            if sizes["tp"] > 1:
                require_known(
                    STAGES_OF_RANKS, f"tl.load(name, pp={sizes['pp']}), or tl.load(name, tp={sizes['tp']})"
                )
        if sizes["pp"] > config.num_hidden_layers:
            raise OptionError(
                f"pp={sizes['pp']} stages cannot share {config.num_hidden_layers} layers",
                instead=f"at most pp={config.num_hidden_layers}",
            )


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What the configurations of transformers call the number of experts."""


def _require_experts(config: Any, sizes: Sizes) -> None:
    """Refuses to spread experts where there are none, or where transformers cannot."""
    whole_layers = f"tl.load(name, tp={sizes['tp']}), where each rank has a part of every expert"
    if not any(getattr(config, name, None) for name in _EXPERTS):
        raise LayoutError(
            f"{config.model_type} has no experts that ep={sizes['ep']} ranks could share",
            instead=f"tl.load(name, tp={sizes['tp']}), where each rank has a part of every layer",
        )
    if not getattr(config, "base_model_ep_plan", None):
        raise LayoutError(
            f"transformers has no plan by which ranks share experts of {config.model_type}",
            instead=whole_layers,
        )
    require_known(EXPERTS, whole_layers)
    if sizes["pp"] > 1:
        raise LayoutError(
            "transformers spreads experts over ranks in models of one stage alone: "
            f"ep={sizes['ep']} and pp={sizes['pp']} do not go together",
            instead=f"tl.load(name, pp={sizes['pp']}, tp={sizes['tp']}), where each rank has a part of every expert",
        )


def under_torchrun() -> bool:
    """Is this process one of several that run the same script?"""
    return torch.distributed.is_initialized() or "TORCHELASTIC_RUN_ID" in os.environ


def tokenizer_of(source: str) -> Any:
    """The tokenizer that lies beside a model, if there is one."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        return None  # a folder with weights alone: prompts are token ids then
