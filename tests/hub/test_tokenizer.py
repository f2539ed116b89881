"""Tokenizers: where prompts and responses begin and end, stop ids, fingerprints."""

from __future__ import annotations

import json
import pathlib

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from perl_jax.errors import UserError
from perl_jax.hub import tokenizer as tokenizer_lib
from perl_jax.hub.tokenizer import Tokenizer
from tests.paths import STORIES

needs_stories = pytest.mark.skipif(
    STORIES is None or not STORIES.is_dir(), reason="no stories260k model here"
)
TEXTS = ["a small coffee with oat milk", "two tickets for the film at eight", "nothing else"]
CHAT = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}{% if "
    "add_generation_prompt %}<s> assistant{% endif %}"
)


def words(*more: str, template: str | None = None) -> Tokenizer:
    tokenizer = tokenizer_lib.word_tokenizer([*["the", "cat", "sat", "user", "assistant"], *more])
    tokenizer.inner.chat_template = template
    return Tokenizer(tokenizer.inner)


def test_prompt_begins_with_bos_and_response_ends_with_eos():
    # <pad> <s> </s> <unk>, then the words in order: assistant cat sat the user.
    tokenizer = words()
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (
        0,
        1,
        2,
        (2,),
    )
    assert tokenizer.prompt_ids("the cat") == [1, 7, 5]
    assert tokenizer.response_ids("sat dog") == [6, 3, 2]
    assert tokenizer.text_ids("the cat") == [1, 7, 5, 2]
    assert tokenizer.response_ids("") == [2] and tokenizer.prompt_ids("") == [1]
    assert len(tokenizer) == 9 and tokenizer.token_ids() == {"bos": 1, "eos": 2, "pad": 0}
    assert tokenizer.text([1, 7, 5, 2, 0]) == "the cat"


def test_a_chat_template_makes_the_prompt():
    # One user turn and the assistant's cue; the template's own special tokens, no second bos.
    tokenizer = words(template=CHAT)
    assert tokenizer.prompt_ids("the cat") == [1, 8, 7, 5, 2, 1, 4]
    assert tokenizer.response_ids("sat") == [6, 2]


def test_without_bos_or_pad():
    fast = FastTokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>"))
    assert tokenizer.bos_id is None and tokenizer.pad_id == tokenizer.eos_id == 2
    assert tokenizer.prompt_ids("b") == [1] and tokenizer.text_ids("b") == [1, 2]


def test_without_eos_is_refused():
    fast = FastTokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(UserError, match="no eos token"):
        Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast))


def write_json(folder: pathlib.Path, name: str, **values) -> None:
    (folder / name).write_text(json.dumps(values))


def test_stop_ids_are_every_eos_a_model_names(tmp_path):
    words(template=CHAT).save(tmp_path)
    assert Tokenizer.load(tmp_path).stop_ids == (2,)
    write_json(tmp_path, "generation_config.json", eos_token_id=[5, 2, 7])
    assert Tokenizer.load(tmp_path).stop_ids == (2, 5, 7)
    write_json(tmp_path, "config.json", model_type="llama", eos_token_id=4)
    write_json(tmp_path, "generation_config.json", eos_token_id=None)
    assert Tokenizer.load(tmp_path).stop_ids == (2, 4)


def test_a_saved_tokenizer_is_the_same(tmp_path):
    for tokenizer in (words(template=CHAT), tokenizer_lib.train_bpe(TEXTS, 280)):
        folder = tmp_path / tokenizer.fingerprint
        tokenizer.save(folder)
        again = Tokenizer.load(folder)
        assert again.fingerprint == tokenizer.fingerprint and len(again) == len(tokenizer)
        for method in ("prompt_ids", "response_ids", "text_ids"):
            assert getattr(again, method)("the cat sat") == getattr(tokenizer, method)(
                "the cat sat"
            )


def test_fingerprint_tells_what_matters():
    other_eos = Tokenizer(words().inner)
    other_eos.eos_id = 5
    prints = [
        words().fingerprint,
        words("dog").fingerprint,
        words(template=CHAT).fingerprint,
        words(template=CHAT + " ").fingerprint,
        other_eos.fingerprint,
    ]
    assert len(set(prints)) == 5 and words().fingerprint == prints[0] and len(prints[0]) == 16


def test_bpe_gives_every_string_back():
    tokenizer = tokenizer_lib.train_bpe(TEXTS * 4, 300)
    assert 260 <= len(tokenizer) <= 300
    assert len(tokenizer.response_ids(TEXTS[0])) < len(TEXTS[0]) / 2
    for text in (*TEXTS, "unseen: 5 €\nnew line", " leading space", "日本 🙂", "it 's , so ."):
        assert tokenizer.text(tokenizer.text_ids(text)) == text
    # Prompt and response are cut apart exactly where the text is.
    assert (
        tokenizer.text(tokenizer.prompt_ids("a small"))
        + tokenizer.text(tokenizer.response_ids(" coffee"))
        == "a small coffee"
    )


@pytest.mark.parametrize(
    "content", [None, "{}", "not json", '{"added_tokens": [], "model": {"type": "Unknown"}}']
)
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
        write_json(
            tmp_path,
            "tokenizer_config.json",
            tokenizer_class="PreTrainedTokenizerFast",
            eos_token="</s>",
        )
    with pytest.raises(UserError, match=f"{tmp_path} holds no tokenizer"):
        Tokenizer.load(tmp_path)


@needs_stories
def test_stories_tokenizer():
    tokenizer = Tokenizer.load(STORIES)
    assert (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
        tokenizer.stop_ids,
        len(tokenizer),
    ) == (1, 2, 0, (2,), 512)
    ids = tokenizer.prompt_ids("Once upon a time")
    assert ids[0] == 1 and 1 not in ids[1:] and 2 not in ids
    assert tokenizer.text(ids) == "Once upon a time"


def test_added_tokens_beyond_the_models_vocabulary_are_refused_where_a_text_holds_one(tmp_path):
    inner = words().inner
    size = len(inner)
    inner.add_special_tokens({"additional_special_tokens": ["<image>"]})
    inner.save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path, size)
    assert max(tokenizer.text_ids("a b")) < size
    for ids in (tokenizer.prompt_ids, tokenizer.response_ids, tokenizer.text_ids):
        with pytest.raises(
            UserError,
            match="A text holds <image>, for which the model has no embedding .its vocabulary "
            f"has {size} tokens",
        ):
            ids("a <image> b")
    assert Tokenizer.load(tmp_path, size + 1).text_ids("<image>")[1] == size


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    words().save(tmp_path)
    size = len(words())
    with pytest.raises(UserError, match=f"has {size} tokens, its model only {size - 1}"):
        Tokenizer.load(tmp_path, size - 1)


@pytest.mark.parametrize("part", ["merges", "normalizer", "pre_tokenizer", "added_tokens"])
def test_the_fingerprint_covers_all_that_decides_a_texts_ids(part):
    """With one vocabulary, and other ids for some text."""
    made = tokenizer_lib.train_bpe(["low lower lowest", "new newer newest"], 280)
    values = json.loads(made.inner.backend_tokenizer.to_str())
    if part == "merges":
        values["model"]["merges"] = values["model"]["merges"][::-1]
    elif part == "normalizer":
        values[part] = {"type": "Lowercase"}
    elif part == "pre_tokenizer":
        values[part]["add_prefix_space"] = True
    else:
        values[part] = [token | {"lstrip": True} for token in values[part]]
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    other = Tokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=FastTokenizer.from_str(json.dumps(values)), **special
        )
    )
    assert (
        other.first_fingerprint == made.first_fingerprint and other.fingerprint != made.fingerprint
    )
    # How it was last used, padded or cut, is no part of it.
    again = tokenizer_lib.train_bpe(["low lower lowest", "new newer newest"], 280)
    again.inner(["low", "lower newest"], padding=True, truncation=True, max_length=3)
    assert again.fingerprint == made.fingerprint


@pytest.mark.parametrize("word", ["cat", "w0"])
def test_a_closed_vocabulary_needs_no_unknown_token(word, tmp_path):
    # A benchmark's, whose rows have known words alone; it knows neither "a" nor an unknown token.
    vocabulary = {"<pad>": 0, "</s>": 1, word: 2}
    fast = FastTokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert Tokenizer.load(tmp_path).text_ids(word) == [2, 1]
