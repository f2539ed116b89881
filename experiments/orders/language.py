"""The language of the orders task: orders, what customers say, and the vocabulary.

An order is one or two drinks, each with a quantity, a size and a milk, and a place: to go or here.
A customer can say it in many ways: with other phrases, fillers, synonyms for the place and another
order of the parts. Every text is lower-case words separated by single spaces, so that a tokenizer
of whole words with `vocabulary()` covers the task. The milk of a drink without milk is `black`.
"""

from __future__ import annotations

import dataclasses
import random

QUANTITIES = ("one", "two", "three", "four", "five")
SIZES = ("small", "medium", "large")
MILKS = ("oat", "soy", "almond", "whole", "black")
NO_MILK = "black"
DRINKS = ("latte", "cappuccino", "mocha", "cortado", "chai", "tea", "espresso", "cocoa")
PLACES = ("to go", "here")
SPOKEN_PLACES = {"to go": ("to go", "takeaway"), "here": ("for here", "to stay")}
PLACE_WORDS = {"go": "to go", "takeaway": "to go", "here": "here", "stay": "here"}

OPENERS = ("", "hi ,", "hello ,", "hey ,", "morning ,", "so ,")
REQUESTS = (
    "could i get",
    "can i have",
    "i would like",
    "let me get",
    "give me",
    "i want",
    "we need",
    "",
)
FILLERS = ("um", "uh", "well")
CONNECTORS = ("and", "plus", "then")
CUSTOMER, ASSISTANT = "customer :", "assistant :"
MAX_PROMPT_WORDS = 28
SINGLE_ITEM_SHARE = 0.75


@dataclasses.dataclass(frozen=True, order=True)
class Item:
    """One drink of an order; each field is one of the words in `QUANTITIES`, `SIZES`, `DRINKS`
    or `MILKS`.
    """

    quantity: str
    size: str
    drink: str
    milk: str


@dataclasses.dataclass(frozen=True)
class Order:
    """A customer's order.

    Attributes:
        items: The drinks.
        place: Where they are drunk, one of `PLACES`.
    """

    items: tuple[Item, ...]
    place: str

    @property
    def content(self) -> str:
        """The right response to the order with its items sorted: equal for orders of equal
        items.
        """
        return answer(Order(tuple(sorted(self.items)), self.place))


def call(item: Item) -> str:
    """Returns the call that adds one item: `add QUANTITY SIZE DRINK MILK`."""
    return f"add {item.quantity} {item.size} {item.drink} {item.milk}"


def answer(order: Order) -> str:
    """Returns the right response to an order, for example `add two large latte oat ; to go`."""
    return " ; ".join([*map(call, order.items), order.place])


def sample_item(rng: random.Random, drink: str) -> Item:
    """Returns an item with the given drink and a random quantity, size and milk."""
    return Item(rng.choice(QUANTITIES), rng.choice(SIZES), drink, rng.choice(MILKS))


def sample_order(rng: random.Random) -> Order:
    """Returns a random order: one or two items of different drinks, and a place."""
    count = 1 if rng.random() < SINGLE_ITEM_SHARE else 2
    drinks = rng.sample(DRINKS, count)
    return Order(tuple(sample_item(rng, drink) for drink in drinks), rng.choice(PLACES))


def spoken_item(rng: random.Random, item: Item) -> str:
    """Returns one item as a customer may say it, in at most 8 words, for example `two large cups
    of tea with soy milk`.
    """
    cups = "cup" if item.quantity == "one" else "cups"
    if item.milk == NO_MILK or rng.random() < 0.5:
        return f"{item.quantity} {item.size} {cups} of {item.milk} {item.drink}"
    return f"{item.quantity} {item.size} {cups} of {item.drink} with {item.milk} milk"


def spoken_order(rng: random.Random, order: Order) -> str:
    """Returns a prompt of at most 28 words: what the customer says, then the assistant's cue."""
    place = rng.choice(SPOKEN_PLACES[order.place])
    opener, request = rng.choice(OPENERS), rng.choice(REQUESTS)
    items = f" {rng.choice(CONNECTORS)} ".join(spoken_item(rng, item) for item in order.items)
    filler = rng.choice(FILLERS) if rng.random() < 0.3 else ""
    please = "please" if rng.random() < 0.5 else ""
    if rng.random() < 0.3:
        parts = [opener, place, ",", request, filler, items, please]
    else:
        comma = "," if rng.random() < 0.5 else ""
        parts = [opener, request, filler, items, comma, place, please]
    text = f"{CUSTOMER} {' '.join(parts)} {ASSISTANT}"
    if len(text.split()) > MAX_PROMPT_WORDS:
        text = f"{CUSTOMER} {request} {items} {place} {ASSISTANT}"
    return " ".join(text.split())


def parse_item(words: list[str]) -> Item | None:
    """Returns the item that a part of a request asks for; None if a quantity, size, drink or milk
    is missing.

    Args:
        words: The words of the part; the first word of each kind counts.
    """
    said = [
        next((word for word in words if word in options), None)
        for options in (QUANTITIES, SIZES, DRINKS, MILKS)
    ]
    return None if None in said else Item(*said)


def parse_request(prompt: str) -> Order | None:
    """Returns the order that a prompt asks for; None if the prompt has no complete item or no
    place.
    """
    words = prompt.split()
    stretches: list[list[str]] = [[]]
    for word in words:
        if word in CONNECTORS:
            stretches.append([])
        else:
            stretches[-1].append(word)
    items = tuple(item for item in map(parse_item, stretches) if item is not None)
    places = [PLACE_WORDS[word] for word in words if word in PLACE_WORDS]
    return Order(items, places[0]) if items and places else None


MISTAKES = ("one mistake", "two mistakes", "many mistakes")
REACTION_WORDS = (
    "thanks", "that", "is", "right", "wrong", "missing", "extra", "number", "size", "milk", "drink",
    "place", "garbled", *(word for phrase in MISTAKES for word in phrase.split()),
)  # fmt: skip
# In corpus rows the assistant's turn ends with the eos token of the tokenizers that this package
# makes (and of the Llama family). So a base learns that token, and the reaction that follows it.
END_OF_TURN = "</s>"


def vocabulary() -> list[str]:
    """Returns all words of prompts, responses and reactions, sorted."""
    phrases = [*OPENERS, *REQUESTS, *FILLERS, *CONNECTORS, CUSTOMER, ASSISTANT, *PLACES]
    phrases += [spoken for options in SPOKEN_PLACES.values() for spoken in options]
    words = {word for phrase in phrases for word in phrase.split()}
    words |= {*QUANTITIES, *SIZES, *MILKS, *DRINKS, *REACTION_WORDS}
    words |= {",", ";", ":", "add", "cup", "cups", "of", "with", "milk", "please"}
    return sorted(words)
