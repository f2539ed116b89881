"""Training a reward model: perl_jax beside TRL with PEFT.

Claim     An update of a reward model's adapters takes two thirds of the time of TRL's RewardTrainer on pairs of equal
          length, and two thirds to three quarters on ragged ones. It takes more memory than TRL with one pair at a time.
Command   python experiments/benchmarks/contest/reward.py
Hardware  2 CPU cores, 24 GiB; nothing else at work
Time      12 minutes, and once a few more to install TRL (a gigabyte)
Numbers   see experiments/LOG.md
"""

import contest

if __name__ == "__main__":
    contest.main(__doc__, jobs=("reward-equal", "reward-ragged"), rounds=10)
