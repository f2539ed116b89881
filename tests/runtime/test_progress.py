"""Lines of progress: when they are printed, what is on them, and lines within lines."""

from __future__ import annotations

import io
import sys
import threading
import types

import pytest

from perl_jax.runtime import notebook, progress
from perl_jax.runtime.progress import Progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


class TestProgress:
    def test_plain_lines_are_rare_but_first_and_last_are_there(self):
        stream, clock = io.StringIO(), Clock()
        with Progress("sft", 100, interval=10, stream=stream, clock=clock) as progress:
            for step in range(1, 41):
                progress.update(step, loss=1 / step)
                clock.now += 0.5
        lines = stream.getvalue().splitlines()
        assert [line.split()[1] for line in lines] == ["1/100", "21/100", "40/100"]
        assert lines[0] == "sft 1/100 (1%)  loss 1"
        assert lines[1] == "sft 21/100 (21%)  2 steps/s  40 s left  loss 0.04762"

    def test_rate_leaves_out_the_first_update(self):
        stream, clock = io.StringIO(), Clock()
        with Progress("rl", 10, start=4, interval=0, stream=stream, clock=clock) as progress:
            clock.now += 60  # compilation
            progress.update(5)
            clock.now += 2
            progress.update(6)
        assert stream.getvalue().splitlines()[-1] == "rl 6/10 (60%)  2 s/step  8 s left"

    def test_a_step_reported_twice_has_no_rate(self):
        stream, clock = io.StringIO(), Clock()
        with Progress("rl", 10, interval=0, stream=stream, clock=clock) as progress:
            progress.update(1)
            clock.now += 1
            progress.update(1)
        assert stream.getvalue().splitlines()[-1] == "rl 1/10 (10%)"

    def test_terminal_shows_the_same_facts(self):
        stream, clock = Terminal(), Clock()
        with Progress("reward", 10, stream=stream, clock=clock) as progress:
            progress.update(1, accuracy=0.5)
            clock.now += 1
            progress.update(10, accuracy=0.75)
        assert "reward" in stream.getvalue()
        assert "10/10" in stream.getvalue()
        assert "accuracy 0.75" in stream.getvalue()

    def test_durations(self):
        assert [progress.duration(s) for s in (0.2, 59.6, 380, 7500)] == [
            "0 s",
            "1 min 00 s",
            "6 min 20 s",
            "2 h 05 min",
        ]


class TestInnerLines:
    def test_an_inner_line_is_printed_only_in_silence(self):
        stream, clock = io.StringIO(), Clock()
        with Progress("rl", 10, interval=30, stream=stream, clock=clock) as line:
            line.update(1)
            with progress.activity("validating", 64) as inner:
                clock.now += 20
                inner.update(8)
                clock.now += 20
                inner.update(16)
                clock.now += 20
                inner.update(24)
        assert stream.getvalue().splitlines() == [
            "rl 1/10 (10%)",
            "rl 1/10: validating 16/64 prompts",
        ]

    def test_a_call_that_blocks_is_reported_with_its_time(self):
        stream, clock = io.StringIO(), Clock()
        with (
            Progress("rl", 10, interval=30, stream=stream, clock=clock) as line,
            progress.activity("compiling learn"),
        ):
            clock.now += 29
            line.beat()
            assert stream.getvalue() == ""
            clock.now += 61
            line.beat()
            line.beat()
        assert stream.getvalue().splitlines() == ["rl 0/10: compiling learn (1 min 30 s)"]

    def test_the_thread_reports_and_ends_with_its_line(self):
        class Stream(io.StringIO):
            def write(self, text):
                printed.set()
                return super().write(text)

        printed, stream, before = threading.Event(), Stream(), threading.active_count()
        with Progress("export", None, interval=0.02, stream=stream):
            assert printed.wait(10)
        assert stream.getvalue().startswith("export (0 s)")
        for thread in threading.enumerate():
            if getattr(thread, "_target", None) is not None and "beat" in repr(thread._target):
                thread.join(10)
        assert threading.active_count() <= before

    def test_a_terminal_shows_the_inner_line_and_texts_above(self):
        stream, clock = Terminal(), Clock()
        with Progress("rl", 10, stream=stream, clock=clock) as line:
            line.update(1, **{"validation reward": 0.25, "split": "test"})
            with progress.activity("validating", 64) as inner:
                inner.update(32)
                line._live.refresh()
                progress.say("a [sample] of step 0")
        shown = stream.getvalue()
        assert "validation reward 0.25" in shown and "split test" in shown
        assert "validating" in shown and "32/64 prompts" in shown
        assert "a [sample] of step 0" in shown

    def test_an_activity_by_itself_speaks_only_in_silence(self, monkeypatch):
        stream, clock = io.StringIO(), Clock()
        with Progress("score", None, stream=stream, clock=clock, eager=False):
            with progress.activity("loading tiny"):
                clock.now += 20
            with progress.activity("scoring", 20, "rows") as line:
                line.update(8)
                clock.now += 20
                line.update(20)
        assert stream.getvalue().splitlines() == ["score: scoring 20/20 rows"]

    def test_a_reported_function_is_the_innermost_activity_while_it_runs(self):
        @progress.reported("doing it")
        def doing(value):
            """Returns the value and the stage that is shown."""
            return value, progress._OPEN[-1]._stage

        assert (
            doing(3) == (3, "doing it")
            and doing.__doc__ == "Returns the value and the stage that is shown."
        )
        assert progress._OPEN == []

    def test_what_is_printed_into_a_file_gets_there(self, capsys):
        with Progress("score", 2, stream=Terminal(), clock=Clock()) as line:
            line.update(1)
            print('{"score": 1}')
        assert capsys.readouterr().out == '{"score": 1}\n'

    def test_an_error_closes_the_lines(self):
        stream = io.StringIO()
        with (
            pytest.raises(KeyboardInterrupt),
            Progress("rl", 10, stream=stream),
            progress.activity("validating", 64),
        ):
            raise KeyboardInterrupt
        assert progress._OPEN == []


class Output:
    """IPython's `display`: the texts that each output showed, one after the other."""

    def __init__(self):
        self.outputs: list[list[str]] = []

    def __call__(self, content, *, raw, display_id):
        assert raw and display_id
        texts = [content["text/plain"]]
        self.outputs.append(texts)
        return types.SimpleNamespace(
            update=lambda content, raw: texts.append(content["text/plain"])
        )


def test_in_a_notebook_lines_are_redrawn_in_one_output(monkeypatch, capsys):
    output, now = Output(), [0.0]
    monkeypatch.setattr(notebook, "display", lambda: output)
    with Progress("rl", 4, clock=lambda: now[0]) as line:
        for step in range(1, 5):
            now[0] += 1
            line.update(step, reward=0.5)
            with progress.activity("validating", 8) as inner:
                now[0] += 1
                inner.update(4)
    (texts,) = output.outputs
    assert texts[0] == f"{'░' * 24} rl 0/4 (0%)"
    half = [text for text in texts if "rl 2/4" in text]
    assert half[0].startswith(f"{'█' * 12}{'░' * 12} rl 2/4 (50%)  2 s/step  4 s left  reward 0.5")
    assert half[1].splitlines()[1:] == ["  validating 4/8 prompts"]
    # What is left in the notebook is the last line of the job.
    assert texts[-1] == f"{'█' * 24} rl 4/4 (100%)  2 s/step  reward 0.5  (8 s)"
    assert capsys.readouterr().err == ""


def test_a_notebook_shows_no_part_that_is_over_at_once(monkeypatch):
    output, now = Output(), [0.0]
    monkeypatch.setattr(notebook, "display", lambda: output)
    for seconds, outputs in ((1.0, 0), (3.0, 1)):
        line = Progress("sampling", 8, clock=lambda: now[0], unit="prompts", eager=False)
        with line:
            now[0] += seconds
            line.update(8)
        assert len(output.outputs) == outputs


def test_only_a_kernel_is_a_notebook(monkeypatch):
    shell = types.SimpleNamespace()
    ipython = types.SimpleNamespace(
        get_ipython=lambda: shell, display=types.SimpleNamespace(display="display")
    )
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert notebook.display() is None
    shell.kernel = object()
    assert notebook.display() == "display"
    monkeypatch.delitem(sys.modules, "IPython")
    assert notebook.display() is None
