"""The jobs: configs, state, the step, the loop; SFT, reward, preferences, RL."""
