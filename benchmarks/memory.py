"""Memory of a step: its peak, and that saved for the backward pass."""

import gc

import torch


def nothing(part):
    """A ``mark`` that does nothing, for steps whose parts are not timed."""


def saved_bytes(step, persistent):
    """Bytes that autograd saves for the backward pass, each storage once, `persistent` tensors left out.

    Tensors that a function keeps as attributes are not counted; they are in the peak.
    """
    left_out = {tensor.untyped_storage().data_ptr() for tensor in persistent}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            kept[storage.data_ptr()] = storage  # kept alive, so that its address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(nothing)
    return sum(storage.nbytes() for storage in kept.values())


def peak_cuda(step, before):
    """Peak bytes allocated in a step, less ``before``, those allocated before this side was built."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step(nothing)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_cpu(step, persistent):
    """The same on the CPU, from the profiler's record of allocations; oneDNN's scratch space is not included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(nothing)
    roots = profile.profiler.kineto_results.experimental_event_tree()
    total = peak = 0
    for _, size in sorted(allocations(roots)):
        total += size
        peak = max(peak, total)
    return peak + sum(tensor.nbytes for tensor in persistent)


def allocations(roots):
    """Yield the time and the bytes of each allocation; freed bytes are negative."""
    waiting = list(roots)
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if "Allocation" in str(event.tag):
            yield event.start_time_ns, event.extra_fields.alloc_size
