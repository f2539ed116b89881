"""Chat templates: where the assistant's turn ends, what is cut, what is never written twice, and odd ones."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from perl_jax.checkpoint import Record
from perl_jax.config import UserError
from perl_jax.data.pipeline import BatchSpec, make_batches
from perl_jax.data.tokenise import tokenise
from perl_jax.hf import chat
from perl_jax.hf.tokenizer import Tokenizer
from perl_jax.loops import scoring
from perl_jax.loops.model import check_turn_end
from perl_jax.models.packing import pack
from perl_jax.types import Layout, Tokens
from tests import small
from tests.paths import GEMMA, SMOLLM

LOOP = "{% for m in messages %}"
CHATML = LOOP + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
GEMMAS = (
    "{{ bos_token }}" + LOOP + "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA2 = LOOP + "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
PARTS = LOOP + "{{ '<|im_start|>' + m['role'] + '\n' }}{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
ADDED = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]


def byte_tokenizer(template, *, eos: str = "</s>", vocab_size: int | None = None, **options) -> Tokenizer:
    """One token a byte, <pad> <s> </s> before them and the marks of turns after."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    fast = FastTokenizer(models.BPE(vocabulary, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    inner.add_special_tokens({"additional_special_tokens": ADDED})
    inner.eos_token = eos
    inner.chat_template = template
    return Tokenizer(inner, vocab_size=vocab_size, **options)


def ids(tokenizer: Tokenizer, *texts: str) -> list[int]:
    return tokenizer.inner.encode("".join(texts), add_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "stop", "tail"),
    [(CHATML, "<|im_end|>", "\n"), (GEMMAS, "<end_of_turn>", "\n"), (LLAMA2, "</s>", ""), (PARTS, "<|im_end|>", "\n"), (None, "</s>", "")],
    ids=["chatml", "gemma", "llama2", "parts", "none"],
)
def test_a_response_ends_as_the_templates_turn_does(template, stop, tail):
    tokenizer = byte_tokenizer(template)
    (stop_id,) = ids(tokenizer, stop)
    assert list(tokenizer.turn_end_ids) == ids(tokenizer, stop, tail) and list(tokenizer.tail_ids) == ids(tokenizer, tail)
    assert tokenizer.response_ids("Yes.") == ids(tokenizer, "Yes.", stop)
    # Sampling stops there, and at eos too.
    assert set(tokenizer.stop_ids) == {tokenizer.eos_id, stop_id}
    if template is not None:
        # Prompt and response are what the template makes of both turns.
        turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]
        if template == PARTS:
            turns = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        whole = tokenizer.inner.apply_chat_template(turns, return_dict=False)
        middle = ids(tokenizer, " ") if template == LLAMA2 else []
        assert tokenizer.prompt_ids("Is it?") + middle + tokenizer.response_ids("Yes.") + list(tokenizer.tail_ids) == whole


@pytest.mark.parametrize("template", [None, CHATML, GEMMAS])
def test_nothing_is_written_twice(template):
    tokenizer = byte_tokenizer(template)
    plain = tokenizer.response_ids("Hi")
    stop = tokenizer.inner.decode([tokenizer.stop_part[-1]])
    for text in (f"Hi{stop}", f"Hi{stop}\n", f"Hi{stop}{stop}", "Hi</s>"):
        assert tokenizer.response_ids(text) == plain
    assert tokenizer.response_ids("Hi\n") == ids(tokenizer, "Hi\n", stop)
    once = tokenizer.prompt_ids("Once")
    if template is None:
        assert tokenizer.prompt_ids("<s>Once") == once and tokenizer.text_ids("<s>Hi</s>") == tokenizer.text_ids("Hi")
    else:
        assert tokenizer.is_rendered(tokenizer.chat.prompt("Once")) and not tokenizer.is_rendered("Once")
        assert tokenizer.prompt_ids(tokenizer.chat.prompt("Once")) == once
        # A rendered prompt whose bos was left to the tokenizer has it once.
        assert tokenizer.prompt_ids(tokenizer.chat.prompt("Once").removeprefix("<s>")) == once


@pytest.mark.parametrize("template", [CHATML, GEMMAS])
def test_the_text_is_cut_and_the_template_is_not(template):
    tokenizer = byte_tokenizer(template)
    text = "One two three four five six seven eight nine ten."
    whole = tokenizer.prompt_ids(text)
    frame = len(whole) - len(text)
    for limit in (frame + 1, frame + 9, len(whole) - 1):
        cut = tokenizer.shortened_prompt(text, limit)
        assert cut == tokenizer.prompt_ids(text[-(limit - frame) :].lstrip()) if template == GEMMAS else cut == tokenizer.prompt_ids(text[-(limit - frame) :])
    # A character of three bytes that does not fit goes as a whole.
    assert tokenizer.shortened_prompt("日本", frame + 4) == tokenizer.prompt_ids("本")
    with pytest.raises(UserError, match=f"has {frame} tokens of its own; max_prompt_length is {frame}"):
        tokenizer.shortened_prompt(text, frame)
    rows = [{"prompt": text, "response": "No."}, {"prompt": "One", "response": "A long answer."}]
    found = tokenise(rows, "demonstrations", tokenizer, frame + 9, 8)
    assert found.truncated == {"prompts": 1, "response": 1}
    assert found.prompts[0].tolist() == tokenizer.shortened_prompt(text, frame + 9) and found.prompts[1].tolist() == tokenizer.prompt_ids("One")


def test_the_tail_is_read_by_scores_and_not_by_losses():
    tokenizer = byte_tokenizer(CHATML)
    rows = [{"prompt": "Is it?", "chosen": "Yes.", "rejected": "A long answer."}]
    batches = make_batches(rows, "comparisons", tokenizer, BatchSpec(1, 64, 8, shuffle_seed=None, epochs=1))
    (pair,) = batches
    for tokens, text, cut in ((pair.chosen, "Yes.", False), (pair.rejected, "A long answer.", True)):
        whole = tokenizer.prompt_ids("Is it?") + (tokenizer.response_ids(text) if not cut else ids(tokenizer, text)[:8])
        ended = whole + ([] if cut else list(tokenizer.tail_ids))
        assert tokens.tokens_BT[0][tokens.valid_BT[0]].tolist() == ended
        assert tokens.tokens_BT[0][tokens.response_BT[0]].tolist() == whole[len(tokenizer.prompt_ids("Is it?")) :]
    assert batches.rows.lengths.max() <= batches.lengths[-1]


def test_a_rollout_is_scored_as_the_row_that_it_is():
    # As sampled: one ends with the template's token, one with eos, one does not end, one is filler.
    tokenizer = byte_tokenizer(CHATML)
    prompt, said = tokenizer.prompt_ids("Is it?"), ids(tokenizer, "Yes.")
    sampled = [said + list(tokenizer.stop_part), said + [tokenizer.eos_id], said + ids(tokenizer, "!")]
    width = len(prompt) + 8
    tokens_BT, valid_BT, response_BT = np.zeros((4, width), np.int32), np.zeros((4, width), bool), np.zeros((4, width), bool)
    for row, made in enumerate(sampled):
        tokens_BT[row, : len(prompt) + len(made)] = prompt + made
        valid_BT[row, : len(prompt) + len(made)] = True
        response_BT[row, len(prompt) : len(prompt) + len(made)] = True
    rollout = Tokens(tokens_BT, valid_BT, response_BT)
    ended = jax.device_get(scoring.with_turn_end(rollout, *scoring.ends_of(tokenizer)))
    whole = prompt + said + list(tokenizer.turn_end_ids)
    real = [ended.tokens_BT[row][ended.valid_BT[row]].tolist() for row in range(4)]
    assert real == [whole, whole, prompt + sampled[2], []]
    # A response at the end of the room has the tail behind it.
    full = Tokens(np.array([prompt + sampled[0]]), np.ones((1, len(prompt) + 5), bool), np.arange(len(prompt) + 5)[None] >= len(prompt))
    assert jax.device_get(scoring.with_turn_end(full, *scoring.ends_of(tokenizer))).tokens_BT.tolist() == [whole]
    assert scoring.ends_of(byte_tokenizer(None)) is None
    assert scoring.ends_of(byte_tokenizer(LLAMA2)) is None


@pytest.mark.parametrize(
    ("role", "stated", "template", "refused"),
    [
        ("reward", "own", CHATML, False),
        ("reward", "eos", CHATML, True),
        # Of a version that did not state it and ended every turn with eos.
        ("reward", None, CHATML, True),
        ("reward", None, None, False),
        ("reward", None, LLAMA2, False),
        ("policy", "eos", CHATML, False),
    ],
)
def test_a_reward_with_another_end_of_a_turn_is_refused(role, stated, template, refused):
    tokenizer = byte_tokenizer(template)
    turn_end = {"own": tokenizer.turn_end_ids, "eos": (tokenizer.eos_id,), None: None}[stated]
    record = Record(role, "lora", None, role == "reward", "base", "-", "-", 0, {}, turn_end=turn_end)
    if not refused:
        return check_turn_end("reward/here", record, tokenizer)
    with pytest.raises(UserError, match=r"^reward/here learned its scores where a turn ends with '</s>'; .* a turn ends with '<\|im_end\|>\\n': give"):
        check_turn_end("reward/here", record, tokenizer)


def test_what_follows_a_response_is_not_shared_in_packed_rows():
    # Two rows with one prompt of 3 tokens, responses of 2 and 1, and a tail of 1 each: 3 + 3 + 2 slots.
    valid_BT = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]], bool)
    response_BT = np.array([[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0]], bool)
    tokens = Tokens(np.arange(12, dtype=np.int32).reshape(2, 6), valid_BT, response_BT, Layout(16, 1, 2, 1))
    packing = pack(tokens)
    assert int(packing.filled_WU.sum()) == 8
    np.testing.assert_array_equal(np.array(packing.packed(tokens.tokens_BT))[0, :8], [0, 1, 2, 3, 4, 5, 9, 10])
    base, role = small.make_base(), small.make_adapter()
    score = jax.jit(lambda batch, packing: small.LM.score(base, role, batch.tokens_BT, batch.valid_BT, packing=packing))
    batch = tokens.replace(tokens_BT=np.array([[5, 6, 7, 8, 9, 4], [5, 6, 7, 10, 4, 0]], np.int32))
    np.testing.assert_allclose(score(batch, None), score(batch, pack(batch)), atol=1e-5)


def test_dates_are_the_runs_own():
    template = "{{ strftime_now('%d %b %Y') }} {{ date_string }} " + CHATML
    first, again, later = (byte_tokenizer(template, date=date) for date in ("2025-03-04", "2025-03-04", "2026-11-30"))
    assert first.chat.prompt("Hi").startswith("04 Mar 2025 04 Mar 2025 <|im_start|>user")
    assert first.fingerprint == again.fingerprint != later.fingerprint
    # Without a date in the template the date is nothing.
    assert byte_tokenizer(CHATML, date="2025-03-04").fingerprint == byte_tokenizer(CHATML).fingerprint
    with pytest.raises(UserError, match="template_date is 'soon'; it must look like 2025-01-01"):
        byte_tokenizer(CHATML, date="soon")


ODD = {
    "raises": ("{{ raise_exception('no users here') }}", "cannot write one user turn: no users here"),
    "does not parse": ("{% for m in messages %}{{ m", "cannot write one user turn"),
    "unknown tag": ("{% frobnicate %}", "cannot write one user turn"),
    "unknown filter": ("{{ messages | frobnicate }}", "cannot write one user turn"),
    "no such attribute": ("{{ messages[7]['content'] }}", "leaves the user's text out|cannot write one user turn"),
    "drops the text": ("{{ bos_token }}Hello", "leaves the user's text out"),
    "wants a system turn": ("{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}", "system first"),
    "divides by zero": ("{{ 1 / 0 }}", "division by zero"),
    "range too large": ("{% for i in range(999999999) %}x{% endfor %}", "Range too big"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "does not end": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "did not end within"),
    "a computed date": ("{% set f = '%Y' %}{{ strftime_now (f) }}" + CHATML, "asks for today's date in a format that it computes"),
    "calls a number": ("{{ 3() }}", "cannot write one user turn"),
    "unsafe": ("{{ ''.__class__.__mro__ }}" + CHATML.replace("content", "role"), "leaves the user's text out|cannot write"),
    "named without default": ({"chat": CHATML, "tools": CHATML}, "templates called chat, tools and no default"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_templates_are_one_sentence(name, monkeypatch):
    monkeypatch.setattr(chat, "_SECONDS", 0.3)
    template, message = ODD[name]
    with pytest.raises(UserError, match=message) as error:
        byte_tokenizer(template)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


FINE = {
    "named with default": ({"default": CHATML, "tools": "{{ 1 / 0 }}"}, "<|im_end|>", "\n"),
    "refuses answers": (LOOP + "{% if m['role'] == 'assistant' %}{{ raise_exception('no') }}{% endif %}{{ m['content'] }}{% endfor %}", "</s>", ""),
    "ends in words": (LOOP + "{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}{{ '### assistant:\n' }}", "</s>", ""),
    "a line before the end": (LOOP + "{{ '<|im_start|>' + m['content'] + '\n<|im_end|>' }}{% endfor %}", "\n<|im_end|>", ""),
    "eos after the turn": (CHATML.replace("'<|im_end|>' + '\n'", "'<|im_end|>' + eos_token"), "<|im_end|>", "</s>"),
    "empty": ("", "</s>", ""),
}


@pytest.mark.parametrize("name", FINE)
def test_unusual_templates_that_work(name):
    template, stop, tail = FINE[name]
    tokenizer = byte_tokenizer(template)
    assert list(tokenizer.stop_part) == ids(tokenizer, stop) and list(tokenizer.tail_ids) == ids(tokenizer, tail)


def test_templates_by_name(tmp_path):
    byte_tokenizer(CHATML).save(tmp_path)
    (tmp_path / "mine.jinja").write_text(GEMMAS)
    plain, mine = Tokenizer.load(tmp_path, template="none"), Tokenizer.load(tmp_path, template=str(tmp_path / "mine.jinja"))
    assert plain.chat is None and plain.prompt_ids("Hi") == ids(plain, "<s>Hi") and plain.turn_end_ids == (plain.eos_id,)
    assert list(mine.turn_end_ids) == ids(mine, "<end_of_turn>\n")
    assert len({plain.fingerprint, mine.fingerprint, Tokenizer.load(tmp_path).fingerprint}) == 3
    with pytest.raises(UserError, match="template is 'absent.jinja'; it must be auto, none, or a file"):
        Tokenizer.load(tmp_path, template="absent.jinja")


def test_ids_without_an_embedding_are_refused_by_name():
    # 259 bytes and marks, then the four marks of turns: 262 is <end_of_turn>.
    size = len(byte_tokenizer(None))
    with pytest.raises(UserError, match=f"eos token <end_of_turn> of .* has id {size - 1}, for which the model has no embedding .it has {size - 1}"):
        byte_tokenizer(None, eos="<end_of_turn>", vocab_size=size - 1)
    with pytest.raises(UserError, match=rf"names \[{size + 5}\] as eos_token_id; it has embeddings 0 to {size - 1}"):
        Tokenizer(byte_tokenizer(None).inner, [size + 5])
    bare = byte_tokenizer(None)
    bare.bos_id = None
    with pytest.raises(UserError, match="The prompt of row 2 has no tokens, and the tokenizer no bos"):
        tokenise([{"prompt": "a"}, {"prompt": ""}], "prompts", bare, 8, 8)


@pytest.mark.skipif(SMOLLM is None or not SMOLLM.is_dir(), reason="no SmolLM2 here")
def test_smollms_turn():
    tokenizer = Tokenizer.load(SMOLLM)
    assert tokenizer.inner.convert_ids_to_tokens(list(tokenizer.turn_end_ids)) == ["<|im_end|>", "Ċ"]
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]
    whole = tokenizer.inner.apply_chat_template(turns, return_dict=False)
    assert tokenizer.prompt_ids("What is it?") + tokenizer.response_ids("A cat.") + list(tokenizer.tail_ids) == whole
    cut = tokenizer.shortened_prompt("word " * 200 + "the end", 48)
    assert len(cut) <= 48 and tokenizer.inner.decode(cut).endswith("the end<|im_end|>\n<|im_start|>assistant\n") and "<|im_start|>user\n" in tokenizer.inner.decode(cut)


@pytest.mark.skipif(GEMMA is None or not GEMMA.is_dir(), reason="no Gemma 3 here")
def test_gemmas_turn(tmp_path):
    (tmp_path / "gemma.jinja").write_text(GEMMAS)
    tokenizer = Tokenizer.load(GEMMA, template=str(tmp_path / "gemma.jinja"))
    assert tokenizer.inner.convert_ids_to_tokens(list(tokenizer.turn_end_ids)) == ["<end_of_turn>", "\n"]
    assert tokenizer.prompt_ids("Hi")[0] == tokenizer.bos_id and tokenizer.prompt_ids("Hi").count(tokenizer.bos_id) == 1
    assert Tokenizer.load(GEMMA).turn_end_ids == (tokenizer.eos_id,)
