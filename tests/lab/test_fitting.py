"""A run from its configuration to its result."""

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from network import in_two_processes
from short_trainings import assert_same, fit_forked
from torch._dynamo.testing import CompileCounterWithBackend

from kalmannorm.lab.configuration import Run
from kalmannorm.lab.experiments import merge
from kalmannorm.lab.fitting import _Folder, fit, load, score, steps
from kalmannorm.lab.jobs import Job, fit_on_devices
from kalmannorm.lab.results import Result, finished
from kalmannorm.lab.rows import read_table


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def weights(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


def test_a_run_and_what_it_leaves(images, short, tmp_path):
    assert [steps(short), steps(short, ["--trainer.max_steps", "7"])] == [4, 7]
    told = []
    result = fit(short, tmp_path / "run", told.append)
    assert sorted(files(tmp_path / "run")) == [
        "config.yaml", "curve.csv", "last.ckpt", "result.json", "validations.csv",
    ]  # fmt: skip
    assert set(result.scores) == {"accuracy_running", "accuracy_online"}
    assert len(result.losses) == told[-1] == 4
    assert [each["step"] for each in result.validations] == [2, 4]
    assert Result.read(tmp_path / "run") == result
    assert result.config["model"]["init_args"]["momentum"] == 0.9  # complete, with what was not given
    assert result.seconds > result.seconds_per_step > 0
    # Once finished it is read, not repeated; nor is anything written.
    before = files(tmp_path / "run")
    assert fit(short, tmp_path / "run") == result
    assert fit(result.config, tmp_path / "run") == result
    assert files(tmp_path / "run") == before

    module = load(tmp_path / "run")
    assert not module.training
    assert_same(module.state_dict(), weights(tmp_path / "run"))
    assert score(tmp_path / "run", "test") == result.scores
    last = {name: value for name, value in result.validations[-1].items() if name != "step"}
    assert score(tmp_path / "run", "validation") == last
    assert files(tmp_path / "run") == before


def test_seeds_decide_weights_and_order_and_the_module_knows_the_steps(images, short, tmp_path):
    one, other = (fit(short | {"seed_everything": seed}, tmp_path / f"{seed}") for seed in (0, 1))
    assert one.losses != other.losses
    (_, module, data), (_, another, shuffled) = (Run(short | {"seed_everything": seed}).build() for seed in (0, 1))
    assert (data.seed, shuffled.seed) == (0, 1)
    assert not torch.equal(module.network.conv.weight, another.network.conv.weight)
    schedule = module.configure_optimizers()["lr_scheduler"]["scheduler"]
    assert schedule.lr_lambdas[0].keywords["steps"] == 4


def test_another_configuration_or_checkpoint_is_refused_and_nothing_overwritten(images, short, tmp_path):
    fit(short, tmp_path / "run")
    before = files(tmp_path / "run")
    with pytest.raises(ValueError, match=r"another configuration: model\.init_args\.rate is 0\.05 there; got 0\.01"):
        fit(short, tmp_path / "run", overrides=["--model.init_args.rate", "0.01"])
    assert files(tmp_path / "run") == before
    # An unfinished run with a checkpoint of some other network.
    wider = tmp_path / "wider"
    short["model"]["init_args"]["network"]["init_args"]["width"] = 8
    wider.mkdir()
    (wider / "last.ckpt").write_bytes(before["last.ckpt"])
    differs = r"last\.ckpt is of another model: .* network\.conv\.weight: .*\[4, 3, 3, 3\].*\[8, 3, 3, 3\]"
    with pytest.raises(ValueError, match=differs):
        fit(short, wider)
    (wider / "last.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"last\.ckpt is not a checkpoint of a run"):
        fit(short, wider)
    assert set(files(wider)) == {"last.ckpt"}


def test_weight_normalization_starts_from_data(images, short, tmp_path):
    short["model"]["init_args"] |= {"normalization": "wn", "rate": 1e-9}
    fit(short, tmp_path / "run")
    state = weights(tmp_path / "run")
    waiting = [tensor for name, tensor in state.items() if name.endswith("awaits_data")]
    assert waiting
    assert not any(waiting)


def test_lightnings_loggers(images, short, tmp_path):
    loggers = [
        {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": {"save_dir": str(tmp_path / name)}}
        for name in ("CSVLogger", "TensorBoardLogger")
    ]
    short["trainer"] |= {"logger": loggers, "log_every_n_steps": 1}
    result = fit(short, tmp_path / "run")
    (table,) = (tmp_path / "CSVLogger").rglob("metrics.csv")
    rows = read_table(table).to_dict("records")
    assert [float(row["loss"]) for row in rows if row["loss"]] == pytest.approx(result.losses, rel=1e-5)
    (last, *_) = [row["accuracy_running"] for row in reversed(rows) if row["accuracy_running"]]
    assert float(last) == pytest.approx(result.scores["accuracy_running"])
    assert list((tmp_path / "TensorBoardLogger").rglob("events.out.tfevents.*"))


def test_a_callback_of_ones_own(images, short, tmp_path):
    """As the command line asks for it: it changes running statistics at the end, and nothing before."""
    callback = "kalmannorm.integrations.lightning.KalmanNormCallback"
    short["trainer"]["callbacks"] = [{"class_path": callback, "init_args": {"recalibrate": 2}}]
    result = fit(short, tmp_path / "run")
    del short["trainer"]["callbacks"]
    assert fit(short, tmp_path / "alone").losses == result.losses
    states = [load(tmp_path / name).state_dict() for name in ("run", "alone")]
    different = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert different
    assert all("running_" in name for name in different)


@pytest.mark.slow
def test_compiled_it_is_nearly_the_same(images, short, tmp_path, monkeypatch):
    counter = CompileCounterWithBackend("aot_eager")  # inductor's C++ compiler takes longer
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    network = {"class_path": "kalmannorm.lab.models.small.SmallConvNet"}
    short["model"]["init_args"]["network"] = network | {"init_args": {"layers": [[4, 2], [8, 2]], "in_channels": 3}}
    plain = fit(short, tmp_path / "plain")
    compiled = fit(short, tmp_path / "compiled", overrides=["--model.init_args.compile=true"])
    assert counter.frame_count > 0
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)
    assert set(weights(tmp_path / "compiled")) == set(weights(tmp_path / "plain"))


def test_in_half_precision_it_is_nearly_the_same(images, short, tmp_path):
    plain = fit(short, tmp_path / "plain")
    half = fit(short, tmp_path / "half", overrides=["--trainer.precision=bf16-mixed"])
    assert half.losses == pytest.approx(plain.losses, rel=0.05)
    assert half.losses != plain.losses


def fit_as_one_of_two(environment, config, folder, rank):
    """Lightning starts no process where it finds a rank."""
    fit_forked({**environment, "LOCAL_RANK": str(rank)}, config, folder, split="validation")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kn", "brn"])
def test_two_processes_train_as_one(images, config, tmp_path, method):
    """The real command, or two that are forked, against this process: the same gradient batch and statistics batch."""
    config["model"]["init_args"]["normalization"] = method
    # Over an epoch's end; in float32 a rounding error would grow.
    config["trainer"] |= {"precision": "64-true", "max_steps": 8, "val_check_interval": 4}
    of_two = merge(config, {"trainer": {"devices": 2, "strategy": "ddp"}})
    if method == "kn":
        two = fit_on_devices(Job("", 0, of_two, tmp_path / "two", "validation"))
        assert (tmp_path / "two.log").read_text().count("accuracy_running") == 1
    else:
        in_two_processes(partial(fit_as_one_of_two, dict(os.environ), of_two, tmp_path / "two"), tmp_path)
        two = Result.read(tmp_path / "two")
    one = fit(config, tmp_path / "one", split="validation")
    assert (two.config["trainer"]["devices"], two.split) == (2, "validation")
    assert len(one.losses) == 8
    assert two.losses == pytest.approx(one.losses, rel=1e-4)
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in ours.items():  # running statistics too
        assert (tensor.double() - theirs[name].double()).abs().max() < 1e-4, name
    assert [each["step"] for each in two.validations] == [each["step"] for each in one.validations]
    assert finished(tmp_path / "two")


def test_all_processes_end_a_run_as_the_first_one_decides(tmp_path, monkeypatch):
    """Another one may look before the first has put the last checkpoint in its place, and to save takes all of them."""
    saved = []
    monkeypatch.setattr(_Folder, "save", lambda self, trainer: saved.append(trainer.global_step))
    for is_whole in (True, False):
        strategy = SimpleNamespace(broadcast=lambda _, first=is_whole: first, lightning_module_state_dict=dict)
        trainer = SimpleNamespace(is_global_zero=False, global_step=4, strategy=strategy)
        _Folder(tmp_path, {}, 1).finish(trainer)
        assert saved == ([] if is_whole else [4])
