"""The output projection: norms of projected values, against the products written out and against the model itself."""

import pytest
import torch

from vestige import KVCache, ModelError, attach, policies
from vestige.models.compat import cache_argument
from vestige.models.layout import check
from vestige.models.output_projection import OutputProjection
from vestige.policies.base import NewPairs
from vestige.testing import full_layers, random_ids, tiny


def random(kv_heads: int = 2, group: int = 3, dtype: torch.dtype = torch.float32, size: int = 8):
    """Return a projection of ``kv_heads * group`` heads to 16 features, and values of two batch rows of five tokens."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(kv_heads * group, size, 16, generator=generator).to(dtype)
    return OutputProjection(weight), torch.randn(2, kv_heads, 5, size, generator=generator).to(dtype)


def projected(output: OutputProjection, values: torch.Tensor, b: int, kv_head: int, token: int, member: int):
    """Return one value after the projection of one query head, in float64."""
    group = len(output.weight) // values.shape[1]
    return values[b, kv_head, token].double() @ output.weight[kv_head * group + member].double()


@pytest.mark.parametrize(("kv_heads", "group"), [(2, 3), (1, 4), (4, 1)])
@pytest.mark.parametrize(("name", "order"), [("norms", 2), ("absolute_norms", 1)])
def test_norms_are_those_of_the_products_written_out(name, order, kv_heads, group):
    output, values = random(kv_heads, group)
    norms = getattr(output, name)(values)
    assert norms.shape == (2, kv_heads, 5, group) and norms.dtype == torch.float32
    for b, kv_head, token, member in torch.cartesian_prod(*map(torch.arange, norms.shape)).tolist():
        expected = torch.linalg.vector_norm(projected(output, values, b, kv_head, token, member), ord=order)
        torch.testing.assert_close(norms[b, kv_head, token, member].double(), expected, atol=1e-5, rtol=1e-5)


def test_norms_worked_out_by_hand():
    output = OutputProjection(torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[3.0, 0.0], [0.0, 0.0]]]))
    values = torch.tensor([3.0, -4.0]).view(1, 1, 1, 2)
    assert output.norms(values).flatten().tolist() == [5.0, 9.0]
    assert output.absolute_norms(values).flatten().tolist() == [7.0, 9.0]


def test_the_gram_form_of_half_precision_weights_is_computed_in_float32():
    output, values = random(dtype=torch.bfloat16)
    assert output.gram.dtype == torch.float32
    exact = torch.stack([w.double() @ w.double().T for w in output.weight])
    torch.testing.assert_close(output.gram.double(), exact, atol=1e-5, rtol=1e-5)
    for name in ("norms", "absolute_norms"):
        norms = getattr(output, name)(values)
        assert norms.dtype == torch.float32
        wide = getattr(OutputProjection(output.weight.float()), name)(values.float())
        torch.testing.assert_close(norms, wide, atol=0.05, rtol=0.02)


def test_a_value_that_is_projected_to_nothing_weighs_0_and_is_never_nan():
    weight = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    weight[:, 1:] = weight[:, :1]  # values whose coordinates add up to 0 are projected to 0
    values = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(2)) * 1e3
    values -= values.mean(-1, keepdim=True)
    norms = OutputProjection(weight).norms(values)
    assert norms.isfinite().all() and (norms >= 0).all() and norms.max() < 10  # of 1e3


def test_norms_take_no_gradient_along():
    output, values = random()
    weight = output.weight.clone().requires_grad_()
    norms = OutputProjection(weight).norms(values.requires_grad_())
    assert not norms.requires_grad and not OutputProjection(weight).absolute_norms(values).requires_grad


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt_oss", "phi3", "gemma4"])
def test_heads_together_project_as_the_models_own_module(name):
    model = tiny(name)
    anatomy = check(model)
    for layer in full_layers(model):
        output, module = anatomy.output(layer), anatomy.attentions[layer]
        heads, value_dim, hidden = output.weight.shape
        assert heads == model.config.num_attention_heads
        outputs = torch.randn(5, heads, value_dim, generator=torch.Generator().manual_seed(layer))
        together = sum(outputs[:, head] @ output.weight[head] for head in range(heads))
        with torch.no_grad():
            bias = 0 if module.o_proj.bias is None else module.o_proj.bias
            torch.testing.assert_close(together, module.o_proj(outputs.flatten(1)) - bias, atol=1e-5, rtol=1e-5)
        assert together.shape == (5, hidden)


def test_a_layers_projection_is_made_once_and_anew_when_its_weights_change():
    model = tiny("llama")
    first = check(model).output(1)
    assert check(model).output(1) is first and check(model).output(0) is not first
    before = first.gram.clone()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(10)
    again = check(model).output(1)
    assert again is not first
    torch.testing.assert_close(again.gram, 100 * before)


def test_a_model_whose_projection_is_packed_is_refused_before_anything_is_read():
    model = tiny("llama")
    model.model.layers[2].self_attn.o_proj = torch.nn.Identity()
    with pytest.raises(ModelError, match=r"output projection of LlamaAttention was not found or is packed .*o_proj"):
        KVCache(model, policies.LaProx(budget=None))
    KVCache(model, policies.SnapKV(budget=None))


def test_what_is_written_is_shown_with_the_projection_of_its_own_layer():
    shown: list[NewPairs] = []

    class Notes(policies.LaProx):
        def annotate(self, written):
            shown.append(written)
            return super().annotate(written)

    model = tiny("llama")
    cache = KVCache(model, Notes(budget=None))
    with torch.no_grad(), attach(model):
        model(random_ids(model, 2, 7), **cache_argument(cache))
    assert [written.layer_idx for written in shown] == [0, 1, 2]
    for written in shown:
        assert written.output is cache.layout.output(written.layer_idx) and written.hidden is None
        norms = written.output.norms(written.values).half()  # (batch, kv_heads, new, queries_per_kv)
        layer = next(x for x in cache.evictable if x.layer_idx == written.layer_idx)
        assert torch.equal(layer.view("output_norms"), norms)
