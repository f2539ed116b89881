"""Conversational recommendation as retrieval, on ReDial's 1,342 test dialogues.

Claim     BM25 over documents of metadata and training conversations, without any training, from
          1,813 of the 10,006 train dialogues, recalls about as many of ReDial's recommended movies
          as KGSF is published with; what fields, similar seekers and made-up conversations add is
          in one table, with and without movies that the conversation had already mentioned.
          Repeating the context alone has a better recall at 1 than most published systems.
Command   python experiments/conversational_recommendation/recommend.py --data-dir PATH_TO_REDIAL
          (without --data-dir ReDial is downloaded, the whole train split with it)
Hardware  2 CPU cores
Time      2.2 minutes with one of the cores taken by other work; index of all fields 1.4 s, 4,600
          queries a second
Numbers   recall at 1, 10, 50, all targets: BM25 .030 .168 .343 (metadata alone .022 .086 .139),
          with similar seekers and made-up conversations .040 .191 .368; only movies not mentioned
          before: .028 .140 .311 and .035 .156 .325; repeating the context .053 .145 .252,
          popularity .013 .060 .175. Published: KBRD .030 .163 .338, KGSF .039 .183 .378, UniCRS
          .051 .224 .428
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from augment import AugmentConfig, read_conversations, template_conversations
from documents import FIELDS, METADATA, PAPER, DocumentConfig, Tokenizer, TokenizerConfig
from ranked import (
    BUCKETS,
    VIEWS,
    Ranked,
    Target,
    case_rows,
    gain_of,
    rank,
    selected,
    summary_of,
    targets_of,
    turns_summary,
    write_rows,
)
from ranking import MEASURES, Summary
from redial import ReDial, read_redial, split_validation
from retrieval import BM25Config, Fixed, QueryConfig, Random, Repeat, popularity
from systems import (
    AUGMENT_GRID,
    GRID,
    USER_GRID,
    Data,
    Settings,
    Trial,
    Validation,
    build,
    check_apart,
    mention_counts,
    tune,
)
from users import UserConfig

from perl_jax.errors import UserError
from perl_jax.runtime import files

# Recall at 1, 10, 50 on ReDial, as their authors published them, trained on the whole train split.
PUBLISHED = {
    "ReDial": (0.023, 0.129, 0.287),
    "KBRD": (0.030, 0.163, 0.338),
    "KGSF": (0.039, 0.183, 0.378),
    "RevCore": (0.046, 0.220, 0.396),
    "UniCRS": (0.051, 0.224, 0.428),
    "C2-CRS": (0.053, 0.233, 0.407),
    "VRICR": (0.054, 0.244, 0.406),
    "MESE": (0.056, 0.256, 0.455),
}
PUBLISHED_TRAIN = 10_006
MAIN, BEST = "BM25, all fields", "BM25 + similar seekers + made-up"


def tuned(
    redial: ReDial, fields: Sequence[str]
) -> tuple[dict[str, Settings], dict[str, list[Trial]]]:
    """Settings chosen on validation dialogues alone: of the documents, of the paper's kind of
    documents, and of what is added.
    """
    fit, validation = split_validation(redial.train)
    score = Validation(fit, validation, redial.movies)
    print(
        f"tuning on {len(validation)} validation dialogues, documents from {len(fit)} of other "
        "workers",
        flush=True,
    )
    plain = tuple(field for field in fields if field != "augmented")
    settings, trials = tune(Settings(documents=DocumentConfig(plain)), score, GRID)
    kind = {"of", "span", "turns"}
    paper, paper_trials = tune(
        settings.with_(documents=dataclasses.replace(PAPER, fields=plain)),
        score,
        [g for g in GRID if g[0] == "bm25" and g[1] not in kind],
        1,
    )
    users, user_trials = tune(settings.with_(users=UserConfig()), score, USER_GRID, 1)
    made_up = settings.with_(
        documents=dataclasses.replace(settings.documents, fields=(*plain, "augmented"))
    )
    made_up, augment_trials = tune(made_up, score, AUGMENT_GRID, 1)
    best = made_up.with_(users=users.users)
    chosen = {
        "documents": settings,
        "paper": paper,
        "users": users,
        "augmented": made_up,
        "best": best,
    }
    return chosen, {
        "documents": trials,
        "paper": paper_trials,
        "users": user_trials,
        "augmented": augment_trials,
    }


def variants(settings: Mapping[str, Settings]) -> dict[str, Settings]:
    """Every row of the table that is BM25, by its name."""
    main = settings["documents"]
    fields = main.documents.fields
    document = lambda **change: main.with_(documents=dataclasses.replace(main.documents, **change))
    rows = {"BM25, the paper's documents": settings["paper"], MAIN: main}
    if len(fields) > 1:
        rows |= {
            f"  without {field}": document(fields=tuple(f for f in fields if f != field))
            for field in fields
        }
    metadata = tuple(field for field in fields if field in METADATA)
    if metadata and "conversations" in fields:
        rows |= {
            "  metadata alone": document(fields=metadata),
            "  conversations alone": document(fields=("conversations",)),
        }
        rows |= {f"  conversations, {n} turns around": document(turns=n) for n in (1, 4)}
    users = settings["users"]
    change = lambda alike: users.with_(users=dataclasses.replace(users.users, alike=alike))
    rows |= {
        "BM25 + conversations, any seeker": change(0.0),
        "BM25 + similar seekers": users,
        "BM25 + similar seekers alone": change(1.0),
        "BM25 + made-up, template": settings["augmented"],
        BEST: settings["best"],
    }
    return rows


def run(
    redial: ReDial, settings: Mapping[str, Settings], augmented: pathlib.Path | None
) -> tuple[dict[str, Ranked], list[Target], dict[str, Any]]:
    """Ranks every test target by every system; also what building took."""
    data = Data(redial.movies, redial.train)
    check_apart(data, redial.test)
    position, mentions = data.position, mention_counts(redial.train, data.position)
    targets = targets_of(redial.test, position, mentions)
    popular = popularity(redial.train, position)
    ranked = {
        "random": rank(Random(len(position)), targets, position),
        "popularity": rank(Fixed(popular), targets, position),
        "repeat the context": rank(Repeat(position, popular), targets, position),
    }
    rows = variants(settings)
    template = dataclasses.replace(
        data,
        augmented=template_conversations(redial.movies, mentions, settings["augmented"].augment),
    )
    sources = {
        name: template if "augmented" in one.documents.fields else data
        for name, one in rows.items()
    }
    if augmented is not None:
        name = "BM25 + made-up, language model"
        rows[name] = settings["augmented"]
        sources[name] = dataclasses.replace(
            data, augmented=read_conversations(augmented, redial.movies)
        )
        check_apart(sources[name], redial.test)
    tokenizers: dict[TokenizerConfig, Tokenizer] = {}
    seconds = {}
    for name, one in rows.items():
        tokenizer = tokenizers.setdefault(one.tokenizer, Tokenizer(one.tokenizer, redial.movies))
        if name == MAIN:
            tokenizer = Tokenizer(
                one.tokenizer, redial.movies
            )  # its index time is that of a cold start
        began = time.perf_counter()
        system = build(one, sources[name], tokenizer)
        seconds[name] = time.perf_counter() - began
        ranked[name] = rank(system, targets, position)
        print(
            f"  {name.strip()}: built in {seconds[name]:.1f} s, "
            f"{ranked[name].queries_per_second:.0f} queries a second",
            flush=True,
        )
    return ranked, targets, seconds


def table(ranked: Mapping[str, Ranked], targets: Sequence[Target], view: str) -> str:
    """Markdown: every system in one view; intervals over dialogues at recall 10."""
    shown = ("recall@1", "recall@10", "recall@50", "mrr", "ndcg@10")
    summaries = {name: summary_of(one, targets, view) for name, one in ranked.items()}
    first = next(iter(summaries.values()))
    if first is None:
        return f"No target is in the view {view}."
    out = [
        f"| {view}: {first.n} targets, {first.dialogues} dialogues | recall@1 | recall@10 (95 %) "
        "| recall@50 | MRR | NDCG@10 |",
        "|---|" + "---|" * len(shown),
    ]
    for name, one in summaries.items():
        cells = [
            f"{one.values[m]:.3f}"
            + (
                f" ({one.low[m]:.3f}-{one.high[m]:.3f})"
                if m == "recall@10" and one.low[m] is not None
                else ""
            )
            for m in shown
        ]
        out.append(f"| {name.strip()} | " + " | ".join(cells) + " |")
    if view == "all":
        out += [
            f"| {name}, published | {a:.3f} | {b:.3f} | {c:.3f} | | |"
            for name, (a, b, c) in PUBLISHED.items()
        ]
    return "\n".join(out)


def bucket_table(
    ranked: Mapping[str, Ranked], targets: Sequence[Target], names: Sequence[str], view: str = "new"
) -> str:
    """Markdown: recall at 10 and 50 by how many training dialogues mention the target."""
    buckets = [bucket for bucket in BUCKETS if selected(targets, view, bucket)]
    counts = [len(selected(targets, view, bucket)) for bucket in buckets]
    out = [
        f"| {view}: recall@10, recall@50 | "
        + " | ".join(f"{b} ({n})" for b, n in zip(buckets, counts, strict=True))
        + " |",
        "|---|" + "---|" * len(buckets),
    ]
    for name in names:
        found = [summary_of(ranked[name], targets, view, bucket).values for bucket in buckets]
        out.append(
            f"| {name.strip()} | "
            + " | ".join(f"{v['recall@10']:.3f}, {v['recall@50']:.3f}" for v in found)
            + " |"
        )
    return "\n".join(out)


def gains(
    ranked: Mapping[str, Ranked], targets: Sequence[Target]
) -> dict[str, dict[str, Summary | None]]:
    """What each BM25 system has more than the one with all fields, on the same targets."""
    return {
        name: {view: gain_of(one, ranked[MAIN], targets, view) for view in VIEWS}
        for name, one in ranked.items()
        if name != MAIN
    }


def results(
    redial: ReDial,
    ranked: Mapping[str, Ranked],
    targets: Sequence[Target],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Everything measured, as JSON."""
    plain = lambda one: None if one is None else dataclasses.asdict(one)
    systems = {
        name.strip(): {
            "targets": {view: plain(summary_of(one, targets, view)) for view in VIEWS},
            "turns": {view: plain(turns_summary(one, targets, view)) for view in VIEWS},
            "buckets": {
                view: {bucket: plain(summary_of(one, targets, view, bucket)) for bucket in BUCKETS}
                for view in ("all", "new")
            },
            "queries_per_second": one.queries_per_second,
            "build_seconds": seconds.get(name),
            "empty_queries": one.empty_queries,
        }
        for name, one in ranked.items()
    }
    return {
        "train_dialogues": len(redial.train),
        "repeated_dialogues_left_out": redial.repeated,
        "test_dialogues": len(redial.test),
        "movies": len(redial.movies),
        "files": redial.files,
        "targets_outside_the_catalogue": sum(target.position is None for target in targets),
        "measures": MEASURES,
        "systems": systems,
        "gain_over_" + MAIN: {
            name.strip(): {view: plain(one) for view, one in found.items()}
            for name, found in gains(ranked, targets).items()
        },
        "published": PUBLISHED,
    }


def read_settings(path: pathlib.Path) -> dict[str, Settings]:
    """Settings that an earlier run wrote."""
    parts = {
        "bm25": BM25Config,
        "tokenizer": TokenizerConfig,
        "documents": DocumentConfig,
        "query": QueryConfig,
        "users": UserConfig,
        "augment": AugmentConfig,
    }
    tuples = lambda value: {
        key: tuple(item) if isinstance(item, list) else item for key, item in value.items()
    }
    try:
        value = files.read_json(path)["settings"]
        return {
            name: Settings(
                **{
                    part: None if item is None else parts[part](**tuples(item))
                    for part, item in one.items()
                }
            )
            for name, one in value.items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no settings of an earlier run ({error}).") from error


def report(
    redial: ReDial,
    ranked: Mapping[str, Ranked],
    targets: Sequence[Target],
    seconds: Mapping[str, float],
) -> str:
    """The tables, and what has to be said with them."""
    unknown, empty = sum(target.position is None for target in targets), ranked[MAIN].empty_queries
    share = f"{len(redial.train):,} dialogues of the train side ({redial.repeated} copies left out)"
    whole = len(redial.train) >= PUBLISHED_TRAIN
    lines = [
        f"Documents from {share}"
        + ("." if whole else f"; published systems were trained on the whole {PUBLISHED_TRAIN:,}."),
        f"{len(redial.test):,} test dialogues, {len(ranked[MAIN].best):,} cases, {len(targets):,} "
        f"targets; {len(redial.movies):,} movies are ranked. "
        f"{unknown} targets are not among them (misses); {empty} cases have no query and are "
        "ranked by popularity.",
        f"Index of all fields: {seconds[MAIN]:.2f} s; {ranked[MAIN].queries_per_second:,.0f} "
        "queries a second, one at a time.",
    ]
    cold = [
        name
        for name in (
            "popularity",
            MAIN,
            "BM25 + similar seekers",
            *(n for n in ranked if "made-up" in n),
        )
        if name in ranked
    ]
    parts = [
        "\n".join(lines),
        *(table(ranked, targets, view) for view in VIEWS),
        *(bucket_table(ranked, targets, cold, view) for view in ("all", "new")),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", help="a folder with ReDial's files; downloaded when left out")
    parser.add_argument(
        "--run",
        type=pathlib.Path,
        default=pathlib.Path("runs/conversational_recommendation"),
        help="folder of the results",
    )
    parser.add_argument(
        "--fields",
        nargs="+",
        default=[f for f in FIELDS if f != "augmented"],
        help="fields of the documents; default: all",
    )
    parser.add_argument(
        "--augmented",
        type=pathlib.Path,
        help="conversations written by language_model.py, one more row",
    )
    parser.add_argument(
        "--settings", type=pathlib.Path, help="settings.json of an earlier run, instead of tuning"
    )
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    try:
        fields = DocumentConfig(tuple(options.fields)).fields
        redial = read_redial(options.data_dir)
        if options.settings is None:
            settings, trials = tuned(redial, fields)
        else:
            settings, trials = read_settings(options.settings), {}
        ranked, targets, seconds = run(redial, settings, options.augmented)
    except UserError as error:
        print(f"recommend.py: {error}", file=sys.stderr)
        return 2
    root = options.run
    root.mkdir(parents=True, exist_ok=True)
    as_json = {name: dataclasses.asdict(one) for name, one in settings.items()}
    found = {name: [dataclasses.asdict(trial) for trial in tried] for name, tried in trials.items()}
    files.write_json(root / "settings.json", {"settings": as_json, "trials": found})
    files.write_json(root / "results.json", results(redial, ranked, targets, seconds))
    read = [
        name
        for name in (
            "popularity",
            MAIN,
            "BM25 + similar seekers",
            BEST,
            "BM25 + made-up, language model",
        )
        if name in ranked
    ]
    write_rows(
        root / "cases.jsonl",
        case_rows({name: ranked[name] for name in read}, targets, redial.movies),
    )
    text = report(redial, ranked, targets, seconds)
    files.write_atomically(root / "table.md", text)
    print(
        f"\n{text}\nsettings.json, results.json, table.md and cases.jsonl are in {root}. "
        f"{time.perf_counter() - began:.0f} s in all."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
