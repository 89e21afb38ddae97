"""Memory and floating-point operations of a computation, counted without doing it.

The real step runs on tensors that have shapes but no data (torch's meta device). Every storage counts from when it
appears until it is freed, so the peak is what eager torch asks its allocator for: what autograd saves, what gradient
checkpointing frees and makes again, temporaries, gradients. What is not seen is scratch space inside of kernels, and
what the allocator loses between blocks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

IN_LOW_PRECISION = frozenset(
    {F.linear, F.conv2d, F.scaled_dot_product_attention, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm}
    | {torch.baddbmm, torch.addmm, torch.mm, torch.einsum}
)
IN_FLOAT32 = frozenset(
    {F.group_norm, F.layer_norm, F.interpolate, F.l1_loss, F.mse_loss, F.softplus, F.softmax, Tensor.softmax}
    | {torch.softmax, torch.exp, Tensor.exp, torch.log, Tensor.log, torch.pow, Tensor.pow, Tensor.__pow__}
    | {torch.square, Tensor.square, torch.sum, Tensor.sum, torch.norm, Tensor.norm}
)
"""What CUDA's autocast computes in bf16 and in float32, as far as our networks call it: at/autocast_mode.h's lists."""


class Ledger(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        now, peak: bytes of all storages that are alive, and the most there have been since `start`.
        forward_peak: the most there have been outside of backward passes.
        flops: floating-point operations since `start` of matrix products, convolutions and attention; a
            multiplication and an addition are two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.forward_peak = self.flops = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def start(self) -> None:
        """Forget the peaks and the operations so far."""
        self.peak = self.forward_peak = self.now
        self.flops = 0

    def add(self, tensor: Tensor) -> None:
        """Count a tensor that was there before."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def freed(_: object) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)
        if not _in_backward_pass():
            self.forward_peak = max(self.forward_peak, self.now)

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do it and count what came of it."""
        if function is aten._local_scalar_dense.default and args[0].is_meta:
            return 0  # a question about data (is any class of this map out of range?): there is none
        out = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.add, out)
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


class WithoutData:
    """Where a computation is only counted; `low` is the type of mixed precision, None for float32 throughout."""

    device = torch.device("meta")

    def __init__(self, low: torch.dtype | None) -> None:
        self.ledger = Ledger()
        self._calls = _Calls(low)

    @contextmanager
    def entered(self) -> Iterator[Ledger]:
        """Inside, the ledger counts."""
        with self.ledger, self._calls:
            yield self.ledger

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Mixed precision, as torch.autocast has it on CUDA."""
        self._calls.casting = True
        try:
            yield
        finally:
            self._calls.casting = False
            self._calls.casts.clear()


class _Calls(TorchFunctionMode):
    """Mixed precision and fused attention, which torch itself would choose by a tensor's device.

    Autocast knows no device of which there is none, so its rules are applied here: casts, once for each trained weight,
    and again where gradient checkpointing repeats a forward pass. Attention is the fused kernel, whose memory does not
    grow with the square of the length; for tensors without data torch would take the explicit products.
    """

    def __init__(self, low: torch.dtype | None) -> None:
        super().__init__()
        self.casting = False
        self.casts: dict[int, Tensor] = {}
        self._low = low

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `function` with its arguments cast."""
        kwargs = kwargs or {}
        if function is Tensor.backward:
            return self._backward(*args)
        repeating = _in_backward_pass()
        if self._low is not None and (self.casting or repeating):
            if function in IN_LOW_PRECISION:
                args, kwargs = tree_map_only(Tensor, lambda tensor: self._lowered(tensor, repeating), (args, kwargs))
            elif function in IN_FLOAT32:
                args, kwargs = tree_map_only(Tensor, _raised, (args, kwargs))
        if function is F.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        return function(*args, **kwargs)

    def _backward(self, loss: Tensor) -> None:
        """As torch does it, but without leaving this mode: gradient checkpointing repeats forward passes there."""
        with self:
            torch.autograd.graph._engine_run_backward(
                (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )

    def _lowered(self, tensor: Tensor, repeating: bool) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad) or repeating:
            return tensor.to(self._low)
        if id(tensor) not in self.casts:
            self.casts[id(tensor)] = tensor.to(self._low)
        return self.casts[id(tensor)]


def _in_backward_pass() -> bool:
    return torch._C._current_graph_task_id() >= 0


def _raised(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Saves query, key, value, the result and one number a row; so do CUDA's flash and memory-efficient kernels."""
    kernel = aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
