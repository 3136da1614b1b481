"""Many processes: statistics shared between them, DDP, FSDP2, checkpoints, restarts. All on gloo and this machine.

What two processes do is in ``torchrun/``; each does several things, as a start takes seconds.
"""

import copy
import dataclasses
import importlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from data_parallel import in_each_way as data_parallel_in_each_way
from network import batch, build, in_two_processes, layers_with_prior, pretrained, sgd, state_of, train_step
from restart import KILLED_AT
from sharded import HALVES, load_and_go_on, save_and_go_on
from sharded import in_each_way as sharded_in_each_way
from torch import nn
from torch.distributed import pipelining
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import kalmannorm as kn
from kalmannorm.kernels import on_cpu
from kalmannorm.shards import _leave_shard

PROGRAMS = Path(__file__).parent / "torchrun"
pytestmark = pytest.mark.slow


def torchrun(program, *arguments, restarts=0):
    """Run a program of ``torchrun/`` in two processes; all are ended if it takes too long."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", str(PROGRAMS / program), *map(str, arguments)]
    paths = f"{PROGRAMS.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": paths}
    # Processes that were started again find the addresses of the dead ones in a store that outlives them
    # (pytorch#135712, pytorch#167288): this gives each start a store of its own.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        try:
            output, _ = run.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            run.terminate()  # torchrun ends its processes then
            output, _ = run.communicate(timeout=60)
            pytest.fail(f"{program} did not end in time\n{output}")
    assert run.returncode == 0, output


def assert_same(actual, expected, **tolerance):
    """Of dictionaries of tensors."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def only_parameters(state, model):
    return {name: state[name] for name, _ in model.named_parameters()}


def train_by_hand(model, parts, micro_batches=1, steps=3):
    """A copy of the model for each part of the batch; their gradients averaged after each step."""
    models = [copy.deepcopy(model) for _ in parts]
    optimizers, losses = [sgd(each) for each in models], [[] for _ in parts]
    for step in range(steps):
        images, labels = batch(step)
        for each, part, record in zip(models, parts, losses, strict=True):
            each.zero_grad()
            for x, label in zip(images[part].chunk(micro_batches), labels[part].chunk(micro_batches), strict=True):
                loss = F.cross_entropy(each(x), label) / micro_batches
                loss.backward()
            record.append(loss.item())
        for same in zip(*(each.parameters() for each in models), strict=True):
            mean = torch.stack([parameter.grad for parameter in same]).mean(0)
            for parameter in same:
                parameter.grad = mean.clone()
        for optimizer in optimizers:
            optimizer.step()
    return models, losses


def trained_on_the_whole_batch(steps=3):
    model = kn.convert(build())
    optimizer = sgd(model)
    for step in range(steps):
        train_step(model, optimizer, step)
    return model


# -- weights that one process alone has ------------------------------------------------------------


def with_weights_of_the_first(rank):
    images, _ = batch(0)
    by_ddp = kn.convert(pretrained() if rank == 0 else build())
    output = DistributedDataParallel(by_ddp)(images).detach()
    sent = kn.convert(pretrained()).state_dict() if rank == 0 else {}
    by_dict = kn.convert(build())
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(by_dict, sent, options=whole)
    sharded, stock = fully_shard(kn.convert(build())), pretrained().state_dict() if rank == 0 else {}
    set_model_state_dict(sharded, stock, options=dataclasses.replace(whole, strict=False))
    return {"DDP": output, "set_model_state_dict": by_dict(images).detach(), "FSDP": sharded(images).detach()}


@pytest.fixture(scope="module")
def spawned(tmp_path_factory):
    """What each of two processes gives."""
    return in_two_processes(outputs_of_one, tmp_path_factory.mktemp("spawned"))


def outputs_of_one(rank):
    return {"weights of the first": with_weights_of_the_first(rank), **passes(rank)}


def test_all_processes_get_the_weights_and_corrections_of_the_first(spawned):
    expected = kn.convert(pretrained())(batch(0)[0]).detach()
    for result in spawned:
        for output in result["weights of the first"].values():
            torch.testing.assert_close(output, expected)


# -- statistics shared by process_group ------------------------------------------------------------


def build_small():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    ).double()
    return model


def batch_of_six():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)


SPLITS = [[3, 3], [4, 2], [6, 0]]


def passes(rank):
    return {str(split): forward_and_backward(rank, split) for split in SPLITS}


def forward_and_backward(rank, split):
    model = kn.convert(build_small(), process_group=dist.group.WORLD)
    parallel = DistributedDataParallel(model)
    x = batch_of_six().split(split)[rank].clone().requires_grad_()
    y = parallel(x)
    (y.square().sum() * 2).backward()  # DDP averages the gradients of the two processes
    return {
        "y": y.detach(), "dx": x.grad / 2, "grads": {n: p.grad for n, p in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
    }  # fmt: skip


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_two_processes_equal_one_with_the_whole_batch(spawned, split):
    first, second = (result[str(split)] for result in spawned)
    model = kn.convert(build_small())
    x = batch_of_six().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    close = {"rtol": 1e-5, "atol": 1e-8}
    torch.testing.assert_close(torch.cat([first["y"], second["y"]]), y.detach(), **close)
    torch.testing.assert_close(torch.cat([first["dx"], second["dx"]]), x.grad, **close)
    for state in (first, second):
        assert_same(state["grads"], {name: p.grad for name, p in model.named_parameters()}, **close)
        assert_same(state["buffers"], dict(model.named_buffers()), **close)


# -- DistributedDataParallel -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def data_parallel(tmp_path_factory):
    """Results of each process."""
    folder = tmp_path_factory.mktemp("data_parallel")
    return in_two_processes(partial(data_parallel_in_each_way, folder=folder), folder)


@pytest.mark.parametrize(("name", "micro_batches"), [("each for itself", 1), ("accumulated", 2)])
def test_ddp_averages_gradients(data_parallel, name, micro_batches):
    """``accumulated``: over two micro-batches, the first under ``no_sync``."""
    first, second = (result[name] for result in data_parallel)
    models, _ = train_by_hand(kn.convert(build()), HALVES, micro_batches)
    close = {"rtol": 1e-9, "atol": 1e-12}
    assert_same(first["state"], state_of(models[0]), **close)
    for result in (first, second):
        assert not any(result["shared"].values())
        assert_same(only_parameters(result["state"], models[0]), only_parameters(first["state"], models[0]))
        assert all(tensor.isfinite().all() for tensor in result["state"].values())


def corrections_in(state):
    return {key: tensor for key, tensor in state.items() if "prior_s" in key}


def test_ddp_corrects_priors_alike_on_all_processes(data_parallel):
    first, second = (result["pretrained"]["state"] for result in data_parallel)
    models, _ = train_by_hand(kn.convert(pretrained()), HALVES)
    assert len(corrections_in(first)) == 2 * 8
    assert_same(corrections_in(first), corrections_in(second), rtol=0, atol=0)
    assert_same(corrections_in(first), corrections_in(state_of(models[0])), rtol=1e-9, atol=1e-12)
    assert_same(only_parameters(first, models[0]), only_parameters(second, models[0]))
    by_hand = only_parameters(state_of(models[0]), models[0])
    assert_same(only_parameters(first, models[0]), by_hand, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["process_group", "SyncBatchNorm", "convert_sync_batchnorm"])
def test_ddp_with_shared_statistics_trains_as_one_process(data_parallel, name):
    """In uneven parts, too. A SyncBatchNorm converted in a process group shares its statistics."""
    expected = state_of(trained_on_the_whole_batch())
    for result in data_parallel:
        assert all(result[name]["shared"].values())
        assert_same(result[name]["state"], expected, rtol=1e-5, atol=1e-8)


# -- FSDP2 -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """What the two processes did, and the one that saved the checkpoint that they loaded."""
    folder = tmp_path_factory.mktemp("sharded")
    one = save_and_go_on(kn.convert(build()), folder / "by_one")
    return in_two_processes(partial(sharded_in_each_way, folder=folder), folder), one, folder


def all_but_the_first_layer():
    model = kn.convert(build())
    names = layers_with_prior(model)
    model(batch(0)[0])
    assert len(names) == 7
    return names


@pytest.mark.parametrize("name", ["blocks", "leaves", "recomputed", "parts"])
def test_a_sharded_model_trains_as_a_whole_one(sharded, name):
    models, losses = train_by_hand(kn.convert(build()), HALVES)
    for result, model, loss in zip(sharded[0], models, losses, strict=True):
        assert result[name]["with_prior"] == all_but_the_first_layer()
        torch.testing.assert_close(result[name]["losses"], loss, rtol=1e-5, atol=1e-8)
        assert_same(result[name]["state"], state_of(model), rtol=1e-5, atol=1e-8)


def test_a_sharded_pretrained_model_corrects_its_priors(sharded):
    models, losses = train_by_hand(kn.convert(pretrained()), HALVES)
    for result, model, loss in zip(sharded[0], models, losses, strict=True):
        torch.testing.assert_close(result["pretrained"]["losses"], loss, rtol=1e-5, atol=1e-8)
        assert_same(result["pretrained"]["state"], state_of(model), rtol=1e-5, atol=1e-8)
        assert all((scale >= 0).all() for scale in list(corrections_in(state_of(model)).values())[3::2])


@pytest.mark.parametrize(("name", "steps", "tolerance"), [("draws", 1, 0.2), ("bfloat16", 3, 0.05)])
def test_a_sharded_model_trains_otherwise(sharded, name, steps, tolerance):
    """By draws, and with parameters and activations of bfloat16: running statistics stay float32."""
    _, losses = train_by_hand(kn.convert(build()), HALVES)
    wide = torch.float64 if name == "draws" else torch.float32
    for result, loss in zip(sharded[0], losses, strict=True):
        assert result[name]["with_prior"] == all_but_the_first_layer()
        torch.testing.assert_close(result[name]["losses"][:steps], loss[:steps], rtol=tolerance, atol=0)
        for key, tensor in result[name]["state"].items():
            assert tensor.isfinite().all(), key
            assert tensor.dtype == (wide if tensor.is_floating_point() else torch.int64), key


def freeing():
    """A network whose second convolution loses its weight as soon as it has run. To read it would end the process."""
    model = kn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))

    def free(module, args, output):
        module.weight.untyped_storage().resize_(0)

    model[2].register_forward_hook(free)
    return model


def test_a_belief_that_needs_freed_parameters_is_unknown(monkeypatch):
    importlib.import_module("torch.distributed.fsdp")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    description = kn.describe(freeing(), torch.randn(2, 3, 8, 8))
    assert description.rows[1].reason == "it depends on parameters that FSDP has freed"


@pytest.mark.skipif(not on_cpu.is_available(), reason="needs a C compiler")
def test_who_frees_parameters_without_fsdp_gets_a_warning():
    with pytest.warns(UserWarning, match=r"got a weight of shape \(4, 4, 3, 3\) whose memory was freed, expected"):
        freeing()(torch.randn(2, 3, 8, 8))


def test_who_asks_whether_an_output_is_a_view_changes_nothing():
    """FSDP does."""

    class Asks(nn.Module):
        def forward(self, x):
            assert x.flatten(2)._base is x
            return x

    model = kn.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), Asks(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert kn.describe(model, torch.randn(2, 3, 8, 8)).with_prior == 1


def test_a_checkpoint_of_two_processes_goes_on_in_one(sharded):
    two, _, folder = sharded
    here = load_and_go_on(kn.convert(build()), folder / "by_two")
    for result in two:
        assert_same(here["checkpoint"], result["saved"]["checkpoint"], rtol=0, atol=0)
        assert_same(here["next"], result["saved"]["next"], rtol=0, atol=1e-6)


def test_a_checkpoint_of_one_process_goes_on_in_two(sharded):
    two, one, _ = sharded
    for result in two:
        assert_same(result["loaded"]["checkpoint"], one["checkpoint"], rtol=0, atol=0)
        assert_same(result["loaded"]["next"], one["next"], rtol=0, atol=1e-6)


# -- tensor parallelism ----------------------------------------------------------------------------


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_tensor_of_many_devices_is_refused(mesh):
    model = distribute_module(three_norms(), mesh)
    with pytest.raises(TypeError, match=r"KalmanNorm2d '1' got a DTensor, expected a torch\.Tensor"):
        model(distribute_tensor(batch(0)[0], mesh, [Replicate()]))


def test_a_sharded_network_is_not_converted(mesh):
    model = fully_shard(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), mesh=mesh)
    with pytest.raises(ValueError, match=r"BatchNorm2d '1' is sharded already, .*: call kalmannorm\.convert before"):
        kn.convert(model)
    assert type(model[1]) is nn.BatchNorm2d


def test_each_step_of_a_sharded_network_computes_its_beliefs_once(mesh):
    model = three_norms()
    for module in (model[0], model[3], model):
        fully_shard(module, mesh=mesh)
    for step in range(3):
        model(batch(step)[0]).square().sum().backward()
    for module in (model[0], model[3], model):
        assert list(module._forward_hooks.values()).count(_leave_shard) == 1


def test_behind_a_tensor_parallel_layer_there_is_no_prior(mesh):
    model = kn.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.BatchNorm1d(4)),
                       input_stats=([0.0] * 4, [1.0] * 4))  # fmt: skip
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    assert kn.describe(model, torch.randn(2, 4)).rows[0].reason.endswith("vmap or DTensor")


# -- SyncBatchNorm ---------------------------------------------------------------------------------


def test_a_group_of_sync_batch_norm_stays(mesh):
    group = dist.new_group([0])
    model = kn.convert(nn.Sequential(nn.SyncBatchNorm(3, process_group=group), nn.SyncBatchNorm(3)))
    assert model[0].process_group is group
    assert model[1].process_group is dist.group.WORLD


@pytest.mark.parametrize("options", [{"stats_batch_size": 2}, {"track_running_stats": False}], ids=str)
def test_sync_batch_norm_that_is_to_have_groups_of_its_own_shares_nothing(mesh, options):
    model = kn.convert(nn.Sequential(nn.SyncBatchNorm(3)), **options)
    assert model[0].process_group is None
    assert model[0].statistic_groups(4) == {2: 2}.get(options.get("stats_batch_size"), 4)


def test_a_kind_of_sync_batch_norm_is_copied(mesh):
    """No group of processes can be."""

    class Mine(nn.SyncBatchNorm):
        pass

    model = kn.convert(nn.Sequential(Mine(3, process_group=dist.group.WORLD)), stats_batch_size=1)
    assert type(kn.to_batchnorm(copy.deepcopy(model))[0]) is Mine


# -- pipelines -------------------------------------------------------------------------------------


def three_norms(trained=False):
    torch.manual_seed(0)
    parts = ((nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for channels in (3, 4, 4))
    model = nn.Sequential(*(layer for part in parts for layer in part)).double()
    for _ in range(20 if trained else 0):
        model(batch(0)[0])
    return kn.convert(model, input_stats=([0.0] * 3, [1.0] * 3))


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "pretrained"])
def test_a_traced_pipeline_is_the_whole_network(trained):
    model, x = three_norms(trained), batch(0)[0]
    model(x)
    whole = copy.deepcopy(model)
    pipe = pipelining.pipeline(model, mb_args=(x,), split_spec={"3": pipelining.SplitPoint.BEGINNING})
    handed_on = pipe.get_stage_module(0)(x)
    y, expected = pipe.get_stage_module(1)(*handed_on), whole(x)
    torch.testing.assert_close(y, expected)
    for each in (y, expected):
        each.square().sum().backward()
    for one, other in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "pretrained"])
def test_stages_cut_by_hand_are_connected_one_by_one(trained):
    model = three_norms(trained)
    first, second = kn.connect(model[:4], input_stats=([0.0] * 3, [1.0] * 3)), kn.connect(model[4:])
    x = batch(0)[0]
    assert [row.prior_from for row in kn.describe(first, x).rows] == [("input",)]
    received = first(x).detach().clone()
    behind = ("its running statistics",) if trained else ()
    assert [row.prior_from for row in kn.describe(second, received).rows] == [behind, ("4",)]


# -- a process that dies ---------------------------------------------------------------------------


def test_training_goes_on_after_a_process_was_killed(data_parallel, tmp_path):
    torchrun("restart.py", tmp_path, restarts=1)
    for rank, spared in enumerate(data_parallel):
        killed = torch.load(tmp_path / f"{rank}.pt")
        assert (spared["spared"]["began"], killed["began"]) == (0, KILLED_AT)
        assert_same(killed["state"], spared["spared"]["state"], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("input_stats", [None, ([0.0] * 3, [1.0] * 3)])
def test_a_batch_that_is_empty_everywhere_moves_no_shared_statistics(mesh, input_stats, dtype):
    model = kn.convert(nn.Sequential(nn.BatchNorm2d(3)), input_stats=input_stats, process_group=dist.group.WORLD)
    model.to(dtype)(torch.randn(2, 3, 4, 4, dtype=dtype))
    before = copy.deepcopy(dict(model.named_buffers()))
    model(torch.randn(0, 3, 4, 4, dtype=dtype))
    torch.testing.assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)


def test_one_shared_value_a_channel_without_a_prior_moves_nothing(mesh):
    model = kn.convert(nn.Sequential(nn.BatchNorm2d(3)), process_group=dist.group.WORLD)
    before = copy.deepcopy(dict(model.named_buffers()))
    model(torch.randn(1, 3, 1, 1))
    torch.testing.assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)
