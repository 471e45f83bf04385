"""Drafts with statements about made-up people and things, placed among sentences.

The erased statement contradicts another one, gives orders about it, stands alone, or is unrelated to the query.
"""

import random
from collections.abc import Collection, Sequence
from dataclasses import replace

from vestige.training.data.vocabulary import (
    ASK_ALL,
    JOINTS,
    ORDERS,
    RELATIONS,
    REMARKS,
    REPLY_ALL,
    STATED,
    Topic,
    draw_distinct,
    draw_subject,
    draw_weighted,
)
from vestige.training.eraser.templates import Draft, Passage, Query

KINDS = {"conflict": 0.42, "remark": 0.16, "order": 0.14, "several": 0.14, "retained": 0.08, "alone": 0.06}
"""Probability of each kind. A remark is a conflict with a consequence of the erased statement, which stays."""
ALIKE = 0.4
"""Probability that all subjects share the relation and its phrasing, so that the model must tell them apart."""
FREE = 0.5
"""Probability of a further query whose reply nothing opens."""


def draft_facts(rng: random.Random, sentences: Sequence[str]) -> Draft:
    """Return a text with statements, some of which are erased.

    Args:
        rng: Source of all random choices.
        sentences: Filler for the statements, in order; at least eight sentences.
    """
    kind = draw_weighted(rng, KINDS)
    topic = _draw_topic(rng)
    side, *others = _draw_others(rng, topic)
    right, *wrong, alike = draw_distinct(rng, topic.relation.value, 5)
    retained = alike if side.relation is topic.relation else side.relation.value(rng)
    placed = [Passage(text=side.state(rng, retained))]
    placed += [Passage(text=other.state(rng, other.relation.value(rng))) for other in others]
    if kind != "alone":
        placed.append(Passage(text=topic.state(rng, right), states=right))
    passages = _place(rng, sentences, placed, _draw_erased(rng, kind, topic, right, wrong))
    main = Query(kind=kind, **topic.ask(rng), answer="" if kind == "alone" else right, misled=kind != "retained")
    queries = [main, Query(kind="retained", **side.ask(rng), answer=retained)]
    if kind in ("conflict", "several"):
        queries.append(Query(kind="all", **topic.ask(rng, ASK_ALL, REPLY_ALL), answer=right))
    if kind != "retained" and rng.random() < FREE:
        queries.append(Query(kind="free", question=topic.ask(rng)["question"], prefix="", answer=right))
    return Draft(passages=passages, queries=tuple(queries), joint=draw_weighted(rng, JOINTS))


def _draw_erased(rng: random.Random, kind: str, topic: Topic, right: str, wrong: Sequence[str]) -> list[list[Passage]]:
    """Return groups of passages: an erased one, and those that directly follow it."""
    stated = [Passage(text=topic.state(rng, value), states=value, is_erased=True) for value in wrong]
    if kind == "remark":
        return [[stated[0], Passage(text=topic.state(rng, "", REMARKS))]]
    if kind == "several":
        return [[passage] for passage in stated[: rng.randint(2, 3)]]
    if kind == "order":
        return [[Passage(text=topic.state(rng, wrong[0], ORDERS), is_erased=True)]]
    if kind == "retained":
        other = _draw_topic(rng, (topic.who,))
        return [[Passage(text=other.state(rng, other.relation.value(rng)), is_erased=True)]]
    if kind == "alone":
        return [[Passage(text=topic.state(rng, right), states=right, is_erased=True)]]
    return [[stated[0]]]


def _place(
    rng: random.Random, sentences: Sequence[str], placed: Sequence[Passage], erased: Sequence[Sequence[Passage]]
) -> tuple[Passage, ...]:
    """Return sentences with statements at random places; up to two sentences after an erased one are erased too."""
    groups = [[Passage(text=sentence)] for sentence in sentences]
    for passage in placed:
        groups.insert(rng.randrange(1, len(groups)), [passage])
    for group in erased:
        at = rng.choice([i for i in range(1, len(groups)) if not groups[i][0].is_erased])
        if len(group) == 1:
            _erase_sentences(groups, at, rng.choice((0, 0, 0, 1, 2)))
        groups.insert(at, list(group))
    return tuple(passage for group in groups for passage in group)


def _erase_sentences(groups: list[list[Passage]], at: int, count: int) -> None:
    for i in range(at, min(at + count, len(groups))):
        if len(groups[i]) == 1 and not groups[i][0].states:
            groups[i] = [replace(groups[i][0], is_erased=True)]


def _draw_topic(rng: random.Random, taken: Collection[str] = ()) -> Topic:
    """Return a topic of a subject not in ``taken``; its statements have one form, or any."""
    (who,) = draw_distinct(rng, draw_subject, 1, taken=taken)
    forms = (rng.choice((STATED[0], rng.choice(STATED))),) if rng.random() < 0.6 else STATED
    return Topic(who, rng.choice(RELATIONS), forms)


def _draw_others(rng: random.Random, topic: Topic) -> list[Topic]:
    """Return topics of one to three other subjects, often with the same relation and phrasing."""
    found = [topic]
    alike = rng.random() < ALIKE
    for _ in range(rng.randint(1, 3)):
        other = _draw_topic(rng, [known.who for known in found])
        found.append(replace(topic, who=other.who) if alike else other)
    return found[1:]
