"""The history of the filter: its rows, its place in checkpoints, and a training that does not notice it."""

import pytest
import torch
from short_trainings import Nested, assert_same, pairs, quiet_trainer

import kalmannorm as kn
from kalmannorm.integrations.lightning import KalmanNormCallback
from kalmannorm.lab.analysis import prior_errors
from kalmannorm.lab.filter_history import FilterHistory
from kalmannorm.lab.rows import read_table
from kalmannorm.priors import noise_ratio


def converted(**options):
    module = Nested()
    kn.convert(module.net, **options)
    return module


def test_rows_are_of_every_layer_every_so_many_steps():
    module, history = converted(), FilterHistory(every=2)
    quiet_trainer(5, history).fit(module, pairs(12))
    assert [(row["step"], row["layer"]) for row in history.rows] == [(2, "1"), (2, "4"), (4, "1"), (4, "4")]
    first, last = history.rows[0], history.rows[-1]
    assert "prior_population_mean" not in first  # nothing is believed of the input
    assert {"prior_observation_mean", "posterior_population_log_ratio"} < last.keys()
    assert last["prior_population_log_ratio"] == pytest.approx(last["prior_observation_log_ratio"])  # one group


def test_a_row_says_what_holds_after_the_step():
    module, history = converted(gain="learned"), FilterHistory(every=3)
    quiet_trainer(3, history).fit(module, pairs(6))
    layer, row = module.net[4], history.rows[1]
    assert row["gain"] == pytest.approx(float(layer.kalman_gain(2).detach()))
    assert row["process_noise"] == pytest.approx(float(noise_ratio(layer.process_noise).mean().detach()))
    images = list(pairs(6))[2][0]
    expected = next(e for e in prior_errors(module.net, [images]) if (e.layer, e.estimate) == ("4", "posterior"))
    assert row["posterior_population_log_ratio"] == pytest.approx(expected.log_ratio)


def test_accumulated_batches_are_looked_at_once_a_step():
    history = FilterHistory(every=1)
    quiet_trainer(2, history, accumulate_grad_batches=2).fit(converted(), pairs())
    assert [row["step"] for row in history.rows] == [1, 1, 2, 2]


def test_the_training_is_the_same_without_it():
    # Monte-Carlo draws take random numbers.
    modules = [converted(**kn.preset("paper")) for _ in range(2)]
    for module, callbacks in zip(modules, ([FilterHistory(every=1)], []), strict=True):
        torch.manual_seed(0)
        quiet_trainer(4, KalmanNormCallback(), *callbacks).fit(module, pairs())
    assert_same(modules[0].state_dict(), modules[1].state_dict())


def test_a_resumed_history_goes_on(tmp_path):
    whole, first, second = (FilterHistory(every=1) for _ in range(3))
    quiet_trainer(-1, whole, max_epochs=2).fit(converted(), pairs())
    trainer = quiet_trainer(-1, first, max_epochs=1)
    trainer.fit(converted(), pairs())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    quiet_trainer(-1, second, max_epochs=2).fit(converted(), pairs(), ckpt_path=tmp_path / "half.ckpt")
    assert len(first.rows) == 8
    assert second.rows == whole.rows


def test_a_training_too_short_for_a_look_is_refused_at_its_start(tmp_path):
    with pytest.raises(ValueError, match="looks every 4 steps, and max_steps is 3"):
        quiet_trainer(3, FilterHistory(every=4, path=tmp_path / "rows.csv")).fit(converted(), pairs())


def test_it_is_written_as_csv(tmp_path):
    history = FilterHistory(every=4)
    with pytest.raises(ValueError, match="no training reached step 4"):
        history.write(tmp_path / "filter.csv")
    quiet_trainer(4, history).fit(converted(process_noise=False), pairs())
    history.write(tmp_path / "filter.csv")
    rows = read_table(tmp_path / "filter.csv").to_dict("records")
    assert [row["layer"] for row in rows] == ["1", "4"]
    assert float(rows[1]["gain"]) == history.rows[1]["gain"]
    assert rows[0]["prior_population_mean"] == rows[0]["process_noise"] == ""


def test_every_is_a_number_above_0():
    with pytest.raises(ValueError, match="every=0, expected a number above 0"):
        FilterHistory(every=0)
