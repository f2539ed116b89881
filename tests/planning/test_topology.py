"""Slices by name, what is said of a wrong one, and the table of chips."""

from __future__ import annotations

import sys

import jax
import pytest

from perl_jax.errors import UserError
from perl_jax.planning.topology import CHIPS, chip, topology, wraps


@pytest.mark.parametrize(
    ("name", "devices", "cores"),
    [
        ("v4:2x2x1", 4, 2),  # one device a chip, as on a real v4
        ("v5e:1x1", 1, 1),
        ("v5e:2x4", 8, 1),
        ("v5p:2x2x2", 8, 2),
        ("v6e:4x4", 16, 1),
        ("7x:2x2x1", 8, 1),  # two devices a chip
        ("7x:1x1x1", 2, 1),
        ("v4:4x4x4", 64, 2),
    ],
)
def test_slices(name, devices, cores):
    pytest.importorskip("libtpu")
    found = topology(name)
    assert len(found) == devices and {d.platform for d in found} == {"tpu"}
    assert {d.num_cores for d in found} == {cores} == {chip(name).cores}
    chips = 1
    for size in name.split(":")[1].split("x"):
        chips *= int(size)
    assert devices == chips * chip(name).devices_a_chip
    # Nothing else of this process is on a TPU.
    assert jax.default_backend() == "cpu"


@pytest.mark.parametrize(
    "name",
    [
        "v5e",
        "v5e:",
        "v5e:8",
        "v5e:2x2x2",
        "v5p:2x2",
        "v5e:0x2",
        "v5e:2x-2",
        "tpu7x:2x2x1",
        "v9:2x2",
        "gpu:8",
        "",
    ],
)
def test_names_that_are_none(name):
    with pytest.raises(UserError, match=r"names no TPU slice; .*v5e:2x4"):
        topology(name)


def test_a_slice_that_does_not_exist():
    pytest.importorskip("libtpu")
    with pytest.raises(UserError, match=r"There is no TPU slice v5e:3x3: .*not divisible"):
        topology("v5e:3x3")


def test_without_libtpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(
        UserError,
        match=r"^perl-jax plan needs libtpu: pip install -c constraints.txt -e '\.\[plan\]'$",
    ):
        topology("v5e:2x4")


def test_which_axes_are_rings():
    assert wraps("v5e", (8, 16)) == (False, True, False)
    assert wraps("v6e", (16, 16)) == (True, True, False)
    assert wraps("v5p", (2, 2, 4)) == (False, False, False)
    assert wraps("v4", (4, 4, 8)) == wraps("7x", (4, 4, 4)) == (True, True, True)


def test_the_table():
    for name, facts in CHIPS.items():
        # The compiler keeps between 1 and 5 % for itself.
        assert 0.95 * facts.hbm < facts.usable < facts.hbm, name
        # Published: between 100 and 700 operations for each byte of HBM.
        assert 100 < facts.flops / facts.hbm_bandwidth < 700, name
    assert CHIPS["7x"].flops * 2 == 2307e12 and CHIPS["7x"].hbm_bandwidth * 2 == 7380e9
