"""Adapters against full tuning in perl_jax: a step of reward model training and a step of reinforcement learning.

Claim     With adapters alone trained, a reward step takes seven to eight tenths of full tuning's time and six to seven of its
          memory; an RL step, of which only the update differs, seven eighths of the time.
Command   python experiments/benchmarks/contest/tuning.py
Hardware  2 CPU cores, 24 GiB; nothing else at work
Time      12 minutes
Numbers   see experiments/LOG.md
"""

import contest

if __name__ == "__main__":
    contest.main(__doc__, jobs=("reward-equal", "reward-ragged", "rl-model"), rounds=4, contenders=("perl_jax", "perl_jax_full"))
