"""Options of policies that are measured on a sample text."""

from tests.policies.test_allotted import SMALL, held, read
from vestige import Budget, attach, policies
from vestige.pipelines.calibrate import profile_layers
from vestige.testing import random_ids, tiny


def test_a_profile_made_on_a_sample_is_what_that_sample_holds():
    model = tiny("llama")
    ids = random_ids(model, 2, 50)
    options = {**SMALL, "observed": 5}
    with attach(model):
        made_before = profile_layers(model, ids, Budget.tokens(12), **options)
    own = read(model, policies.XKV(budget=Budget.tokens(12), **options), ids)
    assert made_before == tuple(sum(rows) / 4 for rows in held(own))
    assert sum(made_before) == 36 and len(set(made_before)) == 3
    again = read(model, policies.XKV(budget=Budget.tokens(12), profile=made_before, **options), ids)
    assert [sum(rows) for rows in held(again)] == [sum(rows) for rows in held(own)]
