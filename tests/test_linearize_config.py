"""The conversion's config: round trip, its registry, and every message."""

import json

import pytest

from linearize.config import MIXERS, LinearizeConfig
from linearize.errors import LinearizeError
from linearize.kernels.near_far import MIXERS as MIXER_CLASSES

CONFIGS = [
    LinearizeConfig(),
    LinearizeConfig(mixer="none", window=1, sinks=0),
    LinearizeConfig(mix="gate", softmax_layers="every:4", feature_dim=32),
    LinearizeConfig(softmax_layers=[3, 1, 1]),
    LinearizeConfig(mixer="gla", mix="gate", mix_input="fixed", mix_start=-0.5),
    LinearizeConfig(mix="peak", mix_input="head", mix_start=2.5, feature_scale=1.0),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_json_round_trip(config):
    assert LinearizeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_what_older_versions_saved():
    old = {"mixer": "hedgehog", "window": 8, "sinks": 2, "mix": "gate", "softmax_layers": [1], "feature_dim": None}
    config = LinearizeConfig.from_dict(old)
    assert (config.mix_input, config.mix_start, config.feature_scale) == ("query", 0.0, None)


def test_every_mixer_name_has_its_class():
    assert tuple(MIXER_CLASSES) == MIXERS


def test_kept_layers():
    assert LinearizeConfig().kept_layers(8) == ()
    assert LinearizeConfig(softmax_layers="every:4").kept_layers(10) == (3, 7)
    assert LinearizeConfig(softmax_layers=[5, 0]).kept_layers(6) == (0, 5)
    assert LinearizeConfig(softmax_layers=[]).softmax_layers == "none"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixer": "hedgehogs"}, "mixer: 'hedgehogs' is unknown; did you mean 'hedgehog'?"),
        ({"mixer": "rwkv"}, "mixer: 'rwkv' is unknown; known: none, hedgehog, gla"),
        (
            {"mixer": "gla"},
            "mix: 'normalizer' weighs the far side by its mass, and mixer 'gla' has none",
        ),
        ({"mixer": "gla", "mix": "gate", "feature_dim": 8}, "feature_dim: 8 is for a learned feature map, and mixer"),
        (
            {"mixer": "gla", "mix": "gate", "feature_scale": 1},
            "feature_scale: 1 is for a learned feature map, and mixer",
        ),
        ({"mix_input": "heads"}, "mix_input: 'heads' is unknown; did you mean 'head'?"),
        ({"mix_start": float("inf")}, "mix_start: inf is not a finite number; 0 weighs both sides alike"),
        ({"feature_scale": "1"}, "feature_scale: '1' is not a finite number; leave it out"),
        ({"mix": "gates"}, "mix: 'gates' is unknown; did you mean 'gate'?"),
        ({"window": 0, "mixer": "none"}, "window: 0 is not an integer >= 1; the smallest window is 1 token"),
        ({"window": 2.0}, "window: 2.0 is not an integer >= 1"),
        ({"sinks": -1}, "sinks: -1 is not an integer >= 0; use 0 for no sinks"),
        ({"sinks": True}, "sinks: True is not an integer >= 0"),
        ({"feature_dim": 0}, "feature_dim: 0 is not an integer >= 1; leave it out"),
        ({"softmax_layers": "every:0"}, "softmax_layers: 'every:0' is not understood; use 'none', 'every:4'"),
        ({"softmax_layers": [1, "2"]}, "softmax_layers: [1, '2'] is not understood"),
        ({"windows": 64}, "windows: unknown setting of a conversion; did you mean 'window'?"),
    ],
)
def test_messages(settings, message):
    with pytest.raises(LinearizeError) as error:
        LinearizeConfig.from_dict(settings)
    assert str(error.value).startswith(message)


def test_layer_outside_the_model():
    with pytest.raises(
        LinearizeError, match="layer 6 is out of range, the model has layers 0 to 5; name layers inside"
    ):
        LinearizeConfig(softmax_layers=[6]).kept_layers(6)
