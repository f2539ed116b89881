"""LoRA and its variants, and quantised bases beneath them."""
