"""Sampling from a policy: perl_jax beside transformers with PEFT.

Claim     32 responses of 128 tokens are sampled in less than half of the time that transformers'
          generate takes with the adapters merged.
Command   python experiments/benchmarks/contest/generate.py
Hardware  2 CPU cores, 24 GiB, partly shared with other work (docs/log/speed_cpu.md)
Time      6 minutes, and once a few more to install TRL (a gigabyte)
Numbers   4.3 s, transformers 9.8 (2.28 times); 954 and 872 MiB
"""

import contest

if __name__ == "__main__":
    contest.main(__doc__, jobs=("generate",), rounds=10)
