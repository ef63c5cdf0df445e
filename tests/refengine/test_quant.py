"""What every way of storing a cache promises: its bytes, its error, and that a row's neighbours make no difference."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.batching import CONTINUOUS, Batching, complete
from refengine.codecs.affine import Affine
from refengine.codecs.fits import outward
from refengine.codecs.ours import integers, keys_by_channel
from refengine.codecs.packing import pack_nibbles, unpack_nibbles
from refengine.config import Config
from refengine.errors import CacheError, InputError
from refengine.generate import generate
from refengine.kvcache import KVCache
from refengine.quant import SCHEMES, scheme_named
from refengine.requests import Limits
from refengine.scheme import Scheme
from refengine.weights import Weights
from tests.checkpoints import TINY
from tests.refengine.strategies import opened, written

HEADS, HEAD_DIM, LAYERS = 2, 64, 2  # a head that every scheme can store
MODEL = {"head_dim": HEAD_DIM, "num_hidden_layers": LAYERS, "num_key_value_heads": HEADS}
CONFIG = Config.from_dict(TINY | MODEL)
UNROUNDED = {"float32", "float64"}
NARROW = [name for name in SCHEMES if name not in UNROUNDED]
CODED_ONCE = [  # what codes a token becomes does not depend on when others come
    name
    for name, scheme in SCHEMES.items()
    if all(side.codec.tokens == 1 and side.flow.leaving != "again" for side in (scheme.keys, scheme.values))
]
every_scheme = pytest.mark.parametrize("name", SCHEMES)
WITH_STEPS = [name for name in NARROW if not name.startswith("ov-turbo")]  # which has one codebook for all vectors
every_narrow_scheme = pytest.mark.parametrize("name", NARROW)
chunkings = st.lists(st.integers(1, 40), min_size=1, max_size=5)


def vectors(rows: int, tokens: int, seed: int = 0) -> np.ndarray:
    """Vectors with a few channels that are far larger than the others, as keys have them."""
    random = np.random.default_rng(seed)
    channels = np.exp(random.normal(0, 1.5, (1, HEADS, 1, HEAD_DIM)))
    return (random.standard_normal((rows, HEADS, tokens, HEAD_DIM)) * channels).astype(np.float32)


def filled(scheme: Scheme, x_BKSH: np.ndarray, chunks: Sequence[int], window: int | None = None) -> KVCache:
    """A cache that was fed these vectors, values as keys, in passes of these lengths."""
    cache = KVCache(CONFIG, len(x_BKSH), scheme, window)
    for start, stop in zip(np.cumsum([0, *chunks[:-1]]), np.cumsum(chunks), strict=True):
        positions_BT = np.tile(np.arange(start, stop), (len(x_BKSH), 1))
        for layer in range(LAYERS):
            cache.update(layer, x_BKSH[:, :, start:stop], x_BKSH[:, :, start:stop], positions_BT)
    return cache


@every_scheme
@given(rows=st.integers(1, 3), tokens=st.integers(1, 200))
@settings(max_examples=10)
def test_the_formula_gives_the_bytes_of_the_real_cache(name: str, rows: int, tokens: int) -> None:
    scheme, x_BKSH = SCHEMES[name], vectors(rows, tokens)
    expected = sum(side.nbytes(tokens, HEADS, HEAD_DIM) for side in (scheme.keys, scheme.values)) * LAYERS * rows
    assert filled(scheme, x_BKSH, [tokens]).nbytes == expected


@every_scheme
@given(chunks=chunkings)
@settings(max_examples=10)
def test_how_tokens_came_changes_no_byte_count(name: str, chunks: list[int]) -> None:
    scheme = SCHEMES[name]
    if "again" in (scheme.keys.flow.leaving, scheme.values.flow.leaving):
        return  # what waits there depends on where the first pass ended
    x_BKSH = vectors(1, sum(chunks))
    assert filled(scheme, x_BKSH, chunks).nbytes == filled(scheme, x_BKSH, [sum(chunks)]).nbytes


@pytest.mark.parametrize("name", CODED_ONCE)
@given(chunks=chunkings)
@settings(max_examples=10)
def test_any_chunking_gives_the_same_codes_where_each_token_has_its_own(name: str, chunks: list[int]) -> None:
    x_BKSH = vectors(2, sum(chunks))
    whole, parts = filled(SCHEMES[name], x_BKSH, [sum(chunks)]), filled(SCHEMES[name], x_BKSH, chunks)
    for layer in range(LAYERS):
        np.testing.assert_array_equal(whole.read(layer, np.float32), parts.read(layer, np.float32))


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("bits", [4, 8])
@given(seed=st.integers(0, 1000), size=st.floats(1e-30, 1e4), centre=st.floats(-1e3, 1e3))
def test_a_value_comes_back_within_half_a_step(bits: int, tokens: int, seed: int, size: float, centre: float) -> None:
    codec = Affine(outward, bits, tokens=tokens, zero="offset", params=np.float16)
    x_BKTH = (vectors(2, 32, seed) * np.float32(size) + np.float32(centre)).clip(-6e4, 6e4)
    arrays = codec.encode(x_BKTH)
    step = arrays[1].astype(np.float32)
    step_BKTH = np.repeat(step, tokens, axis=2) if tokens > 1 else step
    error = np.abs(codec.decode(arrays, np.dtype(np.float32)) - x_BKTH)
    rounding = 4 * np.finfo(np.float32).eps * np.abs(x_BKTH).max()
    assert (error <= step_BKTH / 2 + rounding).all()


@pytest.mark.parametrize("name", WITH_STEPS)
@pytest.mark.parametrize("value", [0.0, 3.25, 1e-20, -1e4])
def test_a_constant_comes_back(name: str, value: float) -> None:
    x_BKSH = np.full((1, HEADS, 40, HEAD_DIM), value, np.float32)
    if value == -1e4 and name in {"fp8", "ggml-q4_1-rotated", "ggml-q5_1-rotated"}:
        return  # beyond what a scale of one reaches; eight times that, where a constant is rotated, is beyond float16
    for read in filled(SCHEMES[name], x_BKSH, [33, 7]).read(0, np.float32):
        np.testing.assert_allclose(read, x_BKSH, rtol=0.08, atol=1e-6)


@given(st.lists(st.integers(0, 15), min_size=2, max_size=40).filter(lambda codes: len(codes) % 2 == 0), st.booleans())
def test_packing_is_exact_and_takes_half_the_bytes(codes: list[int], high_first: bool) -> None:
    packed = pack_nibbles(np.array(codes), high_first)
    assert packed.nbytes == len(codes) // 2
    assert unpack_nibbles(packed, high_first).tolist() == codes


@every_narrow_scheme
@given(data=st.data(), tokens=st.integers(2, 300), dtype=st.sampled_from([np.float32, np.float64]))
@settings(max_examples=10)
def test_attention_reads_of_a_view_what_the_decoded_array_has(
    name: str, data: st.DataObject, tokens: int, dtype: type
) -> None:
    cache = filled(SCHEMES[name], vectors(1, tokens), [tokens])
    for store in (cache._keys[0], cache._values[0]):
        view = store.read(np.dtype(dtype))
        start = data.draw(st.integers(0, tokens - 1))
        stop = data.draw(st.integers(start + 1, tokens))
        x_BKSH, part = np.asarray(view), view[:, :, start:stop]
        assert x_BKSH.dtype == view.dtype == dtype
        assert view.shape == x_BKSH.shape
        np.testing.assert_array_equal(np.asarray(part), x_BKSH[:, :, start:stop])
        q_BKRH = np.random.default_rng(1).standard_normal((1, HEADS, 3, HEAD_DIM)).astype(dtype)
        p_BKRS = np.random.default_rng(2).random((1, HEADS, 3, stop - start)).astype(dtype)
        exact = x_BKSH[:, :, start:stop].astype(np.float64)
        size = np.abs(exact).max() * max(stop - start, HEAD_DIM)
        bound = 30 * np.finfo(np.float32).eps * size  # scale and zero, in float32, are applied to the sums
        assert np.abs(q_BKRH @ part.swapaxes(-1, -2) - q_BKRH @ exact.swapaxes(-1, -2)).max() <= bound
        assert np.abs(p_BKRS @ part - p_BKRS @ exact).max() <= bound


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return opened(written(tmp_path_factory.mktemp("model"), **MODEL))


@every_narrow_scheme
@given(
    requests=st.lists(
        st.tuples(st.lists(st.integers(0, 66), min_size=1, max_size=20), st.integers(1, 6)), min_size=1, max_size=5
    ),
    batch_size=st.integers(1, 3),
)
@settings(max_examples=5)
def test_in_continuous_batches_each_request_gets_the_tokens_that_it_gets_alone(
    name: str, model: Weights, requests: list[tuple[list[int], int]], batch_size: int
) -> None:
    batching = Batching(model, CONTINUOUS, Limits(batch_size), scheme=SCHEMES[name])
    for prompt, most in requests:
        batching.add_request(prompt, most)
    alone = [generate(model, [prompt], most, scheme=SCHEMES[name])[0] for prompt, most in requests]
    assert list(complete(batching).values()) == alone
    assert batching.nbytes == 0


@every_scheme
@given(chunks=chunkings, share=st.floats(0, 1), more=st.integers(1, 40))
@settings(max_examples=10)
def test_cropping_leaves_the_older_tokens_as_they_read_and_new_ones_go_behind_them(
    name: str, chunks: list[int], share: float, more: int
) -> None:
    cache = filled(SCHEMES[name], vectors(1, sum(chunks)), chunks)
    before = [cache.read(layer, np.float32) for layer in range(LAYERS)]
    left = round(share * cache.length)
    cache.crop(left)
    for layer in range(LAYERS):
        for old, now in zip(before[layer], cache.read(layer, np.float32), strict=True):
            np.testing.assert_array_equal(now, old[:, :, :left])
    new = vectors(1, more, seed=1)
    for layer in range(LAYERS):
        k_BKSH, _, positions_BS = cache.update(layer, new, new, np.arange(left, left + more)[None])
        assert k_BKSH.shape[2] == positions_BS.shape[1] or (left == 0 and k_BKSH.shape[2] == more)
        assert np.isfinite(cache.read(layer, np.float32)).all()


@every_scheme
@given(one=st.integers(1, 50), two=st.integers(1, 50))
@settings(max_examples=10)
def test_merged_and_selected_rows_read_as_before(name: str, one: int, two: int) -> None:
    first, second = (filled(SCHEMES[name], vectors(1, n, seed), [n]) for seed, n in enumerate((one, two)))
    both = first.merge(second)
    for row, (cache, n) in enumerate(((first, one), (second, two))):
        alone = both.select([row])
        assert alone.nbytes == cache.nbytes
        for merged, selected, expected in zip(
            both.read(1, np.float32), alone.read(1, np.float32), cache.read(1, np.float32), strict=True
        ):
            np.testing.assert_array_equal(merged[row, :, -n:], expected[0])
            np.testing.assert_array_equal(selected, expected)


@pytest.mark.parametrize("name", CODED_ONCE)
@given(chunks=chunkings, window=st.integers(2, 60))
@settings(max_examples=10)
def test_a_window_keeps_the_newest_tokens_as_they_were_coded(name: str, chunks: list[int], window: int) -> None:
    x_BKSH = vectors(1, sum(chunks))
    kept, whole = filled(SCHEMES[name], x_BKSH, chunks, window), filled(SCHEMES[name], x_BKSH, chunks)
    assert kept.length == min(window - 1, whole.length)
    flow = SCHEMES[name].keys.flow
    if flow == type(flow)():  # what is left of the cache is as small as its tokens
        assert kept.nbytes == filled(SCHEMES[name], x_BKSH[:, :, : kept.length], [kept.length]).nbytes
    for few, all_ in zip(kept.read(0, np.float32), whole.read(0, np.float32), strict=True):
        np.testing.assert_array_equal(few, all_[:, :, all_.shape[2] - kept.length :])


def test_keys_by_channel_keep_sinks_and_residual_as_they_came() -> None:
    x_BKSH = vectors(1, 75)
    k_BKSH, v_BKSH = filled(keys_by_channel(4, 32, sinks=4), x_BKSH, [75]).read(0, np.float32)
    for read in (k_BKSH, v_BKSH):
        exact_S = (read == x_BKSH).all(axis=(0, 1, 3))
        assert np.flatnonzero(exact_S).tolist() == [*range(4), *range(68, 75)]


@every_narrow_scheme
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_and_the_cache_with_it(name: str, value: float) -> None:
    x_BKSH = vectors(1, 300)
    x_BKSH[0, 1, 1, 3] = value
    cache = KVCache(CONFIG, 1, SCHEMES[name])
    with pytest.raises(CacheError, match="finite"):
        cache.update(0, x_BKSH, x_BKSH, np.arange(300)[None])
    with pytest.raises(CacheError):
        cache.crop(0)


def test_an_unknown_name_is_refused_with_the_list() -> None:
    with pytest.raises(InputError) as refused:
        scheme_named("int3")
    assert all(word in str(refused.value) for word in (*SCHEMES, "'int3'"))


@pytest.mark.parametrize(
    ("scheme", "head_dim", "words"),
    [
        (integers(8, 24), 64, "group size that divides head_dim 64, found 24"),
        (integers(8, -1), 64, "group size that divides head_dim 64, found -1"),
        (integers(4), 7, "even head_dim to pack 4-bit codes two a byte, found 7"),
    ],
)
def test_a_head_that_cannot_be_stored_is_refused(scheme: Scheme, head_dim: int, words: str) -> None:
    with pytest.raises(InputError) as refused:
        scheme.keys.store(layer=0, rows=1, heads=HEADS, head_dim=head_dim)
    assert words in str(refused.value)


@pytest.mark.parametrize("settings", [{"bits": 5}, {"bits": 4, "tokens": 24}, {"bits": 4, "residual": 40}])
def test_settings_that_cannot_be_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(InputError, match="KV cache: expected"):
        keys_by_channel(**settings)
