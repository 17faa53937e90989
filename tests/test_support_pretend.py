"""The pretend accelerator refuses what GPUs refuse, counts exactly, and is torch's own in everything else."""

from __future__ import annotations

import copy
import gc
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.pretend import Copy, Pretend, device, pretend, watched

__all__ = ["pretend"]

ZERO, ONE = "pretend:0", "pretend:1"


def here() -> str:
    """The line of the caller, as the records write it."""
    frame = sys._getframe(1)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def test_this_torch_has_what_it_takes() -> None:
    """So that nothing here is skipped unseen: only a machine with GPUs has a reason for it."""
    if not torch.cuda.is_available() and torch.__version__ >= "2.13":
        assert device.missing() is None


# -- devices ------------------------------------------------------------------------------------------------------


def test_every_way_to_make_a_tensor_there(pretend: Pretend) -> None:
    made = [
        torch.empty(2, 3, device=ONE),
        torch.zeros(2, 3, device=ONE),
        torch.ones(2, 3, device=ONE),
        torch.full((2, 3), 7, device=ONE),
        torch.arange(6, device=ONE).reshape(2, 3),
        torch.randn(2, 3, device=ONE),
        torch.rand(2, 3, device=ONE),
        torch.tensor([[1, 2, 3], [4, 5, 6]], device=ONE),
        torch.empty_strided((2, 3), (1, 2), device=ONE),
        torch.linspace(0, 1, 6, device=ONE).view(2, 3),
        torch.tensor([[1, 2, 3], [4, 5, 6]]).to(ONE),
        torch.empty_like(torch.zeros(2, 3), device=ONE),
        torch.zeros(2, 3, device=ONE).new_ones(2, 3),
        torch.from_numpy(np.ones((2, 3))).to(torch.device("pretend", 1)),
        torch.ones(2, 3).pretend(1),
    ]
    for tensor in made:
        assert type(tensor) is torch.Tensor
        assert tensor.device == torch.device(ONE)
        assert tensor.shape == (2, 3)
        assert not tensor.is_cpu
        assert not tensor.is_cuda
        assert tensor.is_pretend
    with torch.device(ONE):
        assert torch.zeros(2).device == torch.device(ONE)
    assert torch.zeros(0, device=ONE).sum().item() == 0


def test_values_are_the_cpus(pretend: Pretend) -> None:
    torch.manual_seed(0)
    there = torch.randn(3, 4, device=ONE)
    torch.manual_seed(0)
    here = torch.randn(3, 4)
    assert torch.equal(there.cpu(), here)
    for work in (torch.softmax, torch.argsort, torch.cumsum, torch.flip):
        argument = [1] if work is torch.flip else 1
        assert torch.equal(work(there, argument).cpu(), work(here, argument))
    assert torch.equal((there @ there.mT).cpu(), here @ here.mT)
    assert repr(there) == repr(here).replace(")", f", device='{ONE}')")
    assert there.tolist() == here.tolist()
    assert there[0, 0].item() == here[0, 0].item()
    assert np.array_equal(there.cpu().numpy(), here.numpy())
    with pytest.raises(TypeError, match=r"Use Tensor\.cpu\(\)"):
        there.numpy()


def test_dtype_and_device_at_once(pretend: Pretend) -> None:
    there = torch.ones(2, 3).to(ONE, torch.bfloat16)
    assert (there.device, there.dtype) == (torch.device(ONE), torch.bfloat16)
    back = there.to("cpu", torch.float64)
    assert torch.equal(back, torch.ones(2, 3, dtype=torch.float64))
    assert there.to(ONE) is there
    assert there.to(ONE, copy=True) is not there
    other = torch.zeros(2, 3, device=ZERO)
    other.copy_(there)
    assert torch.equal(other.cpu(), torch.ones(2, 3))
    assert there.t().to(ZERO).stride() == there.t().stride()


def test_views_share_their_storage_and_version(pretend: Pretend) -> None:
    base = torch.zeros(4, 6, device=ONE)
    views = [
        base[1:3],
        base.view(24)[5:],
        base.t(),
        base.unsqueeze(0),
        base.expand(2, 4, 6),
        base.reshape(2, 12),
        base.detach(),
        base.view(torch.int32),
        base.unfold(0, 2, 1),
        base.split(2)[1],
        base.diagonal(),
    ]
    begins = base.untyped_storage().data_ptr()
    assert begins == base.data_ptr() != 0
    assert base.untyped_storage().nbytes() == 96
    for view in views:
        assert view.untyped_storage().data_ptr() == begins
        assert view.device == base.device
        before = view._version
        base.add_(1)
        assert view._version == before + 1
        assert view.data_ptr() == begins + view.storage_offset() * view.element_size()
    assert base.clone().untyped_storage().data_ptr() != begins
    base.zero_()
    base[1:3].add_(2)
    assert base.sum(1).tolist() == [0, 12, 12, 0]
    assert base.t()[0].tolist() == [0, 2, 2, 0]


def test_results_that_are_resized(pretend: Pretend) -> None:
    out = torch.empty(0, device=ONE)
    torch.add(torch.ones(3, device=ONE), 1, out=out)
    assert out.tolist() == [2, 2, 2]
    grown = torch.arange(3.0, device=ONE)
    grown.resize_(5)
    assert grown.shape == (5,)
    assert grown[:3].tolist() == [0, 1, 2]
    address = grown.data_ptr()
    assert grown.resize_(2).tolist() == [0, 1]
    assert grown.data_ptr() == address


def test_autograd_runs_on_every_device(pretend: Pretend) -> None:
    def loss(x: torch.Tensor, w: torch.Tensor, move: bool) -> torch.Tensor:
        h = torch.tanh(x @ w)
        if move:
            h = h.to("pretend:3")
        return (h * h).sum()

    torch.manual_seed(0)
    x, w = torch.randn(3, 4), torch.randn(4, 5)
    here = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    loss(*here, move=False).backward()
    there = [x.to(ONE).requires_grad_(), w.to(ONE).requires_grad_()]
    loss(*there, move=True).backward()
    for one, other in zip(here, there, strict=True):
        assert other.grad.device == torch.device(ONE)
        assert torch.equal(one.grad, other.grad.cpu())


@pytest.mark.parametrize("masked", [False, True])
def test_attention_has_the_cpus_gradients(pretend: Pretend, masked: bool) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 2, 5, 4) for _ in range(3)]
    mask = torch.ones(5, 5).tril().bool() if masked else None
    attend = torch.nn.functional.scaled_dot_product_attention
    here = [tensor.clone().requires_grad_() for tensor in inputs]
    there = [tensor.to(ONE).requires_grad_() for tensor in inputs]
    out = attend(*here, attn_mask=mask, is_causal=not masked)
    far = attend(*there, attn_mask=None if mask is None else mask.to(ONE), is_causal=not masked)
    assert torch.equal(out, far.detach().cpu())
    out.square().sum().backward()
    far.square().sum().backward()
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.grad, other.grad.cpu())


def test_modules_keep_their_parameters(pretend: Pretend) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    module[1].weight = module[0].weight
    parameters = list(module.parameters())
    for place in (ONE, ZERO, "cpu", ONE):
        module.to(place)
        assert all(one is other for one, other in zip(parameters, module.parameters(), strict=True))
        assert all(isinstance(one, torch.nn.Parameter) for one in module.parameters())
        assert all(one.device == torch.device(place) and one.requires_grad for one in parameters)
    assert module[0].weight is module[1].weight
    module(torch.ones(2, 3, device=ONE)).sum().backward()
    assert all(one.grad.device == torch.device(ONE) for one in parameters)
    again = torch.nn.Linear(3, 3)
    again.load_state_dict(module[0].state_dict())
    assert torch.equal(again.weight, module[0].weight.cpu())


def test_tensors_are_copied_deeply_and_written_to_files(pretend: Pretend, tmp_path) -> None:
    there = torch.arange(6.0, device=ONE).reshape(2, 3)
    twin = copy.deepcopy(there)
    assert twin.device == there.device
    assert torch.equal(twin, there)
    assert twin.data_ptr() != there.data_ptr()
    save_file({"it": there.t().contiguous()}, tmp_path / "it.safetensors")
    assert torch.equal(load_file(tmp_path / "it.safetensors")["it"], there.t().cpu())


def test_files_of_torch(pretend: Pretend, tmp_path) -> None:
    there = torch.arange(6.0, device=ONE).reshape(2, 3)
    torch.save({"it": there, "view": there[1]}, tmp_path / "it.pt")
    for place in (None, "cpu", "pretend:2"):
        found = torch.load(tmp_path / "it.pt", map_location=place)
        assert found["it"].device == torch.device(place or ONE)
        assert torch.equal(found["it"].cpu(), there.cpu())
        assert found["view"].untyped_storage().data_ptr() == found["it"].untyped_storage().data_ptr()


def test_streams_are_there_and_do_nothing(pretend: Pretend) -> None:
    there = torch.zeros(3, device=ONE)
    side = torch.pretend.Stream(device=ONE)
    side.wait_stream(torch.pretend.current_stream(ONE))
    with torch.pretend.stream(side):
        back = there.to("cpu", non_blocking=True)
    there.record_stream(side)
    event = torch.pretend.Event()
    event.record(side)
    assert event.query()
    event.synchronize()
    assert torch.equal(back, torch.zeros(3))


def test_devices_by_number(pretend: Pretend) -> None:
    assert torch.ones(2).to(1).device == torch.device(ONE)
    assert torch.ones(2, device=2).device == torch.device("pretend:2")


def test_a_weight_without_data_gives_garbage_as_elsewhere(pretend: Pretend) -> None:
    """What makes it worth a refusal: torch itself lets it pass."""
    there = torch.ones(2, 3, device=ONE)
    out = torch.nn.functional.linear(there, torch.empty(4, 3, device="meta"))
    assert (out.shape, out.device) == ((2, 4), torch.device(ONE))
    with pytest.raises(RuntimeError, match="meta"):
        there + torch.empty(2, 3, device="meta")


def test_the_module_of_the_devices(pretend: Pretend) -> None:
    assert torch.pretend.is_available()
    assert torch.pretend.device_count() == pretend.count >= 5
    assert torch.pretend.current_device() == 0
    with torch.pretend.device(2):
        assert torch.zeros(1, device="pretend").device == torch.device("pretend:2")
    held = torch.zeros(1000, device=ONE)
    free, total = torch.pretend.mem_get_info(1)
    assert total - free == torch.pretend.memory_allocated(ONE) >= held.nbytes
    torch.pretend.synchronize()
    torch.pretend.empty_cache()
    torch.pretend.current_stream(ONE).synchronize()
    torch.pretend.manual_seed(0)
    torch.manual_seed(0)
    assert torch.get_device_module("pretend") is torch.pretend


def test_closed_it_is_not_there(pretend: Pretend) -> None:
    assert device._open == 1
    device._open = 0
    try:
        assert not torch.pretend.is_available()
        assert torch.pretend.device_count() == 0
        assert not torch.accelerator.is_available()
    finally:
        device._open = 1


# -- what is refused ----------------------------------------------------------------------------------------------

MIXED: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "add": lambda a, b: a + b,
    "add_": lambda a, b: a.add_(b),
    "add_out": lambda a, b: torch.add(a, a, out=b),
    "matmul": lambda a, b: a @ b,
    "linear": lambda a, b: torch.nn.functional.linear(a, b, b[0]),
    "cat": lambda a, b: torch.cat([a, b]),
    "stack": lambda a, b: torch.stack([a, b]),
    "where": lambda a, b: torch.where(a > 0, b, b),
    "compare": lambda a, b: a > b,
    "equal": torch.equal,
    "embedding": lambda a, b: torch.nn.functional.embedding(a.long(), b),
    "gather": lambda a, b: a.gather(0, b.long()),
    "set a slice": lambda a, b: torch.where(b > 0, a, a),
    "layer norm": lambda a, b: torch.nn.functional.layer_norm(a, (2,), b[0]),
    "attention": lambda a, b: torch.nn.functional.scaled_dot_product_attention(a[None], b[None], b[None]),
    "einsum": lambda a, b: torch.einsum("ij,kj->ik", a, b),
    "foreach": lambda a, b: torch._foreach_add([a], [b]),
    "masked_fill": lambda a, b: a.masked_fill(b > 0, 1.0),
}


@pytest.mark.parametrize("places", [(ZERO, ONE), (ONE, "cpu"), ("cpu", ONE)], ids=str)
@pytest.mark.parametrize("work", MIXED)
def test_two_devices_raise(pretend: Pretend, work: str, places: tuple[str, str]) -> None:
    # The same call on one device works, so it is the second device that is refused.
    MIXED[work](torch.ones(2, 2, device=ONE), torch.ones(2, 2, device=ONE))
    one, other = (torch.ones(2, 2, device=place) for place in places)
    with pytest.raises(
        RuntimeError, match="Expected all tensors to be on the same device, but found at least two"
    ):
        MIXED[work](one, other)


def test_a_wrong_device_raises_under_autograd_and_inference_mode_too(pretend: Pretend) -> None:
    one = torch.ones(2, device=ZERO, requires_grad=True)
    with pytest.raises(RuntimeError, match="found at least two devices, pretend:0 and pretend:1!"):
        one * torch.ones(2, device=ONE)
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match="found at least two devices, pretend:0 and cpu!"),
    ):
        one * torch.ones(2)


def test_numbers_from_the_cpu_are_welcome_where_gpus_take_them(pretend: Pretend) -> None:
    there = torch.ones(2, 2, device=ONE)
    two = torch.tensor(2.0)
    assert (there * two).device == (two * there).device == torch.device(ONE)
    assert (there + torch.tensor(2, dtype=torch.float64)).dtype == torch.float32
    assert torch.where(there > 0, two, there).tolist() == [[2, 2], [2, 2]]
    there.fill_(two)
    there.masked_fill_(there > 0, torch.tensor(3.0))
    there[0] = two
    assert there.tolist() == [[2, 2], [3, 3]]
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([there[0], torch.ones(1)])
    with pytest.raises(RuntimeError, match="same device"):
        there.index_select(0, torch.tensor(1))
    with pytest.raises(RuntimeError, match="same device"):
        two.mul_(there[0, 0])
    with pytest.raises(RuntimeError, match="generator"):
        there.normal_(generator=torch.Generator())


def test_index_tensors_from_the_cpu_travel(pretend: Pretend) -> None:
    there = torch.arange(12.0, device=ONE).reshape(3, 4)
    index = torch.tensor([2, 0])
    with pretend.watched() as seen:
        assert torch.equal(there[index].cpu(), there.cpu()[index])
    assert seen.moved() == {("cpu", ONE): 16, (ONE, "cpu"): 32 + 48}
    there[index] = torch.zeros(2, 4, device=ONE)
    assert there.sum(1).tolist() == [0, 22, 0]
    for tensor, wrong in ((there, index.to(ZERO)), (there.cpu(), index.to(ONE))):
        with pytest.raises(RuntimeError, match="same device as the indexed tensor"):
            tensor[wrong]


# -- what is counted ----------------------------------------------------------------------------------------------


def test_every_copy_between_devices_in_order(pretend: Pretend) -> None:
    source = torch.zeros(2, 3)
    with pretend.watched() as seen:
        there = source.to(ONE, non_blocking=True)
        half = there.to(ZERO, torch.float16)
        there.clone()
        there.to(torch.float64)
        half.add_(1)
        torch.zeros(4, device=ONE).copy_(half[0, 0])
        source.to("cpu", torch.float64)
        up, line = torch.zeros(5, dtype=torch.float64).to(ZERO, torch.float16), here()
        down = up.to("cpu", torch.float64, non_blocking=True)
        torch.zeros(0).to(ONE)
    found = [(c.source, c.target, c.bytes, c.shape, c.dtype, c.non_blocking) for c in seen.copies]
    assert found == [
        ("cpu", ONE, 24, (2, 3), torch.float32, True),
        (ONE, ZERO, 24, (2, 3), torch.float32, False),
        (ZERO, ONE, 2, (), torch.float16, False),
        ("cpu", ZERO, 10, (5,), torch.float64, False),
        (ZERO, "cpu", 10, (5,), torch.float16, True),
    ]
    assert seen.copies[3].line == line
    assert torch.equal(down, torch.zeros(5, dtype=torch.float64))
    assert seen.between(ONE, ZERO) == [seen.copies[1]]
    assert seen.moved() == {
        ("cpu", ONE): 24,
        (ONE, ZERO): 24,
        (ZERO, ONE): 2,
        ("cpu", ZERO): 10,
        (ZERO, "cpu"): 10,
    }
    assert seen.reads == []
    there.cpu()
    assert len(seen.copies) == 5  # the block has ended
    assert isinstance(seen.copies[0], Copy)
    assert [one.waits for one in seen.copies] == [False, False, False, True, False]


READS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda t: t[0].item(),
    "tolist": lambda t: t.tolist(),
    "bool": lambda t: bool(t[0]),
    "float": lambda t: float(t[0]),
    "if": lambda t: 1 if (t > 0).all() else 0,
    "cpu": lambda t: t.cpu(),
    "to": lambda t: t.to("cpu"),
    "copy_": lambda t: torch.zeros(3).copy_(t),
    "nonzero": lambda t: t.nonzero(),
    "where": lambda t: torch.where(t > 0),
    "mask": lambda t: t[t > 0],
    "masked_select": lambda t: t.masked_select(t > 0),
    "write under a mask": lambda t: t.__setitem__(t > 0, torch.ones(2, device=ONE)),
    "unique": torch.unique,
    "equal": lambda t: torch.equal(t, t.clone()),
    "allclose": lambda t: torch.allclose(t, t),
    "repr": repr,
    "repeat": lambda t: torch.repeat_interleave(t, t.long()),
    "iterate": lambda t: [float(member) for member in t],
}


@pytest.mark.parametrize("read", READS)
def test_every_host_read(pretend: Pretend, read: str) -> None:
    there = torch.tensor([0.0, 1.0, 2.0], device=ONE)
    with pretend.watched() as seen:
        READS[read](there)
    assert seen.reads
    for one in seen.reads:
        assert one.device == ONE
        assert one.line.startswith(__file__)
        assert one.within("test_support_pretend")
        assert not one.within("tracelens/")


def test_work_that_stays_there_reads_nothing(pretend: Pretend) -> None:
    there = torch.tensor([0.0, 1.0, 2.0], device=ONE, requires_grad=True)
    index = torch.tensor([0, 2], device=ONE)
    with pretend.watched() as seen:
        squares = (there[1:] * 2 + there[:-1]).pow(2)
        squares.sum().backward()
        there.detach()[index]
        there.topk(2)
        there.detach()[there > 0] = 0.0
        torch.where(there > 0, there, 0.0).argmax()
        there.to(ZERO)
        there.shape, there.device, there.is_contiguous(), len(there)
        torch.stack([there, there]).norm(dim=-1)
    assert seen.reads == []
    assert [(one.source, one.target) for one in seen.copies] == [(ONE, ZERO)]


def test_memory_alive_and_its_peak(pretend: Pretend) -> None:
    gc.collect()
    held = torch.zeros(100, device=ONE)
    with pretend.watched() as seen:
        start = seen.before(ONE)
        assert start >= 400
        assert seen.extra(ONE) == 0
        one = torch.zeros(1000, device=ONE)
        view = one[10:20].view(2, 5)
        assert seen.alive(ONE) == start + 4000
        two = one + 1
        del two
        assert seen.alive(ONE) == start + 4000
        assert seen.extra(ONE) == 8000
        del one
        assert seen.alive(ONE) == start + 4000
        del view
        assert seen.alive(ONE) == start
        held.add_(1)
        held.t()
        del held
        assert seen.alive(ONE) == start - 400
        assert seen.peak(ONE) == start + 8000
        assert seen.peak("pretend:2") == seen.before("pretend:2")
        seen.reset_peak()
        torch.zeros(10, dtype=torch.bfloat16, device=ONE)
        assert (seen.before(ONE), seen.extra(ONE)) == (start - 400, 20)
    torch.zeros(10_000, device=ONE)
    assert seen.extra(ONE) == 20


def test_memory_that_autograd_keeps(pretend: Pretend) -> None:
    gc.collect()
    weight = torch.ones(100, device=ONE, requires_grad=True)
    with pretend.watched() as seen:
        out = (weight.exp() * 2).sum()
        kept = seen.alive(ONE) - seen.before(ONE)
        assert kept == 400 + 4  # the result of exp, for its gradient, and the sum
        out.backward()
        del out
        assert seen.alive(ONE) - seen.before(ONE) == 400  # the gradient


def test_blocks_in_blocks_and_threads_count_for_themselves(pretend: Pretend) -> None:
    def work() -> None:
        torch.zeros(3).to(ONE)

    with watched() as outer:
        work()
        with watched() as inner:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        with pytest.raises(ZeroDivisionError), watched():
            1 / 0
        work()
    assert (len(inner.copies), len(outer.copies)) == (1, 3)
    assert inner.extra(ONE) == 12
