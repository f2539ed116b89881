"""What responses are paid: reward models, rules, Python functions, judges, and their sum."""
