"""A conversation, turn by turn: what the model has read already is not fed to it again."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from refengine.errors import CacheError, TokensError
from refengine.generate import decode, new_cache
from refengine.kvcache import KVCache
from refengine.requests import check_request
from refengine.tokenizer import Message, encode_chat
from refengine.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Reply:
    """The assistant's answer, and what it took.

    Attributes:
        text: without special tokens, as it stands in the history.
        tokens: as they were chosen; an end token is the last.
        reused: tokens of the prompt that the cache held already.
        fed: the other tokens of the prompt.
    """

    text: str
    tokens: tuple[int, ...]
    reused: int
    fed: int


@dataclass(frozen=True)
class _Read:
    """What the model has read: a cache of one row, and every token that was fed to it."""

    cache: KVCache
    tokens: list[int]


class Conversation:
    """A greedy conversation with a model; each answer is the one that the model gives when it reads everything afresh.

    The prompt of each turn is rendered from `messages` as they are. What follows the longest common prefix with the
    tokens that were fed before is cropped from the cache and read anew: an answer that its text does not encode to
    again, or a template that writes old messages otherwise, costs time and nothing else.

    Args:
        weights: the model.
        tokenizer: as `load_tokenizer` gives it, with a chat template.
        system: the message that stands before all others; None for what the template does without one.
    """

    def __init__(self, weights: Weights, tokenizer: "PreTrainedTokenizerBase", system: str | None = None):
        self.weights = weights
        self.tokenizer = tokenizer
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._read = self._nothing_read()

    def reply(self, text: str, max_new_tokens: int, on_token: Callable[[int], None] = lambda token: None) -> Reply:
        """The assistant's answer to the user's next message; both join the history.

        When the conversation no longer fits `max_position_embeddings`, the model is not shown its oldest messages:
        what is left of it begins with a user's message, behind the system's. Where this raises, or is interrupted, the
        history is as it was before.

        Args:
            text: the user's message.
            max_new_tokens: most tokens of the answer, from 1; room is kept for so many.
            on_token: called with each token as it is chosen.

        Raises:
            TokensError: the text is empty.
            RequestError: this message alone, with the system's, leaves no room for so many new tokens; or none is asked
                for; or the tokenizer gives a token that the model does not have.
            InputError: there is no chat template, or one that does not render these messages.
            MissingPackage: the chat template needs a package that is not installed.
        """
        if not text:
            raise TokensError("message: expected some text, found an empty one")
        message = {"role": "user", "content": text}
        prompt = self._prompt([*self.messages, message], max_new_tokens)
        # Until this turn is over nothing counts as read: a pass that is broken off leaves half a cache.
        read, self._read = self._read, self._nothing_read()
        cache, reused = self._cropped(read, prompt)
        token_ids_BT, positions_BT = np.array([prompt[reused:]]), np.arange(reused, len(prompt))[None]
        (tokens,) = decode(
            self.weights, token_ids_BT, positions_BT, max_new_tokens, cache, on_token=lambda row, token: on_token(token)
        )
        self._read = _Read(cache, prompt + tokens[:-1])  # the last one was chosen, and not fed
        (answer,) = self.tokenizer.batch_decode([tokens], skip_special_tokens=True)
        self.messages.extend([message, {"role": "assistant", "content": answer}])
        return Reply(answer, tuple(tokens), reused, len(prompt) - reused)

    def _prompt(self, messages: list[Message], max_new_tokens: int) -> list[int]:
        """The tokens of the system's message and of as many of the newest messages as fit; the last is a user's."""
        config = self.weights.config
        most = config.max_position_embeddings - (max_new_tokens - 1)  # the last new token is never fed
        system = messages[:1] if messages[0]["role"] == "system" else []
        prompt: list[int] = []
        for first, message in enumerate(messages):
            if message["role"] == "user":
                prompt = encode_chat(self.tokenizer, [*system, *messages[first:]])
                if len(prompt) <= most:
                    break
        check_request(config, prompt, max_new_tokens, name="message")
        return prompt

    def _cropped(self, read: _Read, prompt: list[int]) -> tuple[KVCache, int]:
        """The cache of the tokens that were read and begin the prompt too, and their number: never the whole prompt."""
        common = takewhile(lambda pair: pair[0] == pair[1], zip(read.tokens, prompt[:-1], strict=False))
        reused = len(list(common))
        try:
            read.cache.crop(read.cache.length - (len(read.tokens) - reused))
        except CacheError:  # a sliding window has dropped tokens that would be seen again
            return self._nothing_read().cache, 0
        return read.cache, reused

    def _nothing_read(self) -> _Read:
        return _Read(new_cache(self.weights, 1), [])
