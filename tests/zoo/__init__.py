"""Other people's architectures, small, every parameter away from its default: the tests' material."""
