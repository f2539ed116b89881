"""The embedded task: hand-graded responses, clerks' error rates, raters' calibration, splits."""

from __future__ import annotations

import collections
import hashlib
import json
import random

import numpy as np
import pytest

from experiments.orders import data as orders
from experiments.orders import language
from experiments.orders.language import (
    END_OF_TURN,
    Item,
    Order,
    answer,
    parse_request,
    sample_order,
    spoken_order,
)
from perl_jax.hub.tokenizer import train_bpe, word_tokenizer

PROMPT = (
    "customer : hi , could i get two large cups of latte with oat milk "
    "and one small cup of black tea to go please assistant :"
)
RIGHT = "add two large latte oat ; add one small tea black ; to go"
ORDER = Order((Item("two", "large", "latte", "oat"), Item("one", "small", "tea", "black")), "to go")
LONGEST_PROMPT = 28
LONGEST_RIGHT = 5 + 1 + 5 + 1 + 2  # two calls, two separators, `to go`
LONGEST_RESPONSE = 3 * 5 + 3 + 2 + 1  # an extra call with its separator, a word said twice


def within_four_deviations(share: float, p: float, n: int) -> bool:
    """Whether a share of n draws is one that a probability of p makes likely (binomial)."""
    return abs(share - p) <= 4 * (p * (1 - p) / n) ** 0.5


def test_the_example_prompt_is_understood():
    assert parse_request(PROMPT) == ORDER
    assert answer(ORDER) == RIGHT


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (RIGHT, 1.0),
        (
            "add one small tea black ; add two large latte oat ; to go",
            1.0,
        ),  # the items' order is free
        ("add three large latte oat ; add one small tea black ; to go", 0.5),  # one slot
        ("add two large latte soy ; add one small tea black ; here", 0.0),  # one slot, the place
        ("add two large mocha soy ; add one large tea black ; to go", -0.5),  # three slots
        ("add two large latte oat ; add one small tea black", 0.5),  # no place
        ("add two large latte oat ; to go", -0.5),  # a missing item
        (f"add one small mocha black ; {RIGHT}", 0.0),  # an extra item
        (
            "add two large latte soy ; add one small mocha black ; add one small tea black ; to go",
            -0.5,
        ),  # a slot, extra
        ("add one large latte oat ; add two small tea black ; to go", 0.0),  # two slots exchanged
        (
            "add two large latte oat ; add one small tea ; to go",
            -1.0,
        ),  # garbled 0.5, so missing 1.5
        (
            "add 2 large latte oat ; add one small tea black ; to go",
            -1.0,
        ),  # not a quantity: the same
        (f"{RIGHT} please", 0.0),  # a last segment that is garbled 0.5, so no place 0.5
        (f"{RIGHT} ; to go", 0.5),  # the place is said twice: the first is out of place
        (f"{RIGHT} ;", -0.5),  # an empty last segment, so a place that is out of place, so no place
        ("", -1.0),
        ("add", -1.0),
        ("\x00 ￿ 𝕏 ;;; \n\t", -1.0),
    ],
)
def test_gold_reward_by_hand(response, reward):
    assert orders.gold_reward(PROMPT, response) == pytest.approx(reward, abs=1e-12)


def test_gold_reward_is_total_and_1_only_for_a_perfect_order():
    rng = random.Random(0)
    words = language.vocabulary()
    assert orders.gold_reward("no request at all", RIGHT) == -1.0
    for _ in range(300):
        reward = orders.gold_reward(PROMPT, " ".join(rng.choices(words, k=rng.randrange(40))))
        assert -1.0 <= reward < 1.0
    assert orders.gold_reward(PROMPT, f"{RIGHT} ; " * 300) == -1.0


def test_gold_rewards_is_float32_over_rows():
    rewards = orders.gold_rewards([PROMPT, PROMPT], [RIGHT, ""])
    assert rewards.dtype == np.float32
    np.testing.assert_array_equal(rewards, [1.0, -1.0])


def test_matching_takes_the_cheapest_assignment():
    # Matched in the order given, every slot would differ: 2 x 4 slots. Crossed: one.
    given = "add one small tea black ; add two large latte soy ; to go"
    grade = orders.grade(ORDER, given)
    assert grade.slots == ("milk",)
    assert grade.reward == 0.5


@pytest.mark.parametrize(
    ("said", "order"),
    [
        (
            "one medium cup of oat espresso , for here",
            Order((Item("one", "medium", "espresso", "oat"),), "here"),
        ),
        (
            "takeaway , we need five large cups of black tea",
            Order((Item("five", "large", "tea", "black"),), "to go"),
        ),
        (
            "three small cups of chai with soy milk plus one large cup of whole cocoa to stay",
            Order(
                (Item("three", "small", "chai", "soy"), Item("one", "large", "cocoa", "whole")),
                "here",
            ),
        ),
        ("two large cups of oat latte", None),  # no place
        ("two cups of oat latte to go", None),  # no size: no item
        ("to go", None),
    ],
)
def test_requests_by_hand(said, order):
    assert parse_request(f"customer : {said} assistant :") == order


@pytest.mark.parametrize(
    ("item", "ways"),
    [
        (
            Item("two", "large", "latte", "oat"),
            {"two large cups of oat latte", "two large cups of latte with oat milk"},
        ),
        (
            Item("one", "large", "latte", "oat"),
            {"one large cup of oat latte", "one large cup of latte with oat milk"},
        ),
        (Item("one", "small", "tea", "black"), {"one small cup of black tea"}),
    ],
)
def test_ways_to_say_an_item_by_hand(item, ways):
    rng = random.Random(0)
    assert {language.spoken_item(rng, item) for _ in range(60)} == ways


def test_three_orders_of_four_are_of_one_item_and_slots_are_drawn_evenly():
    rng, n = random.Random(4), 4000
    sampled = [sample_order(rng) for _ in range(n)]
    assert within_four_deviations(np.mean([len(order.items) == 1 for order in sampled]), 0.75, n)
    assert {len(order.items) for order in sampled} == {1, 2}
    assert all(len({item.drink for item in order.items}) == len(order.items) for order in sampled)
    options = {
        "quantity": language.QUANTITIES,
        "size": language.SIZES,
        "drink": language.DRINKS,
        "milk": language.MILKS,
    }
    for slot, values in options.items():
        counts = collections.Counter(getattr(order.items[0], slot) for order in sampled)
        assert set(counts) == set(values)
        assert all(
            within_four_deviations(count / n, 1 / len(values), n) for count in counts.values()
        )


def test_language_round_trip_stays_in_vocabulary_and_length():
    rng, words, longest, varieties = random.Random(1), set(language.vocabulary()), 0, set()
    for _ in range(4000):
        order = sample_order(rng)
        prompt = spoken_order(rng, order)
        assert parse_request(prompt) == order
        assert orders.gold_reward(prompt, answer(order)) == 1.0
        assert set(f"{prompt} {answer(order)}".split()) <= words
        # A request and its call have the words of every slot in common.
        assert {
            word for item in order.items for word in answer(Order((item,), "here")).split()[1:5]
        } <= set(prompt.split())
        assert len(answer(order).split()) <= LONGEST_RIGHT
        longest = max(longest, len(prompt.split()))
        varieties.add(prompt)
    assert longest == LONGEST_PROMPT == language.MAX_PROMPT_WORDS
    assert len(varieties) > 3900
    assert len(words) <= 200
    assert language.vocabulary() == sorted(words)


def test_every_generated_word_is_known_and_a_turn_ends_in_eos():
    word_level, texts = (
        word_tokenizer(language.vocabulary()),
        [row["text"] for row in orders.rows("corpus", "train", size=500)],
    )
    byte_level, unknown = train_bpe(texts[:50], 300), word_level.inner.unk_token_id
    assert END_OF_TURN not in language.vocabulary()
    for text in texts:
        ids = word_level.text_ids(text)
        assert unknown not in ids
        assert len(ids) == 1 + len(text.split()) + 1
        assert ids.count(word_level.eos_id) == 2
        response, _, reaction = text.partition("assistant : ")[2].partition(f" {END_OF_TURN} ")
        # What a base sees at the end of a turn is what a policy is taught to end a response with.
        ends = [*word_level.response_ids(response), *word_level.text_ids(reaction)[1:]]
        assert ids[-len(ends) :] == ends
    assert byte_level.text_ids(texts[0]).count(byte_level.eos_id) == 2
    for kind, fields in (
        ("comparisons", ("prompt", "chosen", "rejected")),
        ("labels", ("prompt", "response")),
    ):
        for row in orders.rows(kind, "train", size=500):
            assert all(unknown not in word_level.response_ids(row[field]) for field in fields)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_clerks_err_at_their_rate(rate):
    rng, n = random.Random(2), 3000
    wrong = 0
    for _ in range(n):
        order = sample_order(rng)
        wrong += orders.grade(order, orders.clerk(rng, order, rate)).reward < 1.0
    assert within_four_deviations(wrong / n, rate, n)


def test_clerks_answers_are_of_bounded_length():
    rng, longest = random.Random(5), 0
    for _ in range(3000):
        longest = max(longest, len(orders.clerk(rng, sample_order(rng), 0.9).split()))
    assert longest == LONGEST_RESPONSE


def test_every_kind_of_error_is_an_error():
    rng = random.Random(3)
    for change in orders.MISHEARD.values():
        for _ in range(200):
            order = sample_order(rng)
            assert orders.grade(order, answer(change(rng, order))).reward <= 0.5
    for change in orders.MISWRITTEN.values():
        for _ in range(200):
            order = sample_order(rng)
            assert orders.grade(order, change(rng, order, answer(order))).reward <= 0.5


def test_swapped_slots_and_missing_items_by_hand():
    rng, one, two = random.Random(6), Order(ORDER.items[:1], "to go"), ORDER
    swapped = {answer(orders.swapped_slots(rng, two)) for _ in range(60)}
    assert swapped == {
        "add one large latte oat ; add two small tea black ; to go",
        "add two small latte oat ; add one large tea black ; to go",
        "add two large latte black ; add one small tea oat ; to go",
    }
    alike = Order(
        (Item("two", "large", "latte", "oat"), Item("two", "large", "tea", "oat")), "to go"
    )
    for order in (one, alike):  # nothing to exchange: a wrong size
        assert orders.grade(order, answer(orders.swapped_slots(rng, order))).faults == (
            "wrong size",
        )
    missing = {answer(orders.missing_item(rng, two)) for _ in range(60)}
    assert missing == {"add two large latte oat ; to go", "add one small tea black ; to go"}
    # Of one item none can be forgotten: one is added.
    assert {orders.grade(one, answer(orders.missing_item(rng, one))).faults for _ in range(60)} == {
        ("extra drink",)
    }


# Kinds that a base of three layers can tell weigh 8, the five that take a comparison of slots 1: 45
# in all.
SLOT_KINDS = ("quantity", "size", "milk", "drink", "swapped")
OTHER_KINDS = ("place", "missing", "extra", "no place", "garbled")


def test_kinds_of_errors_follow_their_weights():
    assert {**dict.fromkeys(SLOT_KINDS, 1), **dict.fromkeys(OTHER_KINDS, 8)} == orders.ERROR_WEIGHTS
    assert set(orders.ERROR_WEIGHTS) == {*orders.MISHEARD, *orders.MISWRITTEN}
    rng, n = random.Random(7), 6000
    assert orders.kinds_of_errors(rng, 0) == []
    assert sorted(orders.kinds_of_errors(rng, 10)) == sorted(orders.ERROR_WEIGHTS)
    drawn = [tuple(orders.kinds_of_errors(rng, 2)) for _ in range(n)]
    assert all(first != second for first, second in drawn)
    firsts = collections.Counter(first for first, _ in drawn)
    for kind, p in (
        *((kind, 1 / 45) for kind in SLOT_KINDS),
        *((kind, 8 / 45) for kind in OTHER_KINDS),
    ):
        assert within_four_deviations(firsts[kind] / n, p, n)
    # Without replacement: after a kind of weight 8, 37 are left; after one of weight 1, 44.
    assert within_four_deviations(
        np.mean([pair == ("place", "garbled") for pair in drawn]), 8 / 45 * 8 / 37, n
    )
    assert within_four_deviations(
        np.mean([pair == ("size", "extra") for pair in drawn]), 1 / 45 * 8 / 44, n
    )


class OneMistake(random.Random):
    """Draws below any error rate once, then above: a clerk who is given a fresh one errs once."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.first = [0.0, 0.999]

    def random(self) -> float:
        return self.first.pop(0) if self.first else super().random()


def test_clerks_single_errors_on_one_item_by_hand():
    n, order = 4000, Order(ORDER.items[:1], "to go")
    graded = [orders.grade(order, orders.clerk(OneMistake(seed), order, 0.5)) for seed in range(n)]
    shares = collections.Counter(
        "garbled" if grade.malformed else " and ".join(grade.faults) for grade in graded
    )
    expected = {
        "wrong place": 16 / 45,  # `place` and `no place`
        "extra drink": 16 / 45,  # `extra`, and `missing` where there is one item
        "garbled": 8 / 45,
        "wrong size": 2 / 45,  # `size`, and `swapped` where there is one item
        "wrong number": 1 / 45,
        "wrong milk": 1 / 45,
        "wrong drink": 1 / 45,
    }
    assert set(shares) == set(expected)
    for faults, p in expected.items():
        assert within_four_deviations(shares[faults] / n, p, n), faults


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (RIGHT, "thanks , that is right"),
        ("add two small latte oat ; add one small tea black ; to go", "one mistake , wrong size"),
        (
            "add two small latte oat ; add one large tea black ; to go",
            "one mistake , wrong size",
        ),  # in both items
        (f"add one small mocha black ; {RIGHT}", "one mistake , extra drink"),
        ("add two large latte oat", "two mistakes , missing drink , wrong place"),
        (
            "add two large latte ; add one small tea black ; to go",
            "two mistakes , missing drink , garbled",
        ),
        (
            "add three small latte oat ; add one small tea black ; here",
            "many mistakes , wrong number , wrong size , wrong place",
        ),
        (
            "add three large latte soy ; add one large tea black ; here",
            "many mistakes , wrong number , wrong size , wrong milk , wrong place",
        ),
        ("add two large mocha oat ; add one small tea black ; to go", "one mistake , wrong drink"),
    ],
)
def test_reactions_by_hand(response, said):
    assert orders.reaction(ORDER, response) == said
    assert set(said.split()) <= set(language.vocabulary())


def test_raters_formulas_by_hand():
    assert orders.preference_probability(1.0, 0.5) == pytest.approx(1 / (1 + np.exp(-1.0)))
    assert orders.preference_probability(0.5, 1.0) == pytest.approx(1 / (1 + np.exp(1.0)))
    assert orders.preference_probability(0.0, 0.0) == 0.5
    assert orders.preference_probability(1.0, -1.0) == pytest.approx(0.98201379)  # 1 / (1 + e^-4)
    assert orders.thumb_probability(1.0) == pytest.approx(1 / (1 + np.exp(-2.0)))
    assert orders.thumb_probability(0.5) == pytest.approx(0.37754067)  # 1 / (1 + e^0.5)
    assert orders.noise_ceiling([0.9, 0.2, 0.5]) == pytest.approx((0.9 + 0.8 + 0.5) / 3)


def test_comparisons_are_calibrated_and_leave_room_for_a_judge():
    rows = list(orders.rows("comparisons", "train", size=6000))
    better, likely = [], []
    for row in rows:
        assert row["chosen"] != row["rejected"]
        gap = orders.gold_reward(row["prompt"], row["chosen"]) - orders.gold_reward(
            row["prompt"], row["rejected"]
        )
        assert row["probability"] == pytest.approx(1 / (1 + np.exp(-2.0 * gap)))
        likely.append(max(row["probability"], 1 - row["probability"]))
        better.append(row["probability"] > 0.5 or (row["probability"] == 0.5) * 0.5)
    ceiling = orders.noise_ceiling([row["probability"] for row in rows])
    assert ceiling == pytest.approx(np.mean(likely))
    # Last seen: 0.867. Four standard errors, of a mean of 6,000 numbers in [0.5, 1], are below
    # 0.008.
    assert 0.86 <= ceiling <= 0.875
    # The raters agree with the gold reward as often as the probabilities say: 4 standard deviations
    # of a mean of draws of different probabilities (a draw of 0.5 counts as half, without
    # deviation).
    likely = np.array(likely)
    assert abs(np.mean(better) - ceiling) < 4 * np.mean(likely * (1 - likely) / len(rows)) ** 0.5


def test_labels_are_calibrated():
    rows = list(orders.rows("labels", "train", size=7000))
    reward = orders.gold_rewards([row["prompt"] for row in rows], [row["response"] for row in rows])
    label = np.array([row["label"] for row in rows])
    assert set(label) == {0.0, 1.0}
    for value in (1.0, 0.5, -1.0):
        chosen = label[reward == value]
        assert len(chosen) > 500
        assert within_four_deviations(chosen.mean(), orders.thumb_probability(value), len(chosen))


def test_demonstrations_leave_room_and_corpus_is_prompt_response_reaction():
    rows = list(orders.rows("demonstrations", "train", size=3000))
    wrong = np.mean([orders.gold_reward(row["prompt"], row["response"]) < 1 for row in rows])
    assert within_four_deviations(wrong, 0.45, len(rows))
    for row in orders.rows("corpus", "train", size=500):
        head, cue, tail = row["text"].partition("assistant :")
        response, end, said = tail.partition(f" {END_OF_TURN} ")
        assert end
        order, response = parse_request(head + cue), response.removeprefix(" ")
        assert orders.reaction(order, response) == said
        assert (orders.gold_reward(head + cue, response) == 1) == (said == "thanks , that is right")


def test_splits_share_no_order():
    contents = {
        split: {
            parse_request(row["prompt"]).content
            for kind in ("prompts", "comparisons")
            for row in orders.rows(kind, split, size=500)
        }
        for split in ("train", "validation", "test")
    }
    for split, content in contents.items():
        assert len(content) > 300
        for other in contents.keys() - {split}:
            assert not content & contents[other]


def test_rows_depend_on_seed_kind_and_index_alone():
    whole = list(orders.rows("comparisons", "train", seed=7, size=40))
    assert whole[:10] == list(orders.rows("comparisons", "train", seed=7, size=10))
    assert whole != list(orders.rows("comparisons", "train", seed=8, size=40))
    assert len(list(orders.rows("labels", "test"))) == 1024


def test_golden_rows():
    """Did you mean to change the embedded task? Every number reported about it changes with it."""
    rows = [row for kind in orders.SIZES_OF_SPLITS for row in orders.rows(kind, "train", size=50)]
    text = json.dumps(
        [{k: v for k, v in row.items() if k != "probability"} for row in rows], sort_keys=True
    )
    assert hashlib.blake2b(text.encode(), digest_size=8).hexdigest() == "9c3753e667a44b94"
