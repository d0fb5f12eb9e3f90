"""A CUDA device that computes nothing, for tests where there is no GPU.

Tensors on it have a shape, a type and a device, and no numbers (torch's FakeTensorMode). Tensors on the CPU
stay real. So what an operation refuses on a GPU for its devices or types, it refuses here; and what would
make the host wait for the device is written down, with the function that asked for it. A number that is read
from the device is 1. An operation whose result has as many elements as some numbers say (`nonzero`, a mask as
an index) raises, because it would wait, too, and nobody knows how many.

The memory that tensors take is counted, all that are alive at a time.

Not seen: kernels, their rounding and what they keep for themselves, streams, memory that is used again too
early.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda:0")
CAPABILITY = (9, 0)
PACKAGE, TESTING = "paceline.", "paceline.testing."
# What autocast does on CUDA with the operations that drafts use (ATen/autocast_mode.h).
_LOWER = (
    "linear matmul __matmul__ __rmatmul__ mm bmm baddbmm addmm linalg_vecdot scaled_dot_product_attention"
)
_WIDER = """softmax log_softmax cumsum cumprod prod sum norm exp log pow __pow__ __rpow__ rsqrt logsumexp
    rms_norm layer_norm binary_cross_entropy_with_logits"""
LOWER, WIDER = frozenset(_LOWER.split()), frozenset(_WIDER.split())
WIDEST = frozenset(["cat", "stack", "dot", "index_put", "scatter_add"])
CAST = LOWER | WIDER | WIDEST
WIDE: tuple[torch.dtype, ...] = (torch.float32,)
NARROW: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
aten = torch.ops.aten
# Kernels take one type; operations without numbers do not look.
ONE_TYPE = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.mv.default}
ONE_TYPE |= {aten.dot.default, aten.index_put_.default}


class FakeCuda(TorchDispatchMode):
    """`waits`: for each time that the host would wait, the operation and the function of the package.

    `bytes`: of the storages on the device that are alive; `most_bytes`: how much that ever was. A test may
    set the latter back.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: list[str] = []
        self.bytes = self.most_bytes = 0
        self._storages = weakref.WeakSet[torch.UntypedStorage]()
        self._mode = mode
        self._pinned: set[int] = set()  # addresses; a test is too short to see one again

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        leaves = tree_leaves((args, named))
        if not any(map(_is_there, leaves)):
            return self._on_host(func, args, named)
        if func._can_decompose():  # without autograd, operations arrive that consist of others
            with self:
                return func.decompose(*args, **named)
        if func is aten._local_scalar_dense.default:
            self._wait(func)
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            self._wait(func)
            with unset_fake_temporarily():
                return args[0].fill_(1)
        self._see_a_copy_from_the_host(func, args, named, leaves)
        if any(_is_other(leaf) for leaf in leaves):
            args, named = tree_map_only((torch.Tensor, torch.device), self._there, (args, named))
        types_of = {leaf.dtype for leaf in args if isinstance(leaf, torch.Tensor)}
        if func in ONE_TYPE and len(types_of) > 1:
            raise RuntimeError(f"{func} takes one type, not {types_of}")
        found = func(*args, **named)
        for leaf in tree_leaves(found):
            self._count(leaf)
        if func is aten._to_copy.default and found.device.type == "cpu":
            self._wait(func)
            with unset_fake_temporarily():
                return torch.ones(found.shape, dtype=found.dtype)
        return found

    def _count(self, leaf: Any) -> None:
        """Add a new storage of the device; once it is gone, it counts no more."""
        if not isinstance(leaf, FakeTensor) or leaf.device.type != "cuda":
            return
        storage = leaf.untyped_storage()
        if storage not in self._storages:
            self._storages.add(storage)
            weakref.finalize(storage, self._forget, storage.nbytes())
            self.bytes += storage.nbytes()
            self.most_bytes = max(self.most_bytes, self.bytes)

    def _forget(self, num_bytes: int) -> None:
        self.bytes -= num_bytes

    def _on_host(self, func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        is_pinned = named.pop("pin_memory", False)
        with unset_fake_temporarily():
            found = func(*args, **named)
        return self.pin(found) if is_pinned else found

    def _there(self, leaf: torch.Tensor | torch.device) -> torch.Tensor | torch.device:
        """A tensor of the host as one without numbers; a number alone may go with a call."""
        if isinstance(leaf, torch.device):
            return CUDA if leaf.type == "meta" else leaf
        if isinstance(leaf, FakeTensor):
            return leaf
        return FakeTensor(self._mode, leaf, CUDA) if leaf.is_meta else self._mode.from_tensor(leaf)

    def _see_a_copy_from_the_host(
        self, func: Any, args: tuple[Any, ...], named: Mapping[str, Any], leaves: Sequence[Any]
    ) -> None:
        of_host = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not _is_there(leaf)]
        if func is not aten._to_copy.default:
            of_host = [tensor for tensor in of_host if tensor.dim()]
        goes_on = bool(named.get("non_blocking")) or (func is aten.copy_.default and args[2:3] == (True,))
        if of_host and not (goes_on and all(tensor.data_ptr() in self._pinned for tensor in of_host)):
            self._wait(func)

    def _wait(self, func: Any) -> None:
        self.waits.append(f"{func.overloadpacket.__name__.lstrip('_')} in {_asked_by()}")

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self._pinned.add(tensor.data_ptr())
        return tensor


class CudaAutocast(TorchFunctionMode):
    """torch.autocast("cuda"): torch itself casts only tensors of a device that there is.

    A weight is cast once until the outermost autocast ends, as there.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cast_weights: dict[torch.Tensor, torch.Tensor] = {}

    def forget(self) -> None:
        self._cast_weights.clear()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named, name = dict(kwargs or {}), func.__name__
        if func is torch.Tensor.backward:  # what is computed again in it is cast again
            with self:
                return torch.autograd.backward(args, named.pop("gradient", None), **named)
        if name not in CAST or not torch.is_autocast_enabled("cuda"):
            return func(*args, **named)
        tensors = [leaf for leaf in tree_leaves((args, named)) if isinstance(leaf, FakeTensor)]
        are_wide = any(tensor.dtype == torch.float32 for tensor in tensors)
        if name in LOWER:
            of, to = WIDE, torch.get_autocast_dtype("cuda")
        elif (name in WIDER and named.get("dtype") is None) or (name in WIDEST and are_wide):
            of, to = NARROW, torch.float32
        else:
            return func(*args, **named)
        args, named = tree_map_only(FakeTensor, lambda t: self._cast(t, of, to), (args, named))
        return func(*args, **named)

    def _cast(self, tensor: torch.Tensor, of: tuple[torch.dtype, ...], to: torch.dtype) -> torch.Tensor:
        if tensor.dtype not in of:
            return tensor
        if not (to in NARROW and tensor.is_leaf and tensor.requires_grad):
            return tensor.to(to)
        if tensor not in self._cast_weights:
            self._cast_weights[tensor] = tensor.to(to)
        return self._cast_weights[tensor]


class _Mode(FakeTensorMode):
    """Never asks for a real device, although there seems to be one."""

    avoid_device_init = True

    def __deepcopy__(self, memo: Any) -> Self:
        """A copy of a module is on the same device."""
        return self


def _is_there(leaf: Any) -> bool:
    """Underneath torch's Python code the device is called meta."""
    if isinstance(leaf, torch.device):
        return leaf.type in ("cuda", "meta")
    return isinstance(leaf, FakeTensor) or (isinstance(leaf, torch.Tensor) and leaf.is_meta)


def _is_other(leaf: Any) -> bool:
    return isinstance(leaf, torch.device) or (
        isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor)
    )


def _asked_by() -> str:
    """The innermost function of the package that is none of its tests'."""
    frame = sys._getframe(2)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith(PACKAGE) and not module.startswith(TESTING):
            return f"{module.removeprefix(PACKAGE)}.{frame.f_code.co_qualname}"
        frame = frame.f_back  # type: ignore[assignment]
    return "a test"


def _attention_without_kernel(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, block_mask: Any, enable_gqa: bool
) -> torch.Tensor:
    """What FlexAttention asks of its arguments. A kernel cannot be compiled for no device."""
    assert query.is_cuda
    assert query.device == keys.device == values.device == block_mask.kv_num_blocks.device
    assert query.dtype == keys.dtype == values.dtype
    assert block_mask.shape[-2:] == (query.shape[-2], keys.shape[-2])
    assert query.shape[1] % keys.shape[1] == 0
    assert enable_gqa
    return query * (keys.mean() + values.mean())  # as large as the kernel's output, and it keeps no scores


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Inside, this machine has one CUDA device, `cuda:0`."""
    mode = _Mode()
    device, autocast = FakeCuda(mode), CudaAutocast()
    made, generator = torch.Tensor._make_subclass, torch.Generator

    def without_guard(cls: type, elem: torch.Tensor, requires_grad: bool = False, **named: Any) -> Any:
        """Autograd would ask the device for its streams."""
        return made(cls, elem, requires_grad, **{**named, "dispatch_device": False})

    answers: dict[str, Any] = {
        "torch.clear_autocast_cache": autocast.forget,
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.is_bf16_supported": lambda *_: True,
        "torch.cuda.get_device_capability": lambda *_: CAPABILITY,
        "torch.Generator": lambda _=None: generator(),
        "torch.Tensor.pin_memory": lambda tensor: device.pin(tensor.clone()),
        "torch.Tensor._make_subclass": without_guard,
        "torch.autograd.has_torch_function": lambda _: False,  # in backward the modes stay on
        "weakref.getweakrefs": lambda _: [],  # else no module could be moved twice
        "torch._subclasses.fake_tensor.FakeTensor.is_meta": False,
        "torch._subclasses.fake_tensor.FakeTensor.tolist": lambda t: (
            t.cpu().tolist()
        ),  # one copy, as on a GPU
        "torch._subclasses.fake_tensor.FakeTensor.is_cuda": property(lambda t: t.device.type == "cuda"),
        "torch._subclasses.fake_tensor.init_gpu_context": lambda _: None,
        "paceline.methods.dflash.attention._compiled_flex_attention": lambda: _attention_without_kernel,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch(name, answer, create=True))
        for one in (mode, device, autocast):
            stack.enter_context(one)
        yield device
