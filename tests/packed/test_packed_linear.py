"""The packed linear as a module: shared tokens, number types, copies, compile, and what it refuses."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from lbllm_kernels import cpu, dispatch, ops, reference  # noqa: F401  (ops registers the operator)
from lbllm_kernels.activation import ActFactors
from lbllm_kernels.format import FormatError
from lbllm_kernels.synthetic import random_packed

from lbllm_core.model.packed import ActSite, PackedLinear, PackedScheme, packed_linears
from lbllm_core.model.packed_folder import load_packed, pack_student

SCHEME = PackedScheme(group_size=32, level_mode="codebook", codebook_size=256, act_bits=4, act_variant="piecewise", kv_bits=16)
needs_build = pytest.mark.skipif(not cpu.library().levels, reason=cpu.library().reason)


def make_linear(site=None, out=40, columns=96, seed=0, bias=False, variant="piecewise"):
    site = site or ActSite(variant, 1)
    linear = PackedLinear(columns, out, SCHEME, site, bias)
    packed = random_packed(out, columns, 32, "codebook", seed)
    for name in ("codes", "row_scale", "group_codes", "codebook"):
        getattr(linear, name).copy_(getattr(packed, name))
    if bias:
        linear.bias.copy_(torch.randn(out, generator=torch.Generator().manual_seed(9)))
    return linear


def expected(linear, x):
    return reference.linear(x, linear.packed(), linear.site.prepare())


@pytest.mark.parametrize("variant", ["piecewise", "uniform", "none"])
@pytest.mark.parametrize("path", ["", "reference"])
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 40])
def test_forward_is_the_reference(variant, path, tokens, monkeypatch):
    monkeypatch.setenv(dispatch.PATH_VARIABLE, path)
    linear = make_linear(bias=True, variant=variant)
    x = torch.randn(tokens, 1, 96)
    assert torch.equal(linear(x), expected(linear, x))
    if path:
        assert linear.prepared.choice == dispatch.Choice("reference", "LBLLM_KERNEL_PATH=reference")


@pytest.fixture
def counted(monkeypatch):
    calls = []
    original = dispatch.quantize
    monkeypatch.setattr(dispatch, "quantize", lambda *a: calls.append(1) or original(*a))
    return calls


def test_a_site_quantizes_once_for_all_readers(counted):
    site = ActSite("piecewise", 3)
    readers = [make_linear(site, seed=s) for s in range(3)]
    x = torch.randn(9, 96)
    results = [r(x) for r in readers]
    assert len(counted) == 1
    assert site._memo is None
    assert all(torch.equal(y, expected(r, x)) for y, r in zip(results, readers, strict=True))


def test_the_memory_is_not_fooled(counted):
    """An in-place change, another tensor, and a new tensor at a freed address are all quantized anew."""
    site = ActSite("uniform", 3)
    linear = make_linear(site)
    x = torch.randn(9, 96)
    linear(x)
    x.mul_(-1)
    assert torch.equal(linear(x), expected(linear, x))
    other = torch.randn(9, 96)
    assert torch.equal(linear(other), expected(linear, other))
    for _ in range(4):
        fresh = torch.randn(9, 96)
        assert torch.equal(linear(fresh), expected(linear, fresh))
        del fresh
        gc.collect()
    assert len(counted) == 7


def test_inference_tensors_are_never_remembered(counted):
    """They have no version counter, so a change in place could not be seen."""
    site = ActSite("uniform", 2)
    linear = make_linear(site)
    with torch.inference_mode():
        x = torch.randn(9, 96)
        linear(x)
        x.mul_(-1)
        assert torch.equal(linear(x), expected(linear, x))
    assert len(counted) == 2


def test_the_memory_does_not_keep_tensors_alive():
    site = ActSite("uniform", 3)
    linear = make_linear(site)
    x = torch.randn(9, 96)
    linear(x)
    del x
    gc.collect()
    assert site._memo.source() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_number_types(dtype):
    linear = make_linear(bias=True)
    x = torch.randn(5, 96)
    before = linear.row_scale.clone()
    linear = linear.to(dtype)
    assert linear.row_scale.dtype == linear.bias.dtype == torch.float32
    assert torch.equal(linear.row_scale, before)
    y = linear(x.to(dtype))
    assert y.dtype == dtype
    assert torch.equal(y, reference.linear(x.to(dtype), linear.packed(), linear.site.prepare()).to(dtype))


def test_default_types_and_devices_do_not_matter():
    linear, x = make_linear(), torch.randn(40, 96)
    plain = [linear(x), linear(x[:2])]
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert torch.equal(linear(x), plain[0])
            assert torch.equal(linear(x[:2]), plain[1])
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("tokens", [2, 40])
def test_strided_input(tokens):
    linear = make_linear()
    wide = torch.randn(tokens, 192)
    assert torch.equal(linear(wide[:, ::2]), linear(wide[:, ::2].contiguous()))


def test_changed_weights_are_seen():
    linear, other = make_linear(), make_linear(seed=5)
    x = torch.randn(2, 96)
    linear(x)
    linear.load_state_dict(other.state_dict())
    assert torch.equal(linear(x), other(x))


def test_copies_are_independent():
    linear = make_linear()
    x = torch.randn(2, 96)
    y = linear(x)
    twin = copy.deepcopy(linear)
    linear.codes.zero_()
    assert torch.equal(twin(x), y)


def test_gradients_are_refused():
    x = torch.randn(2, 96, requires_grad=True)
    with pytest.raises(RuntimeError, match="no_grad"):
        make_linear()(x)
    with torch.no_grad():
        assert not make_linear()(x).requires_grad


def test_bad_input_is_refused():
    linear = make_linear()
    with pytest.raises(ValueError, match="takes 96"):
        linear(torch.zeros(2, 95))
    with pytest.raises((ValueError, RuntimeError)):
        linear(torch.zeros(2, 96, dtype=torch.int64))
    assert linear(torch.zeros(0, 96)).shape == (0, 40)
    assert linear(torch.zeros(2, 0, 96)).shape == (2, 0, 40)


def test_broken_weights_are_refused_by_name():
    linear = make_linear()
    linear.codebook.fill_(0x80)
    with pytest.raises(FormatError, match=r"model\.q\.codebook"):
        linear.prepare("model.q")


@pytest.mark.parametrize("path", ["cpu", "reference"])
@pytest.mark.parametrize("biased", [False, True])
def test_the_operator_is_sound(path, biased, monkeypatch):
    if path == "cpu" and not cpu.library().levels:
        pytest.skip(cpu.library().reason)
    if path == "reference":
        monkeypatch.setenv(dispatch.PATH_VARIABLE, path)
    prepared = dispatch.prepare(random_packed(20, 64, 32, "codebook"), "piecewise", torch.randn(20) if biased else None)
    route = prepared.routes[0]
    arguments = (torch.randn(3, 64), list(route.weight.layout), route.path.name, 20, 32, "piecewise", [1.0, 1.0, 0.25, 0.25])
    torch.library.opcheck(torch.ops.lbllm.lut8_linear, arguments)
    assert torch.equal(torch.ops.lbllm.lut8_linear(*arguments), dispatch.linear(arguments[0], prepared, ActFactors("piecewise")))


@needs_build
def test_the_operator_checks_its_layout():
    weight = cpu.CpuWeight(random_packed(20, 64, 32))
    layout = [weight.codes, weight.words, None, None, weight.row_scale, weight.row_sums, None]
    for position, bad in ((0, weight.codes[:1]), (1, weight.words.long()), (4, weight.row_scale[:3]), (5, None)):
        broken = [*layout]
        broken[position] = bad
        with pytest.raises(ValueError, match="must be a contiguous CPU tensor"):
            cpu.CpuWeight.from_layout(64, 20, 32, *broken)
    with pytest.raises(ValueError, match="either words"):
        cpu.CpuWeight.from_layout(64, 20, 32, layout[0], None, *layout[2:])


@needs_build
def test_a_whole_model_compiles_without_breaks(scheme, make_teacher, make_student, tmp_path):
    teacher = make_teacher()
    pack_student(teacher, make_student(teacher, scheme), tmp_path, scheme)
    model = load_packed(tmp_path)
    ids = torch.arange(1, 21)[None]
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")(ids, use_cache=False).logits
    assert torch.equal(plain, compiled)


def test_every_linear_names_its_path_and_reason(scheme, make_teacher, make_student, tmp_path):
    teacher = make_teacher()
    pack_student(teacher, make_student(teacher, scheme), tmp_path, scheme)
    for _, linear in packed_linears(load_packed(tmp_path)):
        assert linear.prepared.choice.reason


@needs_build
def test_stored_tensors_are_given_up_and_come_back():
    linear = make_linear(bias=True)
    before = {name: t.clone() for name, t in linear.state_dict().items()}
    x = torch.randn(2, 96)
    y = linear(x)
    assert "codes" not in dict(linear.named_buffers())
    held = [linear, copy.deepcopy(linear)]
    for module in held:
        after = module.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert torch.equal(module.codes, before["codes"])
        assert torch.equal(module.to("cpu")(x), y)
    with pytest.raises(AttributeError):
        _ = linear.nothing


@needs_build
def test_few_tokens_of_a_site_are_one_call(monkeypatch):
    calls = []
    original = cpu.Fused.__call__
    monkeypatch.setattr(cpu.Fused, "__call__", lambda self, x: calls.append(len(self._weights)) or original(self, x))
    site = ActSite("piecewise", 3)
    readers = [make_linear(site, out=40 + s, seed=s) for s in range(3)]
    for _ in range(2):
        x = torch.randn(2, 96)
        ys = [reader(x) for reader in readers]
        assert site._memo is None
        assert all(torch.equal(y, reference.linear(x, reader.packed(), site.values)) for y, reader in zip(ys, readers, strict=True))
    assert calls == [3, 3]
    y = readers[1](x)
    x.mul_(-1)
    assert torch.equal(readers[2](x), expected(readers[2], x))
    assert not torch.equal(readers[1](x), y)
    with torch.inference_mode():
        z = torch.randn(2, 96)
        assert torch.equal(readers[0](z), expected(readers[0], z))
        z.mul_(-1)
        assert torch.equal(readers[1](z), expected(readers[1], z))


@needs_build
def test_waiting_outputs_do_not_outlive_their_weights():
    site = ActSite("uniform", 2)
    first, second = make_linear(site, seed=1), make_linear(site, seed=2)
    x = torch.randn(2, 96)
    first(x)
    second.load_state_dict(make_linear(seed=7).state_dict())
    assert torch.equal(second(x), expected(second, x))
    first(x)
    site.factors.mul_(0.5)
    site.prepare()
    for linear in (first, second):
        linear.prepare()
    assert torch.equal(second(x), expected(second, x))


@needs_build
def test_a_copied_site_computes_with_the_copied_weights():
    block = torch.nn.ModuleDict({"site": (site := ActSite("piecewise", 2)), "a": make_linear(site, seed=1), "b": make_linear(site, seed=2)})
    x = torch.randn(2, 96)
    before = [block["a"](x), block["b"](x)]
    twin = copy.deepcopy(block)
    assert twin["a"].site is twin["site"] is twin["b"].site
    block["b"].load_state_dict(make_linear(seed=9).state_dict())
    assert torch.equal(twin["a"](x), before[0])
    assert torch.equal(twin["b"](x), before[1])
    del block
    assert torch.equal(twin["b"](x), before[1])


def test_a_path_that_cannot_be_had_is_a_sentence(monkeypatch):
    from lbllm_core.errors import ModelError

    monkeypatch.setenv(dispatch.PATH_VARIABLE, "nosuch")
    with pytest.raises(ModelError, match="nosuch names no path"):
        make_linear()(torch.randn(2, 96))
