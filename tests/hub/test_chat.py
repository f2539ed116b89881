"""Chat templates: where the assistant's turn ends, what is cut, what is never written twice, and
odd ones.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from perl_jax.data.config import DataConfig
from perl_jax.data.pipeline import make_batches
from perl_jax.data.tokenise import tokenise
from perl_jax.errors import UserError
from perl_jax.hub import templates
from perl_jax.hub.artefacts import Record
from perl_jax.hub.model import check_turn_end
from perl_jax.hub.tokenizer import Tokenizer
from perl_jax.models.packing import pack
from perl_jax.rewards import scoring
from perl_jax.types import Layout, Tokens
from tests import small
from tests.paths import GEMMA, SMOLLM

LOOP = "{% for m in messages %}"
CHATML = LOOP + (
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% "
    "if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMAS = (
    "{{ bos_token }}"
    + LOOP
    + "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}{{ '<start_of_turn>' + "
    "role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA2 = LOOP + (
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}{% else "
    "%}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
PARTS = LOOP + (
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% for p in m['content'] %}{% if p['type'] == "
    "'text' %}{{ p['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if "
    "add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# No token of its own: marks in plain words.
WORDS = LOOP + (
    "{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}{% if "
    "add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
BARE = "{{ messages[0]['content'] + '\nAssistant:' }}"
ADDED = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]


def byte_tokenizer(
    template, *, eos: str = "</s>", vocab_size: int | None = None, **options
) -> Tokenizer:
    """One token a byte, <pad> <s> </s> before them and the marks of turns after."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    fast = FastTokenizer(models.BPE(vocabulary, []))
    fast.pre_tokenizer, fast.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    inner = PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    inner.add_special_tokens({"additional_special_tokens": ADDED})
    inner.eos_token = eos
    inner.chat_template = template
    return Tokenizer(inner, vocab_size=vocab_size, **options)


def ids(tokenizer: Tokenizer, *texts: str) -> list[int]:
    return tokenizer.inner.encode("".join(texts), add_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "stop", "tail"),
    [
        (CHATML, "<|im_end|>", "\n"),
        (GEMMAS, "<end_of_turn>", "\n"),
        (LLAMA2, "</s>", ""),
        (PARTS, "<|im_end|>", "\n"),
        (None, "</s>", ""),
    ],
    ids=["chatml", "gemma", "llama2", "parts", "none"],
)
def test_a_response_ends_as_the_templates_turn_does(template, stop, tail):
    tokenizer = byte_tokenizer(template)
    (stop_id,) = ids(tokenizer, stop)
    assert list(tokenizer.turn_end_ids) == ids(tokenizer, stop, tail) and list(
        tokenizer.tail_ids
    ) == ids(tokenizer, tail)
    assert tokenizer.response_ids("Yes.") == ids(tokenizer, "Yes.", stop)
    # Sampling stops there, and at eos too.
    assert set(tokenizer.stop_ids) == {tokenizer.eos_id, stop_id}
    if template is not None:
        # Prompt and response are what the template makes of both turns.
        turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]
        if template == PARTS:
            turns = [
                turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns
            ]
        whole = tokenizer.inner.apply_chat_template(turns, return_dict=False)
        middle = ids(tokenizer, " ") if template == LLAMA2 else []
        assert (
            tokenizer.prompt_ids("Is it?")
            + middle
            + tokenizer.response_ids("Yes.")
            + list(tokenizer.tail_ids)
            == whole
        )


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
        assert tokenizer.prompt_ids("<s>Once") == once and tokenizer.text_ids(
            "<s>Hi</s>"
        ) == tokenizer.text_ids("Hi")
    else:
        assert tokenizer.is_rendered(tokenizer.chat.prompt("Once")) and not tokenizer.is_rendered(
            "Once"
        )
        assert tokenizer.prompt_ids(tokenizer.chat.prompt("Once")) == once
        # A rendered prompt whose bos was left to the tokenizer has it once.
        assert tokenizer.prompt_ids(tokenizer.chat.prompt("Once").removeprefix("<s>")) == once


@pytest.mark.parametrize(
    ("template", "text", "rendered"),
    [
        (WORDS, "### user:\nIs it?\n\n### assistant:\n", True),
        (WORDS, "### system:\nBe brief.\n\n### user:\nIs it?\n\n### assistant:", True),
        (WORDS, "Write what follows.\n### assistant:\n", False),
        (WORDS, "### user:\nIs it?", False),
        (BARE, "User: Is it?\nAssistant:", False),
        (CHATML, "User: Is it?\nAssistant:", False),
        # Nobody writes the tokenizer's special tokens by accident.
        (CHATML, "<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n", True),
        (LLAMA2, "[INST] Is it? [/INST]", True),
        (LLAMA2, "What does [/INST]", False),
    ],
)
def test_a_cue_in_plain_words_does_not_make_a_prompt_rendered(template, text, rendered):
    tokenizer = byte_tokenizer(template)
    assert tokenizer.is_rendered(text) == rendered
    begun = ids(tokenizer, "<s>") if template == LLAMA2 else []
    assert tokenizer.prompt_ids(text) == (
        begun + ids(tokenizer, text) if rendered else ids(tokenizer, tokenizer.chat.prompt(text))
    )


def conversation(tokenizer: Tokenizer, *contents: str, system: str | None = None) -> str:
    roles = ["user", "assistant"] * len(contents)
    turns = [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=False)
    ]
    turns = ([] if system is None else [{"role": "system", "content": system}]) + turns
    return tokenizer.inner.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("template", [CHATML, LLAMA2, WORDS], ids=["chatml", "llama2", "words"])
def test_a_rendered_prompt_loses_its_first_turns(template):
    tokenizer = byte_tokenizer(template)
    contents = ("What is it there?", "A cat, I think.", "And what is this one?")
    for system in (None,) if template == LLAMA2 else (None, "Be brief."):
        rendered = lambda *contents, system=system: tokenizer.prompt_ids(
            conversation(tokenizer, *contents, system=system)
        )
        whole = rendered(*contents)
        for text in (
            conversation(tokenizer, *contents, system=system),
            conversation(tokenizer, *contents, system=system).removeprefix("<s>").rstrip("\n"),
        ):
            lost = len(whole) - len(tokenizer.prompt_ids(text))
            # The beginning of the first text goes first, all but one token of it; then its whole
            # turn with the answer.
            for cut in (1, 5, len(contents[0]) - 1):
                assert tokenizer.shortened_prompt(
                    text, len(whole) - lost - cut
                ) == tokenizer.prompt_ids(text.replace(contents[0], contents[0][cut:]))
            last = rendered(contents[2])
            shortened = tokenizer.shortened_prompt(text, len(whole) - lost - len(contents[0]))
            assert shortened == last[: len(last) - lost]
            assert (
                tokenizer.shortened_prompt(text, len(last) - lost - 4)
                == rendered(contents[2][4:])[: len(last) - 4 - lost]
            )
            frame = len(last) - lost - len(contents[2])
            assert len(tokenizer.shortened_prompt(text, frame + 1)) == frame + 1
            with pytest.raises(
                UserError,
                match=f"has {frame} tokens of its own; max_prompt_length is {frame}, which must "
                "be more",
            ):
                tokenizer.shortened_prompt(text, frame)


def test_a_prompt_rendered_in_another_way_keeps_its_cue():
    tokenizer = byte_tokenizer(CHATML)
    text = "<|im_start|>tool\n{}<|im_end|>\n<|im_start|>assistant\n"
    cue = len(ids(tokenizer, "<|im_end|>\n<|im_start|>assistant\n"))
    assert tokenizer.shortened_prompt(text, cue + 1) is None
    found = tokenise([{"prompt": text}], "prompts", tokenizer, cue + 1, 8)
    assert found.prompts[0].tolist() == ids(tokenizer, "}<|im_end|>\n<|im_start|>assistant\n")
    assert found.facts == {
        "rows": 1,
        "cut": 1,
        "cut_prompts": 1,
        "cut_prompts_template_whole": 0,
        "rendered": 1,
    }
    with pytest.raises(
        UserError,
        match=f"^Row 1: The end of the chat template .* has {cue} tokens; max_prompt_length is "
        f"{cue}, which must be more",
    ):
        tokenise([{"prompt": text}], "prompts", tokenizer, cue, 8)


@pytest.mark.parametrize("template", [CHATML, GEMMAS])
def test_the_text_is_cut_and_the_template_is_not(template):
    tokenizer = byte_tokenizer(template)
    text = "One two three four five six seven eight nine ten."
    whole = tokenizer.prompt_ids(text)
    frame = len(whole) - len(text)
    for limit in (frame + 1, frame + 9, len(whole) - 1):
        cut = tokenizer.shortened_prompt(text, limit)
        assert (
            cut == tokenizer.prompt_ids(text[-(limit - frame) :].lstrip())
            if template == GEMMAS
            else cut == tokenizer.prompt_ids(text[-(limit - frame) :])
        )
    # A character of three bytes that does not fit goes as a whole.
    assert tokenizer.shortened_prompt("日本", frame + 4) == tokenizer.prompt_ids("本")
    with pytest.raises(
        UserError, match=f"has {frame} tokens of its own; max_prompt_length is {frame}"
    ):
        tokenizer.shortened_prompt(text, frame)
    rows = [{"prompt": text, "response": "No."}, {"prompt": "One", "response": "A long answer."}]
    found = tokenise(rows, "demonstrations", tokenizer, frame + 9, 8)
    assert found.facts == {
        "rows": 2,
        "cut": 2,
        "cut_prompts": 1,
        "cut_response": 1,
        "cut_prompts_template_whole": 1,
        "rendered": 0,
    }
    assert found.prompts[0].tolist() == tokenizer.shortened_prompt(
        text, frame + 9
    ) and found.prompts[1].tolist() == tokenizer.prompt_ids("One")


def test_the_tail_is_read_by_scores_and_not_by_losses():
    tokenizer = byte_tokenizer(CHATML)
    rows = [{"prompt": "Is it?", "chosen": "Yes.", "rejected": "A long answer."}]
    batches = make_batches(
        rows,
        "comparisons",
        tokenizer,
        DataConfig(max_prompt_length=64, max_response_length=8),
        1,
        seed=None,
        epochs=1,
    )
    (pair,) = batches
    for tokens, text, cut in (
        (pair.chosen, "Yes.", False),
        (pair.rejected, "A long answer.", True),
    ):
        whole = tokenizer.prompt_ids("Is it?") + (
            tokenizer.response_ids(text) if not cut else ids(tokenizer, text)[:8]
        )
        ended = whole + ([] if cut else list(tokenizer.tail_ids))
        assert tokens.tokens_BT[0][tokens.valid_BT[0]].tolist() == ended
        assert (
            tokens.tokens_BT[0][tokens.response_BT[0]].tolist()
            == whole[len(tokenizer.prompt_ids("Is it?")) :]
        )
    assert batches.rows.lengths.max() <= batches.lengths[-1]


with_turn_end = jax.jit(scoring.with_turn_end, static_argnums=1)

# The stop part is a newline and <|im_end|>; the tail a newline.
LINE = CHATML.replace("m['content'] + '<|im_end|>' + '\n'", "m['content'] + '\n<|im_end|>\n'")


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(CHATML, id="tail", marks=pytest.mark.slow),
        pytest.param(LINE, id="two stops"),
        pytest.param(
            CHATML.replace("'<|im_end|>' + '\n'", "'<|im_end|>'"),
            id="no tail",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_rollout_is_scored_as_the_row_that_it_is(template):
    """However a response ended, it is scored as a row of data with its text; its own tokens, which
    losses and values are of, stay.
    """
    tokenizer = byte_tokenizer(template)
    prompt, said = tokenizer.prompt_ids("Is it?"), ids(tokenizer, "Yes.")
    stop = list(tokenizer.stop_part)
    # By the template's stop part, by its last token alone, by eos, after a line's end and eos, by
    # nothing; not at all; filler.
    sampled = [
        said + stop,
        said + stop[-1:],
        [*said, tokenizer.eos_id],
        said + ids(tokenizer, "\n") + [tokenizer.eos_id],
        stop,
        stop[-1:],
        said + ids(tokenizer, "!"),
    ]
    width = len(prompt) + 8
    tokens_BT, valid_BT, response_BT = (
        np.zeros((8, width), np.int32),
        np.zeros((8, width), bool),
        np.zeros((8, width), bool),
    )
    for row, made in enumerate(sampled):
        tokens_BT[row, : len(prompt) + len(made)] = prompt + made
        valid_BT[row, : len(prompt) + len(made)] = True
        response_BT[row, len(prompt) : len(prompt) + len(made)] = True
    rollout = Tokens(tokens_BT, valid_BT, response_BT)
    ended = jax.device_get(with_turn_end(rollout, scoring.ends_of(tokenizer)))
    real = [ended.tokens_BT[row][ended.valid_BT[row]].tolist() for row in range(8)]
    as_row = lambda text: prompt + tokenizer.response_ids(text) + list(tokenizer.tail_ids)
    texts = ["Yes.", "Yes.", "Yes.", "Yes.\n", "", ""]
    assert real == [*map(as_row, texts), prompt + sampled[6], []]
    assert [tokenizer.text(tokenizer.without_end(made)) for made in sampled] == [*texts, "Yes.!"]
    np.testing.assert_array_equal(ended.response_BT[:, :width], response_BT)
    assert not ended.response_BT[:, width:].any()
    # A response at the end of the room has its whole end behind it.
    narrow = lambda x_BT: x_BT[:, : len(prompt) + 5]
    ended = jax.device_get(with_turn_end(jax.tree.map(narrow, rollout), scoring.ends_of(tokenizer)))
    assert ended.tokens_BT[2][ended.valid_BT[2]].tolist() == as_row("Yes.")


def test_nothing_is_written_where_a_response_ends_with_eos_alone():
    assert (
        scoring.ends_of(byte_tokenizer(None)) is None
        and scoring.ends_of(byte_tokenizer(LLAMA2)) is None
    )


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
    record = Record(
        role, "lora", None, role == "reward", "base", "-", "-", 0, {}, turn_end=turn_end
    )
    if not refused:
        check_turn_end("reward/here", record, tokenizer)
        return
    with pytest.raises(
        UserError,
        match=r"^reward/here learned its scores where a turn ends with '</s>'; .* a turn ends "
        r"with '<\|im_end\|>\\n': give",
    ):
        check_turn_end("reward/here", record, tokenizer)


def test_what_follows_a_response_is_not_shared_in_packed_rows():
    # Two rows with one prompt of 3 tokens, responses of 2 and 1, and a tail of 1 each: 3 + 3 + 2
    # slots.
    valid_BT = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]], bool)
    response_BT = np.array([[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0]], bool)
    tokens = Tokens(
        np.arange(12, dtype=np.int32).reshape(2, 6), valid_BT, response_BT, Layout(16, 1, 2, 1)
    )
    packing = pack(tokens)
    assert int(packing.filled_WU.sum()) == 8
    np.testing.assert_array_equal(
        np.array(packing.packed(tokens.tokens_BT))[0, :8], [0, 1, 2, 3, 4, 5, 9, 10]
    )
    base, role = small.make_base(), small.make_adapter()
    score = jax.jit(
        lambda batch, packing: small.LM.score(
            base, role, batch.tokens_BT, batch.valid_BT, packing=packing
        )
    )
    batch = tokens.replace(tokens_BT=np.array([[5, 6, 7, 8, 9, 4], [5, 6, 7, 10, 4, 0]], np.int32))
    np.testing.assert_allclose(score(batch, None), score(batch, pack(batch)), atol=1e-5)


def test_dates_are_the_runs_own():
    template = "{{ strftime_now('%d %b %Y') }} {{ date_string }} " + CHATML
    first, again, later = (
        byte_tokenizer(template, date=date) for date in ("2025-03-04", "2025-03-04", "2026-11-30")
    )
    assert first.chat.prompt("Hi").startswith("04 Mar 2025 04 Mar 2025 <|im_start|>user")
    assert first.fingerprint == again.fingerprint != later.fingerprint
    computed = byte_tokenizer(
        "{% set f = '%Y' %}{{ strftime_now (f) }} " + CHATML, date="2025-03-04"
    )
    assert computed.chat.prompt("Hi").startswith("2025 <|im_start|>user")
    # Without a date in the template the date is nothing.
    assert (
        byte_tokenizer(CHATML, date="2025-03-04").fingerprint == byte_tokenizer(CHATML).fingerprint
    )
    with pytest.raises(UserError, match="template_date is 'soon'; it must look like 2025-01-01"):
        byte_tokenizer(CHATML, date="soon")


ODD = {
    "raises": (
        "{{ raise_exception('no users here') }}",
        "cannot write one user turn: no users here",
    ),
    "does not parse": ("{% for m in messages %}{{ m", "cannot write one user turn"),
    "unknown tag": ("{% frobnicate %}", "cannot write one user turn"),
    "unknown filter": ("{{ messages | frobnicate }}", "cannot write one user turn"),
    "no such attribute": (
        "{{ messages[7]['content'] }}",
        "leaves the user's text out|cannot write one user turn",
    ),
    "drops the text": ("{{ bos_token }}Hello", "leaves the user's text out"),
    "wants a system turn": (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}",
        "system first",
    ),
    "divides by zero": ("{{ 1 / 0 }}", "division by zero"),
    "range too large": ("{% for i in range(999999999) %}x{% endfor %}", "Range too big"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "does not end within 10,000 steps",
    ),
    "loops over nothing": (
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "does not end within 10,000 steps",
    ),
    "calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) "
        "}}",
        "does not end within 10,000 steps",
    ),
    "filters for ever": (
        "{% for i in range(99999) %}{{ range(99999) | list | length }}{% endfor %}",
        "does not end within 10,000 steps",
    ),
    "doubles a text": (
        "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% "
        "endfor %}",
        "does not end within 10,000 steps",
    ),
    "joins a text to itself": (
        "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% "
        "endfor %}",
        "does not end within 10,000 steps",
    ),
    "a long text": ("{{ 'ab' * 10 ** 12 }}", "does not end within 10,000 steps"),
    "a large number": ("{{ 9 ** (9 ** 9) }}", "does not end within 10,000 steps"),
    "a hidden attribute": (
        "{% set n = namespace(__class__=1) %}" + CHATML,
        "a namespace has no attribute '__class__'",
    ),
    "calls a number": ("{{ 3() }}", "cannot write one user turn"),
    "unsafe": (
        "{{ ''.__class__.__mro__ }}" + CHATML.replace("content", "role"),
        "leaves the user's text out|cannot write",
    ),
    "named without default": (
        {"chat": CHATML, "tools": CHATML},
        "templates called chat, tools and no default",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_templates_are_one_sentence(name, monkeypatch):
    monkeypatch.setattr(templates, "STEPS", 10_000)
    template, message = ODD[name]
    with pytest.raises(UserError, match=message) as error:
        byte_tokenizer(template)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize(
    "loop",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'ab' * 10 ** 12 }}",
    ],
)
def test_a_template_that_does_not_end_for_one_prompt_names_it(loop, monkeypatch):
    monkeypatch.setattr(templates, "STEPS", 10_000)
    tokenizer = byte_tokenizer(
        "{% if 'loop' in messages[0]['content'] %}" + loop + "{% endif %}" + CHATML
    )
    rows = [{"prompt": "Hi"}, {"prompt": "Hi"}, {"prompt": "Now loop"}]
    with pytest.raises(
        UserError,
        match=r"^Row 3: The chat template of .* does not end within 10,000 steps for the prompt "
        r"'Now loop'\.$",
    ):
        tokenise(rows, "prompts", tokenizer, 64, 8)
    # Each rendering has its own steps.
    monkeypatch.setattr(templates, "STEPS", 10)
    assert len({tuple(tokenizer.prompt_ids("Hi")) for _ in range(10)}) == 1


# What published templates use of the language.
LANGUAGE = {
    "chatml": CHATML,
    "gemma": GEMMAS,
    "loop's own variables": LOOP
    + (
        "{{ loop.index0 ~ loop.first ~ loop.last ~ loop.length ~ loop.revindex ~ (loop.previtem is "
        "defined) ~ (loop.nextitem is defined) }}{{ m.content }}{% endfor %}"
    ),
    "filtered, unpacked, else": (
        "{% for k, v in {'a': 1, 'b': 2}.items() if v > 1 %}{{ k }}{{ v "
        "}}{% else %}none{% endfor %}"
    )
    + LOOP
    + "{{ m['content'] | trim | replace('x', 'y') }}{% endfor %}",
    "break and continue": (
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i "
        "> 4 %}{% break %}{% endif %}{{ i }}{% endfor %}{{ messages[0].content "
        "}}"
    ),
    "macros and blocks": "{% macro say(m) -%}\n  {{ m.role }}: {{ m.content }}\n{%- endmacro %}"
    + LOOP
    + "{{ say(m) }}{% generation %}{{ caller is defined }}{% endgeneration %}\n{% endfor %}",
    "namespaces, dictionaries, json": "{% set n = namespace(self=1, seen=false) %}"
    + LOOP
    + (
        "{% set n.seen = true %}{% endfor %}{{ n.seen }}{{ messages | tojson(indent=2) }}{{ "
        "dict(a=1) }}{{ tools is none }}"
    ),
    "texts": (
        "{{ messages[0].content.split('i')[0] + '|' ~ messages[-1]['content'].replace('H', "
        "'<&>') }}{{ messages | map(attribute='role') | join(',') }}{{ messages | "
        "selectattr('role', 'equalto', 'user') | list | length }}"
    ),
    "recursion": (
        "{% for x in [[1, [2]], [3]] recursive %}{% if x is iterable %}({{ loop(x) }}){% "
        "else %}{{ x }}{% endif %}{% endfor %}{{ messages[0].content }}"
    ),
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_templates_are_rendered_as_transformers_does(name):
    tokenizer = byte_tokenizer(LANGUAGE[name])
    for text in ("Hi", "  Hi é\n <b>'there'</b> "):
        assert tokenizer.chat.prompt(text) == tokenizer.inner.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )


FINE = {
    "named with default": ({"default": CHATML, "tools": "{{ 1 / 0 }}"}, "<|im_end|>", "\n"),
    "refuses answers": (
        LOOP
        + (
            "{% if m['role'] == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
            "{{ m['content'] }}{% endfor %}"
        ),
        "</s>",
        "",
    ),
    "ends in words": (
        LOOP
        + (
            "{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}{{ '### "
            "assistant:\n' }}"
        ),
        "</s>",
        "",
    ),
    "a line before the end": (
        LOOP + "{{ '<|im_start|>' + m['content'] + '\n<|im_end|>' }}{% endfor %}",
        "\n<|im_end|>",
        "",
    ),
    "eos after the turn": (
        CHATML.replace("'<|im_end|>' + '\n'", "'<|im_end|>' + eos_token"),
        "<|im_end|>",
        "</s>",
    ),
    "empty": ("", "</s>", ""),
}


@pytest.mark.parametrize("name", FINE)
def test_unusual_templates_that_work(name):
    template, stop, tail = FINE[name]
    tokenizer = byte_tokenizer(template)
    assert list(tokenizer.stop_part) == ids(tokenizer, stop) and list(tokenizer.tail_ids) == ids(
        tokenizer, tail
    )


def test_templates_by_name(tmp_path):
    byte_tokenizer(CHATML).save(tmp_path)
    (tmp_path / "mine.jinja").write_text(GEMMAS)
    plain, mine = (
        Tokenizer.load(tmp_path, template="none"),
        Tokenizer.load(tmp_path, template=str(tmp_path / "mine.jinja")),
    )
    assert (
        plain.chat is None
        and plain.prompt_ids("Hi") == ids(plain, "<s>Hi")
        and plain.turn_end_ids == (plain.eos_id,)
    )
    assert list(mine.turn_end_ids) == ids(mine, "<end_of_turn>\n")
    assert len({plain.fingerprint, mine.fingerprint, Tokenizer.load(tmp_path).fingerprint}) == 3
    with pytest.raises(
        UserError, match=r"template is 'absent\.jinja'; it must be auto, none, or a file"
    ):
        Tokenizer.load(tmp_path, template="absent.jinja")


def test_ids_without_an_embedding_are_refused_by_name():
    # 259 bytes and marks, then the four marks of turns: 262 is <end_of_turn>.
    size = len(byte_tokenizer(None))
    with pytest.raises(
        UserError,
        match=f"eos token <end_of_turn> of .* has id {size - 1}, for which the model has no "
        f"embedding .it has {size - 1}",
    ):
        byte_tokenizer(None, eos="<end_of_turn>", vocab_size=size - 1)
    with pytest.raises(
        UserError, match=rf"names \[{size + 5}\] as eos_token_id; it has embeddings 0 to {size - 1}"
    ):
        Tokenizer(byte_tokenizer(None).inner, [size + 5])
    bare = byte_tokenizer(None)
    bare.bos_id = None
    with pytest.raises(
        UserError, match="Row 2: the prompt has no tokens, and the tokenizer no bos"
    ):
        tokenise([{"prompt": "a"}, {"prompt": ""}], "prompts", bare, 8, 8)


@pytest.mark.skipif(SMOLLM is None or not SMOLLM.is_dir(), reason="no SmolLM2 here")
def test_smollms_turn():
    tokenizer = Tokenizer.load(SMOLLM)
    assert tokenizer.inner.convert_ids_to_tokens(list(tokenizer.turn_end_ids)) == [
        "<|im_end|>",
        "Ċ",
    ]
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]
    whole = tokenizer.inner.apply_chat_template(turns, return_dict=False)
    assert (
        tokenizer.prompt_ids("What is it?")
        + tokenizer.response_ids("A cat.")
        + list(tokenizer.tail_ids)
        == whole
    )
    cut = tokenizer.shortened_prompt("word " * 200 + "the end", 48)
    assert (
        len(cut) <= 48
        and tokenizer.inner.decode(cut).endswith("the end<|im_end|>\n<|im_start|>assistant\n")
        and "<|im_start|>user\n" in tokenizer.inner.decode(cut)
    )


@pytest.mark.skipif(GEMMA is None or not GEMMA.is_dir(), reason="no Gemma 3 here")
def test_gemmas_turn(tmp_path):
    (tmp_path / "gemma.jinja").write_text(GEMMAS)
    tokenizer = Tokenizer.load(GEMMA, template=str(tmp_path / "gemma.jinja"))
    assert tokenizer.inner.convert_ids_to_tokens(list(tokenizer.turn_end_ids)) == [
        "<end_of_turn>",
        "\n",
    ]
    assert (
        tokenizer.prompt_ids("Hi")[0] == tokenizer.bos_id
        and tokenizer.prompt_ids("Hi").count(tokenizer.bos_id) == 1
    )
    assert Tokenizer.load(GEMMA).turn_end_ids == (tokenizer.eos_id,)
