"""The trial of EvalNorm: networks of the study, every share on both splits, the share chosen on validation images."""

import pytest

pd = pytest.importorskip("pandas")
fitting = pytest.importorskip("kalmannorm.lab.fitting")
evalnorm = pytest.importorskip("benchmarks.evalnorm")


@pytest.mark.usefixtures("images")
def test_a_trial_scores_every_share_on_both_splits(monkeypatch, tmp_path):
    fit = fitting.fit
    tiny = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--data.init_args.limit=null",
            "--data.init_args.validation=16", "--data.init_args.gradient_batch=8"]  # fmt: skip
    monkeypatch.setattr(
        fitting, "fit",
        lambda config, folder, overrides, split: fit(config, folder, overrides=[*overrides, *tiny], split=split),
    )  # fmt: skip
    rows = evalnorm.trial("kn-1", 0.1, 0, tmp_path / "run")
    assert [(row["split"], row["share"]) for row in rows] == [
        (split, share) for split in ("validation", "test") for share in evalnorm.SHARES
    ]
    assert len({row["accuracy"] for row in rows}) > 1


def test_the_share_is_chosen_without_test_images():
    scores = {("validation", 0.0): 0.5, ("validation", 0.1): 0.6, ("test", 0.0): 0.5, ("test", 0.1): 0.4}
    rows = pd.DataFrame(
        [{"arm": "kn-1", "seed": seed, "split": split, "share": share, "accuracy": accuracy + seed / 100}
         for (split, share), accuracy in scores.items() for seed in range(3)]
    )  # fmt: skip
    assert evalnorm.summary(rows).splitlines()[-1] == "| kn-1 | 51.0 ± 1.0 | 41.0 ± 1.0 | 0.1 |"
