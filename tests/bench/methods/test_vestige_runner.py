"""Our arms against what a person would do by hand: prefill and generate, sample by sample, turn by turn."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from vestige import Budget, BudgetError, KVCache, attach, policies, prefill
from vestige.bench.methods import decode, vestige_runner
from vestige.bench.methods.conversation import Job, Outcome, TurnIds
from vestige.cache.report import Report
from vestige.models.compat import cache_argument
from vestige.models.forward import forward
from vestige.pipelines.answer import answer
from vestige.policies import POLICIES
from vestige.policies.base import NeedsReplay
from vestige.testing import random_ids, tiny
from vestige.text.chat_template import ChatTemplate

ROWS = 4  # two layers of two KV heads
SMALL = {"sink": 2, "window": 3}
MODEL = tiny("llama", num_hidden_layers=2, seed=6)


@pytest.fixture(autouse=True)
def attached():
    """Attach the tiny model, which every test shares."""
    with torch.no_grad(), attach(MODEL):
        yield


def policy(name: str, budget: Budget | None = None, **options):
    if name == "full":
        return policies.Full(**options)
    return policies.resolve(name)(budget=budget or Budget.tokens(15), **(SMALL | options))


def turn(context: int, question: int = 5, *, new: int = 6, seed: int = 0) -> TurnIds:
    ids = random_ids(MODEL, 1, context + question, seed)[0].tolist()
    return TurnIds(context=tuple(ids[:context]), question=tuple(ids[context:]), max_new_tokens=new)


def job(*turns: TurnIds, stop: tuple[int, ...] = ()) -> Job:
    return Job(turns=turns, stop=stop)


@dataclass
class ByHand:
    """A conversation that calls the library as its users do."""

    model: object
    policy: object
    chunk: int = 500

    def __post_init__(self) -> None:
        self.cache = KVCache(self.model, self.policy)

    def turn(self, context: Sequence[int], question: Sequence[int], new: int) -> tuple[tuple[int, ...], Report]:
        """Read, settle, ask; return the reply and what was held before the question."""
        length = sum(self.cache.seen) + len(context) + len(question)
        prefill(self.model, torch.tensor([context]), self.cache, chunk=self.chunk, length=length)
        report = self.cache.report()
        if len(question) > 1:
            prefill(self.model, torch.tensor([question[:-1]]), self.cache, settle=False)
        ids = torch.cat([self.cache.ids, torch.tensor([question[-1:]] if len(question) > 1 else [question])], 1)
        out = self.model.generate(ids, **cache_argument(self.cache), max_new_tokens=new, do_sample=False)
        return tuple(out[0, ids.shape[1] :].tolist()), report


def by_hand(job: Job, policy, chunk: int = 500) -> tuple[tuple[int, ...], Report]:
    first = job.turns[0]
    return ByHand(MODEL, policy, chunk).turn(first.context, first.question, first.max_new_tokens)


def assert_same(outcome: Outcome, reply: tuple[int, ...], report: Report) -> None:
    assert outcome.replies == (reply,)
    for name in ("held", "full", "kv_bytes", "full_kv_bytes", "memory_bytes"):
        assert getattr(outcome, name) == getattr(report, name), name
    assert outcome.seen == report.seen[0]
    assert outcome.kept == tuple(layer.rows for layer in report.layers)


BUDGETS = {"tokens": Budget.tokens(15), "fraction": Budget.fraction(0.3), "bytes": Budget.bytes(60_000)}
ARMS = [(name, share) for name in sorted(POLICIES) for share in ("head", "model")] + [("snapkv", "layer")]


@pytest.fixture(scope="module")
def shared() -> tuple[Job, vestige_runner.Reading]:
    """Read one context once, for every policy."""
    one = job(turn(60))
    with torch.no_grad(), attach(MODEL):
        return one, vestige_runner.read(MODEL, [one], [policy(name) for name in POLICIES])


@pytest.mark.parametrize(("name", "share"), ARMS)
def test_a_fork_of_a_shared_reading_is_its_own_prefill_and_generate(shared, name, share):
    one, reading = shared
    arm = policy(name, BUDGETS["tokens" if share == "head" else "fraction"], share=share)
    expected = by_hand(one, arm)
    for given in (reading, None):
        (outcome,) = vestige_runner.run(MODEL, [one], arm, reading=given)
        assert_same(outcome, *expected)
    assert outcome.held == (60 if name == "full" else 15 if share == "head" else 19) * ROWS  # 0.3 of 60 + 5


@pytest.mark.parametrize("budget", [Budget.bytes(60_000), Budget.tokens(100), Budget.fraction(1.0)])
def test_forks_keep_budgets_in_bytes_and_those_above_the_length(shared, budget):
    one, reading = shared
    arm = policy("snapkv", budget)
    (outcome,) = vestige_runner.run(MODEL, [one], arm, reading=reading)
    assert_same(outcome, *by_hand(one, arm))
    assert outcome.kv_bytes <= 60_000 if budget.kind == "bytes" else outcome.held == outcome.full


@pytest.mark.parametrize(("name", "share"), [*((name, "head") for name in sorted(POLICIES)), ("snapkv", "model")])
def test_reading_in_chunks_is_prefill_in_chunks(name, share):
    one, arm = job(turn(60)), policy(name, BUDGETS["fraction" if share == "head" else "tokens"], share=share)
    (outcome,) = vestige_runner.run(MODEL, [one], arm, chunk=16)
    assert_same(outcome, *by_hand(one, arm, chunk=16))


def test_a_shared_reading_is_left_as_it_is(shared):
    one, reading = shared
    arms = [policy("snapkv"), policy("full")]
    before = (reading.cache.held, reading.cache.seen, reading.cache.state.nbytes, reading.cache.state.lengths)
    first = [vestige_runner.run(MODEL, [one], arm, reading=reading)[0].replies for arm in arms]
    again = [vestige_runner.run(MODEL, [one], arm, reading=reading)[0].replies for arm in reversed(arms)][::-1]
    assert first == again
    assert (reading.cache.held, reading.cache.seen, reading.cache.state.nbytes, reading.cache.state.lengths) == before
    assert len(set(first)) > 1  # or the comparison says little


def test_one_reading_is_one_long_forward():
    one, fed = job(turn(60, new=1)), []
    hook = MODEL.register_forward_pre_hook(lambda _, args, kw: fed.append(kw["input_ids"].shape[1]), with_kwargs=True)
    try:
        arms = [policy(name) for name in sorted(POLICIES)]
        arms = [arm for arm in arms if vestige_runner.sharing_key(arm) is None and not isinstance(arm, NeedsReplay)]
        assert len(arms) > 10
        reading = vestige_runner.read(MODEL, [one], arms)
        for arm in arms:
            vestige_runner.run(MODEL, [one], arm, reading=reading)
    finally:
        hook.remove()
    assert [n for n in fed if n > 5] == [60]


# Batches.

UNEVEN = [
    job(turn(58, 5, seed=1)), job(turn(60, 7, new=8, seed=2)),
    job(turn(59, 1, seed=3)), job(turn(60, 6, new=3, seed=4)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "share"), [*((name, "head") for name in sorted(POLICIES)), ("keydiff", "model")])
def test_samples_in_a_batch_reply_and_hold_as_each_alone(name, share):
    arm = policy(name, BUDGETS["tokens" if share == "model" else "fraction"], share=share)
    reading = vestige_runner.read(MODEL, UNEVEN, [arm]) if name in ("snapkv", "tova", "random") else None
    together = vestige_runner.run(MODEL, UNEVEN, arm, reading=reading)
    for one, outcome in zip(UNEVEN, together, strict=True):
        (alone,) = vestige_runner.run(MODEL, [one], arm)
        for what in ("replies", "seen", "held", "full", "kept"):
            assert getattr(outcome, what) == getattr(alone, what), what
        assert len(alone.replies[0]) == one.turns[0].max_new_tokens


def test_a_fraction_is_one_of_each_samples_own_length():
    arm = policy("keydiff", Budget.fraction(0.5))
    # half of 58 + 5, 60 + 7, 59 + 1 and 60 + 6, rounded down
    assert [o.held for o in vestige_runner.run(MODEL, UNEVEN, arm)] == [31 * ROWS, 33 * ROWS, 30 * ROWS, 33 * ROWS]


def test_a_budget_in_bytes_is_one_of_each_sample_however_many_share_a_batch():
    even = [job(turn(60, new=2, seed=seed)) for seed in range(3)]
    for arm in (policy("snapkv", BUDGETS["bytes"]), policy("knorm", BUDGETS["bytes"], share="model")):
        alone = [vestige_runner.run(MODEL, [one], arm)[0] for one in even]
        together = vestige_runner.run(MODEL, even, arm)
        assert [(o.replies, o.held, o.kv_bytes) for o in together] == [(o.replies, o.held, o.kv_bytes) for o in alone]
        assert all(o.held < o.full and o.kv_bytes <= 60_000 for o in alone)


def test_room_made_while_decoding_does_not_depend_on_the_batch():
    jobs = [job(turn(60 - b, 4 + b, new=new, seed=b)) for b, new in enumerate((14, 6, 11))]
    arm = policy("streaming_llm", every=4)
    for one, outcome in zip(jobs, vestige_runner.run(MODEL, jobs, arm), strict=True):
        assert outcome.replies == vestige_runner.run(MODEL, [one], arm)[0].replies


def test_bytes_of_a_batch_are_shared_out_evenly():
    jobs = [job(turn(60, new=2, seed=seed)) for seed in range(4)]
    arm = policy("snapkv")
    (alone,) = vestige_runner.run(MODEL, jobs[:1], arm)
    for outcome in vestige_runner.run(MODEL, jobs, arm):
        for name in ("kv_bytes", "full_kv_bytes", "held", "full"):
            assert getattr(outcome, name) == getattr(alone, name), name


# Replies.


def test_a_reply_ends_with_the_stop_id_or_at_its_limit():
    free = job(turn(60))
    (long,) = vestige_runner.run(MODEL, [free], policy("full"))
    reply = long.replies[0]
    assert len(reply) == 6
    stop = reply[2]
    (short,) = vestige_runner.run(MODEL, [replace(free, stop=(0, stop))], policy("full"))
    assert short.replies == (reply[: reply.index(stop) + 1],)


def test_a_batch_goes_on_until_its_last_sample_has_stopped():
    replies = [vestige_runner.run(MODEL, [one], policy("full"))[0].replies[0] for one in UNEVEN]
    stop = replies[0][2]
    together = vestige_runner.run(MODEL, [replace(one, stop=(stop,)) for one in UNEVEN], policy("full"))
    for reply, outcome in zip(replies, together, strict=True):
        assert outcome.replies[0] == (reply[: reply.index(stop) + 1] if stop in reply else reply)


def test_a_long_question_stays_whole_however_small_the_chunks(monkeypatch):
    one, held = job(turn(60, 40, new=4)), []

    def spying(model, token, cache, *mask):
        held.append(cache.held)
        return forward(model, token, cache, *mask)

    monkeypatch.setattr(vestige_runner, "forward", spying)
    (outcome,) = vestige_runner.run(MODEL, [one], policy("snapkv"), chunk=8)
    assert held == [(15 + 40 + step) * ROWS for step in range(3)]
    assert outcome.held == 15 * ROWS


def test_full_answers_as_answer_does(chatter, story):
    model, tokenizer = chatter
    frame = ChatTemplate(tokenizer)
    context, question = frame.context(story), frame.question("Who keeps lamp 16?")
    given = TurnIds(context=tuple(context[0].tolist()), question=tuple(question[0].tolist()), max_new_tokens=6)
    with attach(model):
        for arm in (policies.Full(), policies.SnapKV(budget=Budget.tokens(60))):
            cache = KVCache(model, arm)
            prefill(model, context, cache)
            expected = answer(model, tokenizer, cache, question, max_new_tokens=6)
            (outcome,) = vestige_runner.run(model, [job(given)], arm)
            assert tokenizer.decode(outcome.replies[0], skip_special_tokens=True).strip() == expected.text
            assert len(outcome.replies[0]) == expected.tokens == 6


def test_clocks_and_peaks():
    (outcome,) = vestige_runner.run(MODEL, [job(turn(60))], policy("snapkv"))
    assert outcome.prefill_s >= outcome.evict_s > 0 and outcome.decode_ms > 0
    assert outcome.peak_kv_bytes > outcome.kv_bytes + (60 - 15) * ROWS * (2 * 16 * 4 + 4)  # read in one piece
    (chunked,) = vestige_runner.run(MODEL, [job(turn(60))], policy("snapkv"), chunk=10)
    assert chunked.kv_bytes <= chunked.peak_kv_bytes < outcome.peak_kv_bytes
    (full,) = vestige_runner.run(MODEL, [job(turn(60))], policy("full"))
    assert full.evict_s == 0.0 and full.held == full.full == 60 * ROWS
    (single,) = vestige_runner.run(MODEL, [job(turn(60, new=1))], policy("full"))
    assert single.decode_ms is None and len(single.replies[0]) == 1  # the question's forward is no decode step


def test_a_decode_step_is_timed_per_forward(monkeypatch):
    clock = iter(range(1000))
    for module in (vestige_runner, decode):
        monkeypatch.setattr(module, "synchronized_time", lambda device: float(next(clock)))
    (outcome,) = vestige_runner.run(MODEL, [job(turn(60, new=5))], policy("full"))
    assert outcome.decode_ms == 1e3 / 4  # one tick for four steps: the first token comes from the question
    assert outcome.prefill_s == 1.0


def test_a_budget_below_the_protected_is_an_error_that_names_both():
    with pytest.raises(BudgetError, match="gives 3 pairs a row, but sink and window protect 5"):
        vestige_runner.run(MODEL, [job(turn(60))], policy("snapkv", Budget.fraction(0.05)))
    short = [job(turn(90, 10)), job(turn(86, 4))]  # 5 of 100 pairs would do, 4 of 90 do not
    with pytest.raises(BudgetError, match="gives 4 pairs"):
        vestige_runner.run(MODEL, short, policy("snapkv", Budget.fraction(0.05)))


def test_policies_that_look_at_every_query_share_a_reading_with_their_like_alone():
    """It is slow: nobody else's times shall have it."""
    budget = Budget.tokens(50)
    assert vestige_runner.sharing_key(policies.KNorm(budget=budget)) is None
    assert vestige_runner.sharing_key(policies.H2O(budget=budget)) == vestige_runner.sharing_key(
        policies.H2O(budget=Budget.tokens(60), sink=1)
    )
    most, mean = (policies.IndexMem(budget=budget, reduction=reduction) for reduction in ("max", "mean"))
    assert (
        len(
            {
                vestige_runner.sharing_key(one)
                for one in (most, mean, policies.H2O(budget=budget), policies.KNorm(budget=budget))
            }
        )
        == 4
    )


def test_a_policy_that_writes_beside_the_pairs_does_so_in_a_shared_reading():
    class Notes(policies.KNorm):
        annotations = frozenset({"norm"})

        def annotate(self, written):
            return {"norm": written.values.norm(dim=-1)}

        def score(self, seen):
            return seen.annotations["norm"].float()

    one, arm = job(turn(60)), Notes(budget=Budget.tokens(15), **SMALL)
    (alone,) = vestige_runner.run(MODEL, [one], arm)
    reading = vestige_runner.read(MODEL, [one], [arm, policy("snapkv")])
    (shared,) = vestige_runner.run(MODEL, [one], arm, reading=reading)
    assert (alone.replies, alone.held, alone.kv_bytes) == (shared.replies, shared.held, shared.kv_bytes)
    (plain,) = vestige_runner.run(
        MODEL, [one], policy("knorm"), reading=vestige_runner.read(MODEL, [one], [policy("knorm"), arm])
    )
    assert plain.kv_bytes < shared.kv_bytes, "a fork takes no side arrays of others along"


def test_a_policy_that_prepares_does_so_on_a_fork_too():
    prepared = []

    class Plans(policies.KNorm):
        def prepare(self, model, cache, ids):
            prepared.append((cache.held, ids.shape))

    one, arm = job(turn(60)), Plans(budget=Budget.tokens(15), **SMALL)
    (alone,) = vestige_runner.run(MODEL, [one], arm)
    (shared,) = vestige_runner.run(MODEL, [one], arm, reading=vestige_runner.read(MODEL, [one], [arm]))
    assert alone.replies == shared.replies and alone.held == shared.held
    assert prepared == [(60 * ROWS, (1, 60))] * 2


def test_one_preparation_serves_every_budget_and_is_charged_to_each():
    calls = []

    class Plans(policies.KVzip):
        def prepare(self, model, cache, ids):
            calls.append(ids.shape)
            super().prepare(model, cache, ids)

    one, arms = job(turn(60)), [Plans(budget=Budget.tokens(n), request=(5,), **SMALL) for n in (15, 25)]
    alone = [vestige_runner.run(MODEL, [one], arm)[0] for arm in arms]
    assert len(calls) == 2
    reading = vestige_runner.read(MODEL, [one], arms)
    shared = [vestige_runner.run(MODEL, [one], arm, reading=reading)[0] for arm in arms]
    assert len(calls) == 3
    for single, common in zip(alone, shared, strict=True):
        assert (single.replies, single.held, single.kept) == (common.replies, common.held, common.kept)
        assert single.kv_bytes == common.kv_bytes and single.peak_kv_bytes <= common.peak_kv_bytes
        ((_, seconds),) = reading.prepared.values()
        assert common.prefill_s > reading.seconds + seconds


# Dialogues.

TALK = (turn(60, 5, new=7, seed=1), turn(20, 4, new=4, seed=2), turn(25, 6, new=5, seed=3))


def talk_by_hand(job: Job, arm, chunk: int = 500) -> tuple[list[tuple[int, ...]], list[Report]]:
    """Return the replies and reports of a dialogue; what a reply left unread is read before what follows it."""
    hand, pending, replies, reports = ByHand(MODEL, arm, chunk), [], [], []
    MODEL.generation_config.eos_token_id = list(job.stop) or None
    try:
        for one in job.turns:
            reply, report = hand.turn([*pending, *one.context], one.question, one.max_new_tokens)
            pending = [] if reply[-1] in job.stop else [reply[-1]]
            replies.append(reply)
            reports.append(report)
    finally:
        MODEL.generation_config.eos_token_id = None
    return replies, reports


@pytest.mark.parametrize(
    ("name", "budget", "chunk"),
    [("full", None, None), ("snapkv", 15, None), ("keydiff", 0.3, None), ("tova", 15, None), ("snapkv", 0.3, 16),
     ("retention", 15, None), ("retention", 0.3, 16), ("indexmem", 15, None)],
)  # fmt: skip
def test_a_dialogue_is_the_one_built_by_hand(name, budget, chunk):
    arm = policy(name, Budget.fraction(budget) if isinstance(budget, float) else budget and Budget.tokens(budget))
    talk = job(*TALK)
    replies, reports = talk_by_hand(talk, arm, chunk or 500)
    (outcome,) = vestige_runner.run(MODEL, [talk], arm, chunk=chunk)
    assert outcome.replies == tuple(replies)
    # 60 + 5 + 7 + 20 + 4 + 4 + 25, every token of every reply read
    assert outcome.seen == reports[-1].seen[0] == 125
    assert (outcome.held, outcome.kv_bytes, outcome.full_kv_bytes) == (
        reports[-1].held, reports[-1].kv_bytes, reports[-1].full_kv_bytes,
    )  # fmt: skip
    if chunk is None:
        (shared,) = vestige_runner.run(MODEL, [talk], arm, reading=vestige_runner.read(MODEL, [talk], [arm]))
        assert (shared.replies, shared.held) == (outcome.replies, outcome.held)


def test_the_token_that_ended_a_reply_is_not_read_again():
    (free,) = vestige_runner.run(MODEL, [job(*TALK)], policy("snapkv"))
    stop = free.replies[0][3]
    at = free.replies[0].index(stop) + 1
    talk = job(*TALK, stop=(stop,))
    replies, reports = talk_by_hand(talk, policy("snapkv"))
    (outcome,) = vestige_runner.run(MODEL, [talk], policy("snapkv"))
    assert outcome.replies == tuple(replies) and outcome.replies[0] == free.replies[0][:at]
    assert outcome.seen == reports[-1].seen[0]
    unread = sum(reply[-1] == stop for reply in replies[:2])  # the ids of stopped replies but the last of each
    assert unread >= 1
    assert outcome.seen == sum(len(t.context) for t in TALK) + 5 + 4 + sum(map(len, replies[:2])) - unread


@pytest.mark.parametrize(("name", "share"), [("snapkv", "head"), ("keydiff", "model"), ("retention", "model")])
def test_every_turn_is_evicted_down_to_the_budget(name, share):
    talks = [job(*TALK[:turns]) for turns in (1, 2, 3)]
    tokens = [vestige_runner.run(MODEL, [talk], policy(name, share=share))[0].held for talk in talks]
    assert tokens == [15 * ROWS] * 3
    fraction = policy(name, Budget.fraction(0.25), share=share)
    held = [vestige_runner.run(MODEL, [talk], fraction)[0].held for talk in talks]
    # a quarter of what was seen and is announced: 60 + 5, 65 + 7 + 20 + 4, 96 + 4 + 25 + 6
    assert held == [16 * ROWS, 24 * ROWS, 32 * ROWS]


def test_times_of_a_dialogue_add_up_over_its_turns():
    (one,) = vestige_runner.run(MODEL, [job(*TALK[:1])], policy("snapkv"))
    (three,) = vestige_runner.run(MODEL, [job(*TALK)], policy("snapkv"))
    assert len(three.replies) == 3 and three.prefill_s >= three.evict_s > 0
    assert three.peak_kv_bytes >= one.kv_bytes
