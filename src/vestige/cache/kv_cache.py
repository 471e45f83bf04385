"""The cache to pass to ``model.generate``: budget, forks, saving, and the verbs of transformers' caches."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from vestige.cache import evict, serialization
from vestige.cache.layer import RaggedLayer
from vestige.cache.other_layers import copy_layer
from vestige.cache.report import Report, make_report
from vestige.cache.state import CacheState, expected_footprint
from vestige.errors import InputError, PolicyError
from vestige.memory.base import ForgetResult, Memory
from vestige.models.layout import ModelLayout, check
from vestige.policies.base import Policy
from vestige.policies.observation import Phase, RowView
from vestige.spans import Span


class KVCache(Cache):
    """A KV cache that stays within its policy's budget and frees the memory of evicted pairs.

    Every full-attention layer becomes a :class:`~vestige.cache.layer.RaggedLayer`; sliding, linear and KV-shared layers
    are left as transformers makes them. The model must be attached (``with vestige.attach(model):``).

    Args:
        model: The model that will fill the cache.
        policy: Chooses the pairs to keep; its budget says how many. ``policies.Full()`` keeps everything.
        memory: Summarises evicted pairs for every later query to read; None forgets them.
        observers: Policies that a :meth:`fork` may change to. Their statistics are recorded too, so that one reading
            serves many policies.

    Raises:
        ModelError: The model cannot work with an evicting cache; the message says why.
        BudgetError: The budget is below the protected pairs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        *,
        memory: Memory | None = None,
        observers: Sequence[Policy] = (),
    ) -> None:
        self._start(CacheState(check(model), policy, [policy, *observers], memory))
        if policy.budget is not None:
            footprint = expected_footprint(self.layout, self.state.bound_memory)
            policy.budget.check(policy.protected, footprint=footprint)

    def _start(self, state: CacheState) -> None:
        layers = DynamicCache(config=state.layout.config).layers
        for idx in state.layout.evictable:
            layers[idx] = RaggedLayer(state, idx)
        super().__init__(layers=layers)
        self.state = state
        """Bookkeeping that the layers share: token history, schedule, recorded statistics, counters."""
        state.storage = self.evictable

    # What the cache holds.

    @property
    def layout(self) -> ModelLayout:
        """Layout of the model that fills the cache."""
        return self.state.layout

    @property
    def policy(self) -> Policy:
        """The policy that chooses the pairs to keep."""
        return self.state.policy

    @property
    def memory(self) -> Memory | None:
        """The memory that summarises evicted pairs, or None."""
        return self.state.memory

    @property
    def evictable(self) -> list[RaggedLayer]:
        """Layers whose pairs can be evicted."""
        return [layer for layer in self.layers if isinstance(layer, RaggedLayer)]

    @property
    def ragged(self) -> bool:
        """Whether any pair was evicted."""
        return any(layer.ragged for layer in self.evictable)

    @property
    def seen(self) -> tuple[int, ...]:
        """Tokens of each batch row, pads not counted."""
        return self.state.seen

    @property
    def held(self) -> int:
        """Pairs stored over evictable layers and rows; pads do not count."""
        return sum(sum(layer.live_lengths()) for layer in self.evictable)

    @property
    def ids(self) -> Int[Tensor, "batch padded_seen"]:
        """Token ids fed so far, pads included; -1 where the model got embeddings."""
        return self.state.history.ids

    @property
    def real(self) -> Bool[Tensor, "batch padded_seen"]:
        """False for pads."""
        return self.state.history.real

    @property
    def padded(self) -> bool:
        """Whether any batch row contains pads."""
        return self.state.padded

    def report(self) -> Report:
        """Return a snapshot of the pairs held, bytes and seconds."""
        return make_report(self.state, self.layers)

    # Evicting and forgetting.

    def pin(self, span: Span) -> None:
        """Protect the pairs of a span, in every layer and batch row, from eviction.

        Raises:
            BudgetError: Sink, window and pins together exceed a budget in tokens.
        """
        self.state.pin(span)

    def settle(self, *, reading: bool = False, coming: int = 0) -> None:
        """Evict down to the budget: bring every batch row to its limit, or between chunks to limit x reading slack.

        If the pairs held are within the limit, no bit of the cache changes. If the policy needs the latest queries and
        all of them were removed by :meth:`crop`, the settle waits for the next tokens.

        Args:
            reading: Whether chunks follow.
            coming: Tokens about to be fed; the same copy allocates their slots. 0 leaves no free slots.

        Raises:
            PolicyError: A score is NaN, or a statistic that the policy needs was not recorded. The cache is unchanged.
            BudgetError: The protected pairs do not fit. The cache is unchanged.
        """
        state, policy, layers = self.state, self.policy, self.evictable
        if not policy.evicts or not state.seen or (reading and math.isinf(policy.reading_slack)):
            return
        if any(layer.is_missing(policy.ring_sizes) for layer in layers):
            return
        state.check_whole()
        started = time.perf_counter()
        phase = Phase.PREFILL if state.schedule.prompt or not state.schedule.generated else Phase.DECODE
        limits = state.pair_limits(reading=reading)
        absorbed = None if self.memory is None else state.absorbed
        changed = evict.evict(layers, policy, limits, state.seen, state.pins, phase, coming, absorbed)
        if not reading:
            evict.reset_statistics(layers, policy, changed)
        if changed:
            state.evict_s += time.perf_counter() - started
        state.schedule.reset()

    def forget(self, span: Span) -> ForgetResult:
        """Tell whether the memory is free of a span, in every batch row; the cache is not changed.

        Returns ``EXACT`` if the memory absorbed no pair of the span, or all were subtracted again, else ``IMPOSSIBLE``.
        :func:`vestige.forget` can subtract pairs from some memories; reading the ids again without the span always
        works.
        """
        return ForgetResult.IMPOSSIBLE if self.state.absorbed.overlaps(span) else ForgetResult.EXACT

    # Copies.

    def fork(
        self, policy: Policy | None = None, *, memory: Memory | Literal["same"] | None = "same", empty: bool = False
    ) -> "KVCache":
        """Return an equal cache that shares no storage, with another policy or memory if one is given.

        A fork with another policy drops the statistics that this policy does not need, so that its bytes are its own.

        Args:
            policy: Policy of the fork; None keeps this cache's.
            memory: Memory of the fork.
            empty: Whether the fork starts without tokens, with policy, memory and observers alone.

        Raises:
            PolicyError: The policy needs a statistic that this cache did not record (see ``observers``), or the memory
                is another one and pairs were evicted already.
        """
        changed = policy is not None
        policy = self.policy if policy is None else policy
        memory = self.memory if memory == "same" else memory
        self.state.recording.check(policy)
        if self.ragged and memory != self.memory and not empty:
            raise PolicyError(f"pairs were evicted already, so the memory stays {self.memory}; {memory} came too late")
        copy = object.__new__(KVCache)
        copy._start(CacheState(self.layout, policy, [policy], memory) if empty else self.state.fork(policy, memory))
        if not changed:
            copy.state.recording = self.state.recording
        if empty:
            return copy
        copy.layers = [
            layer.copy_to(copy.state) if isinstance(layer, RaggedLayer) else copy_layer(layer) for layer in self.layers
        ]
        copy.state.storage = copy.evictable
        if changed:
            for layer in copy.evictable:
                layer.drop_unused(policy.annotations, policy.ring_sizes)
        copy.state.peak_kv_bytes = copy.state.nbytes
        return copy

    def __deepcopy__(self, memo: dict[int, Any]) -> "KVCache":
        return self.fork()

    def replace_with(self, other: "KVCache") -> None:
        """Become another cache of the same model, which must not be used afterwards."""
        peak = max(self.state.peak_kv_bytes, self.state.nbytes + other.state.peak_kv_bytes)
        vars(self).update(vars(other))
        self.state.peak_kv_bytes = peak

    def save(self, path: str | Path) -> None:
        """Write the cache to a folder, completely or not at all: see :mod:`~vestige.cache.serialization`."""
        serialization.save(self.state, self.layers, Path(path))

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> "KVCache":
        """Read a cache that was saved for the same model, without running code from the files.

        Raises:
            CacheFileError: Missing, damaged, or made for another model.
        """
        with serialization.open_saved(Path(path), model) as saved:
            cache = saved.build(cls)
            saved.restore(cache.state, cache.layers)
        return cache

    # Removing tokens.

    @contextmanager
    def rolled_back(self, watch: Callable[[RowView], None] | None = None) -> Iterator[None]:
        """Remove at the end all tokens fed inside: only ``watch`` observes them, and no settle happens.

        Args:
            watch: Called with each row as the new queries attend to it; may write to the policy's own side arrays.
        """
        others = {i: copy_layer(layer) for i, layer in enumerate(self.layers) if not isinstance(layer, RaggedLayer)}
        padded = self.evictable[0].padded_seen
        try:
            with self.state.rolled_back(() if watch is None else (watch,)):
                yield
        finally:
            for i, layer in others.items():
                self.layers[i] = layer
            self._crop_layers(padded)

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the last ``-tokens_to_remove`` tokens, pads included, also those of a forward that failed.

        Evicted pairs are not restored, and a memory keeps the pairs that it absorbed.

        Raises:
            InputError: A positive number, or more tokens than were seen. The cache is unchanged.
            CacheError: The last forward failed, and some of its tokens would stay, or stay in layers of other kinds.
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.16 counts candidates in a tensor
        padded = self.ids.shape[1]
        if tokens_to_remove > 0 or -tokens_to_remove > padded:
            raise InputError(f"crop takes a number from {-padded} to 0: the tokens to remove; got {tokens_to_remove}")
        left = padded + tokens_to_remove
        others: list[Any] = [layer for layer in self.layers if not isinstance(layer, RaggedLayer)]
        if others or any(layer.padded_seen < left for layer in self.evictable):
            self.state.check_whole()
        for other in others:
            other.crop(tokens_to_remove)
        if tokens_to_remove == 0:
            return
        before = self.seen
        self.state.crop(-tokens_to_remove)
        for layer in self.evictable:
            layer.crop_records(before, self.seen)
        self._crop_layers(left)

    def _crop_layers(self, left: int) -> None:
        """Remove all but the first ``left`` tokens of each layer, however many it stored."""
        for layer in self.evictable:
            layer.crop(left - layer.padded_seen)
            layer.step_number = 0 if self.state.step is None else self.state.step.number

    # The other verbs of generate.

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: the cache grows as needed, and settles limit it."""
        return -1

    def reset(self) -> None:
        """Remove all tokens; policy, memory (emptied) and observers stay."""
        self.replace_with(self.fork(empty=True))
        self.state.peak_kv_bytes = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace batch row b by batch row ``beam_idx[b]``, for beam search."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.state.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row in place."""
        super().batch_repeat_interleave(repeats)
        self.state.reorder(torch.arange(len(self.seen)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given batch rows in the given order."""
        super().batch_select_indices(indices)
        self.state.reorder(torch.arange(len(self.seen))[indices.cpu()])
