"""Two processes train a model sharded by FSDP2, each on its half of every batch."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from network import adam, build, layers_with_prior, pretrained, sgd, state_of, train_step
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import kalmannorm as kn

HALVES = (slice(0, 2), slice(2, 4))


def shard(model, modules, **options):
    mesh = init_device_mesh("cpu", (2,))
    for module in (*modules, model):
        fully_shard(module, mesh=mesh, **options)
    return model


def by_blocks(model, **options):
    return shard(model, model.blocks, **options)


def by_leaves(model):
    """Each convolution and each norm by itself, and freed as soon as it has run."""
    leaves = [module for module in model.modules() if not list(module.children()) and list(module.parameters())]
    return shard(model, leaves, reshard_after_forward=True)


def by_recomputed_blocks(model):
    """Blocks that run again in the backward pass."""
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
    return by_blocks(model)


class InParts:
    """A network whose parts are called one by one, each a model of its own for FSDP: nothing is watched
    while its hooks before a part run.
    """

    def __init__(self, model):
        self.model, self.parameters = model, model.parameters
        self.parts = [model.stem, *model.blocks]
        for part in (*self.parts, model.head):
            shard(part, [], reshard_after_forward=True)

    def __call__(self, x):
        for part in self.parts:
            x = part(x)
        return self.model.head(x.mean([2, 3]))


def train(model, rank, in_parts=False):
    call = InParts(model) if in_parts else model
    optimizer, names = sgd(model), layers_with_prior(model)
    losses = [train_step(call, optimizer, step, HALVES[rank]) for step in range(3)]
    state = {without_wrapper(name): tensor for name, tensor in state_of(model).items()}
    return {"losses": losses, "state": state, "with_prior": set(map(without_wrapper, names))}


def without_wrapper(name):
    return name.replace("_checkpoint_wrapped_module.", "")


def moments_of(model, optimizer):
    """What the optimizer keeps for each parameter, whole."""
    return {
        f"{name}.{key}": getattr(value, "full_tensor", value.clone)()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def save_or_load(function, model, optimizer, folder):
    """``dcp.save``, or ``dcp.load`` in place; then what model and optimizer hold."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    function(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return {**state_of(model), **moments_of(model, optimizer)}


def save_and_go_on(model, folder, part=slice(None)):
    """Two steps that anneal, a checkpoint, and the next step."""
    optimizer = adam(model)
    for step in range(2):
        train_step(model, optimizer, step, part)
        kn.anneal(model, 3.0)
    saved = save_or_load(dcp.save, model, optimizer, folder)
    train_step(model, optimizer, 2, part)
    return {"checkpoint": saved, "next": state_of(model)}


def load_and_go_on(model, folder, part=slice(None)):
    """A checkpoint of somebody else, and the next step."""
    optimizer = adam(model)
    loaded = save_or_load(dcp.load, model, optimizer, folder)
    train_step(model, optimizer, 2, part)
    return {"checkpoint": loaded, "next": state_of(model)}


def shared():
    return kn.convert(build(), process_group=dist.group.WORLD)


def in_each_way(rank, folder):
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    return {
        "blocks": train(by_blocks(kn.convert(build())), rank),
        "pretrained": train(by_blocks(kn.convert(pretrained())), rank),
        "leaves": train(by_leaves(kn.convert(build())), rank),
        "recomputed": train(by_recomputed_blocks(kn.convert(build())), rank),
        "parts": train(kn.convert(build()), rank, in_parts=True),
        "draws": train(by_blocks(kn.convert(build(), estimator="monte_carlo")), rank),
        "bfloat16": train(by_blocks(kn.convert(build(torch.float32)), mp_policy=low), rank),
        "saved": save_and_go_on(by_blocks(shared()), f"{folder}/by_two", HALVES[rank]),
        "loaded": load_and_go_on(by_blocks(shared()), f"{folder}/by_one", HALVES[rank]),
    }
