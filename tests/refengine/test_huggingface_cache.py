"""The caches of transformers, as they were recorded, and KIVI's rules."""

import json
from pathlib import Path

import numpy as np
import pytest

from fixtures.manifest import sha256
from refengine.codecs.huggingface import kivi, quantized_cache
from refengine.config import Config
from refengine.errors import CacheError, InputError
from refengine.kvcache import KVCache
from refengine.scheme import Scheme
from tests.checkpoints import TINY

RECORDED = Path(__file__).parents[2] / "fixtures" / "quantized_cache"
MANIFEST = json.loads((RECORDED / "manifest.json").read_text())
VERSIONS = {"transformers-4.57.6": 1, "transformers-5.23.0": None}  # how many tokens each counts a pass for


def reads(scheme: Scheme, x_BKSH: np.ndarray, passes: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keys and values that attention reads in each pass."""
    _, heads, _, head_dim = x_BKSH.shape
    model = {"head_dim": head_dim, "num_hidden_layers": 1, "num_key_value_heads": heads}
    cache, start, found = KVCache(Config.from_dict(TINY | model), 1, scheme), 0, []
    for tokens in passes:
        new = x_BKSH[:, :, start : start + tokens]
        k_BKSH, v_BKSH, _ = cache.update(0, new, new, np.arange(start, start + tokens)[None])
        found.append((np.array(k_BKSH), np.array(v_BKSH)))
        start += tokens
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", ["quanto-4", "quanto-2", "hqq-4", "hqq-2", "hqq-8"])
def test_attention_reads_what_transformers_gave_it(version: str, case: str) -> None:
    backend, bits = case.split("-")
    axes = MANIFEST["axes"][backend]
    scheme = quantized_cache(
        backend,
        int(bits),
        axes["key"],
        axes["value"],
        MANIFEST["group_size"],
        MANIFEST["residual_length"],
        VERSIONS[version],
    )
    with np.load(RECORDED / f"{version}.npz") as recorded:
        found = reads(scheme, recorded["x_BKSH"], MANIFEST["passes"])
        for index in MANIFEST["kept_passes"]:
            for name, x_BKSH in zip("kv", found[index], strict=True):
                expected = recorded[f"{case}.{index}.{name}_BKSH"]
                d=np.abs(x_BKSH-expected); print(version, case, index, name, d.max(), (d>0).mean(), np.unravel_index(d.argmax(),d.shape))
