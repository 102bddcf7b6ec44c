"""Projections of few rows on a CPU: the same products, on models of every kind, and nothing else is touched."""

import copy
import pickle
import time

import pytest
import torch
from torch import nn

from linearize import convert, projections, revert
from linearize.config import LinearizeConfig
from linearize.projections import CLEARLY, MOST_ROWS, FewRows, fast_projections, install, obstacle, remove
from tests.tiny_models import make_model, make_student
from tests.tolerance import assert_near

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="PyTorch was built without MKL")


class Quantized(nn.Parameter):
    """A weight that only `linear` can read, as those of quantization libraries are."""

    def view(self, *shape):
        raise NotImplementedError


def make_linear(size: int = 24, outputs: int = 40, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, outputs, bias=bias))
    install(model)
    return model


@pytest.fixture
def products(monkeypatch):
    """How often the batched form ran."""
    seen: list[tuple[int, ...]] = []
    before = torch.bmm

    def counted(a, b):
        seen.append(tuple(b.shape))
        return before(a, b)

    monkeypatch.setattr(torch, "bmm", counted)
    return seen


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3,), (2, 2), (MOST_ROWS, 1), (1, 1, 2)])
def test_few_rows_are_the_same_product(products, shape, bias):
    model = make_linear(bias=bias)
    x = torch.randn(*shape, 24)
    for given in (x, x.expand(*shape, 24), torch.randn(*shape, 48)[..., ::2]):
        with torch.no_grad():
            out = model(given)
        assert_near(out, nn.functional.linear(given, model[0].weight, model[0].bias).detach())
    assert len(products) == 3


@pytest.mark.parametrize("outputs", [7, 34])
def test_outputs_that_do_not_divide(products, outputs):
    model, x = make_linear(outputs=outputs), torch.randn(1, 24)
    with torch.no_grad():
        assert_near(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))
    assert len(products) == (outputs % 2 == 0)


def test_everything_else_is_left_to_pytorch(products):
    model = make_linear()
    one, many = torch.randn(1, 24), torch.randn(MOST_ROWS + 1, 24)
    model(one).sum().backward()
    assert model[0].weight.grad is not None
    with torch.no_grad():
        model(many)
        assert model(one[:0]).shape == (0, 40)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(one).dtype == torch.bfloat16
        copy.deepcopy(model).to(torch.float64)(one.double())
        copy.deepcopy(model).to(torch.bfloat16)(one.bfloat16())
        copy.deepcopy(model).to("meta")(one.to("meta"))
        for changed in (Quantized, lambda weight: nn.Parameter(weight.t().contiguous().t())):
            other = copy.deepcopy(model)
            other[0].weight = changed(other[0].weight.detach())
            assert_near(other(one), model(one))
        products.clear()
        remove(model)
        model(one)
    assert products == []


def test_copies_and_pickles_have_their_own_weights(products):
    model, x = make_linear(), torch.randn(1, 24)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other[0].weight.zero_()
            other[0].bias.zero_()
            assert not other(x).any()
            assert model(x).any()
    assert len(products) == 4


TIMED_PRODUCTS = projections.product_ms  # before conftest.py answers for it


@pytest.mark.parametrize("slow", ["bmm", "linear"])
def test_the_faster_product_is_taken(monkeypatch, slow):
    """By timing both for real, one of them made slow."""
    owner = torch if slow == "bmm" else nn.functional
    plain = getattr(owner, slow)
    monkeypatch.setattr(owner, slow, lambda *args: (time.sleep(0.001), plain(*args))[1])
    TIMED_PRODUCTS.cache_clear()
    monkeypatch.setattr(projections, "product_ms", TIMED_PRODUCTS)
    before = torch.get_rng_state()
    assert (obstacle() is None) == (slow == "linear")
    assert (torch.get_rng_state() == before).all()  # weights made after it are what they were without it
    monkeypatch.setattr(owner, slow, plain)
    assert (obstacle() is None) == (slow == "linear")  # asked once a process
    TIMED_PRODUCTS.cache_clear()


def test_products_are_timed_in_float32_on_the_cpu_whatever_surrounds_it(monkeypatch):
    plain, made = nn.functional.linear, []
    monkeypatch.setattr(nn.functional, "linear", lambda *args: (made.append(plain(*args)), made[-1])[1])
    TIMED_PRODUCTS.cache_clear()
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        TIMED_PRODUCTS(torch.get_num_threads())
    TIMED_PRODUCTS.cache_clear()
    assert {(x.device.type, x.dtype) for x in made} == {("cpu", torch.float32)}


@pytest.mark.parametrize(("linear", "slices", "taken"), [(3.0, 2.0, True), (CLEARLY, 1.0, False), (1.0, 2.0, False)])
def test_slices_have_to_be_clearly_faster(monkeypatch, products, linear, slices, taken):
    monkeypatch.setattr(projections, "product_ms", lambda threads: (linear, slices))
    model = make_model("llama")
    with fast_projections(model), torch.no_grad():
        assert any("forward" in x.__dict__ for x in model.modules()) == taken
    convert(model, LinearizeConfig(window=8, sinks=2))
    assert any(isinstance(x.__dict__.get("forward"), FewRows) for x in model.modules()) == taken
    assert (obstacle() is None) == taken
    if not taken:
        assert obstacle() == (
            f"the product by slices is not clearly faster on this CPU: {slices:.2f} ms, "
            f"PyTorch's linear {linear:.2f} ms"
        )


def test_without_mkl_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    monkeypatch.setattr(projections, "product_ms", lambda threads: pytest.fail("timed"))
    assert obstacle() == "PyTorch was built without MKL"


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_student_has_them_in_every_linear_layer_and_gives_them_back(products, family):
    model = make_model(family)
    tokens = torch.tensor([[5]])
    convert(model, LinearizeConfig(window=8, sinks=2, softmax_layers=[1]))
    linear = [x for x in model.modules() if type(x) is nn.Linear]
    assert all(isinstance(x.forward, FewRows) for x in linear)
    with torch.no_grad():
        fast = model(tokens).logits
        assert len(products) >= len(linear)
        products.clear()
        remove(model)
        assert_near(fast, model(tokens).logits)
        assert products == []
        install(model)
    revert(model)
    assert not any("forward" in x.__dict__ for x in model.modules())


def test_lora_goes_over_them(products):
    from peft import LoraConfig, get_peft_model

    student = make_student("llama", "normalizer")
    wrapped = get_peft_model(student, LoraConfig(r=2, target_modules=["q_proj", "down_proj"])).eval()
    tokens = torch.tensor([[5]])
    with torch.no_grad():
        before = wrapped(tokens).logits
        assert products
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.add_(0.1)
        changed = wrapped(tokens).logits
        assert (changed - before).abs().max() > 1e-3
        assert_near(wrapped.merge_and_unload()(tokens).logits, changed)


def test_a_wrong_width_is_pytorchs_error():
    model = nn.Sequential(nn.Linear(64, 32))
    install(model)
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(1, 32))


def test_a_replica_for_another_device_has_its_own_weight(products):
    """As `nn.DataParallel` makes them: a copy of the attributes, whose weights are then replaced."""
    model = make_linear()
    replica = model[0]._replicate_for_data_parallel()
    replica.weight, replica.bias = torch.zeros(40, 24), None
    with torch.no_grad():
        assert not replica(torch.randn(1, 24)).any()
    assert products == []


@pytest.mark.parametrize("first", ["hook", "install"])
def test_under_a_hook_of_accelerate(products, first):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model, x = nn.Sequential(nn.Linear(24, 40)), torch.randn(1, 24)
    expected = model(x).detach()
    if first == "hook":
        add_hook_to_module(model[0], ModelHook())
    install(model)
    if first == "install":
        add_hook_to_module(model[0], ModelHook())
    with torch.no_grad():
        assert_near(model(x), expected)
        assert len(products) == (first == "install")
        remove(model)
        products.clear()
        assert_near(model(x), expected)
        remove_hook_from_module(model[0])
        assert_near(model(x), expected)
    assert products == []
