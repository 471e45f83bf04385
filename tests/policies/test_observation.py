"""Rows of an observation."""

from tests.policies.test_policies import random_observation


def test_rows_without_pairs_are_not_shown():
    obs = random_observation(0)
    shown = [(row.batch, row.kv_head) for row in obs.rows()]
    assert shown == [(0, 0), (1, 0), (1, 1)]
    assert sum(row.pairs.stop - row.pairs.start for row in obs.rows()) == len(obs.positions)
