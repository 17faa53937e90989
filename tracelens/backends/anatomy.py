"""A loaded model under its family's table: what type each site has, and which module shows it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn

from tracelens.backends import users_plan
from tracelens.backends.architectures.lookup import family_of, require_shareable
from tracelens.backends.base import Family, ScaledView, Side, Tap, head_of, text_of
from tracelens.backends.experts import ON_RANKS, unfit
from tracelens.backends.layouts import (
    expert_ranks,
    parameter_layouts,
    require_divisible,
    site_layouts,
    styles_of,
)
from tracelens.backends.mesh import Mesh, mesh_of, own_part_of, skeleton
from tracelens.backends.module_sides import ModuleSides, language_model_passes
from tracelens.backends.packed import packed_at, parameter_at, require_one_process, sizes, unpacked
from tracelens.backends.places import placement
from tracelens.backends.replacing import needed_in_generation, replacement
from tracelens.backends.some_layers import SomeLayers
from tracelens.backends.spread import Keeper, Spread, spread_of, state_of
from tracelens.backends.transfer import loaded
from tracelens.errors import (
    LayoutError,
    MetaTensorError,
    UnknownArchitectureError,
)
from tracelens.ir.infer import dtype_of
from tracelens.ir.layout import Layout, Shard
from tracelens.ir.module_sites import INPUT, OUTPUT, Key, ModuleSite
from tracelens.ir.sites import KIND, KINDS, TEXT, Scope, Site
from tracelens.ir.types import TensorType
from tracelens.placement import Placement, Probed, Seen
from tracelens.subject import HeadOf, Proof


class ModelAnatomy:
    """The sites of one model, with types and hook points."""

    mesh: Mesh | None = None
    """The ranks that have the model together with this process."""
    elsewhere: Placement | None = None
    """Where ranks that this process owns have the model's parts; here it is a model without numbers."""
    probed: Probed | None = None
    """How tensors at modules lie on the ranks of this process, where that has been looked at."""
    seen: Seen | None = None
    """How named sites lie there, where only that tells."""
    distributed: frozenset[str] = frozenset()
    """The paths of modules that return DTensors on this rank, as far as that has been looked at."""
    proof: Proof | None = None
    """What the identities between sites say of this model."""
    _skeleton: nn.Module | None = None

    @property
    def _whole(self) -> nn.Module:
        """What the model is like as a whole: what one rank has of it is another thing."""
        return self.model if self._skeleton is None else self._skeleton

    def __init__(self, model: nn.Module, family: Family | None = None) -> None:
        """``family``: a table that is tried on a model of a type without one."""
        self.model = model
        config: Any = getattr(model, "config", None)
        if not isinstance(model, nn.Module) or config is None:  # pyright: ignore[reportUnnecessaryIsInstance]  # users may not be typed
            raise UnknownArchitectureError(
                f"a {type(model).__name__} is not a model of transformers",
                instead="tl.wrap(model) with a loaded model, or tl.load(name) with the name of one",
            )
        self.mesh = mesh_of(model)
        if self.mesh is not None:
            self._skeleton = skeleton(model)
        self.family = family_of(config) if family is None else family
        if self.mesh is not None and not self.mesh.by_user:
            require_shareable(self.family, tp=self.mesh.ranks > 1, pp=self.mesh.pipeline is not None)
        config = self.config = text_of(config)
        self.n_layers: int = config.num_hidden_layers
        neurons = getattr(config, self.family.neurons, None)
        heads: int = config.num_attention_heads
        self.widths: dict[str, int] = {
            "D": config.hidden_size,
            "M": neurons if neurons is not None else 4 * config.hidden_size,
            "V": config.vocab_size,
            "H": heads,
            "K": getattr(config, "num_key_value_heads", None) or heads,
            "d": getattr(config, "head_dim", None) or config.hidden_size // heads,
        }
        self.widths |= {
            name: getattr(config, word) if isinstance(word, str) else word(config)
            for name, word in self.family.widths.items()
        }
        self.widths.setdefault("c", self.widths["d"])
        self._withheld: dict[str, str | Mapping[int | None, str]] = {
            name: reason
            for option, (names, reason) in self.family.withheld.items()
            if getattr(config, option, False)
            for name in names
        }
        self.some = SomeLayers(self.family, config, self.n_layers)
        self._withheld |= self.some.reasons
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self._modules: dict[str, nn.Module] = {}
        self._types: dict[str, tuple[torch.dtype, TensorType]] = {}
        self._paths: dict[int, tuple[weakref.ref[torch.Tensor], str | None]] = {}
        self._points: dict[tuple[str, str], list[Site]] | None = None
        self.sides = ModuleSides(
            self._whole,
            lambda: language_model_passes(self._whole),
            self._hook_points,
            self._state,
            pretended="attention_mask",
        )
        self._check_layout()
        self._spread: Spread | None = None
        self._rows = self._embedding.shape[0]
        assert self.spread  # refuses what cannot be run

    def _check_layout(self) -> None:
        for kind in KINDS:
            tap = self.family.taps.get(kind.name)
            if tap is None:
                continue
            path = ""
            try:
                # Of several kinds of layers each one is looked at; one stands for all where they are alike.
                alike = (0,) if "{" not in tap.module else range(self.n_layers)
                for layer in self.some.layers.get(kind.name, alike):
                    path = self.module_path(tap, layer if kind.scope is Scope.LAYER else None)
                    self._whole.get_submodule(path)
            except AttributeError:
                raise UnknownArchitectureError(
                    f"this {type(self.model).__name__} has no module {path!r}, where the {self.family.name} table "
                    f"expects the site {kind.name!r}",
                    instead="a model with a language-model head, as AutoModelForCausalLM loads it",
                ) from None

    # --- sites -------------------------------------------------------------------------------------------------

    def layers_with(self, name: str) -> Sequence[int]:
        """The layers that have a site of a layer."""
        if Site(name).kind.scope is not Scope.LAYER or name not in self.family.taps:
            return ()
        return self.some.layers.get(name, range(self.n_layers))

    def in_all_layers(self, name: str) -> bool:
        """Is what holds for a site in one layer so in all?"""
        return name not in self.some.layers

    def absence(self, site: Site) -> str | None:
        """Why the model lacks a site, or ``None`` if it has it."""
        kind = KIND[site.name]
        if kind.scope in TEXT or site.name in self.family.taps:
            found = self._withheld.get(site.name)
            found = found if found is None or isinstance(found, str) else found.get(site.layer)
            return found or self._among_experts(site)
        return self.family.absent.get(site.name, f"the {self.family.name} table does not name it")

    def _among_experts(self, site: Site) -> str | None:
        """Why what each expert makes cannot be had in this model, if it is that and cannot."""
        tap = self.family.taps.get(site.name)
        if tap is None or tap.side is not Side.EXPERTS:
            return None
        places = () if self.elsewhere is None else self.elsewhere.places
        if (self.mesh is not None and self.mesh.ranks > 1) or any(place.ranks > 1 for place in places):
            return ON_RANKS
        return self._unfit_experts

    @cached_property
    def _unfit_experts(self) -> str | None:
        tap = self.family.taps["expert_out"]
        paths = [self.module_path(tap, layer) for layer in self.layers_with("expert_out")]
        return next(filter(None, (unfit(self._whole.get_submodule(path)) for path in paths)), None)

    def has(self, site: Site) -> bool:
        return self.absence(site) is None

    def withhold(self, reasons: Mapping[str, str]) -> None:
        """Sites that the table names, and that are not to be used in this model."""
        self._withheld |= reasons

    def type_of(self, site: Site) -> TensorType:
        if isinstance(site, ModuleSite):
            found = self.sides.type_of(site)
            if self.mesh is not None or self.elsewhere is not None:
                placement(self).require_known(site)
            return found
        reason = self.absence(site)
        if reason is not None:
            raise self.some.absent(self.family, site, reason)
        dtype = self.dtype
        known = self._types.get(site.name)
        if known is not None and known[0] is dtype:
            return known[1]
        kind = KIND[site.name]
        shape = tuple(self.widths[dim] if isinstance(dim, str) else dim for dim in kind.shape)
        tap = self.family.taps.get(site.name)
        own = None if tap is None else tap.dtype
        found = TensorType(own or kind.dtype or dtype_of(dtype), shape)
        self._types[site.name] = (dtype, found)
        return found

    def _state(self) -> tuple[torch.dtype, int]:
        """What the shapes and dtypes at modules depend on, and may change."""
        return self.dtype, self.vocabulary

    def _hook_points(self) -> dict[tuple[str, str], list[Site]]:
        """The named sites at each side of a module."""
        found: dict[tuple[str, str], list[Site]] = {}
        for kind in KINDS:
            tap = self.family.taps.get(kind.name)
            if tap is None or tap.side not in (Side.IN, Side.OUT):
                continue
            for layer in self.layers_with(kind.name) if kind.scope is Scope.LAYER else (None,):
                site = Site(kind.name, layer)
                found.setdefault((self.module_path(tap, layer), tap.side.value), []).append(site)
        return found

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream."""
        return self._embedding.dtype

    @property
    def vocabulary(self) -> int:
        """The number of token ids that the model knows now: ``resize_token_embeddings`` may have changed it."""
        rows = self._embedding.shape[0]
        if rows != self._rows:
            self._rows = rows
            self.widths["V"] = self.config.vocab_size
            self._types.clear()
            self._modules.clear()  # transformers puts another unembedding in the place of the old one
        return self.widths["V"]

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return self.spread.inputs

    @property
    def keepers(self) -> tuple[Keeper, ...]:
        """What loads offloaded weights, as far as it is known."""
        return () if self._spread is None else self._spread.keepers

    @property
    def spread(self) -> Spread:
        """Where the model's parts run, as it is now."""
        state = self._spread_state() if self.mesh is None else ()
        known = self._spread
        if self.mesh is not None and known is not None:
            return known
        if known is None or known.state != state:
            known = self._spread = spread_of(self.model, state, self._head)
        return known

    def _spread_state(self) -> tuple[object, ...]:
        embedding = self.module(self.family.rows)
        return state_of(self.model, embedding, self._embedding)

    @property
    def _head(self) -> str | None:
        """The path of the module with the largest output, if the model returns it."""
        return self.family.taps["lm_head"].module

    @property
    def _embedding(self) -> torch.Tensor:
        # Looked up in the module's own table: attribute access goes through all tables, and this is asked in every run.
        path = self.family.rows
        module = self.module(path) if self.mesh is None else self._whole.get_submodule(path)
        found = module._parameters.get("weight")
        return found if found is not None else cast(torch.Tensor, module.weight)

    def tap(self, site: Site) -> tuple[nn.Module, Tap, str]:
        """The module that shows a site, how it does, and the module's path."""
        tap = self.family.taps[site.name]
        path = self.module_path(tap, site.layer)
        return self.module(path), tap, path

    def factor(self, tap: Tap) -> float:
        """What the model multiplies a module's tensor with before it is the site."""
        return float(getattr(self.config, tap.view.by)) if isinstance(tap.view, ScaledView) else 1.0

    def module_path(self, tap: Tap, layer: int | None) -> str:
        return self.family.path(tap, self.config, layer)

    def module(self, path: str) -> nn.Module:
        known = self._modules.get(path)
        if known is None:
            known = self._modules[path] = self.model.get_submodule(path)
        return known

    def begins(self, site: Site) -> ModuleSite:
        """The moment before the module that makes a site; :class:`ReplacementError` where none can be left out."""
        return replacement(self, site).begins

    def needed_in_generation(self, path: str) -> str | None:
        return needed_in_generation(self, path)

    def named_at(self, path: str, side: str) -> list[Site]:
        """The named sites at a side of a module."""
        if self._points is None:
            self._points = self._hook_points()
        return self._points.get((path, side), [])

    def names_at(self, site: ModuleSite) -> list[Site]:
        """The named sites that a module's side shows, or that the module makes of what it receives there."""
        made = self.named_at(site.path, OUTPUT) if site.side == INPUT else []
        return [*self.named_at(site.path, site.side), *made]

    def stream_input(self, site: Site) -> ModuleSite:
        """The side of a module at which a site is what the module receives."""
        _, tap, path = self.tap(site)
        call = self.sides.call_of(path, None)
        key: Key = (0,) if tap.key is None or (tap.key,) not in call.inputs else (tap.key,)
        return call.inputs[key].site

    @cached_property
    def attention_configs(self) -> tuple[Any, ...]:
        """The configurations that modules look in for the implementation of attention: mostly one."""
        found = {
            id(config): config
            for module in self.model.modules()
            if hasattr(config := getattr(module, "config", None), "_attn_implementation")
        }
        return tuple(found.values())

    # --- ranks -------------------------------------------------------------------------------------------------

    @cached_property
    def site_layouts(self) -> Mapping[str, Layout]:
        """The sites that ranks have in parts, by name."""
        if self.mesh is None or self.mesh.ranks == 1 or self.mesh.by_user:
            return {}
        require_divisible(self.config, self.mesh.ranks, expert_ranks(self.config))
        return site_layouts(self, styles_of(self.model))

    @cached_property
    def parameter_layouts(self) -> Mapping[str, Layout]:
        """The parameters that ranks have in parts, by path."""
        return self._parameters_apart[0]

    @cached_property
    def _parameters_apart(self) -> tuple[Mapping[str, Layout], frozenset[str]]:
        if self.mesh is None or self.mesh.ranks == 1:
            return {}, frozenset()
        if self.mesh.by_user:
            return users_plan.parameter_layouts(self.model)
        return parameter_layouts(self._whole, self.model, styles_of(self.model))

    def local_widths(self, site: Site) -> Mapping[str, int]:
        """The widths of a site's tensor as one rank has it."""
        if self.mesh is None:
            return self.widths
        by_user = self.mesh.by_user and self.mesh.ranks > 1
        if placement(self).layout_of(site) != Shard(2) if by_user else site.name not in self.site_layouts:
            return self.widths
        return {
            name: width // self.mesh.ranks if name in ("H", "K", "M") else width
            for name, width in self.widths.items()
        }

    # --- parameters --------------------------------------------------------------------------------------------

    @property
    def head(self) -> HeadOf:
        """How logits are made of the last residual stream."""
        return head_of(self.family, self._whole, self.vocabulary)

    def output_projection(self, layer: int) -> tuple[str, bool]:
        """The path of the matrix that a layer's heads write through, and whether it is [D, H * d] or [H * d, D]."""
        return self.module_path(self.family.taps["z"], layer) + ".weight", self.family.out_by_in

    def parameter(self, path: str) -> torch.Tensor:
        """A parameter or buffer of the model, by its path; where ranks share the model, one without numbers.

        Of a linear module that packs or adapts its matrix, ``weight`` is the matrix that it multiplies by.
        """
        if (module := packed_at(self._whole, path)) is not None:
            return unpacked(module, path, self.dtype)
        return parameter_at(self._whole, path)

    def weight(
        self,
        path: str,
        journeys: list[tuple[str, str, str, int]] | None = None,
        lends: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """A parameter or buffer with its numbers; one that is offloaded is brought to where its module computes.

        ``journeys`` gets what is moved for that: source, target, kind and bytes. ``lends`` is told of the tensor if
        its memory is the model's, rather than loaded for this use. Raises :class:`MetaTensorError` where there are no
        numbers.
        """
        found = (self.parameter(path) if self.mesh is None else own_part_of(self.model, path)).detach()
        if packed_at(self._whole, path) is not None:
            return found  # made for this use
        if not found.is_meta:
            if path in self.spread.fleeting:
                return found.clone()  # it goes when its module has run, or with whoever has loaded it
            if lends is not None:
                lends(found)
            return found
        kept = self.spread.weight(path)
        if kept is None:
            raise MetaTensorError(
                f"{path!r} has no data (it is on the meta device), so nothing can be computed with it",
                instead="a model with its weights: tl.load(...) without weights=False",
            )
        tensor = loaded(kept, found.dtype, self.spread.device_of(path))
        if tensor.device != kept.device:
            if journeys is not None:
                journeys.append((str(kept.device), str(tensor.device), "weights", kept.nbytes))
        elif lends is not None and path not in self.spread.fleeting:
            lends(tensor)
        return tensor

    def parameter_type(self, path: str) -> TensorType:
        if path in self._parameters_apart[1]:
            raise LayoutError(
                f"{path!r} lies on its ranks in parts that are packed into each other, and cannot be read as a value",
                instead="the sites around its module",
            )
        if (module := packed_at(self._whole, path)) is not None:
            require_one_process(module, path, self.mesh)
            return TensorType(dtype_of(self.dtype), sizes(module) or ())
        found = self.parameter(path)
        return TensorType(dtype_of(found.dtype), tuple(found.shape))

    def parameter_path(self, tensor: torch.Tensor) -> str | None:
        known = self._paths.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        if isinstance(tensor, nn.Parameter) or not self._paths:
            for path, own in (*self.model.named_parameters(), *self.model.named_buffers()):
                self._paths[id(own)] = (weakref.ref(own), path)
            known = self._paths.get(id(tensor))
            if known is not None and known[0]() is tensor:
                return known[1]
            # Not ours: remember that, so that another module's weights are looked for only once.
            self._paths[id(tensor)] = (weakref.ref(tensor), None)
        return None
