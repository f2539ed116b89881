"""The decoder and the pure functions over (base, adapter, tokens)."""
