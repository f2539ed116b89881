"""Wraps a Hugging Face tokenizer with the rules for prompts and responses; also makes small
tokenizers.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from perl_jax.errors import UserError, require, shown
from perl_jax.hub.chat import DATE, Chat, template_of
from perl_jax.runtime import files, json_values

# Endings of the files that transformers may read for a tokenizer, and the most bytes of one.
_READ = (".json", ".jinja", ".model", ".txt")
_LARGEST, _LARGEST_TEMPLATE = 2**28, 2**24
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


class Tokenizer:
    """Converts text to ids and back, by the rules that training, sampling and scoring share.

    A prompt is rendered by the chat template (one user turn, then the assistant's cue) if there is
    one, and otherwise is bos + text. Prompt and response are tokenised separately, so the boundary
    between them is exact.

    A response ends as the template ends an assistant's turn, with the ids `turn_end_ids`. They have
    two parts:

    - `stop_part` goes up to the first token that ends a turn (`<|im_end|>`, `<end_of_turn>`, eos).
      It belongs to the response: losses include it, and sampling stops at its last token.
    - `tail_ids` is what the template writes after it, such as a newline. It is never sampled and in
      no loss. Scores are read after it, as by trainers that render whole conversations.

    Without a template the end is eos, and there is no tail.

    Sampling stops at eos too. Losses, log-probabilities and values use the tokens as sampled. A
    score uses the response as a complete turn: the tokens that ended the response (`without_end`)
    are replaced by `turn_end_ids`. So it equals the score of the same text in a row of data.

    Args:
        inner: The tokenizer of transformers.
        stop_ids: Further ids at which sampling stops, besides eos.
        vocab_size: The rows of the model's embedding; None takes the tokenizer's size.
        date: The date that chat templates get as today's.

    Attributes:
        chat: The chat template; None without one.
        vocab_size: The number of ids that the model can embed.
        bos_id: The id that begins a text, or None.
        eos_id: The id that ends a text.
        pad_id: The id used for padding.
        stop_ids: All ids at which sampling stops.
        turn_end_ids: The ids that end a response's turn: stop_part + tail_ids.

    Raises:
        UserError: The tokenizer has no eos token, does not fit the model, or has an unusable
            template.
    """

    def __init__(
        self,
        inner: PreTrainedTokenizerBase,
        stop_ids: Sequence[int] = (),
        vocab_size: int | None = None,
        date: str = DATE,
    ):
        self.inner = inner
        self.vocab_size = len(inner) if vocab_size is None else vocab_size
        own = [i for i in range(self.vocab_size, len(inner)) if i not in inner.added_tokens_decoder]
        require(
            not own,
            f"The tokenizer {inner.name_or_path} has {len(inner)} tokens, its model only "
            f"{vocab_size}.",
        )
        require(
            inner.eos_token_id is not None, f"The tokenizer {inner.name_or_path} has no eos token."
        )
        self.eos_id: int = inner.eos_token_id
        self.bos_id: int | None = inner.bos_token_id
        for name, index in (("eos", self.eos_id), ("bos", self.bos_id)):
            fits = index is None or index < self.vocab_size
            token = None if fits else inner.convert_ids_to_tokens(index)
            require(
                fits,
                f"The {name} token {token} of {inner.name_or_path} has id {index}, for which the "
                f"model has no embedding (it has {self.vocab_size}).",
            )
        # Padding is masked, so its id does not matter; eos replaces a missing one.
        pad_id: int | None = inner.pad_token_id
        self.pad_id: int = self.eos_id if pad_id is None or pad_id >= self.vocab_size else pad_id
        outside = sorted(i for i in stop_ids if not 0 <= i < self.vocab_size)
        require(
            not outside,
            f"The model of {inner.name_or_path} names {outside} as eos_token_id; it has "
            f"embeddings 0 to {self.vocab_size - 1}.",
        )
        template = template_of(inner, inner.name_or_path)
        self.chat = None if template is None else Chat(inner, template, inner.name_or_path, date)
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys((self.eos_id, *stop_ids)))
        self.turn_end_ids, stops = self._turn_end()
        self.stop_part, self.tail_ids = self.turn_end_ids[:stops], self.turn_end_ids[stops:]
        self.stop_ids = tuple(dict.fromkeys((*self.stop_ids, self.stop_part[-1])))

    def _turn_end(self) -> tuple[tuple[int, ...], int]:
        """Returns the ids that end an assistant's turn, and how many of them form the stop part.

        Without a template, or if the template's end contains no stop or special token, these are
        [eos] and 1.
        """
        ids = [] if self.chat is None else self._plain(self.chat.end)
        ends = [
            index
            for index, token in enumerate(ids)
            if token in self.stop_ids or token in self.inner.added_tokens_decoder
        ]
        return (tuple(ids), ends[0] + 1) if ends else ((self.eos_id,), 1)

    @classmethod
    def load(
        cls,
        folder: pathlib.Path,
        vocab_size: int | None = None,
        template: str = "auto",
        date: str = DATE,
    ) -> Tokenizer:
        """Returns the tokenizer of a model's folder; every eos of its configs becomes a stop id.

        Args:
            folder: The model's folder.
            vocab_size: The rows of the model's embedding. A text with an added token beyond them
                (Gemma 3's image token) is an error; so is a tokenizer whose own vocabulary is
                larger.
            template: auto (the tokenizer's own), none, or the path of a Jinja file.
            date: The date (YYYY-MM-DD) that templates get as today's.

        Raises:
            UserError: The files cannot be read, or `Tokenizer` refuses them.
        """
        for path in files.listing(folder):
            if path.suffix in _READ:
                files.require_regular(path, largest=_LARGEST)
        try:
            inner = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            # Some wrong settings are noticed only when a text is encoded.
            inner.encode(_known_word(inner), add_special_tokens=False)
        # The libraries raise a bare Exception for files that they cannot read; tokenizers, which is
        # written in Rust, also a PanicException, which is no Exception.
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            why = str(error).partition("\n")[0][:300]
            raise UserError(f"{folder} holds no tokenizer that can be read: {why}") from error
        if template != "auto":
            inner.chat_template = None if template == "none" else _read_template(template)
        stops: list[int] = []
        for name in ("config.json", "generation_config.json"):
            if files.exists(folder / name):
                found = files.read_object(folder / name).get("eos_token_id")
                ids = found if isinstance(found, list) else [] if found is None else [found]
                require(
                    all(isinstance(index, int) and not isinstance(index, bool) for index in ids),
                    f"{folder / name} has eos_token_id {shown(found)}; it must be a token's id or "
                    "a list of ids.",
                )
                stops += ids
        return cls(inner, stops, vocab_size, date)

    def prompt_ids(self, text: str) -> list[int]:
        """Returns the ids of a prompt, up to where the response begins.

        With a chat template the prompt is rendered as a user turn, unless it is already rendered.
        bos comes first without a template, or if the template begins with it.

        Args:
            text: The prompt, rendered or not.

        Raises:
            UserError: The template refuses the text, or the text contains a token for which the
                model has no embedding.
        """
        if self.chat is None:
            return self._with_bos(self._plain(text))
        if not self.is_rendered(text):
            return self._plain(self.chat.prompt(text))
        ids = self._plain(text)
        starts = self._plain(self.chat.before)[:1]
        return self._with_bos(ids) if starts == self._bos() else ids

    def is_rendered(self, text: str) -> bool:
        """Returns whether a prompt is already rendered by the chat template (`Chat.is_rendered`);
        False without a template.
        """
        return self.chat is not None and self.chat.is_rendered(text)

    def shortened_prompt(self, text: str, limit: int) -> list[int] | None:
        """Returns at most `limit` ids of a prompt that is too long: the whole template, and the end
        of the text.

        A rendered prompt first loses its oldest turns, each with its answer, then the beginning of
        the oldest text left; its system turn and its cue stay. Returns None without a template, or
        if the prompt is rendered differently from this template, because it is then unknown what
        must stay.

        Args:
            text: The prompt, rendered or not.
            limit: The largest number of ids.

        Raises:
            UserError: What must stay does not fit into `limit` ids.
        """
        chat = self.chat
        if chat is None:
            return None
        if not self.is_rendered(text):
            return self._longest_end(text, limit, lambda content: self._plain(chat.prompt(content)))
        turns = chat.turns(text)
        if turns is None:
            cue = len(self._plain(chat.after))
            require(
                cue < limit,
                f"The end of the chat template of {self.inner.name_or_path}, after a user's text, "
                f"has {cue} tokens; max_prompt_length is {limit}, which must be more.",
            )
            return None
        last = len(turns.contents) - 1
        for turn in range(0, last + 1, 2):
            ids_with = lambda content, turn=turn: self.prompt_ids(turns.from_turn(turn, content))
            if turn == last or len(ids_with("")) < limit:
                return self._longest_end(turns.contents[turn], limit, ids_with)
        raise AssertionError("the last turn returns")

    def _longest_end(
        self, text: str, limit: int, ids_with: Callable[[str], list[int]]
    ) -> list[int]:
        """Returns ids_with(end of the text) for the longest end that gives at most `limit` ids in
        total.

        Args:
            text: The text to shorten.
            limit: The largest number of ids.
            ids_with: Maps a text to the ids of the prompt that contains it.

        Raises:
            UserError: The prompt has `limit` ids or more even with an empty text.
        """
        content = self._plain(text)
        keep = min(limit, len(content))
        while keep > 0:
            # A character that is cut in two decodes to the replacement character.
            ids = ids_with(self.text(content[-keep:]).lstrip("\ufffd"))
            if len(ids) <= limit:
                return ids
            keep -= len(ids) - limit
        frame = len(ids_with(""))
        require(
            frame < limit,
            f"The chat template of {self.inner.name_or_path} has {frame} tokens of its own; "
            f"max_prompt_length is {limit}, which must be more.",
        )
        return ids_with("")

    def without_end(self, ids: Sequence[int]) -> list[int]:
        """Returns the ids of a sampled response without the tokens that end it.

        A response that ends with one of `stop_ids` loses this token, and before it the other tokens
        of the stop part as far as they are there. Any other response is returned whole.

        Args:
            ids: The sampled ids, without padding.
        """
        ids = [int(i) for i in ids]
        if not ids or ids[-1] not in self.stop_ids:
            return ids
        matching = 0
        while (
            matching < min(len(ids), len(self.stop_part))
            and ids[-1 - matching] == self.stop_part[-1 - matching]
        ):
            matching += 1
        return ids[: len(ids) - max(matching, 1)]

    def response_ids(self, text: str) -> list[int]:
        """Returns the ids of a response, followed by the stop part; the end of a turn that is
        already in the text is not repeated.

        The ids do not include the tail.
        """
        return self._plain(self._without_end(text)) + list(self.stop_part)

    def text_ids(self, text: str) -> list[int]:
        """Returns the ids of plain text: bos + text + eos."""
        return [*self._with_bos(self._plain(self._without_end(text))), self.eos_id]

    def _without_end(self, text: str) -> str:
        """Returns a text without the stop tokens and the template's end of a turn that may be
        written at its end.
        """
        ends = [self.inner.decode([i]) for i in self.stop_ids] + (
            [] if self.chat is None else [self.chat.end.strip()]
        )
        while True:
            bare = text.rstrip()
            found = next(
                (end for end in sorted(ends, key=len, reverse=True) if end and bare.endswith(end)),
                None,
            )
            if found is None:
                return text
            text = bare[: -len(found)]

    def _with_bos(self, ids: list[int]) -> list[int]:
        """Returns the ids with bos in front, once."""
        return ids if ids[:1] == self._bos() else self._bos() + ids

    def text(self, ids: Iterable[int], special_tokens: bool = False) -> str:
        """Returns the text of ids.

        Args:
            ids: The ids.
            special_tokens: Whether the text has the special tokens too.
        """
        return self.inner.decode(
            [int(i) for i in ids],
            skip_special_tokens=not special_tokens,
            clean_up_tokenization_spaces=False,
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that identify everything that decides a text's ids.

        They cover the tokenizer's serialisation (vocabulary, merges, normaliser, pre-tokenizer,
        post-processor, decoder, added tokens), the ids of bos and eos, the chat template, and the
        template date if the template reads it. The serialised state of padding and truncation is
        left out.
        """
        backend = getattr(self.inner, "backend_tokenizer", None)
        if backend is None:
            whole = {
                "kind": type(self.inner).__name__,
                "vocabulary": self.inner.get_vocab(),
                "added": repr(self.inner.added_tokens_decoder),
            }
        else:
            whole = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
        dated = [str(self.chat.date)] if self.chat is not None and self.chat.uses_date else []
        return json_values.digest(
            [whole, self.bos_id, self.eos_id, self.inner.chat_template, *dated]
        )

    @property
    def first_fingerprint(self) -> str:
        """16 hex digits that identify the vocabulary, bos, eos and the chat template: the
        fingerprint in artefacts of format 1.
        """
        vocabulary = sorted(self.inner.get_vocab().items(), key=lambda item: item[1])
        parts = (vocabulary, self.bos_id, self.eos_id, self.inner.chat_template)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.inner)

    def token_ids(self) -> dict[str, int | None]:
        """Returns {"bos": id, "eos": id, "pad": id}, for a model's `config.json`; a missing bos is
        None.
        """
        return {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}

    def save(self, folder: pathlib.Path) -> None:
        """Writes the files of the tokenizer, with its chat template, into a folder in the format of
        transformers.
        """
        self.inner.save_pretrained(folder)

    def _bos(self) -> list[int]:
        """Returns [bos], or [] if there is none."""
        return [] if self.bos_id is None else [self.bos_id]

    def _plain(self, text: str) -> list[int]:
        """Returns the ids of a text, without bos or other added tokens.

        Raises UserError if the text contains a token for which the model has no embedding.
        """
        ids = self.inner.encode(text, add_special_tokens=False)
        unknown = sorted({i for i in ids if i >= self.vocab_size})
        if unknown:
            names = ", ".join(self.inner.convert_ids_to_tokens(unknown))
            raise UserError(
                f"A text holds {names}, for which the model has no embedding (its vocabulary has "
                f"{self.vocab_size} tokens)."
            )
        return list(ids)


def _read_template(file: str) -> str:
    """Returns the text of a template file; raises UserError if it cannot be read."""
    try:
        path = files.path_of(file)
        files.require_regular(path, largest=_LARGEST_TEMPLATE)
        return files.read_text(path)
    except UserError as error:
        raise UserError(
            f"template is {shown(file)}; it must be auto, none, or a file with a Jinja template "
            f"({error})."
        ) from error


def word_tokenizer(words: Iterable[str]) -> Tokenizer:
    """Returns a tokenizer with one token for each word and `_SPECIAL`; texts are split at white
    space.

    Any other word becomes `<unk>`.

    Args:
        words: The vocabulary; repeated words count once.
    """
    vocabulary = {word: index for index, word in enumerate((*_SPECIAL, *sorted(set(words))))}
    fast = FastTokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(fast)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE tokenizer trained on texts; it can encode any string.

    Args:
        texts: The texts to learn merges from.
        vocab_size: The largest number of tokens, special tokens and the 256 bytes included.
    """
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(texts, trainer)
    return _wrap(fast)


def _wrap(fast: FastTokenizer) -> Tokenizer:
    """Returns a `Tokenizer` around a tokenizer of the tokenizers library, whose vocabulary must
    have `_SPECIAL`.
    """
    pad, bos, eos, unknown = _SPECIAL
    ids = [(bos, fast.token_to_id(bos))]
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=ids
    )
    return Tokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=fast, bos_token=bos, eos_token=eos, pad_token=pad, unk_token=unknown
        )
    )


def _known_word(inner: PreTrainedTokenizerBase) -> str:
    """Returns a word that a tokenizer can encode: of its vocabulary, which need not know all
    words and need not have a token for unknown ones; "" if it has no word of small letters.
    """
    vocabulary = inner.get_vocab()
    if "a" in vocabulary:
        return "a"
    words = (word for word in vocabulary if word.isascii() and word.isalpha() and word.islower())
    return next(words, "")
