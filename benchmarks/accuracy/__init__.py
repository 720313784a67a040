"""Fine-tunes and evaluates adapter methods at one budget of trainable parameters."""
