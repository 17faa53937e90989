"""The stages of a pipeline, seen from one rank: what travels between them, and how a pass is driven through them.

transformers cuts the layers into stages and leaves placeholders for the layers of others. Its own forward makes every
stage wait for the next tensor, whatever happens, and sends the logits to all. Here each stage runs its own part of the
pass and hands the stream on; stages that nothing needs are not entered, so nobody waits for one that has stopped early.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from tracelens.backends.groups import once_in_a_world
from tracelens.errors import LayoutError


class Pipeline:
    """One rank's stage. Tensors travel between ranks that have the same part of their stages."""

    def __init__(self, model: nn.Module, device_mesh: Any) -> None:
        import torch.distributed as dist

        hf: Any = model
        self._model = hf
        own: Any = hf._pp_stage
        self.stage: int = own.pp_rank
        self.stages: int = own.pp_size
        n_layers: int = hf.config.num_hidden_layers
        ranges = [own.layer_range_for_rank(stage, n_layers) for stage in range(self.stages)]
        self.layers = tuple(
            next(stage for stage, (first, end) in enumerate(ranges) if first <= layer < end)
            for layer in range(n_layers)
        )
        ranks = device_mesh.mesh.reshape(self.stages, -1)
        self._speaker = int(ranks[-1, 0])
        column = int((ranks[self.stage] == dist.get_rank()).nonzero()[0, 0])
        self._peers: list[int] = ranks[:, column].tolist()
        # Apart from the stream's own group: what a plan sends may overtake the stream, and be overtaken.
        self.group = cast(
            dist.ProcessGroup, once_in_a_world("what plans send between stages", dist.new_group)
        )
        self._underway: list[Any] = []

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    # --- what a plan sends ---------------------------------------------------------------------------------------

    def send(self, tensor: torch.Tensor, stage: int) -> None:
        """Sends a tensor to a stage; the pass goes on at once."""
        import torch.distributed as dist

        data = _bytes(tensor.detach().contiguous())
        self._underway.append((dist.isend(data, self._peers[stage], group=self.group), data))

    def receive(
        self, shape: tuple[int, ...], dtype: torch.dtype, stage: int, device: torch.device
    ) -> torch.Tensor:
        """The next tensor that a stage sends here."""
        import torch.distributed as dist

        found = torch.empty(shape, dtype=dtype, device=device)
        data = _bytes(found)
        dist.recv(data, self._peers[stage], group=self.group)
        return found

    @property
    def speaks(self) -> bool:
        """Is this the first rank of the last stage?"""
        import torch.distributed as dist

        return dist.get_rank() == self._speaker

    def told(self, tensor: torch.Tensor) -> torch.Tensor:
        """Makes a tensor the same on all ranks of all stages: that of the rank that :attr:`speaks`, in place."""
        import torch.distributed as dist

        dist.broadcast(_bytes(tensor), src=self._speaker, group=self.group)
        return tensor

    def settle(self) -> None:
        """Returns when everything that was sent has left."""
        while self._underway:
            self._underway.pop(0)[0].wait()

    # --- the pass ------------------------------------------------------------------------------------------------

    def forward(self, inputs: Mapping[str, Any], last: int) -> None:
        """This stage's part of a pass that goes on to stage ``last``."""
        if self.stage > last:
            return
        hf = self._model
        given = self.entering(inputs)
        if self.is_last:
            with _own_forward(hf):
                hf(**given)
            return
        found = self.base(**given)
        if self.stage < last:
            self.hand_on(found.last_hidden_state)

    @property
    def base(self) -> nn.Module:
        """The model below its head, which is all that stages before the last one have of it."""
        return getattr(self._model, self._model.base_model_prefix)

    def entering(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What this stage's layers are given in a pass: the tokens, or the stream of the stage before."""
        given = dict(inputs)
        if self.stage:
            hf = self._model
            ids = given.pop("input_ids")
            given["inputs_embeds"] = hf._pp_stage.communicate(
                "recv_forward", device=ids.device, dtype=hf.dtype, shape=(*ids.shape, hf.config.hidden_size)
            )
        return given

    def hand_on(self, stream: torch.Tensor) -> None:
        """Gives the stream to the next stage."""
        self._model._pp_stage.communicate(
            "send_forward", device=stream.device, dtype=stream.dtype, tensor=stream
        )


@contextmanager
def _own_forward(hf: Any) -> Iterator[None]:
    """The model's forward without the pipeline that transformers put around it, under the hooks of the model itself."""
    before = vars(hf)["forward"]
    hf.forward = before.__wrapped__
    try:
        yield
    finally:
        hf.forward = before


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as plain bytes, which every backend can send."""
    return cast(
        torch.Tensor, tensor.view(-1).view(torch.uint8) if tensor.ndim else tensor.view(1).view(torch.uint8)
    )


_CUT_AT = ("embed_tokens", "layers", "norm")


def require_cut(config: Any) -> None:
    """Refuses models that transformers would cut into stages wrongly.

    It goes by the names of three modules. An embedding or a last norm of another name stays in every stage, and the
    stream is normed once for each.
    """
    plan: Mapping[str, Any] | None = getattr(config, "base_model_pp_plan", None)
    if not plan:
        raise LayoutError(
            f"transformers has no plan by which {config.model_type} is cut into stages", instead=_INSTEAD
        )
    if not set(_CUT_AT) <= set(plan):
        others = ", ".join(repr(name) for name in plan if name not in _CUT_AT)
        raise LayoutError(
            f"transformers cuts models into stages at modules called {', '.join(map(repr, _CUT_AT))}, and would leave "
            f"{others} of {config.model_type} in every stage",
            instead=_INSTEAD,
        )


_INSTEAD = 'tl.load(name, device_map="auto"), which spreads the layers over devices'


def pipeline_of(model: nn.Module) -> Pipeline | None:
    """The stages that transformers cut a model into, if it did."""
    own: Any = getattr(model, "_pp_stage", None)
    if own is None or own.pp_size == 1:
        return None
    hf = cast(Any, model)
    require_cut(hf.config)
    return Pipeline(model, hf._device_mesh)
