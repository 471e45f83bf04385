"""The greedy loop: what it says, when it stops, what it feeds."""

import pytest
import torch

from vestige import KVCache, attach, policies
from vestige.bench.methods.decode import decode
from vestige.cache.prefill import prefill
from vestige.models.forward import forward
from vestige.testing import random_ids, tiny


def saying(*texts: str):
    """Return logits and a feed by which each batch row says its text, whatever it is fed, and what was fed."""
    fed, at = [], iter(zip(*texts, strict=True))

    def logits():
        said = torch.tensor([ord(letter) - ord("a") for letter in next(at)])
        return torch.nn.functional.one_hot(said, 26).float()

    def feed(token):
        fed.append("".join(chr(int(x) + ord("a")) for x in token[:, 0]))
        return logits()

    return logits(), feed, fed


def words(decoded):
    return ["".join(chr(x + ord("a")) for x in reply) for reply in decoded.replies]


@pytest.mark.parametrize(
    ("limit", "stop", "expected", "steps"), [(4, "", "lamp", 3), (9, "m", "lam", 2), (1, "", "l", 0), (9, "l", "l", 0)]
)
def test_a_reply_ends_at_its_limit_or_at_a_stop_id_which_is_part_of_it(limit, stop, expected, steps):
    logits, feed, fed = saying("lampost")
    decoded = decode(feed, logits, [limit], [ord(x) - ord("a") for x in stop])
    assert words(decoded) == [expected] and decoded.steps == steps
    assert fed == list(expected[:-1]), "all but the last token are fed"
    assert decoded.seconds >= 0


def test_rows_of_a_batch_stop_at_different_places():
    logits, feed, fed = saying("lampost", "keeperz", "zharbou")
    decoded = decode(feed, logits, [5, 3, 7], [25])
    assert words(decoded) == ["lampo", "kee", "z"] and decoded.steps == 4
    assert fed == ["lkz", "aeh", "mea", "ppr"]


def test_it_says_what_generate_says():
    model = tiny("llama")
    ids = random_ids(model, 2, 20)
    with torch.no_grad(), attach(model):
        cache = KVCache(model, policies.Full())
        logits = prefill(model, ids, cache)
        said = decode(lambda token: forward(model, token, cache), logits, [7, 7], ())
        expected = model.generate(ids, max_new_tokens=7, do_sample=False)[:, 20:]
    assert said.replies == tuple(map(tuple, expected.tolist()))
    assert cache.seen == (26, 26)
