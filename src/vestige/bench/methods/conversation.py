"""The input and the outcome of a method: the same for vestige and for every peer."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class TurnIds:
    """Token ids of one turn; they hold the chat text too."""

    context: tuple[int, ...]
    """Read, then compressed. From the second turn on it begins with the chat text that closes the last reply."""
    question: tuple[int, ...]
    """Read after the context and kept whole: the question, and the opening of the reply. Empty if the context has the
    question: the first token of the reply is then the model's prediction before anything is compressed."""
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """One conversation over one cache, for one method.

    After a reply all of its tokens but the last are in the cache; the last one, unless it is in ``stop``, is fed
    before the next turn's context.
    """

    turns: tuple[TurnIds, ...]
    stop: tuple[int, ...]
    """Ids that end a reply."""
    keep: int | None = None
    """Pairs per KV head that stay of the first context; None keeps everything."""
    copies: int = 1
    """Equal batch rows, to time batches; replies are those of the first, pairs and bytes those of all."""

    @property
    def tokens(self) -> int:
        """Number of tokens of the conversation, the longest replies included."""
        return sum(len(turn.context) + len(turn.question) + turn.max_new_tokens for turn in self.turns)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Replies, times and sizes. The cache is measured after the last compression before the last question."""

    replies: tuple[tuple[int, ...], ...]
    """Ids generated in each turn, the id that ended it included."""
    seen: int
    """Tokens read when the cache was measured."""
    held: int
    """Pairs in storage, over layers and KV heads, whether attention reads them or not."""
    full: int
    """Pairs that a cache without eviction would hold."""
    kv_bytes: int
    """Bytes of live storage: all tensors of the cache, memories and side arrays included."""
    peak_kv_bytes: int
    full_kv_bytes: int
    """Bytes of a DynamicCache of the same tokens."""
    memory_bytes: int = 0
    prefill_s: float
    """Seconds of reading the contexts, compression included."""
    evict_s: float
    """Seconds of scoring, selecting and compacting: part of ``prefill_s``."""
    decode_ms: float | None
    """Milliseconds of a decode step: the mean over all steps of all replies; None if there were none."""
    kept: tuple[tuple[int, ...], ...] = field(default=())
    """Pairs held per layer and KV head."""
    note: str | None = None
    """A remark for the reader of the row: keys that were masked and not freed, ..."""
