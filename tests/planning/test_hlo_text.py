"""What is read from an HLO module's text: layouts, groups, trips, collectives that overlap."""

from __future__ import annotations

import pytest

from perl_jax.planning import hlo, hlo_loops, hlo_text
from perl_jax.planning.hlo import Collective

# -- the text ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f32[]", 4),
        ("f32[]{:T(128)}", 4),  # scalars are not padded
        ("f32[10,20]{1,0}", 800),
        ("bf16[7,100]{1,0:T(8,128)(2,1)}", 8 * 128 * 2),
        ("bf16[7,100]{0,1:T(8,128)(2,1)}", 104 * 128 * 2),  # 7 is the fastest: padded to 128
        ("f32[3,5,1]{1,0,2:T(4,128)}", 4 * 128 * 4),  # the slowest, 1, is not
        ("f32[100]{0:T(1024)}", 4096),
        ("f32[100]{0:T(8,128)}", 512),
        ("pred[33]{0}", 33),
        ("s4[10]{0}", 5),
        ("u4[3]{0}", 2),
        ("f8e4m3fn[9]{0}", 9),
        ("token[]", 0),
        ("f32[<=8,2]{1,0}", 64),
        ("f32[0,4]{1,0}", 0),
    ],
)
def test_bytes_as_laid_out(text, expected):
    array = hlo_text.parse_array(text)
    assert array.bytes == array.hbm_bytes == expected


def test_memory_spaces():
    assert hlo_text.parse_array("f32[8,128]{1,0:T(8,128)S(1)}").hbm_bytes == 0
    assert hlo_text.parse_array("u32[]{:S(2)}").space == 2


def test_an_instruction():
    line = (
        "  ROOT %a.1 = ((f32[2]{0}), /*index=1*/bf16[3,4]{1,0:T(8,128)(2,1)S(1)}, u32[]) "
        'slice-start(%x.2, %y), slice={[0:2]}, calls=%c, metadata={op_name="(b)"}'
    )
    found = hlo_text.parse_instruction(line)
    assert (found.name, found.opcode, found.operands) == ("a.1", "slice-start", ("x.2", "y"))
    assert [a.dtype for a in hlo_text.leaves(found.shape)] == ["f32", "bf16", "u32"]
    assert found.called == {"calls": "c"} and found.attribute(r'op_name="([^"]*)"') == "(b)"
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo_text.parse_module("not HLO\n")


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups={}", 8),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2] {'a','c'}", 8),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", 4),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", 4),
        ("source_target_pairs={{0,2},{2,4},{4,0},{1,3}}", 3),
    ],
)
def test_group_sizes(groups, size):
    instruction = hlo_text.parse_instruction(
        f"  %r = f32[4]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add"
    )
    assert hlo.group_size(instruction, hlo_text.Module({}, "", 8)) == size


# -- trips ---------------------------------------------------------------------------------------

LOOP = """HloModule loop

%fused (p: s32[]) -> s32[] {{
  %p = s32[] parameter(0)
  %c = s32[] constant({step})
  ROOT %n = s32[] add(%p, %c)
}}

%body (s: (s32[], s32[], f32[])) -> (s32[], s32[], f32[]) {{
  %s = (s32[], s32[], f32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %k = s32[] copy(%i)
  %bound = s32[] get-tuple-element(%s), index=1
  %x = f32[] get-tuple-element(%s), index=2
  %next = s32[] fusion(%k), kind=kLoop, calls=%fused
  %y = f32[] negate(%x)
  ROOT %t = (s32[], s32[], f32[]) tuple(%next, %bound, %y)
}}

%cond (s: (s32[], s32[], f32[])) -> pred[] {{
  %s.1 = (s32[], s32[], f32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %b.1 = s32[] get-tuple-element(%s.1), index=1
  ROOT %test = pred[] compare({sides}), direction={direction}
}}

ENTRY %main (x: f32[]) -> f32[] {{
  %x.0 = f32[] parameter(0)
  %first = s32[] constant({first})
  %last = s32[] constant({last})
  %init = (s32[], s32[], f32[]) tuple(%first, %last, %x.0)
  %loop = (s32[], s32[], f32[]) while(%init), condition=%cond, body=%body
  ROOT %out = f32[] get-tuple-element(%loop), index=2
}}
"""


@pytest.mark.parametrize(
    ("first", "step", "direction", "last", "expected"),
    [
        (0, 1, "LT", 6, 6),
        (0, 1, "LE", 6, 7),
        (2, 3, "LT", 9, 3),  # 2, 5, 8
        (6, -1, "GT", 0, 6),
        (6, -2, "GE", 0, 4),  # 6, 4, 2, 0
        (0, 1, "NE", 4, 4),
        (0, 3, "NE", 4, None),  # 0, 3, 6, ...: never 4
        (5, 1, "LT", 5, 0),
        (0, -1, "LT", 5, None),
        (0, 1, "EQ", 5, None),
    ],
)
def test_trips_from_the_condition(first, step, direction, last, expected):
    text = LOOP.format(first=first, step=step, direction=direction, last=last, sides="%i.1, %b.1")
    module = hlo_text.parse_module(text)
    frame = hlo_loops.Frame(module, module.computations["main"])
    assert hlo_loops.trips(frame, frame["loop"]) == expected
    if expected is not None:
        # A body copies, adds and negates 4 bytes; the comparison of two such runs once more.
        found = hlo.account(text)
        assert found.hbm_read == 12 * expected + 8 * (expected + 1)
        assert found.hbm_written == 12 * expected + (expected + 1)


def test_the_counter_may_stand_on_the_right():
    module = hlo_text.parse_module(
        LOOP.format(first=1, step=1, direction="GE", last=4, sides="%b.1, %i.1")
    )
    frame = hlo_loops.Frame(module, module.computations["main"])
    assert hlo_loops.trips(frame, frame["loop"]) == 4


# -- collectives over time -----------------------------------------------------------------------

# As TPU compilers write it, shortened: an all-gather that begins, goes on beside a product, and
# ends.
SPREAD = """HloModule spread, num_partitions=4

%begin (p: bf16[256,1024]) -> (bf16[256,1024], bf16[1024,1024], u32[]) {
  %p = bf16[256,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %ag.1 = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %c.1 = (bf16[256,1024]{1,0:T(8,128)(2,1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%beside (p: bf16[256,1024], q: bf16[1024,1024], f: u32[], x: bf16[8,1024], w: bf16[1024,1024]) -> (bf16[8,1024], bf16[256,1024], bf16[1024,1024], bf16[1024,1024], u32[]) {
  %p.2 = bf16[256,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %q.2 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(1)
  %f.2 = u32[]{:S(2)} parameter(2)
  %x.2 = bf16[8,1024]{1,0:T(8,128)(2,1)} parameter(3)
  %w.2 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(4)
  %dot.2 = bf16[8,1024]{1,0:T(8,128)(2,1)} convolution(%x.2, %w.2), dim_labels=bf_io->bf
  %ag.2 = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
  ROOT %t.2 = (bf16[8,1024]{1,0:T(8,128)(2,1)}, bf16[256,1024]{1,0:T(8,128)(2,1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) tuple(%dot.2, %p.2, %q.2, %ag.2, %f.2)
}

%end (p: bf16[256,1024], q: bf16[1024,1024], f: u32[]) -> bf16[1024,1024] {
  %p.3 = bf16[256,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %q.3 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(1)
  %f.3 = u32[]{:S(2)} parameter(2)
  %ag.3 = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-gather(%p.3), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
  ROOT %c.3 = bf16[1024,1024]{1,0:T(8,128)(2,1)} custom-call(%p.3, %q.3, %ag.3, %f.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: bf16[256,1024], x: bf16[8,1024], w: bf16[1024,1024]) -> bf16[1024,1024] {
  %p.0 = bf16[256,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %x.0 = bf16[8,1024]{1,0:T(8,128)(2,1)} parameter(1)
  %w.0 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(2)
  %s = (bf16[256,1024]{1,0:T(8,128)(2,1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%p.0), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%begin
  %s.0 = bf16[256,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=0
  %s.1 = bf16[1024,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=1
  %s.2 = u32[]{:S(2)} get-tuple-element(%s), index=2
  %m = (bf16[8,1024]{1,0:T(8,128)(2,1)}, bf16[256,1024]{1,0:T(8,128)(2,1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%s.0, %s.1, %s.2, %x.0, %w.0), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), {3}: (1, {}), {4}: (2, {})}, calls=%beside, backend_config={"window_config":{"estimated_cycles":"700"}}
  %m.1 = bf16[256,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%m), index=1
  %m.2 = bf16[1024,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%m), index=2
  ROOT %d = bf16[1024,1024]{1,0:T(8,128)(2,1)} fusion(%m.1, %m.2, %s.2), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%end
}
"""


def test_a_collective_spread_over_fusions_counts_once():
    found = hlo.account(SPREAD)
    full, shard, x = 1024 * 1024 * 2, 256 * 1024 * 2, 8 * 1024 * 2
    assert found.collectives == (Collective("all-gather", 4, 1, full, 3 * shard),)
    # The shard and the product's operands are read; the gathered buffer and the product written.
    assert (found.hbm_read, found.hbm_written, found.cycles) == (shard + x + full, full + x, 700)


SCATTERED = """HloModule scattered, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%all-reduce-scatter (p: f32[1022]) -> f32[256] {
  %p = f32[1022]{0:T(1024)} parameter(0)
  %zero = f32[] constant(0)
  %pad = f32[1024]{0:T(1024)} pad(%p, %zero), padding=0_2
  %ar = f32[1024]{0:T(1024)} all-reduce(%pad), channel_id=2, replica_groups=[2,4]<=[8], to_apply=%add
  %id = u32[] partition-id()
  ROOT %own = f32[256]{0:T(256)} dynamic-slice(%ar, %id), dynamic_slice_sizes={256}
}

ENTRY %main (x: f32[1022]) -> f32[256] {
  %x = f32[1022]{0:T(1024)} parameter(0)
  ROOT %f = f32[256]{0:T(256)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_a_slice_of_an_all_reduce_is_a_reduce_scatter():
    found = hlo.account(SCATTERED)
    assert found.collectives == (Collective("reduce-scatter", 4, 1, 1024, 3072),)
    assert (found.hbm_read, found.hbm_written) == (4096, 1024)


OVERLAPPED = """HloModule overlapped, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%elsewhere (p: f32[256]) -> f32[256] {
  %p = f32[256]{0} parameter(0)
  ROOT %r = f32[256]{0} all-reduce(%p), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add, backend_config={"estimated_cycles":"5"}
}, execution_thread="sparsecore"

ENTRY %main (x: f32[256]) -> f32[256] {
  %x = f32[256]{0} parameter(0)
  %v = (f32[256]{0:S(1)}, f32[256]{0}, u32[]{:S(2)}) copy-start(%x)
  %g = (f32[256]{0}, f32[1024]{0}) all-gather-start(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %s = ((f32[256]{0}), f32[256]{0}) call-start(%x), async_execution_thread="sparsecore", to_apply=%elsewhere
  %v.1 = f32[256]{0:S(1)} copy-done(%v)
  %y = f32[256]{0:S(1)} negate(%v.1), backend_config={"estimated_cycles":"7"}
  %g.1 = f32[1024]{0} all-gather-done(%g)
  %s.1 = f32[256]{0} call-done(%s)
  %z = f32[256]{0} slice(%g.1), slice={[0:256]}
  ROOT %o = f32[256]{0} add(%z, %s.1), backend_config={"estimated_cycles":"11"}
}
"""


def test_started_and_ended_counts_once():
    found = hlo.account(OVERLAPPED)
    kib = 1024
    assert found.collectives == (
        Collective("all-gather", 4, 1, 4 * kib, 3 * kib),
        Collective("all-reduce", 2, 1, kib, kib),
    )
    # Read: by copy, all-gather, all-reduce, slice, and add twice. The sparse core's cycles do not
    # count.
    assert (found.hbm_read, found.hbm_written, found.cycles) == (6 * kib, (4 + 1 + 1 + 1) * kib, 18)


KERNEL_LOOP = """HloModule kernel, num_partitions=1

%body (p: (s32[], f32[256])) -> (s32[], f32[256]) {
  %p = (s32[], f32[256]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[256]{0} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %k = f32[256]{0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"about":"{\\"block\\": 384}"
}}, backend_config={"estimated_cycles":"3"}
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], f32[256]{0}) tuple(%next, %k)
}

%condition (p: (s32[], f32[256])) -> pred[] {
  %p = (s32[], f32[256]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(42)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[256]) -> (s32[], f32[256]) {
  %x = f32[256]{0} parameter(0)
  %zero = s32[] constant(0)
  %s = (s32[], f32[256]{0}) tuple(%zero, %x)
  ROOT %w = (s32[], f32[256]{0}) while(%s), condition=%condition, body=%body
}
"""


def test_attributes_that_span_lines_belong_to_their_instruction():
    # Without that the body would end at the kernel, and nobody could tell how often it runs.
    assert hlo.account(KERNEL_LOOP).cycles == 42 * 3
