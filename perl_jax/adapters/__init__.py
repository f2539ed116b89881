"""LoRA adapters with their variants, and quantised bases."""
