"""The tokenizer inside a GGUF file, rebuilt with the `tokenizers` library."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from refengine.errors import InputError
from refengine.gguf_file import GgufFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # values of tokenizer.ggml.token_type


@dataclass(frozen=True)
class Splitting:
    """How a byte-level BPE cuts text before merging, and what llama.cpp assumes where the file does not say.

    `regex` None is GPT-2's own. `whole_words` takes a piece that is in the vocabulary as it is, unmerged.
    """

    regex: str | None = None
    single_digits: bool = False
    whole_words: bool = False
    add_bos_token: bool = False


LLAMA3 = Splitting(
    regex=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    whole_words=True,
    add_bos_token=True,
)
TEKKEN = Splitting(
    regex=r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    whole_words=True,
    add_bos_token=True,
)
SPLITTINGS: Mapping[str, Splitting] = {
    "gpt-2": Splitting(),
    "smollm": Splitting(single_digits=True),
    "starcoder": Splitting(single_digits=True),
    "refact": Splitting(single_digits=True),
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "llama-bpe": LLAMA3,
    "tekken": TEKKEN,
}


def gguf_backend(file: GgufFile) -> "Tokenizer":
    """The tokenizer that a GGUF file describes, as one of the `tokenizers` library.

    Raises:
        InputError: it is of a kind that is not supported, or incomplete.

    Source: llama.cpp, src/llama-vocab.cpp, for what each `tokenizer.ggml.pre` means.
    """
    kind, described = file.value("tokenizer.ggml.model"), file.section("tokenizer.ggml.")
    if not described.get("tokens"):
        raise InputError(f"{file.path}: no tokenizer.ggml.tokens; expected a GGUF file with its tokenizer")
    if kind not in ("gpt2", "llama"):
        raise InputError(
            f"{file.path}: tokenizer.ggml.model: expected 'gpt2' or 'llama', found {kind!r}, which is not "
            "supported; give a checkpoint directory with the model's tokenizer.json"
        )
    splitting = _splitting(file) if kind == "gpt2" else None
    # Files older than add_bos_token leave it to the reader, which goes by the kind.
    described.setdefault("add_bos_token", splitting.add_bos_token if splitting else True)
    with TokenizerErrors(file.path):
        vocab = {token: index for index, token in enumerate(described["tokens"])}
        if splitting:
            backend = _byte_level_backend(vocab, described, splitting)
        else:
            backend = _sentencepiece_backend(vocab, described)
        _add_tokens(backend, described)
        return backend


def _splitting(file: GgufFile) -> Splitting:
    pre = file.value("tokenizer.ggml.pre")
    if not isinstance(pre, str) or pre not in SPLITTINGS:
        raise InputError(
            f"{file.path}: tokenizer.ggml.pre: expected one of {', '.join(SPLITTINGS)}, found {pre!r}, which "
            "is not supported; give a checkpoint directory with the model's tokenizer.json"
        )
    return SPLITTINGS[pre]


def _byte_level_backend(vocab: dict[str, int], described: Mapping[str, Any], splitting: Splitting) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pairs = (merge.partition(" ") for merge in described.get("merges", ()))
    merges = [(left, right) for left, _, right in pairs]
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=splitting.whole_words))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if splitting.single_digits else []
    if splitting.regex is not None:
        steps.append(pre_tokenizers.Split(Regex(splitting.regex), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.regex is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_backend(vocab: dict[str, int], described: Mapping[str, Any]) -> "Tokenizer":
    """Like sentencepiece, puts a space before the text and after special tokens, even where one is there.

    It merges whichever neighbours make the piece of the highest score: every way to make a piece of two
    others is a merge, ranked by the score of the whole.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    by_score = sorted(zip(described["tokens"], described["scores"], strict=True), key=lambda piece: -piece[1])
    halves = ((whole[:cut], whole[cut:]) for whole, _ in by_score for cut in range(1, len(whole)))
    merges = [(left, right) for left, right in halves if left in vocab and right in vocab]
    backend = Tokenizer(models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True))
    prefix = described.get("add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + ([decoders.Strip(content=" ", left=1)] if prefix else []))
    return backend


def _add_tokens(backend: "Tokenizer", described: Mapping[str, Any]) -> None:
    """Control tokens and user-defined words are found whole in the text, before anything is cut or merged.

    BOS and EOS come around the text where the file asks for them.
    """
    from tokenizers import AddedToken, processors

    types = list(zip(described["tokens"], described.get("token_type", ()), strict=False))
    special = [token for token, kind in types if kind in (UNKNOWN, CONTROL)]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    defined = [token for token, kind in types if kind == USER_DEFINED]
    backend.add_tokens([AddedToken(token, normalized=False) for token in defined])

    wanted = [end for end in ("bos", "eos") if described.get(f"add_{end}_token")]
    ids = {end: described[f"{end}_token_id"] for end in wanted if f"{end}_token_id" in described}
    if ids:
        around = {end: described["tokens"][token] for end, token in ids.items()}
        single = [piece for piece in (around.get("bos"), "$A", around.get("eos")) if piece is not None]
        named = [(around[end], token) for end, token in ids.items()]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=named)


class TokenizerErrors:
    """Turns what the tokenizer libraries raise on damaged files into an InputError that names the file.

    There is no narrower class to expect: `tokenizers` raises the bare Exception, transformers a dozen kinds.
    """

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, InputError):
            raise InputError(
                f"{self.path}: the tokenizer cannot be read ({one_line(error)}); copy or download it again"
            ) from error


def one_line(error: BaseException) -> str:
    """What an error says, on one line; its class where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
