"""Array dimension key and the batches that flow between data, steps and rollouts.

Names of arrays end in the letters of their dimensions (`logits_BTV`, `kernel_LDF`):

    B batch (rows)        T tokens of a whole sequence     S key positions, columns of a prompt
    D model width         F feed-forward width             V vocabulary
    H query heads         N key/value heads                K head dimension
    L layers              R adapter rank                   G samples per prompt
    P prompts (columns of a prompt in tokens_BP)           M microbatches
    C completion (response) tokens                         W packed rows
    U slots of a packed row                                X, Y, Z: local to a function

Two masks travel with every token array, from the tokenizer to the loss, and are never inferred
from token ids (the padding id may equal an end-of-sequence id, and either may occur in a prompt):

    valid_BT     True on real tokens, False on padding (left, right or both)
    response_BT  True on the tokens a loss is taken over: the response, its sampled eos included
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import numpy as np

Array = jax.Array | np.ndarray
Tree = Any


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a batch is packed for the parts of a model that read tokens one by one
    (`models.packing`).

    slots: U, the room of a packed row of a microbatch. parts: W, packed rows, each of so many
    consecutive rows. group: consecutive rows that begin with the same prompt in the same columns;
    its tokens are then computed once. microbatches: that the batch will be split into; read whole
    it needs their room together.
    """

    slots: int
    parts: int = 1
    group: int = 1
    microbatches: int = 1

    @property
    def room(self) -> int:
        """U of the batch as it is."""
        return self.slots * self.microbatches


@flax.struct.dataclass
class Tokens:
    """Padded sequences. A row of all-False `valid_BT` is filler and carries no weight.

    tokens_BT: int32 ids. valid_BT, response_BT: bool (module docstring). layout: static; None: not
    packed.
    """

    tokens_BT: Array
    valid_BT: Array
    response_BT: Array
    layout: Layout | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def group(self) -> int:
        """Rows next to each other that share a packed prompt; 1 where the batch is padded."""
        return 1 if self.layout is None else self.layout.group

    def of_microbatch(self) -> Tokens:
        """As a microbatch of the batch is packed."""
        return (
            self
            if self.layout is None
            else self.replace(layout=dataclasses.replace(self.layout, microbatches=1))
        )


@flax.struct.dataclass
class Pairs:
    """Comparisons of two responses to one prompt; `weight_B` float32 is 0 on filler rows.

    probability_B: of the chosen one being preferred, NaN where not known. margin_B: by how much it
    is better, 0 where nothing is said. None: of no row.
    """

    chosen: Tokens
    rejected: Tokens
    weight_B: Array
    probability_B: Array | None = None
    margin_B: Array | None = None


@flax.struct.dataclass
class Labelled:
    """Responses with a label in [0, 1] or a rating (float32); `weight_B` float32 is 0 on filler
    rows.
    """

    tokens: Tokens
    label_B: Array
    weight_B: Array


@flax.struct.dataclass
class Prompts:
    """Left-padded prompts, so that every row continues at column P.

    row_B: int32 index of the row in its source (-1 on filler rows), for looking its text up.
    """

    tokens_BP: Array
    valid_BP: Array
    row_B: Array

    def repeated(self, samples: int) -> Prompts:
        """Every row `samples` times, on the host: the samples of a prompt are rows next to each
        other.
        """
        return jax.tree.map(lambda leaf: np.repeat(leaf, samples, axis=0), self)
