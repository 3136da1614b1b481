"""CUDA graphs without a GPU, for torch's own `make_graphed_callables`.

A capture notes the operators that run, and a replay runs them again into the same memory, without Python and without
changes that autograd could count. What CUDA does not allow in a capture is an error here too: to ask for a tensor's
value, and to make a tensor of numbers that Python has.
"""

import contextlib
import types

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kalmannorm import graphs
from kalmannorm.kernels import on_cpu

_WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "lift_fresh"}
_LEAVES_ALONE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias"}


class _Noted(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put_") and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name in _WAITS or masks:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        found = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, found))
        return found


class _Graph:
    def __init__(self, keep_graph=False):
        self.calls = []

    def replay(self):
        below = torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView))
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd(), below:
            for func, args, kwargs, found in self.calls:
                if func.overloadpacket.__name__ in _LEAVES_ALONE:
                    continue
                for mine, new in zip(tree_leaves(found), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(new, torch.Tensor) and new.numel() and mine.data_ptr() != new.data_ptr():
                        mine.copy_(new)


class _Capture:
    """As `torch.cuda.graph`: a capture that has failed leaves its stream current, and random numbers unusable."""

    default_capture_stream = "of another device"
    now = None  # the graph that is being captured
    is_unfinished = False  # torch 2.11: "Offset increment outside graph capture encountered unexpectedly"

    def __init__(self, graph, pool=None, stream=None, capture_error_mode="global", **_):
        assert capture_error_mode == "thread_local"
        assert self.default_capture_stream is None
        self.graph = graph

    def __enter__(self):
        _Capture.now = self.graph
        self.noted = _Noted(self.graph)
        self.noted.__enter__()
        torch.cuda.set_stream("capture")

    def __exit__(self, kind, *_):
        self.noted.__exit__(kind, *_)
        _Capture.now = None
        _Capture.is_unfinished = kind is not None
        if kind is not None:
            raise RuntimeError("operation failed due to a previous error during capture")
        torch.cuda.set_stream("side")


def install(monkeypatch):
    """Let `kalmannorm.capture` capture on the CPU; return the list of streams that were current, the last one now."""
    monkeypatch.setattr(graphs, "_is_on_gpu", lambda t: True)
    monkeypatch.setattr(graphs, "_is_being_captured", lambda: _Capture.now is not None)
    monkeypatch.setattr(on_cpu, "is_available", lambda: False)  # its kernels are no operators of torch's
    streams = ["default"]
    fakes = {
        "CUDAGraph": _Graph, "graph": _Capture, "graph_pool_handle": lambda: (0, 0), "synchronize": lambda: None,
        "Stream": lambda: types.SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda device: streams[-1],
        "stream": lambda stream: contextlib.nullcontext(), "device": lambda device: contextlib.nullcontext(),
        "set_stream": streams.append,
        "is_current_stream_capturing": lambda: _Capture.now is not None,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
        if hasattr(torch.cuda.graphs, name):
            monkeypatch.setattr(torch.cuda.graphs, name, fake)
    return streams
