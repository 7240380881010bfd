"""Other people's architectures, small, with every parameter away from its default: what the tests feed normfuse."""
