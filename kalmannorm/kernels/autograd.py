"""How an autograd function is called: in eager mode, under torch.func, and under torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

_F = TypeVar("_F", bound=Callable[..., Any])

_NOTHING = nullcontext()


def is_transformed() -> bool:
    """Whether ``torch.compile``, ``torch.func`` or forward-mode autograd differentiates the current computation.

    They need functions that torch can differentiate, and the first fuses these by itself.
    """
    if torch.compiler.is_compiling():
        return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_exporting() -> bool:
    """Whether ``torch.export`` traces. To ``torch.compile`` of 2.11, torch's function of this name is always true."""
    return torch.compiler._is_exporting_flag


def alias(t: Tensor) -> Tensor:
    """An alias, which ``torch.compile`` of torch 2.14 needs to set an attribute on one of several outputs."""
    return torch.ops.aten.alias.default(t)  # type: ignore[no-any-return]


def constant_to_compilers(function: _F) -> _F:
    """As `torch.compiler.assume_constant_result`, which imports the compiler: a second at each start of a program."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def traced_with_its_caller(function: _F) -> _F:
    """A function that a compiler never compiles by itself, as it would behind a graph break, some of it wrongly.

    A mode's ``__torch_function__``, compiled by itself, returns a number for ``x.dtype``.
    """
    frames: Any = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    return function


def saved_tensor_hooks() -> Any:
    """The checkpointed region that is running, or None. See :func:`kalmannorm.steps.may_use`."""
    if torch.compiler.is_dynamo_compiling():
        return None
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def in_grad_mode(grad: bool) -> AbstractContextManager[Any]:
    """A context that records gradients or does not, whatever the caller's mode."""
    if torch.is_grad_enabled() == grad:
        return _NOTHING
    inference = not torch.compiler.is_dynamo_compiling() and torch.is_inference_mode_enabled()
    return _outside_of_inference(grad) if inference else torch.set_grad_enabled(grad)


@contextmanager
def _outside_of_inference(grad: bool) -> Iterator[None]:
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


def needs_torchs_functions(*upstream: Tensor | None) -> bool:
    """Whether a backward pass is differentiated itself, or gets many gradients at once (``is_grads_batched``), in which
    a kernel finds no memory.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    return any([d is not None and torch._C._functorch.is_legacy_batchedtensor(d) for d in upstream])


def differentiable_gradients(plain: Callable[..., Any], inputs: Sequence[Any],
                             upstream: Sequence[Tensor | None]) -> Iterator[Tensor | None]:  # fmt: skip
    """Gradients by torch's functions, one for each input of ``plain``, None for what is no tensor. They can be
    differentiated again where the backward pass is.

    ``plain`` returns a tuple that begins with an output for each gradient ``upstream``, which may be None.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Of views, as one input may have been computed from another one.
        inputs = [t.view_as(t) if isinstance(t, Tensor) and t.requires_grad else t for t in inputs]
        sent = [(o, d) for o, d in zip(plain(*inputs), upstream, strict=False) if d is not None and o.requires_grad]
    wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    outputs, incoming = zip(*sent, strict=True) if sent else ((), ())
    gradients = iter(torch.autograd.grad(outputs, wanted, incoming, create_graph=again, materialize_grads=True))
    for t in inputs:
        yield next(gradients) if isinstance(t, Tensor) and t.requires_grad else None
