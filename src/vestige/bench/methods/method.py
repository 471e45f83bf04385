"""What is compared: an arm is a policy with its budget, share and memory, or a peer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from transformers import PreTrainedModel

from vestige import memory as memories_of
from vestige import policies
from vestige.bench.methods import peers as others
from vestige.budget import Budget
from vestige.errors import InputError, PolicyError
from vestige.memory.base import Memory
from vestige.nn.pretrained import digest
from vestige.policies.base import Policy
from vestige.policies.selection import parse_share


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One method at one budget.

    Raises:
        PolicyError: An unknown policy, share or memory, or a budget missing or refused.
        InputError: An unknown peer.
    """

    policy: str
    """A key of ``POLICIES``, or the peer's name."""
    budget: str = "1.0"
    """As the user wrote it; "1.0" for what never evicts."""
    share: str | None = None
    """Who competes for room; None for peers."""
    memory: str = "none"
    peer: str | None = None
    samples: int | None = None
    """Only the first so many samples of each (task, length), for slow methods."""

    def __post_init__(self) -> None:
        self.make_memory()
        if self.peer is None:
            if self.policy == "full" and self.budget != "1.0":
                raise PolicyError(f"policy 'full' keeps everything, so its budget is 1.0, not {self.budget}")
            self.make_policy(seed=0)
        else:
            others.check(self.peer)
            Budget.parse(self.budget)

    @property
    def name(self) -> str:
        """What progress and errors call it."""
        share = f":{self.share}" if self.share else ""
        memory = "" if self.memory == "none" else f"+{self.memory}"
        return f"{self.policy}{share}{memory}@{self.budget}"

    @property
    def key(self) -> dict[str, str | None]:
        """What tells it from other arms, in records and rows."""
        names = ("policy", "share", "memory", "budget", "peer")
        return {name: getattr(self, name) for name in names}

    def make_policy(self, seed: int) -> Policy:
        """Return our policy; raises as the command line would."""
        assert self.peer is None
        budget = None if self.policy == "full" else Budget.parse(self.budget)
        return policies.make(self.policy, budget, share=self.share, seed=seed)

    def weights(self, model: PreTrainedModel) -> str:
        """Return a hash of the trained weights at work; empty if there are none.

        Raises:
            ModelError: There are none for this model.
        """
        if self.peer is not None:
            return ""
        return " ".join(filter(None, (digest(one, model) for one in (self.make_policy(seed=0), self.make_memory()))))

    def make_memory(self) -> Memory | None:
        """Return what remains of the evicted; raises as the command line would."""
        return memories_of.make(self.memory)


def cross(
    names: Sequence[str],
    budgets: Sequence[str],
    *,
    shares: Sequence[str] = (),
    memories: Sequence[str] = ("none",),
    peers: Sequence[str] = (),
) -> tuple[Arm, ...]:
    """Return an arm for every combination; what never evicts has one arm however many budgets there are.

    Args:
        names: Policies.
        budgets: Budgets, as text.
        shares: Who competes for room; empty leaves each method's own choice.
        memories: What remains of the evicted.
        peers: Names of peers.

    Raises:
        InputError: Neither a policy nor a peer, or an unknown peer.
        PolicyError: As :class:`Arm`.
        BudgetError: A budget that cannot be read.
    """
    if not names and not peers:
        raise InputError("name at least one --policy or --peer")
    for share in shares:  # also where full and peers have no use for them
        parse_share(share)
    for memory in memories:
        memories_of.make(memory)
    for budget in budgets:
        Budget.parse(budget)
    if set(names) == {"full"} and not peers:
        _require_no_use_of(budgets, shares, memories)
    return tuple(dict.fromkeys([*_own(names, budgets, shares, memories), *_foreign(peers, budgets)]))


def _require_no_use_of(budgets: Sequence[str], shares: Sequence[str], memories: Sequence[str]) -> None:
    given = {"--budget": budgets, "--share": shares, "--memory": [one for one in memories if one != "none"]}
    if idle := [option for option, values in given.items() if values]:
        raise InputError(f"{' and '.join(idle)} without a --policy that evicts; policy full keeps everything")


def _own(names: Sequence[str], budgets: Sequence[str], shares: Sequence[str], memories: Sequence[str]) -> Iterator[Arm]:
    for name in names:
        if name == "full":
            yield Arm(policy=name, share=policies.make(name).share)
            continue
        if not budgets:
            policies.make(name)  # says that a budget is needed
        for share, memory, budget in product(shares or (None,), memories, budgets):
            made = policies.make(name, Budget.parse(budget), share=share)
            yield Arm(policy=name, budget=budget, share=made.share, memory=memory)


def _foreign(peers: Sequence[str], budgets: Sequence[str]) -> Iterator[Arm]:
    for peer in peers:
        others.check(peer)
        if not others.takes_budget(peer):
            yield Arm(policy=peer, peer=peer)
        elif not budgets:
            raise InputError(f"peer {peer} needs --budget")
        else:
            yield from (Arm(policy=peer, budget=budget, peer=peer) for budget in budgets)
