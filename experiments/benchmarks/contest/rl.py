"""A step of reinforcement learning from generation to update: perl_jax beside TRL with PEFT, and Tunix.

Claim     32 samples, their rewards, the reference's log-probabilities and one update of the policy's adapters take about
          half of the time of TRL's RLOOTrainer (rewards by a model) and GRPOTrainer (by a function), and two
          thirds of the time and half of the memory of Tunix's GRPOLearner.
Command   python experiments/benchmarks/contest/rl.py
Hardware  2 CPU cores, 24 GiB; nothing else at work
Time      40 minutes, and once a few more to install TRL and Tunix (two gigabytes)
Numbers   see experiments/LOG.md
"""

import contest

if __name__ == "__main__":
    contest.main(__doc__, jobs=("rl-model", "rl-function"), rounds=8)
