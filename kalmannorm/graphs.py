"""CUDA graphs: a network's forward and backward pass recorded once, and replayed in any training loop."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from kalmannorm.evaluation import exact, without_autocast
from kalmannorm.gaussian import Gaussian, Packed
from kalmannorm.kernels.autograd import is_transformed, saved_tensor_hooks
from kalmannorm.modules import KalmanLayer
from kalmannorm.propagation import Propagation, attach, current, paused
from kalmannorm.rules import Belief
from kalmannorm.steps import SCALARS, step_of
from kalmannorm.watch import tensors_of

__all__ = ["capture"]

_M = TypeVar("_M", bound=nn.Module)
_Function = Callable[..., tuple[Tensor, ...]]
# Calls without a recording before somebody is told; and calls of other kinds to remember, for each graph.
_MANY = 20


def capture(model: _M, *, warm_up: int = 3, shapes: int = 4) -> _M:
    """Replay a network's forward and backward pass as CUDA graphs, in place.

    At 1 to 4 samples a GPU waits for Python most of the time: a replayed graph has none. The numbers, the running
    statistics and the training loop stay as they are, with autocast, gradient scaling, accumulation and clipping, and
    `DistributedDataParallel` around the model. The first batches of a shape run as they are; the next one is recorded,
    by :func:`torch.cuda.make_graphed_callables`; all later ones are replayed. A batch runs as it is in ``eval()``,
    without gradients, on another device than a GPU, inside ``torch.compile`` and activation checkpoints, and where
    there are graphs of ``shapes`` shapes already. Parameters that move, are frozen or unfrozen, and modules that are
    switched between training and evaluation, are recorded anew.

    What Python decides while the batch is recorded stays decided: a forward pass must not depend on the values of
    tensors, or on counts and rates that it keeps in Python. A second call before the backward pass of a first one runs
    as it is. Of a detector, capture the part that has static shapes:
    ``model.backbone = kn.capture(model.backbone)``. What is believed of a part's input and output crosses its border.

    Args:
        model: any module, converted or not. It takes and returns tensors, also in lists, tuples and dicts.
        warm_up: how many batches of a shape run as they are, at least 1.
        shapes: for how many shapes to keep a graph. Each holds the memory of a step.

    Returns:
        The model itself. ``del model.forward`` undoes it.

    Raises:
        TypeError: for something that is not a module.
        ValueError: for a model that is captured already, for layers with ``momentum=None``, which read their count of
            batches, or a number below 1.
        RuntimeError: later, for a batch that cannot be recorded.

    Example:
        >>> import torch, kalmannorm as kn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> model = kn.capture(kn.convert(model))
        >>> model(torch.randn(2, 3, 8, 8)).shape     # on a CPU it runs as it is
        torch.Size([2, 8, 6, 6])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"kalmannorm.capture got {type(model).__name__}, expected a torch.nn.Module")
    if isinstance(model.__dict__.get("forward"), _Replayed):
        raise ValueError(f"{type(model).__name__} is captured already, expected a model that runs as it is")
    for name, layer in model.named_modules():
        if getattr(layer, "num_batches_tracked", None) is not None and getattr(layer, "momentum", 0.0) is None:
            raise ValueError(
                f"kalmannorm.capture got {type(layer).__name__} {name!r} with momentum=None, expected a number: a "
                "plain mean reads its count of batches, which a graph cannot"
            )
    if warm_up < 1 or shapes < 1:
        raise ValueError(f"kalmannorm.capture got warm_up={warm_up} and shapes={shapes}, expected numbers above 0")
    model.forward = _Replayed(model, warm_up, shapes)
    return model


class _Replayed:
    """A module's forward."""

    changes = 0  # of what a graph holds on to, since the last recording

    def __init__(self, module: nn.Module, warm_up: int, shapes: int) -> None:
        self.module = module
        self.warm_up = warm_up
        self.shapes = shapes
        self.own = module.__dict__.get("forward")  # where it has one that is not its class's
        self._forget()

    def _forget(self) -> None:
        self.graphs: dict[Any, _Graph] = {}
        self.seen: Counter[Any] = Counter()
        self.state: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy records its own graphs."""
        return {name: getattr(self, name) for name in ("module", "warm_up", "shapes", "own")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def as_it_is(self, *args: Any, **kwargs: Any) -> Any:
        """What the module does without graphs."""
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not self.module.training or not torch.is_grad_enabled():
            return self.as_it_is(*args, **kwargs)
        leaves, form = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not _is_capturable(leaves, tensors) or not any(p.requires_grad for p in self.module.parameters()):
            return self.as_it_is(*args, **kwargs)
        if (state := _state(self.module)) != self.state:
            self._forget()
            self.state = state
            self.changes += 1
            if self.changes == _MANY:
                warnings.warn(
                    f"kalmannorm.capture has recorded nothing of {type(self.module).__name__} yet: at each call some "
                    "parameter or buffer is another tensor than before, or a module was switched. Change tensors in "
                    "place",
                    stacklevel=3,
                )
        with paused():
            beliefs = [_belief_of(t) for t in tensors]
            key = _key(leaves, form, beliefs)
        if key not in self.graphs:
            if len(self.seen) > _MANY * self.shapes:
                self.seen.clear()
            self.seen[key] += 1
            if self.seen[key] <= self.warm_up or len(self.graphs) >= self.shapes:
                return self.as_it_is(*args, **kwargs)
            self.graphs[key] = _Graph(self, leaves, form, beliefs)
            self.changes = 0
        graph = self.graphs[key]
        return self.as_it_is(*args, **kwargs) if graph.is_awaited else graph(tensors, beliefs)


def _is_capturable(leaves: Sequence[Any], tensors: Sequence[Tensor]) -> bool:
    if not tensors or is_transformed() or saved_tensor_hooks() is not None:
        return False
    if not all(isinstance(leaf, Tensor) or type(leaf) in SCALARS for leaf in leaves):
        return False
    return all(_is_on_gpu(t) for t in tensors) and not _is_being_captured()


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _is_being_captured() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _state(module: nn.Module) -> tuple[Any, ...]:
    """What a graph holds on to."""
    layers = [each for each in module.modules() if isinstance(each, KalmanLayer)]
    return (
        tuple([(each.training, getattr(each, "momentum", None)) for each in module.modules()]),
        tuple([(t.data_ptr(), t.requires_grad) for t in tensors_of(module)]),
        tuple([(each.frozen, each.online, each.prior_scale is None) for each in layers]),
    )


def _belief_of(tensor: Tensor) -> Belief | None:
    """What is believed of a tensor that enters or leaves; None where nothing watches it."""
    step = step_of(tensor)
    if step is None:
        return None
    with without_autocast(tensor.device):
        belief = exact(step)
        if isinstance(belief, Gaussian):
            shape = torch.broadcast_shapes(belief.mean.shape, belief.var.shape)
            return Gaussian(belief.mean.expand(shape), belief.var.expand(shape), tensor.shape).packed()
    return belief


def _key(leaves: Sequence[Any], form: TreeSpec, beliefs: Sequence[Belief | None]) -> Any:
    """What must be the same for a graph to stand for a call."""
    given = [(t.shape, t.stride(), t.dtype, t.device, t.requires_grad) if isinstance(t, Tensor) else (type(t), t)
             for t in leaves]  # fmt: skip
    known = [(b.moments.shape, b.moments.requires_grad) if isinstance(b, Packed) else b for b in beliefs]
    amp = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
    return tuple(given), str(form), tuple(known), amp


class _Graph:
    """A recorded call.

    Args:
        replayed: the module's forward.
        leaves: the arguments of the call, flat.
        form: how they lie in one another.
        beliefs: what is believed of each tensor among them.
    """

    def __init__(self, replayed: _Replayed, leaves: Sequence[Any], form: TreeSpec,
                 beliefs: Sequence[Belief | None]) -> None:  # fmt: skip
        module = replayed.module
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        mode = current()
        layers = mode.layers if mode is not None else [m for m in module.modules() if isinstance(m, KalmanLayer)]
        is_part = mode is not None and mode.opener is not module
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        known = [place for place, belief in enumerate(beliefs) if isinstance(belief, Packed)]
        waiting = None if mode is None else mode.input_belief
        amp = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        self.awaited: weakref.ref[Any] | None = None  # the last replay's node

        def run(*given: Tensor) -> tuple[Tensor, ...]:
            """Of inputs, of what is believed of them, and of the parameters, which are the module's own."""
            tensors, moments = given[: len(places)], given[len(places) : len(places) + len(known)]
            tensors = tuple([t.clone() if t.requires_grad else t for t in tensors])  # it may be changed in place
            filled = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            if mode is not None:
                mode.input_belief = waiting  # for a part that has not been called yet
            for place, tensor in enumerate(tensors):
                if (belief := beliefs[place]) is not None:
                    attach(tensor, Packed(moments[known.index(place)]) if place in known else belief, "input")
            args, kwargs = tree_unflatten(filled, form)
            watched = nullcontext() if mode is not None else Propagation(layers)
            # A graph may not read a copy of a parameter that autocast has made outside of it.
            with watched, torch.autocast("cuda", amp[1], enabled=amp[0], cache_enabled=False):
                found, self.form = tree_flatten(replayed.as_it_is(*args, **kwargs))
            self.places = [place for place, t in enumerate(found) if isinstance(t, Tensor)]
            self.outputs = [None if isinstance(t, Tensor) else t for t in found]
            tensors = tuple([found[place] for place in self.places])
            self.are_derived = [t.requires_grad for t in tensors]
            with paused():
                self.beliefs = [_belief_of(t) if is_part else None for t in tensors]
            return *tensors, *[b.moments for b in self.beliefs if isinstance(b, Packed)]

        with paused():
            given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            given += [b.moments for b in beliefs if isinstance(b, Packed)]
            samples = [t.detach().clone().requires_grad_(t.requires_grad) for t in given]
        self.replay = _recorded(module, run, (*samples, *self.parameters))

    @property
    def is_awaited(self) -> bool:
        """Whether the last replay may still get a backward pass, which the next one would spoil."""
        node = None if self.awaited is None else self.awaited()
        return node is not None and not node.is_done

    def __call__(self, tensors: Sequence[Tensor], beliefs: Sequence[Belief | None]) -> Any:
        moments = [b.moments for b in beliefs if isinstance(b, Packed)]
        with paused():
            given = [*tensors, *moments, *self.parameters]
            places = [place for place, t in enumerate(given) if t.requires_grad]
            views = _WithOwnGradients.apply(self, *[given[place] for place in places])  # type: ignore[no-untyped-call]
            for place, view in zip(places, views, strict=True):
                given[place] = view
            # A graph writes to one place: what comes out of it is copied, as are gradients.
            found = [t.clone() for t in self.replay(*given)]
            more = iter(found[len(self.places) :])
            outputs = list(self.outputs)
            for number, (place, belief) in enumerate(zip(self.places, self.beliefs, strict=True)):
                tensor = found[number] if self.are_derived[number] else found[number].detach()
                outputs[place] = tensor
                if belief is not None:
                    attach(tensor, Packed(next(more)) if isinstance(belief, Packed) else belief, "captured")
        return tree_unflatten(outputs, self.form)


class _WithOwnGradients(torch.autograd.Function):
    """Tensors as they are, but their gradients copied: ``.grad`` may take and keep the memory of what it gets."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.is_done = False
        graph.awaited = weakref.ref(ctx)
        return tuple([t.view_as(t) for t in tensors])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.is_done = True
        given = [g for g in gradients if g is not None]
        copies = iter(torch._foreach_mul(given, 1.0) if given else [])
        return None, *[None if g is None else next(copies) for g in gradients]


def _recorded(module: nn.Module, run: _Function, samples: tuple[Tensor, ...]) -> _Function:
    """Record a function; buffers and random numbers stay as they were, as the batch is still to come."""
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    device = samples[0].device
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    # They will run when a replay's gradients come.
    hooked = [(t, t._backward_hooks) for t in samples if t._backward_hooks]
    for tensor, _ in hooked:
        tensor._backward_hooks = None
    try:
        with torch.autocast("cuda", enabled=False):  # a backward pass runs without
            return _graphed(run, samples)
    except RuntimeError as error:
        raise RuntimeError(
            f"kalmannorm.capture cannot record {type(module).__name__} ({str(error).splitlines()[0]}): expected a "
            "forward pass that asks for no tensor's value, as .item(), .cpu(), print and boolean masks do. Capture a "
            "part of the model, or undo it: del model.forward"
        ) from error
    finally:
        for tensor, hooks in hooked:
            tensor._backward_hooks = hooks
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        if state is not None:
            torch.cuda.set_rng_state(state, device)


def _graphed(run: _Function, samples: tuple[Tensor, ...]) -> _Function:
    # Other threads, a data loader's or NCCL's, may go on. (torch 2.11 has no such argument, and may not let them.)
    known = inspect.signature(torch.cuda.make_graphed_callables).parameters
    mode: dict[str, Any] = {"capture_error_mode": "thread_local"} if "capture_error_mode" in known else {}
    graphed: Any = torch.cuda.make_graphed_callables(run, samples, allow_unused_input=True, **mode)
    return graphed  # type: ignore[no-any-return]
