"""transformers' own caches as peers: DynamicCache, and QuantizedCache, which stores all pairs in fewer bytes."""

import importlib.util
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache

from vestige.bench.methods.conversation import Job, Outcome
from vestige.bench.methods.decode import decode
from vestige.bench.methods.peers.base import Peer, PeerError
from vestige.bench.methods.peers.names import BACKENDS, PeerName
from vestige.bench.metrics.byte_meter import ByteMeter
from vestige.errors import InputError, VestigeError
from vestige.models.compat import cache_argument
from vestige.models.layout import check
from vestige.utils.timing import synchronized_time

_DEFAULTS: dict[str, dict[str, Any]] = {
    "hqq": {"nbits": 4, "axis_key": 1, "axis_value": 1},  # transformers' own axes, 0, do not suit hqq
    "quanto": {"nbits": 4},
}
_PACKAGES = {"hqq": "hqq", "quanto": "optimum.quanto"}
_PIP = {"hqq": "hqq", "quanto": '"vestige[bench]"'}


class CachePeer(Peer):
    """A cache class of transformers on the caller's model. Sliding layers are left out of all numbers.

    Raises:
        InputError: The backend of a quantised cache is not installed, or refuses its options.
    """

    def __init__(self, name: PeerName, model: PreTrainedModel) -> None:
        self.name, self.model = name, model
        self.layers = check(model).evictable
        self.options: dict[str, Any] = {}
        if name.call["name"] == "quantized":
            backend = name.call["options"].get("backend", BACKENDS[0])
            self.options = {"backend": backend, **_DEFAULTS[backend], **name.call["options"]}
            _require(backend)
        self._make_cache()

    def run(self, job: Job) -> Outcome:
        """Run one conversation; ``job.keep`` is ignored.

        Raises:
            PeerError: The cache class failed.
        """
        try:
            return self._converse(job)
        except VestigeError:
            raise
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            raise PeerError(f"{self.name.text} failed: {' '.join(str(error).split())}") from error

    def _converse(self, job: Job) -> Outcome:
        cache, meter = self._make_cache(), ByteMeter(self.layers)
        replies: list[tuple[int, ...]] = []
        pending: tuple[int, ...] = ()
        logits = torch.empty(0)
        total = seen = kv_bytes = steps = 0
        prefill_s = decode_s = 0.0
        for turn in job.turns:
            ids = (*pending, *turn.context)
            if ids:
                started, idle = synchronized_time(self.model.device), meter.overhead_s
                with meter.watch(cache):
                    logits = self._feed(cache, self._tensor(ids, job.copies))
                prefill_s += synchronized_time(self.model.device) - started - (meter.overhead_s - idle)
            seen, kv_bytes = total + len(ids), meter.measure(cache)
            if turn.question:
                logits = self._feed(cache, self._tensor(turn.question, job.copies))
            limits = [turn.max_new_tokens] * job.copies
            decoded = decode(lambda token: self._feed(cache, token), logits, limits, job.stop)
            replies.append(decoded.replies[0])
            steps, decode_s = steps + decoded.steps, decode_s + decoded.seconds
            total = seen + len(turn.question) + decoded.steps
            pending = tuple(token for token in decoded.replies[0][-1:] if token not in job.stop)
        heads = [meter.heads.get(i, 0) * job.copies for i in self.layers]
        return Outcome(
            replies=tuple(replies),
            seen=seen,
            held=seen * sum(heads),
            full=seen * sum(heads),
            kv_bytes=kv_bytes,
            peak_kv_bytes=meter.peak_bytes,
            full_kv_bytes=seen * sum(meter.pair_bytes.values()) * job.copies,
            prefill_s=prefill_s,
            evict_s=0.0,
            decode_ms=1e3 * decode_s / steps if steps else None,
            kept=tuple((seen,) * n for n in heads),
            note=", ".join(f"{option} {value}" for option, value in self.options.items()) or None,
        )

    def close(self) -> None:
        """Do nothing: no resource is held between jobs."""

    def _make_cache(self) -> Cache:
        cache = DynamicCache(config=self.model.config)
        if self.options:
            config = self.model.config.get_text_config(decoder=True)
            try:  # an attached model takes no QuantizedCache, which differs from a cache in its layers only
                cache.layers = QuantizedCache(config=config, **self.options).layers
            except (ValueError, ImportError) as error:
                raise InputError(f"{self.name.text} cannot be made: {' '.join(str(error).split())}") from None
        return cache

    @torch.no_grad()
    def _feed(self, cache: Cache, ids: torch.Tensor) -> torch.Tensor:
        out = self.model(input_ids=ids, **cache_argument(cache), use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = out.logits
        return logits[:, -1]

    def _tensor(self, ids: tuple[int, ...], copies: int) -> torch.Tensor:
        return torch.tensor([ids] * copies, device=self.model.device)


def _require(backend: str) -> None:
    """Raise an InputError if the package of a backend is not installed."""
    top, _, _ = _PACKAGES[backend].partition(".")
    if importlib.util.find_spec(top) is None or importlib.util.find_spec(_PACKAGES[backend]) is None:
        raise InputError(f"peer transformers:quantized: {backend} is not installed: pip install {_PIP[backend]}")
