"""CUDA graphs: a network's forward and backward pass recorded once, and replayed in any training loop."""

from __future__ import annotations

import gc
import inspect
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from kalmannorm.gaussian import Gaussian, Packed
from kalmannorm.kernels.autograd import is_transformed, saved_tensor_hooks
from kalmannorm.priors import tensors_of
from kalmannorm.propagation import exact, first_line, without_autocast
from kalmannorm.recording import Recorder, attach, current, paused
from kalmannorm.rules import Belief
from kalmannorm.steps import SCALARS, step_of
from kalmannorm.traversal import attributes_kept, buffers_kept, kalman_layers, random_state_kept

_M = TypeVar("_M", bound=nn.Module)
_Function = Callable[..., tuple[Tensor, ...]]
# Calls in a row whose parameters had moved before a warning; and kinds of calls to count for each graph.
_MANY = 20
# Whether this thread records: a captured module inside of another one runs as it is then.
_recording = threading.local()


def capture(model: _M, *, warm_up: int = 3, shapes: int = 4) -> _M:
    """Replay a network's forward and backward pass as CUDA graphs, in place.

    At 1 to 4 samples a GPU waits for Python most of the time; replaying a graph needs no Python. Numbers,
    running statistics and the training loop stay the same, with autocast, gradient scaling, accumulation
    and clipping, and `DistributedDataParallel` around the model. The first batches of a shape run without
    a graph; the next one is recorded by :func:`torch.cuda.make_graphed_callables`; later ones are
    replayed. Calls also run without a graph in ``eval()``, without gradients, on a CPU, inside
    ``torch.compile`` and activation checkpoints, and before the backward pass of another call. A graph
    is recorded again after parameters were moved or frozen, and modules switched to training or back.

    Python's decisions during the recording are final: a forward pass must not depend on the values of
    tensors, or on counts that it keeps in Python. Capture the part of a detector that has static shapes:
    ``model.backbone = kn.capture(model.backbone)``. Beliefs about its inputs and outputs pass through.

    Args:
        model: any module, converted or not. It takes and returns tensors, also in lists, tuples and dicts.
        warm_up: the number of batches of a shape before the recording, at least 1.
        shapes: the largest number of graphs; other shapes run without one. Each holds the memory of a step.

    Returns:
        The model. ``del model.forward`` undoes it.

    Raises:
        TypeError: for an object that is not a module.
        ValueError: for a captured model; for layers with ``momentum=None``, which read their count of batches; for a
            number below 1.
        RuntimeError: in a later call, for a batch that cannot be recorded.

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
    """The forward of a captured module."""

    changes = 0  # calls since the last recording that found another state than the call before

    def __init__(self, module: nn.Module, warm_up: int, shapes: int) -> None:
        self.module = module
        self.warm_up = warm_up
        self.shapes = shapes
        self.own = module.__dict__.get("forward")  # a forward of this module, not of its class
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

    @property
    def __signature__(self) -> inspect.Signature:  # `input_stats` may be given by its names
        return inspect.signature(self.as_it_is)

    @property
    def as_it_is(self) -> Callable[..., Any]:
        """The module's forward, without a graph."""
        return self.own or partial(type(self.module).forward, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not self.module.training or not torch.is_grad_enabled():
            return self.as_it_is(*args, **kwargs)
        leaves, form = tree_flatten((args, kwargs))
        tensors = _tensors(leaves)
        if not _is_capturable(leaves, tensors) or not any(p.requires_grad for p in self.module.parameters()):
            return self.as_it_is(*args, **kwargs)
        with paused():
            self._forget_after_changes()
            beliefs = [_belief_of(t) for t in tensors]
            key = _key(leaves, form, beliefs)
        if key not in self.graphs and self._is_due(key):
            self.graphs[key] = _Graph(self, leaves, form, beliefs)
            self.changes = 0
        graph = self.graphs.get(key)
        return self.as_it_is(*args, **kwargs) if graph is None or graph.is_awaited else graph(tensors, beliefs)

    def _forget_after_changes(self) -> None:
        """Drop the graphs if the module's parameters, buffers or modes are others now."""
        if (state := _state(self.module)) == self.state:
            return
        self._forget()
        self.state = state
        self.changes += 1
        if self.changes == _MANY:
            warnings.warn(
                f"kalmannorm.capture has recorded nothing of {type(self.module).__name__} yet: at each call some "
                "parameter or buffer is another tensor than before, or a module was switched. Change tensors in "
                "place",
                stacklevel=4,
            )

    def _is_due(self, key: Any) -> bool:
        """Whether to record a call, after enough calls like it."""
        if len(self.seen) > _MANY * self.shapes:
            self.seen.clear()
        self.seen[key] += 1
        # A graph would not find corrections; but a layer that is never called may await one for ever.
        awaits = any(layer.awaits_correction for _, layer in kalman_layers(self.module))
        return self.seen[key] > self.warm_up + awaits * _MANY and len(self.graphs) < self.shapes


def _is_capturable(leaves: Sequence[Any], tensors: Sequence[Tensor]) -> bool:
    if not tensors or is_transformed() or saved_tensor_hooks() is not None or getattr(_recording, "is_on", False):
        return False
    if not all(isinstance(leaf, Tensor) or type(leaf) in SCALARS for leaf in leaves):
        return False
    return all(_is_on_gpu(t) for t in tensors) and not _is_being_captured()


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _is_being_captured() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _state(module: nn.Module) -> tuple[Any, ...]:
    """Flags and addresses that a graph depends on."""
    layers = [layer for _, layer in kalman_layers(module)]
    return (
        tuple([(each.training, getattr(each, "momentum", None)) for each in module.modules()]),
        tuple([(t.data_ptr(), t.requires_grad) for t in tensors_of(module)]),
        tuple([(each.frozen, each.online, each.is_corrected, each.awaits_correction) for each in layers]),
    )


def _belief_of(tensor: Tensor) -> Belief | None:
    """The belief about a tensor that enters or leaves the module; None without a step."""
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
    """Identifies calls that one graph can replay."""
    given = [(t.shape, t.stride(), t.dtype, t.device, t.requires_grad) if isinstance(t, Tensor) else (type(t), t)
             for t in leaves]  # fmt: skip
    known = [(b.moments.shape, b.moments.requires_grad) if isinstance(b, Packed) else b for b in beliefs]
    amp = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
    return tuple(given), str(form), tuple(known), amp


class _Graph:
    """A recorded call. Its arguments are ``leaves`` in a nesting ``form``; ``beliefs`` are about their tensors."""

    def __init__(self, replayed: _Replayed, leaves: Sequence[Any], form: TreeSpec,
                 beliefs: Sequence[Belief | None]) -> None:  # fmt: skip
        self.parameters = _trained(replayed.module)
        self.awaited: weakref.ref[Any] | None = None  # the last replay's autograd node
        mode = current()
        waiting = None if mode is None else mode.await_input(None)
        run = self._function(replayed, leaves, form, beliefs, mode, waiting)
        with paused():
            given = [*_tensors(leaves), *_moments(beliefs)]
            samples = [t.detach().clone().requires_grad_(t.requires_grad) for t in given]
        try:
            self.replay = _recorded(replayed.module, run, samples)
        finally:
            if mode is not None:
                mode.await_input(waiting)

    def _function(self, replayed: _Replayed, leaves: Sequence[Any], form: TreeSpec, beliefs: Sequence[Belief | None],
                  mode: Recorder | None, waiting: Gaussian | None) -> _Function:  # fmt: skip
        """The call as a function of tensors, the moments of their beliefs, and parameters; it returns the first two."""
        layers = [layer for _, layer in kalman_layers(replayed.module)] if mode is None else mode.layers
        is_part = mode is not None and mode.opener is not replayed.module
        count, with_moments = len(beliefs), len(beliefs) + len(_moments(beliefs))
        amp = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")

        def run(*given: Tensor) -> tuple[Tensor, ...]:
            tensors = [t.clone() if t.requires_grad else t for t in given[:count]]  # it may be changed in place
            if mode is not None:
                mode.await_input(waiting)  # each run of the recording takes it
            _attach(tensors, beliefs, given[count:with_moments], "input")
            args, kwargs = tree_unflatten(_filled(leaves, tensors), form)
            watched = Recorder(layers) if mode is None else nullcontext()
            # A graph must not read copies of parameters that autocast cached outside of it.
            with watched, torch.autocast("cuda", amp[1], enabled=amp[0], cache_enabled=False):
                outputs, self.form = tree_flatten(replayed.as_it_is(*args, **kwargs))
            self.found_input = waiting is not None and mode is not None and mode.await_input(None) is None
            tensors = _tensors(outputs)
            _check_parameters(tensors, given)
            self.outputs = [_TENSOR if isinstance(t, Tensor) else t for t in outputs]
            self.are_derived = [t.requires_grad for t in tensors]
            with paused():
                self.beliefs = [_belief_of(t) if is_part else None for t in tensors]
            return *tensors, *_moments(self.beliefs)

        return run

    @property
    def is_awaited(self) -> bool:
        """Whether the last replay may still get a backward pass, whose memory the next one would overwrite."""
        node = None if self.awaited is None else self.awaited()
        return node is not None and not node.is_done

    def __call__(self, tensors: Sequence[Tensor], beliefs: Sequence[Belief | None]) -> Any:
        if self.found_input and (mode := current()) is not None:
            mode.await_input(None)
        with paused():
            given = [*tensors, *_moments(beliefs), *self.parameters]
            places = [place for place, t in enumerate(given) if t.requires_grad]
            views = _WithOwnGradients.apply(self, *[given[place] for place in places])  # type: ignore[no-untyped-call]
            for place, view in zip(places, views, strict=True):
                given[place] = view
            # A graph always writes its outputs to the same memory.
            found = [t.clone() for t in self.replay(*given)]
            outputs = [t if is_derived else t.detach() for t, is_derived in zip(found, self.are_derived, strict=False)]
            _attach(outputs, self.beliefs, found[len(outputs) :], "captured")
        return tree_unflatten(_filled(self.outputs, outputs), self.form)


_TENSOR = object()  # in the place of a tensor in flat outputs


def _tensors(leaves: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _filled(leaves: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """Flat arguments or outputs with other tensors."""
    given = iter(tensors)
    return [next(given) if leaf is _TENSOR or isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _moments(beliefs: Sequence[Belief | None]) -> list[Tensor]:
    return [belief.moments for belief in beliefs if isinstance(belief, Packed)]


def _attach(tensors: Sequence[Tensor], beliefs: Sequence[Belief | None], moments: Sequence[Tensor],
            source: str) -> None:  # fmt: skip
    """Attach beliefs to tensors, with other moments."""
    given = iter(moments)
    for tensor, belief in zip(tensors, beliefs, strict=True):
        if belief is not None:
            attach(tensor, Packed(next(given)) if isinstance(belief, Packed) else belief, source)


class _WithOwnGradients(torch.autograd.Function):
    """The identity, whose backward pass copies gradients: ``.grad`` may keep the memory of those that it gets."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.is_done, ctx.graph = False, graph
        graph.awaited = weakref.ref(ctx)
        return tuple([t.view_as(t) for t in tensors])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.is_done or ctx.graph.awaited() is not ctx:
            raise RuntimeError(
                "kalmannorm.capture got a second backward pass of a call, or one after a later call, expected one "
                "before the next call: the graph's memory is used again"
            )
        ctx.is_done = True
        given = [g for g in gradients if g is not None]
        copies = iter(torch._foreach_mul(given, 1.0) if given else [])
        return None, *[None if g is None else next(copies) for g in gradients]


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


@contextmanager
def _twins(module: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Put other parameters of the same memory in the place of those that are trained.

    Autograd keeps a parameter's node, and the stream that it was made on, while a loss or `DistributedDataParallel`
    refers to it. A recording by this node would wait for that stream, which CUDA does not allow. So hooks of the
    parameters run at a replay's gradients, and not in the recording.
    """
    twins = {p: nn.Parameter(p.detach()) for p in _trained(module)}
    for p, twin in twins.items():
        twin.__class__ = type(p)
        twin.__dict__.update(p.__dict__)
    places = [(each._parameters, name, p) for each in module.modules() for name, p in each._parameters.items()
              if p in twins]  # fmt: skip
    recurrent = [each for each in module.modules() if isinstance(each, nn.RNNBase)]  # have lists of their parameters
    with attributes_kept(recurrent, "_flat_weights", "_flat_weight_refs"):
        for each in recurrent:
            each._flat_weights = [p if p is None else twins.get(p, p) for p in each._flat_weights]  # type: ignore[arg-type]
            each._flat_weight_refs = [p if p is None else weakref.ref(p) for p in each._flat_weights]
        try:
            for parameters, name, p in places:
                parameters[name] = twins[p]
            yield [*twins.values()]
        finally:
            for parameters, name, p in places:
                parameters[name] = p


def _check_parameters(outputs: Sequence[Tensor], known: Sequence[Tensor]) -> None:
    """Refuse a module that uses parameters of others, or its own by other ways than their attributes: the graph would
    have no gradient.
    """
    waiting: list[Any] = [t.grad_fn for t in outputs]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [below for below, _ in node.next_functions]
    leaves = {id(leaf) for node in seen if (leaf := getattr(node, "variable", None)) is not None}
    if not leaves <= {id(t) for t in known}:
        raise RuntimeError("a parameter is used by way of a list, closure or hook, and not as its module's attribute")


def _recorded(module: nn.Module, run: _Function, samples: Sequence[Tensor]) -> _Function:
    """Record a function of samples and parameters. Buffers and random state are restored: the batch is still to run."""
    try:
        _recording.is_on = True
        # A backward pass runs without autocast.
        with (random_state_kept(module), buffers_kept(module), _twins(module) as twins,
              torch.autocast("cuda", enabled=False)):  # fmt: skip
            return _graphed(run, (*samples, *twins))
    except RuntimeError as error:
        # What invalidated a capture is told first, and then that it was invalidated.
        is_told = "previous error during capture" in str(error) and isinstance(error.__context__, Exception)
        cause: Any = error.__context__ if is_told else error
        raise RuntimeError(
            f"kalmannorm.capture cannot record {type(module).__name__} ({first_line(cause)}): expected a "
            "forward pass that asks for no tensor's value, as .item(), .cpu(), print and boolean masks do. Capture a "
            "part of the model, or undo it: del model.forward"
        ) from error
    finally:
        _recording.is_on = False


def _graphed(run: _Function, samples: tuple[Tensor, ...]) -> _Function:
    device = samples[0].device
    before = torch.cuda.current_stream(device)
    graph: Any = torch.cuda.graph
    # Other threads, a data loader's or NCCL's, may go on; torch 2.11 takes the mode where it makes the graph alone.
    mode: dict[str, Any] = {"capture_error_mode": "thread_local"}
    record = partial(graph, **mode)
    gc.collect()  # graphs that were dropped refer to themselves, and hold the memory of a step each
    with (torch.cuda.device(device), attributes_kept([graph], "default_capture_stream"),
          attributes_kept([torch.cuda], "graph")):  # fmt: skip
        graph.default_capture_stream = None  # may be another device's
        if "capture_error_mode" not in inspect.signature(torch.cuda.make_graphed_callables).parameters:
            torch.cuda.graph, mode = record, {}  # type: ignore[misc, assignment]
        try:
            graphed: Any = torch.cuda.make_graphed_callables(run, samples, allow_unused_input=True, **mode)
        except BaseException:
            # In torch 2.11 random numbers then wait for the end of a capture: a successful one.
            with suppress(RuntimeError), record(torch.cuda.CUDAGraph()):
                torch.zeros(1, device=device)
            raise
        finally:
            torch.cuda.set_stream(before)  # a recording that failed leaves its own
    return graphed  # type: ignore[no-any-return]
