"""Memory of a step: at its peak, and kept from the forward pass for the backward pass."""

import gc

import torch


def nothing(part):
    """A ``mark`` for steps whose parts are not timed."""


def saved_bytes(step, persistent):
    """Bytes that autograd keeps for the backward pass, each storage once, those of `persistent` tensors apart.

    What a function keeps past autograd (as an attribute) is not seen here; the peak has it.
    """
    apart = {tensor.untyped_storage().data_ptr() for tensor in persistent}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart:
            kept[storage.data_ptr()] = storage  # held, so that its address is not given away again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(nothing)
    return sum(storage.nbytes() for storage in kept.values())


def peak_cuda(step, before):
    """Highest number of bytes allocated in a step, above what was there before this side was made."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step(nothing)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_cpu(step, persistent):
    """The same on the CPU: torch's allocator tells its profiler of each block. Scratch space of oneDNN is not seen."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(nothing)
    roots = profile.profiler.kineto_results.experimental_event_tree()
    total = peak = 0
    for _, size in sorted(allocations(roots)):
        total += size
        peak = max(peak, total)
    return peak + sum(tensor.nbytes for tensor in persistent)


def allocations(roots):
    """When, and how many bytes; freed ones are negative."""
    waiting = list(roots)
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if "Allocation" in str(event.tag):
            yield event.start_time_ns, event.extra_fields.alloc_size
