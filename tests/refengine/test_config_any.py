"""Whatever JSON a config.json holds, it is read or refused in one line."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.config import NEUTRAL, Config
from refengine.errors import ConfigError
from tests.checkpoints import TINY
from tests.refengine.config_files import LLAMA3, MISTRAL, ROPES

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 5) | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
KEYS = sorted(
    {
        *TINY,
        *NEUTRAL,
        "rope_parameters",
        "rope_scaling",
        "sliding_window",
        "layer_types",
        "eos_token_id",
        "dtype",
    }
)
ROPE_KEYS = sorted({"rope_theta", "type", "truncate", "beta_fast", "attention_factor", *LLAMA3})


@settings(max_examples=300)
@given(
    base=st.sampled_from([TINY, MISTRAL, *(TINY | {"rope_parameters": rope} for rope in ROPES)]),
    changes=st.dictionaries(st.sampled_from(KEYS), json_values, max_size=2),
    rope=st.dictionaries(st.sampled_from(ROPE_KEYS), json_values, max_size=2),
)
def test_any_json_is_read_or_refused_in_one_line(
    base: dict[str, Any], changes: dict[str, Any], rope: dict[str, Any]
) -> None:
    nested = {"rope_parameters": base.get("rope_parameters", {}) | rope} if rope else {}
    said = ""
    try:
        hash(Config.from_dict(json.loads(json.dumps(base | nested | changes))))
    except ConfigError as error:
        said = str(error)
    assert "\n" not in said
