"""Traced steps, and compiled programs that outlive their process."""

from __future__ import annotations

import pathlib

import jax
import pytest

from perl_jax.errors import UserError
from perl_jax.runs.profile import Profile
from perl_jax.training.commands import run_sft
from tests.training import tiny


def traces(run: pathlib.Path) -> list[pathlib.Path]:
    return sorted((run / "profile/plugins/profile").glob("*/*.xplane.pb"))


def test_chosen_steps_are_traced_and_change_nothing(base, tmp_path):
    run_sft(tiny.sft_config(tmp_path / "plain", base))
    run_sft(tiny.sft_config(tmp_path / "traced", base, profile="2-3"))
    assert tiny.timeless(tmp_path / "plain") == tiny.timeless(tmp_path / "traced")
    (trace,) = traces(tmp_path / "traced")
    # Names lie in the file as they are: the update's program is among what was traced.
    assert b"train_step" in trace.read_bytes()
    assert not (tmp_path / "plain/profile").exists()


def test_a_step_that_fails_leaves_what_was_traced(tmp_path):
    with (  # noqa: PT012  it ends within a step
        pytest.raises(KeyboardInterrupt),
        Profile(tmp_path / "profile", (2, 3, 5)) as profile,
    ):
        for step in (1, 2, 3):
            with profile.step(step):
                jax.block_until_ready(jax.numpy.ones(3) + step)
                assert not traces(tmp_path)
                if step == 3:
                    raise KeyboardInterrupt
    assert len(traces(tmp_path)) == 1


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("2-9", "profile is '2-9'; the run has steps 1 to 4."),
        ("0", "profile is '0'; the run has steps 1 to 4."),
        ("3-2", "profile is '3-2'; it must look like 20-22 or 5,20."),
        ("all", "profile is 'all'; it must look like"),
    ],
)
def test_steps_that_cannot_be_traced(base, tmp_path, steps, message):
    with pytest.raises(UserError, match=message):
        tiny.sft_config(tmp_path / "run", base, profile=steps)


@pytest.fixture
def cache_settings():
    """Every program is kept, however quickly it was compiled, and the settings are put back."""
    from jax.experimental.compilation_cache import compilation_cache

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_compiled_programs_are_kept(base, tmp_path, cache_settings):
    folder = tmp_path / "programs"
    run_sft(tiny.sft_config(tmp_path / "first", base, compile_cache=str(folder)))
    updates = lambda: sorted(
        path.name
        for path in folder.iterdir()
        if "learn" in path.name and path.name.endswith("-cache")
    )
    kept = updates()
    assert kept
    run_sft(tiny.sft_config(tmp_path / "second", base, compile_cache=str(folder)))
    assert updates() == kept
    assert tiny.timeless(tmp_path / "first") == tiny.timeless(tmp_path / "second")


def test_a_folder_that_cannot_be_is_named(base, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError,
        match=r"compile_cache is .*programs: .* cannot be written: a part of the path is a file",
    ):
        run_sft(
            tiny.sft_config(tmp_path / "run", base, compile_cache=str(tmp_path / "file/programs"))
        )
