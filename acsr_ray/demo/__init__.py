"""The whole method on scikit-learn's digits in a few minutes, with nothing to download."""
