"""What soft-masked attention is for: each example is run as a module from the repository's root, `python -m examples.learn_mask` say."""
