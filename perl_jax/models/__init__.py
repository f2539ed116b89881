"""The decoder, its attention, cache and packing, and pure functions over base and adapter trees."""
