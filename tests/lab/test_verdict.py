"""Which arm is best, in words."""

from kalmannorm.lab.verdict import verdict

SECONDS = {"BN": 0.010, "GN": 0.012, "KN": 0.015}


def test_a_clear_winner_is_named_with_the_distance_and_the_cost():
    said = verdict({"BN": [0.50, 0.52], "GN": [0.70, 0.72], "KN": [0.90, 0.92]}, SECONDS, 0.1, 1000)
    assert said == (
        "KN has the highest accuracy, 91.0 ± 1.4 % of 1000 test images. It beats GN by 20.0 points (14 times the "
        "deviation between seeds) and BN by 40.0 points (28 times the deviation between seeds). "
        "A step of KN takes 15.0 ms, 1.25 times GN's and 1.50 times BN's."
    )


def test_what_is_within_the_spread_is_no_difference():
    said = verdict({"BN": [0.50, 0.52], "GN": [0.88, 0.92], "KN": [0.89, 0.93]}, SECONDS, 0.1, 1000)
    assert "It beats BN by 40.0 points" in said
    assert "There is no difference beyond the spread to GN (1.0 points, where seeds deviate by 2.8)." in said
    assert "Of these, a step of GN takes the least time." in said


def test_seeds_that_agree_need_more_than_a_test_images_difference():
    same = {"BN": [0.90, 0.90], "KN": [0.90, 0.92]}
    assert "no difference beyond the spread" in verdict(same, SECONDS, 0.1, 50)
    apart = {"BN": [0.90, 0.90], "KN": [0.94, 0.94]}
    assert "It beats BN by 4.0 points (all seeds alike)" in verdict(apart, SECONDS, 0.1, 50)
    assert "no difference beyond" in verdict(apart, SECONDS, 0.1, 20)


def test_one_seed_says_nothing_of_chance():
    said = verdict({"BN": [0.5], "KN": [0.9]}, SECONDS, 0.1, 1000)
    assert "40.0 points above BN. A single seed does not show how much of that is chance" in said
    assert "beats" not in said


def test_networks_that_guess_have_no_winner():
    said = verdict({"BN": [0.10, 0.11], "KN": [0.10, 0.13]}, SECONDS, 0.1, 1000)
    assert said.startswith("No method learned anything in these runs")
    assert "guessing gives 10.0 %" in said
    # A seed that fails does not say that those of others did not learn.
    assert verdict({"KN": [0.9, 0.3, 0.9]}, SECONDS, 0.1, 1000).startswith("KN has the highest accuracy, 70.0 ± 34.6 %")


def test_a_method_alone_gets_its_number():
    said = verdict({"KN": [0.9, 0.9]}, SECONDS, 0.1, 100)
    assert said == "KN has the highest accuracy, 90.0 ± 0.0 % of 100 test images."
    assert verdict({"KN": [0.9, 0.9]}, SECONDS, 0.1, 100, "validation").endswith("% of 100 validation images.")
