"""Runs kvpress in an environment of its own: one JSON request a line on stdin, one JSON answer a line on stdout.

It stands alone: kvpress 0.5.5 needs transformers up to 5.3, vestige a newer one, so nothing of vestige is imported.
Started by :mod:`vestige.bench.methods.peers.process`; it ends when stdin does, in the middle of a job too.

Requests: ``load`` {folder, device, dtype, threads}, ``run`` {press, job}, ``kept`` {press, ids, keep}.
Answers: {id, result} or {id, error}.
"""

import importlib
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Refused(Exception):
    """What was asked cannot be done; the text says why."""


class Loaded:
    """A model under kvpress, and where its pairs are.

    Args:
        folder: A model in transformers' format.
        device: Where to put it.
        dtype: Of the weights, e.g. ``bfloat16``.
        threads: CPU threads.
    """

    def __init__(self, folder: str, device: str, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        transformers: Any = importlib.import_module("transformers")
        transformers.logging.disable_progress_bar()
        self.kvpress: Any = importlib.import_module("kvpress")  # puts its patch on the attention functions
        made = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model: Any = made.to(device).eval()
        self.new_cache: Any = transformers.DynamicCache
        config = made.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        self.layers = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        inner = made.model.language_model if hasattr(made.model, "language_model") else made.model
        self.attentions = [inner.layers[i].self_attn for i in self.layers]
        self.heads = config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.pair_bytes = 2 * head_dim * made.dtype.itemsize
        self.last_plain: tuple[Any, Any] | None = None
        self.known = [set(vars(attention)) for attention in self.attentions]
        versions = {name: importlib.import_module("importlib.metadata").version(name) for name in ("kvpress", "torch")}
        self.versions = versions | {"transformers": transformers.__version__}

    @property
    def rows(self) -> int:
        """KV heads over the layers that keep everything."""
        return len(self.layers) * int(self.heads)

    def press(self, call: dict[str, Any], keep: int | None, length: int) -> Any:
        """Return a press with its compression ratio set for a context of ``length`` tokens."""
        press = self._build(call)
        if not hasattr(type(press), "compression_ratio"):
            raise Refused(f"{call['name']} has no compression_ratio of its own, so no budget can be set")
        pruned = (self.kvpress.KVzipPress, self.kvpress.FastKVzipPress)
        ratio = ratio_for(keep, length, self.rows, counts_pruned=isinstance(press, pruned))
        try:
            press.compression_ratio = ratio
        except (AttributeError, NotImplementedError, AssertionError) as error:
            raise Refused(f"{call['name']}: {error}") from None
        return press

    def _build(self, value: Any) -> Any:
        """Turn a call into a press, and calls within its arguments too."""
        if isinstance(value, list):
            return [self._build(item) for item in value]
        if not isinstance(value, dict):
            return value
        made = getattr(self.kvpress, value["name"], None)
        if not (isinstance(made, type) and issubclass(made, self.kvpress.BasePress)):
            known = sorted(name for name in vars(self.kvpress) if name.endswith("Press"))
            raise Refused(f"kvpress {self.versions['kvpress']} has no {value['name']}; it has {', '.join(known)}")
        arguments = [self._build(x) for x in value["args"]]
        return made(*arguments, **{k: self._build(x) for k, x in value["options"].items()})

    def plain(self, ids: list[int], press: Any) -> Any:
        """Return the cache of a reading without a press; the last one is remembered."""
        with self.attention_of(press):  # another attention rounds differently
            key = (tuple(ids), self.model.config.get_text_config()._attn_implementation)
            if self.last_plain is None or self.last_plain[0] != key:
                cache = self.new_cache()
                self.model.model(input_ids=torch.tensor([ids], device=self.model.device), past_key_values=cache)
                self.last_plain = key, cache
        return self.last_plain[1]

    @contextmanager
    def attention_of(self, press: Any) -> Iterator[None]:
        """Let the attention return its weights, if that is what the press reads."""
        config = self.model.config.get_text_config()
        before = config._attn_implementation
        if needs_weights(press, self.kvpress.ObservedAttentionPress):
            config._attn_implementation = "eager"
        try:
            yield
        finally:
            config._attn_implementation = before

    def forget(self) -> None:
        """Drop what an earlier press left on the modules."""
        for attention, known in zip(self.attentions, self.known, strict=True):
            for name in set(vars(attention)) - known:
                delattr(attention, name)

    def left_behind(self) -> list[Any]:
        """Return what a press left on the attention modules: indices of masked keys, for one."""
        pairs = zip(self.attentions, self.known, strict=True)
        return [value for attention, known in pairs for name, value in vars(attention).items() if name not in known]

    def masked(self) -> int:
        """Return how many pairs attention is kept from reading although they are stored."""
        indices = [getattr(attention, "masked_key_indices", None) for attention in self.attentions]
        return sum(len(found[0]) for found in indices if found is not None)


def ratio_for(keep: int | None, length: int, rows: int, *, counts_pruned: bool) -> float:
    """Return the compression ratio by which a press keeps ``keep`` of ``length`` pairs per row on average, exactly.

    Presses take ``int(length * (1 - ratio))`` or round; some count over all rows at once, and KVzip and its kin take
    ``int(rows * length * ratio)`` as what goes. A quarter of a pair over all rows is enough to be safe from rounding.
    """
    if keep is None or keep >= length:
        return 0.0
    spare = 0.25 / rows
    return 1 - (keep + (-spare if counts_pruned else spare)) / length


def needs_weights(press: Any, kind: type) -> bool:
    """Return whether a press, or one inside it, is of a kind."""
    inner = [x for value in vars(press).values() for x in (value if isinstance(value, list) else [value])]
    return isinstance(press, kind) or any(needs_weights(x, kind) for x in inner if hasattr(x, "post_init_from_model"))


def storage_bytes(held: Any) -> int:
    """Return the bytes of all storages below an object, each once and whole, as ``bench.metrics.byte_meter`` does."""
    storages = {(str(x.device), x.untyped_storage().data_ptr()): x.untyped_storage().nbytes() for x in tensors(held)}
    return sum(storages.values())


def tensors(held: Any) -> Iterator[Tensor]:
    """Yield the tensors in a cache layer, in lists and in dictionaries."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        for value in held.values():
            yield from tensors(value)
    elif isinstance(held, list | tuple):
        for value in held:
            yield from tensors(value)
    elif hasattr(held, "is_sliding") and hasattr(held, "update"):  # a layer of a cache
        yield from tensors(vars(held))


class Meter:
    """Weighs the cache and times the press while a context is read."""

    def __init__(self, loaded: Loaded, cache: Any) -> None:
        self.loaded, self.cache = loaded, cache
        self.peak_bytes = 0
        self.hooks_s = self.overhead_s = 0.0

    def weigh(self, others: Any = None) -> int:
        """Return the bytes alive; the peak is kept."""
        layers = [self.cache.layers[i] for i in self.loaded.layers if i < len(self.cache.layers)]
        weight = storage_bytes([layers, self.loaded.left_behind(), others])
        self.peak_bytes = max(self.peak_bytes, weight)
        return weight

    @contextmanager
    def on(self, press: Any) -> Iterator[None]:
        """Weigh after each layer's update and each of the press's hooks, and time those."""
        update, hook = self.cache.update, press.forward_hook

        def weighed(*args: Any, **kwargs: Any) -> Any:
            handed = update(*args, **kwargs)
            self._weigh_aside(None)
            return handed

        def timed(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            layer = self.cache.layers[module.layer_idx]
            before, started = (layer.keys, layer.values), self.now()
            out = hook(module, args, kwargs, output)
            self.hooks_s += self.now() - started
            self._weigh_aside(before)  # both copies were alive
            return out

        self.cache.update, press.forward_hook = weighed, timed
        try:
            yield
        finally:
            del self.cache.update, press.forward_hook

    def now(self) -> float:
        """Return a clock that waits for the device and does not count the weighing."""
        device = self.loaded.model.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - self.overhead_s

    def _weigh_aside(self, others: Any) -> None:
        started = time.perf_counter()
        self.weigh(others)
        self.overhead_s += time.perf_counter() - started


class Talk:
    """One conversation, as kvpress's own pipeline holds it: compress the context, then feed the rest without the press.

    Positions go on from the length of the context, not of the compressed cache, unless the press moves keys.
    """

    def __init__(self, loaded: Loaded, press: Any, copies: int = 1) -> None:
        self.loaded, self.model, self.press, self.copies = loaded, loaded.model, press, copies
        self.cache = loaded.new_cache()
        self.meter = Meter(loaded, self.cache)
        self.position = self.seen = self.steps = self.token = 0
        self.prefill_s = self.evict_s = self.decode_s = 0.0
        self.uncompressed = 0
        """Tokens of later contexts, which kvpress never compresses."""

    def read_first(self, ids: list[int]) -> None:
        """Read the first context under the press."""
        if not ids:
            return
        started = self.meter.now()
        with self.loaded.attention_of(self.press), self.meter.on(self.press), self.press(self.model):
            begun, hooked = self.meter.now(), self.meter.hooks_s
            out = self.model.model(input_ids=self._tensor(ids), past_key_values=self.cache)
            plain = self.meter.now() - begun - (self.meter.hooks_s - hooked)
        spent = self.meter.now() - started
        self.prefill_s, self.evict_s = self.prefill_s + spent, self.evict_s + max(spent - plain, 0.0)
        self.token = self._next(out)
        self.seen = len(ids)
        self.position = self.cache.get_seq_length() if self._moves_keys() else len(ids)

    def read_more(self, ids: list[int]) -> None:
        """Read a later context: a press leaves a cache alone that is not empty."""
        if not ids:
            return
        started = self.meter.now()
        positions = self._advance(len(ids))
        out = self.model.model(input_ids=self._tensor(ids), past_key_values=self.cache, position_ids=positions)
        self.token = self._next(out)
        self.prefill_s += self.meter.now() - started
        self.uncompressed += len(ids)
        self.meter.weigh()

    def reply(self, question: list[int], limit: int, stop: list[int]) -> list[int]:
        """Read the question, if it was not read with the context, and answer greedily."""
        if question:
            self.token = self._feed(question)
        said, started = [self.token], self.meter.now()
        while len(said) < limit and said[-1] not in stop:
            said.append(self._feed(said[-1:]))
        self.decode_s, self.steps = self.decode_s + self.meter.now() - started, self.steps + len(said) - 1
        return said

    def measured(self) -> dict[str, Any]:
        """Return what the cache holds now."""
        layers = [self.cache.layers[i] for i in self.loaded.layers if i < len(self.cache.layers)]
        kept = [[layer.keys.shape[2]] * self.loaded.heads * self.copies for layer in layers]
        held, masked = sum(map(sum, kept)), self.loaded.masked()
        notes = [f"kvpress {self.loaded.versions['kvpress']}"]
        if masked:
            notes.append(f"{masked:,} of {held:,} pairs masked, none freed")
        weight, left = self.meter.weigh(), self.loaded.left_behind()
        spare = weight - sum(x.nbytes for x in tensors([layers, left]))
        if spare > 0:  # KVzip cuts its replays off by a view
            notes.append(f"{spare:,} bytes more are alive behind views")
        if self.uncompressed:
            notes.append(f"only the first context is compressed, {self.uncompressed:,} later tokens are not")
        return {
            "seen": self.seen,
            "held": held,
            "full": self.seen * self.loaded.rows * self.copies,
            "kv_bytes": weight,
            "full_kv_bytes": self.seen * self.loaded.rows * self.loaded.pair_bytes * self.copies,
            "kept": kept,
            "note": "; ".join(notes),
        }

    def _feed(self, ids: list[int]) -> int:
        positions = self._advance(len(ids))
        out = self.model(
            input_ids=self._tensor(ids), past_key_values=self.cache, position_ids=positions, logits_to_keep=1
        )
        return int(out.logits[0, -1].argmax())

    def _next(self, out: Any) -> int:
        """Return what the model says after a reading of the decoder alone."""
        return int(self.model.get_output_embeddings()(out.last_hidden_state[:1, -1]).argmax())

    def _advance(self, count: int) -> Tensor:
        first, self.position, self.seen = self.position, self.position + count, self.seen + count
        return torch.arange(first, self.position, device=self.model.device)[None]

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids] * self.copies, device=self.model.device)

    def _moves_keys(self) -> bool:
        kvpress = self.loaded.kvpress
        rotated = isinstance(self.press, kvpress.FinchPress) and self.press.rerotate_keys
        return rotated or isinstance(self.press, kvpress.KeyRerotationPress | kvpress.RestoreKVPress)


@torch.no_grad()
def run(loaded: Loaded, request: dict[str, Any]) -> dict[str, Any]:
    """Hold one conversation and return what ``Outcome`` has."""
    job = request["job"]
    turns, stop = job["turns"], job["stop"]
    loaded.forget()
    press = loaded.press(request["press"], job["keep"], len(turns[0]["context"]))
    talk = Talk(loaded, press, job["copies"])
    replies: list[list[int]] = []
    facts: dict[str, Any] = {}
    for turn in turns:
        if replies:
            talk.read_more([x for x in replies[-1][-1:] if x not in stop] + turn["context"])
        else:
            talk.read_first(turn["context"])
        facts = talk.measured()
        replies.append(talk.reply(turn["question"], turn["max_new_tokens"], stop))
    loaded.forget()
    return facts | {
        "replies": replies,
        "peak_kv_bytes": talk.meter.peak_bytes,
        "prefill_s": talk.prefill_s,
        "evict_s": talk.evict_s,
        "decode_ms": 1e3 * talk.decode_s / talk.steps if talk.steps else None,
    }


@torch.no_grad()
def kept(loaded: Loaded, request: dict[str, Any]) -> list[list[list[int]]]:
    """Return the positions that stay, by layer and KV head: found by their keys, which must be as a plain reading's."""
    ids = request["ids"]
    loaded.forget()
    talk = Talk(loaded, loaded.press(request["press"], request["keep"], len(ids)))
    talk.read_first(ids)
    gone = [getattr(attention, "masked_key_indices", None) for attention in loaded.attentions]
    loaded.forget()
    plain = loaded.plain(ids, talk.press)
    found = []
    for i, masked in zip(loaded.layers, gone, strict=True):
        dead = set() if masked is None else set(zip(masked[1].tolist(), masked[2].tolist(), strict=True))
        pairs = zip(plain.layers[i].keys[0], talk.cache.layers[i].keys[0], strict=True)
        found.append([[at for at in match(a, b) if (head, at) not in dead] for head, (a, b) in enumerate(pairs)])
    return found


def match(all_keys: Tensor, some: Tensor) -> list[int]:
    """Return where each of some keys stands among all, ascending; each place is taken once."""
    places: dict[bytes, list[int]] = {}
    for at, key in enumerate(all_keys.float().cpu().numpy()):
        places.setdefault(key.tobytes(), []).insert(0, at)
    try:
        return sorted(places[key.tobytes()].pop() for key in some.float().cpu().numpy())
    except (KeyError, IndexError):
        raise Refused("the press changes keys, so kept positions cannot be read off them") from None


def serve() -> None:
    """Answer requests until stdin ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # prints of any library, native ones too, must not come between the answers
    sys.stdout = sys.stderr
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    loaded: Loaded | None = None
    while True:
        request = json.loads(lines.get())
        answer: dict[str, Any] = {"id": request["id"]}
        try:
            if request["op"] == "load":
                loaded = Loaded(request["folder"], request["device"], request["dtype"], request["threads"])
                answer["result"] = loaded.versions
            elif loaded is not None:
                answer["result"] = {"run": run, "kept": kept}[request["op"]](loaded, request)
        except Refused as refusal:
            answer["error"] = str(refusal)
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            answer["error"] = f"{type(error).__name__}: {error} ({os.path.basename(at.filename)}:{at.lineno})"
        out.write(json.dumps(answer) + "\n")
        out.flush()


def _listen(lines: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)  # the parent is gone or wants no more: nobody is left to read an answer


if __name__ == "__main__":
    serve()
