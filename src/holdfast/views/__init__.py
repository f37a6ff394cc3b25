"""View transforms: inner maximisation over weights, and BatchNorm branches."""
