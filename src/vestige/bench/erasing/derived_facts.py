"""A fact that is erased after something was derived from it: the consequence stays in the text, near or far behind.

An older value stands early in the text. Then a newer one is told (this is erased), and so many tokens later a sentence
says what follows from it, without the value. Once the newer value is gone, the older one is right: that is the clean
answer, although the consequence, which was read when the newer value was known, still points to it.
"""

import random

from vestige.bench.erasing.sample import NUMBER_ROOM, Question, erased, what_is
from vestige.bench.erasing.story_templates import Maker, Plot, depths, each, facts, reaching, sentences
from vestige.bench.tasks import TaskSpec


def after(distance: int) -> Maker:
    """Return the maker of samples whose consequence stands so many tokens behind the fact, in whole sentences."""
    return each(lambda order, rng: _plot(order, rng, distance))


def _plot(order: TaskSpec, rng: random.Random, distance: int) -> Plot:
    (name, (right, gone, badge)), (other, others) = facts(order, rng, 2, 3)
    essay = sentences(order, rng, [gone])
    between = reaching(order, essay, distance)
    lines = [
        f"The locker number of {name} is {right}.",
        " ".join(
            [
                erased(f"The locker number of {name} is {gone}."),
                *essay[:between],
                f"Because of this locker, {name} has the badge {badge}.",
            ]
        ),
    ]
    lines.insert(rng.randrange(3), f"The locker number of {other} is {others[0]}.")
    return Plot(
        opening="Here is a document. I will ask you about it afterwards.\n",
        lines=lines,
        depths=depths(rng, len(lines)),
        filler=essay[between:],
        questions=(
            what_is("target", f"the locker number of {name}", right, forbidden=[gone]),
            what_is("retained", f"the badge of {name}", badge),
            what_is("retained", f"the locker number of {other}", others[0]),
            Question(
                kind="leak",
                text=f"Which locker numbers of {name} does the document mention? List all of them.",
                answer_prefix=f"The locker numbers of {name} are",
                forbidden=(gone,),
                max_new_tokens=2 * NUMBER_ROOM,
            ),
        ),
        tags={"distance": distance},
    )
