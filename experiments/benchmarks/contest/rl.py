"""A step of reinforcement learning from generation to update: perl_jax beside TRL with PEFT, and Tunix.

Claim     32 samples, their rewards, the reference's log-probabilities and one update of the policy's adapters take about
          half of the time of TRL's RLOOTrainer (rewards by a model) and GRPOTrainer (by a function) and of Tunix's
          GRPOLearner, and half of the latter's memory.
Command   python experiments/benchmarks/contest/rl.py
Hardware  2 CPU cores, 24 GiB, partly shared with other work (experiments/LOG.md)
Time      40 minutes, and once a few more to install TRL and Tunix (two gigabytes)
Numbers   RLOO 16.1 s, TRL 32.7 (2.03 times), 1.7 and 1.8 GiB; GRPO 13.9 s, TRL 27.0 (1.95), Tunix 26.4 (1.90), 1.7, 1.6 and 3.6 GiB
"""

import contest

if __name__ == "__main__":
    contest.main(__doc__, jobs=("rl-model", "rl-function"), rounds=8)
