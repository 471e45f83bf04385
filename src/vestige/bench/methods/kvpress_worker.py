"""Runs kvpress in an environment of its own: one JSON request a line on stdin, one JSON answer a line on stdout.

The script stands alone: kvpress 0.5.5 needs transformers up to 5.3, vestige a newer one, so it imports nothing of
vestige. Started by :mod:`vestige.bench.methods.peers.process`; it ends when stdin does, even in the middle of a job.

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
    """A request cannot be done; the text has the reason."""


class Loaded:
    """A model with kvpress, and its attention modules."""

    def __init__(self, folder: str, device: str, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        transformers: Any = importlib.import_module("transformers")
        transformers.logging.disable_progress_bar()
        self.kvpress: Any = importlib.import_module("kvpress")  # patches the attention functions
        network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model: Any = network.to(device).eval()
        self.new_cache: Any = transformers.DynamicCache
        config = network.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        self.layers = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        inner = network.model.language_model if hasattr(network.model, "language_model") else network.model
        self.attentions = [inner.layers[i].self_attn for i in self.layers]
        self.heads = config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.pair_bytes = 2 * head_dim * network.dtype.itemsize
        self.last_plain: tuple[Any, Any] | None = None
        self.known = [set(vars(attention)) for attention in self.attentions]
        versions = {name: importlib.import_module("importlib.metadata").version(name) for name in ("kvpress", "torch")}
        self.versions = versions | {"transformers": transformers.__version__}

    @property
    def rows(self) -> int:
        """KV heads over the layers that keep everything."""
        return len(self.layers) * int(self.heads)

    def make_press(self, call: dict[str, Any], keep: int | None, length: int) -> Any:
        """Return a press with its compression ratio set for a context of ``length`` tokens."""
        press = self._build(call)
        if not hasattr(type(press), "compression_ratio"):
            raise Refused(f"{call['name']} has no compression_ratio of its own, so no budget can be set")
        pruned = (self.kvpress.KVzipPress, self.kvpress.FastKVzipPress)
        ratio = find_ratio(keep, length, self.rows, counts_pruned=isinstance(press, pruned))
        try:
            press.compression_ratio = ratio
        except (AttributeError, NotImplementedError, AssertionError) as error:
            raise Refused(f"{call['name']}: {error}") from None
        return press

    def _build(self, value: Any) -> Any:
        """Return the press of a call, whose arguments may be calls too."""
        if isinstance(value, list):
            return [self._build(item) for item in value]
        if not isinstance(value, dict):
            return value
        made = getattr(self.kvpress, value["name"], None)
        if not (isinstance(made, type) and issubclass(made, self.kvpress.BasePress)):
            known = sorted(name for name in vars(self.kvpress) if name.endswith("Press"))
            raise Refused(f"kvpress {self.versions['kvpress']} has no {value['name']}; it has {', '.join(known)}")
        arguments = [self._build(argument) for argument in value["args"]]
        return made(*arguments, **{name: self._build(option) for name, option in value["options"].items()})

    def read_plain(self, ids: list[int], press: Any) -> Any:
        """Return the cache of a reading without a press; the last one is remembered."""
        with self.use_attention_of(press):  # another attention rounds differently
            key = (tuple(ids), self.model.config.get_text_config()._attn_implementation)
            if self.last_plain is None or self.last_plain[0] != key:
                cache = self.new_cache()
                self.model.model(input_ids=torch.tensor([ids], device=self.model.device), past_key_values=cache)
                self.last_plain = key, cache
        return self.last_plain[1]

    @contextmanager
    def use_attention_of(self, press: Any) -> Iterator[None]:
        """Let the attention return its weights inside the context, if the press reads them."""
        config = self.model.config.get_text_config()
        before = config._attn_implementation
        if needs_weights(press, self.kvpress.ObservedAttentionPress):
            config._attn_implementation = "eager"
        try:
            yield
        finally:
            config._attn_implementation = before

    def clear_modules(self) -> None:
        """Remove the attributes that an earlier press left on the attention modules."""
        for attention, known in zip(self.attentions, self.known, strict=True):
            for name in set(vars(attention)) - known:
                delattr(attention, name)

    def find_leftovers(self) -> list[Any]:
        """Return the attributes that a press left on the attention modules, such as indices of masked keys."""
        pairs = zip(self.attentions, self.known, strict=True)
        return [value for attention, known in pairs for name, value in vars(attention).items() if name not in known]

    def find_masked(self) -> list[Any]:
        """Return the indices of the stored pairs that attention may not read, by layer; None if there are none."""
        return [getattr(attention, "masked_key_indices", None) for attention in self.attentions]


def find_ratio(keep: int | None, length: int, rows: int, *, counts_pruned: bool) -> float:
    """Return the compression ratio by which a press keeps ``keep`` of ``length`` pairs per row on average, exactly.

    Presses keep ``int(length * (1 - ratio))`` pairs or round; some count over all rows at once, and KVzip and its kin
    drop ``int(rows * length * ratio)``. A margin of a quarter of a pair over all rows is safe from rounding.
    """
    if keep is None or keep >= length:
        return 0.0
    margin = 0.25 / rows
    return 1 - (keep + (-margin if counts_pruned else margin)) / length


def needs_weights(press: Any, kind: type) -> bool:
    """Return whether a press, or one inside it, is of a kind."""
    inner = [x for value in vars(press).values() for x in (value if isinstance(value, list) else [value])]
    return isinstance(press, kind) or any(needs_weights(x, kind) for x in inner if hasattr(x, "post_init_from_model"))


def storage_bytes(held: Any) -> int:
    """Return the bytes of all storages below an object, each once and whole, as ``bench.metrics.byte_meter`` does."""
    storages = {
        (str(x.device), x.untyped_storage().data_ptr()): x.untyped_storage().nbytes() for x in iterate_tensors(held)
    }
    return sum(storages.values())


def iterate_tensors(held: Any) -> Iterator[Tensor]:
    """Yield the tensors in a cache layer, a list or a dictionary, at any depth."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        for value in held.values():
            yield from iterate_tensors(value)
    elif isinstance(held, list | tuple):
        for value in held:
            yield from iterate_tensors(value)
    elif hasattr(held, "is_sliding") and hasattr(held, "update"):  # a layer of a cache
        yield from iterate_tensors(vars(held))


class Meter:
    """Measures the bytes of the cache and the time of the press during a reading."""

    def __init__(self, loaded: Loaded, cache: Any) -> None:
        self.loaded, self.cache = loaded, cache
        self.peak_bytes = 0
        self.hooks_s = self.overhead_s = 0.0

    def measure(self, others: Any = None) -> int:
        """Return the live bytes and update the peak."""
        layers = [self.cache.layers[i] for i in self.loaded.layers if i < len(self.cache.layers)]
        size = storage_bytes([layers, self.loaded.find_leftovers(), others])
        self.peak_bytes = max(self.peak_bytes, size)
        return size

    @contextmanager
    def watch(self, press: Any) -> Iterator[None]:
        """Measure after each layer's update and each hook of the press, and time the hooks."""
        update, hook = self.cache.update, press.forward_hook

        def measured_update(*args: Any, **kwargs: Any) -> Any:
            returned = update(*args, **kwargs)
            self._measure_untimed(None)
            return returned

        def timed_hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            layer = self.cache.layers[module.layer_idx]
            before, started = (layer.keys, layer.values), self.now()
            out = hook(module, args, kwargs, output)
            self.hooks_s += self.now() - started
            self._measure_untimed(before)  # both copies are alive
            return out

        self.cache.update, press.forward_hook = measured_update, timed_hook
        try:
            yield
        finally:
            del self.cache.update, press.forward_hook

    def now(self) -> float:
        """Return the time in seconds after the device's work, without the time of the measuring."""
        device = self.loaded.model.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - self.overhead_s

    def _measure_untimed(self, others: Any) -> None:
        started = time.perf_counter()
        self.measure(others)
        self.overhead_s += time.perf_counter() - started


class Conversation:
    """One conversation, like kvpress's own pipeline: compress the context, then feed the rest without the press.

    Positions continue from the length of the context, not of the compressed cache, unless the press moves keys.
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
        with self.loaded.use_attention_of(self.press), self.meter.watch(self.press), self.press(self.model):
            begun, hooked = self.meter.now(), self.meter.hooks_s
            out = self.model.model(input_ids=self._tensor(ids), past_key_values=self.cache)
            plain = self.meter.now() - begun - (self.meter.hooks_s - hooked)
        spent = self.meter.now() - started
        self.prefill_s, self.evict_s = self.prefill_s + spent, self.evict_s + max(spent - plain, 0.0)
        self.token = self._pick_next(out)
        self.seen = len(ids)
        kvpress, press = self.loaded.kvpress, self.press
        moves = isinstance(press, kvpress.KeyRerotationPress | kvpress.RestoreKVPress) or (
            isinstance(press, kvpress.FinchPress) and press.rerotate_keys
        )
        self.position = self.cache.get_seq_length() if moves else len(ids)

    def read_more(self, ids: list[int]) -> None:
        """Read a later context; a press does not change a cache that is not empty."""
        if not ids:
            return
        started = self.meter.now()
        positions = self._advance(len(ids))
        out = self.model.model(input_ids=self._tensor(ids), past_key_values=self.cache, position_ids=positions)
        self.token = self._pick_next(out)
        self.prefill_s += self.meter.now() - started
        self.uncompressed += len(ids)
        self.meter.measure()

    def reply(self, question: list[int], limit: int, stop: list[int]) -> list[int]:
        """Read the question, if it was not read with the context, and answer greedily."""
        if question:
            self.token = self._feed(question)
        tokens, started = [self.token], self.meter.now()
        while len(tokens) < limit and tokens[-1] not in stop:
            tokens.append(self._feed(tokens[-1:]))
        self.decode_s, self.steps = self.decode_s + self.meter.now() - started, self.steps + len(tokens) - 1
        return tokens

    def measure(self) -> dict[str, Any]:
        """Return the sizes of the cache, and a note."""
        layers = [self.cache.layers[i] for i in self.loaded.layers if i < len(self.cache.layers)]
        kept = [[layer.keys.shape[2]] * self.loaded.heads * self.copies for layer in layers]
        held = sum(map(sum, kept))
        masked = sum(len(found[0]) for found in self.loaded.find_masked() if found is not None)
        notes = [f"kvpress {self.loaded.versions['kvpress']}"]
        if masked:
            notes.append(f"{masked:,} of {held:,} pairs masked, none freed")
        size, leftovers = self.meter.measure(), self.loaded.find_leftovers()
        hidden = size - sum(tensor.nbytes for tensor in iterate_tensors([layers, leftovers]))
        if hidden > 0:  # KVzip cuts its replays off by a view
            notes.append(f"{hidden:,} bytes more are alive behind views")
        if self.uncompressed:
            notes.append(f"only the first context is compressed, {self.uncompressed:,} later tokens are not")
        return {
            "seen": self.seen,
            "held": held,
            "full": self.seen * self.loaded.rows * self.copies,
            "kv_bytes": size,
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

    def _pick_next(self, out: Any) -> int:
        """Return the next token after a forward of the decoder alone."""
        return int(self.model.get_output_embeddings()(out.last_hidden_state[:1, -1]).argmax())

    def _advance(self, count: int) -> Tensor:
        first, self.position, self.seen = self.position, self.position + count, self.seen + count
        return torch.arange(first, self.position, device=self.model.device)[None]

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids] * self.copies, device=self.model.device)


@torch.no_grad()
def run(loaded: Loaded, request: dict[str, Any]) -> dict[str, Any]:
    """Run one conversation and return the fields of ``Outcome``."""
    job = request["job"]
    turns, stop = job["turns"], job["stop"]
    loaded.clear_modules()
    press = loaded.make_press(request["press"], job["keep"], len(turns[0]["context"]))
    conversation = Conversation(loaded, press, job["copies"])
    replies: list[list[int]] = []
    facts: dict[str, Any] = {}
    for turn in turns:
        if replies:
            conversation.read_more([token for token in replies[-1][-1:] if token not in stop] + turn["context"])
        else:
            conversation.read_first(turn["context"])
        facts = conversation.measure()
        replies.append(conversation.reply(turn["question"], turn["max_new_tokens"], stop))
    loaded.clear_modules()
    return facts | {
        "replies": replies,
        "peak_kv_bytes": conversation.meter.peak_bytes,
        "prefill_s": conversation.prefill_s,
        "evict_s": conversation.evict_s,
        "decode_ms": 1e3 * conversation.decode_s / conversation.steps if conversation.steps else None,
    }


@torch.no_grad()
def find_kept(loaded: Loaded, request: dict[str, Any]) -> list[list[list[int]]]:
    """Return the positions that stay, by layer and KV head, found by their keys, which must equal a plain reading's."""
    ids = request["ids"]
    loaded.clear_modules()
    conversation = Conversation(loaded, loaded.make_press(request["press"], request["keep"], len(ids)))
    conversation.read_first(ids)
    masks = loaded.find_masked()
    loaded.clear_modules()
    plain = loaded.read_plain(ids, conversation.press)
    found = []
    for i, masked in zip(loaded.layers, masks, strict=True):
        dead = set() if masked is None else set(zip(masked[1].tolist(), masked[2].tolist(), strict=True))
        pairs = zip(plain.layers[i].keys[0], conversation.cache.layers[i].keys[0], strict=True)
        found.append([[at for at in match_keys(a, b) if (head, at) not in dead] for head, (a, b) in enumerate(pairs)])
    return found


def match_keys(all_keys: Tensor, some: Tensor) -> list[int]:
    """Return the places of some keys among all keys, ascending; each place is used once."""
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
    os.dup2(2, 1)  # prints of libraries, native ones too, must not mix with the answers
    sys.stdout = sys.stderr
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(lines,), daemon=True).start()
    loaded: Loaded | None = None
    while True:
        request = json.loads(lines.get())
        answer: dict[str, Any] = {"id": request["id"]}
        try:
            if request["op"] == "load":
                loaded = Loaded(request["folder"], request["device"], request["dtype"], request["threads"])
                answer["result"] = loaded.versions
            elif loaded is not None:
                answer["result"] = {"run": run, "kept": find_kept}[request["op"]](loaded, request)
        except Refused as refusal:
            answer["error"] = str(refusal)
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            answer["error"] = f"{type(error).__name__}: {error} ({os.path.basename(at.filename)}:{at.lineno})"
        out.write(json.dumps(answer) + "\n")
        out.flush()


def _read_requests(lines: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)  # the parent has ended or closed the pipe: no one reads an answer


if __name__ == "__main__":
    serve()
