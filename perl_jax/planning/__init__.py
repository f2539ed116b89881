"""Memory and cost on TPU slices, by their compiler."""
