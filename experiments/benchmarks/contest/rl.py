"""A step of reinforcement learning from generation to update: perl_jax beside TRL with PEFT, and Tunix.

Claim     32 samples, their rewards, the reference's log-probabilities and one update of the policy's adapters take about
          half of the time of TRL's RLOOTrainer (rewards by a model) and GRPOTrainer (by a function), and two
          thirds of the time and half of the memory of Tunix's GRPOLearner.
Command   python experiments/benchmarks/contest/rl.py
Hardware  2 CPU cores, 24 GiB, partly shared with other work (experiments/LOG.md)
Time      40 minutes, and once a few more to install TRL and Tunix (two gigabytes)
Numbers   RLOO 16.9 s, TRL 35.4 (2.09 times), 1.6 and 1.8 GiB; GRPO 14.6 s, TRL 27.0 (1.85), Tunix 22.8 (1.56), 1.6, 1.6 and 3.5 GiB
"""

import contest

if __name__ == "__main__":
    contest.main(__doc__, jobs=("rl-model", "rl-function"), rounds=8)
