"""Drafts of statements about made-up people and things, put among the sentences of some prose.

The erased statement contradicts another, gives orders about it, stands alone, or has nothing to do with the question.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vestige.training.data.vocabulary import (
    ASK,
    ASK_ALL,
    ORDERS,
    RELATIONS,
    REMARKS,
    REPLY,
    REPLY_ALL,
    STATED,
    Relation,
    subject,
)
from vestige.training.eraser.templates import Draft, Passage, Query

KINDS = {"conflict": 0.42, "remark": 0.16, "order": 0.14, "several": 0.14, "retained": 0.08, "alone": 0.06}
"""How often each comes. A remark is a conflict whose erased statement has a consequence behind it, which stays."""
ALIKE = 0.4
"""How often others have the same, said in the same words: what is left must not be mistaken for theirs."""
FREE = 0.5
"""How often it is asked, too, with nothing that opens the reply."""
JOINTS = {" ": 0.7, "\n": 0.2, "\n\n": 0.1}


@dataclass(frozen=True)
class _Topic:
    """Who has what, and how it is said in one text."""

    who: str
    relation: Relation
    phrase: str | None
    """How it is stated, if always alike."""

    def says(self, rng: random.Random, value: str, forms: Sequence[str] = STATED) -> str:
        form = self.phrase if self.phrase and forms is STATED else rng.choice(forms)
        return form.format(what=self.relation.what, s=self.who, v=value)

    def asked(self, rng: random.Random, kind: str, answer: str, *, misled: bool = False) -> Query:
        forms = (ASK_ALL, REPLY_ALL) if kind == "all" else (ASK, REPLY)
        question, prefix = (rng.choice(some).format(what=self.relation.what, s=self.who) for some in forms)
        return Query(kind=kind, question=question, prefix=prefix, answer=answer, misled=misled)


def draft_facts(rng: random.Random, prose: Sequence[str]) -> Draft:
    """Return a text with statements, some of which are erased.

    Args:
        rng: Says which and where.
        prose: Sentences to put them among, in order, at least eight.
    """
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    topic = _topic(rng, ())
    side, *others = _others(rng, topic)
    right, *wrong, alike = topic.relation.values(rng, 5)
    beside = alike if side.relation is topic.relation else side.relation.value(rng)
    placed = [Passage(text=side.says(rng, beside))]
    placed += [Passage(text=one.says(rng, one.relation.value(rng))) for one in others]
    if kind != "alone":
        placed.append(Passage(text=topic.says(rng, right), states=right))
    passages = _among(rng, prose, placed, _gone(rng, kind, topic, right, wrong))
    main = topic.asked(rng, kind, "" if kind == "alone" else right, misled=kind != "retained")
    taken_along = [side.asked(rng, "retained", beside)]
    if kind in ("conflict", "several"):
        taken_along.append(topic.asked(rng, "all", right))
    if kind != "retained" and rng.random() < FREE:
        taken_along.append(replace(topic.asked(rng, "free", right), prefix=""))
    joint = rng.choices(list(JOINTS), list(JOINTS.values()))[0]
    return Draft(passages=passages, queries=(main, *taken_along), joint=joint)


def _gone(rng: random.Random, kind: str, topic: _Topic, right: str, wrong: Sequence[str]) -> list[list[Passage]]:
    """Return what is erased, and what stands right behind each."""
    stated = [Passage(text=topic.says(rng, value), states=value, is_erased=True) for value in wrong]
    if kind == "remark":
        return [[stated[0], Passage(text=topic.says(rng, "", REMARKS))]]
    if kind == "several":
        return [[one] for one in stated[: rng.randint(2, 3)]]
    if kind == "order":
        return [[Passage(text=topic.says(rng, wrong[0], ORDERS), is_erased=True)]]
    if kind == "retained":
        other = _topic(rng, (topic.who,))
        return [[Passage(text=other.says(rng, other.relation.value(rng)), is_erased=True)]]
    if kind == "alone":
        return [[Passage(text=topic.says(rng, right), states=right, is_erased=True)]]
    return [[stated[0]]]


def _among(
    rng: random.Random, prose: Sequence[str], placed: Sequence[Passage], is_erased: Sequence[Sequence[Passage]]
) -> tuple[Passage, ...]:
    """Put statements among sentences at random places; what is erased may take sentences behind it along."""
    groups = [[Passage(text=one)] for one in prose]
    for one in placed:
        groups.insert(rng.randrange(1, len(groups)), [one])
    for some in is_erased:
        at = rng.choice([i for i in range(1, len(groups)) if not groups[i][0].is_erased])
        if len(some) == 1:
            _take_along(groups, at, rng.choice((0, 0, 0, 1, 2)))
        groups.insert(at, list(some))
    return tuple(passage for group in groups for passage in group)


def _take_along(groups: list[list[Passage]], at: int, count: int) -> None:
    for i in range(at, min(at + count, len(groups))):
        if len(groups[i]) == 1 and not groups[i][0].states:
            groups[i] = [replace(groups[i][0], is_erased=True)]


def _topic(rng: random.Random, taken: Sequence[str]) -> _Topic:
    """Return somebody with something, stated in one phrasing throughout, or in several."""
    who = subject(rng)
    while who in taken:
        who = subject(rng)
    phrase = rng.choice((STATED[0], rng.choice(STATED))) if rng.random() < 0.6 else None
    return _Topic(who, rng.choice(RELATIONS), phrase)


def _others(rng: random.Random, topic: _Topic) -> list[_Topic]:
    """Return one to three others, who often have the same, stated alike."""
    found = [topic]
    alike = rng.random() < ALIKE
    for _ in range(rng.randint(1, 3)):
        other = _topic(rng, [one.who for one in found])
        found.append(replace(other, relation=topic.relation, phrase=topic.phrase) if alike else other)
    return found[1:]
