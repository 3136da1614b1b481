"""The step of a side: a function that calls ``mark(part)`` at the end of each part."""

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import networks
from benchmarks.networks import UnavailableError
from benchmarks.sides import SIDES

COMPILED = {"compiled": {}, "reduce_overhead": {"mode": "reduce-overhead"}}


def step_of(case, method, device, backend="inductor"):
    """The step of one method, and a function that returns the tensors kept between steps, see `persistent`."""
    if case.mode in ("graph", "reduce_overhead") and device == "cpu":
        raise UnavailableError("graphs are CUDA's")
    if case.kind == "copy":
        return copy(case, device), lambda: []
    side = SIDES[method]
    model = networks.build(case).to(device, memory_format=networks.layout(case))
    model = side.convert(model, case).train(case.kind != "inference")
    called = model
    if case.mode in COMPILED:
        called = torch.compile(model, backend=backend, **(COMPILED[case.mode] if backend == "inductor" else {}))
    images, labels = networks.batch(case, device)
    pieces = case.stats_batch if side.in_pieces else case.batch
    optimizer = None
    if case.kind == "inference":
        step = inference(called, images, case, device)
    elif case.network == "layer":
        step = layer(model, called, images.split(pieces), case, device)
    else:
        # A rate of 0 costs the same, and a detector's work, which depends on its outputs, stays the same.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        step = training(called, list(zip(images.split(pieces), labels.split(pieces), strict=True)), optimizer, case,
                        device)  # fmt: skip
    if case.mode == "reduce_overhead":
        step = in_new_generation(step)
    if case.mode == "graph":
        step = captured(step)
    return step, lambda: persistent(model, optimizer)


def autocast(case, device):
    return torch.autocast(device, torch.bfloat16, enabled=case.dtype == "bfloat16")


def training(model, pieces, optimizer, case, device):
    """A step: forward and backward for each piece, then the optimizer's step, which also clears the gradients."""

    def step(mark):
        for images, labels in pieces:
            with autocast(case, device):
                out = model(images)
                loss = (out if out.ndim == 0 else F.cross_entropy(out, labels)) / len(pieces)
            mark("forward")
            loss.backward()
            mark("backward")
        optimizer.step()
        optimizer.zero_grad()
        mark("optimizer")

    return step


def layer(model, called, pieces, case, device):
    """A step: the output and all gradients, for a given gradient of the output.

    `autograd.grad` leaves out the accumulation into ``.grad``, which costs the same on all sides.
    """
    parameters = list(model.parameters())
    inputs = [piece.to(getattr(torch, case.dtype)).clone().requires_grad_() for piece in pieces]
    with autocast(case, device):
        given = torch.randn_like(model(inputs[0]))  # `called` would compile here, which is timed separately

    def step(mark):
        for x in inputs:
            with autocast(case, device):
                y = called(x)
            mark("forward")
            torch.autograd.grad(y, (x, *parameters), given, allow_unused=True)
            mark("backward")

    return step


def inference(model, images, case, device):
    def step(mark):
        with torch.inference_mode(), autocast(case, device):
            model(images)
        mark("forward")

    return step


def copy(case, device):
    """A step that copies memory; a layer's bandwidth is compared with it."""
    source = torch.randn(case.size * 2**18, device=device)
    target = torch.empty_like(source)
    return lambda mark: target.copy_(source)


def in_new_generation(step):
    """Mark the beginning of each step, so that torch.compile's CUDA graphs may overwrite the last step's outputs."""

    def next_step(mark):
        torch.compiler.cudagraph_mark_step_begin()
        step(mark)

    return next_step


def captured(step):
    """The whole step as one CUDA graph, warmed up on a side stream, as torch requires."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(lambda part: None)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(lambda part: None)

    def replay(mark, held=step):  # the graph reads the step's batch, so keep it alive
        graph.replay()

    return replay


def persistent(model: nn.Module, optimizer):
    """Tensors that outlive a step."""
    state = [] if optimizer is None else [value for entry in optimizer.state.values() for value in entry.values()]
    return [*model.parameters(), *model.buffers(), *(value for value in state if isinstance(value, torch.Tensor))]
