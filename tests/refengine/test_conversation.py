"""A conversation that feeds only what is new gives the tokens of one that starts over at every turn."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from refengine.conversation import Conversation, Reply
from refengine.errors import InputError, RequestError, TokensError
from refengine.generate import generate
from refengine.kvcache import KVCache
from refengine.tokenizer import load_tokenizer
from refengine.weights import Weights
from tests.refengine.rewrites import TRAINED, trained, weights_of
from tests.refengine.strategies import configs

SPECIALS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
END = 3
# A model that writes "a" and "b" is read as "ab": many an answer does not encode to its own tokens again.
VOCABULARY = (*SPECIALS, "a", "b", "c", "ab", "abc", "ca")
MERGES = [("a", "b"), ("ab", "c"), ("c", "a")]
PLAIN = (
    "{% set turns = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% for turn in turns %}{% if turn.role != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('expected a user first, and turns') }}{% endif %}{% endfor %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = PLAIN.replace("{{ message.content }}", "{{ message.content }}{% if loop.last %}cc{% endif %}")
TEMPLATES = {"the plain template": PLAIN, "a template that marks the newest message": MARKED}

texts = st.text("abc", min_size=1, max_size=7)
turns = st.lists(st.tuples(texts, st.integers(1, 6)), min_size=2, max_size=7)


def tokenizer_of(template: str | None) -> Any:
    ids = {token: number for number, token in enumerate(VOCABULARY)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=MERGES))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)


def weights_for(**config: Any) -> Weights:
    """A random model for that tokenizer; it may choose tokens which the tokenizer does not have."""
    return weights_of(**{"vocab_size": len(VOCABULARY) + 1, "eos_token_id": END, **config})


@st.composite
def small_models(draw: st.DrawFn) -> Weights:
    """With windows of the context in which a few turns fit, and windows of attention in which fewer do."""
    config = draw(configs())
    window = config.get("sliding_window") and draw(st.integers(1, 30))
    context = {"max_position_embeddings": draw(st.integers(12, 60)), "sliding_window": window}
    return weights_for(**{**config, **context, "vocab_size": len(VOCABULARY) + draw(st.integers(0, 3))})


def encoded(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


@dataclass
class StartingOver:
    """The same conversation with no cache at all: what each turn should say, and what could be reused for it."""

    weights: Weights
    tokenizer: Any
    system: list[dict[str, str]]
    said: list[dict[str, str]]
    fed: list[int]

    def prompt(self, text: str, most: int) -> list[int] | None:
        """Of the longest history that fits, in whole exchanges; None when the message alone does not fit."""
        for left_out in range(0, len(self.said) + 1, 2):
            prompt = encoded(self.tokenizer, [*self.system, *self.said[left_out:], {"role": "user", "content": text}])
            if len(prompt) + most - 1 <= self.weights.config.max_position_embeddings:
                if left_out:
                    event("the oldest messages are left out")
                return prompt
        return None

    def reply(self, text: str, prompt: list[int], most: int) -> Reply:
        (tokens,) = generate(self.weights, [prompt], most, cache=False)
        answer = self.tokenizer.decode(tokens, skip_special_tokens=True)
        same = [old == new for old, new in zip(self.fed, prompt[:-1], strict=False)]
        reused = [*same, False].index(False)
        window = self.weights.config.sliding_window
        if window is not None and len(self.fed) >= window and reused < len(self.fed):
            reused = 0
            event("a window has dropped tokens")
        elif reused and reused < len(self.fed):
            event("the cache is cropped")
        if self.tokenizer(answer)["input_ids"] != [token for token in tokens if token != END]:
            event("an answer does not encode to its own tokens")
        self.fed = prompt + tokens[:-1]
        self.said += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return Reply(answer, tuple(tokens), reused, len(prompt) - reused)


@pytest.mark.parametrize("template", TEMPLATES)
@given(weights=small_models(), system=st.none() | st.text("abc", max_size=3), turns=turns)
def test_every_reply_is_that_of_starting_over_and_feeds_what_is_new(
    template: str, weights: Weights, system: str | None, turns: list[tuple[str, int]]
) -> None:
    tokenizer = tokenizer_of(TEMPLATES[template])
    conversation = Conversation(weights, tokenizer, system)
    over = StartingOver(weights, tokenizer, list(conversation.messages), [], [])
    for text, most in turns:
        prompt = over.prompt(text, most)
        if prompt is None:
            event("a message is refused")
            with pytest.raises(RequestError, match=r"message: .* exceed max_position_embeddings"):
                conversation.reply(text, most)
        else:
            came: list[int] = []
            reply = conversation.reply(text, most, came.append)
            assert reply == over.reply(text, prompt, most)
            assert tuple(came) == reply.tokens
        assert conversation.messages == over.system + over.said


@pytest.fixture(scope="module")
def weights() -> Weights:
    """A model that never ends an answer by itself."""
    return weights_for(max_position_embeddings=64, eos_token_id=None)


def test_a_second_turn_feeds_the_new_tokens_alone(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation(weights, tokenizer_of(PLAIN), "abc")
    conversation.reply("bb", 1)
    columns: list[int] = []
    update = KVCache.update

    def watched(cache: KVCache, layer: int, *arguments: Any) -> Any:
        if layer == 0:
            columns.append(arguments[0].shape[2])
        return update(cache, layer, *arguments)

    monkeypatch.setattr(KVCache, "update", watched)
    # These were fed: <|system|> abc <|end|> <|user|> b b <|end|> <|assistant|>; the one token of the answer was not.
    reply = conversation.reply("aa", 4)
    assert reply.reused == 8
    assert columns == [reply.fed, 1, 1, 1]
    assert reply.fed == len(encoded(conversation.tokenizer, conversation.messages[:-1])) - 8


def test_the_same_prompt_again_feeds_its_last_token(weights: Weights) -> None:
    conversation = Conversation(weights, tokenizer_of(PLAIN))
    first = conversation.reply("abc", 5)
    conversation.messages.clear()
    second = conversation.reply("abc", 5)
    assert (second.text, second.tokens, second.fed) == (first.text, first.tokens, 1)


@pytest.mark.parametrize(("window", "reused"), [(12, 0), (13, 4), (None, 4)])
def test_a_cache_whose_window_has_dropped_tokens_is_not_cropped(window: int | None, reused: int) -> None:
    weights = weights_for(model_type="mistral", sliding_window=window, eos_token_id=None)
    conversation = Conversation(weights, tokenizer_of(PLAIN), "a")
    assert conversation.reply("bbbb", 3).fed == 10  # and then two of the new tokens
    del conversation.messages[1:]
    reply = conversation.reply("c", 3)  # <|system|> a <|end|> <|user|> are as before
    prompt = encoded(conversation.tokenizer, conversation.messages[:-1])
    assert (reply.reused, reply.fed) == (reused, len(prompt) - reused)
    assert [list(reply.tokens)] == generate(weights, [prompt], 3, cache=False)


def test_a_window_that_has_dropped_tokens_does_not_hinder_what_only_goes_on() -> None:
    weights = weights_for(model_type="mistral", sliding_window=4, eos_token_id=None)
    conversation = Conversation(weights, tokenizer_of(PLAIN), "a")
    conversation.reply("bbbb", 1)
    assert conversation.reply("c", 3).reused == 10


def test_the_newest_exchanges_that_fit_are_kept_behind_the_system_message(weights: Weights) -> None:
    tokenizer = tokenizer_of(PLAIN)
    conversation = Conversation(weights, tokenizer, "ca")
    for text in ("bbbbbbbb", "ca", "cccccccc", "ab", "bbbbcccc", "abca", "bcbcbcbc"):
        reply = conversation.reply(text, 6)
    system, *rest = conversation.messages
    lengths = [len(encoded(tokenizer, [system, *rest[first:-1]])) for first in range(0, len(rest), 2)]
    assert lengths[0] > 64 - 5
    assert reply.reused + reply.fed == max(length for length in lengths if length <= 64 - 5)
    assert reply.reused == 4  # the system message and the role of the next


def test_the_context_may_be_filled_to_its_last_token(weights: Weights) -> None:
    reply = Conversation(weights, tokenizer_of(PLAIN)).reply("b", 61)
    assert (reply.fed, len(reply.tokens)) == (4, 61)  # the last one is never fed


def begun_twice(weights: Weights) -> tuple[Conversation, Conversation]:
    """Two conversations that have the same first turn behind them."""
    first, second = (Conversation(weights, tokenizer_of(PLAIN)) for _ in range(2))
    assert first.reply("ab", 3) == second.reply("ab", 3)
    return first, second


REFUSED = {
    "a message without room": (("b" * 70, 3), "message: 73 prompt tokens and 3 new ones exceed"),
    "one token too many": (("b", 62), "message: 4 prompt tokens and 62 new ones exceed"),
    "nothing to do": (("b", 0), "message: expected at least 1 new token, found 0"),
    "an empty message": (("", 3), "message: expected some text, found an empty one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_met_is_refused_and_leaves_the_conversation_as_it_was(weights: Weights, name: str) -> None:
    given, says = REFUSED[name]
    conversation, undisturbed = begun_twice(weights)
    with pytest.raises((RequestError, TokensError)) as error:
        conversation.reply(*given)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert conversation.messages == undisturbed.messages
    assert conversation.reply("c", 3) == undisturbed.reply("c", 3)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('no users here') }}", r"chat template cannot be used \(no users here\)"),
    ],
)
def test_a_template_that_is_not_there_or_does_not_render_is_refused(
    weights: Weights, template: str | None, says: str
) -> None:
    conversation = Conversation(weights, tokenizer_of(template))
    with pytest.raises(InputError, match=says):
        conversation.reply("a", 3)
    assert conversation.messages == []


def test_a_token_that_the_model_does_not_have_is_refused() -> None:
    conversation = Conversation(weights_for(vocab_size=9), tokenizer_of(PLAIN))
    with pytest.raises(RequestError, match="message: expected token ids from 0 to 8, found 9"):
        conversation.reply("ca", 3)
    assert conversation.messages == []


def failing(calls: int, error: type[BaseException], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but for the last of so many calls."""
    left = iter(range(calls - 1))

    def call(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise error
        return function(*arguments)

    return call


def check_starts_over(conversation: Conversation, undisturbed: Conversation) -> None:
    """After a reply that was broken off: the history is as before, and what comes next is fed whole."""
    assert conversation.messages == undisturbed.messages
    reply, expected = conversation.reply("c", 3), undisturbed.reply("c", 3)
    assert (reply.text, reply.tokens) == (expected.text, expected.tokens)
    assert (reply.reused, reply.fed) == (0, expected.reused + expected.fed)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("token", [1, 3])
def test_a_callback_that_fails_leaves_the_conversation_as_it_was(
    weights: Weights, token: int, error: type[BaseException]
) -> None:
    conversation, undisturbed = begun_twice(weights)
    with pytest.raises(error):
        conversation.reply("ca", 3, on_token=failing(token, error, lambda token: None))
    check_starts_over(conversation, undisturbed)


@pytest.mark.parametrize("layer", [1, 2, 3, 5])  # of the three of each pass
def test_an_interrupt_within_a_pass_leaves_the_conversation_as_it_was(weights: Weights, layer: int) -> None:
    conversation, undisturbed = begun_twice(weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVCache, "update", failing(layer, KeyboardInterrupt, KVCache.update))
        with pytest.raises(KeyboardInterrupt):
            conversation.reply("ca", 3)
    check_starts_over(conversation, undisturbed)


def test_in_float32_the_trained_model_says_what_it_says_when_it_starts_over() -> None:
    weights, tokenizer = trained(np.float32), load_tokenizer(TRAINED)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}\n\n{% endfor %}"
    conversation = Conversation(weights, tokenizer)
    before: list[int] = []
    for text in ("A class definition", "The with statement", "An expression list", "The yield statement"):
        reply = conversation.reply(text, 48)
        prompt = encoded(tokenizer, conversation.messages[:-1])
        assert [list(reply.tokens)] == generate(weights, [prompt], 48)
        assert len(before) <= reply.reused == len(prompt) - reply.fed
        before = prompt
