"""Adapters against full tuning in perl_jax: a step of reward model training and a step of
reinforcement learning.

Claim     With adapters alone trained, a reward step takes six to seven tenths of full tuning's time
          and little more than half of its memory; an RL step, of which only the update differs,
          four fifths of the time and half of the memory.
Command   python experiments/benchmarks/contest/tuning.py
Hardware  2 CPU cores, 24 GiB, partly shared with other work (docs/log/speed_cpu.md)
Time      12 minutes
Numbers   reward, equal pairs 3.25 s, full tuning 5.17 (1.59 times), 1,062 and 1,896 MiB; ragged
          3.93 s, 5.59 (1.42), 1,325 and 2,301 MiB; RLOO 16.4 s, 20.8 (1.27), 1,156 and 2,203 MiB

Beside the memory of the process stands the compiler's account of each program, from the code
that writes `peak_bytes_by_program`
of a run's cost.json. `perl-jax plan` has padded batches and TPU slices: XLA's figure for what is
alive at a CPU program's worst
moment, which it reads, leaves temporaries out.
"""

import contest

if __name__ == "__main__":
    contest.main(
        __doc__,
        jobs=("reward-equal", "reward-ragged", "rl-model"),
        rounds=4,
        contenders=("perl_jax", "perl_jax_full"),
    )
