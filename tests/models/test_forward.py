"""One forward over ids, with what padded batch rows need."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vestige import KVCache, attach, policies, prefill
from vestige.models.forward import forward, pad_left, padding_inputs, replay
from vestige.testing import left_padded, random_ids, tiny

CPU = torch.device("cpu")


@dataclass
class Fed:
    seen: tuple[int, ...] = ()
    real: Tensor | None = None
    padded: bool = False


def test_rows_are_padded_at_the_left_only_where_they_differ():
    ids, mask = pad_left([[5, 6], [7]], CPU)
    assert ids.tolist() == [[5, 6], [0, 7]] and mask is not None and mask.tolist() == [[1, 1], [0, 1]]
    assert pad_left([[5], [7]], CPU)[1] is None


def test_positions_count_real_tokens_alone():
    ids, mask = pad_left([[5, 6], [7]], CPU)
    inputs = padding_inputs(ids, Fed((3, 2), torch.tensor([[True] * 3, [False, True, True]]), True), mask)
    assert inputs["position_ids"].tolist() == [[3, 4], [1, 2]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]]
    assert padding_inputs(ids, Fed((3, 3))) == {}


def test_a_padded_row_gets_the_logits_it_has_alone():
    model = tiny("llama")
    ids, mask = left_padded(model, [9, 6])
    with torch.no_grad(), attach(model):
        together = forward(model, ids, KVCache(model, policies.Full()), mask)
        alone = forward(model, ids[1:, 3:], KVCache(model, policies.Full()))
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


def test_a_replay_is_watched_and_taken_back():
    model, views = tiny("llama"), []
    cache = KVCache(model, policies.Full())
    with torch.no_grad(), attach(model):
        prefill(model, random_ids(model, 1, 10), cache)
        replay(model, random_ids(model, 1, 4, seed=1), cache, views.append)
    assert cache.seen == (10,) and cache.held == 10 * 6
    assert len(views) == 6 and all(view.at.tolist() == [10, 11, 12, 13] for view in views)
