"""The task `orders`: take an order at a coffee bar. The true (gold) reward is known.

Nothing is downloaded: every row is generated from a seed. Simulated clerks, more or less reliable,
answer customers. Simulated raters prefer responses by the gold reward, with noise. So the best
accuracy that any reward model can reach is known (`noise_ceiling`), and learning, over-optimisation
and the effect of label noise can be measured exactly.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from perl_jax.data.config import DataConfig
from perl_jax.data.store import SPLITS, TENTHS, RowsBuilder, part_of
from perl_jax.data.tasks import PreparedTask

from . import language
from .language import (
    DRINKS,
    END_OF_TURN,
    MILKS,
    MISTAKES,
    PLACES,
    QUANTITIES,
    SIZES,
    Item,
    Order,
    answer,
    call,
    parse_request,
    sample_item,
    sample_order,
    spoken_order,
    vocabulary,
)

__all__ = [
    "ORDERS",
    "clerk",
    "gold_reward",
    "gold_rewards",
    "grade",
    "noise_ceiling",
    "rows",
    "vocabulary",
]

SLOT_COST, MISSING_COST, EXTRA_COST, MALFORMED_COST = 0.5, 1.5, 1.0, 0.5
SLOTS = {"drink": "drink", "quantity": "number", "size": "size", "milk": "milk"}
RATER_STEEPNESS, THUMB_STEEPNESS = 2.0, 5.0
THUMB_THRESHOLD = 0.6
CORPUS_ERROR_RATES = (0.05, 0.3, 0.5, 0.7)
DEMONSTRATION_ERROR_RATE = 0.45
COMPARED_ERROR_RATES = (0.05, 0.5, 0.9)
SIZES_OF_SPLITS = {
    "corpus": {"train": 20_000, "validation": 500, "test": 500},
    "demonstrations": {"train": 4_000, "validation": 256, "test": 512},
    "comparisons": {"train": 8_000, "validation": 512, "test": 1_024},
    "labels": {"train": 8_000, "validation": 512, "test": 1_024},
    "prompts": {"train": 4_000, "validation": 256, "test": 512},
}


@dataclasses.dataclass(frozen=True)
class Grade:
    """The mistakes in a response to an order.

    Attributes:
        slots: The wrong slots of matched items, keys of `SLOTS`.
        missing: Number of requested items that are missing.
        extra: Number of items that were not requested.
        place: Whether the place is wrong or missing.
        malformed: Number of segments that are neither a call nor the place.
    """

    slots: tuple[str, ...]
    missing: int
    extra: int
    place: bool
    malformed: int

    @property
    def reward(self) -> float:
        """The gold reward, in [-1, 1] (`gold_reward`)."""
        cost = SLOT_COST * (len(self.slots) + self.place) + MISSING_COST * self.missing
        cost += EXTRA_COST * self.extra + MALFORMED_COST * self.malformed
        return max(-1.0, 1.0 - cost)

    @property
    def faults(self) -> tuple[str, ...]:
        """The names of the kinds of mistakes as a customer says them, each once, in a fixed
        order.
        """
        named = [f"wrong {SLOTS[slot]}" for slot in SLOTS if slot in self.slots]
        named += ["missing drink"] * bool(self.missing) + ["extra drink"] * bool(self.extra)
        return (*named, *["wrong place"] * self.place, *["garbled"] * bool(self.malformed))


def parse_call(segment: Sequence[str]) -> Item | None:
    """Returns the item of a well-formed `add QUANTITY SIZE DRINK MILK`, otherwise None.

    Args:
        segment: The words of one segment of a response.
    """
    if len(segment) != 5 or segment[0] != "add":
        return None
    _, quantity, size, drink, milk = segment
    known = quantity in QUANTITIES and size in SIZES and drink in DRINKS and milk in MILKS
    return Item(quantity, size, drink, milk) if known else None


def parse_response(response: str) -> tuple[list[Item], str | None, int]:
    """Returns (items, place or None, number of malformed segments) of a response.

    Segments are separated by `;`. The last segment may be the place. Every other segment that is
    not a call is malformed, an empty one too. An empty response has one empty segment.
    """
    segments: list[list[str]] = [[]]
    for word in response.split():
        if word == ";":
            segments.append([])
        else:
            segments[-1].append(word)
    place = " ".join(segments[-1]) if " ".join(segments[-1]) in PLACES else None
    calls = [parse_call(segment) for segment in (segments[:-1] if place else segments)]
    items = [item for item in calls if item is not None]
    return items, place, len(calls) - len(items)


def wrong_slots(wanted: Item, given: Item) -> tuple[str, ...]:
    """Returns the names of the slots in which two items differ."""
    return tuple(slot for slot in SLOTS if getattr(wanted, slot) != getattr(given, slot))


def match_items(wanted: Sequence[Item], given: Sequence[Item]) -> tuple[tuple[str, ...], int, int]:
    """Returns (wrong slots, number of missing items, number of extra items) of the cheapest
    matching.

    Each given item is matched to at most one wanted item. A wrong slot of a pair costs `SLOT_COST`,
    a missing item `MISSING_COST`, and an extra item `EXTRA_COST`. The matching is found by dynamic
    programming over subsets of the wanted items, of which there are few. Its time is linear in the
    number of given items, so that a degenerate response with many calls is graded quickly.

    Args:
        wanted: The requested items.
        given: The items of the response.
    """
    best: dict[frozenset[int], tuple[float, tuple[str, ...]]] = {frozenset(): (0.0, ())}
    for item in given:
        longer = dict(best)
        for taken, (cost, slots) in best.items():
            for index in set(range(len(wanted))) - taken:
                wrong = wrong_slots(wanted[index], item)
                candidate = (cost + SLOT_COST * len(wrong), slots + wrong)
                key = taken | {index}
                longer[key] = min(longer.get(key, (math.inf, ())), candidate)
        best = longer
    unmatched_cost = MISSING_COST + EXTRA_COST
    taken, (_, slots) = min(
        best.items(), key=lambda kv: (kv[1][0] - unmatched_cost * len(kv[0]), kv[1][1])
    )
    return slots, len(wanted) - len(taken), len(given) - len(taken)


def grade(order: Order, response: str) -> Grade:
    """Returns the mistakes in a response to an order. Any string is a response."""
    items, place, malformed = parse_response(response)
    slots, missing, extra = match_items(order.items, items)
    return Grade(slots, missing, extra, place != order.place, malformed)


def gold_reward(prompt: str, response: str) -> float:
    """Returns the true reward of a response, in [-1, 1]; 1 only for a perfect order.

        g = max(-1, 1 - 0.5 (wrong slots + wrong or missing place + malformed segments)
                      - 1.5 (missing items) - 1.0 (extra items))

    Given items are matched to requested items at the least cost, in any order. The slots of a
    matched item are drink, quantity, size and milk. Words after the place make the last segment
    malformed and the place missing. The reward is defined for all strings; a prompt that is not a
    request gives -1.
    """
    order = parse_request(prompt)
    return -1.0 if order is None else grade(order, response).reward


def gold_rewards(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """Returns `gold_reward` of each prompt and its response, float32 [n]."""
    pairs = zip(prompts, responses, strict=True)
    return np.asarray([gold_reward(prompt, response) for prompt, response in pairs], np.float32)


# ---------------------------------------------------------------------------------- clerks


def other(rng: random.Random, options: Iterable, value):
    """Returns a random option other than `value`.

    Args:
        rng: The random generator, which is advanced.
        options: The options.
        value: The option to leave out.
    """
    return rng.choice([option for option in options if option != value])


def with_item(order: Order, index: int, item: Item) -> Order:
    """Returns an order with the item at `index` replaced by `item`."""
    items = (*order.items[:index], item, *order.items[index + 1 :])
    return dataclasses.replace(order, items=items)


def wrong_slot(slot: str, options: Sequence[Any], rng: random.Random, order: Order) -> Order:
    """Returns the order with another value in one slot of one random item.

    Args:
        slot: The name of the slot, a key of `SLOTS`.
        options: The values that the slot can have.
        rng: The random generator, which is advanced.
        order: The order.
    """
    i = rng.randrange(len(order.items))
    value = other(rng, options, getattr(order.items[i], slot))
    return with_item(order, i, dataclasses.replace(order.items[i], **{slot: value}))


wrong_quantity = functools.partial(wrong_slot, "quantity", QUANTITIES)
wrong_size = functools.partial(wrong_slot, "size", SIZES)
wrong_milk = functools.partial(wrong_slot, "milk", MILKS)
wrong_drink = functools.partial(wrong_slot, "drink", DRINKS)


def wrong_place(rng: random.Random, order: Order) -> Order:
    """Returns the order with the other place."""
    return dataclasses.replace(order, place=other(rng, PLACES, order.place))


def missing_item(rng: random.Random, order: Order) -> Order:
    """Returns the order without one random item; an order of one item gets an extra item
    instead.
    """
    if len(order.items) < 2:
        return extra_item(rng, order)
    i = rng.randrange(len(order.items))
    return dataclasses.replace(order, items=order.items[:i] + order.items[i + 1 :])


def extra_item(rng: random.Random, order: Order) -> Order:
    """Returns the order with one more random item."""
    item = sample_item(rng, rng.choice(DRINKS))
    return dataclasses.replace(order, items=(*order.items, item))


def swapped_slots(rng: random.Random, order: Order) -> Order:
    """Returns the order with quantity, size or milk exchanged between its first two items.

    Without two items that differ in one of them, one item gets a wrong size instead.
    """
    if len(order.items) < 2:
        return wrong_size(rng, order)
    first, second = order.items[:2]
    differing = [slot for slot in wrong_slots(first, second) if slot != "drink"]
    if not differing:
        return wrong_size(rng, order)
    slot = rng.choice(differing)
    swapped = with_item(order, 0, dataclasses.replace(first, **{slot: getattr(second, slot)}))
    return with_item(swapped, 1, dataclasses.replace(second, **{slot: getattr(first, slot)}))


def without_place(rng: random.Random, order: Order, text: str) -> str:
    """Returns the response without the place, written anew from the order; `text` is not read."""
    return " ; ".join(map(call, order.items))


def garbled(rng: random.Random, order: Order, text: str) -> str:
    """Returns the text with one random word, other than `;`, left out or repeated; `order` is
    not read.
    """
    words = text.split()
    at = rng.choice([i for i, word in enumerate(words) if word != ";"])
    return " ".join(words[:at] + words[at : at + 1] * rng.choice((0, 2)) + words[at + 1 :])


MISHEARD = {
    "quantity": wrong_quantity, "size": wrong_size, "milk": wrong_milk, "drink": wrong_drink,
    "place": wrong_place, "missing": missing_item, "extra": extra_item, "swapped": swapped_slots,
}  # fmt: skip
MISWRITTEN = {"no place": without_place, "garbled": garbled}
# To see that one slot was misheard, a model has to compare two words that are far apart. A base of
# three layers does not learn that in a minute, so most errors are of kinds that it can recognise.
ERROR_WEIGHTS = {
    "quantity": 1, "size": 1, "milk": 1, "drink": 1, "swapped": 1,
    "place": 8, "missing": 8, "extra": 8, "no place": 8, "garbled": 8,
}  # fmt: skip


def kinds_of_errors(rng: random.Random, count: int) -> list[str]:
    """Returns `count` distinct kinds of errors, keys of `ERROR_WEIGHTS`, drawn with these
    weights without replacement.
    """
    kinds, weights = [*ERROR_WEIGHTS], [*ERROR_WEIGHTS.values()]
    drawn: list[str] = []
    while len(drawn) < count:
        kind = rng.choices(kinds, weights)[0]
        drawn += [] if kind in drawn else [kind]
    return drawn


def clerk(rng: random.Random, order: Order, error_rate: float) -> str:
    """Returns a clerk's response to an order, with 0 to 3 kinds of errors.

    The first error has probability `error_rate`; after each error the next one has the same
    probability. Errors that cancel each other are drawn again, so a clerk with errors never earns
    the reward 1.

    Args:
        rng: The random generator, which is advanced.
        order: The order.
        error_rate: The probability of an error, in [0, 1].
    """
    count = 0
    while count < 3 and rng.random() < error_rate:
        count += 1
    while True:
        kinds = kinds_of_errors(rng, count)
        heard = order
        for kind in kinds:
            heard = MISHEARD[kind](rng, heard) if kind in MISHEARD else heard
        text = answer(heard)
        # In the order of the table, because "no place" writes the text anew.
        for kind in [kind for kind in MISWRITTEN if kind in kinds]:
            text = MISWRITTEN[kind](rng, heard, text)
        if (grade(order, text).reward < 1.0) == (count > 0):
            return text


def reaction(order: Order, response: str) -> str:
    """Returns the customer's answer to a response: that it is right, or the number and the kinds
    of mistakes.
    """
    faults = grade(order, response).faults
    if not faults:
        return "thanks , that is right"
    return f"{MISTAKES[min(len(faults), len(MISTAKES)) - 1]} , {' , '.join(faults)}"


# ---------------------------------------------------------------------------- raters and rows


def sigmoid(x: float) -> float:
    """Returns 1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + math.exp(-x))


def preference_probability(reward_a: float, reward_b: float) -> float:
    """Returns p(a is preferred to b) = sigmoid(k (g_a - g_b)) with k = 2 and gold rewards g.

    This is the Bradley-Terry model over the gold reward.
    """
    return sigmoid(RATER_STEEPNESS * (reward_a - reward_b))


def thumb_probability(reward: float) -> float:
    """Returns p(thumbs up) = sigmoid(k (g - 0.6)) with k = 5 and the gold reward g.

    The probability is 0.88 for a perfect order and 0.38 for one with a wrong slot.
    """
    return sigmoid(THUMB_STEEPNESS * (reward - THUMB_THRESHOLD))


def noise_ceiling(probabilities: Sequence[float]) -> float:
    """Returns mean(max(p, 1 - p)), the expected accuracy of a judge that knows the gold reward.

    Args:
        probabilities: p of each comparison: the probability that its chosen response is preferred.
    """
    p = np.asarray(probabilities, np.float64)
    return float(np.mean(np.maximum(p, 1.0 - p)))


def split_of(order: Order) -> str:
    """Returns the split of an order, by a hash of its content: the same for all seeds and kinds
    of rows.
    """
    return part_of(order.content, TENTHS)


def row_rng(seed: int, kind: str, split: str, index: int) -> random.Random:
    """Returns a new random generator for one row, which depends on the arguments alone.

    Args:
        seed: The data seed.
        kind: The kind of the row.
        split: Its split.
        index: Its number in the split, from 0.
    """
    digest = hashlib.blake2b(f"{seed}/{kind}/{split}/{index}".encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "big"))


def sample_order_of(rng: random.Random, split: str) -> Order:
    """Returns a random order that belongs to a split; draws orders until one does."""
    while True:
        order = sample_order(rng)
        if split_of(order) == split:
            return order


def comparison(rng: random.Random, order: Order, prompt: str) -> dict:
    """Returns a row with two different responses of clerks, ordered by a simulated rater.

    Its keys are `prompt`, `chosen`, `rejected` and `probability`, that of preferring `chosen`.

    Args:
        rng: The random generator, which is advanced.
        order: The order.
        prompt: The prompt that asks for the order.
    """
    first = clerk(rng, order, rng.choice(COMPARED_ERROR_RATES))
    second = first
    while second == first:
        second = clerk(rng, order, rng.choice(COMPARED_ERROR_RATES))
    p = preference_probability(grade(order, first).reward, grade(order, second).reward)
    if rng.random() < p:
        return {"prompt": prompt, "chosen": first, "rejected": second, "probability": p}
    return {"prompt": prompt, "chosen": second, "rejected": first, "probability": 1.0 - p}


def row(kind: str, split: str, seed: int, index: int) -> dict:
    """Returns one row of a kind and split; the number of rows does not change it.

    Args:
        kind: A key of `SIZES_OF_SPLITS`.
        split: train, validation or test.
        seed: The data seed.
        index: The row's number in the split, from 0.
    """
    rng = row_rng(seed, kind, split, index)
    order = sample_order_of(rng, split)
    prompt = spoken_order(rng, order)
    if kind == "prompts":
        return {"prompt": prompt}
    if kind == "comparisons":
        return comparison(rng, order, prompt)
    if kind == "demonstrations":
        return {"prompt": prompt, "response": clerk(rng, order, DEMONSTRATION_ERROR_RATE)}
    if kind == "labels":
        response = clerk(rng, order, rng.choice(COMPARED_ERROR_RATES))
        up = rng.random() < thumb_probability(grade(order, response).reward)
        return {"prompt": prompt, "response": response, "label": float(up)}
    response = clerk(rng, order, rng.choice(CORPUS_ERROR_RATES))
    return {"text": f"{prompt} {response} {END_OF_TURN} {reaction(order, response)}"}


def rows(kind: str, split: str, seed: int = 0, size: int | None = None) -> Iterator[dict]:
    """Yields the rows of a kind and split.

    Args:
        kind: A key of `SIZES_OF_SPLITS`.
        split: train, validation or test.
        seed: The data seed.
        size: The number of rows; None: the number in `SIZES_OF_SPLITS`.
    """
    count = SIZES_OF_SPLITS[kind][split] if size is None else size
    return (row(kind, split, seed, index) for index in range(count))


class OrdersBuilder(RowsBuilder):
    """Writes the task's rows; the settings are the data seed and the sizes of the splits."""

    name = "orders"
    sources = (language,)

    @classmethod
    def kind_splits(cls) -> dict[str, tuple[str, ...]]:
        """Returns the splits of each kind of rows: every kind has all three."""
        return dict.fromkeys(SIZES_OF_SPLITS, SPLITS)

    @classmethod
    def content(cls, kind: str, config: DataConfig) -> object:
        """Returns the data seed and the number of rows of each split; None: the one in
        `SIZES_OF_SPLITS`.
        """
        return {"seed": config.data_seed, "sizes": {split: config.size(split) for split in SPLITS}}

    @classmethod
    def rows(cls, kind: str, split: str, config: DataConfig) -> Iterator[dict]:
        """Returns an iterator over the rows of a split (`rows`), generated from the data seed."""
        return rows(kind, split, config.data_seed, config.size(split))


# `--data.task experiments/orders/data.py:ORDERS`
ORDERS = PreparedTask(
    OrdersBuilder, gold=gold_rewards, vocabulary=tuple(vocabulary()), options=("data_seed",)
)
