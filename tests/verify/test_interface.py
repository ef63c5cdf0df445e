"""What an export takes and gives, found by name; and what is refused."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.errors import InputError
from tests.verify.declared import CONFIG, H, K, V, cached_interface, inputs, outputs, without
from verify.interface import Declared, Interface, check_halves, check_same_model, interface_of

SPELLINGS = {  # by exporter: names of the past and of the present
    "optimum and model builder": ("past_key_values.{n}.{kind}", "present.{n}.{kind}"),
    "olive": ("past_{kind}_{n}", "present_{kind}_{n}"),
    "number first": ("past_{n}_{kind}", "present_{n}_{kind}"),
    "underscores": ("past_key_values_{n}_{kind}", "present_key_values_{n}_{kind}"),
    "full name of the present": ("past_key_values.{n}.{kind}", "present_key_values.{n}.{kind}"),
}


@given(spelling=st.sampled_from(sorted(SPELLINGS)), shuffle=st.randoms(use_true_random=False))
def test_the_cache_is_found_in_every_spelling_and_order_with_layer_10_after_layer_9(spelling, shuffle):
    past, present = SPELLINGS[spelling]
    declared_inputs, declared_outputs = inputs(past), outputs(present)
    shuffle.shuffle(declared_inputs)
    shuffle.shuffle(declared_outputs)
    interface = interface_of(declared_inputs, declared_outputs)
    found = [(layer.key_in, layer.value_in, layer.key_out, layer.value_out) for layer in interface.layers]
    assert found == [
        tuple(side.format(n=n, kind=kind) for side in (past, present) for kind in ("key", "value")) for n in range(12)
    ]
    sizes = (interface.kv_heads, interface.head_dim, interface.vocab_size, interface.cache_dtype)
    assert sizes == (K, H, V, "float32")
    assert all([interface.has_cache, interface.has_position_ids, interface.has_attention_mask])


def test_each_output_is_carried_to_the_input_of_the_same_layer_and_kind():
    pairs = cached_interface().carried
    assert len(pairs) == 24
    assert all(name_out == name_in.replace("past", "present") for name_in, name_out in pairs)


def test_sizes_that_the_export_leaves_open_come_from_the_configuration():
    interface = cached_interface(kv_heads="heads", head_dim="kv_cache_dim")
    assert (interface.kv_heads, interface.head_dim) == (None, None)
    resolved = interface.resolved(CONFIG)
    assert (resolved.kv_heads, resolved.head_dim, resolved.vocab_size) == (K, H, V)


def test_sizes_that_the_export_declares_are_kept_whatever_the_configuration_says():
    interface = cached_interface(kv_heads=3, head_dim=8)
    assert interface.resolved(CONFIG) == interface


def test_a_size_that_only_the_outputs_declare_is_taken_from_them():
    assert interface_of(inputs(head_dim="kv_cache_dim"), outputs()).head_dim == H


def test_logits_whose_shape_is_left_out_are_accepted_with_their_vocabulary_open():
    interface = interface_of(inputs(), [Declared("logits", "float32", ()), *outputs()[1:]])
    assert interface.vocab_size is None


def test_an_export_that_gives_a_present_but_takes_no_past_has_layers_and_no_cache():
    interface = interface_of(inputs(layers=0), outputs())
    assert not interface.has_cache
    assert len(interface.layers) == 12
    assert (interface.layers[0].key_in, interface.layers[0].key_out) == (None, "present_key_0")


def test_outputs_that_are_not_needed_are_left_alone():
    hidden = Declared("hidden_states", "float32", ("b", "t", 40))
    interface = interface_of(inputs(), [hidden, *outputs()])
    assert interface.layers == cached_interface().layers


def test_an_unknown_input_is_refused_by_name():
    with pytest.raises(InputError, match=r"^beam_index: this input is not known.*known are input_ids"):
        interface_of([*inputs(), Declared("beam_index", "int32", ("b",))], outputs())


Change = Callable[[], tuple[list[Declared], list[Declared]]]
BROKEN: dict[str, tuple[Change, str]] = {
    "no input_ids": (
        lambda: (without(inputs(), "input_ids"), outputs()),
        "inputs: expected input_ids, found attention_mask",
    ),
    "no logits": (
        lambda: (inputs(), outputs()[1:]),
        "outputs: expected logits .* found present_key_0",
    ),
    "logits of the wrong rank": (
        lambda: (inputs(), [Declared("logits", "float32", ("b", V)), *outputs()[1:]]),
        r"outputs: expected logits .* found logits \[b, 67\]",
    ),
    "a layer of the past left out": (
        lambda: ([declared for declared in inputs() if not declared.name.endswith("_5")], outputs()),
        "past: .* found no key of layer 5",
    ),
    "a value of the present left out": (
        lambda: (inputs(), without(outputs(), "present_value_3")),
        "present: .* found no value of layer 3",
    ),
    "a past without its present": (
        lambda: (inputs(), outputs()[:-2]),
        "found 12 layers of the past and 11 of the present",
    ),
    "one layer in two spellings": (
        lambda: ([*inputs(), Declared("past_3_key", "float32", ("b", K, "p", H))], outputs()),
        "past_3_key: declared beside past_key_3",
    ),
    "ids of a packed batch": (
        lambda: ([Declared("input_ids", "int64", ("tokens",)), *inputs()[1:]], outputs()),
        r"input_ids: expected shape \[batch, tokens\], found \[tokens\]",
    ),
    "ids that are no integers": (
        lambda: ([Declared("input_ids", "float32", ("b", "t")), *inputs()[1:]], outputs()),
        "input_ids: expected int64 or int32, found float32",
    ),
    "a mask of text": (
        lambda: ([Declared("attention_mask", "object", ("b", "t")), *without(inputs(), "attention_mask")], outputs()),
        "attention_mask: expected numbers or truth values, found object",
    ),
    "no outputs": (
        lambda: (inputs(), []),
        "outputs: expected logits .* found none",
    ),
    "heads that differ by layer": (
        lambda: ([*inputs()[:-1], Declared("past_value_11", "float32", ("b", 3, "p", H))], outputs()),
        "expected KV heads to be the same everywhere, found 2 in .* and 3 in past_value_11",
    ),
    "a cache of codes": (
        lambda: ([*inputs()[:-1], Declared("past_value_11", "int8", ("b", K, "p", H))], outputs()),
        "past_value_11: .* found int8",
    ),
    "two dtypes": (
        lambda: ([*inputs()[:-1], Declared("past_value_11", "float16", ("b", K, "p", H))], outputs()),
        "expected one dtype everywhere, found float32 in .* and float16 in past_value_11",
    ),
    "heads and head size in one axis": (
        lambda: ([*inputs()[:-1], Declared("past_value_11", "float32", ("b", None, K * H))], outputs()),
        r"past_value_11: expected shape .* found \[b, \?, 20\]",
    ),
}


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_what_cannot_be_fed_is_refused_in_one_line_that_names_it(case):
    declare, message = BROKEN[case]
    with pytest.raises(InputError, match=message) as caught:
        interface_of(*declare())
    assert "\n" not in str(caught.value)


def test_an_export_of_the_checkpoint_is_accepted_with_its_sizes_declared_or_open():
    check_same_model(cached_interface(), CONFIG, CONFIG.num_attention_heads)
    check_same_model(cached_interface(kv_heads="k", head_dim="h"), CONFIG)
    check_same_model(interface_of(inputs(layers=0), outputs(layers=0)), CONFIG)


OTHER_VOCABULARY = interface_of(inputs(), outputs(vocab_size=99))


@pytest.mark.parametrize(
    ("export", "query_heads", "difference"),
    [
        (cached_interface(layers=8), None, "candidate has 8 layers, checkpoint 12"),
        (cached_interface(kv_heads=3), None, "candidate has 3 KV heads, checkpoint 2"),
        (cached_interface(head_dim=8), None, "candidate has 8 dimensions a head, checkpoint 10"),
        (cached_interface(), 4, "candidate has 4 query heads, checkpoint 6"),
        (OTHER_VOCABULARY, None, "candidate has 99 tokens in its vocabulary, checkpoint 67"),
        (
            cached_interface(layers=8, kv_heads=6),
            None,
            "candidate has 8 layers, checkpoint 12; candidate has 6 KV heads, checkpoint 2",
        ),
    ],
)
def test_an_export_of_another_model_is_refused_with_both_sides_named(
    export: Interface, query_heads: int | None, difference: str
):
    with pytest.raises(InputError) as caught:
        check_same_model(export, CONFIG, query_heads)
    assert str(caught.value) == f"{difference}: the export is of another model"


def test_a_cache_of_query_heads_is_explained():
    explanation = "^candidate has 6 KV heads, checkpoint 2: its past was built with num_attention_heads where"
    with pytest.raises(InputError, match=explanation):
        check_same_model(cached_interface(kv_heads=6), CONFIG)


def test_of_a_decoder_in_two_files_the_first_gives_all_that_the_second_is_fed():
    tokens, later = inputs(layers=0), cached_interface()
    check_halves(interface_of(tokens, outputs()), later)
    for gives in (outputs(layers=11), outputs("present.{n}.{kind}")):
        with pytest.raises(InputError, match=r"^present_key_\d+: expected it of decoder_model, .*export both again$"):
            check_halves(interface_of(tokens, gives), later)
    with pytest.raises(InputError, match=r"^decoder_with_past_model: expected inputs for the past, found none"):
        check_halves(later, interface_of(tokens, outputs()))
