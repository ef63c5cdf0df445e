"""What an export declares, found by name, and what it is then fed."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.config import Config
from refengine.errors import InputError
from tests.checkpoints import TINY
from verify.candidates import Past
from verify.errors import NoVerdict
from verify.feeds import Declared, Interface, check_same_model, feed, interface_of, next_past

CONFIG = Config.from_dict(TINY | {"num_hidden_layers": 12})
K, H, V, LAYERS = CONFIG.num_key_value_heads, CONFIG.head_dim, CONFIG.vocab_size, CONFIG.num_hidden_layers
SPELLINGS = {  # by exporter: names of the past and of the present
    "optimum and model builder": ("past_key_values.{n}.{kind}", "present.{n}.{kind}"),
    "olive": ("past_{kind}_{n}", "present_{kind}_{n}"),
    "number first": ("past_{n}_{kind}", "present_{n}_{kind}"),
    "underscores": ("past_key_values_{n}_{kind}", "present_key_values_{n}_{kind}"),
    "full name of the present": ("past_key_values.{n}.{kind}", "present_key_values.{n}.{kind}"),
}


def declared_inputs(
    spelling: str = SPELLINGS["olive"][0],
    *,
    layers: int = LAYERS,
    kv_heads: int | str = K,
    head_dim: int | str = H,
    dtype: str = "float32",
) -> list[Declared]:
    tokens = [
        Declared(name, "int64", ("batch", "tokens"))
        for name in ("input_ids", "attention_mask", "position_ids")
    ]
    return tokens + [
        Declared(spelling.format(n=n, kind=kind), dtype, ("batch", kv_heads, "past", head_dim))
        for n in range(layers)
        for kind in ("key", "value")
    ]


def declared_outputs(
    spelling: str = SPELLINGS["olive"][1],
    *,
    layers: int = LAYERS,
    kv_heads: int | str = K,
    head_dim: int | str = H,
    dtype: str = "float32",
    vocab_size: int | str = V,
) -> list[Declared]:
    logits = Declared("logits", "float32", ("batch", "tokens", vocab_size))
    return [logits] + [
        Declared(spelling.format(n=n, kind=kind), dtype, ("batch", kv_heads, "all", head_dim))
        for n in range(layers)
        for kind in ("key", "value")
    ]


def cached_interface(**sizes: int | str) -> Interface:
    return interface_of(declared_inputs(**sizes), declared_outputs(**sizes))


def without(tensors: list[Declared], name: str) -> list[Declared]:
    return [declared for declared in tensors if declared.name != name]


def past_of(interface: Interface, positions_BS: np.ndarray) -> Past:
    shape = (positions_BS.shape[0], K, positions_BS.shape[1], H)
    names = [name for layer in interface.layers for name in (layer.key_in, layer.value_in)]
    return Past({name: np.full(shape, number, np.float32) for number, name in enumerate(names)}, positions_BS)


def presents(
    interface: Interface, length: int, rows: int = 1, dtype: str = "float32"
) -> dict[str, np.ndarray]:
    names = [name for layer in interface.layers for name in (layer.key_out, layer.value_out)]
    return {name: np.full((rows, K, length, H), number, dtype) for number, name in enumerate(names)}


@given(spelling=st.sampled_from(sorted(SPELLINGS)), shuffle=st.randoms(use_true_random=False))
def test_the_cache_is_found_in_every_spelling_and_any_order_with_layer_10_after_layer_9(spelling, shuffle):
    past, present = SPELLINGS[spelling]
    inputs, outputs = declared_inputs(past), declared_outputs(present)
    shuffle.shuffle(inputs)
    shuffle.shuffle(outputs)
    interface = interface_of(inputs, outputs)
    assert [layer.key_in for layer in interface.layers] == [past.format(n=n, kind="key") for n in range(12)]
    assert [layer.value_in for layer in interface.layers] == [
        past.format(n=n, kind="value") for n in range(12)
    ]
    assert [layer.key_out for layer in interface.layers] == [
        present.format(n=n, kind="key") for n in range(12)
    ]
    assert [layer.value_out for layer in interface.layers] == [
        present.format(n=n, kind="value") for n in range(12)
    ]
    assert (interface.kv_heads, interface.head_dim, interface.vocab_size, interface.cache_dtype) == (
        K,
        H,
        V,
        "float32",
    )
    assert interface.has_cache and interface.has_position_ids and interface.has_attention_mask


def test_sizes_that_the_export_leaves_open_come_from_the_configuration():
    interface = cached_interface(kv_heads="heads", head_dim="kv_cache_dim")
    assert (interface.kv_heads, interface.head_dim) == (None, None)
    resolved = interface.resolved(CONFIG)
    assert (resolved.kv_heads, resolved.head_dim, resolved.vocab_size) == (K, H, V)
    assert feed(resolved, np.zeros((1, 2), np.int64), np.array([[0, 1]]))["past_key_0"].shape == (1, K, 0, H)


def test_a_size_that_only_the_outputs_declare_is_taken_from_them():
    interface = interface_of(declared_inputs(head_dim="kv_cache_dim"), declared_outputs())
    assert interface.head_dim == H


def test_an_export_without_a_cache_is_fed_tokens_alone():
    interface = interface_of(declared_inputs(layers=0), declared_outputs(layers=0))
    assert not interface.has_cache
    assert sorted(feed(interface, np.array([[5, 6]]), np.array([[0, 1]]))) == [
        "attention_mask",
        "input_ids",
        "position_ids",
    ]


def test_an_export_that_gives_a_present_but_takes_no_past_has_no_cache():
    interface = interface_of(declared_inputs(layers=0), declared_outputs())
    assert not interface.has_cache
    assert len(interface.layers) == 12 and interface.layers[0].key_in is None
    assert "past_key_0" not in feed(interface, np.array([[5, 6]]), np.array([[0, 1]]))


def test_every_input_is_fed_in_the_dtype_that_it_declares():
    tokens = [
        Declared("input_ids", "int32", ("b", "t")),
        Declared("attention_mask", "bool", ("b", "s")),
        Declared("position_ids", "int64", ("b", "t")),
    ]
    interface = interface_of(tokens + declared_inputs(dtype="float16")[3:], declared_outputs(dtype="float16"))
    fed = feed(interface, np.array([[5, 6]], np.int64), np.array([[0, 1]], np.int32))
    assert {name: array.dtype.name for name, array in fed.items()} == {
        declared.name: declared.dtype for declared in interface.inputs
    }


def test_the_attention_mask_covers_past_and_present_and_leaves_padding_out():
    interface = cached_interface()
    past = past_of(interface, np.array([[-1, -1, 0], [0, 1, 2]]))
    fed = feed(interface, np.array([[7, 8], [9, 3]]), np.array([[1, 2], [3, 4]]), past)
    np.testing.assert_array_equal(fed["attention_mask"], [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(fed["position_ids"], [[1, 2], [3, 4]])
    assert all(fed[name] is array for name, array in past.arrays.items())


def test_padding_is_fed_a_position_that_every_table_has():
    fed = feed(cached_interface(), np.array([[0, 0, 4]]), np.array([[-1, -1, 0]]))
    assert fed["position_ids"].min() >= 0
    np.testing.assert_array_equal(fed["attention_mask"], [[0, 0, 1]])
    np.testing.assert_array_equal(fed["position_ids"][:, 2:], [[0]])


def test_padding_is_refused_by_an_export_that_cannot_be_told_of_it():
    interface = interface_of(without(declared_inputs(), "attention_mask"), declared_outputs())
    assert feed(interface, np.array([[4, 5]]), np.array([[0, 1]]))["input_ids"].tolist() == [[4, 5]]
    with pytest.raises(NoVerdict, match="attention_mask"):
        feed(interface, np.array([[4, 5]]), np.array([[-1, 0]]))


def test_num_logits_to_keep_asks_for_the_logits_of_every_token():
    inputs = declared_inputs(layers=0)
    scalar = interface_of([*inputs, Declared("num_logits_to_keep", "int64", ())], declared_outputs(layers=0))
    fed = feed(scalar, np.array([[4]]), np.array([[0]]))["num_logits_to_keep"]
    assert (fed.shape, fed.dtype, fed.item()) == ((), np.int64, 0)


def test_use_cache_branch_says_whether_there_is_a_past():
    interface = interface_of(
        [*declared_inputs(), Declared("use_cache_branch", "bool", (1,))], declared_outputs()
    )
    first = feed(interface, np.array([[4]]), np.array([[0]]))
    later = feed(interface, np.array([[4]]), np.array([[1]]), past_of(interface, np.array([[0]])))
    assert (first["use_cache_branch"].tolist(), later["use_cache_branch"].tolist()) == ([False], [True])


def test_a_fixed_size_that_the_batch_does_not_have_is_named():
    tokens = [Declared("input_ids", "int64", (1, "t")), *declared_inputs()[1:]]
    interface = interface_of(tokens, declared_outputs())
    assert interface.batch_size == 1
    with pytest.raises(
        NoVerdict, match=re.escape("input_ids: the export takes shape [1, t] alone, and would be fed [2, 1]")
    ):
        feed(interface, np.array([[4], [5]]), np.array([[0], [0]]))


def test_an_unknown_input_is_refused_by_name():
    with pytest.raises(
        InputError, match="^beam_idx: this input is not known.*known are input_ids, attention_mask"
    ):
        interface_of([*declared_inputs(), Declared("beam_idx", "int32", ("b",))], declared_outputs())


BROKEN = {
    "no input_ids": (
        lambda i, o: (without(i, "input_ids"), o),
        "inputs: expected input_ids, found attention_mask",
    ),
    "no logits": (lambda i, o: (i, o[1:]), "outputs: expected logits"),
    "logits of the wrong rank": (
        lambda i, o: (i, [Declared("logits", "float32", ("b", V)), *o[1:]]),
        "outputs: expected logits",
    ),
    "a layer of the past left out": (
        lambda i, o: ([d for d in i if "_5" not in d.name], o),
        "past: .* found no key of layer 5",
    ),
    "a value of the present left out": (
        lambda i, o: (i, without(o, "present_value_3")),
        "present: .* found no value of layer 3",
    ),
    "a past without its present": (
        lambda i, o: (i, o[:-2]),
        "found 12 layers of the past and 11 of the present",
    ),
    "one layer in two spellings": (
        lambda i, o: ([*i, Declared("past_3_key", "float32", ("b", K, "p", H))], o),
        "past_3_key: .*past_key_3",
    ),
    "ids for a packed batch": (
        lambda i, o: ([Declared("input_ids", "int64", ("tokens",)), *i[1:]], o),
        "input_ids: expected shape",
    ),
    "ids that are no integers": (
        lambda i, o: ([Declared("input_ids", "float32", ("b", "t")), *i[1:]], o),
        "input_ids: expected int64",
    ),
    "heads that differ by layer": (
        lambda i, o: (i[:-1] + [Declared("past_value_11", "float32", ("b", K + 1, "p", H))], o),
        f"KV heads to be the same everywhere, found {K} in .* and {K + 1} in past_value_11",
    ),
    "a cache of codes": (
        lambda i, o: (i[:-1] + [Declared("past_value_11", "int8", ("b", K, "p", H))], o),
        "past_value_11: .* found int8",
    ),
    "two dtypes": (
        lambda i, o: (i[:-1] + [Declared("past_value_11", "float16", ("b", K, "p", H))], o),
        "expected one dtype",
    ),
    "a cache with heads and size in one axis": (
        lambda i, o: (i[:-1] + [Declared("past_value_11", "float32", ("b", "p", K * H))], o),
        "past_value_11: expected shape",
    ),
}


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_what_cannot_be_fed_is_refused_in_one_line_that_names_it(case):
    change, message = BROKEN[case]
    with pytest.raises(InputError, match=message) as caught:
        interface_of(*change(declared_inputs(), declared_outputs()))
    assert "\n" not in str(caught.value)


def test_outputs_that_are_not_needed_are_left_alone():
    interface = interface_of(
        declared_inputs(), [*declared_outputs(), Declared("hidden_states", "float32", ("b", "t", 40))]
    )
    assert interface == interface_of(declared_inputs(), interface.outputs)


def test_the_next_past_is_the_present_under_the_names_of_the_past():
    interface = cached_interface()
    first = np.array([[-1, 0]])
    past = next_past(interface, presents(interface, 2), first)
    later = next_past(interface, presents(interface, 3), np.array([[1]]), past)
    np.testing.assert_array_equal(later.positions_BS, [[-1, 0, 1]])
    assert {name: int(array.flat[0]) for name, array in later.arrays.items()} == {
        f"past_{kind}_{n}": 2 * n + (kind == "value") for n in range(12) for kind in ("key", "value")
    }


def test_the_next_past_does_not_change_when_the_runtime_writes_its_buffers_again():
    interface = cached_interface()
    outputs, positions_BT = presents(interface, 2), np.array([[0, 1]])
    past = next_past(interface, outputs, positions_BT)
    for array in (*outputs.values(), positions_BT):
        array.fill(-7)
    assert min(array.min() for array in past.arrays.values()) == 0
    np.testing.assert_array_equal(past.positions_BS, [[0, 1]])


@pytest.mark.parametrize("length", [1, 2, 4, 64])
def test_a_present_of_another_length_than_past_and_new_tokens_is_refused(length):
    interface = cached_interface()
    past = past_of(interface, np.array([[0, 1]]))
    with pytest.raises(NoVerdict, match=re.escape(f"present_key_0: expected shape (1, {K}, 3, {H})")):
        next_past(interface, presents(interface, length), np.array([[2]]), past)


def test_a_present_of_another_dtype_than_the_past_is_refused():
    interface = cached_interface()
    with pytest.raises(
        NoVerdict, match="present_key_0: expected float32, as past_key_0 declares, found float16"
    ):
        next_past(interface, presents(interface, 1, dtype="float16"), np.array([[0]]))


def test_an_export_of_the_checkpoint_is_accepted_with_its_sizes_open_or_not():
    check_same_model(cached_interface(), CONFIG, CONFIG.num_attention_heads)
    check_same_model(cached_interface(kv_heads="k", head_dim="h"), CONFIG)
    check_same_model(interface_of(declared_inputs(layers=0), declared_outputs(layers=0)), CONFIG)


@pytest.mark.parametrize(
    ("export", "query_heads", "message"),
    [
        (
            cached_interface(layers=8),
            None,
            "candidate has 8 layers, checkpoint 12: the export is of another model",
        ),
        (
            cached_interface(kv_heads=3),
            None,
            f"candidate has 3 KV heads, checkpoint {K}: the export is of another model",
        ),
        (
            cached_interface(head_dim=8),
            None,
            f"candidate has 8 dimensions a head, checkpoint {H}: the export is of another model",
        ),
        (cached_interface(), 4, "candidate has 4 query heads, checkpoint 6: the export is of another model"),
        (
            interface_of(declared_inputs(), declared_outputs(vocab_size=99)),
            None,
            f"candidate has 99 tokens in its vocabulary, checkpoint {V}: the export is of another model",
        ),
        (
            cached_interface(layers=8, kv_heads=6),
            None,
            f"candidate has 8 layers, checkpoint 12; candidate has 6 KV heads, checkpoint {K}: the export is of another model",
        ),
    ],
)
def test_an_export_of_another_model_is_refused_with_both_sides_named(export, query_heads, message):
    with pytest.raises(InputError) as caught:
        check_same_model(export, CONFIG, query_heads)
    assert str(caught.value) == message


def test_a_cache_of_query_heads_is_explained():
    with pytest.raises(
        InputError,
        match=f"^candidate has 6 KV heads, checkpoint {K}: its past was built with num_attention_heads where num_key_value_heads",
    ):
        check_same_model(cached_interface(kv_heads=6), CONFIG)
