"""Adapters against full tuning in perl_jax: a step of reward model training and a step of reinforcement learning.

Claim     With adapters alone trained, a reward step takes seven to eight tenths of full tuning's time and six to seven of its
          memory; an RL step, of which only the update differs, five sixths of the time.
Command   python experiments/benchmarks/contest/tuning.py
Hardware  2 CPU cores, 24 GiB, partly shared with other work (experiments/LOG.md)
Time      12 minutes
Numbers   reward, equal pairs 3.25 s, full tuning 4.82 (1.48 times), 1,308 and 2,208 MiB; ragged 3.86 s, 5.63 (1.46), 1,731 and 2,712
          MiB; RLOO 16.0 s, 19.5 (1.22), 1,699 and 2,918 MiB

Beside the memory of the process stands the compiler's account of each program, from the code that writes `peak_bytes_by_program`
of a run's cost.json. `perl-jax plan` has padded batches and TPU slices: XLA's figure for what is alive at a CPU program's worst
moment, which it reads, leaves temporaries out.
"""

import contest

if __name__ == "__main__":
    contest.main(__doc__, jobs=("reward-equal", "reward-ragged", "rl-model"), rounds=4, contenders=("perl_jax", "perl_jax_full"))
