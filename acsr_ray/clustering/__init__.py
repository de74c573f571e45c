"""Clusters of a class's latents: k-means, elbow, Gaussians and the selection of the nearest cluster."""
