"""Mistakes in the rotary embedding, and in the positions that it goes by."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from refengine.config import Config, RopeParameters
from refengine.rope import rope_inverse_frequencies
from verify.causes import Cause, Evidence, Family
from verify.causes.constants import HALF_ULP, SAME, is_close, misread, shortest
from verify.causes.rotating import (
    SHORT_DTYPES,
    Rotate,
    as_row_0,
    at_positions,
    by_column,
    by_slot,
    heads_shifted,
    held_at_first,
    later,
    multiplied_tables,
    rounded_tables,
    said,
    turned,
    with_rope,
)
from verify.naming.counterfactual import Counterfactual, Layers

USUAL_THETA = (1e4, 5e5, 1e6, 1e5)
USUAL_FACTORS = (2.0, 4.0, 8.0)  # of linear scaling
OF_LLAMA3 = (8.0, 32.0)  # the factors of Llama 3.1 and 3.2
OFFSETS = (1, -1, 2, -2)
WITHIN_HALF = 2.0**-8  # relative: what rounding to bfloat16 may take of a table's first number
LARGEST_EXPONENT = 100.0  # of e; the largest base that anybody uses is below e**20


def rope_interleaved(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """The rotation turns dimension 2p with 2p + 1, where the checkpoint pairs p with p + head_dim / 2.

    Seen: position 0 is right, every later one wrong; so are the keys of the first layer, its values are not.
    Why: the paper, Meta's own files and GPT-J pair neighbours, Hugging Face's checkpoints pair halves; q_proj and
        k_proj are permuted for one of them.
    Test: the reference with that pairing, in queries and keys or in one of them alone.
    Fix: export with the half-split rotation (interleaved=0), or permute the rows of q_proj and k_proj for the other.
    Source: llama.cpp #2376; arXiv 2104.09864, equation 34.
    """

    def turn(right: Rotate) -> Rotate:
        def rotate(x_BTMH: np.ndarray, cos_BTP: np.ndarray, sin_BTP: np.ndarray) -> np.ndarray:
            halves_BTMH = np.concatenate([x_BTMH[..., ::2], x_BTMH[..., 1::2]], axis=-1)
            turned_BTMH = right(halves_BTMH, cos_BTP, sin_BTP)
            return np.stack(np.split(turned_BTMH, 2, axis=-1), axis=-1).reshape(x_BTMH.shape)

        return rotate

    if evidence.own is not None and evidence.own.permutes_heads:
        return  # then it is the rows that are other than the rotation wants them: qk-permuted
    read = [layers for _, layers in misread(evidence, "rotary_interleaved", lambda value: not value)]
    for layers in dict.fromkeys([*read, *evidence.suspects]):
        yield from turned("rope-interleaved", evidence.config, layers, turn)


def rope_missing(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """Queries and keys are not rotated.

    Seen: position 0 is right, every later one wrong; so are the keys of the first layer, its values are not.
    Why: an attention operator was expected to rotate (do_rotary=0), or layers were taken for ones without positions.
    Test: the reference without the rotation, of queries and keys or of one of them alone.
    Fix: rotate before the cache, or let the operator do it (GroupQueryAttention: do_rotary=1 with its tables).
    Source: onnxruntime's docs/ContribOperators.md, GroupQueryAttention: do_rotary is 0 unless it is given.
    """
    read = [layers for _, layers in misread(evidence, "do_rotary", bool)]
    for layers in dict.fromkeys([*read, *evidence.suspects]):
        yield from turned("rope-missing", evidence.config, layers, lambda _: lambda x_BTMH, *table: x_BTMH)


def rope_theta(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """The frequencies of the rotation are made of another base than rope_theta.

    Seen: position 0 is right, and the further a token is from what it attends to, the more it is off.
    Why: rope_theta was not read (newer files have it inside rope_parameters), and a default of 10000 was taken.
    Test: the reference with that rope_theta; it is read from the graph's frequencies or tables, or solved for.
    Fix: export again with rope_theta of config.json.
    Source: llama.cpp #2768 and #3090.
    """
    config, right = evidence.config, evidence.config.rope_parameters

    def with_theta(layers: Layers, theta: float) -> Counterfactual:
        return with_rope("rope-theta", {"rope_theta": theta}, layers, lambda rope: replace(rope, rope_theta=theta))

    for inv_freq, layers in misread(evidence, "inv_freq", lambda read: _has(config, right, read)):
        bases = (replace(right, rope_theta=theta) for theta in _bases(inv_freq))
        yield from (with_theta(layers, rope.rope_theta) for rope in bases if _has(config, rope, inv_freq))
    for layers in evidence.suspects:
        for theta in USUAL_THETA:
            if theta != right.rope_theta:
                yield with_theta(layers, theta)
        yield Family(partial(with_theta, layers), 10.0, 1e8)


def _bases(inv_freq: Sequence[float]) -> Iterator[float]:
    """The bases that the first frequency makes with the last, which tells it best, and with the second.

    Scaling divides the first two alike, or leaves them alone.
    """
    for place in dict.fromkeys((len(inv_freq) - 1, 1)):
        if 0 < place < len(inv_freq) and inv_freq[0] > inv_freq[place] > 0:
            steps = len(inv_freq) / place
            exponent = steps * math.log(inv_freq[0] / inv_freq[place])
            if exponent < LARGEST_EXPONENT:
                yield shortest(math.exp(exponent), 2 * steps * HALF_ULP)


def rope_scaling(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """The rotation is scaled otherwise than config.json says: not at all, by another factor, or in another way.

    Seen: position 0 is right; long distances are off, short ones may look right.
    Why: rope_scaling was not read, its type was not known, or older files were extended by a flag of the runtime.
    Test: the reference with the scaling dropped, of another type, or of another factor, or with another attention
        factor of cos and sin; read from the graph's frequencies, or solved for.
    Fix: export again with the rope parameters of config.json.
    Source: llama.cpp #8650; transformers' modeling_rope_utils.py for the types.
    """
    config, right = evidence.config, evidence.config.rope_parameters

    def scaled(layers: Layers, rope: RopeParameters) -> Counterfactual:
        return with_rope("rope-scaling", said(rope), layers, lambda was: replace(rope, rope_theta=was.rope_theta))

    def by_factor(layers: Layers, factor: float) -> Counterfactual:
        rope_type = "linear" if right.rope_type == "default" else right.rope_type
        return scaled(layers, replace(right, rope_type=rope_type, factor=factor))

    for inv_freq, layers in misread(evidence, "inv_freq", lambda read: _has(config, right, read)):
        unscaled_P = _frequencies(config, RopeParameters("default", right.rope_theta))
        factors = sorted(
            {shortest(one / other, 2 * HALF_ULP) for one, other in zip(unscaled_P, inv_freq, strict=True) if other > 0}
        )
        for rope in _scalings(right, factors):
            if _has(config, rope, inv_freq):
                yield scaled(layers, rope)
    longest = config.max_position_embeddings
    usual = rope_inverse_frequencies(right, config.head_dim, longest, longest)[1]
    for factor, layers in misread(evidence, "attention_factor", lambda read: is_close(read, usual, WITHIN_HALF)):
        yield multiplied_tables({"attention_factor": shortest(factor)}, layers, factor / usual)
    for layers in evidence.suspects:
        for rope in _scalings(right, USUAL_FACTORS):
            yield scaled(layers, rope)
        yield Family(partial(by_factor, layers), 1.01, 64.0)


def _scalings(right: RopeParameters, factors: Sequence[float]) -> Iterator[RopeParameters]:
    """Other scalings than the right one, the likeliest first, with these factors where any is as likely."""
    plain = RopeParameters("default", right.rope_theta)
    if right.rope_type != "default":
        yield plain
    if right.rope_type == "yarn":
        yield replace(right, attention_factor=1.0)
    for factor in factors:
        if right.factor is not None and factor != right.factor:
            yield replace(right, factor=factor)
    for factor in dict.fromkeys([*factors, *([right.factor] if right.factor else [])]):
        if (right.rope_type, right.factor) != ("linear", factor):
            yield replace(plain, rope_type="linear", factor=factor)
    for factor in OF_LLAMA3:
        of_llama3 = RopeParameters("llama3", right.rope_theta, factor, 1.0, 4.0, 8192)
        if right.rope_type != "llama3":
            yield of_llama3


def _frequencies(config: Config, rope: RopeParameters) -> np.ndarray:
    longest = config.max_position_embeddings
    return rope_inverse_frequencies(rope, config.head_dim, longest, longest)[0]


def _has(config: Config, rope: RopeParameters, inv_freq: Sequence[float]) -> bool:
    """Whether these settings give the frequencies that were read."""
    return np.allclose(inv_freq, _frequencies(config, rope), rtol=SAME, atol=0)


def rope_table_precision(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """cos and sin, the frequencies they are made of, or the angles, are rounded to 16 bits.

    Seen: near position 0 almost nothing, and more the longer a prompt is.
    Why: the model was cast to 16 bits as a whole, with the buffers of its rotary embedding.
    Test: the reference with the tables, frequencies or angles rounded to float16 or bfloat16.
    Fix: keep the frequencies and the tables in float32, and cast what was rotated.
    Source: transformers #25681 and #29496.
    """
    for layers in evidence.suspects:
        for dtype in SHORT_DTYPES:
            for what in ("table", "inv_freq", "angles"):
                yield rounded_tables({"dtype": dtype, "what": what}, layers)


def rope_table_short(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """The table of cos and sin ends before the sequence does: later positions take its last row, or begin anew.

    Seen: everything is right up to one position, and wrong from there on.
    Why: the table was made for the length of the example, or for original_max_position_embeddings.
    Test: the reference with positions held at the last row of a table of that length, or taken modulo its length.
    Fix: make the table max_position_embeddings long, or compute angles from positions.
    Source: onnxruntime-genai #383.
    """
    config, longest = evidence.config, evidence.longest
    given = (config.max_position_embeddings, config.rope_parameters.original_max_position_embeddings or 0)

    def short(layers: Layers, ends: str, length: float) -> Counterfactual:
        whole = round(length)

        def change(positions_BT: np.ndarray) -> np.ndarray:
            return positions_BT % whole if ends == "wraps" else np.minimum(positions_BT, whole - 1)

        return at_positions("rope-table-short", {"length": whole, "ends": ends}, layers, change)

    for length, layers in misread(evidence, "rope_table_length", lambda length: length >= longest):
        yield from (short(layers, ends, length) for ends in ("holds", "wraps"))
    for layers in evidence.suspects if longest > 2 else ():
        for length in dict.fromkeys(length for length in given if 0 < length < longest):
            yield from (short(layers, ends, length) for ends in ("holds", "wraps"))
        for ends in ("holds", "wraps"):
            yield Family(partial(short, layers, ends), 1.0, longest - 1.0)


def position_offset(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """Some tokens are rotated for another position than they stand at.

    Seen: the prompt is right and every later step wrong; or, where queries alone are shifted, all but nothing right.
        A shift of all positions by the same number changes keys and no output.
    Why: positions of a step are not moved on by the length of the past, or are counted from 1.
    Test: the reference with the new tokens shifted, held or begun anew; with queries or keys alone shifted.
    Fix: feed position_ids that go on from the past, or compute them from the attention mask's sum.
    Source: transformers' generation utilities: position_ids are cumsum(attention_mask) - 1.
    """
    name = "position-offset"

    def shifted(offset: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda positions_BT: positions_BT + offset

    for layers in evidence.suspects:
        if evidence.use_cache:
            of = {"of": "new tokens"}
            for offset in OFFSETS:
                yield at_positions(name, {"offset": offset} | of, layers, later(shifted(offset)), is_causal=False)
            yield at_positions(name, {"position": 0} | of, layers, later(np.zeros_like), is_causal=False)
            if layers is None:
                yield Counterfactual(name, {"position": "held"} | of, fed=held_at_first, is_causal=False)
        for offset in OFFSETS[:2]:
            for heads in ("queries", "keys"):
                yield heads_shifted(name, evidence.config, layers, offset, heads)


def positions_ignore_padding(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """Positions are counted in columns of the batch, padding included, for some of the tokens of a row.

    Seen: right one prompt at a time, and for the longest row of a batch; wrong in the padded ones from some step on.
    Why: arange over columns for the prompt and a count of the mask for later tokens, or the other way round; or the
        positions of one row taken for all. Counted in columns throughout, a row is shifted as a whole, and no output
        differs.
    Test: the reference with columns in the prompt, in later steps, or the positions of row 0 in all rows.
    Fix: position_ids = cumsum(attention_mask) - 1, for each row, in every step.
    Source: optimum #1381 and #877.
    """
    if not evidence.is_padded:
        return
    for layers in evidence.suspects:
        ways = {"prompts by column": by_column, "new tokens by slot": later(by_slot)} if evidence.use_cache else {}
        for counted, change in (ways | {"as row 0": as_row_0}).items():
            yield at_positions(
                *("positions-ignore-padding", {"counted": counted}, layers, change),
                is_causal=counted not in ways,
                is_of_batches=True,
            )


CAUSES: Sequence[Cause] = (
    rope_interleaved,
    rope_theta,
    rope_scaling,
    rope_missing,
    rope_table_precision,
    rope_table_short,
    position_offset,
    positions_ignore_padding,
)
