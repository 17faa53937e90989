"""``model.logit_lens(prompt)``: what every layer would say next, at every position, also while text is generated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tracelens.errors import Blaming, LensError
from tracelens.lens.directions import token_id_of
from tracelens.lens.result import LensResult
from tracelens.lens.results import LensResults
from tracelens.lens.statistics import STORED
from tracelens.lens_value import Lens, Translator
from tracelens.location import here
from tracelens.token_texts import token_texts

if TYPE_CHECKING:
    from tracelens.model import Model

METRICS = ("log_prob", "rank", "entropy", "kl")
"""What is computed beside the likeliest tokens, unless something else is asked for."""

Positions = str | int | slice | Sequence[int]


@dataclass(frozen=True)
class Asked:
    """What a lens is to say, and where."""

    components: tuple[str, ...]
    layers: tuple[int, ...]
    positions: Positions
    top_k: int
    metrics: tuple[str, ...]
    tracked: Mapping[str, int]
    lens: Translator | None
    workspace: int | None


def logit_lens(
    model: Model,
    prompt: Any,
    *,
    generate: int = 0,
    components: str | Sequence[str] = ("resid_post",),
    layers: str | int | Iterable[int] = "all",
    positions: Positions = "all",
    top_k: int = 10,
    track: Sequence[str | int] | Mapping[str, int] = (),
    metrics: Sequence[str] = METRICS,
    lens: Translator | None = None,
    edit: Callable[[Any], object] | None = None,
    batch_size: int | None = None,
    workspace: int | None = None,
    **options: Any,
) -> LensResult | LensResults:
    """What every layer would say next, at every position: the logit lens (nostalgebraist 2020), ready to look at.

    ``prompt``: as for :meth:`trace`; one gives a :class:`tracelens.LensResult`, a list of them
    :class:`tracelens.LensResults`. ``generate``: so many tokens are generated, and looked at while they are made
    (the last one is not run through the model); ``options`` are those of :meth:`generate`. ``components``: sites
    of a layer as wide as the residual stream. ``layers``: "all", or some. ``positions``: "all", "prompt",
    "generated", "last", or tokens of the prompt as for ``.tok``.

    For each of these the ``top_k`` likeliest tokens with their log-probabilities over the whole vocabulary, and
    ``metrics``: ``log_prob`` and ``rank`` of the token that follows, ``entropy``, ``kl`` from the final layer,
    ``logsumexp``. ``track``: tokens whose log-probability and rank are wanted everywhere. ``lens``: a
    :class:`tracelens.TunedLens`. ``edit``: a function that is called in the block with ``t``, before anything is
    read, for interventions. ``batch_size``: how many prompts run together. ``workspace``: bytes that logits in hand
    may take. No logits are kept: memory is the states of the pass, the workspace and the result.

    Raises :class:`~tracelens.errors.LensError` for what is not there to be looked at, and what
    :meth:`trace` and :meth:`generate` raise.

    >>> lens = model.logit_lens("The capital of France is")                      # doctest: +SKIP
    >>> lens.plot("entropy")                                                     # doctest: +SKIP
    """
    if type(generate) is not int or generate < 0:
        raise LensError(
            f"generate={generate!r} is no number of new tokens", at=here(), instead="generate=100"
        )
    if options and not generate:
        raise LensError(
            f"{', '.join(options)}: options of a generation, and no text is generated",
            at=here(),
            instead=f"generate=100, {next(iter(options))}=...",
        )
    asked = Asked(
        _components(components),
        _layers(layers, model.n_layers),
        _positions(positions, generate),
        top_k,
        _metrics(metrics),
        _tracked(track, model),
        lens,
        workspace,
    )
    if lens is not None:
        lens.check(model)
    single = _is_one(prompt)
    prepared = model.tokens(prompt)
    if generate:
        with model.generate(prompt, max_new_tokens=generate, batch_size=batch_size, **options) as t:
            _look(model, t, asked, edit, generating=True)
        made: list[Any] = t.tokens
        new: list[list[int]] = made if not made or isinstance(made[0], list) else [made]
    else:
        with model.trace(prompt, batch_size=batch_size) as t:
            _look(model, t, asked, edit, generating=False)
        new = [[] for _ in prepared]
    names = "logit lens" if lens is None else str(getattr(lens, "name", lens))
    found = tuple(
        _of_row(model, t, asked, row, [token.id for token in tokens], list(new[row]), names)
        for row, tokens in enumerate(prepared)
    )
    return found[0] if single and len(found) == 1 else LensResults(found)


# --- in the block --------------------------------------------------------------------------------------------------


def _look(
    model: Model, t: Any, asked: Asked, edit: Callable[[Any], object] | None, *, generating: bool
) -> None:
    """Records the edits of the user, and then what is asked."""
    if edit is not None:
        edit(t)
    where: Any = model
    if generating and asked.positions == "generated":
        where = t.decode
    elif generating and asked.positions != "all":
        where = t.prefill
    following = _at(where.next_tokens, asked.positions)
    following.save("next")
    for component in asked.components:
        values = _at(getattr(where.layers[list(asked.layers)], component), asked.positions)
        lens = model.lens(values, asked.lens, workspace=asked.workspace)
        lens.topk(asked.top_k).save(f"{component}.top")
        for metric in asked.metrics:
            _metric(lens, metric, following).save(f"{component}.{metric}")
        for number, token in enumerate(asked.tracked.values()):
            lens.log_prob(token).save(f"{component}.tracked.{number}.log_prob")
            lens.rank(token).save(f"{component}.tracked.{number}.rank")


def _at(value: Any, positions: Positions) -> Any:
    """A value at some tokens of the prompt; those of a window of steps are all of it."""
    if positions in ("all", "prompt", "generated"):
        return value
    if positions == "last":
        return value.tok[-1:]
    if isinstance(positions, int):
        return value.tok[[positions]]
    return value.tok[positions if isinstance(positions, slice) else list(positions)]


def _metric(lens: Lens, metric: str, following: Any) -> Any:
    ask = getattr(lens, metric)
    return ask(following) if metric in ("log_prob", "rank") else ask()


# --- after it ------------------------------------------------------------------------------------------------------


def _of_row(
    model: Model, t: Any, asked: Asked, row: int, prompt: list[int], new: list[int], name: str
) -> LensResult:
    """The result of one prompt."""

    def of_row(saved: str) -> Tensor:
        """[L, T, ...] of a save that is [L, B, T, ...], or one [L, 1, T, ...] for each row."""
        found = t[saved]
        return found[row][:, 0] if isinstance(found, list) else found[:, row]

    following = t["next"]
    following = following[row][0] if isinstance(following, list) else following[row]
    text = [*prompt, *new]
    spots = _spots(asked.positions, len(prompt), following.shape[-1])
    count = len(spots)
    tops = [of_row(f"{component}.top.indices")[:, :count] for component in asked.components]
    top_ids = torch.stack(tops)
    ids, next_ids = torch.tensor([text[spot] for spot in spots]), following[:count].clone()

    def stacked(name: str) -> Tensor:
        members = [of_row(f"{component}.{name}")[:, :count] for component in asked.components]
        found = torch.stack(members)
        return found if found.dtype == torch.int64 else found.float()

    followed = range(len(asked.tracked))
    tracked = {
        kind: torch.stack([stacked(f"tracked.{number}.{kind}") for number in followed], -1)
        for kind in ("log_prob", "rank")
        if asked.tracked
    }
    everything = torch.cat([ids, next_ids[next_ids >= 0], top_ids.flatten()]).unique().tolist()
    config: Any = model.config
    return LensResult(
        asked.components,
        asked.layers,
        tuple(spots),
        ids,
        next_ids,
        len(prompt),
        top_ids,
        stacked("top.values"),
        {metric: stacked(metric) for metric in asked.metrics},
        token_texts([*everything, *asked.tracked.values()], model.tokenizer),
        model=str(getattr(config, "_name_or_path", "") or config.model_type).rstrip("/").rpartition("/")[2],
        lens=name,
        tracked=asked.tracked,
        tracked_log_probs=tracked.get("log_prob"),
        tracked_ranks=tracked.get("rank"),
    )


def _spots(positions: Positions, length: int, columns: int) -> list[int]:
    """The absolute positions of a row that were looked at."""
    if positions == "generated":
        return list(range(length, length + columns))
    if positions in ("all", "prompt"):
        return list(range(columns))
    if positions == "last":
        return [length - 1]
    if isinstance(positions, slice):
        return list(range(length))[positions]
    several = [positions] if isinstance(positions, int) else list(positions)
    return [int(spot) % length for spot in several]


# --- what was asked ------------------------------------------------------------------------------------------------


def _is_one(prompt: Any) -> bool:
    """Is a prompt one, and no list of several?"""
    if isinstance(prompt, str):
        return True
    if isinstance(prompt, list):
        return bool(prompt) and isinstance(prompt[0], int | dict)
    return getattr(prompt, "ndim", 2) == 1


def _components(components: str | Sequence[str]) -> tuple[str, ...]:
    found = (components,) if isinstance(components, str) else tuple(components)
    if not found or len(set(found)) != len(found):
        raise LensError(
            f"components={components!r} are not some sites, each once",
            at=here(),
            instead='components=("attn_out", "mlp_out", "resid_post")',
        )
    return found


def _layers(layers: str | int | Iterable[int], count: int) -> tuple[int, ...]:
    if layers == "all":
        return tuple(range(count))
    wanted = [layers] if isinstance(layers, int) else list(layers)
    if not wanted or not all(type(layer) is int and -count <= layer < count for layer in wanted):
        raise LensError(
            f"layers={layers!r} of a model with {count} layers", at=here(), instead="layers=range(0, 20, 4)"
        )
    return tuple(sorted({layer % count for layer in wanted if isinstance(layer, int)}))


def _positions(positions: Positions, generate: int) -> Positions:
    words = ("all", "prompt", "generated", "last")
    if isinstance(positions, str) and positions not in words:
        raise LensError(f"positions={positions!r}", at=here(), instead=f"one of {', '.join(words)}")
    if positions == "generated" and generate < 2:
        raise LensError(
            "the positions of generated tokens are looked at when the next token is made, and "
            + (f"generate={generate}" if generate else "no text is generated"),
            at=here(),
            instead='generate=100, positions="generated"',
        )
    if isinstance(positions, Sequence) and not isinstance(positions, str):
        several = [int(spot) for spot in positions]
        if sorted({*several}) != several or (several[0] < 0 <= several[-1]):
            raise LensError(
                f"positions={positions!r} are not in order, each once",
                at=here(),
                instead="positions=[0, 3, 5]; or [-3, -1], counted from the end",
            )
        return tuple(several)
    return positions


def _metrics(metrics: Sequence[str]) -> tuple[str, ...]:
    found = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    wrong = [metric for metric in found if metric not in STORED or not hasattr(Lens, metric)]
    if wrong:
        known = ", ".join(name for name in STORED if hasattr(Lens, name))
        raise LensError(f"no lens computes {wrong[0]!r}", at=here(), instead=f"some of {known}")
    return tuple(dict.fromkeys(found))


def _tracked(track: Sequence[str | int] | Mapping[str, int], model: Model) -> Mapping[str, int]:
    if isinstance(track, Mapping):
        return dict(track)
    found: dict[str, int] = {}
    for token in (track,) if isinstance(track, str) else track:
        with Blaming(here()):
            number = token_id_of(model, token)
        name = token if isinstance(token, str) else token_texts([number], model.tokenizer)[number]
        found[name] = number
    return found
