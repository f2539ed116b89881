"""Conversations for cold movies, written by a language model from their metadata.

Claim     Conversations that even a very small language model writes through perl_jax's sampler from
          a movie's metadata make some movies findable that no training conversation mentions,
          fewer than a template does; recommend.py --augmented shows it by frequency.
Command   python experiments/conversational_recommendation/language_model.py --data-dir
          PATH_TO_REDIAL
          python experiments/conversational_recommendation/recommend.py --data-dir PATH_TO_REDIAL \\
              --augmented runs/conversational_recommendation/written/conversations.jsonl
          (--model writes with a model of yours; without it a small base is trained on the train
          side's conversations)
Hardware  2 CPU cores
Time      10 minutes beside other work, without the base's
Numbers   3,822 conversations; recall at 10 and 50 of the 865 targets that no training conversation
          mentions: .002 .002 without, .017 .050 with them, .044 .083 with eight by the template
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

from augment import Linker, cold_movies, neighbours_of, write_conversations
from documents import Passage, passages_of
from redial import Movie, ReDial, Turn, read_redial
from small_base import adapter_of, small_base, write_split
from systems import mention_counts
from texts import parsed, writer_example, writer_prompt

from perl_jax.data.config import DataConfig
from perl_jax.errors import UserError, require
from perl_jax.evaluation.best_of import BestOfConfig, run_best_of
from perl_jax.runtime import platforms

PROMPT, RESPONSE = 96, 96
# Of the samples for a movie, the one with turns of both speakers, then the longer one, is kept.
TERMS = [
    {"kind": "regex", "name": "both speakers", "pattern": r"seeker: \S[^\n]*\nrecommender: \S"},
    {"kind": "length", "name": "length", "minimum": 30, "weight": 0.1},
]


def written_prompts(
    movies: Sequence[Movie], neighbours: dict[str, list[str]], linker: Linker, copies: int
) -> list[dict[str, str]]:
    """One prompt a movie and copy; each copy names other neighbours, in turn."""
    rows = []
    for movie in movies:
        others = neighbours[movie.id]
        for copy in range(copies):
            rotated = (
                others[2 * copy % max(1, len(others)) :] + others[: 2 * copy % max(1, len(others))]
            )
            rows.append({"prompt": writer_prompt(movie, rotated, linker), "answer": movie.id})
    return rows


def as_passage(movie: str, text: str, linker: Linker, number: int) -> Passage | None:
    """A written conversation; None where nothing of it can be read as turns. It ends in the
    recommendation.
    """
    turns = parsed(text, linker)
    if not turns:
        return None
    if not turns[-1].movies or movie not in turns[-1].movies:
        turns = (*turns, Turn(False, f"You should watch @{movie}.", (movie,)))
    return Passage(movie, f"written {movie} {number}", turns, len(turns) - 1)


def run(options: argparse.Namespace) -> None:
    redial: ReDial = read_redial(options.data_dir)
    root: pathlib.Path = options.run
    folder = root / "written"
    linker = Linker(redial.movies)
    mentions = mention_counts(redial.train, {movie: i for i, movie in enumerate(redial.movies)})
    cold = cold_movies(redial.movies, mentions, options.below)[: options.movies]
    require(
        bool(cold),
        f"Every movie is in {options.below} training conversations or more; there is nothing to "
        "write.",
    )
    prompts = written_prompts(
        cold, neighbours_of(redial.movies, cold, mentions), linker, options.copies
    )
    steps = lambda n: max(2, round(n * options.scale))
    model, adapter = options.model, options.adapter
    if model is None:
        model = small_base(
            root, redial.train, redial.movies, steps(options.base_steps), options.seed
        )
        # The base has learned from such texts already; an adapter on top of it is specialised
        # further.
    if options.model is None and options.sft_steps:
        examples = [
            writer_example(p, redial.movies, linker)
            for p in passages_of(redial.train, "recommended")
            if p.at > 0 and p.movie in redial.movies
        ]
        rows = [{"prompt": prompt, "response": response} for prompt, response in examples]
        adapter = adapter_of(
            folder, "sft", model, rows, steps(options.sft_steps), (PROMPT, RESPONSE), options.seed
        )
    data = write_split(folder / "prompts", {"test": prompts})
    output = folder / "samples.jsonl"
    output.unlink(missing_ok=True)
    lengths = DataConfig(
        task="jsonl",
        data_dir=str(data),
        max_prompt_length=PROMPT,
        max_response_length=RESPONSE,
        bucket_count=1,
    )
    run_best_of(
        BestOfConfig(
            model=model,
            policy=adapter,
            terms=json.dumps(TERMS),
            n=options.samples,
            batch_size=128,
            data=lengths,
            split="test",
            output=str(output),
            temperature=options.temperature,
            seed=options.seed,
        )
    )
    # Prompts with an empty response have no line.
    found = {
        row["row"]: row["response"]
        for row in map(json.loads, output.read_text(encoding="utf-8").splitlines())
    }
    texts = [found.get(index, "") for index in range(len(prompts))]
    passages = [
        as_passage(row["answer"], text, linker, i)
        for i, (row, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    kept = [passage for passage in passages if passage is not None]
    require(
        bool(kept),
        "None of the model's texts can be read as a conversation; train longer, or give another "
        "--model.",
    )
    write_conversations(folder / "conversations.jsonl", kept)
    print(
        f"{len(kept)} conversations for {len(cold)} movies ({len(passages) - len(kept)} texts "
        f"without a turn left out): {folder / 'conversations.jsonl'}"
    )
    for passage in kept[:: max(1, len(kept) // 3)][:3]:
        name = linker.name(passage.movie)
        print(
            f"\n{name}\n"
            + "\n".join(
                f"  {'seeker' if turn.seeker else 'recommender'}: {linker.unlinked(turn.text)}"
                for turn in passage.turns
            )
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", help="a folder with ReDial's files; downloaded when left out")
    parser.add_argument(
        "--run",
        type=pathlib.Path,
        default=pathlib.Path("runs/conversational_recommendation"),
        help="folder of the experiment",
    )
    parser.add_argument("--model", help="a Hugging Face folder or hub name to write with")
    parser.add_argument("--adapter", help="a policy artefact of that model")
    parser.add_argument(
        "--below",
        type=int,
        default=1,
        help="write for movies in fewer training conversations than this",
    )
    parser.add_argument("--copies", type=int, default=1, help="conversations a movie")
    parser.add_argument("--samples", type=int, default=1, help="of which the best one is kept")
    parser.add_argument("--movies", type=int, help="at most so many movies")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--base-steps", type=int, default=600)
    parser.add_argument(
        "--sft-steps", type=int, default=0, help="of an adapter on the small base; 0: none"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every number of steps")
    options = parser.parse_args(arguments)
    platforms.use_cpu_if_no_accelerator()
    try:
        run(options)
    except UserError as error:
        print(f"language_model.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
