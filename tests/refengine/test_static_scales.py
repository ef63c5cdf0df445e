"""Codes under scales that were given: what they stand for, where they end, and scales measured on tokens."""

from collections.abc import Mapping
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.calibration import calibrated
from refengine.codecs.onnxruntime import onnxruntime
from refengine.codecs.static import GREATEST_SCALE, LARGEST, LEAST_SCALE, Static
from refengine.codecs.static import given as with_scales
from refengine.config import Config
from refengine.errors import CacheError, InputError
from refengine.generate import generate, new_cache
from refengine.kvcache import KVCache
from refengine.model import forward
from refengine.quant import CALIBRATED, SCHEMES, scheme_for, scheme_named
from refengine.scheme import Scheme
from refengine.trace import Recorder
from tests.checkpoints import TINY
from tests.refengine.rewrites import Run, runs, weights_of

HEADS, HEAD_DIM, LAYERS = 2, 10, 3
CONFIG = Config.from_dict(TINY)
FLOAT32 = np.dtype(np.float32)
INTEGERS = ("int8", "int4")
every_kind = pytest.mark.parametrize("numbers", LARGEST)
every_kind_of_integer = pytest.mark.parametrize("numbers", INTEGERS)
scales = st.floats(LEAST_SCALE, GREATEST_SCALE, width=32)
ordinary = st.floats(2.0**-20, 2.0**13, width=32)
vectors = st.lists(st.floats(-600, 600, width=32), min_size=HEADS * HEAD_DIM, max_size=HEADS * HEAD_DIM)


def tensor(values: list[float]) -> np.ndarray:
    """One token's vectors."""
    return np.array(values, np.float32).reshape(1, HEADS, 1, HEAD_DIM)


@every_kind_of_integer
@given(values=vectors, scale=ordinary)
def test_an_integer_comes_back_within_half_a_step_or_is_the_nearest_end(numbers, values, scale) -> None:
    codec, largest = Static(numbers, ((scale,),)), LARGEST[numbers]
    x_BKTH = tensor(values) * np.float32(scale)
    decoded = codec.decode(codec.encode(x_BKTH), FLOAT32)
    nearest = np.clip(x_BKTH, -(largest + 1) * np.float32(scale), largest * np.float32(scale))
    assert np.abs(decoded - nearest).max() <= scale * (0.5 + 1e-4)


@given(values=vectors, scale=ordinary)
def test_a_float8_is_the_nearest_there_is_and_the_largest_beyond_its_range(values, scale) -> None:
    codec = Static("float8_e4m3fn", ((scale,),))
    x_BKTH = tensor(values)
    decoded = codec.decode(codec.encode(x_BKTH * np.float32(scale)), FLOAT32) / np.float32(scale)
    there_are = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    there_are = there_are[np.isfinite(there_are)]
    nearest = np.abs(x_BKTH[..., None] - there_are).min(axis=-1)
    np.testing.assert_allclose(np.abs(decoded - x_BKTH), nearest, rtol=1e-4, atol=1e-4)
    assert np.abs(decoded).max() <= 448 * (1 + 1e-6)


@every_kind
@given(code=st.integers(-448, 448), scale=scales)
def test_every_code_comes_back_under_every_scale_that_is_taken(numbers, code, scale) -> None:
    codec = Static(numbers, ((scale,),))
    arrays = codec.encode(np.full((1, HEADS, 1, HEAD_DIM), code, np.float32) * np.float32(scale))
    once = codec.decode(arrays, FLOAT32)
    assert np.isfinite(once).all()
    for again, array in zip(codec.encode(once), arrays, strict=True):
        np.testing.assert_array_equal(again, array)


@every_kind
def test_a_value_far_beyond_the_range_becomes_the_largest_code(numbers) -> None:
    codec = Static(numbers, ((1e-30,),))
    lowest = -448 if numbers == "float8_e4m3fn" else -LARGEST[numbers] - 1
    for value, code in ((3e38, LARGEST[numbers]), (-3e38, lowest), (1e300, LARGEST[numbers])):
        decoded = codec.decode(codec.encode(np.full((1, HEADS, 1, HEAD_DIM), value)), FLOAT32)
        np.testing.assert_allclose(decoded, np.float32(code) * np.float32(1e-30), rtol=1e-6)


@given(codes=st.lists(st.integers(-8, 7), min_size=HEADS * HEAD_DIM, max_size=HEADS * HEAD_DIM))
def test_nibbles_are_packed_as_onnx_runtime_packs_them(codes) -> None:
    codec = Static("int4", ((0.25,),))
    (packed,) = codec.encode(tensor([code / 4 for code in codes]))
    even, odd = codes[0::2], codes[1::2]
    assert packed.dtype == np.uint8
    assert packed.ravel().tolist() == [((e + 8) & 15) | ((o + 8) & 15) << 4 for e, o in zip(even, odd, strict=True)]


def test_a_scale_of_each_channel_belongs_to_its_head_and_its_layer() -> None:
    per_layer = [(1.0 + np.arange(HEADS * HEAD_DIM) + 100 * layer).reshape(1, HEADS, 1, HEAD_DIM) for layer in range(3)]
    scheme = onnxruntime(CONFIG, 8, per_layer, [1.0, 2.0, 3.0])
    for layer, scale_1K1H in enumerate(per_layer):
        keys, values = (side.codec.for_layer(layer) for side in (scheme.keys, scheme.values))
        codes = np.full((1, HEADS, 1, HEAD_DIM), 5, np.int8)
        np.testing.assert_array_equal(keys.decode((codes,), FLOAT32), 5 * scale_1K1H)
        np.testing.assert_array_equal(values.decode((codes,), FLOAT32), np.full(codes.shape, 5.0 * (layer + 1)))


@every_kind
@given(numbers_of_scales=st.sampled_from([1, HEADS * HEAD_DIM]), seed=st.integers(0, 99))
def test_products_with_codes_are_products_with_what_they_stand_for(numbers, numbers_of_scales, seed) -> None:
    random = np.random.default_rng(seed)
    codec = Static(numbers, (tuple(random.uniform(0.01, 0.1, numbers_of_scales)),))
    arrays = codec.encode(random.standard_normal((2, HEADS, 7, HEAD_DIM)))
    exact = codec.decode(arrays, np.dtype(np.float64))
    for dtype in (np.float32, np.float64):
        q_BKRH = random.standard_normal((2, HEADS, 3, HEAD_DIM)).astype(dtype)
        p_BKRT = random.random((2, HEADS, 3, 7)).astype(dtype)
        for found, expected in (
            (codec.scores(q_BKRH, arrays), q_BKRH @ exact.swapaxes(-1, -2)),
            (codec.weighted_sum(p_BKRT, arrays), p_BKRT @ exact),
        ):
            assert found.dtype == dtype
            np.testing.assert_allclose(found, expected, atol=1e-5)


@every_kind
@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, -np.inf, 1e-45, 1e38])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_scale_that_cannot_be_one_is_refused_with_its_layer(numbers, scale, layer) -> None:
    good = [1.0] * LAYERS
    bad = [*good[:layer], np.where(np.arange(HEADS * HEAD_DIM) == 7, scale, 1.0), *good[layer + 1 :]]
    for sides in ((bad, good), (good, bad)):
        with pytest.raises(InputError) as refused:
            with_scales(CONFIG, numbers, *sides)
        assert f"layer {layer}: expected" in str(refused.value)
        assert f"found {scale}" in str(refused.value)


@pytest.mark.parametrize(
    ("key_scales", "words"),
    [
        ([], "key scales: expected those of 3 layers, found 0; layer 0 has none"),
        ([1.0, 1.0], "key scales: expected those of 3 layers, found 2; layer 2 has none"),
        ([1.0] * 4, "key scales: expected those of 3 layers, found 4"),
        ([1.0, [], 1.0], "key scales of layer 1: expected one, or 20 for the 2 KV heads of 10 channels, found 0"),
        ([1.0, 1.0, [1.0] * 10], "key scales of layer 2: expected one, or 20"),
    ],
)
def test_missing_scales_are_refused_with_their_layer(key_scales, words) -> None:
    with pytest.raises(InputError) as refused:
        onnxruntime(CONFIG, 8, key_scales, [1.0] * LAYERS)
    assert words in str(refused.value)
    with pytest.raises(InputError, match="value scales"):
        onnxruntime(CONFIG, 8, [1.0] * LAYERS, key_scales)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_hidden_layers": 4}, "layer 3: expected some, found those of 3 layers"),
        ({"head_dim": 12}, "expected one a layer, or 24 for the 2 KV heads of 12 channels, found 20"),
    ],
)
def test_the_scales_of_another_model_are_refused(config, words) -> None:
    scheme = onnxruntime(CONFIG, 8, [np.ones((1, HEADS, 1, HEAD_DIM))] * LAYERS, [1.0] * LAYERS)
    with pytest.raises(InputError) as refused:
        KVCache(replace(CONFIG, **config), 1, scheme)
    assert words in str(refused.value)


def test_an_odd_head_is_refused_where_two_codes_share_a_byte() -> None:
    with pytest.raises(InputError, match=r"even head_dim .* found 7"):
        Static("int4", ((1.0,),)).empty(1, HEADS, 7)


@every_kind
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_refused(numbers, value) -> None:
    with pytest.raises(CacheError, match="finite"):
        Static(numbers, ((1.0,),)).encode(np.full((1, HEADS, 1, HEAD_DIM), value))


def tensors_of(run: Run) -> Mapping[str, np.ndarray]:
    """The keys and values of every layer, of the tokens that are there."""
    points = {f"layers.{i}.self_attn.{name}" for i in range(run.weights.config.num_hidden_layers) for name in SEEN}
    recorder = Recorder(frozenset(points))
    forward(run.weights, run.token_ids_BT, run.positions_BT, trace=recorder)
    return {name: array[run.positions_BT >= 0] for name, array in recorder.arrays.items()}


SEEN = ("k_rope", "v_proj")


def codecs_of(scheme: Scheme, layer: int) -> Mapping[str, Static]:
    """By trace point."""
    return {
        f"layers.{layer}.self_attn.{point}": side.codec.for_layer(layer)
        for point, side in zip(SEEN, (scheme.keys, scheme.values), strict=True)
    }


@pytest.mark.parametrize("name", CALIBRATED)
@given(run=runs())
@settings(max_examples=15)
def test_measured_scales_just_reach_the_tokens_that_were_seen(name: str, run: Run) -> None:
    scheme, seen = CALIBRATED[name](run.weights, run.token_ids_BT, run.positions_BT), tensors_of(run)
    for layer in range(run.weights.config.num_hidden_layers):
        for point, codec in codecs_of(scheme, layer).items():
            x_BKTH = seen[point].swapaxes(0, 1)[None]  # the tokens of all rows, in one
            error = np.abs(codec.decode(codec.encode(x_BKTH), np.dtype(np.float64)) - x_BKTH)
            scale = np.array(codec.scales[0])
            largest = np.abs(x_BKTH).max(axis=2)[0].ravel() if len(scale) > 1 else np.abs(x_BKTH).max()
            np.testing.assert_allclose(scale * LARGEST[codec.numbers], largest, rtol=1e-6)
            if codec.numbers in INTEGERS:
                step_K1H = scale.reshape(-1, 1, x_BKTH.shape[3]) if len(scale) > 1 else scale
                assert (error <= step_K1H * (0.5 + 1e-4)).all()
            else:
                assert (error <= np.maximum(np.abs(x_BKTH) / 16, scale * 2.0**-10) * (1 + 1e-4)).all()


def test_padding_is_not_measured() -> None:
    weights = weights_of()
    alone = calibrated(weights, np.array([[5, 6]]), np.array([[0, 1]]), numbers="int8")
    padded = calibrated(weights, np.array([[9, 5, 6]]), np.array([[-1, 0, 1]]), numbers="int8")
    for one, other in zip(alone.keys.codec.scales, padded.keys.codec.scales, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_a_channel_that_is_zero_throughout_gets_a_scale_of_one() -> None:
    weights = weights_of(attention_bias=False)
    for layer in weights.layers():
        layer.qkv_proj.weight_OI[-1] = 0
    scheme = calibrated(weights, np.array([[5, 6]]), np.array([[0, 1]]), numbers="int4", per_channel=True)
    assert [scales[-1] for scales in scheme.values.codec.scales] == [1.0] * LAYERS


@pytest.mark.parametrize("name", ["fp8", *CALIBRATED])
def test_a_model_runs_with_it_and_a_prefill_reads_what_is_stored(name: str) -> None:
    weights = weights_of()
    scheme = scheme_for(name, weights, [[1, 2, 3, 4], [5, 6]])
    token_ids, positions = np.array([[1, 2, 3, 4]]), np.arange(4)[None]
    whole, parts = new_cache(weights, 1, scheme), new_cache(weights, 1, scheme)
    prefill = forward(weights, token_ids, positions, whole)
    steps = [forward(weights, token_ids[:, t : t + 1], positions[:, t : t + 1], parts) for t in range(4)]
    np.testing.assert_allclose(np.concatenate(steps, axis=1), prefill, atol=1e-4)
    assert np.abs(prefill - forward(weights, token_ids, positions)).max() > 1e-3
    side = scheme.keys
    assert whole.nbytes == 2 * LAYERS * side.nbytes(4, HEADS, HEAD_DIM)
    assert len(generate(weights, [[1, 2]], 3, scheme=scheme)[0]) == 3


def test_a_name_gives_a_scheme_or_all_names() -> None:
    weights = weights_of()
    assert scheme_for("int8", weights, [[1]]) == SCHEMES["int8"]
    assert scheme_for("ort-int4", weights, [[1, 2]]) == scheme_for("ort-int4", weights, [[1, 2]])
    with pytest.raises(InputError) as refused:
        scheme_for("int3", weights, [[1]])
    assert all(word in str(refused.value) for word in (*SCHEMES, *CALIBRATED, "'int3'"))
    with pytest.raises(InputError, match="'ort-int8', whose scales are measured"):
        scheme_named("ort-int8")
