"""A tokenizer with the few operations the package needs, and small ones trained on the spot."""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
from typing import Iterable, Sequence

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from perl_jax import config as config_lib
from perl_jax.config import UserError

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


class Tokenizer:
    """Text <-> ids, with the rules that training and sampling share.

    A prompt goes through the chat template (one user turn, then the assistant's cue) where the
    tokenizer has one, and otherwise is bos + text. Prompt and response are tokenised apart, so the
    boundary between them is exact, and a training response ends in eos.
    """

    def __init__(self, inner: PreTrainedTokenizerBase, stop_ids: Sequence[int] = (), vocab_size: int | None = None):
        self.inner = inner
        self.vocab_size = len(inner) if vocab_size is None else vocab_size
        own = [i for i in range(self.vocab_size, len(inner)) if i not in inner.added_tokens_decoder]
        config_lib.require(not own, f"The tokenizer {inner.name_or_path} has {len(inner)} tokens, its model only {vocab_size}.")
        config_lib.require(inner.eos_token_id is not None, f"The tokenizer {inner.name_or_path} has no eos token.")
        self.eos_id: int = inner.eos_token_id
        self.bos_id: int | None = inner.bos_token_id
        # The id of padding never matters (masks do); eos is the usual stand-in for a missing one.
        self.pad_id: int = inner.pad_token_id if inner.pad_token_id is not None else self.eos_id
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys((self.eos_id, *stop_ids)))

    @classmethod
    def load(cls, folder: pathlib.Path, vocab_size: int | None = None) -> Tokenizer:
        """From a model's folder; the stop ids include every eos of its `generation_config.json`.

        vocab_size: the model's. Added tokens beyond it (Gemma 3's image token) are refused where a
        text holds one; a tokenizer whose own vocabulary is larger is refused as a whole.
        """
        try:
            inner = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # Whatever it is: the libraries below raise a bare Exception on files they cannot read.
        except Exception as error:
            raise UserError(f"{folder} holds no tokenizer that can be read: {str(error).partition(chr(10))[0]}") from error
        stops: list[int] = []
        for name in ("config.json", "generation_config.json"):
            if (folder / name).exists():
                found = config_lib.read_json(folder / name).get("eos_token_id")
                stops += found if isinstance(found, list) else [] if found is None else [found]
        return cls(inner, stops, vocab_size)

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a prompt, up to where the response begins."""
        if self.inner.chat_template:
            messages = [{"role": "user", "content": text}]
            return self._known(self.inner.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        return self._bos() + self._plain(text)

    def response_ids(self, text: str) -> list[int]:
        """Ids of a response, eos included."""
        return self._plain(text) + [self.eos_id]

    def text_ids(self, text: str) -> list[int]:
        """Ids of free text: bos + text + eos."""
        return self._bos() + self._plain(text) + [self.eos_id]

    def text(self, ids: Iterable[int]) -> str:
        """Readable text of ids, special tokens left out."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits of all that decides a text's ids: the tokenizer's own serialisation, special ids, the template.

        The serialisation holds vocabulary, merges, normaliser, pre-tokenizer, post-processor, decoder and
        added tokens. How it last padded or cut, which it holds too, is left out.
        """
        backend = getattr(self.inner, "backend_tokenizer", None)
        if backend is None:
            whole = {"kind": type(self.inner).__name__, "vocabulary": self.inner.get_vocab(), "added": repr(self.inner.added_tokens_decoder)}
        else:
            whole = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
        return config_lib.digest([whole, self.bos_id, self.eos_id, self.inner.chat_template])

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
            raise UserError(f"A text holds {names}, for which the model has no embedding (its vocabulary has {self.vocab_size} tokens).")
        return list(ids)


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
        vocab_size=vocab_size, special_tokens=list(_SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    fast.train_from_iterator(texts, trainer)
    return _wrap(fast)


def _wrap(fast: FastTokenizer) -> Tokenizer:
    pad, bos, eos, unknown = _SPECIAL
    ids = [(bos, fast.token_to_id(bos))]
    fast.post_processor = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=ids)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, bos_token=bos, eos_token=eos, pad_token=pad, unk_token=unknown))
