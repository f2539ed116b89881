"""Key of array dimensions, and the batches that data, training steps and rollouts exchange.

The name of an array ends in the letters of its dimensions (`logits_BTV`, `kernel_LDF`):

    B batch (rows)        T tokens of a whole sequence     S key positions, columns of a prompt
    D model width         F feed-forward width             V vocabulary
    H query heads         N key/value heads                K head dimension
    L layers              R adapter rank                   G samples per prompt
    P prompts (columns of a prompt in tokens_BP)           M microbatches
    C completion (response) tokens                         W packed rows
    U token capacity of a packed row                       X, Y, Z: local to a function

Every token array comes with two masks. The tokenizer makes them, and no code infers them from token
ids: the padding id may equal an end-of-sequence id, and a prompt may contain either.

    valid_BT     True on real tokens, False on padding (left, right or both)
    response_BT  True on the tokens that a loss covers: the response, with its sampled
        end-of-sequence token
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import flax.struct
import jax
import numpy as np

Array: TypeAlias = jax.Array | np.ndarray
Tree = Any


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the packed form of a batch (`models.packing`).

    Packed rows hold real tokens only; the parts of a model that compute each token by itself read
    them. Each packed row holds the tokens of B / W consecutive rows of the batch.

    Attributes:
        capacity: U, the tokens that a packed row of one microbatch has room for.
        parts: W, the number of packed rows.
        group: Number of consecutive rows that begin with the same prompt in the same columns. A
            packed row holds the tokens of such a prompt once. 1: no rows share a prompt.
        microbatches: Number of microbatches that the batch will be split into. A pass over the
            whole batch needs the capacity of all of them together.
    """

    capacity: int
    parts: int = 1
    group: int = 1
    microbatches: int = 1

    @property
    def total_capacity(self) -> int:
        """U of the whole batch: the capacity of all its microbatches together."""
        return self.capacity * self.microbatches


@flax.struct.dataclass
class Tokens:
    """A batch of padded sequences. A row whose `valid_BT` is all False is filler and has no weight.

    Attributes:
        tokens_BT: Token ids, int32.
        valid_BT: True on real tokens (module docstring).
        response_BT: True on the tokens that a loss covers (module docstring).
        layout: How the batch is packed (static). None: the batch stays padded.
    """

    tokens_BT: Array
    valid_BT: Array
    response_BT: Array
    layout: Layout | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def group(self) -> int:
        """Number of consecutive rows that share a packed prompt; 1 where the batch is padded."""
        return 1 if self.layout is None else self.layout.group

    def of_microbatch(self) -> Tokens:
        """Returns the tokens with the layout of one microbatch; the arrays stay the same."""
        return (
            self
            if self.layout is None
            else dataclasses.replace(self, layout=dataclasses.replace(self.layout, microbatches=1))
        )


@flax.struct.dataclass
class Pairs:
    """Comparisons of two responses to one prompt.

    Attributes:
        chosen: Prompts with the preferred responses.
        rejected: Prompts with the other responses.
        weight_B: Weight of each pair in a loss, float32; 0 on filler rows.
        probability_B: Probability that the chosen response is preferred; NaN where the data do not
            say. None: no row has one.
        margin_B: How much better the chosen response is, in units of the score; 0 where the data do
            not say. None: no row has one.
    """

    chosen: Tokens
    rejected: Tokens
    weight_B: Array
    probability_B: Array | None = None
    margin_B: Array | None = None


@flax.struct.dataclass
class Labelled:
    """Responses with a label or a rating.

    Attributes:
        tokens: Prompts with their responses.
        label_B: A label in [0, 1] or a rating, float32.
        weight_B: Weight of each row in a loss, float32; 0 on filler rows.
        mismatched: The same prompts with responses of other rows, which KTO reads. None: not
            needed.
    """

    tokens: Tokens
    label_B: Array
    weight_B: Array
    mismatched: Tokens | None = None


@flax.struct.dataclass
class Prompts:
    """Prompts padded on the left, so that every response begins at column P.

    Attributes:
        tokens_BP: Token ids, int32.
        valid_BP: True on real tokens.
        row_B: Index of each row in its data source, int32, for finding its text; -1 on filler rows.
    """

    tokens_BP: Array
    valid_BP: Array
    row_B: Array

    def repeated(self, samples: int) -> Prompts:
        """Returns the prompts with `samples` consecutive copies of every row, as host arrays."""
        return jax.tree.map(lambda leaf: np.repeat(leaf, samples, axis=0), self)
