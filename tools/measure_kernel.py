"""Time the choices that kernels/loop.py made, on this machine: `.venv/bin/python tools/measure_kernel.py`.

1. A step of one token over rows of equal length: one call for all rows, or one call per row.
2. The same over rows that differ by at most 10 %: one call per row, or one call over a padded copy with a mask.
3. A chunk of 1,024 tokens after an eviction: blocks of how many queries.

Shapes are SmolLM2's (9 query heads, 3 KV heads of 64, bf16), each call on another of 30 layers so that no cache level
flatters it. Arms alternate; medians in microseconds.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from vestige.kernels import AttentionScale, reference
from vestige.kernels.packed import cumulative

KV_HEADS, GROUP, HEAD_DIM, LAYERS, SLACK = 3, 3, 64, 30, 64
SCALE = AttentionScale(HEAD_DIM**-0.5)


def buffers(lengths: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor], list[int]]:
    """Return keys and values of 30 layers with these rows, and where the rows begin."""
    starts = cumulative([length + SLACK for length in lengths])
    keys, values = ([torch.randn(starts[-1], HEAD_DIM).bfloat16() for _ in range(LAYERS)] for _ in "kv")
    return keys, values, starts[:-1]


def medians(arms: dict[str, Callable[[int], object]], repeats: int) -> dict[str, float]:
    """Return each arm's median time, arms alternating."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 3):
        for name, arm in arms.items():
            started = time.perf_counter()
            for layer in range(LAYERS):
                arm(layer)
            if repeat >= 3:
                times[name].append((time.perf_counter() - started) / LAYERS * 1e6)
    return {name: round(statistics.median(taken), 1) for name, taken in times.items()}


def _one_call(query, keys, values, starts, lengths, layer):
    return reference.attend(query, keys[layer], values[layer], starts, lengths, SCALE)


def _per_row(query, keys, values, starts, lengths, layer):
    """Attend with one call per row, whatever their lengths."""
    out = []
    for head, group in enumerate(query.chunk(KV_HEADS, dim=1)):
        pairs = slice(starts[head], starts[head] + lengths[head])
        row = keys[layer][pairs][None, None], values[layer][pairs][None, None]
        out.append(reference._attend_rows(group, *row, SCALE))
    return torch.cat(out, 1)


def _padded(query, keys, values, starts, lengths, layer):
    """Attend with one call over a padded copy, dead slots masked."""
    longest = max(lengths)
    k, v = (
        torch.stack([pad(x[s : s + n], (0, 0, 0, longest - n)) for s, n in zip(starts, lengths, strict=True)])[None]
        for x in (keys[layer], values[layer])
    )
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None, None]
    packed = query.reshape(1, KV_HEADS, GROUP, HEAD_DIM)
    return scaled_dot_product_attention(packed, k, v, mask[None], scale=SCALE.scaling)


def _blocks(block, query, keys, values, starts, lengths, layer):
    reference.QUERY_BLOCK = block
    return reference.attend(query, keys[layer], values[layer], starts, lengths, SCALE)


def main() -> None:
    """Print the three tables."""
    step = torch.randn(1, KV_HEADS * GROUP, 1, HEAD_DIM).bfloat16()
    for length in (100, 410, 1600):
        even, uneven = [length] * KV_HEADS, [length, int(0.95 * length), int(0.9 * length)]
        k, v, s = buffers(even)
        ku, vu, su = buffers(uneven)
        arms = {
            "equal rows, one call": partial(_one_call, step, k, v, s, even),
            "equal rows, call per row": partial(_per_row, step, k, v, s, even),
            "10 % apart, call per row": partial(_one_call, step, ku, vu, su, uneven),  # no view joins them
            "10 % apart, padded": partial(_padded, step, ku, vu, su, uneven),
        }
        print(f"one token, {length} pairs:", medians(arms, 40))
    for held in (410, 1600):
        lengths = [held + 1024] * KV_HEADS
        k, v, s = buffers(lengths)
        chunk = torch.randn(1, KV_HEADS * GROUP, 1024, HEAD_DIM).bfloat16()

        sizes = (64, 128, 256, 512, 1024)
        arms = {f"blocks of {size}": partial(_blocks, size, chunk, k, v, s, lengths) for size in sizes}
        print(f"1,024 tokens behind {held} pairs:", medians(arms, 3))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
