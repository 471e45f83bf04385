"""The reference kernel against the formula in float64, written out row by row, query by query.

Two yardsticks: our error against float64 may not exceed that of the formula in the same dtype, plus a rounding band.
Slack holds NaN throughout, so a slot that should not be read shows.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from vestige.kernels import AttentionScale, fused, reference
from vestige.kernels.merge import PartialAttention, merge
from vestige.kernels.weighted import attend_weighted

HEAD_DIM, VALUE_DIM = 8, 6
UNEVEN = [9, 13, 8, 10]
EVEN = [11] * 4


@dataclass(frozen=True)
class Case:
    """What one call of the kernel gets."""

    query: Tensor
    keys: Tensor
    values: Tensor
    starts: list[int]
    lengths: list[int]
    scale: AttentionScale

    def attend(self) -> Tensor:
        return reference.attend(self.query, self.keys, self.values, self.starts, self.lengths, self.scale)

    def to(self, dtype: torch.dtype) -> "Case":
        sinks = None if self.scale.sinks is None else self.scale.sinks.to(dtype)
        tensors = (self.query.to(dtype), self.keys.to(dtype), self.values.to(dtype))
        return Case(*tensors, self.starts, self.lengths, replace(self.scale, sinks=sinks))


def case(
    lengths: list[int],
    new: int,
    *,
    batch: int = 2,
    queries_per_kv: int = 3,
    slack: tuple[int, ...] = (2, 2, 2, 2),
    softcap: float | None = None,
    sinks: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Return random queries and rows in a buffer that begins with a hole and has ``growth_slots`` behind each row."""
    generator = torch.Generator().manual_seed(seed)
    heads = len(lengths) // batch * queries_per_kv
    starts, end = [], 3
    for n, free in zip(lengths, slack, strict=False):
        starts.append(end)
        end += n + free
    keys, values = torch.full((end, HEAD_DIM), math.nan), torch.full((end, VALUE_DIM), math.nan)
    for start, n in zip(starts, lengths, strict=True):
        keys[start : start + n] = torch.randn(n, HEAD_DIM, generator=generator)
        values[start : start + n] = torch.randn(n, VALUE_DIM, generator=generator)
    query = torch.randn(batch, heads, new, HEAD_DIM, generator=generator)
    logits = torch.randn(heads, generator=generator) if sinks else None
    scale = AttentionScale(0.4, softcap, logits)
    return Case(query, keys, values, starts, lengths, scale).to(dtype)


def formula(given: Case) -> Tensor:
    """Return the attention by its definition, one query at a time, in the dtype given."""
    batch, heads, new, _ = given.query.shape
    kv_heads = len(given.lengths) // batch
    out = given.query.new_empty(batch, heads, new, given.values.shape[1])
    for b in range(batch):
        for h in range(heads):
            row = b * kv_heads + h // (heads // kv_heads)
            start, held = given.starts[row], given.lengths[row]
            for t in range(new):
                visible = slice(start, start + held - new + t + 1)
                logits = given.keys[visible] @ given.query[b, h, t] * given.scale.scaling
                if given.scale.softcap is not None:
                    logits = given.scale.softcap * (logits / given.scale.softcap).tanh()
                if given.scale.sinks is not None:
                    logits = torch.cat([logits, given.scale.sinks[h : h + 1]])
                weights = logits.softmax(0)[: held - new + t + 1]
                out[b, h, t] = weights @ given.values[visible]
    return out


def assert_as_good_as_the_formula(given: Case) -> None:
    out, exact = given.attend(), formula(given.to(torch.float64))
    assert out.dtype == given.query.dtype
    assert out.shape == exact.shape
    naive_error = (formula(given).double() - exact).abs().max()
    band = 2 * torch.finfo(out.dtype).eps * exact.abs().max()
    assert (out.double() - exact).abs().max() <= naive_error + band


LAYOUTS = {
    "uneven": {"lengths": UNEVEN},
    "even": {"lengths": EVEN},
    "unevenly spaced": {"lengths": EVEN, "slack": (0, 3, 1, 2)},
    "even without slack": {"lengths": EVEN, "slack": (0, 0, 0, 0)},
}
EXTRAS = {"plain": {}, "softcap": {"softcap": 1.5}, "sinks": {"sinks": True}, "both": {"softcap": 1.5, "sinks": True}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("new", [1, 5, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_is_as_good_as_the_formula(monkeypatch, layout, new, extra, dtype):
    monkeypatch.setattr(reference, "QUERY_BLOCK", 3)
    assert_as_good_as_the_formula(case(new=new, dtype=dtype, **LAYOUTS[layout], **EXTRAS[extra]))


@pytest.mark.parametrize("queries_per_kv", [1, 2, 4])
@pytest.mark.parametrize("lengths", [UNEVEN, EVEN], ids=["uneven", "even"])
@pytest.mark.parametrize("new", [1, 4])
def test_each_query_head_reads_the_kv_head_of_its_group(new, lengths, queries_per_kv):
    assert_as_good_as_the_formula(case(lengths, new, queries_per_kv=queries_per_kv))


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("new", [1, 4])
def test_rows_belong_to_batch_rows_in_turn(new, batch):
    assert_as_good_as_the_formula(case(UNEVEN, new, batch=batch))
    assert_as_good_as_the_formula(case(EVEN, new, batch=batch))


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("new", [1, 4])
def test_one_row_alone_is_attended_to(new, extra):
    assert_as_good_as_the_formula(case([7], new, batch=1, **EXTRAS[extra]))


@pytest.mark.parametrize("new", [1, 5])
def test_rows_that_hold_the_new_pairs_only_are_causal(new):
    assert_as_good_as_the_formula(case([new] * 4, new))
    assert_as_good_as_the_formula(case([new, new + 1, new, new], new))


@pytest.mark.parametrize("block", [1, 2, 3, 7, 8, 9, 256])
@pytest.mark.parametrize("lengths", [UNEVEN, EVEN], ids=["uneven", "even"])
def test_the_size_of_query_blocks_does_not_matter(monkeypatch, lengths, block):
    given = case(lengths, 8)
    whole = given.attend()
    monkeypatch.setattr(reference, "QUERY_BLOCK", block)
    torch.testing.assert_close(given.attend(), whole, atol=1e-6, rtol=1e-5)


def test_a_piece_longer_than_the_default_block_is_attended_to_in_blocks():
    assert_as_good_as_the_formula(case([300, 270], 260, batch=1, queries_per_kv=1))


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("new", [1, 5])
def test_even_rows_give_the_same_wherever_they_lie(new, extra):
    given = case(EVEN, new, **EXTRAS[extra])
    scattered = case(EVEN, new, slack=(5, 0, 3, 1), **EXTRAS[extra])  # the same numbers: slack draws none
    torch.testing.assert_close(given.attend(), scattered.attend(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("lengths", [UNEVEN, EVEN], ids=["uneven", "even"])
@pytest.mark.parametrize("new", [1, 5])
def test_a_buffer_may_be_a_part_of_a_larger_one(new, lengths):
    given = case(lengths, new)
    larger = [torch.cat([torch.full((7, x.shape[1]), math.nan), x])[7:] for x in (given.keys, given.values)]
    assert larger[0].storage_offset() > 0
    moved = replace(given, keys=larger[0], values=larger[1])
    assert torch.equal(moved.attend(), given.attend())


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("new", [1, 5])
def test_slack_never_leaks(new, layout, extra):
    given = case(new=new, **LAYOUTS[layout], **EXTRAS[extra])
    filled = replace(given, keys=given.keys.nan_to_num(1e4), values=given.values.nan_to_num(1e4))
    assert torch.equal(given.attend(), filled.attend())
    assert not given.attend().isnan().any()


@pytest.mark.parametrize("new", [1, 5])
def test_a_batch_row_alone_gives_what_it_gives_in_a_batch(new):
    given, one = case(UNEVEN, new), slice(1, 2)
    alone = replace(given, query=given.query[one], starts=given.starts[2:], lengths=given.lengths[2:])
    torch.testing.assert_close(alone.attend()[0], given.attend()[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("lengths", [UNEVEN, EVEN], ids=["uneven", "even"])
def test_what_is_attended_to_is_not_changed(lengths, extra):
    given = case(lengths, 5, **EXTRAS[extra])
    before = [x.clone() for x in (given.query, given.keys, given.values)]
    given.attend()
    for now, then in zip((given.query, given.keys, given.values), before, strict=True):
        torch.testing.assert_close(now, then, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("lengths", [UNEVEN, EVEN], ids=["uneven", "even"])
@pytest.mark.parametrize("new", [1, 5])
def test_gradients_reach_queries_keys_and_values_as_through_the_formula(new, lengths, extra):
    given = case(lengths, new, dtype=torch.float64, **EXTRAS[extra])
    given = replace(given, keys=given.keys.nan_to_num(), values=given.values.nan_to_num())
    leaves = [x.requires_grad_() for x in (given.query, given.keys, given.values)]
    with torch.enable_grad():
        ours, expected = (torch.autograd.grad(f(given).square().sum(), leaves) for f in (Case.attend, formula))
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=5e-6, rtol=1e-4)  # softmax is float32, as eager has it


# With the log of what the pairs weigh.


def formula_lse(given: Case) -> Tensor:
    """Return the log of the sum that attention divides by, one query at a time, in float64."""
    given = given.to(torch.float64)
    batch, heads, new, _ = given.query.shape
    kv_heads = len(given.lengths) // batch
    lse = given.query.new_empty(batch, heads, new)
    for b in range(batch):
        for h in range(heads):
            row = b * kv_heads + h // (heads // kv_heads)
            start, held = given.starts[row], given.lengths[row]
            for t in range(new):
                visible = slice(start, start + held - new + t + 1)
                logits = given.scale.capped(given.keys[visible] @ given.query[b, h, t] * given.scale.scaling)
                if given.scale.sinks is not None:
                    logits = torch.cat([logits, given.scale.sinks[h : h + 1]])
                lse[b, h, t] = logits.logsumexp(0)
    return lse


def partially(given: Case) -> PartialAttention:
    return reference.attend_partially(
        given.query, given.keys, given.values, given.starts, given.lengths, given.scale
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("new", [1, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_with_its_mass_is_exact_whatever_the_dtype(monkeypatch, layout, new, extra, dtype):
    monkeypatch.setattr(reference, "QUERY_BLOCK", 3)
    given = case(new=new, dtype=dtype, **LAYOUTS[layout], **EXTRAS[extra])
    got, exact = partially(given), formula(given.to(torch.float64))
    assert got.output.dtype == got.lse.dtype == torch.float32
    torch.testing.assert_close(got.output.double(), exact, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(got.lse.double(), formula_lse(given), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("extra", ["plain", "sinks"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_by_the_fused_kernel_is_the_one_that_is_written_out(monkeypatch, layout, extra, dtype):
    given = case(new=1, dtype=dtype, **LAYOUTS[layout], **EXTRAS[extra])
    given = replace(given, values=given.keys.flip(1))  # as wide as the keys
    calls, kernel = [], fused.KERNEL
    assert kernel is not None, "this torch has it"
    monkeypatch.setattr(fused, "KERNEL", lambda *args, **options: calls.append(1) or kernel(*args, **options))
    quick = partially(given)
    assert calls and quick.output.dtype == quick.lse.dtype == torch.float32
    monkeypatch.setattr(fused, "KERNEL", None)
    written = partially(given)
    rounding = 1e-6 if dtype == torch.float32 else 2**-8  # what is read comes back in the dtype of the pairs
    torch.testing.assert_close(quick.output, written.output, atol=rounding, rtol=rounding)
    coarse = dtype == torch.bfloat16 and torch.backends.cpu.get_cpu_capability() != "AVX512"
    weighing = 1e-4 if coarse else 1e-5  # without AVX-512 the kernel's bfloat16 path is off by 3e-5
    torch.testing.assert_close(quick.lse, written.lse, atol=weighing, rtol=weighing)


@pytest.mark.parametrize("lengths", [UNEVEN, EVEN], ids=["uneven", "even"])
def test_a_step_that_asks_for_gradients_or_caps_its_logits_is_written_out(monkeypatch, lengths):
    monkeypatch.setattr(fused, "KERNEL", lambda *args, **options: pytest.fail("fused"))
    capped = case(lengths, 1, softcap=1.5)
    partially(replace(capped, values=capped.keys))
    plain = case(lengths, 1)
    with torch.enable_grad():
        partially(replace(plain, values=plain.keys, query=plain.query.requires_grad_()))


@pytest.mark.parametrize("written", [False, True], ids=["fused", "written out"])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_pair_that_stands_for_several_is_read_as_if_they_were_all_there(monkeypatch, softcap, written):
    if written:
        monkeypatch.setattr(fused, "KERNEL", None)
    queries, keys, values = (torch.randn(2, n, 8) for n in (3, 4, 4))
    counts = torch.tensor([3, 1, 2, 1])
    scale = AttentionScale(0.4, softcap=softcap)
    got = attend_weighted(queries, keys, values, counts.log().expand(2, -1), scale)
    several_keys, several_values = (x.repeat_interleave(counts, 1) for x in (keys, values))
    logits = scale.capped(queries @ several_keys.mT * 0.4)
    torch.testing.assert_close(got.output, logits.softmax(-1) @ several_values)
    torch.testing.assert_close(got.lse, logits.logsumexp(-1))


def test_pairs_that_stand_for_nothing_weigh_nothing_and_carry_gradients():
    queries, keys, values = (torch.randn(1, n, 8) for n in (2, 3, 3))
    nothing = torch.full((1, 3), -1e30)
    assert (attend_weighted(queries, keys, values, nothing, AttentionScale(0.4)).lse < -1e29).all()
    with torch.enable_grad():
        log_mass = torch.zeros(1, 3, requires_grad=True)
        attend_weighted(queries, keys, values, log_mass, AttentionScale(0.4)).lse.sum().backward()
    torch.testing.assert_close(log_mass.grad, (queries @ keys.mT * 0.4).softmax(-1).sum(1))


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("lengths", [UNEVEN, EVEN], ids=["uneven", "even"])
@pytest.mark.parametrize("new", [1, 5])
def test_gradients_of_attention_with_its_mass_are_those_of_the_formula(new, lengths, extra):
    given = case(lengths, new, dtype=torch.float64, **EXTRAS[extra])
    query = given.query.requires_grad_()
    with torch.enable_grad():
        got = partially(given)
        ours = torch.autograd.grad(got.output.square().sum() + got.lse.sum(), query)[0]
        theirs = torch.autograd.grad(formula(given).square().sum() + formula_lse(given).sum(), query)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("extra", EXTRAS)
def test_two_parts_of_the_pairs_merged_are_attention_over_all_with_the_sink_counted_once(extra):
    given = case(EVEN, 1, slack=(0, 0, 0, 0), **EXTRAS[extra])
    early, late = 6, EVEN[0] - 6
    first = replace(given, lengths=[early] * 4, scale=replace(given.scale, sinks=None))
    second = replace(given, starts=[start + early for start in given.starts], lengths=[late] * 4)
    merged = merge(partially(second), partially(first))
    torch.testing.assert_close(merged, formula(given.to(torch.float64)).float(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("new", "held", "expected"),
    [
        (1, 3, [[1, 1, 1]]),
        (3, 3, [[1, 0, 0], [1, 1, 0], [1, 1, 1]]),
        (2, 4, [[1, 1, 1, 0], [1, 1, 1, 1]]),
    ],
)
def test_the_lower_right_mask_shows_all_to_the_last_query(new, held, expected):
    mask = reference.lower_right(new, held, torch.device("cpu"))
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == expected


def dense(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, 4, 3, HEAD_DIM), (1, 2, 5, HEAD_DIM), (1, 2, 5, VALUE_DIM))
    query, keys, values = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, keys, values


@pytest.mark.parametrize("scale", [AttentionScale(0.4, 1.5), AttentionScale(0.4, None, torch.arange(4.0))])
def test_an_additive_mask_hides_what_a_boolean_one_hides(scale):
    query, keys, values = dense()
    mask = reference.lower_right(3, 5, query.device)
    additive = torch.zeros(3, 5).masked_fill(~mask, torch.finfo(torch.float32).min)
    boolean = reference.written_out(query, keys, values, mask, scale)
    torch.testing.assert_close(reference.written_out(query, keys, values, additive, scale), boolean)


def test_no_mask_shows_every_pair():
    query, keys, values = dense()
    everything = torch.ones(3, 5, dtype=torch.bool)
    scale = AttentionScale(0.4, 1.5)
    out = reference.written_out(query, keys, values, None, scale)
    assert torch.equal(out, reference.written_out(query, keys, values, everything, scale))


def test_a_query_that_sees_nothing_reads_a_number():
    query, keys, values = dense()
    nothing = torch.zeros(3, 5, dtype=torch.bool)
    for scale in (AttentionScale(0.4), AttentionScale(0.4, 1.5), AttentionScale(0.4, None, torch.zeros(4))):
        assert reference.written_out(query, keys, values, nothing, scale).isfinite().all()


def test_the_scale_of_a_group_has_the_sinks_of_its_query_heads():
    scale = AttentionScale(0.5, 2.0, torch.arange(6.0))
    groups = [scale.of_group(kv_head, 3) for kv_head in range(3)]
    assert [group.sinks.tolist() for group in groups] == [[0, 1], [2, 3], [4, 5]]
    assert {(group.scaling, group.softcap) for group in groups} == {(0.5, 2.0)}
    plain = AttentionScale(0.5)
    assert plain.of_group(1, 3) == plain
