"""What loaders that resume share; `test_memory` and `test_shuffling` have them resume in Lightning."""

import pytest

from kalmannorm.lab.data.resumable import Resumable


class Three(Resumable):
    def __len__(self):
        return 3

    def __iter__(self):
        for number in range(self.take_left_out() + 1, 4):
            self.handed_out = number
            yield self.epoch, number


def test_an_epoch_goes_on_where_it_was_left():
    whole, left = Three(), Three()
    whole.set_epoch(5)
    batches = iter(whole)
    assert [next(batches), next(batches)] == [(5, 1), (5, 2)]
    left.set_epoch(5)
    left.load_state_dict(whole.state_dict())
    assert left.state_dict() == whole.state_dict()  # asked again before the first batch
    assert list(left) == list(batches) == [(5, 3)]
    assert list(left) == [(5, 1), (5, 2), (5, 3)]  # the one after is whole


def test_after_a_whole_epoch_the_next_is_whole():
    done = Three()
    list(done)
    done.load_state_dict(done.state_dict())
    assert len(list(done)) == 3


def test_it_is_its_own_sampler_for_lightning():
    assert Three().sampler.batch_sampler is None


def test_a_loader_must_say_how_long_it_is():
    with pytest.raises(TypeError, match="abstract"):
        type("Endless", (Resumable,), {})()
