"""The methods that a benchmark compares: a policy with its budget, share and memory, and an eraser, or a peer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from transformers import PreTrainedModel

from vestige import memory as memories_of
from vestige import policies
from vestige.bench.methods import peers as peer_names
from vestige.budget import Budget
from vestige.errors import InputError, PolicyError
from vestige.memory.base import Memory
from vestige.nn.pretrained import digest
from vestige.policies.base import Policy
from vestige.policies.selection import parse_share


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method at one budget.

    Raises:
        PolicyError: An unknown policy, share or memory, or a budget missing or refused.
        InputError: An unknown peer.
    """

    policy: str
    """A key of ``POLICIES``, or the peer's name."""
    budget: str = "1.0"
    """As the user wrote it; "1.0" if the method never evicts."""
    share: str | None = None
    """Rows that compete for one budget; None for peers."""
    memory: str = "none"
    peer: str | None = None
    eraser: str | None = None
    """An eraser, with options if wanted, that works on the cache after the policy; None in the other benchmarks."""
    samples: int | None = None
    """Samples of each (task, length) at most, the first ones, for slow methods; None runs all."""

    def __post_init__(self) -> None:
        self.make_memory()
        if self.peer is None:
            if self.policy == "full" and self.budget != "1.0":
                raise PolicyError(f"policy 'full' keeps everything, so its budget is 1.0, not {self.budget}")
            self.make_policy(seed=0)
        else:
            peer_names.check(self.peer)
            Budget.parse(self.budget)

    @property
    def name(self) -> str:
        """The name in progress and errors."""
        share = f":{self.share}" if self.share else ""
        memory = "" if self.memory == "none" else f"+{self.memory}"
        return f"{self.policy}{share}{memory}@{self.budget}"

    @property
    def key(self) -> dict[str, str | None]:
        """The options that tell a method from all others, in records and rows."""
        names = ("policy", "share", "memory", "budget")
        return {name: getattr(self, name) for name in names} | {"peer": self.peer or self.eraser}

    def make_policy(self, seed: int) -> Policy:
        """Return the policy; raises the errors of the command line."""
        assert self.peer is None
        budget = None if self.policy == "full" else Budget.parse(self.budget)
        return policies.make(self.policy, budget, share=self.share, seed=seed)

    def weights(self, model: PreTrainedModel) -> str:
        """Return a hash of the trained weights that the method uses; empty if it uses none.

        Raises:
            ModelError: It needs weights and there are none for this model.
        """
        if self.peer is not None or self.eraser is not None:
            return ""
        return " ".join(filter(None, (digest(part, model) for part in (self.make_policy(seed=0), self.make_memory()))))

    def make_memory(self) -> Memory | None:
        """Return the memory of evicted pairs, or None; raises the errors of the command line."""
        return memories_of.make(self.memory)


def cross(
    names: Sequence[str],
    budgets: Sequence[str],
    *,
    shares: Sequence[str] = (),
    memories: Sequence[str] = ("none",),
    peers: Sequence[str] = (),
) -> tuple[Method, ...]:
    """Return a method for every combination; one that never evicts comes once, whatever the number of budgets.

    Args:
        names: Policies.
        budgets: Budgets, as text.
        shares: Rows that compete for one budget; empty leaves the choice to each policy.
        memories: Names of memories.
        peers: Names of peers.

    Raises:
        InputError: Neither a policy nor a peer, or an unknown peer.
        PolicyError: As :class:`Method`.
        BudgetError: A budget that cannot be read.
    """
    if not names and not peers:
        raise InputError("name at least one --policy or --peer")
    for share in shares:  # full and peers do not use them
        parse_share(share)
    for memory in memories:
        memories_of.make(memory)
    for budget in budgets:
        Budget.parse(budget)
    if set(names) == {"full"} and not peers:
        _refuse_unused(budgets, shares, memories)
    return tuple(dict.fromkeys([*_cross_policies(names, budgets, shares, memories), *_cross_peers(peers, budgets)]))


def _refuse_unused(budgets: Sequence[str], shares: Sequence[str], memories: Sequence[str]) -> None:
    given = {"--budget": budgets, "--share": shares, "--memory": [memory for memory in memories if memory != "none"]}
    if unused := [option for option, values in given.items() if values]:
        raise InputError(f"{' and '.join(unused)} without a --policy that evicts; policy full keeps everything")


def _cross_policies(
    names: Sequence[str], budgets: Sequence[str], shares: Sequence[str], memories: Sequence[str]
) -> Iterator[Method]:
    for name in names:
        if name == "full":
            yield Method(policy=name, share=policies.make(name).share)
            continue
        if not budgets:
            policies.make(name)  # raises: the policy needs a budget
        for share, memory, budget in product(shares or (None,), memories, budgets):
            made = policies.make(name, Budget.parse(budget), share=share)
            yield Method(policy=name, budget=budget, share=made.share, memory=memory)


def _cross_peers(peers: Sequence[str], budgets: Sequence[str]) -> Iterator[Method]:
    for peer in peers:
        peer_names.check(peer)
        if not peer_names.takes_budget(peer):
            yield Method(policy=peer, peer=peer)
        elif not budgets:
            raise InputError(f"peer {peer} needs --budget")
        else:
            yield from (Method(policy=peer, budget=budget, peer=peer) for budget in budgets)
