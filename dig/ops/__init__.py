"""The hot operations of DiG, each with a readable PyTorch reference and faster implementations chosen by name."""
