"""Published checkpoints: what they call their settings and tensors, and one engine that converts both ways."""
