"""A step of reinforcement learning from generation to update: perl_jax beside TRL with PEFT, and
Tunix.

Claim     32 samples, their rewards, the reference's log-probabilities and one update of the
          policy's adapters take about half of the time of TRL's RLOOTrainer (rewards by a model)
          and GRPOTrainer (by a function) and of Tunix's GRPOLearner, in two thirds of TRL's memory
          and a third of Tunix's.
Command   python experiments/benchmarks/contest/rl.py
Hardware  2 CPU cores, 24 GiB, partly shared with other work (docs/log/speed_cpu.md)
Time      40 minutes, and once a few more to install TRL and Tunix (two gigabytes)
Numbers   RLOO 16.1 s, TRL 34.6 (2.15 times), 1.1 and 1.8 GiB; GRPO 13.2 s, TRL 28.7 (2.17), Tunix
          25.0 (1.89), 1.1, 1.6 and 3.6 GiB
"""

import contest

if __name__ == "__main__":
    contest.main(__doc__, jobs=("rl-model", "rl-function"), rounds=8)
