"""The report: what it says, that it stands alone, and that nothing missing or hostile breaks it."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure

from perl_jax.errors import UserError
from perl_jax.evaluation.intervals import Estimate
from perl_jax.evaluation.report import curves, formats, headline, load, plots, write_report
from perl_jax.evaluation.report.load import Run, read_experiment
from perl_jax.evaluation.report.markup import Html, table, tag
from tests.synthetic_run import NASTY, make_experiment, make_run

VOID = {"img", "meta", "br", "hr"}


class Page(HTMLParser):
    """Parses a page, checking on the way that every tag is closed in its turn."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.sections: list[str] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.alts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        values = dict(attributes)
        assert len(values) == len(attributes)
        assert not any(key.startswith("on") for key in values)
        self.tags.append(name)
        self.addresses += [values[key] for key in ("src", "href") if key in values]
        if name not in VOID:
            self.open.append(name)
        if name == "section":
            self.sections.append(values["id"])
        if name == "img":
            self.alts.append(values["alt"])
        if name == "tr":
            self.rows.append([])
        if name in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)
        if "tr" in self.open and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace(formats.SPACE, " ").split())

    def row(self, label: str, nth: int = 0) -> list[str]:
        found = [row for row in self.rows if row and row[0] == label]
        return [cell.replace(formats.SPACE, " ") for cell in found[nth][1:]]


def parse(folder) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return make_experiment(tmp_path_factory.mktemp("experiment"))


@pytest.fixture(scope="module")
def page(experiment):
    return parse(experiment)


@pytest.fixture
def copy(experiment, tmp_path):
    """A copy of the experiment to break."""
    return shutil.copytree(experiment, tmp_path / "copy")


class TestExperiment:
    def test_sections_in_order(self, page):
        assert page.sections == [
            "headline",
            "curves",
            "gold",
            "calibration",
            "baselines",
            "examples",
            "policies",
            "samples",
            "written",
            "health",
            "time",
            "reproduce",
        ]

    def test_stands_alone(self, page):
        assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
        assert page.addresses
        for address in page.addresses:
            head, data = address.split(",", 1)
            assert head == "data:image/svg+xml;base64"
            assert base64.b64decode(data, validate=True).startswith(b"<svg")

    def test_headline_rows(self, page):
        assert page.row("Pairwise accuracy") == [
            "78.1 % (76.3 to 79.9)",
            "77.4 % (75.6 to 79.2)",
            "+0.7 points",
        ]
        assert page.row("Noise ceiling of the labels")[0] == "85.0 %"
        # Groups come in the order reward, RL, SFT.
        assert page.row("Gain in gold reward") == [
            "+0.659 (0.631 to 0.687)",
            "+0.477 (0.449 to 0.505)",
            "+0.18",
        ]
        assert page.row("Trained parameters (share of all)", 1) == [
            "394 k (1.37 %)",
            "56.6 M (100.00 %)",
            "0.70 % of full",
        ]
        assert page.row("Checkpoint", 1)[0] == "4.74 MB (base 113 MB)"
        assert page.row("Time a step, median", 1) == ["0.512 s", "0.671 s", "1.31× faster"]
        assert page.row("Peak memory, compiled") == ["1.32 GB", "2.71 GB", "49 % of full"]
        assert page.row("Peak memory, measured") == ["not measured", "not measured", "–"]

    def test_summary_says_the_key_numbers(self, page):
        for words in (
            "A small model learns to take coffee orders from preferences.",
            "LoRA trained 1.37 % of the parameters (394 k of 28.7 M).",
            "78.1 % (76.3 to 79.9) with LoRA and 77.4 % (75.6 to 79.2) with full tuning; "
            "the labels themselves allow 85.0 %.",
            "RL moved the gold reward from 0.214 to 0.873, a gain of +0.659 (0.631 to 0.687), "
            "with LoRA;",
            "an RL step with LoRA was 1.31× faster and peaked at 57 % of its memory.",
        ):
            assert words in page.text

    def test_policies_and_wins(self, page):
        assert page.row("RL, LoRA")[:4] == [
            "0.873 (0.852 to 0.894)",
            "1.746 (1.696 to 1.796)",
            "1.397 (1.337 to 1.457)",
            "8.10 (7.80 to 8.40)",
        ]
        wins = ["the gold reward", "401", "38", "73", "82.0 % (78.5 to 85.1)"]
        for name in ("RL, LoRA", "RL, Full tuning", "DPO, LoRA", "DPO, Full tuning"):
            assert page.row(name, 1) == wins

    def test_dpo_is_measured_as_rl_is(self, page):
        assert page.row("Gold reward, after DPO")[0] == "0.773 (0.752 to 0.794)"
        assert page.row("Gain in gold reward", 1) == [
            "+0.559 (0.531 to 0.587)",
            "+0.377 (0.349 to 0.405)",
            "+0.18",
        ]
        assert page.row("Win rate of DPO over SFT, ties half")[0] == "82.0 % (78.5 to 85.1)"
        assert "DPO moved the gold reward from 0.214 to 0.773, a gain of +0.559" in page.text
        assert page.row("DPO, LoRA")[0] == "0.773 (0.752 to 0.794)"
        # Both start from the SFT policy of their tuning: one line, one answer to each prompt.
        policies = [row[0] for row in page.rows if len(row) == 9]
        assert policies[1:] == [
            "SFT, LoRA",
            "RL, LoRA",
            "SFT, Full tuning",
            "RL, Full tuning",
            "DPO, LoRA",
            "DPO, Full tuning",
        ]
        assert page.text.count("Sure, what size would you like?") == 2 * 12
        assert page.text.count("coming up! Anything else? (DPO)") == 2 * 11

    def test_over_optimisation_is_called_by_name(self, page):
        assert "LoRA: no over-optimisation to be seen" in page.text
        assert "Full tuning: the gold reward peaks at 0.8" in page.text

    def test_time(self, page):
        assert page.row("sample") == ["0.307 s (60 %)", "0.403 s (60 %)"]
        assert page.row("programs compiled") == ["4", "4"]

    def test_samples_are_escaped_and_limited(self, page, experiment):
        # Twelve prompts of evaluations, three rows of a reward model, four prompts of an RL run.
        assert page.tags.count("article") == 12 + 2 * 3 + 2 * 4
        assert "<script>alert('x')</script> & \"quoted\" </pre>" in page.text
        assert "<script" not in (experiment / "report.html").read_text(encoding="utf-8")

    def test_what_rl_wrote_is_shown_from_start_to_end(self, page):
        assert (
            "Before training reward 0 \u00b7 gold 0.500 \u00b7 KL 0 Sure "
            "Step 30 reward 0.300 \u00b7 gold 0.500 \u00b7 KL 3.00 A latte! "
            "Step 60 reward 0.600 \u00b7 gold 0.500 \u00b7 KL 6.00 A large latte!"
        ) in page.text
        assert "KL 6.00 \u00b7 cut A large latte! please please" in page.text

    def test_the_worst_mistakes_of_a_reward_come_first(self, page):
        shown = page.text[page.text.index("Worst mistakes, LoRA") :]
        assert shown.startswith(
            "Worst mistakes, LoRA User: Help me with 7 Assistant: "
            "Chosen score 1.25 Gladly 7 Rejected score 3.50 "
        )
        assert shown.index("First rows, LoRA") < shown.index("Worst mistakes, Full tuning")

    def test_pictures_have_words(self, page):
        assert len(page.alts) == 27
        assert all(len(alt) > 20 for alt in page.alts)
        assert any(alt.startswith("SFT: training loss. LoRA goes from ") for alt in page.alts)

    def test_what_rl_was_paid(self, page):
        titles = [alt.partition(". ")[0] for alt in page.alts]
        first = titles.index("RL: score by reward models and terms")
        assert titles[first : first + 5] == [
            "RL: score by reward models and terms",
            "RL: return that it learns from",
            "RL: gold reward",
            "RL: reward, by part (LoRA)",
            "RL: reward, by part (Full tuning)",
        ]
        assert "Disagreement of the reward models" in titles
        parts = next(alt for alt in page.alts if alt.startswith("RL: reward, by part (LoRA)"))
        names = [part.partition(" goes from ")[0] for part in parts.partition(". ")[2].split("; ")]
        assert names == [
            "reward model 0",
            "reward model 1",
            "term length",
            "term format",
            "term is the order complete, by my_rewards.py",
        ]
        assert "trained on the proxy (the reward models and terms);" in page.text
        assert "the policy exploits the reward models and terms." in page.text

    def test_reproduce(self, page):
        for words in ("make run", "2 CPU cores", "9 min 43 s", "jax 0.10.2", '"learning_rate"'):
            assert words in page.text

    def test_same_files_same_bytes(self, experiment):
        first = write_report(experiment).read_bytes()
        assert write_report(experiment).read_bytes() == first


class TestSingleRun:
    @pytest.mark.parametrize(
        ("job", "expected"),
        [
            ("sft", ["headline", "curves", "time", "reproduce"]),
            (
                "reward",
                [
                    "headline",
                    "curves",
                    "calibration",
                    "baselines",
                    "examples",
                    "time",
                    "reproduce",
                ],
            ),
            (
                "rl",
                [
                    "headline",
                    "curves",
                    "gold",
                    "policies",
                    "samples",
                    "written",
                    "health",
                    "time",
                    "reproduce",
                ],
            ),
            ("dpo", ["headline", "curves", "policies", "samples", "time", "reproduce"]),
        ],
    )
    def test_each_job(self, tmp_path, job, expected):
        page = parse(make_run(tmp_path / "one", job, "lora"))
        assert page.sections == expected
        assert "LoRA against full" not in page.text

    @pytest.mark.parametrize("config", [True, False])
    def test_an_evaluation_by_itself(self, tmp_path, config):
        folder = make_run(tmp_path / "one", "rl", "lora")
        for name in ("metrics.jsonl", "samples.jsonl", "cost.json"):
            (folder / name).unlink()
        (folder / "config.json").unlink()
        if config:
            (folder / "config.json").write_text(json.dumps({"config": {"job": "evaluate"}}))
        page = parse(folder)
        expected = ["headline", "policies", "samples"]
        assert page.sections == ([*expected, "reproduce"] if config else expected)
        assert page.row("Gold reward, the policy") == ["0.873 (0.852 to 0.894)"]
        assert page.row("The baseline")[0].startswith("0.214")
        assert "The policy's responses beat the baseline's in 82.0 %" in page.text
        assert "SFT" not in page.text and "Compiled memory" not in page.text

    def test_samples_of_earlier_versions_are_read(self, tmp_path):
        folder = make_run(tmp_path / "one", "rl", "lora")
        new = read_experiment(folder).runs[0]
        (folder / "samples.jsonl").rename(folder / "validation_samples.jsonl")
        (folder / "evaluation_samples.jsonl").rename(folder / "samples.jsonl")
        old = read_experiment(folder).runs[0]
        assert old.samples == new.samples and old.written == new.written
        assert len(old.samples) == 14 and len(old.written) == 16

    def test_job_is_inferred_without_a_config(self, tmp_path):
        for job in ("sft", "reward", "rl", "dpo"):
            folder = make_run(tmp_path / job, job, "lora")
            (folder / "config.json").unlink()
            run = read_experiment(folder).runs[0]
            assert (run.job, run.tuning) == (job, "")
            assert "This run" in parse(folder).text

    def test_title_and_command_as_jobs_write_them(self, tmp_path, blank_pictures):
        folder = make_run(tmp_path / "mine", "rl", "lora")
        config = {"job": "rl", "tuning": "lora", "algorithm": {"name": "reinforce"}}
        whole = {"config": config, "command": ["perl-jax", "rl", "--run", "a folder"]}
        (folder / "config.json").write_text(json.dumps(whole))
        found = read_experiment(folder)
        assert (found.title, found.command) == ("mine", "perl-jax rl --run 'a folder'")
        assert "perl-jax rl --run 'a folder'" in parse(folder).text

    def test_dpo_keeps_its_own_measure_beside_the_evaluation(self, tmp_path, blank_pictures):
        folder = make_run(tmp_path / "dpo", "dpo", "lora")
        found = json.loads((folder / "evaluation.json").read_text())
        found["pairwise_accuracy"] = 0.75
        (folder / "evaluation.json").write_text(json.dumps(found))
        page = parse(folder)
        assert page.row("Pairs in order of the implicit reward") == ["75.0 %"]
        assert page.row("Gain in gold reward") == ["+0.559 (0.531 to 0.587)"]

    def test_rows_and_groups_of_an_evaluation(self, tmp_path, blank_pictures):
        """Evaluations say how many groups since their intervals are over groups; those of before
        are shown as they are.
        """
        for job, label, rows in (
            ("reward", "Held-out rows (groups)", 2048),
            ("rl", "Prompts (groups)", 512),
        ):
            folder = make_run(tmp_path / job, job, "lora")
            page = parse(folder)
            assert page.row(label) == [f"{rows:,}"] and "over groups of rows" not in page.text
            found = json.loads((folder / "evaluation.json").read_text())
            found["pairwise_accuracy" if job == "reward" else "win_rate"]["groups"] = 301
            (folder / "evaluation.json").write_text(json.dumps(found))
            page = parse(folder)
            assert page.row(label) == [f"{rows:,} (301)"] and "over groups of rows" in page.text

    def test_an_auc_has_its_interval(self, tmp_path, blank_pictures):
        folder = make_run(tmp_path / "reward", "reward", "lora")
        found = json.loads((folder / "evaluation.json").read_text())
        del found["pairwise_accuracy"]
        for area, expected in (
            (0.853, "0.853"),
            (
                {"value": 0.853, "low": 0.801, "high": 0.902, "n": 640, "groups": 90},
                "0.853 (0.801 to 0.902)",
            ),
        ):
            (folder / "evaluation.json").write_text(json.dumps(found | {"auc": area}))
            page = parse(folder)
            assert page.row("AUC") == [expected] and f"an AUC of {expected} with LoRA" in page.text
        assert page.row("Held-out rows (groups)") == ["640 (90)"]

    def test_bars_of_calibration(self):
        """As the evaluation has them; of independent rows where it is of a version without groups;
        none for one group.
        """
        row = {"predicted": 0.55, "observed": 0.5, "n": 10}
        rows = [
            row,
            row | {"observed_low": 0.1, "observed_high": 0.9, "groups": 3},
            row | {"observed_low": None, "observed_high": None, "groups": 1},
        ]
        shown = curves.reliability_rows(Run("r", "reward", "", evaluation={"reliability": rows}))
        ends = [(observed.low, observed.high) for _, observed in shown]
        assert ends == [
            (pytest.approx(0.236593, abs=1e-6), pytest.approx(0.763407, abs=1e-6)),
            (0.1, 0.9),
            (None, None),
        ]
        assert [(predicted, observed.value) for predicted, observed in shown] == [(0.55, 0.5)] * 3
        assert b"<svg" in plots.calibration_plot([("LoRA", "lora", shown)])

    @pytest.mark.parametrize(
        ("judge", "artefacts", "expected"),
        [
            ("gold", ["a"], "the gold reward"),
            ("judge", ["a", "b"], "the mean of 2 judges"),
            ("judge", ["a"], "a judge's reward model"),
            ("judge", "a", "a judge's reward model"),
            ("proxy", [], "the proxy reward"),
            ("my friend", None, "my friend"),
        ],
    )
    def test_who_judged(self, tmp_path, blank_pictures, judge, artefacts, expected):
        folder = make_run(tmp_path / "rl", "rl", "lora")
        found = json.loads((folder / "evaluation.json").read_text())
        found["win_rate"]["judge"], found["config"]["judge"] = judge, artefacts
        (folder / "evaluation.json").write_text(json.dumps(found))
        page = parse(folder)
        assert page.row("RL, LoRA", 1)[0] == expected
        assert f"of all prompts, judged by {expected}." in page.text

    def test_what_rows_lost_is_said_split_by_split(self, tmp_path):
        cut = {
            "rows": 32,
            "cut": 20,
            "cut_prompts": 12,
            "cut_response": 9,
            "cut_prompts_template_whole": 12,
            "rendered": 0,
        }
        pairs = {"rows": 16, "cut": 0, "equal_pairs": 1, "equal_after_cutting": 2}
        row = (
            {"step": 1, "train/loss": 2.0}
            | {f"data/train/{name}": number for name, number in cut.items()}
            | {"data/validation/rows": 8.0}
        )
        (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        settings = {
            "job": "reward",
            "tuning": "lora",
            "data": {"max_prompt_length": 48, "max_response_length": 24},
        }
        (tmp_path / "config.json").write_text(json.dumps({"config": settings}))
        (tmp_path / "evaluation.json").write_text(
            json.dumps({"data": {f"data/test/{name}": number for name, number in pairs.items()}})
        )
        page = parse(tmp_path)
        assert "rows" in page.sections
        lost = (
            "12 prompts lost their beginning (max_prompt_length 48; the chat template stays "
            "whole in 12 of them), 9 responses lost their end (max_response_length 24)"
        )
        for line in (
            f"Reward model LoRA, train: 20 of 32 rows were cut to fit: {lost}.",
            "Reward model LoRA, validation: none of 8 rows was cut to fit.",
            "Reward model LoRA, test: none of 16 rows was cut to fit. 1 of 16 pairs have equal "
            "responses, 2 more are equal after cutting: they count in no accuracy.",
        ):
            assert line in page.text

    def test_metrics_alone(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
        page = parse(tmp_path)
        assert page.sections[:2] == ["headline", "curves"]
        assert page.row("Time a step, median") == ["not measured"]


class TestParts:
    MODELS = ("reward/model_0", "reward/model_1")

    @pytest.mark.parametrize(
        ("settings", "parts", "paid", "shown"),
        [
            ({"reward": ["a"]}, (), "reward model", 0),
            ({"reward": "a"}, (), "reward model", 0),
            ({"reward": ["a", "b"]}, MODELS, "reward models", 2),
            ({"reward": ["a"]}, ("reward/term/x",), "reward model and terms", 1),
            # A single term is the score itself but for its weight.
            ({"reward": []}, ("reward/term/x",), "terms", 0),
            ({"reward": []}, ("reward/term/x", "reward/term/y"), "terms", 2),
            ({"reward": ["a", "b"]}, ("reward/term/x", *MODELS), "reward models and terms", 3),
            # Without a configuration by what was logged.
            ({}, (), "reward model", 0),
            ({}, MODELS, "reward models", 2),
            ({}, ("reward/term/x", "reward/term/y"), "terms", 2),
        ],
    )
    @pytest.mark.parametrize("nested", [True, False])
    def test_what_there_is(self, settings, parts, paid, shown, nested):
        rows = [{"step": s, "reward/score": 1.0, **dict.fromkeys(parts, 0.5)} for s in (1, 2)]
        config = {"config": settings} if nested and settings else settings
        run = Run("r", "rl", "lora", config=config, rows=rows)
        assert curves.paid_by([run]) == paid
        found = curves.part_curves(run)
        assert len(found) == shown and len({one.style for one in found}) == shown
        assert [one.label for one in found[:1]] in ([], ["reward model 0"], ["term x"])

    def test_a_run_of_terms_alone_names_no_reward_model(self, tmp_path, blank_pictures):
        folder = make_run(tmp_path / "rl", "rl", "lora")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        models = ("reward/model_", "reward/disagreement")
        kept = [{k: v for k, v in row.items() if not k.startswith(models)} for row in rows]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        config = {"job": "rl", "tuning": "lora", "reward": [], "terms": "[]"}
        (folder / "config.json").write_text(json.dumps({"config": config}))
        page = parse(folder)
        assert any(alt.startswith("RL: score by terms. ") for alt in page.alts)
        assert not any("reward model" in words for words in (page.text, *page.alts))

    @pytest.mark.parametrize("last", [1, 2, 7, 40, 1234])
    def test_steps_have_whole_numbers(self, last):
        axes = Figure().subplots()
        axes.plot([min(1, last - 1), last], [0.0, 1.0])
        plots.finish(axes, "step", "y")
        ticks = axes.get_xticks()
        assert len(ticks) > 1 and np.array_equal(ticks, np.round(ticks))

    def test_styles_of_parts_differ(self):
        assert len({plots.part_style(i) for i in range(28)}) == 28

    @pytest.mark.parametrize(
        ("n", "name", "lines"),
        [(1, "x" * 60, 0), (4, "short", 0), (5, "short", 3), (9, "short", 5), (2, "x" * 60, 2)],
    )
    def test_a_large_legend_is_below_the_curves(self, n, name, lines):
        x = np.arange(3.0)
        many = [plots.Curve(f"{name} {i}", "", x, x + i) for i in range(n)]
        height = re.search(rb'height="([0-9.]+)pt"', plots.curves_plot("t", many, "x", "y"))[1]
        assert float(height) == pytest.approx(72 * (3.5 + 0.2 * lines))


@pytest.fixture
def blank_pictures(monkeypatch):
    """Leaves the drawing out, which is nine tenths of the time, where tables are the question."""
    monkeypatch.setattr(plots, "render", lambda figure: b"<svg></svg>")


class TestMissing:
    def test_every_file_can_be_missing(self, experiment, tmp_path, blank_pictures):
        files = [p.relative_to(experiment) for p in sorted(experiment.rglob("*.json*"))]
        files = [p for p in files if p.name != "experiment.json"]
        assert len(files) == 40
        for i, name in enumerate(n for n in files if n.parts[0] != "full"):
            folder = shutil.copytree(experiment, tmp_path / str(i))
            (folder / name).unlink()
            parse(folder)

    @pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a": NaN}'])
    def test_every_file_can_be_damaged(self, copy, damage):
        for path in copy.rglob("*.json*"):
            if path.name != "experiment.json":
                path.write_bytes(damage)
        page = parse(copy)
        assert page.sections[0] == "headline"

    @pytest.mark.parametrize(
        "value",
        [None, "text", [], [1], {}, {"value": None}, {"value": "1"}, True, -1, 0, 1e300, 10**400],
        ids=lambda value: str(value)[:12],
    )
    def test_every_value_can_be_of_another_kind(self, copy, value, blank_pictures):
        for name in ("cost", "evaluation"):
            for path in copy.rglob(f"{name}.json"):
                content = json.loads(path.read_text())
                path.write_text(json.dumps(dict.fromkeys(content, value)))
        for path in copy.rglob("evaluation_samples.jsonl"):
            row = json.dumps({"prompt": value, "sft": value, "rl": {"text": value, "gold": value}})
            path.write_text(row + "\n")
        parse(copy)

    def test_empty_experiment(self, tmp_path):
        (tmp_path / "experiment.json").write_text('{"title": "Nothing yet"}')
        page = parse(tmp_path)
        assert page.sections == []
        assert "no evaluation yet" in page.text

    def test_notes_name_what_is_missing(self, copy):
        # Two runs of the experiment are enough: each has its plots.
        about = json.loads((copy / "experiment.json").read_text())
        about["runs"] = [run for run in about["runs"] if run["name"] in ("full/sft", "lora/rl")]
        (copy / "experiment.json").write_text(json.dumps(about))
        shutil.rmtree(copy / "full" / "sft")
        (copy / "lora" / "rl" / "cost.json").write_text("{")
        page = parse(copy)
        assert "the folder of the run 'full/sft' is missing." in page.text
        assert "lora/rl/cost.json could not be read" in page.text

    def test_nonfinite_steps_are_told(self, tmp_path):
        line = '{"step": 1, "train/loss": null, "nonfinite": ["train/loss"]}\n'
        (tmp_path / "metrics.jsonl").write_text(line)
        assert "1 steps had NaN or infinite metrics" in parse(tmp_path).text

    def test_runs_outside_of_the_folder_are_refused(self, tmp_path):
        make_run(tmp_path / "outside", "sft", "lora")
        inside = tmp_path / "inside"
        inside.mkdir()
        folders = ("../outside", str(tmp_path / "outside"), "")
        listed = [{"job": "sft", "tuning": "lora", "folder": folder} for folder in folders]
        (inside / "experiment.json").write_text(json.dumps({"runs": listed}))
        assert read_experiment(inside).runs == ()
        assert parse(inside).text.count("names no folder inside this one") == 3

    def test_no_folder_and_no_run(self, tmp_path):
        with pytest.raises(UserError, match="no folder of a run at"):
            write_report(tmp_path / "absent")
        with pytest.raises(UserError, match=r"neither experiment\.json"):
            write_report(tmp_path)


class TestHostileText:
    def test_every_string_of_an_experiment(self, copy):
        about = json.loads((copy / "experiment.json").read_text())
        for key in ("title", "summary", "command", "hardware", "task"):
            about[key] = NASTY
        for run in about["runs"]:
            run["name"] = NASTY
        about["runs"][1]["tuning"] = NASTY + " $x_{"
        (copy / "experiment.json").write_text(json.dumps(about))
        evaluation = json.loads((copy / "lora" / "rl" / "evaluation.json").read_text())
        evaluation["win_rate"]["judge"] = NASTY
        evaluation["policies"][NASTY] = {NASTY: 1.0}
        (copy / "lora" / "rl" / "evaluation.json").write_text(json.dumps(evaluation))
        (copy / "lora" / "rl" / "config.json").write_text(json.dumps({NASTY: NASTY}))
        page = parse(copy)
        assert "script" not in page.tags
        assert "\ufffd" in page.text

    def test_tag_escapes_children_and_attributes(self):
        assert tag("p", "a < b", class_='"') == '<p class="&quot;">a &lt; b</p>'
        assert tag("p", Html("<b>x</b>"), None) == "<p><b>x</b></p>"

    def test_long_text_is_cut(self, tmp_path):
        folder = make_run(tmp_path / "rl", "rl", "lora")
        row = {"prompt": "p", "sft": {"text": "x" * 5000}, "rl": {"text": ""}}
        (folder / "evaluation_samples.jsonl").write_text(json.dumps(row) + "\n")
        text = parse(folder).text
        assert "(3,500 characters more)" in text and "(empty)" in text


class TestFormats:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (0, "0"),
            (0.01234, "0.0123"),
            (4.567, "4.57"),
            (1234.6, "1235"),
            (-0.5, "−0.500"),
            (1e-7, "1.00e−7"),
            (2.5e9, "2.50e9"),
            (9.999, "10.00"),
        ],
    )
    def test_significant(self, value, expected):
        assert formats.significant(value) == expected

    def test_units(self):
        assert formats.count(512) == "512"
        assert formats.count(28_311_552) == "28.3 M"
        assert formats.size_of(310_400) == "310 kB"
        assert formats.seconds(0.0123) == "12.3 ms"
        assert formats.seconds(380) == "6 min 20 s"
        assert formats.percent(0.00042) == f"0.042{formats.SPACE}%"

    def test_interval_precision_follows_its_width(self):
        assert formats.interval(Estimate(0.83412, 0.8012, 0.8671, 9)) == "0.834 (0.801 to 0.867)"
        assert formats.interval(Estimate(83.412, 80.12, 86.71, 9)) == "83.4 (80.1 to 86.7)"
        assert formats.interval(Estimate(834.12, 501.2, 1167.1, 9)) == "834 (501 to 1167)"
        assert formats.interval(Estimate(-0.02, -0.1, 0.06, 9), True) == "−0.020 (−0.100 to 0.060)"
        assert formats.interval(Estimate(0.5, 0.5, 0.5, 1)) == "0.500"

    def test_no_minus_on_a_rounded_zero(self):
        assert formats.plain(-0.0001, 2) == "0.00"

    def test_comparisons(self):
        assert formats.speed(1.0, 1.6) == "1.60× faster"
        assert formats.speed(1.2, 1.0) == "1.20× slower"
        assert formats.speed(1.0, 1.001) == "same time"
        assert headline.compared("points", 0.80, 0.81) == "−1.0 points"
        assert headline.compared("share", 0.0, 0.0) == "–"
        assert headline.compared("speed", 0.0, 1.0) == "–"


class TestPlots:
    def test_smooth_by_hand(self):
        found = plots.smooth(np.array([0.0, 3.0, 6.0, 0.0]), 3)
        np.testing.assert_allclose(found, [1.5, 3, 3, 3])
        np.testing.assert_array_equal(plots.smooth(np.arange(4.0), 1), np.arange(4.0))

    def test_windows_are_odd(self):
        assert [plots.smoothing_window(n) for n in (1, 11, 24, 100, 1000)] == [1, 1, 3, 9, 83]

    def test_thin_keeps_the_last_point(self):
        x, y = plots.thin(np.arange(4001.0), np.arange(4001.0), largest=1000)
        assert x.size <= 1001 and x[-1] == 4000 and np.array_equal(x, y)

    def test_binned_means_by_hand(self):
        x, y = plots.binned_means(np.array([3.0, 1, 2, 4]), np.array([30.0, 10, 20, 40]), bins=2)
        np.testing.assert_array_equal(x, [1.5, 3.5])
        np.testing.assert_array_equal(y, [15, 35])

    def test_negative_kl_estimates_count_as_zero(self):
        rows = [{"step": s, "kl/sequence": k, "reward/gold": 1.0} for s, k in ((1, -0.1), (2, 4.0))]
        found = curves.against_kl(Run("r", "rl", "lora", rows=rows), "reward/gold")
        assert found is not None
        np.testing.assert_array_equal(found.x, [0, 2])

    def test_a_single_point_is_drawn(self):
        one = plots.Curve("a", "lora", np.array([1.0]), np.array([2.0]))
        assert plots.curves_plot("t", [one], "x", "y").startswith(b"<svg")


def test_table_aligns_numbers():
    shown = table("c", ["name", "n"], [["a", "1"]])
    assert '<td class="number">1</td>' in shown and '<th scope="row">a</th>' in shown


class TestPreferences:
    @pytest.mark.parametrize("loss", ["ipo", "kto", "orpo"])
    def test_a_run_is_called_by_its_loss(self, loss):
        config = {"job": "dpo", "config": {"loss": loss}}
        assert load.infer_job(config, []) == loss
        assert load.infer_job({"job": "dpo"}, []) == load.named_job({}, "dpo") == "dpo"
        assert load.named_job(config, "dpo") == loss and load.named_job(config, "mine") == "mine"
        assert load.infer_job({}, [{"step": 1, "orpo/odds_loss": 0.5}]) == "orpo"
