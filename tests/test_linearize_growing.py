"""A layer that grows in place is `DynamicLayer` in every respect but the copies it makes."""

import copy
import io
import pickle

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from linearize.cache import NearFarLayer, install_layers
from linearize.growing import LEAST_ROOM, GrowingLayer, growing_cache, install_growing
from tests.tiny_models import make_config, make_model, make_student, make_tokens


def _reset(layer):
    layer.reset()
    if layer.get_seq_length():  # transformers 5.17 keeps zeros
        layer.__init__()


MOVES = {
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([0, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([0])),
    "crop": lambda layer: layer.crop(-3),
    "crop all": lambda layer: layer.crop(-99),
    "crop nothing": lambda layer: layer.crop(0),
    "offload": lambda layer: layer.offload(),
    "reset": lambda layer: _reset(layer),
    "nothing": lambda layer: None,
}


def piece(tokens, rows=2, seed=0, **changes):
    torch.manual_seed(seed)
    return torch.randn(rows, 3, tokens, 4, **changes), torch.randn(rows, 3, tokens, 5, **changes)


def assert_alike(ours, theirs):
    assert ours.get_seq_length() == theirs.get_seq_length()
    for mine, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert torch.equal(mine, other)
            assert (mine.dtype, mine.requires_grad) == (other.dtype, other.requires_grad)


@pytest.mark.parametrize("second", MOVES)
@pytest.mark.parametrize("first", MOVES)
@torch.no_grad()
def test_every_move(first, second):
    ours, theirs = GrowingLayer(), DynamicLayer()
    seed = 0
    for move in (first, second, "nothing"):
        rows = 2 if not ours.get_seq_length() else ours.keys.shape[0]
        for tokens in (9, 1, 1, LEAST_ROOM, 1):
            seed += 1
            found = [layer.update(*piece(tokens, rows, seed)) for layer in (ours, theirs)]
            assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
        for layer in (ours, theirs):
            MOVES[move](layer)
        assert_alike(ours, theirs)


class TestRoom:
    @torch.no_grad()
    def test_few_copies(self, monkeypatch):
        """A token is written where it stays; room is made for an eighth of the length, and never less than 64."""
        lengths, move = [], GrowingLayer._move
        monkeypatch.setattr(
            GrowingLayer, "_move", staticmethod(lambda x, new, held: lengths.append(held) or move(x, new, held))
        )
        layer = GrowingLayer()
        layer.update(*piece(800))
        for _ in range(1000):
            layer.update(*piece(1))
        assert layer.keys.shape[2] == 1800
        assert lengths == [n for n in (0, 900, 1013, 1140, 1283, 1444, 1625) for _ in range(2)]
        small = GrowingLayer()
        small.update(*piece(1))
        assert [x.shape[2] for x in small._room] == [65, 65]

    @torch.no_grad()
    def test_what_is_cropped_makes_room(self):
        layer = GrowingLayer()
        layer.update(*piece(100))
        layer.update(*piece(5))
        place = layer.keys.data_ptr()
        for _ in range(30):
            layer.crop(-3)
            layer.update(*piece(3))
        assert layer.keys.data_ptr() == place
        assert layer.keys.shape[2] == 105

    @torch.no_grad()
    def test_what_was_handed_out_stays(self):
        layer = GrowingLayer()
        keys, values = layer.update(*piece(9))
        before = keys.clone(), values.clone()
        for _ in range(100):
            layer.update(*piece(1, seed=1))
        assert torch.equal(keys, before[0])
        assert torch.equal(values, before[1])

    @torch.no_grad()
    def test_copies_are_apart(self):
        for make in (copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))):
            layer = GrowingLayer()
            layer.update(*piece(9))
            layer.update(*piece(1))
            other = make(layer)
            assert_alike(other, layer)
            before = layer.keys.clone()
            for _ in range(2):
                other.update(*piece(1, seed=7))
            other.crop(-4)
            other.update(*piece(4, seed=8))
            assert torch.equal(layer.keys, before)
            assert len(pickle.dumps(layer)) < 6000  # ten tokens, not the room

    @pytest.mark.parametrize("heads", [1, 3])
    @torch.no_grad()
    def test_a_copy_does_not_follow(self, heads):
        """Nor where what is held lies in one piece, as of one row and head."""
        for make in (copy.deepcopy, copy.copy):
            layer = GrowingLayer()
            layer.update(*(x[:1, :heads] for x in piece(9)))
            other, before = make(layer), layer.keys.clone()
            layer.crop(-4)
            layer.update(*(x[:1, :heads] for x in piece(4, seed=8)))
            assert torch.equal(other.keys, before)
            file = io.BytesIO()
            torch.save(other.keys, file)
            assert file.tell() < 4000

    @torch.no_grad()
    def test_rows_that_move_leave_no_room_behind(self):
        for move in ("reorder", "repeat", "select", "offload", "reset"):
            layer = GrowingLayer()
            layer.update(*piece(9))
            MOVES[move](layer)
            assert layer._room is None

    def test_out_of_inference_mode(self):
        layer, like = GrowingLayer(), DynamicLayer()
        with torch.inference_mode():
            for each in (layer, like):
                each.update(*piece(9))
                each.update(*piece(1, seed=1))
        with torch.no_grad():
            for each in (layer, like):
                each.crop(-2)
                each.update(*piece(3, seed=2))
        assert_alike(layer, like)

    def test_gradients(self):
        """As from `DynamicLayer`, also into earlier pieces; nothing that a graph holds is written to."""
        found = []
        for layer in (GrowingLayer(), DynamicLayer()):
            with torch.no_grad():
                layer.update(*piece(9))
            pieces = [piece(n, seed=n, requires_grad=True) for n in (3, 2)]
            loss = torch.zeros(())
            for k, v in pieces:
                keys, values = layer.update(k, v)
                loss = loss + (keys @ torch.ones(4)).exp().sum() + values.square().sum()
            with torch.no_grad():
                layer.crop(-4)
                layer.update(*piece(4, seed=9))
            loss.backward()
            found.append([x.grad for pair in pieces for x in pair])
            assert layer.keys.shape[2] == 14
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))

    @pytest.mark.parametrize("cropped", [0, 2, 9])
    @pytest.mark.parametrize(
        "changes",
        [{"rows": 3}, {"rows": 1}, {"dtype": torch.float64}, {"device": "meta"}],
        ids=["rows", "a row", "dtype", "device"],
    )
    @torch.no_grad()
    def test_what_does_not_fit(self, changes, cropped):
        """Is refused or promoted as `torch.cat` does, also where nothing is left."""
        found = []
        for layer in (GrowingLayer(), DynamicLayer()):
            layer.update(*piece(9))
            layer.crop(-cropped)
            try:
                keys, _ = layer.update(*piece(1, **changes))
                found.append((keys.dtype, keys.shape))
            except RuntimeError as error:
                found.append(str(error))
        assert found[0] == found[1]


class TestInstalled:
    def test_where_nothing_is_yet(self):
        cache = DynamicCache()
        install_layers(cache, [1])
        assert [type(x) for x in cache.layers] == [GrowingLayer, NearFarLayer]
        cache.update(*piece(1), 2)
        assert type(cache.layers[2]) is GrowingLayer

    def test_what_is_there_stays(self):
        cache = DynamicCache()
        cache.update(*piece(5), 0)
        install_growing(cache)
        assert type(cache.layers[0]) is DynamicLayer

    def test_sliding_layers_and_offloaded_caches_stay(self):
        config = make_config("gemma2")
        cache = growing_cache(config)
        kinds = [type(x).__name__ for x in cache.layers]
        assert kinds == ["DynamicSlidingWindowLayer", "GrowingLayer", "GrowingLayer"]
        cache = DynamicCache(config=make_config("llama"), offloading=True)
        install_growing(cache)
        assert {type(x) for x in cache.layers} == {DynamicLayer}

    @torch.no_grad()
    def test_generate(self):
        """The model's own caches have them, and say the same: also a cache that grows beside an original."""
        student, tokens = make_student("llama", "gate", softmax_layers=[1]), make_tokens(2, 50)
        out = student.generate(tokens, max_new_tokens=90, do_sample=False, return_dict_in_generate=True)
        assert type(out.past_key_values.layers[1]) is GrowingLayer
        whole = student(out.sequences[:, :-1], use_cache=False).logits[:, 49:].argmax(-1)
        assert torch.equal(whole, out.sequences[:, 50:])
        model = make_model("llama")
        options = {"max_new_tokens": 90, "do_sample": False}
        cache = growing_cache(model.config)
        assert torch.equal(model.generate(tokens, past_key_values=cache, **options), model.generate(tokens, **options))
        assert type(cache.layers[0]) is GrowingLayer
