"""Coffee orders, a generated task with a known true reward: the quickstart, and every algorithm."""
