"""Adapters against full tuning in perl_jax: a step of reward model training and a step of reinforcement learning.

Claim     With adapters alone trained, a reward step takes two thirds of full tuning's time and a third of its memory; an
          RL step three quarters of its time.
Command   python experiments/benchmarks/contest/tuning.py
Hardware  2 CPU cores, 24 GiB; nothing else at work
Time      12 minutes
Numbers   see experiments/LOG.md
"""

import contest

if __name__ == "__main__":
    contest.main(__doc__, jobs=("reward-equal", "reward-ragged", "rl-model"), rounds=6, contenders=("perl_jax", "perl_jax_full"))
