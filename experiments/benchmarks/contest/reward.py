"""Training a reward model: perl_jax beside TRL with PEFT.

Claim     An update of a reward model's adapters takes two thirds of the time of TRL's RewardTrainer on pairs of equal
          length, and two thirds to three quarters on ragged ones. It takes more memory than TRL with one pair at a time.
Command   python experiments/benchmarks/contest/reward.py
Hardware  2 CPU cores, 24 GiB, partly shared with other work (experiments/LOG.md)
Time      12 minutes, and once a few more to install TRL (a gigabyte)
Numbers   equal pairs 3.31 s, TRL 5.01 (1.51 times), 1,262 and 1,049 MiB; ragged 3.94 s, TRL 6.84 (1.74), 1,754 and 1,469 MiB
"""

import contest

if __name__ == "__main__":
    contest.main(__doc__, jobs=("reward-equal", "reward-ragged"), rounds=10)
