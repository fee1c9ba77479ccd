"""Metrics: floats by name that know which direction is better."""

from __future__ import annotations

import math
from typing import Any

import pytest
from detkernel.metrics import Metrics


class TestMetrics:
    def made(self, iteration: int = 4) -> Metrics:
        return Metrics(lambda: iteration)

    def test_they_are_a_mapping_of_floats(self):
        made = self.made()
        made.publish("ap", 1, better="higher")
        made["other"] = 0.5
        assert made == {"ap": 1.0, "other": 0.5}
        assert type(made["ap"]) is float

    def test_each_has_the_direction_that_was_published(self):
        made = self.made()
        made.publish("ap", 0.5, better="higher")
        made.publish("loss", 0.5, better="lower")
        made.publish("count", 3)
        made["assigned"] = 1.0
        assert [made.better(name) for name in ("ap", "loss", "count", "assigned", "absent")] == [
            "higher",
            "lower",
            None,
            None,
            None,
        ]

    def test_another_direction_is_refused(self):
        wrong: Any = "greater"
        with pytest.raises(ValueError, match="metric 'ap': better is 'greater', expected 'higher' or 'lower'"):
            self.made().publish("ap", 0.5, better=wrong)

    def test_the_history_has_one_value_a_validation(self):
        at = [2]
        made = Metrics(lambda: at[0])
        made.publish("ap", 0.1, better="higher")
        made.publish("ap", 0.2, better="higher")
        at[0] = 4
        made.publish("ap", 0.3, better="higher")
        assert made.history("ap") == [(2, 0.2), (4, 0.3)]
        assert made.history("absent") == []

    def test_they_are_taken_up_again(self):
        made = self.made()
        made.publish("ap", math.pi, better="higher")
        state, again = made.state_dict(), self.made(6)
        again["stale"] = 1.0
        again.load_state_dict(state)
        assert (dict(again), again.better("ap"), again.history("ap")) == ({"ap": math.pi}, "higher", [(4, math.pi)])
        again.publish("ap", 0.0, better="lower")
        assert state == {"metrics": {"ap": math.pi}, "better": {"ap": "higher"}, "history": {"ap": [[4, math.pi]]}}

    def test_a_state_without_directions_can_be_taken_up(self):
        made = self.made()
        made.load_state_dict({"metrics": {"ap": 0.5}})
        assert (dict(made), made.better("ap")) == ({"ap": 0.5}, None)

    def test_a_state_with_an_unknown_direction_cannot(self):
        with pytest.raises(ValueError, match="expected 'higher' or 'lower'"):
            self.made().load_state_dict({"metrics": {}, "better": {"ap": "up"}})
