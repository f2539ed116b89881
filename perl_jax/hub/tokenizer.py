"""A tokenizer with the few operations the package needs, and small ones trained on the spot."""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from perl_jax import errors
from perl_jax.errors import UserError
from perl_jax.hub.chat import DATE, Chat, template_of
from perl_jax.runtime import files

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


class Tokenizer:
    """Text <-> ids, with the rules that training, sampling and scoring share.

    A prompt goes through the chat template (one user turn, then the assistant's cue) where there is
    one, and otherwise is bos + text. Prompt and response are tokenised apart, so the boundary
    between them is exact.

    A response ends as the template ends the assistant's turn. turn_end_ids: those ids, in two
    parts. The stop part goes up to the first token that ends a turn (`<|im_end|>`, `<end_of_turn>`,
    eos): it belongs to the response, a loss is taken over it, and sampling stops at its last token.
    tail_ids: what the template writes after it, such as a newline. The tail is in no loss and is
    never sampled; a score is read behind it, where trainers read it that render whole
    conversations. Without a template the end is eos, and there is no tail.

    Sampling stops at eos too. Losses, log-probabilities and values are of the tokens as they were
    sampled. A score is of the response's text as a turn: what ended the response (`without_end`) is
    replaced by turn_end_ids, so that it is the score of the same text in a row of data.
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
        errors.require(
            not own,
            f"The tokenizer {inner.name_or_path} has {len(inner)} tokens, its model only "
            f"{vocab_size}.",
        )
        errors.require(
            inner.eos_token_id is not None, f"The tokenizer {inner.name_or_path} has no eos token."
        )
        self.eos_id: int = inner.eos_token_id
        self.bos_id: int | None = inner.bos_token_id
        for name, index in (("eos", self.eos_id), ("bos", self.bos_id)):
            fits = index is None or index < self.vocab_size
            token = None if fits else inner.convert_ids_to_tokens(index)
            errors.require(
                fits,
                f"The {name} token {token} of {inner.name_or_path} has id {index}, for which the "
                f"model has no embedding (it has {self.vocab_size}).",
            )
        # The id of padding never matters (masks do); eos is the usual stand-in for a missing one.
        padded = inner.pad_token_id is not None and inner.pad_token_id < self.vocab_size
        self.pad_id: int = inner.pad_token_id if padded else self.eos_id
        outside = sorted(i for i in stop_ids if not 0 <= i < self.vocab_size)
        errors.require(
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
        """The ids that end an assistant's turn, and how many of them are the stop part."""
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
        """From a model's folder; the stop ids include every eos of its `generation_config.json`.

        template: auto, the tokenizer's own; none; or a file with one in Jinja. date: what a
        template gets that asks for today's, as 2025-01-31. vocab_size: the model's. Added tokens
        beyond it (Gemma 3's image token) are refused where a text holds one; a tokenizer whose own
        vocabulary is larger is refused as a whole.
        """
        try:
            inner = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        # Whatever it is: the libraries below raise a bare Exception on files they cannot read.
        except Exception as error:
            raise UserError(
                f"{folder} holds no tokenizer that can be read: {str(error).partition(chr(10))[0]}"
            ) from error
        if template != "auto":
            inner.chat_template = None if template == "none" else _read_template(template)
        stops: list[int] = []
        for name in ("config.json", "generation_config.json"):
            if (folder / name).exists():
                found = files.read_json(folder / name).get("eos_token_id")
                stops += found if isinstance(found, list) else [] if found is None else [found]
        return cls(inner, stops, vocab_size, date)

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a prompt, up to where the response begins. One that is rendered already is left as
        it is.
        """
        if self.chat is None:
            return self._begun(self._plain(text))
        if not self.is_rendered(text):
            return self._plain(self.chat.prompt(text))
        ids = self._plain(text)
        starts = self._plain(self.chat.before)[:1]
        return self._begun(ids) if starts == self._bos() else ids

    def is_rendered(self, text: str) -> bool:
        """Whether a prompt already ends with the template's cue for the assistant."""
        return self.chat is not None and self.chat.is_rendered(text)

    def shortened_prompt(self, text: str, limit: int) -> list[int] | None:
        """At most `limit` ids of a longer prompt: the template whole, the text without its
        beginning.

        A prompt that came rendered loses its first turns, each with its answer, and then the
        beginning of the first text that is left; its system turn and the cue stay. None where no
        template is used, or the prompt is rendered otherwise than this template renders: nobody
        knows then what to keep. UserError where what has to stay has more than `limit` tokens.
        """
        if self.chat is None:
            return None
        if not self.is_rendered(text):
            return self._longest(
                text, limit, lambda content: self._plain(self.chat.prompt(content))
            )
        turns = self.chat.turns(text)
        if turns is None:
            cue = len(self._plain(self.chat.after))
            errors.require(
                cue < limit,
                f"The end of the chat template of {self.inner.name_or_path}, after a user's text, "
                f"has {cue} tokens; max_prompt_length is {limit}, which must be more.",
            )
            return None
        last = len(turns.contents) - 1
        for turn in range(0, last + 1, 2):
            ids_with = lambda content, turn=turn: self.prompt_ids(turns.begun(turn, content))
            if turn == last or len(ids_with("")) < limit:
                return self._longest(turns.contents[turn], limit, ids_with)
        raise AssertionError("the last turn returns")

    def _longest(self, text: str, limit: int, ids_with: Callable[[str], list[int]]) -> list[int]:
        """ids_with(the longest end of the text) that are at most `limit`; UserError where they are
        more without any text.
        """
        content = self._plain(text)
        keep = min(limit, len(content))
        while keep > 0:
            # A character that is cut in two decodes to a replacement sign.
            ids = ids_with(self.text(content[-keep:]).lstrip("\ufffd"))
            if len(ids) <= limit:
                return ids
            keep -= len(ids) - limit
        frame = len(ids_with(""))
        errors.require(
            frame < limit,
            f"The chat template of {self.inner.name_or_path} has {frame} tokens of its own; "
            f"max_prompt_length is {limit}, which must be more.",
        )
        return ids_with("")

    def without_end(self, ids: Sequence[int]) -> list[int]:
        """A sampled response without the tokens that end it: a stop token, and what is before it of
        the stop part.
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
        """Ids of a response, up to the token that ends the turn. An end that the text has already
        is not written twice.
        """
        return self._plain(self._without_end(text)) + list(self.stop_part)

    def text_ids(self, text: str) -> list[int]:
        """Ids of free text: bos + text + eos."""
        return [*self._begun(self._plain(self._without_end(text))), self.eos_id]

    def _without_end(self, text: str) -> str:
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

    def _begun(self, ids: list[int]) -> list[int]:
        """With bos in front, once."""
        return ids if ids[:1] == self._bos() else self._bos() + ids

    def text(self, ids: Iterable[int]) -> str:
        """Readable text of ids, special tokens left out."""
        return self.inner.decode(
            [int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits of all that decides a text's ids: the tokenizer's own serialisation,
        special ids, the template.

        The serialisation holds vocabulary, merges, normaliser, pre-tokenizer, post-processor,
        decoder and added tokens. How it last padded or cut, which it holds too, is left out.
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
        return files.digest([whole, self.bos_id, self.eos_id, self.inner.chat_template, *dated])

    @property
    def first_fingerprint(self) -> str:
        """As artefacts of format 1 have it: over the vocabulary, bos, eos and the chat template."""
        vocabulary = sorted(self.inner.get_vocab().items(), key=lambda item: item[1])
        parts = (vocabulary, self.bos_id, self.eos_id, self.inner.chat_template)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.inner)

    def token_ids(self) -> dict[str, int | None]:
        """bos, eos and pad, for a model's `config.json`."""
        return {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}

    def save(self, folder: pathlib.Path) -> None:
        """Writes the tokenizer's files beside a model's weights."""
        self.inner.save_pretrained(folder)

    def _bos(self) -> list[int]:
        return [] if self.bos_id is None else [self.bos_id]

    def _plain(self, text: str) -> list[int]:
        return self._known(self.inner.encode(text, add_special_tokens=False))

    def _known(self, ids: Sequence[int]) -> list[int]:
        unknown = sorted({i for i in ids if i >= self.vocab_size})
        if unknown:
            names = ", ".join(self.inner.convert_ids_to_tokens(unknown))
            raise UserError(
                f"A text holds {names}, for which the model has no embedding (its vocabulary has "
                f"{self.vocab_size} tokens)."
            )
        return list(ids)


def _read_template(file: str) -> str:
    path = pathlib.Path(file).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"template is {file!r}; it must be auto, none, or a file with a Jinja template "
            f"({error})."
        ) from error


def word_tokenizer(words: Iterable[str]) -> Tokenizer:
    """One token a word over a closed vocabulary, split at spaces."""
    vocabulary = {word: index for index, word in enumerate((*_SPECIAL, *sorted(set(words))))}
    fast = FastTokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(fast)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer trained on texts; every string can be encoded."""
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
