"""Stage iii: the bundle of everything learnt, and the `Purifier` that uses it."""
