"""Training a reward model: perl_jax beside TRL with PEFT.

Claim     An update of a reward model's adapters takes two thirds of the time of TRL's RewardTrainer
          on pairs of equal length, and three fifths to two thirds on ragged ones, in no more memory
          than TRL with one pair at a time.
Command   python experiments/benchmarks/contest/reward.py
Hardware  2 CPU cores, 24 GiB, partly shared with other work (docs/log/speed_cpu.md)
Time      12 minutes, and once a few more to install TRL (a gigabyte)
Numbers   equal pairs 3.35 s, TRL 4.86 (1.45 times), 1,031 and 1,051 MiB; ragged 4.01 s, TRL 6.56
          (1.63), 1,332 and 1,462 MiB
"""

import contest

if __name__ == "__main__":
    contest.main(__doc__, jobs=("reward-equal", "reward-ragged"), rounds=10)
