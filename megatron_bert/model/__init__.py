"""The encoder, its heads and the public classes."""
