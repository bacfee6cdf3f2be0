"""What makes passes of a model cheap: each file one thing that transformers, PEFT or PyTorch leave undone, and what it saves."""
